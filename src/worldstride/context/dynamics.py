"""How much is changing, and how long a temporal window that asks for (Light Interaction, arXiv 2605.31158, eqs. 1-3).

The change of a unit is the mean squared difference of the last two finished units (chunks), smoothed by an exponential
moving average. Its scale is the model's own: kappa is a multiple of the running median of the changes seen so far.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Dynamics:
    """What a session remembers of its changes; plain numbers, so that it is saved and forked with the session."""

    average: float | None = None
    """Exponential moving average of the changes; None before the first."""
    changes: tuple[float, ...] = ()
    """The newest changes, oldest first, for the running median."""

    @property
    def median(self) -> float | None:
        """Running median of the changes; None before the first."""
        return statistics.median(self.changes) if self.changes else None

    def observe(self, change: float, weight: float, kept: int = 64) -> Dynamics:
        """The state after one more change: average = weight x change + (1 - weight) x average."""
        before = change if self.average is None else self.average
        return replace(self, average=weight * change + (1 - weight) * before, changes=(*self.changes, change)[-kept:])


def latent_change(newest: Tensor, before: Tensor) -> Tensor:
    """Mean squared difference of two finished units of latents [T, ...]: a scalar on their device."""
    return (newest.float() - before.float()).square().mean()


def window_length(dynamics: Dynamics, longest: int, scale: float, opposite: bool = False, multiple: int = 1) -> int:
    """Latents to keep in the temporal window, in [1, longest]: round(longest x kappa / (D + kappa)).

    D is the smoothed change and kappa = `scale` x running median. Before two changes are known the window is whole.
    With `opposite`, more change keeps more history: round(longest x D / (D + kappa)). Lengths are rounded to a
    `multiple`, at least one of it.
    """
    if dynamics.average is None or len(dynamics.changes) < 2:
        return longest
    kappa = scale * (dynamics.median or 0.0)
    if kappa + dynamics.average <= 0:  # nothing has ever moved
        return min(multiple, longest) if opposite else longest
    share = kappa / (dynamics.average + kappa)
    wanted = longest * (1 - share if opposite else share) / multiple
    return min(longest, multiple * max(1, math.floor(wanted + 0.5)))
