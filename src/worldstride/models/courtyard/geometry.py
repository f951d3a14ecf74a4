"""Where a token looks, as rotary angles, projective matrices and input features.

Rotary angles come from the token's ray in the world and not from the image grid: azimuth and elevation of the ray,
the point where it meets the ground, and the frame's rank in the window. Everything a *key* holds is in the world
frame, and the input features see only the frame's own camera with its heading taken out, so a frame's keys stay
valid from chunk to chunk; a new rank only turns the last pairs. Projective attention follows PRoPE (Li et al., 2025,
arXiv 2507.10496): queries, keys and values are mapped by lifted camera matrices, so that a pair of tokens meets
through P_query P_key^-1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worldstride import camera, rope
from worldstride.models.courtyard.config import CameraCode, CourtyardConfig

EYE_HEIGHT = 1.0
"""Metres from the eye plane y = 0 down to the ground."""
FIELD_OF_VIEW = math.radians(80)
"""Horizontal and vertical field of view that the model was trained with, radians."""
RANK_FREQUENCIES = (1.0, 0.35, 0.12)
"""Radians per rank of the rotary pairs that hold a frame's place in the window."""
KIND_ANGLE = 2 * math.pi / 3
"""Radians per kind (0 recent and new, 1 memory, 2 sink) of the last rotary pair."""
METRES = 4.0
"""Unit of length in the projective matrices, so that translations are of order one."""

_GROUND = (0.4, 1.0, 2.2, 4.8)
_FREQUENCIES: dict[CameraCode, tuple[Sequence[float], Sequence[float], Sequence[float]]] = {
    # azimuth (integers: the circle closes), elevation, ground point along x and along z (radians per metre)
    "ray": ((1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24), (1, 2, 4, 6, 8, 12, 16, 24), _GROUND),
    "both": ((1, 2, 3, 5, 8, 12, 16, 24), (2, 6, 12, 24), _GROUND),
}
FEATURES = 21
"""Width of `Geometry.features`."""
_GRID = (0.1, 0.25, 0.5, 0.9, 1.5, 2.4)
"""Radians per patch, for projective attention alone, whose rotary half sees the image grid."""


@dataclass(frozen=True, eq=False)
class Geometry:
    """What the network needs to know of the cameras of F frames with n tokens each."""

    features: Tensor
    """Input features [B, F, n, f]."""
    cos: Tensor
    """Cosines [B, 1, F n, pairs] of the rotary angles."""
    sin: Tensor
    """Sines, likewise."""
    project: Tensor | None
    """Lifted camera matrices [B, F, 4, 4] (world to image), or None without projective attention."""
    unproject: Tensor | None
    """Their inverses."""

    def part(self, first: int, frames: int, size: int) -> Geometry:
        """Geometry of some frames, every `size` of them as a batch entry of their own: [B frames / size, size, ...]."""

        def cut(t: Tensor) -> Tensor:
            return t[:, first : first + frames].unflatten(1, (-1, size)).flatten(0, 1)

        tokens = self.features.shape[2]

        def angles(t: Tensor) -> Tensor:
            return cut(t[:, 0].unflatten(1, (-1, tokens))).flatten(1, 2)[:, None]

        matrices = (None if t is None else cut(t) for t in (self.project, self.unproject))
        return Geometry(cut(self.features), angles(self.cos), angles(self.sin), *matrices)


def projective_channels(config: CourtyardConfig) -> int:
    """Channels of a head under camera matrices (a multiple of 4); the rest are rotary."""
    return {"projective": 32, "both": 16}.get(config.camera, 0)


def geometry(config: CourtyardConfig, cameras: Tensor, ranks: Tensor, kinds: Tensor) -> Geometry:
    """Geometry of cameras [B, F, 4, 4] at ranks [B, F] of kinds [B, F]."""
    cameras = cameras.float()
    intrinsics = camera.intrinsics_from_fov(FIELD_OF_VIEW)
    on_device = intrinsics.to(cameras, non_blocking=True)  # here and below, so that the GPU is never waited for
    direction = camera.rays(cameras, on_device, *config.grid).flatten(2, 3)  # [B, F, n, 3]
    features = _own_features(cameras, direction)
    pairs = [_ray_angles(config, cameras, direction), _time_angles(ranks, kinds, config.tokens)]
    angle = torch.cat(pairs, -1).flatten(1, 2)[:, None]  # [B, 1, F n, pairs]
    project = unproject = None
    if projective_channels(config):
        project, unproject = _lifted(cameras, intrinsics)
    return Geometry(features, angle.cos(), angle.sin(), project, unproject)


