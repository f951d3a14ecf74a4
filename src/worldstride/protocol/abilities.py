"""What a model may offer beside `WorldModel`, each a small protocol of its own: no model needs any of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from worldstride.attention import Attend
from worldstride.control import Action, ControlSettings
from worldstride.protocol.model import WorldModel
from worldstride.protocol.values import Context, Inputs, Recalled


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
