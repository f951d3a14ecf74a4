"""Policies that shorten a chunk's context, and what a session remembers between chunks for them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from worldstride.context.dynamics import Dynamics, latent_change, window_length
from worldstride.context.gate import Gate
from worldstride.context.history import History
from worldstride.context.selection import ContextPlan, Signals, select, spans
from worldstride.context.similarity import (
    View,
    added_share,
    ball_view,
    clip_similarity,
    frustum_view,
    similarity,
    visible,
)
from worldstride.errors import InputError
from worldstride.protocol import ChunkShape

ViewName = Literal["frustum", "ball"]
Score = Literal["added", "similarity"]


def _number(name: str, value: object, low: float, high: float, open_low: bool = False) -> None:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not fits or (open_low and value == low):
        interval = f"{'above' if open_low else 'at least'} {low:g} and at most {high:g}"
        raise InputError(f"acceleration.{name} must be a number {interval}, got {value!r}")


@dataclass(frozen=True)
class TemporalWindow:
    """The recent window follows how much changes between the last two finished chunks.

    Light Interaction (arXiv 2605.31158), eqs. 1-3, with kappa on the model's own scale.
    """

    weight: float = 0.5
    """Weight of the newest change in the moving average, in (0, 1]; 1 forgets all earlier ones."""
    scale: float = 1.0
    """kappa in running medians of the change; above 1 keeps longer windows, below 1 shorter ones."""
    opposite: bool = False
    """Keep more history under more change, instead of less."""

    def __post_init__(self) -> None:
        _number("temporal.weight", self.weight, 0, 1, open_low=True)
        _number("temporal.scale", self.scale, 0, 1e6, open_low=True)


@dataclass(frozen=True)
class SpatialMemory:
    """Retrieved memory is attended to on a revisit and dropped while exploring; the sink always stays.

    `PUBLISHED` is Light Interaction's gate (arXiv 2605.31158, eq. 4). The defaults ask instead what memory can add to
    the window, which agrees far better with true co-visibility.
    """

    score: Score = "added"
    """What is compared with the threshold: "added", the share of the coming views that old cameras saw and the window
    did not; or "similarity", the pose similarity of the best old clip."""
    threshold: float = 0.1
    """Least score in [0, 1] that keeps memory; higher drops it more often."""
    margin: float | None = None
    """With "similarity": the best old clip must show at least what the newest chunk shows, less this; None does not
    compare them."""
    hysteresis: float = 0.03
    """By how much the conditions ease while memory is in use, in [0, 1], so that it does not come and go."""
    view: ViewName = "frustum"
    """What counts as seen: a grid through the view's frustum, or random points in a ball."""
    reach: float = 8.0
    """How far a camera is taken to see, metres; the size of rooms."""

    def __post_init__(self) -> None:
        _number("spatial.threshold", self.threshold, 0, 1)
        _number("spatial.hysteresis", self.hysteresis, 0, 1)
        _number("spatial.reach", self.reach, 0, 1e6, open_low=True)
        if self.margin is not None:
            _number("spatial.margin", self.margin, -1, 1)
            if self.score != "similarity":
                raise InputError(f"acceleration.spatial.margin goes with score 'similarity', not with {self.score!r}")
        for name, value, known in (("view", self.view, get_args(ViewName)), ("score", self.score, get_args(Score))):
            if value not in known:
                raise InputError(f"acceleration.spatial.{name} must be one of {', '.join(known)}, got {value!r}")

    @property
    def gate(self) -> Gate:
        """The decision that these settings make."""
        return Gate(self.threshold, self.margin, self.hysteresis)

    def look(self, intrinsics: Tensor) -> View:
        """The view of a camera with normalised intrinsics [3, 3]; always the same for the same settings."""
        degrees = [float(2 * torch.rad2deg(torch.atan(0.5 / f))) for f in (intrinsics[0, 0], intrinsics[1, 1])]
        if self.view == "frustum":
            return frustum_view(far=self.reach, width=degrees[0], height=degrees[1])
        return ball_view(torch.Generator().manual_seed(0), radius=self.reach, width=degrees[0], height=degrees[1])


