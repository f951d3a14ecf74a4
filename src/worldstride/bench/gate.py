"""Does the pose gate open where memory is needed? Its agreement with true co-visibility, without any model.

A chunk needs memory where its pixels were seen before but not in the recent window; a procedural world knows that for
every pixel. Gates see cameras only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from worldstride import camera, worlds
from worldstride.bench.walks import FIRST_SEED, Trajectory, trajectory, walk_classes
from worldstride.context.gate import PoseScores
from worldstride.context.planning import pose_scores
from worldstride.context.policy import SpatialMemory
from worldstride.context.similarity import View
from worldstride.errors import InputError
from worldstride.protocol import ChunkShape

KINDS: tuple[Trajectory, ...] = ("walk", "spin", "out and back", "loop")
"""Kinds of trajectories that gates are measured on."""
NEEDED = 0.1
"""Share of a chunk's pixels that only memory can show, from which on it counts as a revisit."""


@dataclass(frozen=True)
class ChunkSignals:
    """What is known of one chunk before it is made, and the truth."""

    trajectory: Trajectory
    world: int
    pose: PoseScores
    """What cameras alone tell."""
    truth: float
    """Share of pixels that old frames show and the window does not."""


def observe(
    view: View, kinds: Sequence[Trajectory], count: int, frames: int, window: int = 8, chunk: int = 4,
    family: str = "courtyard", size: int = 48, advance: Callable[[], object] = lambda: None,
) -> list[ChunkSignals]:  # fmt: skip
    """Signals and truth of every chunk that has a clip before its window, in `count` held-out worlds a kind."""
    shape = ChunkShape(new=chunk, frames=chunk, window=window)
    if frames < window + 2 * chunk:
        raise InputError(f"a trajectory needs at least {window + 2 * chunk} frames to have anything old, got {frames}")
    found, given = [], window + chunk
    whole = frames - (frames - given) % chunk  # a part of a chunk at the end is left out
    for kind in kinds:
        for seed in range(FIRST_SEED, FIRST_SEED + count):
            scene = worlds.scene_from_seed(family, [seed])
            pose = trajectory(scene, kind, given, frames, seed)[:, :whole]
            where, time = camera.camera_from_pose(pose)[0], torch.arange(whole, dtype=torch.float32)[None]
            begins = torch.arange(given, whole, chunk)
            starts = torch.stack([begins, torch.full_like(begins, window)], 1).repeat_interleave(chunk, 0)
            needed = walk_classes(scene, pose, time, given, starts, size)["revisited"].float()
            for at, truth in zip(begins.tolist(), needed.split(chunk), strict=True):
                scores = pose_scores(where[:at], shape, where[at : at + chunk], view)
                found.append(ChunkSignals(kind, seed, scores, float(truth.mean())))
            advance()
    return found


def decisions(chunks: Sequence[ChunkSignals], settings: SpatialMemory) -> list[bool]:
    """The gate's decisions, chunk by chunk; its hysteresis begins anew with every trajectory."""
    made, open_before, place = list[bool](), False, None
    for c in chunks:
        if (c.trajectory, c.world) != place:
            open_before, place = False, (c.trajectory, c.world)
        open_before = settings.gate.decide(c.pose.of(settings.score), c.pose.newest, open_before)
        made.append(open_before)
    return made


def score_of(chunk: ChunkSignals, settings: SpatialMemory) -> float:
    """What the settings' gate goes by: its score, for a relative gate how much more that is than the newest chunk's."""
    score = chunk.pose.of(settings.score) or 0.0
    return score if settings.margin is None else score - chunk.pose.newest


def agreement(truth: Sequence[bool], decided: Sequence[bool]) -> dict[str, float]:
    """Precision and recall of decisions; NaN where nothing was decided or true."""
    both = sum(t and d for t, d in zip(truth, decided, strict=True))
    return {"precision": both / sum(decided) if any(decided) else math.nan,
            "recall": both / sum(truth) if any(truth) else math.nan}  # fmt: skip


def area_under_curve(truth: Sequence[bool], score: Sequence[float]) -> float:
    """Probability that a true case scores above a false one, ties counting half; NaN where one of them is missing."""
    values, label = torch.tensor(score, dtype=torch.float64), torch.tensor(truth)
    high, low = values[label], values[~label]
    if not len(high) or not len(low):
        return math.nan
    order = torch.sign(high[:, None] - low[None]).mean()
    return float((order + 1) / 2)
