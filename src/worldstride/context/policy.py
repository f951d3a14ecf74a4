"""Policies that shorten a chunk's context, and what a session remembers between chunks for them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from worldstride.context.dynamics import Dynamics, latent_change, window_length
from worldstride.context.gate import Gate
from worldstride.context.history import History
from worldstride.context.selection import ContextPlan, Signals, select
from worldstride.context.similarity import View, ball_view, clip_similarity, frustum_view, similarity
from worldstride.errors import InputError
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

    def __post_init__(self) -> None:
        _number("temporal.weight", self.weight, 0, 1, open_low=True)
        _number("temporal.scale", self.scale, 0, 1e6, open_low=True)


@dataclass(frozen=True)
class SpatialMemory:
    """Retrieved memory is attended to on a revisit and dropped while exploring; the sink always stays.

    Light Interaction (arXiv 2605.31158), eq. 4; `margin` and `hysteresis` are additions, None and 0 are as published.
    """

    threshold: float = 0.7
    """Pose similarity in [0, 1] that the best old clip must reach; higher drops memory more often."""
    margin: float | None = 0.05
    """The best old clip must show at least what the newest chunk shows, less this; None does not compare them."""
    hysteresis: float = 0.05
    """By how much both conditions ease while memory is in use, in [0, 1], so that it does not come and go."""
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
        if self.view not in get_args(ViewName):
            raise InputError(f"spatial.view must be one of {', '.join(get_args(ViewName))}, got {self.view!r}")

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
    change = average = old = newest = None
    kept = len(history) - shape.clean
    if temporal is not None:
        change = _change(history, shape)
        if change is not None:
            state = replace(state, dynamics=state.dynamics.observe(change, temporal.weight))
        average, longest = state.dynamics.average, min(shape.window, shape.window if window is None else window)
        window = window_length(state.dynamics, longest, temporal.scale, temporal.opposite)
        if window < longest:
            reasons.append(f"window {window} of {longest}: change {average:.3g}, median {state.dynamics.median:.3g}")
    if spatial is not None:
        recent = min(shape.window if window is None else min(window, shape.window), kept)
        view = spatial.look(intrinsics) if view is None else view
        old, newest = _clips(history, shape, coming, view, recent)
        revisiting = spatial.gate.decide(old, newest, state.revisiting)
        state = replace(state, revisiting=revisiting)
        if not revisiting:
            memory = 0
            seen = "nothing old" if old is None else f"old views show {old:.2f}, the newest {newest:.2f}"
            reasons.append(f"exploring, memory dropped: {seen}")
    plan, signals = select(
        history, shape, coming, points, intrinsics, window, memory, "; ".join(reasons) or "full compute"
    )
    signals = replace(signals, change=change, dynamics=average, old_clip=old, newest_clip=newest)
    return plan, signals, state


def _change(history: History, shape: ChunkShape) -> float | None:
    entries = history.entries
    if len(entries) < 2 * shape.new:
        return None
    units = [torch.stack([e.latent.to(entries[-1].latent.device) for e in part])
             for part in (entries[-shape.new :], entries[-2 * shape.new : -shape.new])]  # fmt: skip
    return float(latent_change(*units))


def _clips(history: History, shape: ChunkShape, coming: Tensor, view: View, recent: int) -> tuple[float | None, float]:
    """Pose similarity of the best old clip (before the window, after the sink) and of the newest one."""
    kept = len(history) - shape.clean
    if not kept:
        return None, 0.0
    first = min(shape.sink, kept - recent)
    queries = coming.cpu().float()[[0, -1]]
    per_latent = similarity(queries, history.cameras(list(range(first, kept))).float(), view)  # [2, N]
    old = clip_similarity(per_latent[:, : kept - recent - first], shape.new)
    newest = float(per_latent[:, -shape.new :].mean())
    return (float(old.max()) if len(old) else None), newest


def _number(name: str, value: object, low: float, high: float, open_low: bool = False) -> None:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not fits or (open_low and value == low):
        interval = f"{'above' if open_low else 'at least'} {low:g} and at most {high:g}"
        raise InputError(f"acceleration.{name} must be a number {interval}, got {value!r}")
