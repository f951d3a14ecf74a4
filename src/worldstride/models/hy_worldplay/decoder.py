"""Frames of HY-WorldPlay: levels of colour to and from what its VAE takes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from worldstride.errors import InputError
from worldstride.models.hy_worldplay.vae import VideoVAE


class VideoDecoder:
    """`Decoder` over a `VideoVAE`, at one frame size."""

    def __init__(self, vae: VideoVAE, height: int, width: int) -> None:
        """Height and width in pixels."""
        self.vae, self.size = vae, (height, width)
        self._weight = next(vae.parameters())

    def encode(self, frames: Tensor) -> Tensor:
        """Frames uint8 [B, 1 + 4 k, H, W, 3] -> latents [B, 1 + k, C, h, w]: the distribution's mean, scaled."""
        if frames.dtype != torch.uint8 or frames.ndim != 5 or tuple(frames.shape[2:]) != (*self.size, 3):
            size = f"{self.size[0]}, {self.size[1]}, 3"
            raise InputError(f"frames must be uint8 [B, F, {size}], got {frames.dtype} {list(frames.shape)}")
        colours = frames.to(self._weight.device).movedim(-1, 1).to(self._weight.dtype) / 127.5 - 1
        return self.vae.encode(colours).transpose(1, 2).float() * self.vae.config.scaling_factor

    def decode(self, latents: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Decoder.decode`; latents [B, T, C, h, w]."""
        z = latents.to(self._weight.dtype).transpose(1, 2) / self.vae.config.scaling_factor
        colours, after = self.vae.decode(z, state)
        levels = (colours.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        return levels.movedim(1, -1), after
