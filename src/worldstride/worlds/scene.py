"""A batch of procedural worlds as plain tensors, and where their moving parts are at a given time.

Lengths are metres, angles radians, times frames (any float). Heights count upwards from the floor; x and z
are the horizontal axes of `worldstride.camera`. A rectangle is (x_lo, x_hi, z_lo, z_hi). A primitive that a
world lacks is degenerate (hi < lo, or size 0), so that every world of a family has the same shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from worldstride.errors import InputError

CELLS = 3
"""A painting is a grid of CELLS x CELLS random colours."""


class SurfaceIds(NamedTuple):
    """First surface identity of every kind; floors start at 0, the sky is -1.

    A wall has two identities (its sides): 2 j + 0 seen looking towards smaller coordinates, 2 j + 1 towards
    larger. From `gate_x` up to `painting` everything moves.
    """

    wall_x: int
    wall_z: int
    pillar: int
    crate: int
    gate_x: int
    gate_z: int
    panel: int
    ball: int
    painting: int
    end: int


@dataclass(frozen=True)
class Scene:
    """B worlds. Every field is a tensor whose first axis counts worlds."""

    floor: Tensor
    """[B, n, 4] rectangles with a pattern of their own; the first one is the ground everywhere else too."""
    wall_x: Tensor
    """[B, n, 4] planes x = pos: (pos, z_lo, z_hi, height)."""
    wall_z: Tensor
    """[B, n, 4] planes z = pos: (pos, x_lo, x_hi, height)."""
    gate_x: Tensor
    """[B, g, 6] doorways of the first g walls in `wall_x`: (lo, hi, height, slides 0 or 1, speed, phase)."""
    gate_z: Tensor
    """[B, g, 6] the same for `wall_z`."""
    pillar: Tensor
    """[B, n, 4] upright cylinders: (x, z, radius, height)."""
    crate: Tensor
    """[B, n, 5] axis-aligned boxes on the floor: (x, z, half size along x, y, z)."""
    panel: Tensor
    """[B, n, 7] thin boxes turning about their middle: (x, z, half width, half thickness, height, speed,
    phase)."""
    ball: Tensor
    """[B, n, 11] spheres: (x, z, amplitude x, z, speed x, z, phase x, z, radius, bounce height, bounce
    speed)."""
    painting: Tensor
    """[B, n, 5] rectangles on one side of a wall: (surface of that side, centre along the wall, centre
    height, half width, half height)."""
    colours: Tensor
    """[B, 2 S + CELLS^2 n, 3] the two colours of each of S patterned surfaces, then the cells of n
    paintings."""
    frequency: Tensor
    """[B, S, 2] half periods of the pattern per metre, along its two directions."""
    sky: Tensor
    """[B, 2, 3] colour at the horizon and at the zenith."""
    sun: Tensor
    """[B, 2] azimuth at time 0 and its drift per frame."""
    rooms: Tensor
    """[B, n, 4] rectangles in which one can stand, the court (or a corridor's first leg) first."""
    path: Tensor
    """[B, n, 2] centre line (x, z) of a corridor; n = 0 elsewhere. A repeated last point pads a shorter
    corridor."""

    def __len__(self) -> int:
        return self.floor.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.floor.device

    @property
    def surfaces(self) -> SurfaceIds:
        """Where each kind's surface identities begin."""
        floor, ids = self.floor.shape[1], []
        for count in (
            floor,
            2 * self.wall_x.shape[1],
            2 * self.wall_z.shape[1],
            self.pillar.shape[1],
            self.crate.shape[1],
            self.gate_x.shape[1],
            self.gate_z.shape[1],
            self.panel.shape[1],
            self.ball.shape[1],
            self.painting.shape[1],
        ):
            ids.append((ids[-1] if ids else 0) + count)
        return SurfaceIds(*ids)

    def to(self, device: torch.device | str) -> Scene:
        """The same worlds on another device."""
        return Scene(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def __getitem__(self, index: slice | Tensor | Sequence[int]) -> Scene:
        """Some of the worlds: a slice (views) or an index tensor or list (copies)."""
        if isinstance(index, int):
            raise InputError(
                f"select worlds by a slice, list or tensor, got {index}; use [{index}:{index + 1}] for one"
            )
        if not isinstance(index, slice):
            index = torch.as_tensor(index, device=self.device)
        return Scene(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @staticmethod
    def cat(scenes: Sequence[Scene]) -> Scene:
        """Worlds of one family joined along the batch."""
        if not scenes:
            raise InputError("Scene.cat needs at least one scene, got an empty list")
        for f in fields(Scene):
            shapes = {tuple(getattr(s, f.name).shape[1:]) for s in scenes}
            if len(shapes) > 1:
                raise InputError(f"scenes of different families cannot be joined: {f.name} has shapes {sorted(shapes)}")
        return Scene(**{f.name: torch.cat([getattr(s, f.name) for s in scenes]) for f in fields(Scene)})


def gate_edges(gate: Tensor, time: Tensor) -> Tensor:
    """Where the open part of each doorway ends: gate [B, g, 6], time [B, F] -> coordinate along the wall [B,
    F, g].

    The way is free from `lo` to the edge; a sliding door fills the rest. It stands open for a little more
    than half of its period and is shut for a sixth.
    """
    low, high, _, slides, speed, phase = gate[:, None].unbind(-1)  # [B, 1, g] each
    shut = (1.6 * torch.sin(speed * time[..., None] + phase) - 0.4).clamp(0, 1) * slides
    return high - (high - low) * shut


def panel_angles(panel: Tensor, time: Tensor) -> Tensor:
    """Turning angle of panels [B, n, 7] at times [B, F] -> [B, F, n]; 0 lies along x, growing towards z."""
    return panel[:, None, :, 6] + panel[:, None, :, 5] * time[..., None]


def ball_centres(ball: Tensor, time: Tensor) -> Tensor:
    """Centres (x, height, z) of balls [B, n, 11] at times [B, F] -> [B, F, n, 3]."""
    x, z, ax, az, wx, wz, px, pz, radius, bounce, wb = ball[:, None].unbind(-1)  # [B, 1, n] each
    t = time[..., None]
    height = radius + bounce * torch.sin(wb * t + px).abs()
    return torch.stack([x + ax * torch.sin(wx * t + px), height, z + az * torch.sin(wz * t + pz)], -1)


def is_dynamic(scene: Scene, surface: Tensor) -> Tensor:
    """Which surface identities (int64, any shape) belong to things that move (doors, panels, balls): bool."""
    ids = scene.surfaces
    return (surface >= ids.gate_x) & (surface < ids.painting)
