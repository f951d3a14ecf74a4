"""A family of layouts that no courtyard has: a winding corridor of the same primitives, to test what was
learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from worldstride.worlds.dice import Dice
from worldstride.worlds.scene import CELLS, Scene

_LEGS, _PAINTINGS, _OBJECTS = 4, 14, 3
_SLACK = 1e-3
_WALL_X, _WALL_Z = _LEGS, _LEGS + 2 * 5  # first surface identities: after the floors, 5 planes across x


def sample_corridor(batch: int, device: torch.device | str = "cpu", generator: torch.Generator | None = None) -> Scene:
    """`batch` corridors of 3 or 4 legs with turns, about 2.5 m wide: 14 paintings, 3 pillars, 3 crates, 2
    balls.

    Legs 0 and 2 run along z, legs 1 and 3 along x. Nothing but the balls and the sun moves.
    """
    dice = Dice(device, generator)
    u, b, dev = dice.uniform, batch, dice.device
    half, height = 1.15 + 0.2 * u(b), 2.0 + 0.8 * u(b)
    length = 5.0 + 3.0 * u(b, _LEGS)
    length = torch.where((torch.arange(_LEGS, device=dev) == 3) & (u(b, 1) < 0.4), 0.0, length)
    # Two equal turns bring a leg back beside an earlier one; a third would cross it, hence the alternation.
    ahead = dice.sign(b, 2)  # direction of legs 0 (z) and 1 (x)
    back = dice.sign(b)  # of leg 2, against leg 0 or along it
    last = torch.where(back == ahead[:, 0], dice.sign(b), ahead[:, 1])
    step = torch.stack([ahead[:, 0], ahead[:, 1], back, last], 1) * length  # [B, 4] signed
    zero = torch.zeros_like(step)
    is_z = torch.arange(_LEGS, device=dev) % 2 == 0
    moves = torch.stack([torch.where(is_z, zero, step), torch.where(is_z, step, zero)], -1)  # [B, 4, 2]
    path = torch.cat([torch.zeros(b, 1, 2, device=dev), moves.cumsum(1)], 1)  # [B, 5, 2]
    start, end = path[:, :-1], path[:, 1:]
    low = torch.minimum(start, end) - half[:, None, None]
    high = torch.maximum(start, end) + half[:, None, None]
    rooms = torch.stack([low[..., 0], high[..., 0], low[..., 1], high[..., 1]], -1)  # [B, 4, 4]
    there = length > 0  # [B, 4]

    walls = _walls(path, step, half, height, there)
    pillar, crate, ball = _things(dice, path, moves, half)
    painting = _paintings(dice, path, step, half, height, there)
    surfaces = _LEGS + 2 * (5 + 6)
    pairs = [dice.pair(b, _LEGS, 0.1, 0.3), dice.pair(b, 2 * 11), dice.pair(b, 2 * _OBJECTS + 2)]
    cells = u(b, _PAINTINGS * CELLS * CELLS, 3)
    check = (0.5 + 0.5 * u(b, _LEGS, 1)).expand(b, _LEGS, 2)
    bricks = torch.stack([0.35 + 0.65 * u(b, surfaces - _LEGS), 0.5 + 0.75 * u(b, surfaces - _LEGS)], -1)
    flat = torch.zeros(b, _OBJECTS, 1, device=dev)
    stripes = torch.cat([flat, dice.integers(4, b, _OBJECTS, 1) * 1.1], -1)
    boards = torch.stack([0.8 + 1.4 * u(b, _OBJECTS), dice.integers(2, b, _OBJECTS) * 2.2], -1)
    bands = torch.cat([flat[:, :2], 4.0 + 3.0 * u(b, 2, 1)], -1)
    sun = torch.stack([u(b) * 2 * math.pi, dice.sign(b) * (0.002 + 0.004 * u(b))], -1)
    none = torch.zeros(b, 0, 6, device=dev)
    return Scene(
        floor=rooms, wall_x=walls[0], wall_z=walls[1], gate_x=none, gate_z=none.clone(), pillar=pillar,
        crate=crate, panel=torch.zeros(b, 0, 7, device=dev), ball=ball, painting=painting,
        colours=torch.cat([torch.cat(pairs, 1).flatten(1, 2), cells], 1),
        frequency=torch.cat([check, bricks, stripes, boards, bands], 1), sky=dice.sky(b), sun=sun,
        rooms=rooms.clone(), path=path,
    )  # fmt: skip


def _walls(path: Tensor, step: Tensor, half: Tensor, height: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Planes across x [B, 5, 4] (both sides of legs 0 and 2, the end) and across z [B, 6, 4] (legs 1, 3, two
    ends)."""
    planes: list[list[Tensor]] = [[], []]
    sign = step.sign()

    def add(axis: int, at: Tensor, one: Tensor, other: Tensor, shown: Tensor) -> None:
        low, high = torch.minimum(one, other) - _SLACK, torch.maximum(one, other) + _SLACK
        low, high = torch.where(shown, low, 1.0), torch.where(shown, high, -1.0)
        planes[axis].append(torch.stack([at, low, high, height], -1))

    for k in range(_LEGS):
        lateral, along = (0, 1) if k % 2 == 0 else (1, 0)
        for side in (-1.0, 1.0):
            # A wall is half a width shorter where the path turns to its own side, longer where it turns away.
            begin, end = -half, half
            if k > 0:
                begin = torch.where(sign[:, k - 1] == side, -half, half)
            if k + 1 < _LEGS:
                end = torch.where(there[:, k + 1] & (sign[:, k + 1] == side), -half, half)
            at = path[:, k, lateral] + side * half
            a = path[:, k, along] + sign[:, k] * begin
            z = path[:, k + 1, along] + sign[:, k] * end
            add(lateral, at, a, z, there[:, k])
    add(1, path[:, 0, 1] - sign[:, 0] * half, path[:, 0, 0] - half, path[:, 0, 0] + half, there[:, 0])
    short = ~there[:, 3]
    add(1, path[:, 3, 1] + sign[:, 2] * half, path[:, 3, 0] - half, path[:, 3, 0] + half, short)
    add(0, path[:, 4, 0] + sign[:, 3] * half, path[:, 4, 1] - half, path[:, 4, 1] + half, ~short)
    return torch.stack(planes[0], 1), torch.stack(planes[1], 1)


