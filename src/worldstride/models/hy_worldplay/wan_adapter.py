"""HY-WorldPlay's WAN-5B variant behind the model protocol (specification, sections 1, 2.6, 3 and 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from worldstride.attention import Attend, Partial
from worldstride.attention.streams import KeysValues
from worldstride.errors import InputError
from worldstride.models.hy_worldplay import cost, given, retrieval, two_streams
from worldstride.models.hy_worldplay.adapter import HYContext, ReusesOuter
from worldstride.models.hy_worldplay.placed import FIRST, STABLE, Placed
from worldstride.models.hy_worldplay.text import WORDS
from worldstride.models.hy_worldplay.wan import PATCH, WanFrames, WanNetwork
from worldstride.models.video_decoder import VideoDecoder
from worldstride.models.wan.layers import seen_rows
from worldstride.protocol import ChunkShape, Conditions, Context, Recalled

WINDOW, MEMORY = 12, 4
"""Latents of the context once the world is longer than all of it: most recent, retrieved. None always stays."""
ROWS = 512
"""Rows of text that the model was trained with."""
_PIXELS = 16
"""Pixels of a latent pixel's height and width."""


@dataclass(frozen=True, eq=False)
class WanPrompt:
    """What a prompt becomes once for all chunks."""

    text: tuple[KeysValues, ...]
    """Keys and values of its rows, a pair a block."""
    image: Tensor | None
    """Latent of the first image [1, C, h, w]; None where none was given."""


@dataclass(frozen=True, eq=False)
class WanInputs:
    """What stays the same from step to step."""

    labels: Tensor
    matrices: tuple[Tensor, Tensor]
    """Projections [B, T, 4, 4] and their inverses."""
    text: tuple[KeysValues, ...]
    given: Tensor | None
    """The chunk's first latent [1, C, h, w], where the world begins with an image; None where all are new."""


