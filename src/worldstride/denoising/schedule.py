"""Noise schedules of flow matching. x_sigma = (1 - sigma) x0 + sigma noise; velocity = noise - x0."""

from __future__ import annotations

from worldstride.errors import InputError


def shifted_sigmas(steps: int, shift: float = 1.0, first: float = 1.0) -> tuple[float, ...]:
    """steps + 1 noise levels, the last 0: an even grid s from `first`, mapped by shift s / (1 + (shift - 1) s).

    A shift above 1 spends more steps at high noise (Esser et al., 2024, arXiv 2403.03206, eq. 23).
    """
    if steps < 1:
        raise InputError(f"steps must be at least 1, got {steps}")
    if shift <= 0:
        raise InputError(f"shift must be positive, got {shift}")
    grid = [first * (1 - i / steps) for i in range(steps + 1)]
    return tuple(shift * s / (1 + (shift - 1) * s) for s in grid)
