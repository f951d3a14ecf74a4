"""What a replay of a golden file compares, and what replays files of one format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

TOLERANCE = 1e-4
"""Largest error in float32, as a share of the expected tensor's largest value."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """One tensor as it came out and as it was recorded."""

    tensor: str
    got: Tensor
    expected: Tensor
    tolerance: float = TOLERANCE

    @property
    def absolute(self) -> float:
        """Largest absolute error; infinite where shapes differ or a value is not finite."""
        if self.got.shape != self.expected.shape:
            return float("inf")
        if not self.got.numel():
            return 0.0
        error = (self.got.double() - self.expected.double()).abs().max()
        return float(error) if bool(error.isfinite()) else float("inf")

    @property
    def relative(self) -> float:
        """The same as a share of the expected tensor's largest value."""
        largest = float(self.expected.abs().max()) if self.expected.numel() else 0.0
        return self.absolute / max(largest, 1e-12)

    @property
    def fine(self) -> bool:
        """Whether the error is within tolerance."""
        return self.relative <= self.tolerance


class Verifier(Protocol):
    """Replays the cases of one format."""

    def replay(self, case: Path) -> Iterator[Comparison]:
        """Compute a recorded case anew; `InputError` where the file is none of this format."""
        ...

    def record(self, case: Path) -> None:
        """Write a case, atomically; `InputError` where cases of this format come from elsewhere."""
        ...
