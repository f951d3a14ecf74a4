"""The denoising loop of one chunk."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from worldstride.attention import Attend
from worldstride.denoising.solvers import Noise, make_solver
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
    wait: Callable[[], None] = lambda: None,
) -> tuple[Tensor, tuple[Evaluation, ...], DenoisePlan]:
    """Turn noise [B, T, ...] into clean latents.

    `inputs` holds one value for each guidance branch, `fresh(i)` gives noise for re-noising solvers, `wait` is
    called before a clock is read. Returns the latents, what was evaluated, and the plan as refined.
    """
    spec = plan.sampler
    solver = make_solver(spec)
    x = model.clamp(noise.to(spec.storage), inputs[0])
    done: list[Evaluation] = []
    i = 0
    while i < spec.steps:
        begin, sigma = time.perf_counter(), spec.sigmas[i]
        velocity, captured = _guided(model, x, sigma, inputs, context, attend, spec.guidance)
        if i == 0 and refine is not None:
            plan = refine(plan, x.float() - sigma * velocity, captured)
            if plan.sampler.sigmas[0] != sigma:
                # the evaluation just made stays valid only at its own noise level
                plan = replace(plan, sampler=spec)
            spec = plan.sampler
            solver = make_solver(spec)
        x = model.clamp(solver.step(i, x.float(), velocity, fresh).to(spec.storage), inputs[0])
        wait()
        done.append(Evaluation(sigma, True, time.perf_counter() - begin))
        i += 1
    return x, tuple(done), plan


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
