"""Frames to latents and back: patches scaled to [-1, 1]. No compression, so reconstruction has no ceiling."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from worldstride.errors import InputError
from worldstride.models.courtyard.config import CourtyardConfig
from worldstride.models.courtyard.model import patchify, unpatchify


def to_levels(values: Tensor) -> Tensor:
    """Values in [-1, 1] (clamped to it) as the 256 levels of a pixel, uint8."""
    return ((values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_levels(levels: Tensor) -> Tensor:
    """Levels of a pixel as float32 in [-1, 1]."""
    return levels.float() / 127.5 - 1


class PatchCodec:
    """One latent is one frame; the decode state stays empty."""

    def __init__(self, config: CourtyardConfig, device: torch.device) -> None:
        self._config, self._device = config, device

    def encode(self, frames: Tensor) -> Tensor:
        """Frames uint8 [B, F, H, W, 3] -> latents [B, F, tokens, values], float16 in [-1, 1].

        Half precision holds the 256 levels of a pixel apart, so that decoding gives the same frames back.
        """
        size = self._config.size
        if frames.dtype != torch.uint8 or frames.ndim != 5 or tuple(frames.shape[2:]) != (size, size, 3):
            raise InputError(
                f"frames must be uint8 [B, F, {size}, {size}, 3], got {str(frames.dtype).removeprefix('torch.')} "
                f"{list(frames.shape)}"
            )
        image = from_levels(frames.to(self._device).movedim(-1, -3))
        return patchify(image, self._config.patch).half()

    def decode(self, latents: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents [B, T, tokens, values] -> frames uint8 [B, T, H, W, 3]."""
        image = unpatchify(latents.float(), self._config.grid, self._config.patch)
        return to_levels(image).movedim(-3, -1), dict(state)