def _things(dice: Dice, path: Tensor, moves: Tensor, half: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A pillar and a crate in each of the first three legs [B, 3, 4], [B, 3, 5], and two balls [B, 2, 11]."""
    u, b, n = dice.uniform, len(half), _OBJECTS
    across = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], device=dice.device)  # lateral unit of legs 0, 1, 2

    def place(low: float, high: float) -> Tensor:
        share = low + (high - low) * u(b, n, 1)
        lateral = dice.sign(b, n, 1) * (half[:, None, None] - 0.4)
        return path[:, :n] + share * moves[:, :n] + lateral * across  # [B, 3, 2]

    p, c = place(0.25, 0.4), place(0.6, 0.75)
    pillar = torch.cat([p, 0.13 + 0.08 * u(b, n, 1), 1.0 + 1.3 * u(b, n, 1)], -1)
    crate = torch.cat([c, 0.15 + 0.06 * u(b, n, 1), 0.25 + 0.3 * u(b, n, 1), 0.15 + 0.06 * u(b, n, 1)], -1)
    middle = (path[:, 1:3] + path[:, 2:4]) / 2  # legs 1 and 2
    reach = moves[:, 1:3].abs() * 0.4 + 0.05
    speed, phase = dice.sign(b, 2, 1) * (0.03 + 0.03 * u(b, 2, 1)), 6.28 * u(b, 2, 1)
    radius, bounce = 0.15 + 0.1 * u(b, 2, 1), 0.8 * u(b, 2, 1) * (u(b, 2, 1) < 0.6)
    rest = [radius, bounce, 0.08 + 0.1 * u(b, 2, 1)]
    return pillar, crate, torch.cat([middle, reach, speed, speed, phase, phase, *rest], -1)


def _paintings(dice: Dice, path: Tensor, step: Tensor, half: Tensor, height: Tensor, there: Tensor) -> Tensor:
    """[B, 14, 5]: along the legs in turn, alternating sides, away from the corners."""
    u, b = dice.uniform, len(half)
    sign, out = step.sign(), []
    for m in range(_PAINTINGS):
        k, slot = m % _LEGS, m // _LEGS  # up to four a leg: two distances, two sides
        half_w, half_h = 0.5 + 0.3 * u(b), 0.42 + 0.2 * u(b)
        plane = (k // 2) * 2 + slot % 2  # the leg's lower or upper wall
        surface = (_WALL_X if k % 2 == 0 else _WALL_Z) + 2 * plane + slot % 2
        room = (step[:, k].abs() - 2 * half) / 2  # metres of straight wall for one painting
        free = (room - 2 * half_w - 0.1).clamp_min(0)
        at = half + (slot // 2) * room + 0.05 + half_w + free * u(b)
        up = 0.55 + half_h + (height - 0.7 - 2 * half_h).clamp_min(0) * u(b)
        centre = path[:, k, 1 if k % 2 == 0 else 0] + sign[:, k] * at
        half_w = torch.where(there[:, k], half_w, 1e-4)
        out.append(torch.stack([torch.full_like(up, float(surface)), centre, up, half_w, half_h], -1))
    return torch.stack(out, 1)
