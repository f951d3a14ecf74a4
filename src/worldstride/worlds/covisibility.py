"""Exact co-visibility: which pixels of a frame another frame has seen, from the renderer's own geometry."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from worldstride.worlds.render import FAR, FOV, TraceFunction, check_views, directions, trace
from worldstride.worlds.scene import Scene, ball_centres, gate_edges, is_dynamic, panel_angles

_STILL = 0.02  # metres: a moving surface that moved less is at the same place
_TOLERANCE = 0.06  # metres, and share of the distance: covers the nearest-pixel lookup on slanted surfaces
_PIXELS = {"cpu": 1 << 19, "cuda": 1 << 24}  # pairs of pixels compared at once
_RAYS = {"cpu": 1 << 17, "cuda": 1 << 24}

_trace = trace


class _View(NamedTuple):
    distance: Tensor  # [B, F, n, n]
    surface: Tensor  # [B, F, n, n] int64, paintings and their wall are one


@torch.no_grad()
def covisible(
    scene: Scene, target_pose: Tensor, target_time: Tensor, source_pose: Tensor, source_time: Tensor,
    size: int = 48, trace: TraceFunction = trace,
) -> Tensor:  # fmt: skip
    """Which pixels of each target frame are seen in each source frame: bool [B, N, C, size, size].

    target_pose [B, C, 4], target_time [B, C], source_pose [B, N, 4], source_time [B, N] (frames). The
    target's hit points are projected into the source, where both distance and surface must agree. A point on
    a moving surface counts only if that thing is at the same place in both frames. The sky counts by
    direction; its colours may have drifted.
    """
    check_views(scene, target_pose, target_time, "target_pose")
    check_views(scene, source_pose, source_time, "source_pose")
    target = _view(scene, target_pose, target_time, size, trace)
    source = _view(scene, source_pose, source_time, size, trace)
    dx, up, dz = directions(target_pose, size)
    x = target_pose[..., 0, None, None] + target.distance * dx  # [B, C, n, n]
    y = target.distance * up  # above the eye
    z = target_pose[..., 1, None, None] + target.distance * dz
    moving = is_dynamic(scene, target.surface)
    target_state, source_state = _states(scene, target_time), _states(scene, source_time)
    b, c = target_time.shape
    step = max(1, _PIXELS.get(x.device.type, 1 << 20) // (b * c * size * size))
    out = []
    for first in range(0, source_time.shape[1], step):
        part = slice(first, first + step)
        seen = _seen(
            x,
            y,
            z,
            target.surface,
            source_pose[:, part],
            _View(source.distance[:, part], source.surface[:, part]),
        )
        same = _same_place(scene, target.surface, target_state, source_state[:, part])
        out.append(seen & (same | ~moving[:, None]))
    return torch.cat(out, 1)


@torch.no_grad()
def moving_pixels(scene: Scene, pose: Tensor, time: Tensor, size: int = 48, trace: TraceFunction = trace) -> Tensor:
    """Pixels that show something that moves (a door, a panel, a ball): bool [B, F, size, size]."""
    check_views(scene, pose, time)
    return is_dynamic(scene, _view(scene, pose, time, size, trace).surface)


def _view(scene: Scene, pose: Tensor, time: Tensor, size: int, trace: TraceFunction) -> _View:
    offset = torch.zeros(2, device=pose.device)
    frames = time.shape[1]
    if trace is _trace:  # a compiled tracer is called with the shapes it was compiled for
        frames = max(1, _RAYS.get(pose.device.type, 1 << 20) // (len(scene) * size * size))
    parts = [
        trace(scene, p, t, size, offset)[1:] for p, t in zip(pose.split(frames, 1), time.split(frames, 1), strict=True)
    ]
    surface = torch.cat([p[1] for p in parts], 1)
    if scene.painting.shape[1]:
        slot = (surface - scene.surfaces.painting).clamp_min(0)
        wall = scene.painting[..., 0].long().gather(1, slot.flatten(1)).view(surface.shape)
        surface = torch.where(surface >= scene.surfaces.painting, wall, surface)
    ground = (surface >= 0) & (surface < scene.surfaces.wall_x)
    return _View(torch.cat([p[0] for p in parts], 1), torch.where(ground, 0, surface))


def _seen(x: Tensor, y: Tensor, z: Tensor, surface: Tensor, pose: Tensor, view: _View) -> Tensor:
    """Points [B, C, n, n] against sources [B, N]: bool [B, N, C, n, n]."""
    size = x.shape[-1]
    eye_x, eye_z, yaw, pitch = (a[..., None, None, None] for a in pose.unbind(-1))  # [B, N, 1, 1, 1]
    cos, sin, cos_p, sin_p = yaw.cos(), yaw.sin(), pitch.cos(), pitch.sin()
    rx, rz, up = x[:, None] - eye_x, z[:, None] - eye_z, y[:, None]  # [B, N, C, n, n]
    right, level = cos * rx - sin * rz, sin * rx + cos * rz
    ahead = up * sin_p + level * cos_p
    scale = 1 / (ahead.clamp_min(1e-3) * torch.tan(torch.tensor(FOV / 2, device=x.device)))
    u, v = right * scale, (level * sin_p - up * cos_p) * scale
    visible = (ahead > 1e-2) & (u.abs() < 1) & (v.abs() < 1)
    column, row = (((a + 1) * (size / 2)).clamp(0, size - 1).long() for a in (u, v))
    index = (row * size + column).flatten(2)  # [B, N, C n n]
    there = view.distance.flatten(2).gather(2, index).view(u.shape)
    name = view.surface.flatten(2).gather(2, index).view(u.shape)
    here = (rx * rx + up * up + rz * rz).sqrt()
    agree = (here - there).abs() < _TOLERANCE * (1 + here)
    # The sky's hit points lie at FAR around the target, elsewhere than the source's: identity is enough.
    sky = (surface[:, None] < 0) & (there >= FAR)
    return visible & (name == surface[:, None]) & (agree | sky)


def _states(scene: Scene, time: Tensor) -> Tensor:
    """Where each moving surface is, as lengths [B, F, m, 3] in the order of the identities from `gate_x`
    on."""
    edges = torch.cat([gate_edges(scene.gate_x, time), gate_edges(scene.gate_z, time)], 2)
    edges = torch.nn.functional.pad(edges[..., None], (0, 2))
    angles, half = panel_angles(scene.panel, time), scene.panel[:, None, :, 2]
    tips = torch.stack([angles.cos() * half, angles.sin() * half, torch.zeros_like(angles)], -1)
    return torch.cat([edges, tips, ball_centres(scene.ball, time)], 2)


def _same_place(scene: Scene, surface: Tensor, target: Tensor, source: Tensor) -> Tensor:
    """Whether the moving thing behind each target pixel stands still between the frames: bool [B, N, C, n,
    n].

    target [B, C, m, 3] and source [B, N, m, 3] are states; true where `surface` [B, C, n, n] does not move.
    """
    b, c, size = surface.shape[:3]
    if not target.shape[2]:
        return torch.ones(b, source.shape[1], c, 1, 1, dtype=torch.bool, device=surface.device)
    still = (target[:, None] - source[:, :, None]).norm(dim=-1) < _STILL  # [B, N, C, m]
    slot = (surface - scene.surfaces.gate_x).clamp(0, target.shape[2] - 1).flatten(2)  # [B, C, n n]
    index = slot[:, None].expand(-1, source.shape[1], -1, -1)
    return still.gather(3, index).view(b, source.shape[1], c, size, size)
