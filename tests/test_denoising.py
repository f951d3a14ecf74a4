"""Schedules, solvers and the loop.

`golden/unipc.npz` holds four channels at two places of a rollout computed with the upstream sampler of
Matrix-Game-3.0 in float32: what entered every step, what the network said there, and what came out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from worldstride.attention import attend
from worldstride.denoising import DenoisePlan, Denoising, denoise, make_solver, shifted_sigmas
from worldstride.denoising.policy import tail
from worldstride.denoising.solvers import Euler, Renoise, Solver, UniPC
from worldstride.errors import InputError
from worldstride.protocol import SamplerSpec

GOLDEN = Path(__file__).parent / "golden" / "unipc.npz"


def no_noise(i: int) -> Tensor:
    raise AssertionError(f"step {i} asked for fresh noise")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_schedules_follow_the_formula():
    assert shifted_sigmas(4) == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert shifted_sigmas(2, 3.0) == pytest.approx((1.0, 3 * 0.5 / (1 + 2 * 0.5), 0.0))
    assert shifted_sigmas(3, 5.0, first=0.9) == pytest.approx(
        [5 * s / (1 + 4 * s) for s in (0.9, 0.6, 0.3, 0.0)], abs=1e-12
    )
    even, shifted = shifted_sigmas(8), shifted_sigmas(8, 2.0)
    assert all(a < b for a, b in zip(even[1:-1], shifted[1:-1], strict=True))
    SamplerSpec(shifted_sigmas(50, 12.0))


@pytest.mark.parametrize(("steps", "shift", "text"), [(0, 1.0, "steps"), (-1, 1.0, "steps"), (4, 0.0, "shift")])
def test_impossible_schedules_are_refused(steps: int, shift: float, text: str):
    with pytest.raises(InputError, match=text):
        shifted_sigmas(steps, shift)


@pytest.mark.parametrize("sigmas", [(1.0,), (), (1.0, 0.5), (0.5, 0.5, 0.0), (1.1, 0.0), (0.5, 0.7, 0.0)])
def test_a_sampler_falls_strictly_to_zero(sigmas: tuple[float, ...]):
    with pytest.raises(InputError, match="sigmas must fall strictly"):
        SamplerSpec(sigmas)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_euler_is_exact_on_straight_paths(steps: int):
    clean, noise = normal(2, 5), normal(2, 5, seed=1)
    x, solver = noise, Euler(shifted_sigmas(steps, 3.0))
    for i in range(steps):
        x = solver.step(i, x, noise - clean, no_noise)
    assert torch.allclose(x, clean, atol=1e-5)


def test_renoising_jumps_to_clean_and_back():
    sigmas = (1.0, 0.6, 0.2, 0.0)
    solver, asked, x = Renoise(sigmas), [], normal(3, 4)

    def fresh(i: int) -> Tensor:
        asked.append(i)
        return normal(3, 4, seed=10 + i)

    for i in range(3):
        velocity = normal(3, 4, seed=100 + i)
        expected = x - sigmas[i] * velocity
        if i < 2:
            expected = (1 - sigmas[i + 1]) * expected + sigmas[i + 1] * normal(3, 4, seed=10 + i)
        x = solver.step(i, x, velocity, fresh)
        assert torch.allclose(x, expected, atol=1e-6)
    assert asked == [0, 1]


@pytest.mark.parametrize("chunk", [0, 1, 2])
@pytest.mark.parametrize("forced", [True, False])
def test_unipc_gives_upstreams_numbers(chunk: int, forced: bool):
    """Step for step, from upstream's latents or from our own of the step before."""
    golden = np.load(GOLDEN)
    sigmas = tuple(golden["sigmas"].tolist())
    head = 1 if chunk == 0 else 4  # re-imposed after every step, not the solver's
    solver, x = UniPC(sigmas), torch.from_numpy(golden[f"c{chunk}/s0/latent_in"])
    for i in range(3):
        given = torch.from_numpy(golden[f"c{chunk}/s{i}/latent_in"])
        said = torch.from_numpy(golden[f"c{chunk}/s{i}/model_out"])
        x = solver.step(i, given if forced else x, said, no_noise)
        after = golden[f"c{chunk}/s{i + 1}/latent_in" if i < 2 else f"c{chunk}/latent_out"]
        assert after.shape == x.shape
        np.testing.assert_allclose(x[:, head:].numpy(), after[:, head:], rtol=0, atol=1e-5)


def gaussian(x: Tensor, sigma: float) -> Tensor:
    """Exact velocity where clean values are normal with mean 0.7 and deviation 0.5."""
    mean, deviation = 0.7, 0.5
    variance = (1 - sigma) ** 2 * deviation**2 + sigma**2
    clean = mean + (1 - sigma) * deviation**2 / variance * (x - (1 - sigma) * mean)
    return (x - clean) / sigma


