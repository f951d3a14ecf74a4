"""The denoising loop of one chunk, for one world or for several that take their steps together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from worldstride.attention import Attend
from worldstride.denoising.solvers import Noise, Solver, make_solver
from worldstride.denoising.stopwatch import Stopwatch
from worldstride.protocol import Context, FreezesContext, Inputs, Narrows, ReusesAttention, SamplerSpec, WorldModel
from worldstride.rows import on_device, rows_of

Rule = Literal["hold", "extrapolate"]


@dataclass(frozen=True)
class DenoisePlan:
    """Which evaluations a chunk gets; frozen before the chunk, refined at most once after its evaluation `look`."""

    sampler: SamplerSpec
    """Solver and noise levels."""
    reason: str = "full compute"
    """Why this many, in words for the report."""
    computed: tuple[int, ...] | None = None
    """Steps that evaluate the network, the first one among them; None evaluates in every step."""
    rule: Rule = "hold"
    """What stands in for an evaluation: the last velocity, or the line through the last two, over sigma."""
    look: int | None = None
    """Step after whose evaluation the change of the predicted clean latents is asked for."""
    refresh: int | None = None
    """Evaluations that share one attention to the context, or one computation of it (`protocol.FreezesContext`); None
    never keeps it."""

    def batching(self, narrows: bool) -> tuple[object, ...]:
        """What worlds of one batch must have in common; all of the plan where the model cannot part them."""
        sampler = self.sampler
        if not narrows or (self.refresh is not None and self.refresh > 1):  # what is kept is kept of a whole batch
            return (replace(self, reason=""),)
        return (sampler.guidance, sampler.storage, self.refresh)


@dataclass(frozen=True)
class Evaluation:
    """One solver step as it happened."""

    sigma: float
    computed: bool
    seconds: float
    """A world's share of the time of what was evaluated together."""
    attended: bool = True
    """Whether attention to the context, or the context itself where every evaluation has it, was computed, not
    reused."""


@dataclass(eq=False)
class _Track:
    """Worlds of a batch with one plan, and how far they are."""

    rows: list[int]
    plan: DenoisePlan
    solver: Solver
    part: tuple[tuple[Inputs, ...], Context] | None = None
    """Inputs and context of theirs alone, where attention to the context is kept from one evaluation to the next."""
    context: Context | None = None
    """What is kept of that attention."""
    known: list[tuple[float, Tensor]] = field(default_factory=list)
    """Levels and velocities evaluated last, at most two."""
    velocity: Tensor | None = None
    """Of the step under way, evaluated but not taken."""
    clean: list[Tensor] = field(default_factory=list)
    """Predicted by the first evaluations, for `Denoising.change`."""
    step: int = 0
    count: int = 0
    """Evaluations so far."""
    done: list[tuple[Evaluation, int]] = field(default_factory=list)
    """What was evaluated, and in which stretch of time."""

    @property
    def left(self) -> bool:
        return self.step < self.plan.sampler.steps

    @property
    def computes(self) -> bool:
        """Whether the step under way evaluates the network."""
        return self.step == 0 or self.plan.computed is None or self.step in self.plan.computed

    @property
    def shares(self) -> bool:
        """Whether the evaluation under way is followed by one that takes over what it leaves behind."""
        plan = self.plan
        later = range(self.step + 1, plan.sampler.steps)
        computed = any(plan.computed is None or i in plan.computed for i in later)
        return computed and plan.refresh is not None and (self.count + 1) % plan.refresh != 0

    @property
    def sigma(self) -> float:
        return self.plan.sampler.sigmas[self.step]

    def split(self, plan: DenoisePlan, rows: list[int], context: Context | None) -> _Track:
        """Some of the worlds gone on with another plan, whose levels so far must be the same."""
        if plan.sampler.sigmas[: self.step + 1] != self.plan.sampler.sigmas[: self.step + 1]:
            raise ValueError("a plan can be refined only below the levels that were evaluated")
        places = None if rows == self.rows else [self.rows.index(r) for r in rows]
        known = [(sigma, rows_of(v, places)) for sigma, v in self.known]
        velocity = None if self.velocity is None else rows_of(self.velocity, places)
        solver = self.solver.refined(plan.sampler.sigmas, places)
        return _Track(
            rows, replace(plan, look=None), solver, None, context, known, velocity, [], self.step, self.count,
            list(self.done),
        )  # fmt: skip


