"""Where a person can be: the free rectangles of a scene, and pushing positions out of walls and things."""

from __future__ import annotations

import torch
from torch import Tensor

from worldstride.worlds.scene import Scene, gate_edges


def free_rectangles(scene: Scene, margin: float, time: Tensor | None = None) -> Tensor:
    """Rectangles [B, F, R, 4] whose union is free of walls by `margin` metres: rooms, and passages between
    them.

    With time [B, F], a passage is as narrow as its sliding door leaves it; without, F = 1 and every door is
    open. Impossible rectangles have hi < lo.
    """
    frames = 1 if time is None else time.shape[1]
    out = [_shrink(scene.rooms, margin)[:, None].expand(-1, frames, -1, -1)]
    for axis, wall, gate in ((0, scene.wall_x, scene.gate_x), (1, scene.wall_z, scene.gate_z)):
        count = gate.shape[1]
        if not count:
            continue
        edge = gate[:, None, :, 1] if time is None else gate_edges(gate, time)  # [B, F, g]
        at = wall[:, None, :count, 0].expand_as(edge)
        low = gate[:, None, :, 0].expand_as(edge)
        inset = min(margin, 0.3)
        across = [low + inset, edge - inset]
        depth = [at - margin - 0.05, at + margin + 0.05]  # reaches into the rooms on both sides
        out.append(torch.stack([*depth, *across] if axis == 0 else [*across, *depth], -1))
    return torch.cat(out, 2)


def _shrink(rect: Tensor, margin: float) -> Tensor:
    return rect + torch.tensor([margin, -margin, margin, -margin], device=rect.device)


def clamp_to_free(point: Tensor, rects: Tensor) -> Tensor:
    """Nearest free position [B, F, 2] to point [B, F, 2], given `free_rectangles` [B, F or 1, R, 4]."""
    low, high = rects[..., 0::2], rects[..., 1::2]  # [B, F, R, 2]
    near = torch.minimum(torch.maximum(point[:, :, None], low), high)
    gap = (near - point[:, :, None]).square().sum(-1)
    gap = torch.where((low > high).any(-1), torch.inf, gap)  # [B, F, R]
    best = gap.argmin(-1)[..., None, None].expand(-1, -1, 1, 2)
    return near.gather(2, best)[:, :, 0]


def is_free(point: Tensor, rects: Tensor, slack: float = 1e-4) -> Tensor:
    """Whether point [B, F, 2] lies in one of the rectangles [B, F or 1, R, 4]: bool [B, F]."""
    low, high = rects[..., 0::2] - slack, rects[..., 1::2] + slack
    inside = (point[:, :, None] >= low) & (point[:, :, None] <= high)
    possible = rects[..., 0::2] <= rects[..., 1::2]
    return (inside & possible).all(-1).any(-1)


def obstacles(scene: Scene) -> tuple[Tensor, Tensor]:
    """Discs around pillars, crates and panels: centres [B, n, 2] and radii [B, n] (0 for what is absent)."""
    centre = torch.cat([scene.pillar[..., :2], scene.crate[..., :2], scene.panel[..., :2]], 1)
    radius = [scene.pillar[..., 2], scene.crate[..., 2].hypot(scene.crate[..., 4]), scene.panel[..., 2]]
    return centre, torch.cat(radius, 1)


def push_out(point: Tensor, centre: Tensor, radius: Tensor) -> Tensor:
    """Positions [B, F, 2] moved out of discs [B, n, 2], [B, n], one disc after the other."""
    for j in range(centre.shape[1]):
        middle = centre[:, j, None]  # [B, 1, 2]
        offset = point - middle
        length = offset.norm(dim=-1, keepdim=True).clamp_min(1e-3)
        point = middle + offset / length * torch.maximum(length, radius[:, j, None, None])
    return point


def smooth(path: Tensor, width: int) -> Tensor:
    """Moving average over `width` (odd) frames of path [B, F, D], the ends held."""
    side = width // 2
    ends = path[:, :1].expand(-1, side, -1), path[:, -1:].expand(-1, side, -1)
    padded = torch.cat([ends[0], path, ends[1]], 1).transpose(1, 2)
    return torch.nn.functional.avg_pool1d(padded, width, 1).transpose(1, 2)
