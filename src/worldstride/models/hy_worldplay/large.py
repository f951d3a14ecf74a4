"""What the 8B models share, autoregressive and bidirectional: one network, one noise schedule, one kind of prompt."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from worldstride.denoising.schedule import shifted_sigmas
from worldstride.errors import integer_from
from worldstride.models.hy_worldplay import given
from worldstride.models.hy_worldplay.decoder import VideoDecoder
from worldstride.models.hy_worldplay.model import HYNetwork
from worldstride.models.hy_worldplay.placed import Placed
from worldstride.protocol import SamplerSpec

WINDOW, SINK = 12, 4
"""Latents of the context once the world is longer than all of it: most recent, and first."""
SHIFT = 5.0
"""Of the noise schedule."""


class Large(Placed):
    """An 8B model.

    Its text has no place, so worlds had best begin near the origin, looking ahead, as those it was trained on do.
    """

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
        super().__init__(network.config, decoder, network.enter.weight, grid)
        self.network, self.config = network, network.config
        self.storage, self.steps, self.guidance = storage, steps, guidance
        self.latent_shape = (self.config.channels, *grid)

    def compile_passes(self) -> None:
        """Compile what stands around attention in the blocks, for any number of tokens; the decoder is not compiled."""
        self.network.compile_passes()

    def sampler(self, steps: int | None = None, shift: float | None = None) -> SamplerSpec:
        """Euler on a schedule shifted by 5."""
        steps = self.steps if steps is None else steps
        integer_from("steps", steps, 1)
        sigmas = shifted_sigmas(steps, SHIFT if shift is None else shift)
        return SamplerSpec(sigmas, storage=self.storage, guidance=self.guidance)

    def sample_prompt(self, generator: torch.Generator) -> Mapping[str, Tensor]:
        """States of 200 tokens of text, no glyphs, and an image."""
        return given.sampled(self.config, self.guidance is not None, generator)