class Denoising:
    """Noise on its way to clean latents; lives for one chunk of one world or of a batch, each with a plan of its own.

    Worlds take their steps together, each at its own noise levels, so that all that are not done yet are evaluated as
    one batch. `inputs` holds one value for each guidance branch, `fresh(i)` gives noise for re-noising solvers. Plans
    may differ only for a model that `Narrows`.
    """

    def __init__(
        self, model: WorldModel, noise: Tensor, inputs: Sequence[Inputs], context: Context,
        plans: Sequence[DenoisePlan], attend: Attend, fresh: Noise,
    ) -> None:  # fmt: skip
        first = plans[0].sampler
        if len(inputs) < (1 if first.guidance is None else 2):
            raise ValueError(f"guidance {first.guidance} does not go with {len(inputs)} branches of inputs")
        if len({(p.sampler.guidance, p.sampler.storage) for p in plans}) > 1:
            raise ValueError("worlds of one batch need one guidance scale and one storage precision")
        self.model, self.inputs, self.attend, self.fresh = model, tuple(inputs), attend, fresh
        self.x = model.clamp(noise.to(first.storage), self.inputs[0])
        self._guidance, self._storage, self._context = first.guidance, first.storage, context
        self._part: tuple[list[int], tuple[Inputs, ...], Context] = (list(range(len(plans))), self.inputs, context)
        groups = _by_plan(list(enumerate(plans)))
        self._check_parts(len(groups))
        self._tracks = [_Track(rows, plan, make_solver(plan.sampler)) for rows, plan in groups]
        self._watch = Stopwatch(self.x.device)
        self._shares: list[int] = []
        """Worlds that were evaluated in each stretch of time."""

    @property
    def looking(self) -> list[int]:
        """Worlds whose plan has a look, in the order of `change`."""
        return [row for t in self._tracks if t.plan.look is not None for row in t.rows]

    def run(self) -> Tensor:
        """Take all steps that are left; clean latents [B, T, ...]."""
        self._watch.begin()
        while tracks := [t for t in self._tracks if t.left]:
            self._evaluate(tracks)
            self._take(tracks)
        return self.x

    def change(self) -> Tensor:
        """Evaluate up to the plans' `look`; how much predictions differ from the ones before: [worlds of `looking`].

        Root mean square of the difference of the predicted clean latents, relative to the prediction's.
        """
        looking = [t for t in self._tracks if t.plan.look is not None]
        if not looking or any((t.plan.look or 0) < 1 for t in looking):
            looks = sorted({str(t.plan.look) for t in self._tracks})
            raise ValueError(f"only plans that look after step 1 or later can be refined, got look={', '.join(looks)}")
        while tracks := [t for t in self._tracks if t.left and (t.plan.look is None or t.step < t.plan.look)]:
            if not any(t.plan.look is not None for t in tracks):
                break
            self._evaluate(tracks)
            self._take(tracks)
        self._evaluate([t for t in self._tracks if t.left])
        changes = []
        for t in looking:
            before, after = t.clean[-2:]
            gap, size = (c.square().flatten(1).mean(1).sqrt() for c in (after - before, after))
            changes.append(gap / size.clamp_min(1e-8))
        return changes[0] if len(changes) == 1 else torch.cat(changes)

    def refine(self, plans: Mapping[int, DenoisePlan]) -> None:
        """These worlds go on with other plans, whose levels so far must be the same."""
        tracks = list[_Track]()
        for t in self._tracks:
            going = [(row, plans[row]) for row in t.rows if row in plans]
            staying = [row for row in t.rows if row not in plans]
            parts = _by_plan(going) + ([(staying, t.plan)] if staying else [])
            for rows, plan in parts:
                whole = rows == t.rows
                self._check_parts(1 if whole else 2)
                if whole and plan is t.plan:
                    tracks.append(t)
                    continue
                context = t.context
                if context is not None and not whole and isinstance(self.model, Narrows):
                    inputs = self.inputs if t.part is None else t.part[0]
                    context = self.model.narrow(inputs[0], context, [t.rows.index(r) for r in rows])[1]
                tracks.append(t.split(plan, rows, context))
        self._tracks = tracks

    def evaluations(self) -> list[tuple[Evaluation, ...]]:
        """See `Done.evaluations`."""
        return self.done().evaluations()

    def done(self) -> Done:
        """What was evaluated so far, without the inputs and the context that it was evaluated with."""
        return Done(self._watch, tuple(self._shares), tuple((tuple(t.rows), tuple(t.done)) for t in self._tracks))

    def _check_parts(self, parts: int) -> None:
        if parts > 1 and not isinstance(self.model, Narrows):
            raise ValueError(f"{self.model.name!r} cannot go on with some worlds of a batch")

    def _evaluate(self, tracks: Sequence[_Track]) -> None:
        """Velocities of the steps under way: evaluated, or what the plan's rule makes of the last ones."""
        tracks = [t for t in tracks if t.velocity is None]
        joined = [t for t in tracks if t.computes and not self._keeps_attention(t)]
        if joined:
            rows = sorted(row for t in joined for row in t.rows)
            inputs, context = self._narrowed(rows)
            sigmas = {row: t.sigma for t in joined for row in t.rows}
            velocity, _ = self._velocity(self._rows(rows), [sigmas[r] for r in rows], inputs, context)
            for t in joined:
                places = None if t.rows == rows else [rows.index(r) for r in t.rows]
                self._note(t, rows_of(velocity, places), True)
        for t in tracks:
            if not t.computes:
                t.velocity = _stand_in(t.known, t.sigma, t.plan.rule)
                t.done.append((Evaluation(t.sigma, False, 0.0, False), len(self._shares)))
            elif t not in joined:
                self._note(t, *self._reusing(t))
        self._watch.mark()
        self._shares.append(sum(len(t.rows) for t in tracks if t.computes))

    def _note(self, t: _Track, velocity: Tensor, attended: bool) -> None:
        t.velocity = velocity
        # a value that stands in for an evaluation never enters here
        t.known = [*t.known[-1:], (t.sigma, velocity)]
        if t.plan.look is not None and t.step <= t.plan.look:
            t.clean.append(self._rows(t.rows).float() - t.sigma * velocity)
        t.done.append((Evaluation(t.sigma, True, 0.0, attended), len(self._shares)))
        t.count += 1

    def _keeps_attention(self, t: _Track) -> bool:
        every = t.plan.refresh
        keeps = isinstance(self.model, (ReusesAttention, FreezesContext))
        return every is not None and every > 1 and keeps and self._guidance is None

    def _reusing(self, t: _Track) -> tuple[Tensor, bool]:
        """The velocity of a track that keeps its attention to the context, and whether that was computed anew."""
        model = self.model
        if t.plan.refresh is None or not isinstance(model, (ReusesAttention, FreezesContext)):
            raise ValueError("this plan keeps no attention")
        capturing, reusing = (
            (model.apart, model.reuse) if isinstance(model, ReusesAttention) else (model.capturing, model.frozen)
        )
        t.part = t.part or self._narrowed(t.rows)
        inputs, whole = t.part
        if t.context is not None and t.count % t.plan.refresh == 0:
            t.context = None  # gone before another is made
        if t.context is None and isinstance(model, FreezesContext) and not t.shares:
            return self._velocity(self._rows(t.rows), [t.sigma] * len(t.rows), inputs, whole)[0], True
        anew = t.context is None
        context = capturing(whole) if t.context is None else t.context
        velocity, captured = self._velocity(self._rows(t.rows), [t.sigma] * len(t.rows), inputs, context)
        if anew:
            t.context = reusing(whole, captured)
        return velocity, anew

    def _velocity(
        self, x: Tensor, sigmas: Sequence[float], inputs: Sequence[Inputs], context: Context
    ) -> tuple[Tensor, Mapping[str, Any]]:
        sigma: Any = sigmas[0]
        if len(set(sigmas)) > 1:  # a model that parts worlds takes a level for each
            sigma = on_device(sigmas, x.device)
        velocity, captured = self.model.velocity(x, sigma, inputs[0], context, self.attend)
        if self._guidance is not None:
            # classifier-free guidance (Ho & Salimans, 2022): unconditional + scale (conditional - unconditional)
            other, _ = self.model.velocity(x, sigma, inputs[1], context, self.attend)
            velocity = other + self._guidance * (velocity - other)
        return velocity.to(torch.float32), captured

    def _fresh_of(self, rows: Sequence[int], i: int) -> Tensor:
        return rows_of(self.fresh(i), rows)

    def _rows(self, rows: Sequence[int]) -> Tensor:
        return rows_of(self.x, None if len(rows) == len(self.x) else rows)

    def _narrowed(self, rows: Sequence[int]) -> tuple[tuple[Inputs, ...], Context]:
        """Inputs and context of some worlds, in order; the last ones asked for are at hand."""
        if len(rows) == len(self.x):
            return self.inputs, self._context
        if list(rows) != self._part[0]:
            self._check_parts(2)
            if isinstance(self.model, Narrows):
                parts = [self.model.narrow(one, self._context, rows) for one in self.inputs]
                self._part = list(rows), tuple(p[0] for p in parts), parts[0][1]
        return self._part[1:]

    def _take(self, tracks: Sequence[_Track]) -> None:
        x = self.x
        for t in tracks:
            if t.velocity is None:
                raise ValueError("a step is taken with a velocity")
            whole = len(t.rows) == len(x)
            noise = self.fresh if whole else partial(self._fresh_of, t.rows)
            moved = t.solver.step(t.step, self._rows(t.rows).float(), t.velocity, noise).to(self._storage)
            x = moved if whole else x.index_copy(0, on_device(t.rows, x.device), moved)
            t.velocity, t.step = None, t.step + 1
        self.x = self.model.clamp(x, self.inputs[0])


