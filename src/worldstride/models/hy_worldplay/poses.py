"""Camera paths as HY-WorldPlay writes them: pose strings such as `w-12,right-12`, and pose files in JSON.

Both give one camera a latent, the first of a string being the identity (specification, section 8).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from worldstride.camera import check_cameras
from worldstride.errors import InputError, did_you_mean

STEP = 0.08
"""Units of length that a latent walks."""
TURN = 3.0
"""Degrees that a latent turns."""
WIDTH, HEIGHT = 1920, 1080
"""Pixels of the image that the intrinsics of pose files belong to."""
FOCAL = 969.6969696969696
"""Focal length in those pixels, of pose strings (89.4 by 58.2 degrees)."""
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


def poses_from_json(data: object) -> Poses:
    """The path in a pose file's object: for every latent, under "0", "1", ..., its "extrinsic" and its "K".

    "extrinsic" is the camera-to-world matrix, rows first; "K" the intrinsics in pixels, the same for all latents.
    """
    if not isinstance(data, Mapping) or not data:
        raise InputError(
            f'poses must be an object with an entry for every latent, under "0", "1", ...; got {data!r:.60}'
        )
    cameras: list[Tensor] = []
    pinholes: list[Tensor] = []
    for latent in range(len(data)):
        entry = data.get(str(latent))
        if not isinstance(entry, Mapping) or not {"extrinsic", "K"} <= set(entry):
            raise InputError(f'latent {latent} of {len(data)}: expected an entry "{latent}" with "extrinsic" and "K"')
        cameras.append(_matrix(entry["extrinsic"], 4, f'latent {latent}: "extrinsic"'))
        k = _matrix(entry["K"], 3, f'latent {latent}: "K"')
        (fx, skew, cx), (below, fy, cy), last = k.tolist()
        if skew or below or last != [0, 0, 1]:
            raise InputError(f'latent {latent}: "K" must be [[fx, 0, cx], [0, fy, cy], [0, 0, 1]], got {k.tolist()}')
        try:
            pinholes.append(intrinsics(fx, fy, cx, cy))
        except InputError as error:
            raise InputError(f'latent {latent}: "K": {error}') from None
        if not torch.allclose(pinholes[-1], pinholes[0], rtol=1e-6, atol=0):
            raise InputError(
                f'latent {latent}: "K" must be that of latent 0, whose normalised focal lengths are '
                f"{pinholes[0].diagonal()[:2].tolist()}; got {pinholes[-1].diagonal()[:2].tolist()}"
            )
    return Poses(check_cameras(torch.stack(cameras), "extrinsic"), pinholes[0])


def poses_to_json(poses: Poses) -> dict[str, dict[str, list[list[float]]]]:
    """What `poses_from_json` reads back: extrinsics camera-to-world, intrinsics for an image of 1920 x 1080 pixels."""
    k = poses.intrinsics.double()
    if k.shape != (3, 3):
        raise InputError(f"intrinsics must have shape [3, 3], got {list(k.shape)}")
    if not torch.allclose(k, intrinsics(float(k[0, 0]), float(k[1, 1]), 0.5, 0.5).to(k.device)):
        raise InputError(f"intrinsics must be normalised with the principal point at 0.5, got {k.tolist()}")
    pixels = (k * torch.tensor([[WIDTH], [HEIGHT], [1]]).to(k)).tolist()
    cameras = check_cameras(poses.cameras)
    if not len(cameras):
        raise InputError("a pose file holds at least one camera, got none")
    return {str(latent): {"extrinsic": camera, "K": pixels} for latent, camera in enumerate(cameras.tolist())}


def read_poses(path: str | Path) -> Poses:
    """The path in a pose file; see `poses_from_json`."""
    try:
        return poses_from_json(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: ours, or of JSON and text decoding
        raise InputError(f"cannot read the pose file {path}: {error}") from error


def write_poses(path: str | Path, poses: Poses) -> None:
    """Write a pose file that `read_poses` and HY-WorldPlay read."""
    Path(path).write_text(json.dumps(poses_to_json(poses), indent=1) + "\n", encoding="utf-8")


def _matrix(value: Any, size: int, name: str) -> Tensor:
    """Nested lists of numbers as float64 [size, size]."""
    try:
        matrix = torch.tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        matrix = torch.empty(0)
    if matrix.shape != (size, size):
        raise InputError(f"{name} must be {size} rows of {size} numbers, got {value!r:.80}")
    if not bool(matrix.isfinite().all()):
        raise InputError(f"{name} holds NaN or infinity; every number must be finite")
    return matrix
