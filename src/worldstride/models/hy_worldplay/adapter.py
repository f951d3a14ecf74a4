"""HY-WorldPlay's autoregressive model behind the model protocol (specification, sections 2 to 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from worldstride.attention import Attend, Partial
from worldstride.attention.streams import KeysValues, Pieces, Places
from worldstride.models.hy_worldplay import cost, given, two_streams
from worldstride.models.hy_worldplay.large import SINK, WINDOW, Large
from worldstride.models.hy_worldplay.model import Frames
from worldstride.models.hy_worldplay.text import NEGATIVE
from worldstride.protocol import ChunkShape, Conditions, Context, Recalled

MEMORY = 4
"""Latents of the clip that is brought back, once the world is longer than the context."""


@dataclass(frozen=True, eq=False)
class HYPrompt:
    """What a prompt becomes once for all chunks."""

    text: tuple[KeysValues, ...]
    """Keys and values of its tokens, a pair a block."""
    image: Tensor | None
    """Latent of the first image [1, C, h, w]; None where none was given."""
    negative: tuple[KeysValues, ...] = ()
    """The same of the negative prompt, where the model is guided."""

    @property
    def branches(self) -> tuple[tuple[KeysValues, ...], ...]:
        """Texts of the guidance branches, the conditional one first."""
        return (self.text, self.negative) if self.negative else (self.text,)


@dataclass(frozen=True, eq=False)
class HYContext:
    """Keys and values of remembered latents, as they are before places are given to them."""

    keys_values: tuple[Pieces, ...]
    """[B, heads, N, head_dim], piece after piece, for every block."""
    where: Places | None
    """Places of the latents; None where there are none."""
    apart: bool = False
    """Whether evaluations keep attention to text and context apart, and capture it."""
    negative: tuple[Pieces, ...] = ()
    """Keys and values of latents that saw the negative prompt, where the model is guided."""
    reused: tuple[Partial, ...] = ()
    """Attention to text and context that an earlier evaluation captured, a block each; taken in place of both."""

    @classmethod
    def own(cls, context: Context) -> HYContext:
        """The context that a caller hands back; `TypeError` where it is another model's."""
        if not isinstance(context, cls):
            raise TypeError(f"context must be an {cls.__name__}, got {type(context).__name__}")
        return context

    @property
    def latents(self) -> int:
        """Remembered latents in it."""
        return 0 if self.where is None else self.where.latents

    @property
    def bytes(self) -> int:
        """Bytes of all keys and values."""
        every = (pair for block in (*self.keys_values, *self.negative) for pair in block)
        return sum(t.numel() * t.element_size() for pair in every for t in pair)


@dataclass(frozen=True, eq=False)
class HYInputs:
    """What stays the same from step to step."""

    condition: Tensor
    labels: Tensor
    matrices: tuple[Tensor, Tensor]
    """Projections [B, T, 4, 4] and their inverses."""
    text: tuple[KeysValues, ...]
    negative: bool = False
    """Whether this is the branch of the negative prompt."""


class ReusesOuter:
    """`ReusesAttention` of models whose context is an `HYContext`, and which capture attention to it as "outer"."""

    def apart(self, context: Context) -> HYContext:
        """The same context; evaluations then keep attention to it, and to what goes with it, apart and capture it."""
        return replace(HYContext.own(context), apart=True, reused=())

    def reuse(self, context: Context, captured: Mapping[str, Any]) -> HYContext:
        """A context whose attention is what an evaluation captured; without any, itself."""
        return replace(HYContext.own(context), apart=False, reused=tuple(captured.get("outer", ())))


