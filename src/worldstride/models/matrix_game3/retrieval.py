"""What Matrix-Game-3.0 brings back: for each of five coming views the earlier frame that shows most of it.

Points on a grid through a view's frustum are carried to every earlier camera; the share that it has in view counts
(specification, section 3.1). The grid reaches the frustum's borders, where near and far planes are not in view: a
camera shows itself by 0.8, which is why thresholds of other models do not carry over.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from worldstride import camera

GRID = 10
"""Points along each axis of the frustum."""
NEAR, FAR = 0.1, 30.0
"""Depths of the frustum, metres."""
WIDE, HIGH = 1280, 720
"""Pixels of the image that views are bounded by."""
ASKING = (9, 7, 5, 3, 1)
"""New latents whose cameras ask, one a slot."""
SINK = 1
"""Latent that the last slot holds whatever was found for it."""
_AT_ONCE = 200_000
"""Points that are carried at once: they stay in the cache."""
_SLACK = 1e-3
"""Metres by which a frustum must lie behind a plane; rounding is far less."""


def frustum() -> Tensor:
    """Points [1000, 3] of the grid in the space of a camera with 90 degrees on both axes, float64."""
    depths, side = (torch.linspace(a, b, GRID, dtype=torch.float64) for a, b in ((NEAR, FAR), (-1, 1)))
    z, x, y = torch.meshgrid(depths, side, side, indexing="ij")
    return torch.stack([x * z, y * z, z], -1).flatten(0, 2)


def shares(asking: Tensor, frames: Tensor, grid: Tensor) -> Tensor:
    """Share [Q, F] of the points in view of asking cameras [Q, 4, 4] that cameras [F, 4, 4] have in view, too.

    In float64, and in this order of operations: points at the borders are in view or not by their last bits.
    """
    asking, frames = asking.double(), frames.double()
    world = torch.einsum("qij,pj->qpi", asking[:, :3, :3], grid) + asking[:, None, :3, 3]  # [Q, P, 3]
    made = torch.zeros(len(asking), len(frames), dtype=torch.float64)
    met = _may_meet(asking, frames)
    for q in range(len(asking)):
        for some in met[q].nonzero()[:, 0].split(max(1, _AT_ONCE // len(grid))):
            points = (world[q] - frames[some, None, :3, 3]) @ frames[some, :3, :3]  # [n, P, 3]
            made[q, some] = in_view(points).double().mean(-1)
    return made


def in_view(points: Tensor) -> Tensor:
    """Which points [..., 3] in a camera's own space it has in view [...]."""
    x, y, z = points.unbind(-1)
    deep = z.clamp_min(1e-6)
    u, v = x * (WIDE / 2) / deep + WIDE / 2, y * (HIGH / 2) / deep + HIGH / 2
    inside = (u >= 0) & (u <= WIDE) & (v >= 0) & (v <= HIGH)
    return (z > NEAR) & (z < FAR) & inside


def _may_meet(asking: Tensor, frames: Tensor) -> Tensor:
    """Which frames [Q, F] may show any point: of the others one plane has the whole frustum behind it."""
    seen = camera.invert(frames)[None] @ asking[:, None]  # [Q, F, 4, 4]: from each asking camera to each frame's
    ends = torch.tensor([[x * z, y * z, z] for z in (NEAR, FAR) for x in (-1, 1) for y in (-1, 1)], dtype=seen.dtype)
    x, y, z = (seen[..., :3, :3] @ ends.mT + seen[..., :3, 3:]).unbind(-2)  # [Q, F, 8] each
    behind = [x - z, -x - z, y - z, -y - z, NEAR - z, z - FAR]
    return ~torch.stack([b.amin(-1) > _SLACK for b in behind]).any(0)


def filled(frames: Tensor, latents: Sequence[int], coming: Tensor, grid: Tensor) -> tuple[list[int], list[float]]:
    """The latent in each of the five slots, and how much of its view it shows.

    Args:
        frames: cameras [F, 4, 4] of frames that may be brought back, in order of time; of equal ones the first is.
        latents: the latent that shows each frame.
        coming: cameras of the ten new latents [10, 4, 4].
        grid: `frustum`.
    """
    found = shares(coming[list(ASKING)], frames, grid)
    best = found.argmax(1)  # of equal ones the first
    chosen = [latents[i] for i in best.tolist()]
    alike = found.gather(1, best[:, None])[:, 0].tolist()
    if SINK in latents:
        at = [i for i, latent in enumerate(latents) if latent == SINK]
        chosen[-1], alike[-1] = SINK, float(found[-1, at[-1]])
    return chosen, alike
