"""What networks share that leave keys and values of context latents behind: a pass over these, and one against them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor, nn

from worldstride.attention import Attend, Partial, of_layer
from worldstride.attention.streams import KeysValues, Pieces, Places
from worldstride.models.hy_worldplay import two_streams

Rows = tuple[Tensor, ...]
"""Shift, scale and gate of attention among latents, then of the MLP: six times [B, T, width]."""


class Placeable(Protocol):
    """Latents as a network takes them."""

    @property
    def at(self) -> Places:
        """Where they are."""
        ...


Given = TypeVar("Given", bound=Placeable)


class CachedNetwork(nn.Module, Generic[Given]):
    """Blocks in which latents attend to each other in two streams."""

    begin: Callable[..., tuple[Rows, tuple[Tensor, Tensor, Tensor]]]
    """What computes of a block what stands before attention among latents: rows, and queries, keys and values. A
    compiled function may stand in for it."""

    def context(
        self, frames: Given, text: Sequence[KeysValues], attend: Attend, past: Sequence[Pieces] = (),
        where: Places | None = None,
    ) -> Iterator[KeysValues]:  # fmt: skip
        """Keys and values [B, heads, N, head_dim] of latents that see the text and each other, a pair a block.

        They are without their places, and views of all that was projected. Latents see others' `past`, too, a block's
        pieces each, at places `where`.
        """
        x, about = self._entered(frames)
        level, blocks = self._modulating(about), self._blocks()
        for i, (block, words, kept) in enumerate(zip(blocks, text, past or [()] * len(blocks), strict=True)):
            rows, (q, k, v) = self.begin(block, x, level)
            yield k, v
            if i + 1 < len(blocks):  # the last block's tokens go nowhere
                how, seen = of_layer(attend, i, "context"), self._seen(words)
                both = two_streams.of_context(q, (k, v), frames.at, seen, kept, where, how)
                x = self._through(block, x, rows, both, words, attend)

    def velocity(
        self, frames: Given, text: Sequence[KeysValues], context: Sequence[Pieces], where: Places | None,
        attend: Attend, outer: list[Partial] | None = None, reused: Sequence[Partial] = (),
    ) -> Tensor:  # fmt: skip
        """Velocity [B, T, channels, h, w] against text and a context, a block's pieces each, at places `where`.

        A list given as `outer` is filled with every block's attention to the context, and to text that is seen with it,
        which a later evaluation takes as `reused` in its place.
        """
        x, about = self._entered(frames)
        level, blocks = self._modulating(about), self._blocks()
        for i, (block, words, kept) in enumerate(zip(blocks, text, context or [()] * len(blocks), strict=True)):
            rows, (q, k, v) = self.begin(block, x, level)
            how, known = of_layer(attend, i, "chunk"), reused[i] if reused else None
            both = two_streams.of_chunk(q, (k, v), frames.at, self._seen(words), kept, where, how, outer, known)
            x = self._through(block, x, rows, both, words, attend)
        return self._left(x, about, frames)

    @abstractmethod
    def _blocks(self) -> Sequence[Any]:
        """The blocks in order."""

    @abstractmethod
    def _entered(self, frames: Given) -> tuple[Tensor, Tensor]:
        """Tokens [B, N, width] and what latents' levels and actions are embedded as [B, T, width]."""

    @abstractmethod
    def _modulating(self, about: Tensor) -> Tensor:
        """What blocks begin with of embedded levels and actions."""

    @abstractmethod
    def _seen(self, words: KeysValues) -> KeysValues | None:
        """The text that latents see with each other; None where it is asked apart."""

    @abstractmethod
    def _through(self, block: Any, x: Tensor, rows: Rows, both: Tensor, words: KeysValues, attend: Attend) -> Tensor:
        """x [B, N, width] after attention's result of both streams [B, N, 2 width] and the rest of a block."""

    @abstractmethod
    def _left(self, x: Tensor, about: Tensor, frames: Given) -> Tensor:
        """Tokens [B, N, width] as velocity [B, T, channels, h, w]."""
