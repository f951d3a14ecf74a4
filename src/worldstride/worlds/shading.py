"""From what a ray hit to its colour: patterns, light, paintings and sky."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from worldstride.worlds.scene import CELLS, Scene, ball_centres, gate_edges

EYE = 1.0
"""Height of the eye above the floor in metres."""


class Rays(NamedTuple):
    """One ray a pixel: where the eye is, where it looks."""

    ox: Tensor  # [B, F, 1, 1] eye
    oz: Tensor
    dx: Tensor  # [B, F, n, n] unit direction, y upwards
    dy: Tensor
    dz: Tensor
    ix: Tensor  # reciprocals, shared by walls and boxes
    iy: Tensor
    iz: Tensor


class Hit(NamedTuple):
    """The nearest surface found so far along each ray."""

    distance: Tensor  # [B, F, n, n]
    surface: Tensor  # float while searching: comparing and selecting floats needs no conversion
    face: Tensor  # of boxes: 0 across x (or a panel's broad side), 1 top, 2 across z
    local: Tensor  # coordinate along a turning panel


def per_world(value: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]: one value for all of a world's pixels."""
    return value[:, None, None, None]


def per_frame(value: Tensor) -> Tensor:
    """[B, F] -> [B, F, 1, 1]: one value for all pixels of a frame."""
    return value[..., None, None]


def _pick(table: Tensor, index: Tensor) -> Tensor:
    """table [B, K], index [B, F, n, n] -> [B, F, n, n]."""
    return table.gather(1, index.flatten(1)).view(index.shape)


def _pick_frame(table: Tensor, index: Tensor) -> Tensor:
    """table [B, F, K], index [B, F, n, n] -> [B, F, n, n]."""
    return table.gather(2, index.flatten(2)).view(index.shape)


def _paintings(scene: Scene, surface: Tensor, along: Tensor, height: Tensor) -> Tensor:
    """Cell of the painting that covers each pixel, counted over all paintings; -1 where there is none."""
    cell = torch.full_like(along, -1.0)
    for j in range(scene.painting.shape[1]):
        wall, u, v, half_u, half_v = (per_world(scene.painting[:, j, k]) for k in range(5))
        lu, lv = (along - u) / half_u, (height - v) / half_v
        inside = (surface == wall) & (lu.abs() < 1) & (lv.abs() < 1)
        column = ((lu + 1) * (CELLS / 2)).floor()
        row = ((lv + 1) * (CELLS / 2)).floor()
        cell = torch.where(inside, column * CELLS + row + CELLS * CELLS * j, cell)
    return cell.clamp_max(CELLS * CELLS * scene.painting.shape[1] - 1)


def shade(scene: Scene, time: Tensor, rays: Rays, hit: Hit) -> tuple[Tensor, Tensor]:
    """Colour [B, F, 3, n, n] of what was hit, and its identity with the paintings named [B, F, n, n]
    int64."""
    ids, surface, face = scene.surfaces, hit.surface, hit.face
    x, y, z = rays.ox + hit.distance * rays.dx, EYE + hit.distance * rays.dy, rays.oz + hit.distance * rays.dz
    index = surface.clamp_min(0).long()
    pillar = (index >= ids.pillar) & (index < ids.crate)
    crate = (index >= ids.crate) & (index < ids.gate_x)
    gate_x, gate_z = (index >= ids.gate_x) & (index < ids.gate_z), (index >= ids.gate_z) & (index < ids.panel)
    plane_x = ((index >= ids.wall_x) & (index < ids.wall_z)) | gate_x  # across x
    plane_z = ((index >= ids.wall_z) & (index < ids.pillar)) | gate_z
    top = crate & (face == 1)
    u = torch.where(plane_x | (crate & (face == 0)), z, x)
    v = torch.where((index < ids.wall_x) | top, z, y)
    light = torch.where(plane_z, 0.8, 1.0)
    light = torch.where(crate, torch.where(face == 0, 0.75, torch.where(top, 1.0, 0.58)), light)
    cell = _paintings(scene, surface, u, y) if scene.painting.shape[1] else torch.full_like(y, -1.0)

    round_ = pillar
    frames = (len(scene), time.shape[1], -1)
    centre_x, centre_z, radius = (scene.pillar[:, None, :, k].expand(frames) for k in range(3))
    slot = index - ids.pillar
    if scene.ball.shape[1]:
        ball = (index >= ids.ball) & (index < ids.painting)
        centres = ball_centres(scene.ball, time)  # [B, F, n, 3]
        radius = torch.cat([radius, scene.ball[:, None, :, 8].expand(frames)], 2)
        centre_x, centre_z = (
            torch.cat([centre_x, centres[..., 0]], 2),
            torch.cat([centre_z, centres[..., 2]], 2),
        )
        slot = torch.where(ball, index - ids.ball + scene.pillar.shape[1], slot)
        lift = _pick_frame(centres[..., 1], (index - ids.ball).clamp(0, scene.ball.shape[1] - 1))
        v, round_ = torch.where(ball, y - lift, v), pillar | ball
    if radius.shape[2]:
        slot = slot.clamp(0, radius.shape[2] - 1)
        nx, nz = x - _pick_frame(centre_x, slot), z - _pick_frame(centre_z, slot)
        lit = 0.65 + 0.35 * (nx * 0.6 + nz * 0.8) / _pick_frame(radius, slot)
        light = torch.where(round_, lit, light)
    if scene.gate_x.shape[1] + scene.gate_z.shape[1]:  # a door's pattern slides along with it
        edges = torch.cat([gate_edges(scene.gate_x, time), gate_edges(scene.gate_z, time)], 2)
        edge = _pick_frame(edges, (index - ids.gate_x).clamp(0, edges.shape[2] - 1))
        u = torch.where(gate_x | gate_z, u - edge, u)
    if scene.panel.shape[1]:
        panel = (index >= ids.panel) & (index < ids.ball)
        u = torch.where(panel, hit.local, u)
        light = torch.where(panel, torch.where(face == 0, 0.9, 0.65), light)

    fu, fv = _pick(scene.frequency[..., 0], index), _pick(scene.frequency[..., 1], index)
    second = ((u * fu).floor() + (v * fv).floor()) % 2 < 0.5
    painted = cell >= 0
    entry = torch.where(painted, 2 * ids.painting + cell.long(), 2 * index + second.long())
    elevation = rays.dy.clamp(0, 1)
    azimuth = per_frame(scene.sun[:, None, 0] + scene.sun[:, None, 1] * time)
    ground = (rays.dx * rays.dx + rays.dz * rays.dz).rsqrt()
    glow = ((rays.dx * azimuth.sin() + rays.dz * azimuth.cos()) * ground).clamp(0, 1)
    glow = glow * glow
    glow = glow * glow
    glow = 0.45 * glow * glow * (1 - elevation)
    sky, out = surface < 0, []
    for c in range(3):
        horizon, zenith = per_world(scene.sky[:, 0, c]), per_world(scene.sky[:, 1, c])
        air = horizon * (1 - elevation) + zenith * elevation + glow
        out.append(torch.where(sky, air, _pick(scene.colours[..., c], entry) * light).clamp(0, 1))
    named = torch.where(painted, ids.painting + (cell * (1 / (CELLS * CELLS)) + 1e-3).floor(), surface)
    return torch.stack(out, 2), named.long()