PUBLISHED = SpatialMemory("similarity", 0.7, hysteresis=0.0, view="ball")
"""Light Interaction's gate as published for HY-WorldPlay (threshold 0.7)."""


@dataclass(frozen=True)
class PolicyState:
    """What policies remember from chunk to chunk; plain numbers, saved and forked with the session."""

    dynamics: Dynamics = field(default_factory=Dynamics)
    revisiting: bool = False
    """Whether the gate was open for the last chunk."""


def plan_context(
    history: History, shape: ChunkShape, coming: Tensor, points: Tensor, intrinsics: Tensor, state: PolicyState,
    window: int | None = None, memory: int | None = None, temporal: TemporalWindow | None = None,
    spatial: SpatialMemory | None = None, view: View | None = None,
) -> tuple[ContextPlan, Signals, PolicyState]:  # fmt: skip
    """What the chunk with cameras coming [F, 4, 4] remembers, from which signals, and the policies' next state.

    `window` and `memory` bound what the policies may keep; `view` is `spatial.look(intrinsics)`, kept by the caller.
    Without policies this is `select` alone, and the state is as it was.
    """
    asked = [f"{name} {n}" for name, n in (("window", window), ("memory", memory)) if n is not None]
    reasons = [f"{' and '.join(asked)} asked for"] if asked else []
    change = average = old = newest = added = None
    if temporal is not None:
        change = _change(history, shape)
        if change is not None:
            state = replace(state, dynamics=state.dynamics.observe(change, temporal.weight))
        average, longest = state.dynamics.average, min(shape.window, shape.window if window is None else window)
        window = window_length(state.dynamics, longest, temporal.scale, temporal.opposite)
        if window < longest:
            reasons.append(f"window {window} of {longest}: change {average:.3g}, median {state.dynamics.median:.3g}")
    if spatial is not None:
        view = spatial.look(intrinsics) if view is None else view
        old, newest, added = pose_scores(history.cameras(), shape, coming, view, window)
        revisiting = spatial.gate.decide(added if spatial.score == "added" else old, newest, state.revisiting)
        state = replace(state, revisiting=revisiting)
        if not revisiting:
            memory = 0
            seen = "nothing is old"
            if old is not None and added is not None:
                seen = f"old views show {old:.2f}, the newest {newest:.2f}, and add {added:.2f} to the window"
            reasons.append(f"exploring, memory dropped: {seen}")
    plan, signals = select(
        history, shape, coming, points, intrinsics, window, memory, "; ".join(reasons) or "full compute"
    )
    signals = replace(signals, change=change, dynamics=average, old_clip=old, newest_clip=newest, added=added)
    return plan, signals, state


def _change(history: History, shape: ChunkShape) -> float | None:
    rows = list(range(len(history) - 2 * shape.new, len(history)))
    if rows[0] < 0:
        return None
    newest = history.entries[-1].latent
    before, after = history.latents(rows, newest.device, tuple(newest.shape)).chunk(2)
    return float(latent_change(after, before))


def pose_scores(
    cameras: Tensor, shape: ChunkShape, coming: Tensor, view: View, window: int | None = None
) -> tuple[float | None, float, float | None]:
    """What cameras tell of a chunk, in one batched call over the history's cameras [N, 4, 4], oldest first.

    Returns the pose similarity of the best old clip (between sink and window), that of the newest clip, and the share
    of the coming views [F, 4, 4] that old cameras saw and the window did not; None where nothing is old.
    """
    kept = len(cameras) - shape.clean
    if not kept:
        return None, 0.0, None
    first, recent = spans(kept, shape, window)
    seen = visible(coming.cpu().float()[[0, -1]], cameras[first:kept], view)  # [2, N, P]
    past, near = seen.split([kept - recent - first, recent], 1)
    clips, newest = clip_similarity(similarity(past), shape.new), float(similarity(seen[:, -shape.new :]).mean())
    if not len(clips):
        return None, newest, None
    return float(clips.max()), newest, float(added_share(past, near))
