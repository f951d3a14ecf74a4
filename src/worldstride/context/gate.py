"""Is the camera coming back? The decision from one score, with memory of the last one.

The published gate (Light Interaction, arXiv 2605.31158, eq. 4) asks whether the best remembered clip is similar enough.
Plain forward motion passes it, since a clip a little way back saw much of what lies ahead. The relative gate asks
besides that an old clip shows at least as much as the newest chunk does, less a margin: while exploring the newest
always shows more. Best agrees with true co-visibility a gate on another score: what old cameras saw of the coming view
and the window did not (`similarity.added_share`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from worldstride.errors import InputError, number_in

Score = Literal["added", "known", "similarity"]


@dataclass(frozen=True)
class PoseScores:
    """What cameras tell of a chunk before it is made; shares in [0, 1]."""

    old: float | None = None
    """Pose similarity of the best old clip (between sink and window); None where nothing is old."""
    newest: float = 0.0
    """Pose similarity of the newest clip."""
    added: float | None = None
    """Share of the coming views that old cameras saw and the window, or latents that the chunk goes on from, did not;
    None where nothing is old."""
    known: float = 0.0
    """Share of the coming views that any remembered camera saw."""

    def of(self, score: Score) -> float | None:
        """The score of this name; None where it is not known."""
        return {"added": self.added, "known": self.known, "similarity": self.old}[score]


@dataclass(frozen=True)
class Gate:
    """Thresholds of one decision."""

    threshold: float
    """Least score, in [0, 1]."""
    margin: float | None = None
    """How much less than the newest chunk's the score may be; None leaves the comparison out."""
    hysteresis: float = 0.0
    """By how much threshold and margin are eased while the gate is open, so that it does not flicker."""

    def decide(self, score: float | None, newest: float, was_open: bool = False) -> bool:
        """Whether the gate is open: for a score (None where nothing is old) and the newest chunk's similarity."""
        if score is None:
            return False
        ease = self.hysteresis if was_open else 0.0
        near = self.margin is None or score >= newest - self.margin - ease
        return near and score >= self.threshold - ease


def check_gate(where: str, score: object, threshold: object, margin: object, hysteresis: object) -> None:
    """Refuse settings of a gate that make no sense; `where` names them."""
    number_in(f"{where}.threshold", threshold, 0, 1)
    number_in(f"{where}.hysteresis", hysteresis, 0, 1)
    if score not in get_args(Score):
        raise InputError(f"{where}.score must be one of {', '.join(get_args(Score))}, got {score!r}")
    if margin is not None:
        number_in(f"{where}.margin", margin, -1, 1)
        if score != "similarity":
            raise InputError(f"{where}.margin goes with score 'similarity', not with {score!r}")
