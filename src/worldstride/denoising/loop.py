"""The denoising loop of one chunk, for one world or for several with the same plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from worldstride.attention import Attend
from worldstride.denoising.solvers import Noise, make_solver
from worldstride.denoising.stopwatch import Stopwatch
from worldstride.protocol import Context, Inputs, Narrows, ReusesAttention, SamplerSpec, WorldModel

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
    """Evaluations that share one attention to the context; None never keeps it."""


@dataclass(frozen=True)
class Evaluation:
    """One solver step as it happened."""

    sigma: float
    computed: bool
    seconds: float
    attended: bool = True
    """Whether attention to the context was computed, not reused."""


class Denoising:
    """Noise on its way to clean latents; lives for one chunk.

    `inputs` holds one value for each guidance branch, `fresh(i)` gives noise for re-noising solvers.
    """

    def __init__(
        self, model: WorldModel, noise: Tensor, inputs: Sequence[Inputs], context: Context, plan: DenoisePlan,
        attend: Attend, fresh: Noise,
    ) -> None:  # fmt: skip
        if len(inputs) < (1 if plan.sampler.guidance is None else 2):
            raise ValueError(f"guidance {plan.sampler.guidance} does not go with {len(inputs)} branches of inputs")
        self.model, self.inputs, self.attend, self.fresh = model, tuple(inputs), attend, fresh
        self.plan, self.solver = plan, make_solver(plan.sampler)
        self.x = model.clamp(noise.to(plan.sampler.storage), self.inputs[0])
        self._whole = self._context = context
        self._known: list[tuple[float, Tensor]] = []  # levels and velocities evaluated last, at most two
        self._velocity: Tensor | None = None  # of the step under way, evaluated but not taken
        self._clean: list[Tensor] = []  # predicted by the first evaluations, for `change`
        self._step, self._count = 0, 0
        self._watch, self._done = Stopwatch(self.x.device), list[Evaluation]()

    def run(self) -> Tensor:
        """Take all steps that are left; clean latents [B, T, ...]."""
        self._watch.begin()
        while self._step < self.plan.sampler.steps:
            self._evaluate()
            self._take()
        return self.x

    def change(self) -> Tensor:
        """Evaluate up to the plan's `look`; how much its prediction differs from the one before, [B] on the device.

        Root mean square of the difference of the predicted clean latents, relative to the prediction's.
        """
        look = self.plan.look
        if look is None or look < 1:
            raise ValueError(f"only a plan that looks after step 1 or later can be refined, this one has look={look}")
        while self._step < look:
            self._evaluate()
            self._take()
        self._evaluate()
        before, after = self._clean[-2:]
        gap, size = (t.square().flatten(1).mean(1).sqrt() for t in (after - before, after))
        return gap / size.clamp_min(1e-8)

    def refined(self, plan: DenoisePlan, rows: Sequence[int] | None = None) -> Denoising:
        """These worlds of the batch (None: all) gone on with another plan, whose levels so far must be the same."""
        at = self._step + 1
        if plan.sampler.sigmas[:at] != self.plan.sampler.sigmas[:at]:
            raise ValueError("a plan can be refined only below the levels that were evaluated")
        other = object.__new__(Denoising)
        other.__dict__ = dict(self.__dict__)
        other._done, other._watch = list(self._done), self._watch.fork()
        other.plan, other.solver = replace(plan, look=None), self.solver.refined(plan.sampler.sigmas, rows)
        if rows is not None and list(rows) != list(range(len(self.x))):
            if not isinstance(self.model, Narrows):
                raise ValueError(f"{self.model.name!r} cannot go on with some worlds of a batch")
            index = torch.tensor(rows, device=self.x.device)
            narrowed = [self.model.narrow(one, self._context, rows) for one in self.inputs]
            other.inputs, other._context = tuple(n[0] for n in narrowed), narrowed[0][1]
            other._whole = self.model.narrow(self.inputs[0], self._whole, rows)[1]
            other.x, other._velocity = self.x[index], None if self._velocity is None else self._velocity[index]
            other._known = [(sigma, v[index]) for sigma, v in self._known]
            fresh = self.fresh
            other.fresh = lambda i: fresh(i)[index]
        return other

    def evaluations(self) -> tuple[Evaluation, ...]:
        """What was evaluated so far; waits for a GPU to have done it."""
        return tuple(replace(e, seconds=t) for e, t in zip(self._done, self._watch.seconds(), strict=True))

    def _evaluate(self) -> None:
        """The velocity of the step under way: evaluated, or what the plan's rule makes of the last ones."""
        if self._velocity is not None:
            return
        plan, i = self.plan, self._step
        spec = plan.sampler
        sigma = spec.sigmas[i]
        computed = i == 0 or plan.computed is None or i in plan.computed
        attended = computed
        if computed:
            velocity, attended = self._computed(sigma)
            # a value that stands in for an evaluation never enters here
            self._known = [*self._known[-1:], (sigma, velocity)]
            if plan.look is not None and i <= plan.look:
                self._clean.append(self.x.float() - sigma * velocity)
        else:
            velocity = _stand_in(self._known, sigma, plan.rule)
        self._velocity = velocity
        self._watch.mark()
        self._done.append(Evaluation(sigma, computed, 0.0, attended))

    def _computed(self, sigma: float) -> tuple[Tensor, bool]:
        model, plan = self.model, self.plan
        every = plan.refresh if isinstance(model, ReusesAttention) and plan.sampler.guidance is None else None
        anew = every is None or self._count % every == 0
        if anew:
            self._context = self._whole
            if every is not None and every > 1 and isinstance(model, ReusesAttention):
                self._context = model.apart(self._whole)
        velocity, captured = model.velocity(self.x, sigma, self.inputs[0], self._context, self.attend)
        if plan.sampler.guidance is not None:
            # classifier-free guidance (Ho & Salimans, 2022): unconditional + scale (conditional - unconditional)
            other, _ = model.velocity(self.x, sigma, self.inputs[1], self._context, self.attend)
            velocity = other + plan.sampler.guidance * (velocity - other)
        if anew and every is not None and every > 1 and isinstance(model, ReusesAttention):
            self._context = model.reuse(self._whole, captured)
        self._count += 1
        return velocity.to(torch.float32), anew

    def _take(self) -> None:
        if self._velocity is None:
            raise ValueError("a step is taken with a velocity")
        moved = self.solver.step(self._step, self.x.float(), self._velocity, self.fresh)
        self.x = self.model.clamp(moved.to(self.plan.sampler.storage), self.inputs[0])
        self._velocity, self._step = None, self._step + 1


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
    run = Denoising(model, noise, inputs, context, plan, attend, fresh)
    return run.run(), run.evaluations()
