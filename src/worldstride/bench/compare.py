"""Model against truth: closed-loop rollouts along held-out walks, beside what the renderer shows there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from worldstride.acceleration import Acceleration
from worldstride.bench import metrics
from worldstride.bench.rollout import summary
from worldstride.bench.walks import CLASSES, FIRST_SEED, HeldOutWorld, Walk, held_out_world
from worldstride.engine import Engine
from worldstride.errors import InputError
from worldstride.report import ChunkReport
from worldstride.session import Chunk

NO_MEMORY = Acceleration("no memory", memory=0)
"""Full compute that forgets everything but the recent window: what memory is worth."""
METRICS = ("psnr", "ssim", "sharpness", "seam")
"""Peak signal-to-noise ratio in dB, structural similarity, and the truth's detail and patch borders = 1."""


@dataclass(frozen=True, eq=False)
class Played:
    """One rollout along a held-out walk."""

    frames: np.ndarray
    """uint8 [C, H, W, 3]"""
    reports: tuple[ChunkReport, ...]
    scores: dict[str, dict[str, Tensor]]
    """Metric, class of pixels (or "all") -> one value a frame [C], NaN where the class is hardly seen."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Every setting in every world."""

    worlds: tuple[HeldOutWorld, ...]
    settings: tuple[Acceleration, ...]
    played: dict[str, tuple[Played, ...]]
    """Name of the settings -> one rollout a world."""

    def rows(self) -> list[dict[str, object]]:
        """One row of the table for each of the settings: quality with its 95 % interval over worlds, and speed."""
        return [
            {
                "name": s.name,
                "acceleration": s.to_json(),
                "quality": self._quality(self.played[s.name]),
                "speed": summary([r for p in self.played[s.name] for r in p.reports]),
            }
            for s in self.settings
        ]

    def curves(self) -> list[dict[str, object]]:
        """For each world, what happened chunk by chunk: shares of pixel classes, and PSNR of all settings."""
        out: list[dict[str, object]] = []
        for i, world in enumerate(self.worlds):
            counts = [r.frames for r in self.played[self.settings[0].name][i].reports]
            shares = {c: [float(m.float().mean()) for m in world.masks[c].split(counts)] for c in CLASSES}
            scores = {
                s.name: {
                    c: [metrics.mean(v) for v in self.played[s.name][i].scores["psnr"][c].split(counts)]
                    for c in ("all", *CLASSES)
                }
                for s in self.settings
            }
            out.append({"seed": world.seed, "walk": world.walk, "given": world.given, "shares": shares, "psnr": scores})
        return out

    def _quality(self, played: Sequence[Played]) -> dict[str, dict[str, dict[str, float]]]:
        out: dict[str, dict[str, dict[str, float]]] = {}
        for metric in METRICS:
            for name in played[0].scores[metric]:
                values = torch.stack([p.scores[metric][name] for p in played])
                low, high = metrics.interval(values)
                cell = {"mean": metrics.mean(values), "low": low, "high": high}
                out.setdefault(metric, {})[name] = cell
        return out


def compare(
    engine: Engine, settings: Sequence[Acceleration], family: str = "courtyard", count: int = 3, chunks: int = 12,
    seed: int = FIRST_SEED, advance: Callable[[], object] = lambda: None,
) -> Comparison:  # fmt: skip
    """Play all settings in `count` held-out worlds, every second walk a journey, the others look away and back.

    Settings take turns chunk by chunk, so that all meet the same machine. `advance` is called after every chunk.
    """
    if count < 1 or chunks < 1:
        raise InputError(f"a comparison needs at least one world and one chunk, got {count} and {chunks}")
    names = [s.name for s in settings]
    if not names or len(set(names)) != len(names):
        raise InputError(f"a comparison needs settings with names of their own, got {', '.join(names) or 'none'}")
    shapes = [engine.model.chunk(k) for k in range(chunks)]
    height, width = engine.frame_size
    if height != width or height % 2:
        raise InputError(
            f"the renderer's truth is square with an even side; {engine.model.name!r} shows {height} x {width}"
        )
    worlds: list[HeldOutWorld] = []
    played: dict[str, list[Played]] = {name: [] for name in names}
    for i in range(count):
        walk: Walk = "journey" if i % 2 else "look away and back"
        frames, windows = [s.frames for s in shapes], [s.window for s in shapes]
        world = held_out_world(family, seed + i, walk, shapes[0].window, frames, windows, height)
        worlds.append(world)
        if i == 0:
            play(engine, world, settings, 1)  # the first step of all pays for setting up kernels
        for name, one in zip(names, play(engine, world, settings, chunks, advance), strict=True):
            played[name].append(one)
    return Comparison(tuple(worlds), tuple(settings), {k: tuple(v) for k, v in played.items()})


def play(
    engine: Engine, world: HeldOutWorld, settings: Sequence[Acceleration], chunks: int,
    advance: Callable[[], object] = lambda: None,
) -> list[Played]:  # fmt: skip
    """Open a world with its true first frames, and walk on along its cameras in closed loop, once for each setting."""
    at = world.given
    sessions = [engine.open(world.frames[:at], world.cameras[:at], seed=world.seed) for _ in settings]
    for session, setting in zip(sessions, settings, strict=True):
        session.acceleration = setting
    steps: list[list[Chunk]] = [[] for _ in sessions]
    for k in range(chunks):
        count = engine.model.chunk(k).frames
        for session, done in zip(sessions, steps, strict=True):
            done.append(session.step(cameras=world.cameras[at : at + count]))
            advance()
        at += count
    return [_scored(world, done, _patch(engine)) for done in steps]


def _scored(world: HeldOutWorld, chunks: Sequence[Chunk], patch: tuple[int, int] | None) -> Played:
    frames = np.concatenate([c.frames for c in chunks])
    shown = torch.from_numpy(frames).movedim(-1, 1).float() / 255
    masks = {name: m[: len(shown)] for name, m in world.masks.items()}
    return Played(frames, tuple(c.report for c in chunks), score(shown, world.truth[: len(shown)], masks, patch))


def score(
    shown: Tensor, truth: Tensor, masks: dict[str, Tensor], patch: tuple[int, int] | None
) -> dict[str, dict[str, Tensor]]:
    """Metrics of frames [C, 3, H, W] against the truth, over whole frames and over each class of pixels.

    Sharpness is measured inside patches (height, width), the seam ratio across their borders; without patches there
    are no seams to measure.
    """
    kinds: dict[str, Tensor | None] = {"all": None, **masks}
    out = {
        "psnr": {k: metrics.psnr(shown, truth, m) for k, m in kinds.items()},
        "ssim": {k: metrics.ssim(shown, truth, m) for k, m in kinds.items()},
        "sharpness": {
            k: metrics.gradient(shown, m, patch) / metrics.gradient(truth, m, patch).clamp_min(1e-6)
            for k, m in kinds.items()
        },
    }
    seams = torch.full((len(shown),), math.nan)
    if patch is not None:
        seams = metrics.seam(shown, patch) / metrics.seam(truth, patch).clamp_min(1e-6)
    return {**out, "seam": {"all": seams}}


def _patch(engine: Engine) -> tuple[int, int] | None:
    patch = getattr(getattr(engine.model, "config", None), "patch", None)
    return patch if isinstance(patch, tuple) else None
