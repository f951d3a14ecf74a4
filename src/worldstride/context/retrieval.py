"""Which remembered frames to bring back: greedy coverage of the coming views by field-of-view overlap.

Sample points are spread over the frusta of the coming cameras; a remembered frame is worth the points it saw that
neither the recent window nor a chosen frame has seen well. Nothing but cameras is needed, so walls are not known of;
nearness to a point, and to the coming camera, stands in for them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from worldstride import camera

NEAR, FAR = 0.3, 9.0
"""Depths in metres between which sample points lie."""
HALF_WEIGHT = 5.0
"""Distance in metres from a remembered camera to a point at which seeing it counts half."""
HALF_NEAR = 6.0
"""Distance in metres between a remembered and a coming camera at which the remembered one counts half."""
KEPT = 0.25
"""What a point is still worth after a chosen frame has seen it at full weight."""


def frustum_points(generator: torch.Generator, columns: int = 9, depths: int = 4, rows: int = 2) -> Tensor:
    """Points [columns x depths x rows, 3] in the unit frustum: (u, v) in [0, 1] and depth in metres, jittered strata.

    Depths are spread evenly in the logarithm between `NEAR` and `FAR`. The generator's seed fixes the points.
    """
    u, d, v = torch.meshgrid(torch.arange(columns), torch.arange(depths), torch.arange(rows), indexing="ij")
    jitter = torch.rand(3, *u.shape, generator=generator)
    depth = NEAR * torch.exp((d + jitter[1]) / depths * math.log(FAR / NEAR))
    return torch.stack([(u + jitter[0]) / columns, (v + jitter[2]) / rows, depth], -1).flatten(0, 2)


def coverage(queries: Tensor, memory: Tensor, points: Tensor, intrinsics: Tensor) -> Tensor:
    """How well each remembered camera saw each sample point of the coming views.

    queries [B, Q, 4, 4], memory [B, N, 4, 4], points [P, 3] or [B, P, 3], intrinsics [3, 3] or [B, 3, 3] -> weights
    [B, N, Q P] in [0, 1].
    """
    k = intrinsics.to(queries)
    pinhole = torch.stack([k[..., 0, 0], k[..., 1, 1], k[..., 0, 2], k[..., 1, 2]], -1)[..., None, :]  # [..., 1, 4]
    points = points.to(queries)
    xy = (points[..., :2] - pinhole[..., 2:]) / pinhole[..., :2] * points[..., 2:]
    local = torch.cat([xy, points[..., 2:].expand(*xy.shape[:-1], 1)], -1)  # [..., P, 3] in camera space
    which = "pj" if local.ndim == 2 else "bpj"
    world = torch.einsum(f"bqij,{which}->bqpi", queries[..., :3, :3], local) + queries[..., None, :3, 3]
    inverse = camera.invert(memory)
    seen = torch.einsum("bnij,bsj->bnsi", inverse[..., :3, :3], world.flatten(1, 2)) + inverse[..., None, :3, 3]
    x, y, z = seen.unbind(-1)  # [B, N, Q P]
    margin_x, margin_y = (0.5 / pinhole[..., i, None] * z for i in (0, 1))
    inside = (z > 0.15) & (x.abs() < margin_x) & (y.abs() < margin_y)
    apart = (memory[:, :, None, :3, 3] - queries[:, None, :, :3, 3]).square().sum(-1)  # [B, N, Q]
    near = 1 / (1 + apart / HALF_NEAR**2)
    return inside * near.repeat_interleave(points.shape[-2], 2) / (1 + (x * x + y * y + z * z) / HALF_WEIGHT**2)


def unseen(weights: Tensor, recent: Tensor) -> Tensor:
    """Weights [B, N, S] of remembered frames, less what the window's frames, weights [B, W, S], show already."""
    return weights * (1 - recent.amax(1, keepdim=True)) if recent.shape[1] else weights


def similarity(weights: Tensor) -> Tensor:
    """Pose similarity [B, N] in [0, 1]: mean weight of a remembered frame over all sample points [B, N, S]."""
    return weights.mean(-1)


def greedy(weights: Tensor, valid: Tensor, count: int) -> Tensor:
    """Indices [B, count] of frames that together cover the points best; weights [B, N, S], valid [B, N] bool.

    Each pick counts what is left of every point, plus a little of its own total so that ties fall to frames that
    see much. Where fewer than `count` frames are valid, the last picks are invalid ones.
    """
    if count > weights.shape[1]:
        raise ValueError(f"cannot choose {count} of {weights.shape[1]} frames")
    bonus = 0.15 * similarity(weights) + torch.where(valid, 0.0, -1e3)
    left = torch.ones_like(weights[:, 0])  # [B, S]
    picks = []
    for _ in range(count):
        gain = (weights @ left[..., None])[..., 0] / weights.shape[-1] + bonus
        pick = gain.argmax(1)  # [B]
        picks.append(pick)
        seen = weights.gather(1, pick[:, None, None].expand(-1, 1, weights.shape[-1]))[:, 0]
        left = left * (1 - (1 - KEPT) * seen)
        bonus = bonus.scatter(1, pick[:, None], -1e4)
    return torch.stack(picks, 1) if picks else torch.empty(len(weights), 0, dtype=torch.long, device=weights.device)