def solution(x: Tensor, start: float, end: float) -> Tensor:
    """Where the exact flow takes x from one noise level to another."""

    def spread(s: float) -> float:
        return math.hypot((1 - s) * 0.5, s)

    return (1 - end) * 0.7 + spread(end) / spread(start) * (x - (1 - start) * 0.7)


@pytest.mark.parametrize(("make", "low", "high"), [(Euler, 0.85, 1.15), (UniPC, 1.85, 3.3)])
def test_order_of_convergence(make: Callable[[tuple[float, ...]], Solver], low: float, high: float):
    x0 = torch.linspace(-2, 2, 9, dtype=torch.float64)
    start, end, errors = 0.95, 0.05, []
    for steps in (16, 32, 64):
        sigmas = tuple(start + (end - start) * i / steps for i in range(steps + 1))
        x, solver = x0, make(sigmas)
        for i in range(steps):
            x = solver.step(i, x, gaussian(x, sigmas[i]), no_noise)
        errors.append(float((x - solution(x0, start, end)).abs().max()))
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(low < order < high for order in orders), (errors, orders)


def test_unipc_reaches_clean_from_pure_noise():
    """From level 1 to 0, where half log signal-to-noise is infinite at both ends, at order 2 all the same."""
    x0, errors = torch.linspace(-2, 2, 9, dtype=torch.float64), []
    for steps in (20, 40, 80):
        sigmas = shifted_sigmas(steps)
        x, solver = x0, UniPC(sigmas)
        for i in range(steps):
            x = solver.step(i, x, gaussian(x, sigmas[i]), no_noise)
        errors.append(float((x - solution(x0, 1.0, 0.0)).abs().max()))
    assert errors[0] < 0.01
    assert all(a / b > 3 for a, b in pairwise(errors)), errors


def test_samplers_name_their_solver():
    sigmas = (1.0, 0.0)
    for name, kind in (("euler", Euler), ("unipc", UniPC), ("renoise", Renoise)):
        assert type(make_solver(SamplerSpec(sigmas, name))) is kind  # type: ignore[arg-type]


class Stub:
    """What the loop needs of a model; inputs are the value that a branch pulls towards."""

    name = "stub"

    def __init__(self) -> None:
        self.evaluated: list[tuple[float, float]] = []
        self.clamped: list[Tensor] = []

    def velocity(self, x: Tensor, sigma: float, inputs: float, context: object, attend: object) -> Any:
        self.evaluated.append((sigma, inputs))
        return (x.float() - inputs) / sigma, {"pull": torch.tensor(inputs)}

    def clamp(self, x: Tensor, inputs: float) -> Tensor:
        self.clamped.append(x)
        return torch.cat([torch.full_like(x[:, :1], 9.0), x[:, 1:]], 1)


def run(model: Stub, spec: SamplerSpec, inputs: tuple[float, ...] = (2.0,), fresh=no_noise, **options: Any):
    plan = DenoisePlan(spec)
    return denoise(model, normal(1, 4, 3), inputs, None, plan, attend, fresh, **options)  # type: ignore[arg-type]


def test_the_loop_evaluates_every_level_once_and_clamps_after_every_step():
    model, spec = Stub(), SamplerSpec(shifted_sigmas(5))
    latents, evaluations = run(model, spec)
    assert [sigma for sigma, _ in model.evaluated] == list(spec.sigmas[:-1])
    assert [e.sigma for e in evaluations] == list(spec.sigmas[:-1])
    assert all(e.computed and e.seconds >= 0 for e in evaluations)
    assert len(model.clamped) == 1 + 5
    assert torch.equal(model.clamped[0], normal(1, 4, 3))
    assert bool((latents[:, 0] == 9).all())
    assert torch.allclose(latents[:, 1:], torch.full((1, 3, 3), 2.0), atol=1e-5)


def test_latents_are_stored_in_the_samplers_precision():
    model = Stub()
    latents, _ = run(model, SamplerSpec(shifted_sigmas(3), "unipc", torch.bfloat16))
    assert latents.dtype == torch.bfloat16
    assert {x.dtype for x in model.clamped} == {torch.bfloat16}


def test_guidance_leads_away_from_the_unconditional_branch():
    model = Stub()
    latents, _ = run(model, SamplerSpec((1.0, 0.0), guidance=3.0), (2.0, 0.5))
    assert model.evaluated == [(1.0, 2.0), (1.0, 0.5)]
    # velocities are linear in the pull, so guided ones pull towards 0.5 + 3 (2 - 0.5)
    assert torch.allclose(latents[:, 1:], torch.full((1, 3, 3), 5.0), atol=1e-5)


def test_without_guidance_a_second_branch_is_never_evaluated():
    model = Stub()
    run(model, SamplerSpec(shifted_sigmas(2)), (2.0, 0.5))
    assert {pull for _, pull in model.evaluated} == {2.0}


