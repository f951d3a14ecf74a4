"""What passes between a model and the loop. T counts latents, F frames, B independent worlds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from worldstride.control import Action
from worldstride.errors import InputError

Kind = Literal["recent", "memory", "sink"]
KINDS: tuple[Kind, ...] = ("recent", "memory", "sink")
"""Kinds of context latents; their place in this tuple is their number in tensors."""


@dataclass(frozen=True)
class ChunkShape:
    """What chunk k of a model consists of."""

    new: int
    """Latents that are denoised and kept."""
    frames: int
    """Frames that the new latents decode to."""
    clean: int = 0
    """Latents at the head of the denoised sequence that are given and re-imposed after every step."""
    window: int = 0
    """Most recent latents at full compute."""
    memory: int = 0
    """Retrieved latents at full compute."""
    sink: int = 0
    """First latents of the world that always stay."""
    clip: int = 1
    """Latents of a retrieved clip."""
    last_frames: tuple[int, ...] | None = None
    """For each new latent, the frame of the chunk whose camera it takes, where latents have uneven shares (13 frames
    of 4 latents: 0, 4, 8, 12); None for the last frame of even shares."""

    def __post_init__(self) -> None:
        if self.new < 1 or self.frames < 1:
            raise InputError(f"a chunk needs at least one new latent and frame, got {self.new} and {self.frames}")
        last = self.last_frames
        if last is not None and (len(last) != self.new or not all(0 <= i < self.frames for i in last)):
            raise InputError(f"last_frames must name {self.new} of {self.frames} frames, got {last}")

    @property
    def latent_frames(self) -> tuple[int, ...]:
        """For each new latent, the frame of the chunk whose camera it takes."""
        if self.last_frames is not None:
            return self.last_frames
        return tuple(-(-(i + 1) * self.frames // self.new) - 1 for i in range(self.new))

    @property
    def shown(self) -> tuple[slice, ...]:
        """For each new latent, the frames of the chunk that are its: after the one before's up to its camera's."""
        ends = self.latent_frames
        return tuple(slice(before + 1, end + 1) for before, end in zip((-1, *ends[:-1]), ends, strict=True))


@dataclass(frozen=True)
class SamplerSpec:
    """How noise becomes latents."""

    sigmas: tuple[float, ...]
    """Noise levels from 1 (or just below) down to 0, one more than there are steps."""
    solver: Literal["euler", "unipc", "renoise"] = "euler"
    """Euler; UniPC (order 2, bh2, predicting x0); re-noising (few-step distilled models)."""
    storage: torch.dtype = torch.float32
    """Precision of the latents between steps."""
    guidance: float | None = None
    """Scale of classifier-free guidance; `prepare` then returns two branches, conditional first."""

    def __post_init__(self) -> None:
        if self.solver not in ("euler", "unipc", "renoise"):
            raise InputError(f"unknown solver {self.solver!r}; known: euler, unipc, renoise")
        s = self.sigmas
        if len(s) < 2 or s[-1] != 0 or any(a <= b for a, b in pairwise(s)) or s[0] > 1:
            raise InputError(f"sigmas must fall strictly from at most 1 to 0 with at least one step, got {s}")

    @property
    def steps(self) -> int:
        """Solver steps."""
        return len(self.sigmas) - 1


@dataclass(frozen=True, eq=False)
class Conditions:
    """What the coming chunk is conditioned on."""

    index: int
    """Number of the chunk, from 0."""
    cameras: Tensor
    """Cameras of the chunk's latents [B, T, 4, 4], the re-imposed ones first."""
    frame_cameras: Tensor
    """Cameras of the chunk's frames [B, F, 4, 4]."""
    intrinsics: Tensor
    """Normalised intrinsics [3, 3]."""
    actions: tuple[Action, ...] = ()
    """One action a frame, where the chunk is steered by actions."""
    positions: Tensor = field(default_factory=lambda: torch.zeros(0))
    """Ranks [T] of the chunk's latents; the first new latent has rank 0."""
    clean: Tensor | None = None
    """Latents to re-impose [B, clean, ...], or None."""
    prompt: Mapping[str, Tensor] = field(default_factory=dict)
    """Text states that the caller encoded for this model; empty for models without text."""
    encoded: Any = None
    """What the model made of the prompt (see `EncodesPrompt`), or None."""
    led: tuple[Led, ...] = ()
    """What led to each new latent, in a model's own labels (see `LabelsMotion`); empty for others."""
    past_actions: tuple[Action, ...] = ()
    """One action for each frame of the re-imposed latents; empty where one is not known."""


Inputs = Any
"""What `prepare` made of the conditions, once a chunk; opaque to the loop."""
Led = Action | int | None
"""What led to a latent: an action, a model's own label (see `LabelsMotion`), or nothing that is known."""


@dataclass(frozen=True, eq=False)
class Recalled:
    """Remembered latents of B worlds that a context is made of."""

    latents: Tensor
    """[B, N, ...], in the order of the context plan."""
    cameras: Tensor
    """[B, N, 4, 4]"""
    positions: Tensor
    """Ranks [N]; the chunk's first new latent has rank 0."""
    kinds: Tensor
    """Kinds [N], see `KINDS`."""
    led: Sequence[Led] = ()
    """What led to each latent; may be empty."""
    intrinsics: Tensor | None = None
    """Normalised intrinsics [3, 3]; None takes the model's own."""
    prompt: Any = None
    """What the model made of the prompt (see `EncodesPrompt`), or None."""
    whole: int | None = None
    """Latents of the whole context that these are a part of; None where they are all of it."""
    numbers: tuple[int, ...] = ()
    """Number of each latent in its world, from 0; may be empty."""
    slots: tuple[int, ...] = ()
    """Of a model that `FillsSlots`: the slot that each latent is in; empty means those of `FillsSlots.slots`."""
    inputs: tuple[Inputs, ...] = ()
    """What `prepare` made of the coming chunk; may be empty."""

    def part(self, places: Sequence[int], latents: Tensor) -> Recalled:
        """Those at some places, whose latents are these [B, n, ...]."""
        rows = list(places)
        cameras, positions, kinds = self.cameras[:, rows], self.positions[rows], self.kinds[rows]
        led, numbers, slots = (tuple(of[i] for i in rows) if of else () for of in (self.led, self.numbers, self.slots))
        whole = len(self.positions) if self.whole is None else self.whole
        return replace(
            self, latents=latents, cameras=cameras, positions=positions, kinds=kinds, led=led, whole=whole,
            numbers=numbers, slots=slots,
        )  # fmt: skip


class Context(Protocol):
    """What the model made of the remembered latents: opaque, but it knows its size."""

    @property
    def latents(self) -> int:
        """Remembered latents in it."""
        ...

    @property
    def bytes(self) -> int:
        """Bytes that it holds."""
        ...
