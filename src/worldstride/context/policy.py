"""Policies that shorten a chunk's context, and what a session remembers between chunks for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from worldstride.context.dynamics import Dynamics, latent_change, window_length
from worldstride.context.gate import Gate, PoseScores, Score, check_gate
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
from worldstride.errors import InputError, integer_from, number_in
from worldstride.protocol import ChunkShape

ViewName = Literal["frustum", "ball"]


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
    multiple: int = 1
    """Windows are multiples of so many latents: fewer sizes to compile, and worlds share batches."""

    def __post_init__(self) -> None:
        number_in("acceleration.temporal.weight", self.weight, 0, 1, open_low=True)
        number_in("acceleration.temporal.scale", self.scale, 0, 1e6, open_low=True)
        integer_from("acceleration.temporal.multiple", self.multiple, 1)
        if not isinstance(self.opposite, bool):
            raise InputError(f"acceleration.temporal.opposite must be true or false, got {self.opposite!r}")


@dataclass(frozen=True)
class PoseView:
    """What a camera is taken to see, for every score that comes from cameras alone."""

    view: ViewName = "frustum"
    """A grid through the view's frustum, or random points in a ball, as published for HY-WorldPlay."""
    reach: float = 8.0
    """How far a camera is taken to see, metres; the size of rooms."""

    def __post_init__(self) -> None:
        number_in("acceleration.pose.reach", self.reach, 0, 1e6, open_low=True)
        if self.view not in get_args(ViewName):
            raise InputError(
                f"acceleration.pose.view must be one of {', '.join(get_args(ViewName))}, got {self.view!r}"
            )

    def look(self, intrinsics: Tensor) -> View:
        """The view of a camera with normalised intrinsics [3, 3]; always the same for the same settings."""
        degrees = [float(2 * torch.rad2deg(torch.atan(0.5 / f))) for f in (intrinsics[0, 0], intrinsics[1, 1])]
        if self.view == "frustum":
            return frustum_view(far=self.reach, width=degrees[0], height=degrees[1])
        return ball_view(torch.Generator().manual_seed(0), radius=self.reach, width=degrees[0], height=degrees[1])


@dataclass(frozen=True)
class SpatialMemory:
    """Retrieved memory is attended to on a revisit and dropped or cut while exploring; the sink always stays.

    `PUBLISHED` is Light Interaction's gate (arXiv 2605.31158, eq. 4). The defaults ask instead what memory can add to
    the window, which agrees far better with true co-visibility.
    """

    score: Score = "added"
    """What is compared with the threshold: "added", the share of the coming views that old cameras saw and the window
    did not; "similarity", the pose similarity of the best old clip; "known", the share that anything remembered saw."""
    threshold: float = 0.1
    """Least score in [0, 1] that keeps memory; higher drops it more often."""
    margin: float | None = None
    """With "similarity": the best old clip must show at least what the newest chunk shows, less this; None does not
    compare them."""
    hysteresis: float = 0.03
    """By how much the conditions ease while memory is in use, in [0, 1], so that it does not come and go."""
    exploring: int = 0
    """Retrieved latents that stay while exploring; 0 drops them all, as published. Old views steady what is new."""

    def __post_init__(self) -> None:
        integer_from("acceleration.spatial.exploring", self.exploring, 0)
        check_gate("acceleration.spatial", self.score, self.threshold, self.margin, self.hysteresis)

    @property
    def gate(self) -> Gate:
        """The decision that these settings make."""
        return Gate(self.threshold, self.margin, self.hysteresis)


PUBLISHED = SpatialMemory("similarity", 0.7, hysteresis=0.0)
"""Light Interaction's gate as published for HY-WorldPlay (threshold 0.7); it goes with `PoseView("ball")`."""


@dataclass(frozen=True)
class PolicyState:
    """What policies remember from chunk to chunk; plain numbers, saved and forked with the session."""

    dynamics: Dynamics = field(default_factory=Dynamics)
    revisiting: bool = False
    """Whether the gate on memory was open for the last chunk."""
    caching: bool = False
    """Whether the gate on step reuse was open."""
    knowing: bool = False
    """Whether the last chunk was taken for known, and got few evaluations."""


