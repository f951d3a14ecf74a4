"""Attention written out in matrix products: `blocked` for bfloat16 on a CPU, `in_float32` for everything."""

from __future__ import annotations

import torch
from torch import Tensor

QUERY_BLOCK = 256
"""Queries whose scores are held at once; on a CPU a block's scores then stay in the cache."""
SAMPLED = 5
"""`blocked` seeks the greatest score of a query among every so many keys; prime to usual grids of tokens."""


def blocked(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, lse: bool) -> tuple[Tensor, Tensor | None]:
    """Attention a block of queries at a time, scores rounded to the inputs' precision (see `backends.Run`).

    Rounding is relative, so large scores would lose what tells them apart. Each query's greatest score against some of
    the keys is therefore taken away inside the product, as one more channel, before anything is rounded. A peak below
    zero is left alone: then no score that matters can end up farther from zero than it was. A bias is added inside the
    product, too, as two channels, its rounding and what that leaves.
    """
    scale, known, biased = q.shape[-1] ** -0.5, k, bias is not None
    if bias is not None:
        high = bias.to(k.dtype)
        low = torch.where(high.isfinite(), bias - high, 0).to(k.dtype)
        known = torch.cat([k, *(t[..., 0, :, None].expand(*k.shape[:3], 1) for t in (high, low))], -1)
    some = known[:, :, ::SAMPLED].mT
    keys = torch.cat([known, torch.ones_like(k[..., :1])], -1).mT  # [B, H, E + 1, Nk], or E + 3
    outs: list[Tensor] = []
    sums: list[Tensor] = []
    for part in q.split(QUERY_BLOCK, 2):
        part = part * scale
        if biased:
            part = torch.cat([part, torch.ones_like(part[..., :2])], -1)
        peak = torch.matmul(part, some).amax(-1, keepdim=True).clamp_min(0)
        score = torch.matmul(torch.cat([part, -peak], -1), keys)
        outs.append(torch.matmul(score.softmax(-1), v))
        if lse:
            sums.append(score.logsumexp(-1).float() + peak[..., 0].float())
    return _joined(outs), _joined(sums) if lse else None


def in_float32(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, lse: bool) -> tuple[Tensor, Tensor | None]:
    """Attention in float32 a block of queries at a time; float64 stays float64 (see `backends.Run`)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, values = k.to(wide).mT, v.to(wide)
    outs: list[Tensor] = []
    sums: list[Tensor] = []
    for part in q.split(QUERY_BLOCK, 2):
        score = torch.matmul(part.to(wide) * q.shape[-1] ** -0.5, keys)
        if bias is not None:
            score = score + bias
        outs.append(torch.matmul(score.softmax(-1), values).to(q.dtype))
        if lse:
            sums.append(score.logsumexp(-1).float())
    return _joined(outs), _joined(sums) if lse else None


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)
