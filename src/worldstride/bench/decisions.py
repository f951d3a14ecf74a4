"""What decisions cost at the sizes of real models: selection, scores from cameras, gates, plans; no model runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from worldstride import noise
from worldstride.acceleration import PRESETS, Acceleration
from worldstride.bench.results import quantile
from worldstride.camera import camera_from_pose, intrinsics_from_fov
from worldstride.context.history import History
from worldstride.context.planning import Wanted, observe_change, plan_context
from worldstride.context.policy import PolicyState
from worldstride.context.retrieval import frustum_points
from worldstride.context.selection import Lookup
from worldstride.denoising.policy import plan_denoising
from worldstride.denoising.schedule import shifted_sigmas
from worldstride.protocol import ChunkShape, SamplerSpec


@dataclass(frozen=True)
class Geometry:
    """What a model's decisions depend on."""

    shape: ChunkShape
    steps: int
    degrees: float
    """Horizontal field of view."""
    aspect: float
    latent: tuple[int, ...]
    """Shape of one latent."""
    chunk_seconds: float
    """Time of one chunk that the decisions are held against."""
    source: str
    """Where that time is from."""


GEOMETRIES: dict[str, Geometry] = {
    "HY-WorldPlay 480p": Geometry(
        ChunkShape(4, 16, window=12, memory=4, sink=4, clip=4), 4, 60.0, 832 / 480, (32, 30, 52), 88.24 / 16,
        "accelerated context and denoising of 16 chunks on an A100, arXiv 2605.31158, table 1",
    ),
    "Matrix-Game-3.0 720p": Geometry(
        ChunkShape(10, 40, clean=4, memory=4, sink=1), 3, 90.0, 1280 / 704, (48, 44, 80), 1.0,
        "40 frames at 40 frames a second, which its authors reach on nine GPUs",
    ),
}  # fmt: skip
SETTINGS = ("light-interaction", "balanced", "fast")
HISTORIES = (64, 512, 2048)
"""Remembered latents."""


def measure(
    repeats: int = 15, histories: Sequence[int] = HISTORIES, advance: Callable[[], object] = lambda: None
) -> list[dict[str, object]]:
    """One row a geometry, preset and history: milliseconds of all decisions of a chunk, on the CPU, and their share."""
    rows: list[dict[str, object]] = []
    for name, geometry in GEOMETRIES.items():
        for count in histories:
            for preset in SETTINGS:
                times = [1000 * t for t in _times(geometry, count, PRESETS[preset], repeats)]
                share = quantile(times, 0.5) / 1000 / geometry.chunk_seconds
                rows.append(
                    {
                        "geometry": name, "preset": preset, "history": count, "ms_p50": quantile(times, 0.5),
                        "ms_p95": quantile(times, 0.95), "chunk_seconds": geometry.chunk_seconds,
                        "source": geometry.source, "share": share,
                    }
                )  # fmt: skip
                advance()
    return rows


def _times(geometry: Geometry, count: int, settings: Acceleration, repeats: int) -> list[float]:
    shape = geometry.shape
    generator = noise.stream(count)
    step = torch.randn(count + shape.frames, 4, generator=generator) * torch.tensor([0.1, 0.1, 0.05, 0.0])
    cameras = camera_from_pose(step.cumsum(0))  # a random walk
    history = History(limit=max(4096, count + 64))
    history.append(torch.zeros(count, 1), cameras[:count], (None,) * count)
    # changes are told by latents of the model's own size, of which only the newest are needed
    newest = History()
    newest.append(torch.zeros(2 * shape.new, *geometry.latent), cameras[: 2 * shape.new], (None,) * 2 * shape.new)
    intrinsics = intrinsics_from_fov(geometry.degrees * torch.pi / 180, geometry.aspect)
    points, view, state = frustum_points(noise.stream(0)), settings.pose.look(intrinsics), PolicyState()

    def sampler(steps: int | None, shift: float | None) -> SamplerSpec:
        return SamplerSpec(shifted_sigmas(steps or geometry.steps, shift or 5.0), "unipc")

    found = list[float]()
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        lookup = Lookup(history, shape, cameras[count:], points, intrinsics, settings.window, settings.memory)
        _, signals, after = plan_context(Wanted(lookup, state, settings.temporal, settings.spatial, view))
        plan_denoising(
            sampler, settings.steps, settings.shift, settings.solver, settings.cache, settings.adaptive, None,
            signals.pose, after.caching, after.knowing, settings.name,
        )  # fmt: skip
        if settings.temporal is not None:
            observe_change(newest, shape, settings.temporal.weight, after)
        found.append(time.perf_counter() - begin)
    return found[2:]
