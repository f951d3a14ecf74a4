"""What a world model must offer, and the values that pass between it and the loop.

Two structures fit: models that write keys and values of remembered latents once a chunk and denoise against them,
and models that join memory, past and new latents in one bidirectional sequence in every evaluation (their context
is the plain latents). A model is stateless: whatever a chunk needs arrives as arguments, whatever it makes is
returned. Shapes carry a batch dimension B of independent worlds; a session has B = 1. T counts latents, F frames.
`worldstride.testing.check_model` checks an implementation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from worldstride.attention import Attend
from worldstride.control import Action, ControlSettings
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


@runtime_checkable
class Compilable(Protocol):
    """A model that `torch.compile` makes faster. No model needs to be one."""

    def compile_passes(self) -> None:
        """Have what runs often compiled when it first runs; results may then differ in their last bits."""
        ...


@runtime_checkable
class Quantises(Protocol):
    """A model whose weights can be held in 8 bits. No model needs to be one."""

    def quantised(self, scheme: Literal["float8", "int8"]) -> WorldModel:
        """Another model with weights in 8 bits, see `models.quantised`; what is not, it shares with this one."""
        ...


@runtime_checkable
class KeepsLatents(Protocol):
    """A model whose remembered latents keep their keys and values from chunk to chunk. No model needs to be one."""

    def encode_latents(
        self,
        recalled: Recalled,
        past: Context | None,
        attend: Attend,
    ) -> Tensor:
        """What is kept of each of the latents: a tensor [B, N, ...].

        They see each other and `past`. What is kept holds neither rank nor kind.
        """
        ...

    def join_context(self, kept: Sequence[Tensor], recalled: Recalled) -> Context:
        """Context of N latents from what was kept of each [B, ...]; `recalled` tells all of them but the latents."""
        ...


@runtime_checkable
class ReusesAttention(Protocol):
    """A model whose attention to the context can be kept from one evaluation to the next. No model needs to be one."""

    def apart(self, context: Context) -> Context:
        """The same context; evaluations then keep their attention to it apart, and capture it."""
        ...

    def reuse(self, context: Context, captured: Mapping[str, Any]) -> Context:
        """A context whose attention is what an evaluation captured."""
        ...


@runtime_checkable
class FreezesContext(Protocol):
    """A model of one bidirectional sequence whose context can be frozen within a chunk. No model needs to be one.

    An evaluation leaves behind what the new latents see of all others; later ones compute the new latents alone.
    """

    def capturing(self, context: Context) -> Context:
        """The same context; evaluations then capture what they make of it."""
        ...

    def frozen(self, context: Context, captured: Mapping[str, Any]) -> Context:
        """The context as an evaluation captured it; evaluations then compute the new latents alone."""
        ...

    def joint_flops(self, latents: int, seen: float, density: float = 1.0) -> float:
        """Floating-point operations of one evaluation of latents that see `seen` latents each, of whose tokens they
        attend to a share. A guided model's negative branch has no memory."""
        ...