def test_fresh_noise_is_numbered_by_step():
    asked: list[int] = []

    def fresh(i: int) -> Tensor:
        asked.append(i)
        return normal(1, 4, 3, seed=i)

    run(Stub(), SamplerSpec(shifted_sigmas(4), "renoise"), fresh=fresh)
    assert asked == [0, 1, 2]


def begun(model: Stub, plan: DenoisePlan, batch: int = 1) -> Denoising:
    noise = normal(1, 4, 3).expand(batch, -1, -1).clone()
    return Denoising(model, noise, (2.0,), None, [plan] * batch, attend, no_noise)  # type: ignore[arg-type]


def test_reused_outputs_are_held_and_the_last_step_is_computed():
    model, spec = Stub(), SamplerSpec(shifted_sigmas(4))
    run_ = begun(model, DenoisePlan(spec, computed=(0, 3)))
    latents, evaluations = run_.run(), run_.evaluations()[0]
    assert [sigma for sigma, _ in model.evaluated] == [spec.sigmas[0], spec.sigmas[3]]
    assert [e.computed for e in evaluations] == [True, False, False, True]
    # in plain Euler a held velocity is one long step
    coarse = begun(Stub(), DenoisePlan(SamplerSpec((spec.sigmas[0], spec.sigmas[3], 0.0)))).run()
    assert torch.allclose(latents, coarse, atol=1e-5)


class Bent(Stub):
    """Velocities that are a line over sigma: extrapolation is exact there."""

    def velocity(self, x: Tensor, sigma: float, inputs: float, context: object, attend: object) -> Any:
        self.evaluated.append((sigma, inputs))
        return torch.full_like(x, 1.0 + 2.0 * sigma), {}


def test_extrapolation_follows_a_line_and_never_feeds_on_itself():
    spec = SamplerSpec(shifted_sigmas(6))
    exact = begun(Bent(), DenoisePlan(spec)).run()
    guessed = begun(Bent(), DenoisePlan(spec, computed=(0, 1, 5), rule="extrapolate")).run()
    held = begun(Bent(), DenoisePlan(spec, computed=(0, 1, 5))).run()
    assert torch.allclose(exact, guessed, atol=1e-5)
    assert float((exact - held).abs().max()) > 0.1


def test_a_look_evaluates_nothing_twice_and_a_refined_plan_goes_on_from_there():
    model, spec = Stub(), SamplerSpec(shifted_sigmas(8))
    first = begun(model, DenoisePlan(spec, look=1), batch=2)
    change = first.change()
    assert change.shape == (2,)
    assert [sigma for sigma, _ in model.evaluated] == list(spec.sigmas[:2])
    assert bool((change < 1e-3).all())  # the stub always predicts the same
    short = SamplerSpec((*spec.sigmas[:2], 0.4, 0.0))
    assert first.looking == [0, 1]
    plan = DenoisePlan(short, "seen before")
    with pytest.raises(ValueError, match="only below the levels"):
        first.refine(dict.fromkeys((0, 1), DenoisePlan(SamplerSpec(shifted_sigmas(2)))))
    first.refine(dict.fromkeys((0, 1), plan))
    assert first.looking == []
    latents = first.run()
    for evaluations in first.evaluations():
        assert [e.sigma for e in evaluations] == list(short.sigmas[:-1])
    assert len(model.evaluated) == 3
    assert torch.allclose(latents[:, 1:], torch.full((2, 3, 3), 2.0), atol=1e-5)


class Parting(Bent):
    """Worlds may go on apart; inputs and context are one number a world, and what was evaluated is remembered."""

    def narrow(self, inputs: Tensor, context: Tensor, rows: list[int]) -> tuple[Tensor, Tensor]:
        return inputs[rows], context[rows]

    def velocity(self, x: Tensor, sigma: Any, inputs: Tensor, context: Tensor, attend: object) -> Any:
        assert len(x) == len(inputs) == len(context)
        levels = sigma.tolist() if isinstance(sigma, Tensor) else [sigma] * len(x)
        self.evaluated.append(list(zip(context.tolist(), (round(s, 4) for s in levels), strict=True)))  # type: ignore[arg-type]
        pull = inputs.view(-1, 1, 1)
        return pull * x.float() * torch.tensor(levels).view(-1, 1, 1), {}

    def clamp(self, x: Tensor, inputs: Tensor) -> Tensor:
        assert len(x) == len(inputs)
        return x


