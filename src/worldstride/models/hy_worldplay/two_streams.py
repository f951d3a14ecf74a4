"""A block's attention in two streams: at once, or in two parts of which one can be kept; and what is kept of latents.

Queries, keys and values are [B, heads, N, head_dim] without places. Text, where it is part of this attention at all,
has none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from worldstride.attention import Attend, Partial, merge, streams
from worldstride.attention.streams import KeysValues, Places


def attended(
    q: Tensor, own: KeysValues, at: Places, text: KeysValues | None, context: KeysValues | None, where: Places | None,
    attend: Attend,
) -> Tensor:  # fmt: skip
    """Attention [B, N, 2 width] of queries in both streams to text, context and themselves."""
    keys, values = streams.every_key(text or _none(own), context, where, own, at)
    return streams.back(attend(streams.of_queries(q, at), keys, values), at)


def outside(
    q: Tensor, own: KeysValues, at: Places, text: KeysValues | None, context: KeysValues | None, where: Places | None,
    attend: Attend,
) -> Partial:  # fmt: skip
    """Attention of queries in both streams to text and context alone."""
    none = own[0][:, :, :0], own[1][:, :, :0]
    keys, values = streams.every_key(text or _none(own), context, where, none, at)
    return attend(streams.of_queries(q, at), keys, values, lse=True)


def inside(before: Partial, q: Tensor, own: KeysValues, at: Places, attend: Attend) -> Tensor:
    """Attention [B, N, 2 width] of queries to themselves, joined with what they or others gathered outside."""
    keys, values = streams.every_key(_none(own), None, None, own, at)
    within = attend(streams.of_queries(q, at), keys, values, lse=True)
    return streams.back(merge(before, within).out, at)


def _none(like: KeysValues) -> KeysValues:
    """No text."""
    return like[0][:1, :, :0], like[1][:1, :, :0]


def packed(pairs: Sequence[KeysValues], latents: int) -> Tensor:
    """Keys and values of so many latents, a pair a block, as what is kept of each: [B, latents, depth, 2, heads, n,
    head_dim]."""
    return torch.stack([torch.stack(pair, 1) for pair in pairs], 1).unflatten(4, (latents, -1)).movedim(4, 1)


def unpacked(kept: Sequence[Tensor]) -> tuple[KeysValues, ...]:
    """Keys and values [B, heads, N, head_dim], a pair a block, of latents of each of which `packed` made one."""
    every = torch.stack(list(kept), 4).flatten(4, 5)  # [B, depth, 2, heads, N, head_dim]
    return tuple((k, v) for k, v in (pair.unbind(1) for pair in every.unbind(1)))