@runtime_checkable
class Narrows(Protocol):
    """A model that can go on with some worlds of a batch, each at its own noise level. No model needs to be one."""

    def velocity(
        self, x: Tensor, sigma: float | Tensor, inputs: Inputs, context: Context, attend: Attend
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """See `WorldModel.velocity`; noise levels may be a tensor [B], one a world."""
        ...

    def narrow(self, inputs: Inputs, context: Context, rows: Sequence[int]) -> tuple[Inputs, Context]:
        """Inputs and context of some worlds of a batch."""
        ...


@runtime_checkable
class AttendsSparsely(Protocol):
    """A model whose context is attended to in blocks, if a `SparseAttend` is passed in. No model needs to be one.

    Its tokens lie on a grid, and those of the context come in the order of the context plan.
    """

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of a latent's tokens."""
        ...


@runtime_checkable
class LabelsMotion(Protocol):
    """A model that is told in numbers of its own how each latent was reached. No model needs to be one."""

    def label(self, cameras: Tensor, before: Tensor | None) -> tuple[int, ...]:
        """Labels of latents with cameras [T, 4, 4] that follow one at `before` [4, 4], or begin the world."""
        ...


@runtime_checkable
class Recalls(Protocol):
    """A model with a rule of its own for what is brought back. No model needs to be one."""

    def sample_points(self, generator: torch.Generator) -> Tensor:
        """Points [P, 3] that overlaps are measured with, drawn once a world."""
        ...

    def recall(
        self, cameras: Tensor, coming: Tensor, points: Tensor, candidates: Sequence[int], count: int
    ) -> tuple[list[int], list[float]]:
        """At most `count` places among `candidates` of cameras [N, 4, 4], in order of time, and how much of the coming
        latents' views, cameras [T, 4, 4], each shows, in [0, 1]."""
        ...

    def shown(self, cameras: Tensor, coming: Tensor, points: Tensor) -> list[float]:
        """How much of the coming views each of cameras [N, 4, 4] shows, in [0, 1]."""
        ...


@runtime_checkable
class FillsSlots(Protocol):
    """A model that brings back single frames, one for each of several coming views. No model needs to be one.

    It makes all of a batch's worlds with the same memory.
    """

    def fill(self, frames: Tensor, places: Sequence[int], coming: Tensor, count: int) -> tuple[list[int], list[float]]:
        """Places of the latents in `count` slots, which may repeat, and how much of its view each slot shows.

        `frames` [F, 4, 4] are cameras of all frames that may be brought back, in order of time, `places` the places of
        the latents that show them, `coming` [T, 4, 4] the new latents' cameras.
        """
        ...

    def slots(self, count: int) -> list[int]:
        """Numbers of the slots that are filled where there may be `count`."""
        ...

    def shown(self, cameras: Tensor, coming: Tensor, points: Tensor) -> list[float]:
        """See `Recalls.shown`; the points are the session's, which this model has no use for."""
        ...


class Navigator(Protocol):
    """Moves the camera."""

    @property
    def settings(self) -> ControlSettings:
        """How it reads actions; a save keeps them."""
        ...

    def cameras(
        self, start: Tensor, actions: Sequence[Action], first_frame: int, before: Action | None = None
    ) -> Tensor:
        """Cameras [F, 4, 4] of the frames that follow `start` [4, 4], one action a frame.

        `before` is the action of the frame at `start`, where it is known.
        """
        ...


@runtime_checkable
class Navigates(Protocol):
    """A model whose cameras follow actions in a way of its own. No model needs to be one."""

    def navigator(self, settings: ControlSettings) -> Navigator:
        """What moves the camera."""
        ...


@runtime_checkable
class EncodesPrompt(Protocol):
    """A model that makes something of its prompt once for all chunks. No model needs to be one."""

    def encode_prompt(self, prompt: Mapping[str, Tensor], attend: Attend) -> Any:
        """What `Conditions.encoded` and `Recalled.prompt` hold; `InputError` on states that do not fit."""
        ...

    def sample_prompt(self, generator: torch.Generator) -> Mapping[str, Tensor]:
        """States of a made-up prompt of usual length, which measure speed and say nothing."""
        ...


@runtime_checkable
class BeginsWithImage(Protocol):
    """A model whose first chunk shows a given image again, with nothing remembered. No model needs to be one."""

    def image_prompt(self, frames: Tensor) -> Mapping[str, Tensor]:
        """What the prompt holds of frames uint8 [1, F, H, W, 3]; `InputError` where they cannot be begun with."""
        ...


@runtime_checkable
class Costed(Protocol):
    """A model that knows what its passes cost. No model needs to be one."""

    def context_flops(self, encoded: int, seen: float) -> float:
        """Floating-point operations of encoding latents that attend to `seen` latents each, themselves among them; on
        average, where attention is sparse."""
        ...

    def evaluation_flops(self, latents: int, context: float) -> float:
        """Floating-point operations of one evaluation of latents that attend to each other and to `context` ones."""
        ...


@runtime_checkable
class Decoder(Protocol):
    """Latents to frames and back, streaming: the caller carries the state."""

    def encode(self, frames: Tensor) -> Tensor:
        """Frames uint8 [B, F, H, W, 3] -> latents [B, T, ...]; raises `InputError` on another frame size."""
        ...

    def decode(self, latents: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """New latents [B, T, ...] and the state after the ones before -> frames uint8 [B, F, H, W, 3], new state.

        The state of a fresh world is empty. Decoding chunk by chunk equals decoding at once.
        """
        ...


@runtime_checkable
class WorldModel(Protocol):
    """A world model as the loop sees it."""

    @property
    def name(self) -> str:
        """Name of the model."""
        ...

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent, without batch and time."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        ...

    @property
    def intrinsics(self) -> Tensor:
        """Normalised intrinsics [3, 3] that the model was made for."""
        ...

    @property
    def decoder(self) -> Decoder:
        """The codec of its latents."""
        ...

    def chunk(self, k: int) -> ChunkShape:
        """What chunk k (from 0) consists of."""
        ...

    def sampler(self, steps: int | None = None, shift: float | None = None) -> SamplerSpec:
        """The sampler at full compute, or with other steps or shift; `InputError` where the model allows neither."""
        ...

    def prepare(self, conditions: Conditions) -> tuple[Inputs, ...]:
        """Everything of a chunk that does not change from step to step; one value for each guidance branch."""
        ...

    def encode_context(
        self,
        recalled: Recalled,
        previous: Context | None,
        attend: Attend,
    ) -> Context:
        """Context of remembered latents.

        `previous` is the last chunk's context, from which a model may keep what is still valid; None makes it all anew.
        """
        ...

    def velocity(
        self, x: Tensor, sigma: float, inputs: Inputs, context: Context, attend: Attend
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """Velocity (noise - clean) [B, T, ...] at x, and what was captured on the way (may be empty)."""
        ...

    def clamp(self, x: Tensor, inputs: Inputs) -> Tensor:
        """x with the given latents re-imposed; called on the first noise and after every step."""
        ...

    def commit(self, clean: Tensor, inputs: Inputs) -> Tensor:
        """The new latents [B, new, ...] to remember, from the finished sequence [B, T, ...]."""
        ...