class HYWorldPlay(ReusesOuter, Large):
    """`WorldModel` of the autoregressive models: distilled to a few steps, or guided."""

    @property
    def token_grid(self) -> tuple[int, int]:
        """See `AttendsSparsely.token_grid`."""
        return self.latent_shape[1], self.latent_shape[2]

    def chunk(self, k: int) -> ChunkShape:
        """4 latents: 13 frames in the first chunk, 16 in others. The context is the whole past up to 20 latents, then
        the first clip, one that is retrieved, and the last 12 latents."""
        frames, last = (13, (0, 4, 8, 12)) if k == 0 else (16, None)
        return ChunkShape(self.new, frames, window=WINDOW, memory=MEMORY, sink=SINK, clip=self.new, last_frames=last)

    def encode_prompt(self, prompt: Mapping[str, Tensor], attend: Attend) -> HYPrompt:
        """Text keys and values from encoder states "text" [1, L, ...], "glyphs" [1, G, ...] and "vision" [1, V, ...].

        "text_mask" and "glyphs_mask" may leave rows out. A guided model needs "negative_text" and the like, too; the
        image's states are the same. Raises `InputError` on what is missing or does not fit.
        """
        given.check_names(prompt)
        negative = () if self.guidance is None else self._text(prompt, NEGATIVE, attend)
        return HYPrompt(self._text(prompt, "", attend), prompt.get("image"), negative)

    def _text(self, prompt: Mapping[str, Tensor], sign: str, attend: Attend) -> tuple[KeysValues, ...]:
        """Keys and values of the states whose names begin with `sign`."""
        return tuple(self.network.text(given.states(prompt, sign, self.config, self.device), attend))

    def prepare(self, conditions: Conditions) -> tuple[HYInputs, ...]:
        """Places, labels and the first image of the coming latents."""
        c = conditions
        prompt, numbers = self.prompt_of(c.encoded, HYPrompt), self.numbered(c.led, c.cameras.shape[1])
        condition = self.conditioned(prompt.image, numbers, len(c.cameras))
        of = (condition, self.sent(numbers), self.matrices(c.cameras, c.intrinsics))
        return tuple(HYInputs(*of, text, negative=i > 0) for i, text in enumerate(prompt.branches))

    def encode_context(self, recalled: Recalled, previous: Context | None, attend: Attend) -> HYContext:
        """One pass over all remembered latents; nothing of `previous` is kept."""
        if not recalled.latents.shape[1]:
            return HYContext((), None)
        frames, branches = self._frames(recalled)
        every = [two_streams.whole(self.network.context(frames, text, attend)) for text in branches]
        return HYContext(every[0], frames.at, negative=every[1] if len(every) > 1 else ())

    def encode_latents(self, recalled: Recalled, past: Context | None, attend: Attend) -> Tensor:
        """Keys and values [B, N, depth, 2, heads, n, head_dim] of latents that see each other and `past`.

        Of a guided model twice the depth: those of the negative branch come behind.
        """
        frames, branches = self._frames(recalled)
        seen = HYContext.own(past) if past is not None else HYContext((), None)
        known = (seen.keys_values, seen.negative)
        pairs = (
            pair for text, kept in zip(branches, known, strict=False)
            for pair in self.network.context(frames, text, attend, kept, seen.where)
        )  # fmt: skip
        return two_streams.packed(pairs, len(branches) * self.config.depth, recalled.latents.shape[1])

    def join_context(self, kept: Sequence[Tensor], recalled: Recalled) -> HYContext:
        """Context of latents whose keys and values [B, depth, 2, heads, n, head_dim] were kept, at new places."""
        if not kept:
            return HYContext((), None)
        at, blocks, depth = self.places_of(recalled), two_streams.unpacked(kept), self.config.depth
        return HYContext(blocks[:depth], at, negative=blocks[depth:])

    def velocity(
        self, x: Tensor, sigma: float | Tensor, inputs: HYInputs, context: Context, attend: Attend
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """The network's own prediction; `sigma` is a number or [B]."""
        held = HYContext.own(context)
        at, levels = self.places_after(held.latents, inputs.matrices), self.levels(sigma, *x.shape[:2])
        frames = Frames(x, inputs.condition, levels, inputs.labels.expand(x.shape[:2]), at)
        outer = list[Partial]() if held.apart else None
        past = held.negative if inputs.negative else held.keys_values
        made = self.network.velocity(frames, inputs.text, past, held.where, attend, outer, held.reused)
        return made.float(), {} if outer is None else {"outer": outer}

    def context_flops(self, encoded: int, seen: float) -> float:
        """See `Costed.context_flops`; attention to text is left out."""
        return (1 if self.guidance is None else 2) * cost.context_flops(self.config, self._tokens, encoded, seen)

    def evaluation_flops(self, latents: int, context: float) -> float:
        """See `Costed.evaluation_flops`; attention to text is left out."""
        return cost.evaluation_flops(self.config, self._tokens, latents, context)

    def _frames(self, recalled: Recalled) -> tuple[Frames, tuple[tuple[KeysValues, ...], ...]]:
        """Remembered latents as the network takes them, and the texts that they see, one a guidance branch."""
        prompt = self.prompt_of(recalled.prompt, HYPrompt)
        return self.remembered(recalled, prompt.image), prompt.branches
