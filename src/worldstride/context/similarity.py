"""Pose similarity: how much of what a camera will see did a remembered camera see?

S(query, memory) is the share of sample points in the query's view that lie in the memory's view too, in [0, 1]. The
points are drawn once, in the camera's own space, so that a whole history is one batched transform.
Two ways of drawing: `ball_view`, the published one (Light Interaction, arXiv 2605.31158, eq. 4, on HY-WorldPlay: points
uniform in a ball around the camera, views bounded by angles and a radius), and `frustum_view` (Matrix-Game-3.0: a
grid through the reference frustum, views bounded by the image and two depths).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from worldstride import camera
from worldstride.errors import InputError

_AT_ONCE = 100_000
"""Points that are transformed at once: they stay in the cache, and a long history needs little memory."""
_SLACK = 1e-3
"""Metres by which corners must lie beyond a plane; rounding is far less."""


@dataclass(frozen=True, eq=False)
class View:
    """What a camera sees, as sample points and as a test."""

    points: Tensor
    """Points in view [P, 3], in the camera's space, metres."""
    tangent_x: float
    """Tangent of half the horizontal field of view."""
    tangent_y: float
    """Tangent of half the vertical field of view."""
    reach: float
    """Farthest distance (where `angular`) or depth that counts as seen, metres."""
    near: float = 0.0
    """Least depth that counts as seen, metres."""
    angular: bool = False
    """Bound by azimuth, elevation and distance instead of by image plane and depth."""

    def equals(self, other: View) -> bool:
        """Whether another view shows the same."""
        mine, its = ((v.tangent_x, v.tangent_y, v.reach, v.near, v.angular) for v in (self, other))
        return self is other or (mine == its and torch.equal(self.points, other.points))

    def contains(self, points: Tensor) -> Tensor:
        """Whether points [..., 3] in camera space are in view: bool [...]."""
        return self._inside(*points.unbind(-1))

    def may_meet(self, turned: Tensor, moved: Tensor) -> Tensor:
        """Whether points of this view may lie in the view of a camera they are carried to by a rotation and a shift.

        turned [M, 3, 3], moved [M, 3, 1]; returns bool [M]. False only where one plane that bounds the other view has
        all corners around the points beyond it, so that nothing seen is ever missed.
        """
        # elevation is bounded off the axis too: its plane is steeper there
        rise = self.tangent_y * (math.hypot(1, self.tangent_x) if self.angular else 1)
        near, far = (float(z) for z in self.points[:, 2].aminmax())
        corners = torch.tensor(
            [[x * self.tangent_x * z, y * rise * z, z] for z in (near, far) for x in (-1, 1) for y in (-1, 1)]
        )
        x, y, z = (turned @ corners.to(turned).mT + moved).unbind(-2)  # [M, 8] each
        wide, high = self.tangent_x * z, rise * z
        beyond = [x - wide, -x - wide, y - high, -y - high, self.near - z, z - self.reach]
        return ~torch.stack([b.amin(-1) > _SLACK for b in beyond]).any(0)

    def _inside(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        wide = x.abs() <= self.tangent_x * z
        if self.angular:  # elevation is measured from the horizontal plane through the camera's axis
            flat = x * x + z * z
            high = y * y
            return wide & (z > 0) & (high <= self.tangent_y**2 * flat) & (flat + high < self.reach**2)
        return wide & (y.abs() <= self.tangent_y * z) & (z > self.near) & (z < self.reach)


def ball_view(
    generator: torch.Generator, count: int = 50_000, radius: float = 8.0, width: float = 60.0, height: float = 35.0
) -> View:
    """Monte-Carlo points uniform in a ball of `radius` metres; field of view `width` x `height` degrees.

    Of `count` points only those in view are kept (about 5 %), since only they enter the similarity.
    """
    _check_angles(width, height)
    if count < 1 or radius <= 0:
        raise InputError(f"a ball view needs at least one point and a radius above 0 metres, got {count} and {radius}")
    direction = torch.randn(count, 3, generator=generator)
    direction = direction / direction.norm(dim=-1, keepdim=True)
    points = direction * radius * torch.rand(count, 1, generator=generator) ** (1 / 3)
    whole = View(points, _tangent(width), _tangent(height), radius, angular=True)
    seen = points[whole.contains(points)]
    if not len(seen):
        raise InputError(f"none of {count} points lies in a view of {width} x {height} degrees; draw more")
    return replace(whole, points=seen)


def frustum_view(
    columns: int = 10, rows: int = 10, depths: int = 10, near: float = 0.1, far: float = 30.0,
    width: float = 90.0, height: float = 90.0,
) -> View:  # fmt: skip
    """A grid of columns x rows x depths points through the frustum, depths evenly spaced from near to far metres."""
    _check_angles(width, height)
    if min(columns, rows, depths) < 1 or not 0 <= near < far:
        raise InputError(
            f"a frustum view needs a grid of at least one point and 0 <= near < far, got {columns} x {rows} x {depths} "
            f"from {near} to {far} metres"
        )
    u, v, d = torch.meshgrid(*((torch.arange(n) + 0.5) / n for n in (columns, rows, depths)), indexing="ij")
    z = near + (far - near) * d
    tangent_x, tangent_y = _tangent(width), _tangent(height)
    points = torch.stack([(2 * u - 1) * tangent_x * z, (2 * v - 1) * tangent_y * z, z], -1).flatten(0, 2)
    return View(points, tangent_x, tangent_y, far, near)


def visible(queries: Tensor, memory: Tensor, view: View) -> Tensor:
    """Which points in view of coming cameras [..., Q, 4, 4] remembered ones [..., N, 4, 4] have in view too.

    Leading dimensions are worlds. Returns bool [..., Q, N, P].
    """
    relative = camera.invert(memory)[..., None, :, :, :] @ queries[..., None, :, :]  # [..., Q, N, 4, 4]: to memory's
    turned, moved = relative[..., :3, :3].flatten(0, -3), relative[..., :3, 3, None].flatten(0, -3)
    met = view.may_meet(turned, moved).nonzero()[:, 0]  # most of a long history looks elsewhere
    points = view.points.to(queries)
    seen = torch.zeros(len(turned), len(points), dtype=torch.bool)
    for some in met.split(max(1, _AT_ONCE // len(points))):
        seen[some] = view.contains((turned[some] @ points.mT + moved[some]).mT)
    return seen.unflatten(0, relative.shape[:-2])


def similarity(seen: Tensor) -> Tensor:
    """Pose similarity [..., N] from what is `visible` [..., N, P]: the share of points that both cameras see."""
    return seen.float().mean(-1)


def added_share(old: Tensor, window: Tensor) -> Tensor:
    """Share of the coming views that some old camera saw and no camera of the window did: [...] in [0, 1].

    From what is `visible` [..., Q, N, P] to the old and [..., Q, W, P] to the recent ones. It is what memory can add to
    the window, as far as cameras tell: where it is nothing, old frames are of no use however similar they are.
    """
    return (old.any(-2) & ~window.any(-2)).float().mean((-2, -1))


def clip_similarity(per_latent: Tensor, clip: int) -> Tensor:
    """Similarity [..., N // clip] of whole clips: mean over queries and a clip's latents of per_latent [..., Q, N]."""
    whole = per_latent.shape[-1] // clip
    return per_latent[..., : whole * clip].unflatten(-1, (whole, clip)).mean((-3, -1))


def _tangent(degrees: float) -> float:
    return math.tan(math.radians(degrees) / 2)


def _check_angles(width: float, height: float) -> None:
    if not (0 < width < 180 and 0 < height < 180):
        raise InputError(f"a field of view must lie between 0 and 180 degrees, got {width} x {height}")
