"""Which remembered latents HY-WorldPlay attends to: the latest ones, the first clip, and the clip that saw most alike.

How much an old camera shows of what the current one sees is counted on points in a ball around the current camera:
the share of the points in the current view that lie in the old camera's view too, and within its reach (HY-WorldPlay
specification, section 3). A view is a box of azimuth and elevation, measured along the axes of the current camera.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worldstride.camera import relative
from worldstride.errors import InputError, integer_from, number_in

_CPU_BLOCK = 1 << 16
"""Pairs of a camera and a point that are looked at together: 0.5 MB in float64, which stays in a processor's cache."""
_DEVICE_BLOCK = 1 << 22
"""The same on an accelerator, where fewer and larger steps are faster: 32 MB."""


@dataclass(frozen=True)
class Retrieval:
    """Numbers of the retrieval; the defaults are those of the 8B models."""

    memory: int = 20
    """Latents of the context, once there are more to choose from."""
    window: int = 12
    """Latest latents, which are always in the context."""
    query: int = 4
    """Coming latents whose cameras ask."""
    clip: int = 4
    """Latents of a clip; its first and its middle latent answer for it."""
    stride: int = 4
    """Latents from the start of one candidate clip to the next."""
    keep_first: bool = True
    """Whether the first clip is always in the context; the candidates then begin behind it, else at latent 0."""
    since: int = 21
    """First current latent for which clips are retrieved; the context of earlier ones is the whole past."""
    radius: float = 8.0
    """Radius of the ball of points, units of length of the world."""
    reach: float = 8.0
    """Distance from which on an old camera sees a point no longer, same units."""
    points: int = 50_000
    """Points in the ball."""
    field_of_view: tuple[float, float] = (60.0, 35.0)
    """Width and height of a view in degrees (the real cameras see more: 89.4 and 58.2)."""

    def __post_init__(self) -> None:
        integer_from("clip", self.clip, 1)
        least = {"window": self.clip, "memory": self.window, "query": 1, "stride": 1, "since": self.window, "points": 1}
        for name, lowest in least.items():
            integer_from(name, getattr(self, name), lowest)
        number_in("radius", self.radius, 0.0, math.inf, open_low=True)
        number_in("reach", self.reach, 0.0, math.inf, open_low=True)
        if len(self.field_of_view) != 2 or not all(0 < angle < 180 for angle in self.field_of_view):
            raise InputError(f"field_of_view must be two angles between 0 and 180 degrees, got {self.field_of_view}")


EIGHT_B = Retrieval()
"""Of the 8B models."""
WAN = Retrieval(memory=16, keep_first=False, since=16)
"""Of the WAN-5B model: one retrieved clip, which may be the first one."""


@dataclass(frozen=True)
class Found:
    """The context of a chunk, and why."""

    context: tuple[int, ...]
    """Latents to attend to, ascending."""
    clips: tuple[int, ...]
    """First latents of the retrieved clips, best first; empty while the whole past fits."""
    scores: dict[int, float]
    """Distance D in [0, 1] of every candidate clip, by its first latent: 0 saw all that the coming cameras see."""


def ball_points(count: int, radius: float, seed: torch.Generator | int) -> Tensor:
    """Points float32 [count, 3], uniform in a ball around the origin; `seed` may be a generator, which moves on."""
    integer_from("count", count, 1)
    number_in("radius", radius, 0.0, math.inf, open_low=True)
    if not isinstance(seed, torch.Generator):
        integer_from("seed", seed, 0)
        seed = torch.Generator().manual_seed(seed)
    direction = torch.randn(count, 3, generator=seed, device=seed.device, dtype=torch.float64)
    share = torch.rand(count, 1, generator=seed, device=seed.device, dtype=torch.float64)
    return (direction / direction.norm(dim=1, keepdim=True) * share.pow(1 / 3) * radius).float()


def visible(points: Tensor, settings: Retrieval = EIGHT_B) -> Tensor:
    """Those of the points [P, 3] around a camera that lie in its view: only they count (about one in twenty).

    The result may be given wherever points are asked for, and changes nothing. On an accelerator a session should
    call this once: there the other functions look at all points they get, as leaving some out waits for the device.
    """
    points = _check_points(points)
    return points[_in_own_view(points.double(), settings)]


