"""Solvers of the flow-matching equation dx/dsigma = velocity, one step at a time.

A solver object lives for one chunk; it may remember earlier evaluations of that chunk (UniPC does).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from worldstride.protocol import SamplerSpec
from worldstride.rows import rows_of

Noise = Callable[[int], Tensor]
"""Fresh noise for solver step i, of the latents' shape."""


class Solver(Protocol):
    """One step: latents at sigma_i and the velocity there -> latents at sigma_(i+1)."""

    def step(self, i: int, x: Tensor, velocity: Tensor, noise: Noise) -> Tensor:
        """x and velocity [B, T, ...], float32 -> x at the next noise level."""
        ...

    def refined(self, sigmas: tuple[float, ...], rows: Sequence[int] | None = None) -> Solver:
        """The solver gone on with other levels below the last one, for some worlds of the batch (None: all)."""
        ...


class Euler:
    """x + (sigma' - sigma) velocity."""

    def __init__(self, sigmas: tuple[float, ...]) -> None:
        self._sigmas = sigmas

    def step(self, i: int, x: Tensor, velocity: Tensor, noise: Noise) -> Tensor:
        """See `Solver.step`."""
        return x + (self._sigmas[i + 1] - self._sigmas[i]) * velocity

    def refined(self, sigmas: tuple[float, ...], rows: Sequence[int] | None = None) -> Euler:
        """See `Solver.refined`."""
        return Euler(sigmas)


class Renoise:
    """Jump to the predicted clean latents and noise them again for the next level (distilled few-step models)."""

    def __init__(self, sigmas: tuple[float, ...]) -> None:
        self._sigmas = sigmas

    def step(self, i: int, x: Tensor, velocity: Tensor, noise: Noise) -> Tensor:
        """See `Solver.step`; fresh noise is asked for on every step but the last."""
        clean = x - self._sigmas[i] * velocity
        after = self._sigmas[i + 1]
        return clean if after == 0 else (1 - after) * clean + after * noise(i)

    def refined(self, sigmas: tuple[float, ...], rows: Sequence[int] | None = None) -> Renoise:
        """See `Solver.refined`."""
        return Renoise(sigmas)


class UniPC:
    """Unified predictor-corrector, order 2, B(h) = exp(h) - 1, predicting x0 (Zhao et al., 2023, arXiv 2302.04867).

    In half log signal-to-noise lambda = log((1 - sigma) / sigma) the exact solution over a step h is
    x' = (sigma'/sigma) x - alpha' expm1(-h) x0 + ... ; differences of earlier x0 predictions raise the order. The
    step before is corrected when its successor's x0 is known; the last step falls back to order 1.
    """

    def __init__(self, sigmas: tuple[float, ...]) -> None:
        self._sigmas = sigmas
        self._clean: list[Tensor] = []  # x0 predictions of the steps so far, at most the last two
        self._start: Tensor | None = None  # x before the last predictor, where the corrector starts

    def step(self, i: int, x: Tensor, velocity: Tensor, noise: Noise) -> Tensor:
        """See `Solver.step`."""
        clean = x - self._sigmas[i] * velocity
        if i > 0 and self._start is not None:
            x = self._correct(i, self._start, clean)
        self._clean = [*self._clean[-1:], clean]
        self._start = x
        return self._predict(i, x)

    def refined(self, sigmas: tuple[float, ...], rows: Sequence[int] | None = None) -> UniPC:
        """See `Solver.refined`."""
        other = UniPC(sigmas)
        other._clean, other._start = list(self._clean), self._start
        if rows is not None:
            other._clean = [rows_of(t, rows) for t in self._clean]
            other._start = None if self._start is None else rows_of(self._start, rows)
        return other

    def _lambda(self, i: int) -> float:
        sigma = self._sigmas[i]
        return math.inf if sigma == 0 else -math.inf if sigma == 1 else math.log((1 - sigma) / sigma)

    def _base(self, i: int, x: Tensor, clean: Tensor) -> tuple[Tensor, float, float]:
        """First-order step from level i, with alpha' expm1(-h) and h."""
        h = self._lambda(i + 1) - self._lambda(i)
        grown = (1 - self._sigmas[i + 1]) * math.expm1(-h)
        return self._sigmas[i + 1] / self._sigmas[i] * x - grown * clean, grown, h

    def _predict(self, i: int, x: Tensor) -> Tensor:
        base, grown, h = self._base(i, x, self._clean[-1])
        last = self._sigmas[i + 1] == 0
        if last or len(self._clean) < 2:
            return base
        r = (self._lambda(i - 1) - self._lambda(i)) / h
        if not math.isfinite(r) or r == 0:
            return base
        slope = (self._clean[-2] - self._clean[-1]) / r
        return base - grown * 0.5 * slope  # order 2 predictor: rho = 1/2

    def _correct(self, i: int, start: Tensor, clean: Tensor) -> Tensor:
        before = self._clean[-1]
        base, grown, h = self._base(i - 1, start, before)
        new = clean - before  # D1 at the step's own end, r = 1
        if len(self._clean) < 2 or not math.isfinite(h):
            return base - grown * 0.5 * new  # order 1 corrector: rho = 1/2
        r = (self._lambda(i - 2) - self._lambda(i - 1)) / h
        if not math.isfinite(r) or r == 0:
            return base - grown * 0.5 * new
        minus = -h
        phi1 = math.expm1(minus) / minus - 1
        b1 = phi1 / math.expm1(minus)
        phi2 = phi1 / minus - 0.5
        b2 = 2 * phi2 / math.expm1(minus)
        # solve [[1, 1], [r, 1]] rho = [b1, b2]
        rho = torch.linalg.solve(
            torch.tensor([[1.0, 1.0], [r, 1.0]], dtype=torch.float64), torch.tensor([b1, b2], dtype=torch.float64)
        ).tolist()
        slope = (self._clean[-2] - before) / r
        return base - grown * (rho[0] * slope + rho[1] * new)


def make_solver(spec: SamplerSpec) -> Solver:
    """The solver that a sampler specification names."""
    return {"euler": Euler, "unipc": UniPC, "renoise": Renoise}[spec.solver](spec.sigmas)
