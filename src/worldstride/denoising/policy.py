"""Policies that choose which evaluations a chunk gets, from plain numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from worldstride.context.gate import Gate, PoseScores, Score, check_gate
from worldstride.denoising.loop import DenoisePlan, Rule
from worldstride.errors import InputError, integer_from, number_in
from worldstride.protocol import SamplerSpec

Sampler = Callable[[int | None, float | None], SamplerSpec]
"""A model's `sampler`: steps and shift, None for its own -> solver and noise levels."""


@dataclass(frozen=True)
class StepCache:
    """On a revisit some evaluations are not made; what earlier ones said stands in for them.

    The defaults are Light Interaction's cache (arXiv 2605.31158, eqs. 5-8): the first step's output serves all steps
    but the last. With Euler steps that is a coarser schedule and nothing else.
    """

    score: Score = "similarity"
    """Score from cameras that opens the gate on reuse; see `SpatialMemory.score`."""
    threshold: float = 0.7
    """Least score in [0, 1] for reuse; higher computes more often."""
    margin: float | None = None
    """With "similarity": how much less than the newest chunk's it may be; None does not compare them."""
    hysteresis: float = 0.0
    """By how much the conditions ease while steps are reused."""
    first: int = 1
    """Steps computed at the beginning."""
    last: int = 1
    """Steps computed at the end."""
    rule: Rule = "hold"
    """What stands in: "hold", the last velocity, or "extrapolate", the line through the last two over sigma."""

    def __post_init__(self) -> None:
        check_gate("acceleration.cache", self.score, self.threshold, self.margin, self.hysteresis)
        integer_from("acceleration.cache.first", self.first, 1)
        integer_from("acceleration.cache.last", self.last, 0)
        if self.rule not in get_args(Rule):
            raise InputError(f"acceleration.cache.rule must be one of {', '.join(get_args(Rule))}, got {self.rule!r}")

    def computed(self, steps: int) -> tuple[int, ...] | None:
        """Steps that are computed out of so many; None where nothing would be saved."""
        if self.first + self.last >= steps:
            return None
        return (*range(self.first), *range(steps - self.last, steps))


@dataclass(frozen=True)
class AdaptiveSteps:
    """Few steps where the future is known, the settings' own number where it has to be invented."""

    few: int = 3
    """Steps where the coming views are known."""
    shift: float | None = None
    """Shift of the noise schedule there; None takes the model's own for that number of steps. After a look the steps
    that are left are placed by it, None places them evenly."""
    score: Score = "known"
    """Score from cameras that tells known from novel; see `SpatialMemory.score`."""
    threshold: float = 0.95
    """Least score in [0, 1] that counts as known; higher spends more."""
    hysteresis: float = 0.0
    """By how much the condition eases while the views are known."""
    change: float | None = None
    """Where cameras do not say "known": the relative change of the predicted latents from the first evaluation to the
    second below which the chunk goes on with few steps all the same, at least one more; None does not look."""

    def __post_init__(self) -> None:
        check_gate("acceleration.adaptive", self.score, self.threshold, None, self.hysteresis)
        integer_from("acceleration.adaptive.few", self.few, 1)
        if self.shift is not None:
            number_in("acceleration.adaptive.shift", self.shift, 0, 1e6, open_low=True)
        if self.change is not None:
            number_in("acceleration.adaptive.change", self.change, 0, 1e6)


def plan_denoising(
    sampler: Sampler, steps: int | None, shift: float | None, solver: Literal["euler", "unipc"] | None,
    cache: StepCache | None, adaptive: AdaptiveSteps | None, refresh: int | None, scores: PoseScores | None,
    caching: bool, knowing: bool, name: str,
) -> tuple[DenoisePlan, bool, bool]:  # fmt: skip
    """Which evaluations a chunk gets, and whether the gates on reuse and on few steps are open.

    Args:
        sampler: the model's.
        steps: asked for; None takes full compute.
        shift: asked for; None takes the model's own for the number of steps.
        solver: asked for in place of Euler; other solvers of a model stay.
        cache: reuse of outputs.
        adaptive: number of steps by what is known.
        refresh: evaluations that share one attention to the context.
        scores: what cameras tell, where somebody asked.
        caching: whether the gate on reuse was open for the chunk before.
        knowing: whether the chunk before was taken for known.
        name: of the settings, for the reason.
    """
    asked = [] if steps is None else [f"{steps} steps"]
    asked += [] if shift is None else [f"shift {shift:g}"]
    reasons = [f"{' and '.join(asked)} asked for by {name!r}"] if asked else []
    scores = scores or PoseScores()
    look = None
    if adaptive is not None:
        score = scores.of(adaptive.score)
        knowing = Gate(adaptive.threshold, None, adaptive.hysteresis).decide(score, scores.newest, knowing)
        if knowing and adaptive.few < sampler(steps, shift).steps:
            steps, shift = adaptive.few, adaptive.shift
            reasons = [f"{steps} steps: {adaptive.score} {score:.2f}"]
        elif knowing:
            reasons.append(f"{adaptive.few} steps where known are no fewer")
        else:
            look = None if adaptive.change is None else 1
            reasons.append("novel" if score is None else f"{adaptive.score} {score:.2f} only")
    spec = sampler(steps, shift)
    if solver is not None and spec.solver == "euler":
        spec = replace(spec, solver=solver)
    computed = None
    if cache is not None:
        gate = Gate(cache.threshold, cache.margin, cache.hysteresis)
        caching = gate.decide(scores.of(cache.score), scores.newest, caching)
        computed = cache.computed(spec.steps) if caching else None
        if computed is not None:
            reasons.append(f"revisit, {spec.steps - len(computed)} of {spec.steps} outputs reused ({cache.rule})")
    short = adaptive is not None and spec.steps <= max(2, adaptive.few)
    if short or (computed is not None and look not in computed):  # nothing to save, or nothing new to look at
        look = None
    reason = "; ".join(reasons) or "full compute"
    return DenoisePlan(spec, reason, computed, cache.rule if cache else "hold", look, refresh), caching, knowing


def shortened(plan: DenoisePlan, adaptive: AdaptiveSteps | None, change: float) -> DenoisePlan:
    """The plan after its look: few steps in all where the prediction hardly changed."""
    if plan.look is None or adaptive is None or adaptive.change is None or change >= adaptive.change:
        return replace(plan, reason=f"{plan.reason}, change {change:.3f}", look=None)
    kept = plan.sampler.sigmas[: plan.look + 1]
    left = max(1, adaptive.few - plan.look)
    sigmas = (*kept, *tail(kept[-1], left, adaptive.shift or 1.0))
    return replace(
        plan, sampler=replace(plan.sampler, sigmas=sigmas), computed=None, look=None,
        reason=f"{plan.look + left} steps: change {change:.3f} of the first predictions",
    )  # fmt: skip


def tail(first: float, steps: int, shift: float) -> tuple[float, ...]:
    """Noise levels after `first` down to 0 in so many steps, even before the shift."""
    begin = first / (shift - (shift - 1) * first)
    grid = (begin * (1 - i / steps) for i in range(1, steps + 1))
    return tuple(shift * s / (1 + (shift - 1) * s) for s in grid)