def parting(plans: list[DenoisePlan], of: list[int]) -> tuple[Parting, Denoising]:
    """Worlds `of` four with a number each, in one batch."""
    model, noise = Parting(), normal(4, 2, 3)[of]
    inputs, context = torch.tensor([1.0, -0.5, 0.25, 2.0])[of], torch.arange(4)[of]
    run_ = Denoising(model, noise, (inputs,), context, [plans[i] for i in of], attend, no_noise)  # type: ignore[arg-type]
    return model, run_


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_worlds_of_a_batch_step_together_at_their_own_levels(solver: Any):
    def spec(steps: int) -> SamplerSpec:
        return SamplerSpec(shifted_sigmas(steps, 2.0), solver)

    plans = [
        DenoisePlan(spec(4), "a"), DenoisePlan(spec(2)), DenoisePlan(spec(5), computed=(0, 1, 4)),
        DenoisePlan(spec(4), "b"),
    ]  # fmt: skip
    model, run_ = parting(plans, [0, 1, 2, 3])
    latents, evaluations = run_.run(), run_.evaluations()
    # one call for all that are not done and compute their step
    assert [[world for world, _ in call] for call in model.evaluated] == [
        [0, 1, 2, 3],
        [0, 1, 2, 3],
        [0, 3],
        [0, 3],
        [2],
    ]
    for i in range(4):
        alone = parting(plans, [i])[1]
        assert torch.allclose(latents[i : i + 1], alone.run(), atol=1e-6)
        assert [(e.sigma, e.computed) for e in evaluations[i]] == [
            (e.sigma, e.computed) for e in alone.evaluations()[0]
        ]
        mine = [level for call in model.evaluated for world, level in call if world == i]
        assert mine == [round(e.sigma, 4) for e in evaluations[i] if e.computed]


def test_every_world_is_noised_again_with_noise_of_its_own():
    plans = [DenoisePlan(SamplerSpec(shifted_sigmas(steps), "renoise")) for steps in (3, 2, 3, 2)]

    def latents(of: list[int]) -> Tensor:
        run_ = parting(plans, of)[1]
        run_.fresh = lambda i: normal(4, 2, 3, seed=10 + i)[of]
        return run_.run()

    together = latents([0, 1, 2, 3])
    assert all(torch.allclose(together[i : i + 1], latents([i]), atol=1e-6) for i in range(4))
    assert not torch.allclose(together[0], together[2])


def test_only_those_that_look_are_refined_and_the_others_go_on():
    long, short = SamplerSpec(shifted_sigmas(6)), SamplerSpec(shifted_sigmas(3))
    plans = [DenoisePlan(short), DenoisePlan(long, look=1), DenoisePlan(long, look=1), DenoisePlan(long, look=1)]
    model, run_ = parting(plans, [0, 1, 2, 3])
    assert run_.looking == [1, 2, 3]
    assert run_.change().shape == (3,)
    assert len(model.evaluated) == 2
    cut = DenoisePlan(SamplerSpec((*long.sigmas[:2], 0.3, 0.0)))
    run_.refine({1: plans[1], 2: cut, 3: cut})
    latents = run_.run()
    assert [len(call) for call in model.evaluated] == [4, 4, 4, 1, 1, 1]
    assert [len(e) for e in run_.evaluations()] == [3, 6, 3, 3]
    for i, plan in enumerate((plans[0], DenoisePlan(long), cut, cut)):
        alone = parting([plan] * 4, [i])[1]
        assert torch.allclose(latents[i : i + 1], alone.run(), atol=1e-6)


def test_worlds_part_only_where_the_model_can():
    spec = SamplerSpec(shifted_sigmas(4))
    first = begun(Stub(), DenoisePlan(spec, look=1), batch=2)
    first.change()
    with pytest.raises(ValueError, match="cannot go on with some worlds"):
        first.refine({1: DenoisePlan(spec)})
    plans = [DenoisePlan(spec), DenoisePlan(SamplerSpec(shifted_sigmas(2)))]
    with pytest.raises(ValueError, match="cannot go on with some worlds"):
        Denoising(Stub(), normal(2, 4, 3), (2.0,), None, plans, attend, no_noise)  # type: ignore[arg-type]
    plans = [DenoisePlan(spec), DenoisePlan(replace(spec, storage=torch.bfloat16))]
    with pytest.raises(ValueError, match="one storage precision"):
        parting([*plans, *plans], [0, 1])


@pytest.mark.parametrize("look", [None, 0])
def test_only_a_plan_that_looks_can_be_asked_for_change(look: int | None):
    with pytest.raises(ValueError, match="look"):
        begun(Stub(), DenoisePlan(SamplerSpec(shifted_sigmas(4)), look=look)).change()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_tail_falls_from_where_the_chunk_is(shift: float):
    levels = tail(0.8, 3, shift)
    assert len(levels) == 3
    assert 0.8 > levels[0] > levels[1] > levels[2] == 0
    if shift == 1.0:
        assert levels == pytest.approx((0.8 * 2 / 3, 0.8 / 3, 0.0))
    whole = shifted_sigmas(4, shift)
    assert tail(whole[1], 3, shift) == pytest.approx(whole[2:])
