"""The ray caster: what a camera sees in a `Scene`, how far away it is, and which surface it is.

`trace` is made of elementwise operations and gathers only, with its loops unrolled over the scene's shapes,
so that `torch.compile(trace, dynamic=False)` turns it into very few kernels; it never waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from worldstride.camera import intrinsics_from_fov
from worldstride.errors import InputError
from worldstride.worlds.scene import Scene, ball_centres, gate_edges, panel_angles
from worldstride.worlds.shading import EYE, Hit, Rays, per_frame, per_world, shade

FOV = math.radians(80)
"""Field of view of every world's camera, horizontal and vertical, in radians."""
FAR = 100.0
"""Distance reported for the sky in metres."""

TraceFunction = Callable[[Scene, Tensor, Tensor, int, Tensor], tuple[Tensor, Tensor, Tensor]]
"""`trace`, or a compiled one."""

_NEAR = 1e-3
_EAGER_RAYS = {"cpu": 1 << 17, "cuda": 1 << 24}  # rays a pass in eager mode: cache-sized, memory-sized


def intrinsics() -> Tensor:
    """Normalised intrinsics [3, 3] of every world's camera, for `worldstride.camera`."""
    return intrinsics_from_fov(FOV)


def directions(pose: Tensor, size: int, offset: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Unit ray directions (x, up, z), each [..., size, size], of poses [..., 4]; `offset` (y, x) shifts by
    pixels."""
    tan = math.tan(FOV / 2)
    cells = torch.arange(size, device=pose.device, dtype=torch.float32) + 0.5
    oy, ox = (0.0, 0.0) if offset is None else (offset[0], offset[1])
    v = (1 - (cells + oy) * (2 / size))[:, None] * tan  # up
    u = ((cells + ox) * (2 / size) - 1)[None] * tan  # right
    scale = (u * u + v * v + 1).rsqrt()
    cos, sin, cos_p, sin_p = (
        a[..., None, None] for a in (pose[..., 2].cos(), pose[..., 2].sin(), pose[..., 3].cos(), pose[..., 3].sin())
    )
    up = (v * cos_p + sin_p) * scale
    ahead, right = (cos_p - v * sin_p) * scale, u * scale
    return cos * right + sin * ahead, up, cos * ahead - sin * right


def _inverse(value: Tensor) -> Tensor:
    return 1 / torch.where(value.abs() < 1e-6, 1e-6, value)


def _walls(scene: Scene, time: Tensor, rays: Rays, hit: Hit, axis: int) -> Hit:
    ids, best, surface = scene.surfaces, hit.distance, hit.surface
    if axis == 0:
        walls, gates, first, gate_id = scene.wall_x, scene.gate_x, ids.wall_x, ids.gate_x
        eye, inverse, ahead, side, along = rays.ox, rays.ix, rays.dx, rays.oz, rays.dz
    else:
        walls, gates, first, gate_id = scene.wall_z, scene.gate_z, ids.wall_z, ids.gate_z
        eye, inverse, ahead, side, along = rays.oz, rays.iz, rays.dz, rays.ox, rays.dx
    edges = gate_edges(gates, time) if gates.shape[1] else None  # [B, F, g]
    far_side = (ahead > 0).float()
    for j in range(walls.shape[1]):
        pos, low, high, height = (per_world(walls[:, j, k]) for k in range(4))
        t = (pos - eye) * inverse
        y, lateral = EYE + t * rays.dy, side + t * along
        ok = (t > _NEAR) & (t < best) & (y > 0) & (y < height) & (lateral > low) & (lateral < high)
        name = far_side + (first + 2 * j)
        if edges is not None and j < gates.shape[1]:
            g_low, g_high, g_height = (per_world(gates[:, j, k]) for k in range(3))
            doorway = (lateral > g_low) & (lateral < g_high) & (y < g_height)
            ok = ok & ~(doorway & (lateral < per_frame(edges[..., j])))
            name = torch.where(doorway, float(gate_id + j), name)
        best, surface = torch.where(ok, t, best), torch.where(ok, name, surface)
    return hit._replace(distance=best, surface=surface)


def _pillars(scene: Scene, rays: Rays, hit: Hit) -> Hit:
    best, surface = hit.distance, hit.surface
    a = rays.dx * rays.dx + rays.dz * rays.dz
    inverse = 1 / a
    for j in range(scene.pillar.shape[1]):
        cx, cz, radius, height = (per_world(scene.pillar[:, j, k]) for k in range(4))
        px, pz = rays.ox - cx, rays.oz - cz
        h = px * rays.dx + pz * rays.dz
        root = h * h - a * (px * px + pz * pz - radius * radius)
        t = (-h - root.clamp_min(0).sqrt()) * inverse
        y = EYE + t * rays.dy
        ok = (root > 0) & (t > _NEAR) & (t < best) & (y > 0) & (y < height)
        best = torch.where(ok, t, best)
        surface = torch.where(ok, float(scene.surfaces.pillar + j), surface)
    return hit._replace(distance=best, surface=surface)


def _slab(near: Tensor, far: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    a, b = near * inverse, far * inverse
    return torch.minimum(a, b), torch.maximum(a, b)


def _crates(scene: Scene, rays: Rays, hit: Hit) -> Hit:
    best, surface, face = hit.distance, hit.surface, hit.face
    for j in range(scene.crate.shape[1]):
        cx, cz, hx, hy, hz = (per_world(scene.crate[:, j, k]) for k in range(5))
        qx, qy, qz = cx - rays.ox, hy - EYE, cz - rays.oz
        x0, x1 = _slab(qx - hx, qx + hx, rays.ix)
        y0, y1 = _slab(qy - hy, qy + hy, rays.iy)
        z0, z1 = _slab(qz - hz, qz + hz, rays.iz)
        enter = torch.maximum(x0, torch.maximum(y0, z0))
        leave = torch.minimum(x1, torch.minimum(y1, z1))
        ok = (enter < leave) & (enter > _NEAR) & (enter < best)
        best = torch.where(ok, enter, best)
        surface = torch.where(ok, float(scene.surfaces.crate + j), surface)
        side = torch.where(enter == x0, 0.0, torch.where(enter == y0, 1.0, 2.0))
        face = torch.where(ok, side, face)
    return hit._replace(distance=best, surface=surface, face=face)


def _panels(scene: Scene, time: Tensor, rays: Rays, hit: Hit) -> Hit:
    best, surface, face, local = hit
    angles = panel_angles(scene.panel, time)  # [B, F, n]
    for j in range(scene.panel.shape[1]):
        cx, cz, width, thick, height = (per_world(scene.panel[:, j, k]) for k in range(5))
        c, s = per_frame(angles[..., j].cos()), per_frame(angles[..., j].sin())
        px, pz = rays.ox - cx, rays.oz - cz
        u, w = px * c + pz * s, pz * c - px * s  # the eye along and across the panel
        du, dw = rays.dx * c + rays.dz * s, rays.dz * c - rays.dx * s
        u0, u1 = _slab(-width - u, width - u, _inverse(du))
        w0, w1 = _slab(-thick - w, thick - w, _inverse(dw))
        y0, y1 = _slab(height * 0 - EYE, height - EYE, rays.iy)
        enter = torch.maximum(u0, torch.maximum(w0, y0))
        leave = torch.minimum(u1, torch.minimum(w1, y1))
        ok = (enter < leave) & (enter > _NEAR) & (enter < best)
        best = torch.where(ok, enter, best)
        surface = torch.where(ok, float(scene.surfaces.panel + j), surface)
        face = torch.where(ok, torch.where(enter == w0, 0.0, 2.0), face)
        local = torch.where(ok, u + enter * du, local)
    return Hit(best, surface, face, local)


def _balls(scene: Scene, time: Tensor, rays: Rays, hit: Hit) -> Hit:
    best, surface = hit.distance, hit.surface
    centres = ball_centres(scene.ball, time)  # [B, F, n, 3]
    for j in range(scene.ball.shape[1]):
        radius = per_world(scene.ball[:, j, 8])
        px, py, pz = (
            rays.ox - per_frame(centres[..., j, 0]),
            EYE - per_frame(centres[..., j, 1]),
            rays.oz - per_frame(centres[..., j, 2]),
        )
        h = px * rays.dx + py * rays.dy + pz * rays.dz
        root = h * h - (px * px + py * py + pz * pz - radius * radius)
        t = -h - root.clamp_min(0).sqrt()
        ok = (root > 0) & (t > _NEAR) & (t < best)
        best = torch.where(ok, t, best)
        surface = torch.where(ok, float(scene.surfaces.ball + j), surface)
    return hit._replace(distance=best, surface=surface)


def _floor(scene: Scene, rays: Rays) -> Hit:
    t = -EYE * rays.iy
    ok = rays.dy < 0
    x, z = rays.ox + t * rays.dx, rays.oz + t * rays.dz
    patch = torch.zeros_like(t)
    for j in range(1, scene.floor.shape[1]):
        x0, x1, z0, z1 = (per_world(scene.floor[:, j, k]) for k in range(4))
        patch = torch.where((x > x0) & (x < x1) & (z > z0) & (z < z1), float(j), patch)
    return Hit(torch.where(ok, t, FAR), torch.where(ok, patch, -1.0), torch.zeros_like(t), torch.zeros_like(t))


def trace(scene: Scene, pose: Tensor, time: Tensor, size: int, offset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast one ray a pixel.

    pose [B, F, 4] = (x, z, yaw, pitch), time [B, F] in frames, offset [2] = sub-pixel shift (y, x) in pixels.
    Returns colour [B, F, 3, size, size] in [0, 1], distance [B, F, size, size] along the ray in metres (`FAR`
    for the sky), and surface [B, F, size, size] int64 (see `SurfaceIds`; -1 for the sky).
    """
    dx, dy, dz = directions(pose, size, offset)
    rays = Rays(per_frame(pose[..., 0]), per_frame(pose[..., 1]), dx, dy, dz, _inverse(dx), _inverse(dy), _inverse(dz))
    hit = _floor(scene, rays)
    hit = _walls(scene, time, rays, hit, 0)
    hit = _walls(scene, time, rays, hit, 1)
    if scene.pillar.shape[1]:
        hit = _pillars(scene, rays, hit)
    if scene.crate.shape[1]:
        hit = _crates(scene, rays, hit)
    if scene.panel.shape[1]:
        hit = _panels(scene, time, rays, hit)
    if scene.ball.shape[1]:
        hit = _balls(scene, time, rays, hit)
    colour, surface = shade(scene, time, rays, hit)
    return colour, hit.distance, surface


def check_views(scene: Scene, pose: Tensor, time: Tensor, name: str = "pose") -> None:
    """Raise `InputError` unless pose [B, F, 4] and time [B, F] fit the scene's B worlds."""
    if pose.ndim != 3 or pose.shape[-1] != 4 or pose.shape[0] != len(scene):
        raise InputError(f"{name} must have shape [{len(scene)}, frames, 4] for this scene, got {list(pose.shape)}")
    if time.shape != pose.shape[:2]:
        raise InputError(f"time of {name} must have shape {list(pose.shape[:2])}, got {list(time.shape)}")


_trace = trace


@torch.no_grad()
def render(
    scene: Scene,
    pose: Tensor,
    time: Tensor,
    size: int = 96,
    supersample: int = 2,
    trace: TraceFunction = trace,
) -> Tensor:
    """Pictures, uint8 [B, F, 3, size, size], each pixel the mean of supersample^2 rays.

    pose [B, F, 4], time [B, F] in frames. The default tracer works in pieces of bounded memory; a compiled
    one is called with the full shapes, which it was compiled for.
    """
    check_views(scene, pose, time)
    b, f = time.shape
    limit = _EAGER_RAYS.get(pose.device.type, 1 << 22) // (size * size)
    if trace is _trace and b * f > max(limit, 1):
        if b > 1:
            halves = [slice(0, b // 2), slice(b // 2, b)]
            return torch.cat([render(scene[s], pose[s], time[s], size, supersample) for s in halves])
        parts = [
            render(scene, p, t, size, supersample) for p, t in zip(pose.chunk(2, 1), time.chunk(2, 1), strict=True)
        ]
        return torch.cat(parts, 1)
    shifts = (torch.arange(supersample, device=pose.device, dtype=torch.float32) + 0.5) / supersample - 0.5
    total: Tensor | None = None
    for i in range(supersample):
        for j in range(supersample):
            colour = trace(scene, pose, time, size, torch.stack([shifts[i], shifts[j]]))[0]
            total = colour if total is None else total + colour
    if total is None:
        raise InputError(f"supersample must be at least 1, got {supersample}")
    return (total * (255.0 / supersample**2)).round().to(torch.uint8)
