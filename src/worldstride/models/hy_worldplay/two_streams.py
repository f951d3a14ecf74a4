"""A block's attention in two streams: at once, or in two parts of which one can be kept; and what is kept of latents.

Queries, keys and values are [B, heads, N, head_dim] without places. Text, where it is part of this attention at all,
has none. Where attention is sparse, blocks of the context may be left out, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, overload

from torch import Tensor

from worldstride.attention import Attend, LayerAttend, Partial, merge, streams
from worldstride.attention.streams import KeysValues, Pieces, Places


def of_context(
    q: Tensor, own: KeysValues, at: Places, text: KeysValues | None, past: Pieces, where: Places | None, attend: Attend
) -> Tensor:
    """Attention [B, N, 2 width] of context latents to text, each other, and `past` that was kept of others.

    Without a past they may leave out blocks of each other, else only of the past.
    """
    if past:
        return _attended(q, own, at, text, past, where, attend)
    return _attended(q, _none(own), at, text, (own,), at, attend, among=True)


def of_chunk(
    q: Tensor, own: KeysValues, at: Places, text: KeysValues | None, context: Pieces, where: Places | None,
    attend: Attend, outer: list[Partial] | None = None, reused: Partial | None = None,
) -> Tensor:  # fmt: skip
    """Attention [B, N, 2 width] of new latents to context, text and themselves.

    To a list given as `outer` attention to context and text alone is added, which a later evaluation takes as `reused`
    in place of both.
    """
    if outer is None and reused is None:
        return _attended(q, own, at, text, context, where, attend)
    queries, seen = streams.of_queries(q, at), streams.every_key(_none(own, 1), (), None, own, at)
    if reused is None:
        before = streams.every_key(text or _none(own, 1), context, where, _none(own), at)
        reused = _attend(attend, queries, before, streams.tokens_of(context), True)
        inside = _attend(attend, queries, seen, 0, True)
    else:  # what is reused was counted when it was computed
        inside = attend(queries, *seen, lse=True)
    if outer is not None:
        outer.append(reused)
    return streams.back(merge(reused, inside).out, at)


def _attended(
    q: Tensor, own: KeysValues, at: Places, text: KeysValues | None, context: Pieces, where: Places | None,
    attend: Attend, among: bool = False,
) -> Tensor:  # fmt: skip
    keys = streams.every_key(text or _none(own, 1), context, where, own, at)
    made = _attend(attend, streams.of_queries(q, at), keys, streams.tokens_of(context), among=among)
    return streams.back(made, at)


@overload
def _attend(
    attend: Attend, q: Tensor, seen: KeysValues, free: int, lse: Literal[False] = False, among: bool = False
) -> Tensor: ...


@overload
def _attend(
    attend: Attend, q: Tensor, seen: KeysValues, free: int, lse: Literal[True], among: bool = False
) -> Partial: ...


def _attend(
    attend: Attend, q: Tensor, seen: KeysValues, free: int, lse: bool = False, among: bool = False
) -> Tensor | Partial:
    """The first `free` keys are the context's; with `among` the queries' own."""
    if isinstance(attend, LayerAttend):
        return attend.joined(q, *seen, free, lse, among)  # type: ignore[call-overload]
    return attend(q, *seen, lse=True) if lse else attend(q, *seen)


def _none(of: KeysValues, batch: int | None = None) -> KeysValues:
    """As many tokens as nothing."""
    return of[0][:batch, :, :0], of[1][:batch, :, :0]


def whole(pairs: Iterable[KeysValues]) -> tuple[Pieces, ...]:
    """Keys and values of a context, a pair a block, each in one piece without what else was projected with them."""
    return tuple(((k.contiguous(), v.contiguous()),) for k, v in pairs)


def packed(pairs: Iterable[KeysValues], blocks: int, latents: int) -> Tensor:
    """What is kept of so many latents, [B, latents, blocks, 2, heads, n, head_dim], from keys and values, a pair a
    block; of these only one or two are held beside it."""
    made: Tensor | None = None
    for i, pair in enumerate(pairs):
        if made is None:
            batch, *rest = pair[0].shape
            made = pair[0].new_empty(batch, blocks, 2, *rest)
        for j, one in enumerate(pair):
            made[:, i, j] = one
    if made is None:
        raise ValueError("a network has at least one block")
    return made.unflatten(4, (latents, -1)).movedim(4, 1)


def unpacked(kept: Sequence[Tensor]) -> tuple[Pieces, ...]:
    """Pieces for every block of latents of each of which `packed` made [B, blocks, 2, heads, n, head_dim].

    Those that lie beside each other in memory, as latents do that were encoded together, are one piece: nothing is
    copied.
    """
    pieces = list[Tensor]()
    for one in kept:
        before = pieces[-1] if pieces else None
        if before is not None and _follows(one, before):
            size = [*one.shape[:4], before.shape[4] + one.shape[4], one.shape[5]]
            pieces[-1] = before.as_strided(size, before.stride(), before.storage_offset())
        else:
            pieces.append(one)
    pairs = [[(k, v) for k, v in (block.unbind(1) for block in piece.unbind(1))] for piece in pieces]
    return tuple(zip(*pairs, strict=True))


def _follows(x: Tensor, before: Tensor) -> bool:
    """Whether the tokens of x [B, blocks, 2, heads, n, head_dim] stand in memory right behind others'."""
    there = before.storage_offset() + before.shape[4] * before.stride(4)
    same = x.untyped_storage().data_ptr() == before.untyped_storage().data_ptr()
    return same and x.stride() == before.stride() and x.storage_offset() == there
