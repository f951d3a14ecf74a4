"""The plain court: the smallest world, where nothing moves."""

from __future__ import annotations

import math

import torch

from worldstride.worlds.dice import Dice
from worldstride.worlds.scene import CELLS, Scene

_SLACK = 1e-3  # walls overlap by this much at corners, so that no ray slips through between two of them


def sample_plain(batch: int, device: torch.device | str = "cpu", generator: torch.Generator | None = None) -> Scene:
    """`batch` plain courts: four walls, 4 pillars, 2 crates, 5 paintings; nothing moves."""
    dice = Dice(device, generator)
    u, pillars, crates, paintings = dice.uniform, 4, 2, 5
    half = 3.4 + 1.0 * u(batch)
    pairs = [
        dice.pair(batch, 1, 0.1, 0.3),
        dice.pair(batch, 4).repeat_interleave(2, 1),
        dice.pair(batch, pillars),
        dice.pair(batch, crates),
    ]
    height = 1.7 + 1.0 * u(batch)
    edge = half + _SLACK
    walls = [torch.stack([s * half, -edge, edge, height], -1) for s in (1.0, -1.0)]
    wall = torch.stack(walls, 1)  # [B, 2, 4]
    check = (0.5 + 0.5 * u(batch, 1, 1)).expand(batch, 1, 2)
    bricks = torch.stack([0.35 + 0.65 * u(batch, 4), 0.5 + 0.75 * u(batch, 4)], -1).repeat_interleave(2, 1)
    stripes = torch.stack([torch.zeros(batch, pillars, device=dice.device), dice.integers(4, batch, pillars) * 1.1], -1)
    boards = torch.stack([0.8 + 1.4 * u(batch, crates), dice.integers(2, batch, crates) * 2.2], -1)
    pillar = torch.cat(
        [
            (u(batch, pillars, 2) * 2 - 1) * (half - 0.7)[:, None, None],
            0.16 + 0.26 * u(batch, pillars, 1),
            1.0 + 1.5 * u(batch, pillars, 1),
        ],
        -1,
    )
    sizes = torch.tensor([0.25, 0.35, 0.25], device=dice.device) + torch.tensor(
        [0.3, 0.5, 0.3], device=dice.device
    ) * u(batch, crates, 3)
    crate = torch.cat([(u(batch, crates, 2) * 2 - 1) * (half - 0.9)[:, None, None], sizes], -1)
    half_w, half_h = 0.55 + 0.35 * u(batch, paintings), 0.42 + 0.2 * u(batch, paintings)
    wall_of = (dice.integers(4, batch, 1) + torch.arange(paintings, device=dice.device)) % 4  # +x, -x, +z, -z
    inner = 1 + 2 * wall_of + 1 - wall_of % 2  # the court sees a wall at +half looking towards larger coordinates
    across = (u(batch, paintings) * 2 - 1) * (half - 1.1)[:, None]
    up = 0.55 + half_h + (height[:, None] - 0.7 - 2 * half_h).clamp_min(0) * u(batch, paintings)
    cells = u(batch, paintings * CELLS * CELLS, 3)
    room = torch.stack([-half, half, -half, half], -1)[:, None]
    none = torch.zeros(batch, 0, 6, device=dice.device)
    return Scene(
        floor=room, wall_x=wall, wall_z=wall.clone(), gate_x=none, gate_z=none.clone(), pillar=pillar,
        crate=crate, panel=torch.zeros(batch, 0, 7, device=dice.device),
        ball=torch.zeros(batch, 0, 11, device=dice.device),
        painting=torch.stack([inner.float(), across, up, half_w, half_h], -1),
        colours=torch.cat([torch.cat(pairs, 1).flatten(1, 2), cells], 1),
        frequency=torch.cat([check, bricks, stripes, boards], 1), sky=dice.sky(batch),
        sun=torch.stack([u(batch) * 2 * math.pi, torch.zeros(batch, device=dice.device)], -1),
        rooms=room.clone(), path=torch.zeros(batch, 0, 2, device=dice.device),
    )  # fmt: skip
