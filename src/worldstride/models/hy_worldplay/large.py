"""What the 8B models share, autoregressive and bidirectional: one network, one noise schedule, one kind of prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from worldstride.models.hy_worldplay import given
from worldstride.models.hy_worldplay.model import Frames, HYNetwork
from worldstride.models.hy_worldplay.placed import STABLE, Placed
from worldstride.models.video_decoder import VideoDecoder
from worldstride.protocol import Recalled

WINDOW, SINK = 12, 4
"""Latents of the context once the world is longer than all of it: most recent, and first."""
SHIFT = 5.0
"""Of the noise schedule."""


class Large(Placed):
    """An 8B model.

    Its text has no place, so worlds had best begin near the origin, looking ahead, as those it was trained on do.
    """

    shift = SHIFT

    def __init__(
        self, network: HYNetwork, decoder: VideoDecoder, storage: torch.dtype = torch.bfloat16, steps: int = 4,
        guidance: float | None = None,
    ) -> None:  # fmt: skip
        """A model that makes frames of the decoder's size.

        Args:
            network: the transformer.
            decoder: the VAE at a frame size that 16 divides.
            storage: precision of latents between steps (bfloat16 upstream).
            steps: solver steps at full compute.
            guidance: scale of classifier-free guidance of models that are not distilled; prompts then need negative
                states, too.
        """
        grid = (decoder.size[0] // 16, decoder.size[1] // 16)
        super().__init__(network.config, decoder, network.enter.weight, grid, storage, steps, guidance)
        self.network, self.config = network, network.config
        self.latent_shape = (self.config.channels, *grid)

    def compile_passes(self) -> None:
        """Compile what stands around attention in the blocks, for any number of tokens; the decoder is not compiled."""
        self.network.compile_passes()

    def sample_prompt(self, generator: torch.Generator) -> Mapping[str, Tensor]:
        """States of 200 tokens of text, no glyphs, and an image."""
        return given.sampled(self.config, self.guidance is not None, generator)

    def clamp(self, x: Tensor, inputs: Any) -> Tensor:
        """No latents are given; x as it is. The first one is denoised, too, conditioned on the image."""
        return x

    def conditioned(self, image: Tensor | None, numbers: Sequence[int], batch: int) -> Tensor:
        """The first image's latent and mask [B, T, C + 1, h, w] at the world's first latent, zeros elsewhere."""
        return given.planes(image, numbers, batch, self.latent_shape, self.network.enter.weight)

    def remembered(self, recalled: Recalled, image: Tensor | None) -> Frames:
        """Remembered latents as the network takes them, at the level that they are said to have."""
        x, at = recalled.latents.to(self.device), self.places_of(recalled)
        batch, count = x.shape[:2]
        numbers = self.numbered(recalled.led or [0] * count, count)
        levels, labels = self.levels(STABLE / 1000, batch, count), self.sent(numbers).expand(batch, count)
        return Frames(x, self.conditioned(image, numbers, batch), levels, labels, at)
