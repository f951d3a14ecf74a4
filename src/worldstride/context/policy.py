"""Settings of the policies that shorten a chunk's context, and what a session remembers between chunks for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from worldstride.context.dynamics import Dynamics
from worldstride.context.gate import Gate, Score, check_gate
from worldstride.context.similarity import View, ball_view, frustum_view
from worldstride.errors import InputError, integer_from, number_in

ViewName = Literal["frustum", "ball"]


@dataclass(frozen=True)
class TemporalWindow:
    """The recent window follows how much changes between the last two finished chunks.

    Light Interaction (arXiv 2605.31158), eqs. 1-3, with kappa on the model's own scale.
    """

    weight: float = 0.5
    """Weight of the newest change in the moving average, in (0, 1]; 1 forgets all earlier ones."""
    scale: float = 1.0
    """kappa in running medians of the change; above 1 keeps longer windows, below 1 shorter ones."""
    opposite: bool = False
    """Keep more history under more change, instead of less."""
    multiple: int = 1
    """Windows are multiples of so many latents: fewer sizes to compile, and worlds share batches."""

    def __post_init__(self) -> None:
        number_in("acceleration.temporal.weight", self.weight, 0, 1, open_low=True)
        number_in("acceleration.temporal.scale", self.scale, 0, 1e6, open_low=True)
        integer_from("acceleration.temporal.multiple", self.multiple, 1)
        if not isinstance(self.opposite, bool):
            raise InputError(f"acceleration.temporal.opposite must be true or false, got {self.opposite!r}")


@dataclass(frozen=True)
class PoseView:
    """What a camera is taken to see, for every score that comes from cameras alone."""

    view: ViewName = "frustum"
    """A grid through the view's frustum, or random points in a ball, as published for HY-WorldPlay."""
    reach: float = 8.0
    """How far a camera is taken to see, metres; the size of rooms."""

    def __post_init__(self) -> None:
        number_in("acceleration.pose.reach", self.reach, 0, 1e6, open_low=True)
        if self.view not in get_args(ViewName):
            raise InputError(
                f"acceleration.pose.view must be one of {', '.join(get_args(ViewName))}, got {self.view!r}"
            )

    def look(self, intrinsics: Tensor) -> View:
        """The view of a camera with normalised intrinsics [3, 3]; always the same for the same settings."""
        degrees = [float(2 * torch.rad2deg(torch.atan(0.5 / f))) for f in (intrinsics[0, 0], intrinsics[1, 1])]
        if self.view == "frustum":
            return frustum_view(far=self.reach, width=degrees[0], height=degrees[1])
        return ball_view(torch.Generator().manual_seed(0), radius=self.reach, width=degrees[0], height=degrees[1])


@dataclass(frozen=True)
class SpatialMemory:
    """Retrieved memory is attended to on a revisit and dropped or cut while exploring; the sink always stays, unless it
    is a slot of the memory.

    `PUBLISHED` is Light Interaction's gate (arXiv 2605.31158, eq. 4). The defaults ask instead what memory can add to
    the window, which agrees far better with true co-visibility.
    """

    score: Score = "added"
    """What is compared with the threshold: "added", the share of the coming views that old cameras saw and the window
    did not; "similarity", the pose similarity of the best old clip; "known", the share that anything remembered saw."""
    threshold: float = 0.1
    """Least score in [0, 1] that keeps memory; higher drops it more often."""
    margin: float | None = None
    """With "similarity": the best old clip must show at least what the newest chunk shows, less this; None does not
    compare them."""
    hysteresis: float = 0.03
    """By how much the conditions ease while memory is in use, in [0, 1], so that it does not come and go."""
    exploring: int = 0
    """Retrieved latents that stay while exploring; 0 drops them all, as published. Old views steady what is new."""

    def __post_init__(self) -> None:
        integer_from("acceleration.spatial.exploring", self.exploring, 0)
        check_gate("acceleration.spatial", self.score, self.threshold, self.margin, self.hysteresis)

    @property
    def gate(self) -> Gate:
        """The decision that these settings make."""
        return Gate(self.threshold, self.margin, self.hysteresis)


PUBLISHED = SpatialMemory("similarity", 0.7, hysteresis=0.0)
"""Light Interaction's gate as published for HY-WorldPlay (threshold 0.7); it goes with `PoseView("ball")`."""


@dataclass(frozen=True)
class PolicyState:
    """What policies remember from chunk to chunk; plain numbers, saved and forked with the session."""

    dynamics: Dynamics = field(default_factory=Dynamics)
    revisiting: bool = False
    """Whether the gate on memory was open for the last chunk."""
    caching: bool = False
    """Whether the gate on step reuse was open."""
    knowing: bool = False
    """Whether the last chunk was taken for known, and got few evaluations."""
