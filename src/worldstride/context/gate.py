"""Is the camera coming back? The decision from pose similarity, with memory of the last one.

The published gate (Light Interaction, arXiv 2605.31158, eq. 4) asks whether the best remembered clip is similar enough.
Plain forward motion passes it, since a clip a little way back saw much of what lies ahead. The relative gate asks
besides that an old clip shows at least as much as the newest chunk does, less a margin: while exploring the newest
always shows more.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gate:
    """Thresholds of one decision."""

    threshold: float
    """Least similarity of the best old clip, in [0, 1]."""
    margin: float | None = None
    """How much less than the newest chunk the best old clip may show; None leaves the comparison out (as published)."""
    hysteresis: float = 0.0
    """By how much threshold and margin are eased while the gate is open, so that it does not flicker."""

    def decide(self, old: float | None, newest: float, was_open: bool = False) -> bool:
        """Whether the gate is open; `old` is the best old clip's similarity, None where there is no old clip."""
        if old is None:
            return False
        ease = self.hysteresis if was_open else 0.0
        near = self.margin is None or old >= newest - self.margin - ease
        return near and old >= self.threshold - ease
