"""Frames of models with a video VAE: levels of colour to and from what it takes, and latents as networks see them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from worldstride.errors import InputError

_AT_ONCE = 4
"""Latents decoded at once: more would need more memory at a time, and give the same frames."""


class VideoCodec(Protocol):
    """A VAE of clips that decodes in a stream."""

    @property
    def statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and deviation of each channel of its latents, which a world model sees without the one and in units of
        the other."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its weights, all on one device and of one precision."""
        ...

    def encode(self, frames: Tensor) -> Tensor:
        """Frames [B, 3, 1 + 4 k, H, W] in [-1, 1] -> means of latents [B, C, 1 + k, h, w]"""
        ...

    def decode(self, z: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents z [B, C, T, h, w] and the state after the ones before -> frames [B, 3, F, H, W], new state."""
        ...


class VideoDecoder:
    """`Decoder` over a `VideoCodec`, at one frame size."""

    def __init__(self, vae: VideoCodec, height: int, width: int) -> None:
        """Height and width in pixels."""
        self.vae, self.size = vae, (height, width)
        self._weight = next(iter(vae.parameters()))
        tables = (torch.tensor(of, device=self._weight.device)[:, None, None] for of in vae.statistics)
        self._mean, self._deviation = tables  # [C, 1, 1]

    def encode(self, frames: Tensor) -> Tensor:
        """Frames uint8 [B, 1 + 4 k, H, W, 3] -> latents [B, 1 + k, C, h, w]: the distribution's mean, normalised."""
        if frames.dtype != torch.uint8 or frames.ndim != 5 or tuple(frames.shape[2:]) != (*self.size, 3):
            size = f"{self.size[0]}, {self.size[1]}, 3"
            raise InputError(f"frames must be uint8 [B, F, {size}], got {frames.dtype} {list(frames.shape)}")
        colours = frames.to(self._weight.device).movedim(-1, 1).to(self._weight.dtype) / 127.5 - 1
        return (self.vae.encode(colours).transpose(1, 2).float() - self._mean) / self._deviation

    def decode(self, latents: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Decoder.decode`; latents [B, T, C, h, w]."""
        levels, after = list[Tensor](), state
        for some in latents.split(_AT_ONCE, 1):
            z = (some.float() * self._deviation + self._mean).to(self._weight.dtype).transpose(1, 2)
            colours, after = self.vae.decode(z, after)
            levels.append((colours.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).movedim(1, -1))
        return torch.cat(levels, 1), dict(after)