def plan_context(
    history: History, shape: ChunkShape, coming: Tensor, points: Tensor, intrinsics: Tensor, state: PolicyState,
    window: int | None = None, memory: int | None = None, temporal: TemporalWindow | None = None,
    spatial: SpatialMemory | None = None, view: View | None = None, recall: Sequence[int] | None = None,
) -> tuple[ContextPlan, Signals, PolicyState]:  # fmt: skip
    """What the chunk with cameras coming [F, 4, 4] remembers, from which signals, and the policies' next state.

    `window` and `memory` bound what the policies may keep; `view` is what scores from cameras are taken with, None
    where nobody asks for them; `recall` names places in the history to bring back in place of those found by pose.
    Without policies this is `select` alone, and the state is as it was.
    """
    asked = [f"{name} {n}" for name, n in (("window", window), ("memory", memory)) if n is not None]
    reasons = [f"{' and '.join(asked)} asked for"] if asked else []
    if temporal is not None:
        longest = min(shape.window, shape.window if window is None else window)
        average, median = state.dynamics.average, state.dynamics.median
        window = window_length(state.dynamics, longest, temporal.scale, temporal.opposite, temporal.multiple)
        if window < longest:
            reasons.append(f"window {window} of {longest}: change {average:.3g}, median {median:.3g}")
    scores = None if view is None else pose_scores(history.cameras(), shape, coming, view, window)
    if spatial is not None:
        scores = scores or PoseScores()
        revisiting = spatial.gate.decide(scores.of(spatial.score), scores.newest, state.revisiting)
        state = replace(state, revisiting=revisiting)
        if not revisiting:
            whole = shape.memory if memory is None else min(memory, shape.memory)
            memory, recall = min(whole, spatial.exploring), None if spatial.exploring < whole else recall
            seen = "nothing is old"
            if scores.old is not None:
                seen = (
                    f"old views show {scores.old:.2f}, the newest {scores.newest:.2f}, and add {scores.added:.2f} to "
                    "the window"
                )
            kept = f"cut to {memory}" if memory else "dropped"
            reasons.append(f"exploring, memory {kept}: {seen}")
    plan, signals = select(
        history, shape, coming, points, intrinsics, window, memory, "; ".join(reasons) or "full compute", recall
    )
    changes = state.dynamics.changes
    signals = replace(
        signals, change=changes[-1] if temporal is not None and changes else None,
        dynamics=state.dynamics.average if temporal is not None else None, pose=scores,
    )  # fmt: skip
    return plan, signals, state


def observe_change(history: History, shape: ChunkShape, weight: float, state: PolicyState) -> PolicyState:
    """The state after a chunk was finished: the change from the chunk before it is one more observation.

    Called when the chunk's frames have been fetched, so that reading the number does not wait for a GPU again.
    """
    rows = list(range(len(history) - 2 * shape.new, len(history)))
    if rows[0] < 0:
        return state
    newest = history.entries[-1].latent
    before, after = history.latents(rows, newest.device, tuple(newest.shape)).chunk(2)
    return replace(state, dynamics=state.dynamics.observe(float(latent_change(after, before)), weight))


def pose_scores(
    cameras: Tensor, shape: ChunkShape, coming: Tensor, view: View, window: int | None = None
) -> PoseScores:
    """What cameras tell of a chunk, in one batched call over the history's cameras [N, 4, 4], oldest first.

    Old are the cameras between sink and window; coming [F, 4, 4] is looked at by its first and last camera.
    """
    kept = len(cameras) - shape.clean
    if not kept:
        return PoseScores()
    first, recent = spans(kept, shape, window)
    seen = visible(coming.cpu().float()[[0, -1]], cameras[first:kept], view)  # [2, N, P]
    past, near = seen.split([kept - recent - first, recent], 1)
    clips, newest = clip_similarity(similarity(past), shape.new), float(similarity(seen[:, -shape.new :]).mean())
    known = float(seen.any(1).float().mean())
    if not len(clips):
        return PoseScores(None, newest, None, known)
    return PoseScores(float(clips.max()), newest, float(added_share(past, near)), known)
