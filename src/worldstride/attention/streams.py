"""Attention in two streams, each with its own idea of where tokens are.

In the first, queries and keys turn with their place in the window (rotary angles, Su et al., 2021). In the second they
are carried into a frame common to all cameras by the projection matrix P of their own camera (PRoPE, Li et al., 2025,
arXiv 2507.10496): P^T q, P^-1 k and P^-1 v, and P maps the result back, so that only relative projections count.
That holds among tokens that have places; text has none, so where the origin lies matters to what is made of text.

Both are stacked on the batch. Written out in torch; on a GPU with Triton one kernel does it in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from worldstride.attention import ops
from worldstride.errors import InputError

KeysValues = tuple[Tensor, Tensor]
"""Keys and values [B, heads, N, E]."""
Pieces = Sequence[KeysValues]
"""Keys and values of remembered latents in order, some latents' each: they need not lie in one piece of memory."""


class Places(NamedTuple):
    """Places of T latents' tokens, latent after latent, with as many each."""

    cos: Tensor
    """Cosines of rotary angles, float32 [N, E / 2]."""
    sin: Tensor
    """Sines, likewise."""
    project: Tensor
    """P, from world to image coordinates, float32 [B, T, 4, 4]."""
    unproject: Tensor
    """P^-1, likewise."""

    @property
    def latents(self) -> int:
        """Latents."""
        return self.project.shape[1]


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channel pairs (2 i, 2 i + 1) of x [..., N, E] turned by angles [N, E / 2], in float32."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


def carry(x: Tensor, matrices: Tensor) -> Tensor:
    """Every four channels of x [B, heads, T n, E] multiplied by their latent's matrix [B, T, 4, 4], in float32."""
    parts = x.unflatten(2, (matrices.shape[1], -1)).unflatten(-1, (-1, 1, 4)).float()  # [B, heads, T, n, E/4, 1, 4]
    return (parts * matrices[:, None, :, None, None]).sum(-1).flatten(-2).flatten(2, 3).to(x.dtype)


def of_queries(q: Tensor, at: Places) -> Tensor:
    """Queries [B, heads, N, E] of both streams, one after the other: [2 B, heads, N, E]."""
    if _fused(q):
        return place_queries(q, at.cos, at.sin, at.project)
    return torch.cat([turn(q, at.cos, at.sin), carry(q, at.project.mT)])


def of_keys(k: Tensor, v: Tensor, at: Places) -> KeysValues:
    """Keys and values [B, heads, N, E] of both streams, likewise."""
    keys = torch.cat([turn(k, at.cos, at.sin), carry(k, at.unproject)])
    return keys, torch.cat([v, carry(v, at.unproject)])


def every_key(text: KeysValues, context: Pieces, where: Places | None, own: KeysValues, at: Places) -> KeysValues:
    """Keys and values [2 B, heads, Nc + L + N, E] of context, text [1, heads, L, E] and a chunk's own tokens.

    The context comes first, so that what may be left out lies together. Text has no place: it is alike in both
    streams, and for all worlds.
    """
    if _fused(own[0]):
        past = (None,) * 3 if where is None else (where.cos, where.sin, where.unproject)
        pieces = [k for k, _ in context], [v for _, v in context]
        return place_keys(*text, *pieces, *past, *own, at.cos, at.sin, at.unproject)
    batch = 2 * len(own[0])
    parts = [of_keys(*piece, place) for piece, place in _placed(context, where)]
    parts.append((text[0].expand(batch, -1, -1, -1), text[1].expand(batch, -1, -1, -1)))
    if own[0].shape[2]:
        parts.append(of_keys(*own, at))
    keys, values = (torch.cat(of, 2) for of in zip(*parts, strict=True))
    return keys, values


def tokens_of(context: Pieces) -> int:
    """Tokens of all pieces."""
    return sum(k.shape[2] for k, _ in context)


