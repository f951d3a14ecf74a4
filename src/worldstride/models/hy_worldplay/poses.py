"""Camera paths of HY-WorldPlay's pose strings such as `w-12,right-12`, and its intrinsics.

A string gives one camera a latent, the first being the identity (specification, section 8). Pose files in JSON are read
by `load_trajectory`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from worldstride.errors import InputError, did_you_mean

STEP = 0.08
"""Units of length that a latent walks."""
TURN = 3.0
"""Degrees that a latent turns."""
WIDTH, HEIGHT = 1920, 1080
"""Pixels of the image that published intrinsics belong to."""
FOCAL = 969.6969696969696
"""Focal length in those pixels (89.4 by 58.2 degrees)."""
MAX_LATENTS = 100_000
"""Longest path of a pose string; a larger count is taken for a slip of the finger."""

_MOVES: dict[str, tuple[float, float, float, float]] = {  # right, forward, yaw, pitch; positive pitch looks up
    "w": (0, STEP, 0, 0),
    "s": (0, -STEP, 0, 0),
    "a": (-STEP, 0, 0, 0),
    "d": (STEP, 0, 0, 0),
    "up": (0, 0, 0, TURN),
    "down": (0, 0, 0, -TURN),
    "left": (0, 0, -TURN, 0),
    "right": (0, 0, TURN, 0),
}
_COUNT = re.compile(r"0*[1-9][0-9]{0,8}")


class Poses(NamedTuple):
    """A camera path."""

    cameras: Tensor
    """Camera-to-world matrices float64 [T, 4, 4], one a latent, OpenCV axes."""
    intrinsics: Tensor
    """Normalised intrinsics float64 [3, 3] of all of them: fx / (2 cx), fy / (2 cy), principal point 0.5."""


def intrinsics(fx: float = FOCAL, fy: float = FOCAL, cx: float = WIDTH / 2, cy: float = HEIGHT / 2) -> Tensor:
    """Normalised intrinsics float64 [3, 3] of a pinhole in pixels; the image is taken to be 2 cx by 2 cy."""
    for name, value in (("fx", fx), ("fy", fy), ("cx", cx), ("cy", cy)):
        if not 0 < value < math.inf:
            raise InputError(f"{name} must be a positive number of pixels, got {value!r}")
    return torch.tensor([[fx / (2 * cx), 0, 0.5], [0, fy / (2 * cy), 0.5], [0, 0, 1]], dtype=torch.float64)


def motion(names: Iterable[str]) -> Tensor:
    """Motion float64 [4, 4] of one latent in which the named moves are held: the next camera is `camera @ motion`.

    The camera turns first (yaw about its y axis, then pitch about its x axis) and walks along its new axes.
    """
    held = sorted(set(names))
    for name in held:
        if name not in _MOVES:
            raise InputError(f"unknown move {name!r}; known: {', '.join(_MOVES)}{did_you_mean(name, tuple(_MOVES))}")
    right, forward, yaw, pitch = (
        sum(axis) for axis in zip((0, 0, 0, 0), *(_MOVES[name] for name in held), strict=True)
    )
    sin_y, cos_y = math.sin(math.radians(yaw)), math.cos(math.radians(yaw))
    sin_p, cos_p = math.sin(math.radians(pitch)), math.cos(math.radians(pitch))
    rotation = [[cos_y, sin_y * sin_p, sin_y * cos_p], [0, cos_p, -sin_p], [-sin_y, cos_y * sin_p, cos_y * cos_p]]
    out = torch.eye(4, dtype=torch.float64)
    out[:3, :3] = torch.tensor(rotation, dtype=torch.float64)
    out[:3, 3] = out[:3, :3] @ torch.tensor([right, 0, forward], dtype=torch.float64)
    return out


def parse_poses(text: str) -> Poses:
    """The path of a pose string: `move-latents` joined by commas, one move at a time. Case and blanks are free.

    The identity stands before the first move, so `w-31` is a path of 32 latents.
    """
    path = torch.eye(4, dtype=torch.float64)[None]
    for place, token in enumerate(text.split(","), 1):
        name, dash, count = (part.strip() for part in token.strip().lower().partition("-"))
        where = f"pose string, move {place}: {token.strip()[:40]!r}"
        if name not in _MOVES or not dash:
            allowed = f"a move ({', '.join(_MOVES)}), '-' and a number of latents, such as 'w-12'"
            raise InputError(f"{where} is not {allowed}{did_you_mean(name, tuple(_MOVES))}")
        room = MAX_LATENTS - len(path)
        if not _COUNT.fullmatch(count) or int(count) > room:
            raise InputError(f"{where}: the number of latents must be a whole number from 1 to {room}")
        path = torch.cat([path, path[-1] @ _powers(motion([name]), int(count))])
    return Poses(path, intrinsics())


def _powers(step: Tensor, count: int) -> Tensor:
    """step, step^2, ... [count, 4, 4]."""
    powers = step[None]
    while len(powers) < count:
        powers = torch.cat([powers, powers[-1] @ powers])
    return powers[:count]