def _ray_angles(config: CourtyardConfig, cameras: Tensor, direction: Tensor) -> Tensor:
    if config.camera == "projective":
        row = torch.arange(config.tokens, device=cameras.device) // config.grid[1]
        column = torch.arange(config.tokens, device=cameras.device) % config.grid[1]
        grid = torch.cat([rope.angles(row.float(), _GRID), rope.angles(column.float(), _GRID)], -1)  # [n, 12]
        return grid.expand(*cameras.shape[:2], -1, -1)
    azimuth, elevation, ground = _FREQUENCIES[config.camera]
    x, down, z = direction.unbind(-1)  # [B, F, n] each; y points down
    reach = EYE_HEIGHT / down.clamp_min(EYE_HEIGHT / 5)  # metres along the ray to the ground, at most 5
    ground_x, ground_z = cameras[..., 0, 3, None] + reach * x, cameras[..., 2, 3, None] + reach * z
    return torch.cat(
        [
            rope.angles(torch.atan2(x, z), azimuth),
            rope.angles(torch.atan2(-down, x.hypot(z)), elevation),
            rope.angles(ground_x, ground),
            rope.angles(ground_z, ground),
        ],
        -1,
    )


def _time_angles(ranks: Tensor, kinds: Tensor, tokens: int) -> Tensor:
    time = torch.cat([rope.angles(ranks.float(), RANK_FREQUENCIES), rope.angles(kinds.float(), (KIND_ANGLE,))], -1)
    return time[:, :, None].expand(-1, -1, tokens, -1)  # [B, F, n, 4]


def turn(config: CourtyardConfig, keys: Tensor, ranks: Tensor, kinds: Tensor, back: bool = False) -> Tensor:
    """Keys [B, F, ..., head_dim] of rank and kind 0 at ranks [F] of kinds [F]; with `back` the other way round.

    Only the temporal channels turn, since everything else that a key holds is in the world frame.
    """
    first, second, count = _temporal(config)
    cos, sin = _turning(keys, ranks, kinds, 1, -1 if back else 1)
    pair = torch.cat([keys[..., first : first + count], keys[..., second:]], -1)
    one, two = rope.rotate(pair, cos, sin).chunk(2, -1)
    return torch.cat([keys[..., :first], one, keys[..., first + count : second], two], -1)


def turn_in_place(
    config: CourtyardConfig, keys: Tensor, ranks: Tensor, kinds: Tensor, dim: int, back: bool = False
) -> None:
    """The same on keys [..., F, ..., head_dim] whose frames lie along `dim`, without moving what stays as it is."""
    first, second, count = _temporal(config)
    cos, sin = _turning(keys, ranks, kinds, dim, -1 if back else 1)
    a, b = keys[..., first : first + count], keys[..., second:]
    pair = rope.rotate(torch.cat([a, b], -1), cos, sin)
    a.copy_(pair[..., :count])
    b.copy_(pair[..., count:])


def _temporal(config: CourtyardConfig) -> tuple[int, int, int]:
    """Where the two halves of the temporal pairs begin in a key, and how many pairs there are."""
    count, rotary = len(RANK_FREQUENCIES) + 1, config.head_dim - projective_channels(config)
    return config.head_dim - rotary // 2 - count, config.head_dim - count, count


def _turning(keys: Tensor, ranks: Tensor, kinds: Tensor, dim: int, sign: int) -> tuple[Tensor, Tensor]:
    time = _time_angles(ranks[None], kinds[None], 1)[0, :, 0] * sign  # [F, 4]
    shape = [1] * keys.ndim
    shape[dim], shape[-1] = time.shape
    cos, sin = (t.to(keys.dtype).view(shape) for t in (time.cos(), time.sin()))
    return cos, sin


def _own_features(cameras: Tensor, direction: Tensor) -> Tensor:
    forward = cameras[..., :3, 2]
    flat = forward[..., ::2] / forward[..., ::2].norm(dim=-1, keepdim=True).clamp_min(1e-6)
    sin, cos = flat[..., 0, None], flat[..., 1, None]
    x, y, z = direction.unbind(-1)
    return _harmonics(torch.stack([cos * x - sin * z, y, sin * x + cos * z], -1))


def _harmonics(x: Tensor) -> Tensor:
    turned = torch.cat([x, 2 * x, 4 * x], -1)
    return torch.cat([x, turned.sin(), turned.cos()], -1)


def _lifted(cameras: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor]:
    pose = cameras.clone()
    pose[..., :3, 3] /= METRES
    lift = torch.eye(4)
    lift[:3, :3] = intrinsics
    lift, lower = (m.to(cameras, non_blocking=True) for m in (lift, torch.linalg.inv(lift)))
    return lift @ camera.invert(pose), pose @ lower