def _placed(context: Pieces, where: Places | None) -> Iterator[tuple[KeysValues, Places]]:
    """Every piece with its own places."""
    first = 0
    for piece in context:
        if where is None:
            raise InputError("remembered latents need places")
        tokens, each = piece[0].shape[2], len(where.cos) // where.latents
        rows, latents = slice(first, first + tokens), slice(first // each, (first + tokens) // each)
        yield piece, Places(where.cos[rows], where.sin[rows], where.project[:, latents], where.unproject[:, latents])
        first += tokens


def back(out: Tensor, at: Places) -> Tensor:
    """Attention's results [2 B, heads, N, E] of both streams as tokens [B, N, 2 heads E], first stream first."""
    if _fused(out):
        return place_back(out, at.project)
    turned, carried = out.chunk(2)
    both = torch.cat([turned, carry(carried, at.project)], 1)  # [B, 2 heads, N, E]
    return both.transpose(1, 2).flatten(2)


def _fused(x: Tensor) -> bool:
    return x.stride(-1) == 1 and x.shape[-1] in (16, 32, 64, 128) and not ops.usable("triton", x)


@torch.library.custom_op("worldstride::place_queries", mutates_args=(), device_types="cuda")
def place_queries(q: Tensor, cos: Tensor, sin: Tensor, project: Tensor) -> Tensor:
    """See `of_queries`."""
    from worldstride.attention.kernels.streams import launch

    out = q.new_empty(2 * len(q), *q.shape[1:])
    launch(q, (cos, sin), project.mT, *out.chunk(2))
    return out


@place_queries.register_fake
def _(q: Tensor, cos: Tensor, sin: Tensor, project: Tensor) -> Tensor:
    return q.new_empty(2 * q.shape[0], *q.shape[1:])


@torch.library.custom_op("worldstride::place_keys", mutates_args=(), device_types="cuda")
def place_keys(
    text_k: Tensor, text_v: Tensor, past_k: list[Tensor], past_v: list[Tensor], past_cos: Tensor | None,
    past_sin: Tensor | None, past_unproject: Tensor | None, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor,
    unproject: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `every_key`; the past has places, if it has pieces."""
    from worldstride.attention.kernels.streams import launch

    batch, heads, tokens, channels = k.shape
    words, past = text_k.shape[2], sum(piece.shape[2] for piece in past_k)
    keys = k.new_empty(2 * batch, heads, past + words + tokens, channels)
    values = torch.empty_like(keys)
    where = None
    if past_cos is not None and past_sin is not None and past_unproject is not None:
        where = Places(past_cos, past_sin, past_unproject, past_unproject)
    pieces = list(_placed(list(zip(past_k, past_v, strict=True)), where))
    for i, (made, text, own) in enumerate(((keys, text_k, k), (values, text_v, v))):  # only keys turn
        first = 0
        for piece, at in pieces:
            rows = made[:, :, first : first + piece[i].shape[2]]
            launch(piece[i], (at.cos, at.sin) if i == 0 else None, at.unproject, *rows.chunk(2))
            first += rows.shape[2]
        launch(text.expand(batch, -1, -1, -1), None, None, *made[:, :, past : past + words].chunk(2))
        launch(own, (cos, sin) if i == 0 else None, unproject, *made[:, :, past + words :].chunk(2))
    return keys, values


@place_keys.register_fake
def _(
    text_k: Tensor, text_v: Tensor, past_k: list[Tensor], past_v: list[Tensor], past_cos: Tensor | None,
    past_sin: Tensor | None, past_unproject: Tensor | None, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor,
    unproject: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    count = text_k.shape[2] + sum(piece.shape[2] for piece in past_k) + k.shape[2]
    keys = k.new_empty(2 * k.shape[0], k.shape[1], count, k.shape[3])
    return keys, torch.empty_like(keys)


@torch.library.custom_op("worldstride::place_back", mutates_args=(), device_types="cuda")
def place_back(out: Tensor, project: Tensor) -> Tensor:
    """See `back`."""
    from worldstride.attention.kernels.streams import launch

    (turned, carried), (heads, tokens, channels) = out.chunk(2), out.shape[1:]
    made = out.new_empty(len(turned), tokens, 2, heads, channels)
    first, second = (made[:, :, i].transpose(1, 2) for i in (0, 1))
    launch(turned, None, None, first, None)
    launch(carried, None, project, None, second)
    return made.flatten(2)


@place_back.register_fake
def _(out: Tensor, project: Tensor) -> Tensor:
    return out.new_empty(out.shape[0] // 2, out.shape[2], 2 * out.shape[1] * out.shape[3])