class WanWorldPlay(ReusesOuter, Placed):
    """`WorldModel` of the distilled WAN-5B variant.

    A world's first latent is the image's: the first chunk's is clamped to it, and said to be as clean as the context.
    """

    name = "hy_worldplay_wan"
    retrieval = retrieval.WAN
    shift = 8.0

    def __init__(
        self, network: WanNetwork, decoder: VideoDecoder, storage: torch.dtype = torch.bfloat16, steps: int = 4
    ) -> None:
        """A model that makes frames of the decoder's size.

        Args:
            network: the transformer.
            decoder: the VAE at a frame size that 32 divides; `InputError` on another one.
            storage: precision of latents between steps.
            steps: solver steps at full compute.
        """
        token = PATCH * _PIXELS
        if any(n % token for n in decoder.size):
            size = " x ".join(map(str, decoder.size))
            raise InputError(f"frames must be multiples of {token} pixels high and wide, got {size}")
        self.token_grid = (decoder.size[0] // token, decoder.size[1] // token)
        super().__init__(network.config, decoder, network.enter.weight, self.token_grid, storage, steps)
        self.network, self.config = network, network.config
        self.latent_shape = (self.config.channels, decoder.size[0] // _PIXELS, decoder.size[1] // _PIXELS)

    def compile_passes(self) -> None:
        """Compile what stands around attention in the blocks, for any number of tokens; the decoder is not compiled."""
        self.network.compile_passes()

    def chunk(self, k: int) -> ChunkShape:
        """4 latents: 13 frames in the first chunk, 16 in others. The context is the whole past up to 16 latents, then
        one clip that is retrieved and the last 12 latents."""
        frames, last = (13, (0, 4, 8, 12)) if k == 0 else (16, None)
        return ChunkShape(self.new, frames, window=WINDOW, memory=MEMORY, clip=self.new, last_frames=last)

    def encode_prompt(self, prompt: Mapping[str, Tensor], attend: Attend) -> WanPrompt:
        """Text keys and values from umT5's states "text" [1, L, 4096], L at most 512.

        "text_mask" [1, L] may leave rows out. What is left is filled up with rows of zeros to 512, all of which are
        attended to, as the model was trained and diffusers' pipelines of Wan do. Raises `InputError` on what is missing
        or does not fit.
        """
        given.check_names(prompt, WORDS)
        if "text" not in prompt:
            raise InputError(f"HY-WorldPlay WAN needs encoder states named 'text', got {sorted(prompt) or 'none'}")
        text = prompt["text"]
        if text.ndim != 3 or len(text) != 1 or text.shape[1] > ROWS or text.shape[2] != self.config.text:
            raise InputError(
                f"text states must be [1, L, {self.config.text}], L at most {ROWS}, got {list(text.shape)}"
            )
        text = seen_rows(text, prompt.get("text_mask"), "text_mask")
        whole = torch.zeros(1, ROWS, self.config.text, dtype=self.dtype, device=self.device)
        whole[:, : text.shape[1]] = text
        return WanPrompt(tuple(self.network.text(whole)), prompt.get("image"))

    def sample_prompt(self, generator: torch.Generator) -> Mapping[str, Tensor]:
        """States of 200 tokens of text."""
        return {"text": torch.randn(1, 200, self.config.text, generator=generator)}

    def prepare(self, conditions: Conditions) -> tuple[WanInputs, ...]:
        """Places and labels of the coming latents, and the image's latent where it is the first of them."""
        c, prompt = conditions, self.prompt_of(conditions.encoded, WanPrompt)
        numbers = self.numbered(c.led, c.cameras.shape[1])
        image = prompt.image if numbers[0] == FIRST else None
        return (WanInputs(self.sent(numbers), self.matrices(c.cameras, c.intrinsics), prompt.text, image),)

    def encode_context(self, recalled: Recalled, previous: Context | None, attend: Attend) -> HYContext:
        """One pass over all remembered latents; nothing of `previous` is kept."""
        if not recalled.latents.shape[1]:
            return HYContext((), None)
        frames, text = self._frames(recalled)
        return HYContext(two_streams.whole(self.network.context(frames, text, attend)), frames.at)

    def encode_latents(self, recalled: Recalled, past: Context | None, attend: Attend) -> Tensor:
        """Keys and values [B, N, depth, 2, heads, n, head_dim] of latents that see each other and `past`."""
        frames, text = self._frames(recalled)
        seen = HYContext((), None) if past is None else HYContext.own(past)
        pairs = self.network.context(frames, text, attend, seen.keys_values, seen.where)
        return two_streams.packed(pairs, self.config.depth, recalled.latents.shape[1])

    def join_context(self, kept: Sequence[Tensor], recalled: Recalled) -> HYContext:
        """Context of latents whose keys and values [B, depth, 2, heads, n, head_dim] were kept, at new places."""
        return HYContext(two_streams.unpacked(kept), self.places_of(recalled)) if kept else HYContext((), None)

    def velocity(
        self, x: Tensor, sigma: float | Tensor, inputs: WanInputs, context: Context, attend: Attend
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """The network's own prediction; `sigma` is a number or [B]. A given latent goes nowhere."""
        held = HYContext.own(context)
        at, levels = self.places_after(held.latents, inputs.matrices), self.levels(sigma, *x.shape[:2])
        if inputs.given is not None:
            levels = torch.cat([torch.full_like(levels[:, :1], STABLE), levels[:, 1:]], 1)
        frames = WanFrames(x, levels, inputs.labels.expand(x.shape[:2]), at)
        outer = list[Partial]() if held.apart else None
        made = self.network.velocity(
            frames, inputs.text, held.keys_values, held.where, attend, outer, held.reused
        ).float()
        if inputs.given is not None:
            made = torch.cat([torch.zeros_like(made[:, :1]), made[:, 1:]], 1)
        return made, {} if outer is None else {"outer": outer}

    def context_flops(self, encoded: int, seen: float) -> float:
        """See `Costed.context_flops`."""
        return cost.wan_context_flops(self.config, self._tokens, ROWS, encoded, seen)

    def evaluation_flops(self, latents: int, context: float) -> float:
        """See `Costed.evaluation_flops`."""
        return cost.wan_evaluation_flops(self.config, self._tokens, ROWS, latents, context)

    def clamp(self, x: Tensor, inputs: WanInputs) -> Tensor:
        """x with the image's latent in the place of the world's first."""
        if inputs.given is None:
            return x
        return torch.cat([inputs.given.to(x)[:, None].expand(len(x), -1, -1, -1, -1), x[:, 1:]], 1)

    def _frames(self, recalled: Recalled) -> tuple[WanFrames, tuple[KeysValues, ...]]:
        """Remembered latents as the network takes them, and the text that they see."""
        x, prompt = recalled.latents.to(self.device), self.prompt_of(recalled.prompt, WanPrompt)
        at, count = self.places_of(recalled), x.shape[1]
        labels = self.sent(self.numbered(recalled.led or [0] * count, count)).expand(x.shape[:2])
        return WanFrames(x, self.levels(STABLE / 1000, len(x), count), labels, at), prompt.text
