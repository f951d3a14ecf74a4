"""Live control: one frame of walking with collisions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from worldstride.errors import InputError
from worldstride.worlds.scene import Scene
from worldstride.worlds.space import clamp_to_free, free_rectangles, is_free

PITCH_LIMIT = math.radians(20)
"""How far one can look up or down, in radians."""
REACH = 0.5
"""The longest step in metres that one frame may ask for; longer ones are shortened to it."""

_MARGIN = 0.25  # metres kept from walls and things
_SUBSTEP = 0.05  # metres


@torch.no_grad()
def step_pose(
    scene: Scene,
    pose: Tensor,
    forward: Tensor | float,
    strafe: Tensor | float,
    turn: Tensor | float,
    pitch: Tensor | float,
    time: Tensor | float,
) -> Tensor:
    """The pose [B, 4] = (x, z, yaw, pitch) one frame later.

    `forward` and `strafe` (right) are metres in this frame, `turn` (right) and `pitch` (up) radians, each a
    number or [B]; `time` is the frame for which doors are looked up. One slides along walls, pillars and
    crates; turning panels and balls are passed through.
    """
    if pose.shape != (len(scene), 4):
        raise InputError(f"pose must have shape [{len(scene)}, 4] for this scene, got {list(pose.shape)}")
    ahead, right, turned, nod, now = (
        torch.as_tensor(a, dtype=torch.float32, device=pose.device).expand(len(scene))
        for a in (forward, strafe, turn, pitch, time)
    )
    yaw = pose[:, 2] + turned
    move = torch.stack([ahead * yaw.sin() + right * yaw.cos(), ahead * yaw.cos() - right * yaw.sin()], -1)  # [B, 2]
    move = move * (REACH / move.norm(dim=-1, keepdim=True).clamp_min(1e-6)).clamp_max(1.0)
    rects = free_rectangles(scene, _MARGIN, now[:, None])  # [B, 1, R, 4]
    # a wall or door may have come closer while one stood still, so at least one substep is made
    point, count = pose[:, None, :2], max(1, math.ceil(float(move.norm(dim=-1).max()) / _SUBSTEP))
    for _ in range(count):
        point = _advance(scene, point, move[:, None] / count, rects)
    tilt = (pose[:, 3] + nod).clamp(-PITCH_LIMIT, PITCH_LIMIT)
    return torch.cat([point[:, 0], yaw[:, None], tilt[:, None]], -1)


def _advance(scene: Scene, point: Tensor, move: Tensor, rects: Tensor) -> Tensor:
    """One short move of point [B, 1, 2]; a place that is still blocked after sliding is not entered."""
    target = point + move
    for _ in range(2):
        target = clamp_to_free(_leave_things(scene, target), rects)
    blocked = ~(is_free(target, rects) & _clear(scene, target))
    was_free = is_free(point, rects) & _clear(scene, point)
    return torch.where((blocked & was_free)[..., None], point, target)


def _leave_things(scene: Scene, point: Tensor) -> Tensor:
    """Push point [B, 1, 2] out of pillars radially and out of crates across the nearest side."""
    for j in range(scene.pillar.shape[1]):
        centre, radius = scene.pillar[:, None, j, :2], scene.pillar[:, None, j, 2:3] + _MARGIN
        offset = point - centre
        length = offset.norm(dim=-1, keepdim=True).clamp_min(1e-4)
        point = torch.where(length < radius, centre + offset / length * radius, point)
    for j in range(scene.crate.shape[1]):
        centre, half = scene.crate[:, None, j, :2], scene.crate[:, None, j, 2::2] + _MARGIN  # [B, 1, 2]
        offset = point - centre
        depth = half - offset.abs()
        inside = (depth > 0).all(-1, keepdim=True)
        least = torch.stack([depth[..., 0] <= depth[..., 1], depth[..., 0] > depth[..., 1]], -1)
        side = torch.where(offset < 0, -1.0, 1.0)
        point = torch.where(inside & least, centre + side * half, point)
    return point


def _clear(scene: Scene, point: Tensor, slack: float = 1e-3) -> Tensor:
    """Whether point [B, 1, 2] keeps its margin from all pillars and crates: bool [B, 1]."""
    gap = (point[:, :, None] - scene.pillar[:, None, :, :2]).norm(dim=-1) - scene.pillar[:, None, :, 2]  # [B, 1, n]
    apart = (point[:, :, None] - scene.crate[:, None, :, :2]).abs() - scene.crate[:, None, :, 2::2]  # [B, 1, n, 2]
    return (gap > _MARGIN - slack).all(-1) & (apart.amax(-1) > _MARGIN - slack).all(-1)