def overlap(
    current: Tensor,
    old: Tensor,
    points: Tensor,
    settings: Retrieval = EIGHT_B,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Score S [Q, N] in [0, 1]: the share of what `current` [Q, 4, 4] see that `old` [N, 4, 4] saw (section 3).

    Cameras are camera-to-world, points [P, 3] lie around each current camera, along its axes. Where no point lies
    in the current view S is 0. The result is of `dtype`, on the points' device.
    """
    _check_cameras(current, "current")
    _check_cameras(old, "old")
    hits, seen = _count(current, old, _check_points(points), settings, dtype)
    return hits.to(dtype) / seen.clamp(min=1)


def distances(
    cameras: Tensor, coming: Tensor, starts: Sequence[int], points: Tensor, settings: Retrieval = EIGHT_B
) -> dict[int, float]:
    """Distance D in [0, 1] of the clips of `cameras` [N, 4, 4] that begin at `starts` to `coming` cameras [Q, 4, 4].

    As in `select`, for whoever bounds the candidates in another way. The host waits for the device once.
    """
    _check_cameras(cameras, "cameras")
    _check_cameras(coming, "coming")
    samples = cameras[[*starts, *(start + settings.clip // 2 for start in starts)]]
    (away,) = _away(coming[None], samples, _check_points(points), settings)
    return dict(zip(starts, away, strict=True))


def select(cameras: Tensor, current: int, points: Tensor, settings: Retrieval = EIGHT_B) -> Found:
    """The context of the chunk that begins with latent `current` (section 3).

    `cameras` [N, 4, 4] are camera-to-world: of all finished latents, followed by at least `settings.query` coming
    ones. Of clips with equal scores the oldest is taken. Points as in `overlap`; if they are on the cameras' device,
    the host waits for it once.
    """
    return _select(cameras, [current], points, settings)[0]


def select_wide(
    cameras: Tensor, current: int, points: Tensor, settings: Retrieval = EIGHT_B, *, chunk: int = 16
) -> Found:
    """The context of a chunk of several queries, as the bidirectional model denoises: the union of what `select`
    finds for every `settings.query` of its `chunk` latents, without the chunk's own latents (section 3).

    A clip's score is the smallest of its scores over the queries; otherwise as `select`.
    """
    integer_from("chunk", chunk, 1)
    if chunk % settings.query:
        raise InputError(f"chunk must be a multiple of the {settings.query} latents of a query, got {chunk}")
    integer_from("current", current, 0)
    parts = _select(cameras, range(current, current + chunk, settings.query), points, settings)
    context = sorted({latent for part in parts for latent in part.context if latent < current})
    clips = dict.fromkeys(start for part in parts for start in part.clips)
    scores: dict[int, float] = {}
    for start, distance in ((start, d) for part in parts for start, d in part.scores.items()):
        scores[start] = min(distance, scores.get(start, distance))
    return Found(tuple(context), tuple(clips), scores)


def _select(cameras: Tensor, currents: Sequence[int], points: Tensor, settings: Retrieval) -> list[Found]:
    """`select` for each of several ascending current latents, `query` apart."""
    for current in currents:
        integer_from("current", current, 0)
    _check_cameras(cameras, "cameras")
    _check_points(points)
    needed = currents[-1] + settings.query
    if len(cameras) < needed:
        raise InputError(
            f"cameras must hold {currents[-1]} latents and the {settings.query} that follow, "
            f"so at least {needed} in all; got {len(cameras)}"
        )
    asking = [current for current in currents if current >= settings.since]
    scores = _scores(cameras, asking, points, settings) if asking else {}
    return [
        _choose(current, scores[current], settings) if current in scores else Found(tuple(range(current)), (), {})
        for current in currents
    ]


def _choose(current: int, scores: dict[int, float], settings: Retrieval) -> Found:
    memory = set(range(settings.clip if settings.keep_first else 0))
    clips: list[int] = []
    for start in sorted(scores, key=scores.__getitem__):  # stable: equal ones stay oldest first
        if len(memory) >= settings.memory - settings.window:
            break
        memory.update(range(start, start + settings.clip))
        clips.append(start)
    context = memory.union(range(current - settings.window, current))
    return Found(tuple(sorted(context)), tuple(clips), scores)


def _scores(
    cameras: Tensor, currents: Sequence[int], points: Tensor, settings: Retrieval
) -> dict[int, dict[int, float]]:
    """For each of the current latents, `query` apart, the distance D of its candidate clips, oldest first."""
    first = settings.clip if settings.keep_first else 0
    starts = range(first, currents[-1] - settings.window, settings.stride)
    asking = cameras[currents[0] : currents[-1] + settings.query].unflatten(0, (len(currents), settings.query))
    samples = [cameras[at : at + starts.stop - first : settings.stride] for at in (first, first + settings.clip // 2)]
    away = _away(asking, torch.cat(samples), points, settings)
    mine = (range(first, current - settings.window, settings.stride) for current in currents)
    return {
        current: dict(zip(some, row, strict=False))  # what an earlier one knew nothing of stands behind
        for current, some, row in zip(currents, mine, away, strict=True)
    }


def _away(asking: Tensor, samples: Tensor, points: Tensor, settings: Retrieval) -> list[list[float]]:
    """Distance D of N clips to each of G groups of cameras [G, Q, 4, 4]; the host waits for the device once.

    `samples` [2 N, 4, 4] are the clips' first latents' cameras, then their middle ones'. D is one minus the mean of S
    over a group's cameras and a clip's two samples. It is formed from whole numbers of points, so that equal clips get
    equal values.
    """
    groups, queries = asking.shape[:2]
    hits, seen = _count(asking.flatten(0, 1), samples, points, settings, torch.float64)
    hits = hits.view(groups, queries, 2, -1).sum((1, 2))  # [G, N]
    *counts, total = torch.cat([hits.flatten(), seen.view(1)]).tolist()
    most, clips = 2 * queries * max(total, 1), len(samples) // 2
    return [[1 - n / most for n in counts[i * clips : (i + 1) * clips]] for i in range(groups)]


def _in_own_view(points: Tensor, settings: Retrieval) -> Tensor:
    """Which points [P, 3] a camera at the origin that looks along +z has in view: bool [P]."""
    zero = points.new_zeros(1)
    x, y, z = points.mT[:, None].unbind()
    return _in_view(x, y, z, zero, zero, settings)[0]


def _in_view(x: Tensor, y: Tensor, z: Tensor, yaw: Tensor, pitch: Tensor, settings: Retrieval) -> Tensor:
    """Whether the directions (x, y, z) [C, P] lie in views with centres (yaw, pitch) [C] in radians: bool [C, P].

    With azimuth az = atan2(x, z) and elevation el = atan2(y, |xz|) that is |az - yaw| < half the width, around the
    circle, and |el - pitch| < half the height. A view is less than half a circle wide, so signs of sines tell as
    much: a direction is right of an edge at azimuth a where |xz| sin(az - a) = x cos(a) - z sin(a) is positive.
    Computing the angles of all points would take most of the time.
    """
    half_width, half_height = (math.radians(angle) / 2 for angle in settings.field_of_view)
    level = torch.hypot(x, z)
    left, right = yaw[:, None] - half_width, yaw[:, None] + half_width
    low, high = pitch[:, None] - half_height, pitch[:, None] + half_height
    inside = x * left.cos() > z * left.sin()
    inside &= x * right.cos() < z * right.sin()
    inside &= y * low.cos() > level * low.sin()
    inside &= y * high.cos() < level * high.sin()
    return inside


def _count(
    current: Tensor, old: Tensor, points: Tensor, settings: Retrieval, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Points that each pair of cameras both see, int64 [Q, N], and points that a current camera sees, int64 []."""
    points, current, old = (tensor.to(points.device, dtype) for tensor in (points, current, old))
    own, block = _in_own_view(points, settings), _DEVICE_BLOCK
    if points.device.type == "cpu":  # elsewhere the host would have to wait for the number of points
        points, own, block = points[own], own[own], _CPU_BLOCK
    poses = relative(old[None], current[:, None]).flatten(0, 1)  # [Q N, 4, 4]; the current camera is the identity
    eyes = poses[:, :3, 3]
    across, down, ahead = poses[:, :3, 2].unbind(1)
    yaw, pitch = torch.atan2(across, ahead), torch.atan2(down, torch.hypot(across, ahead))
    hits = torch.zeros(len(poses), dtype=torch.int64, device=points.device)
    size = max(1, block // max(1, len(points)))
    for start in range(0, len(poses), size):
        part = slice(start, start + size)
        x, y, z = (points[:, axis] - eyes[part, axis, None] for axis in range(3))
        seen = _in_view(x, y, z, yaw[part], pitch[part], settings) & own
        seen &= x * x + y * y + z * z < settings.reach**2
        hits[part] = seen.sum(1)
    return hits.view(len(current), len(old)), own.sum()


def _check_points(points: Tensor) -> Tensor:
    if points.ndim != 2 or points.shape[1] != 3:
        raise InputError(f"points must have shape [points, 3], got {list(points.shape)}; see ball_points")
    return points


def _check_cameras(cameras: Tensor, name: str) -> None:
    if cameras.ndim != 3 or cameras.shape[1:] != (4, 4):
        raise InputError(f"{name} must be camera-to-world matrices [latents, 4, 4], got shape {list(cameras.shape)}")
