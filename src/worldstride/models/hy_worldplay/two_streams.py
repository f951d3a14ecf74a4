"""A block's tokens attend in both streams: to context and text, and to each other."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from worldstride.attention import Attend, LayerAttend, Partial, merge, streams
from worldstride.attention.streams import KeysValues, Pieces, Places


def attended(
    q: Tensor, own: KeysValues, at: Places, text: KeysValues, context: Pieces, where: Places | None,
    attend: Attend,
) -> Tensor:  # fmt: skip
    """Attention [B, N, 2 width] of queries [B, heads, N, head_dim] to context, text and themselves.

    Blocks of the context may be left out, where attention is sparse.
    """
    keys, values = streams.every_key(text, context, where, own, at)
    return streams.back(_attend(attend, streams.of_queries(q, at), (keys, values), streams.tokens_of(context)), at)


def among_context(q: Tensor, own: KeysValues, at: Places, text: KeysValues, attend: Attend) -> Tensor:
    """The same of context latents that see text and each other: each may leave out blocks of the others."""
    return attended(q, _none(own), at, text, (own,), at, attend)


def captured(
    q: Tensor, own: KeysValues, at: Places, text: KeysValues, context: Pieces, where: Places | None,
    attend: Attend,
) -> tuple[Tensor, Partial]:  # fmt: skip
    """The same as `attended`, and its part that is attention to context and text, for `resumed`."""
    queries = streams.of_queries(q, at)
    outside = _attend(
        attend, queries, streams.every_key(text, context, where, _none(own), at), streams.tokens_of(context), True
    )
    inside = _attend(attend, queries, streams.every_key(_none(text), (), None, own, at), 0, True)
    return streams.back(merge(outside, inside).out, at), outside


def resumed(q: Tensor, own: KeysValues, at: Places, text: KeysValues, outside: Partial, attend: Attend) -> Tensor:
    """Attention [B, N, 2 width] of queries to themselves, joined with what others of their kind gathered outside."""
    keys, values = streams.every_key(_none(text), (), None, own, at)
    inside = attend(streams.of_queries(q, at), keys, values, lse=True)
    return streams.back(merge(outside, inside).out, at)


@overload
def _attend(attend: Attend, q: Tensor, seen: KeysValues, free: int, lse: Literal[False] = False) -> Tensor: ...


@overload
def _attend(attend: Attend, q: Tensor, seen: KeysValues, free: int, lse: Literal[True]) -> Partial: ...


def _attend(attend: Attend, q: Tensor, seen: KeysValues, free: int, lse: bool = False) -> Tensor | Partial:
    """The first `free` keys are the context's."""
    if isinstance(attend, LayerAttend):
        return attend.joined(q, *seen, free, lse)  # type: ignore[call-overload]
    return attend(q, *seen, lse=lse)  # type: ignore[call-overload]


def _none(of: KeysValues) -> KeysValues:
    """As many tokens as nothing."""
    return of[0][:, :, :0], of[1][:, :, :0]
