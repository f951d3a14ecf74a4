"""Action labels of HY-WorldPlay: every latent's camera motion as one of 81 classes (specification, section 8)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from worldstride.camera import check_cameras, relative

CLASSES = 81
"""Labels are 0 to 80: nine translations by nine rotations, `9 * translation + rotation`."""
STILL = 1e-4
"""Translation up to which a latent does not move, units of length of the world."""
CONE = 60.0
"""Degrees from an axis within which a translation goes along it."""
TURN = 0.05
"""Degrees up to which a latent does not turn about an axis."""

_CODES = ((0, 3, 4), (1, 5, 6), (2, 7, 8))
"""Code by first axis (row: none, forward, back) and second axis (column: none, right, left); for rotations the first
axis is right or left, the second up or down."""


def labels(cameras: Tensor, before: Tensor | None = None) -> Tensor:
    """Labels int64 [T] in 0..80 of camera-to-world matrices [T, 4, 4], OpenCV axes: of the motion that led to each.

    `before` [4, 4] is the camera of the latent before the first; without it the first label is 0. The motion is the
    camera seen from the one before. Its rotation is split as roll, yaw, pitch (R = Rz Ry Rx, a reading of "Euler xyz"
    that only matters for motions that turn about several axes at once and roll).
    """
    check_cameras(cameras)
    if before is not None:
        check_cameras(before[None], "before")
    cameras = cameras.double()
    path = torch.cat([cameras[:1] if before is None else before.to(cameras)[None], cameras])
    motion = relative(path[1:], path[:-1])  # [T, 4, 4]
    right, _, forward = motion[:, :3, 3].unbind(1)
    length = motion[:, :3, 3].norm(dim=1)
    reach = torch.where(length > STILL, math.cos(math.radians(CONE)) * length, math.inf)
    translation = _code(forward, right, reach)
    rotation = motion[:, :3, :3]
    pitch = torch.atan2(rotation[:, 2, 1], rotation[:, 2, 2])  # positive looks up
    yaw = torch.atan2(-rotation[:, 2, 0], torch.hypot(rotation[:, 2, 1], rotation[:, 2, 2]))  # positive turns right
    return 9 * translation + _code(yaw, pitch, torch.full_like(yaw, math.radians(TURN)))


def _code(first: Tensor, second: Tensor, threshold: Tensor) -> Tensor:
    """Codes int64 [T] of two axes' values [T]: above the threshold, below minus the threshold, or neither."""
    table = torch.tensor(_CODES, device=first.device)
    row, column = ((value > threshold).long() + 2 * (value < -threshold).long() for value in (first, second))
    return table[row, column]
