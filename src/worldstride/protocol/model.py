"""What every model must offer: `WorldModel`, and the `Decoder` of its latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from worldstride.attention import Attend
from worldstride.protocol.values import ChunkShape, Conditions, Context, Inputs, Recalled, SamplerSpec


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
