"""Attention to listed blocks of keys.

Queries, keys and values are in block order (`layout`). On a GPU with Triton one fused kernel does it; everywhere else
listed blocks are gathered and attended to by dense attention, which is exact, too. What ran is in the result of
`implementation`, so that a report can show it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from worldstride.attention import ops
from worldstride.attention.dense import attend, by_head
from worldstride.attention.layout import Layout
from worldstride.attention.partial import Partial
from worldstride.attention.selection import BlockList
from worldstride.errors import InputError

Implementation = Literal["gluon", "triton", "gather"]


def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    listed: BlockList,
    queries: Layout,
    keys: Layout,
    *,
    bias: Tensor | None = None,
    natural: bool = True,
    using: Implementation | None = None,
) -> Partial:
    """Softmax attention, scale 1/sqrt(E), of every block of queries to the blocks of keys that are listed for it.

    Args:
        q: queries [B, H, Nq, E] in block order; E is 64 or 128 for the kernels.
        k: keys [B, H, Nk, E] in block order.
        v: values, likewise. Rows of keys and values that no list names must be finite: the Gluon kernel multiplies
            those behind a block's last row by zero.
        listed: blocks of keys for each block of queries, at least one each.
        queries: where blocks of queries begin.
        keys: where blocks of keys begin.
        bias: added to a key's scores, natural units, [Nk], [B, Nk] or [B, H, Nk]; None for none.
        natural: give outputs in natural order (untiled on the way out, no pass of its own), else in block order.
        using: the implementation; None takes what `implementation` says.

    Returns:
        Output [B, H, Nq, E] and log-sum-exp [B, H, Nq] over the listed keys.

    Raises:
        InputError: shapes do not fit the layouts or each other, or the implementation cannot run them.
    """
    _fits(q, k, v, listed, queries, keys, bias)
    how = using or implementation(q)
    if how != "gather":
        refusal = cannot(q, how)
        if refusal:
            raise InputError(f"attention by {how} is not possible here: {refusal}")
        rows = queries.order if natural else None
        extra = None if bias is None else by_head(bias)
        tables = (listed.blocks, listed.counts, queries.starts, keys.starts)
        return Partial(*ops.attend_listed(q, k, v, *tables, rows, extra, how))
    part = gathered(q, k, v, listed, queries, keys, bias)
    return Partial(*(t[:, :, queries.inverse] for t in part)) if natural else part


def implementation(q: Tensor) -> Implementation:
    """What `attend_blocks` computes with for such queries: the first of gluon, triton, gather that can."""
    return "gluon" if not cannot(q, "gluon") else "triton" if not cannot(q, "triton") else "gather"


def cannot(q: Tensor, how: Implementation) -> str:
    """Why an implementation cannot run on such queries; empty where it can."""
    if how == "gather":
        return ""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16, the queries are {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] not in (64, 128):
        return f"it needs heads of 64 or 128 channels, the queries have {q.shape[-1]}"
    return ops.usable(how, q)


def gathered(
    q: Tensor, k: Tensor, v: Tensor, listed: BlockList, queries: Layout, keys: Layout, bias: Tensor | None = None
) -> Partial:
    """The same in block order on any device: keys are gathered a block of queries at a time."""
    batch, heads, _, channels = q.shape
    starts, sizes = keys.starts[:-1].long(), keys.sizes.long()
    lane, parts = torch.arange(int(sizes.max()), device=q.device), list[Partial]()
    weight = torch.zeros(1, 1, 1, device=q.device) if bias is None else by_head(bias).float()
    weight = weight.expand(batch, heads, keys.tokens)
    most = listed.counts[..., 1].amax((0, 1)).tolist()
    spans = queries.starts.tolist()
    for i, (first, last) in enumerate(pairwise(spans)):
        number = torch.arange(most[i], device=q.device)
        blocks = listed.blocks[:, :, i, : most[i]].long()
        there = number < listed.counts[:, :, i, 1:]  # [B, H, L]
        blocks = torch.where(there, blocks, 0)
        at = starts[blocks][..., None] + lane  # [B, H, L, 128]
        valid = (lane < sizes[blocks][..., None]) & there[..., None]
        # beyond a block's last key stands its first, hidden: whatever lies behind the block is never read
        at = torch.where(valid, at, torch.where(there, starts[blocks], starts[blocks[..., :1]])[..., None]).flatten(2)
        valid = valid.flatten(2)
        rows = at[..., None].expand(-1, -1, -1, channels)
        extra = weight.gather(2, at).masked_fill(~valid, -torch.inf)
        some_k, some_v = k.gather(2, rows), v.gather(2, rows)
        parts.append(attend(q[:, :, first:last], some_k, some_v, bias=extra, lse=True))
    return Partial(torch.cat([p.out for p in parts], 2), torch.cat([p.lse for p in parts], 2))


def reference(
    q: Tensor, k: Tensor, v: Tensor, listed: BlockList, queries: Layout, keys: Layout, bias: Tensor | None = None
) -> Partial:
    """The same in float64 as one masked softmax: every token's block decides, nothing else. The truth in tests."""
    seen = listed.table()[:, :, queries.owner][..., keys.owner]  # [B, H, Nq, Nk]
    scores = torch.einsum("bhqe,bhke->bhqk", q.double(), k.double()) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + by_head(bias).double()[..., None, :]
    scores = scores.masked_fill(~seen, -torch.inf)
    return Partial(torch.einsum("bhqk,bhke->bhqe", scores.softmax(-1), v.double()), scores.logsumexp(-1))


def _fits(
    q: Tensor, k: Tensor, v: Tensor, listed: BlockList, queries: Layout, keys: Layout, bias: Tensor | None
) -> None:
    batch, heads, rows, channels = q.shape
    want = {"keys": (batch, heads, keys.tokens, channels), "values": (batch, heads, keys.tokens, channels)}
    if q.stride(3) != 1:
        raise InputError(f"queries must have channels innermost, got strides {q.stride()}")
    if rows != queries.tokens:
        raise InputError(f"queries {tuple(q.shape)} hold {rows} tokens, their layout {queries.tokens}")
    for (name, shape), tensor in zip(want.items(), (k, v), strict=True):
        if tensor.shape != shape:
            raise InputError(f"{name} must be {shape} for queries {tuple(q.shape)}, got {tuple(tensor.shape)}")
        if tensor.stride(3) != 1:
            raise InputError(f"{name} must have channels innermost, got strides {tensor.stride()}")
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise InputError(f"{name} are {tensor.dtype} on {tensor.device}, queries {q.dtype} on {q.device}")
    table = (batch, heads, queries.blocks, keys.blocks)
    if listed.blocks.shape != table or listed.counts.shape != (*table[:3], 2):
        raise InputError(
            f"the list must have blocks {table} and counts {(*table[:3], 2)}, got {tuple(listed.blocks.shape)} and "
            f"{tuple(listed.counts.shape)}"
        )
    if bias is not None and bias.shape not in ((keys.tokens,), (batch, keys.tokens), (batch, heads, keys.tokens)):
        raise InputError(
            f"a key bias is [{keys.tokens}], with batch or batch and heads before, got {tuple(bias.shape)}"
        )