@dataclass(frozen=True, eq=False)
class Done:
    """What was evaluated for each world; whoever keeps this alone lets go of gigabytes."""

    watch: Stopwatch
    shares: tuple[int, ...]
    """Worlds that were evaluated in each stretch of time."""
    tracks: tuple[tuple[tuple[int, ...], tuple[tuple[Evaluation, int], ...]], ...]
    """Worlds with one plan, and what was evaluated for them, in which stretch."""

    def evaluations(self) -> list[tuple[Evaluation, ...]]:
        """What was evaluated for each world; waits for a GPU to have done it."""
        out = dict[int, tuple[Evaluation, ...]]()
        seconds = [time / max(count, 1) for time, count in zip(self.watch.seconds(), self.shares, strict=True)]
        for rows, done in self.tracks:
            made = tuple(replace(e, seconds=seconds[at]) if e.computed else e for e, at in done)
            out |= dict.fromkeys(rows, made)
        return [out[row] for row in sorted(out)]


def _by_plan(plans: Sequence[tuple[int, DenoisePlan]]) -> list[tuple[list[int], DenoisePlan]]:
    """Worlds with equal plans together; why a plan was made does not count."""
    groups: dict[DenoisePlan, tuple[list[int], DenoisePlan]] = {}
    for row, plan in plans:
        groups.setdefault(replace(plan, reason=""), ([], plan))[0].append(row)
    return list(groups.values())


def _stand_in(known: Sequence[tuple[float, Tensor]], sigma: float, rule: Rule) -> Tensor:
    """A velocity at `sigma` from the ones evaluated last."""
    at, velocity = known[-1]
    if rule == "hold" or len(known) < 2:
        return velocity
    before, other = known[0]
    return velocity + (sigma - at) / (at - before) * (velocity - other)


def denoise(
    model: WorldModel,
    noise: Tensor,
    inputs: Sequence[Inputs],
    context: Context,
    plan: DenoisePlan,
    attend: Attend,
    fresh: Noise,
) -> tuple[Tensor, tuple[Evaluation, ...]]:
    """Turn noise [B, T, ...] into clean latents, and say what was evaluated. The plan is taken as it is."""
    run = Denoising(model, noise, inputs, context, [plan] * len(noise), attend, fresh)
    return run.run(), run.evaluations()[0]
