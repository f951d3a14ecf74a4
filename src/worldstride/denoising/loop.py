"""The denoising loop of one chunk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from worldstride.attention import Attend
from worldstride.denoising.solvers import Noise, make_solver
from worldstride.denoising.stopwatch import Stopwatch
from worldstride.protocol import Context, Inputs, SamplerSpec, WorldModel


@dataclass(frozen=True)
class DenoisePlan:
    """Which evaluations a chunk gets; frozen before the chunk, refined at most once from its first evaluation."""

    sampler: SamplerSpec
    """Solver and noise levels."""
    reason: str = "full compute"
    """Why this many, in words for the report."""


@dataclass(frozen=True)
class Evaluation:
    """One solver step as it happened."""

    sigma: float
    computed: bool
    seconds: float


Refine = Callable[[DenoisePlan, Tensor, Mapping[str, Tensor]], DenoisePlan]
"""A policy's second look: the plan, the clean latents predicted by the first evaluation, what it captured -> a plan."""


def denoise(
    model: WorldModel,
    noise: Tensor,
    inputs: Sequence[Inputs],
    context: Context,
    plan: DenoisePlan,
    attend: Attend,
    fresh: Noise,
    refine: Refine | None = None,
) -> tuple[Tensor, tuple[Evaluation, ...], DenoisePlan]:
    """Turn noise [B, T, ...] into clean latents.

    `inputs` holds one value for each guidance branch, `fresh(i)` gives noise for re-noising solvers.
    Returns the latents, what was evaluated, and the plan as refined.
    """
    if len(inputs) < (1 if plan.sampler.guidance is None else 2):
        raise ValueError(f"guidance {plan.sampler.guidance} does not go with {len(inputs)} branches of inputs")
    spec = plan.sampler
    solver = make_solver(spec)
    x = model.clamp(noise.to(spec.storage), inputs[0])
    watch, done = Stopwatch(x.device), list[float]()
    i = 0
    while i < spec.steps:
        sigma = spec.sigmas[i]
        velocity, captured = _guided(model, x, sigma, inputs, context, attend, spec.guidance)
        if i == 0 and refine is not None:
            plan = refine(plan, x.float() - sigma * velocity, captured)
            if plan.sampler.sigmas[0] != sigma:
                # the evaluation just made stays valid only at its own noise level
                plan = replace(plan, sampler=spec)
            spec = plan.sampler
            solver = make_solver(spec)
        x = model.clamp(solver.step(i, x.float(), velocity, fresh).to(spec.storage), inputs[0])
        watch.mark()
        done.append(sigma)
        i += 1
    evaluations = tuple(Evaluation(s, True, t) for s, t in zip(done, watch.seconds(), strict=True))
    return x, evaluations, plan


def _guided(
    model: WorldModel, x: Tensor, sigma: float, inputs: Sequence[Inputs], context: Context, attend: Attend,
    scale: float | None,
) -> tuple[Tensor, Mapping[str, Tensor]]:  # fmt: skip
    """Classifier-free guidance (Ho & Salimans, 2022): unconditional + scale (conditional - unconditional)."""
    velocity, captured = model.velocity(x, sigma, inputs[0], context, attend)
    if scale is not None:
        other, _ = model.velocity(x, sigma, inputs[1], context, attend)
        velocity = other + scale * (velocity - other)
    return velocity.to(torch.float32), captured
