"""Attention over part of the keys, and how two parts make a whole.

A softmax over a union of key sets is a weighted mean of the softmaxes over each; the weights follow from their
log-sum-exps. So attention over keys that do not change can be computed once and merged with attention over keys that
do (FlashBlock, arXiv 2602.05305).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from worldstride.attention.dense import QUERY_BLOCK, SAMPLED


class Partial(NamedTuple):
    """Attention over some of the keys."""

    out: Tensor
    """Softmax-weighted values [B, H, Nq, E]."""
    lse: Tensor
    """Log-sum-exp of the scaled scores [B, H, Nq], float32."""


def attend_partial(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    """Softmax attention with its log-sum-exp: q [B, H, Nq, E], k and v [B, H, Nk, E]; at least one key."""
    if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
        return Partial(out, lse)
    if q.dtype == torch.bfloat16:
        return _blocked(q, k, v)
    score = torch.matmul(q * q.shape[-1] ** -0.5, k.mT)
    return Partial(torch.matmul(score.softmax(-1), v), score.float().logsumexp(-1))


def _blocked(q: Tensor, k: Tensor, v: Tensor) -> Partial:
    """As `dense.blocked`, which says why each query's sampled peak is taken away before scores are rounded."""
    scale, some = q.shape[-1] ** -0.5, k[:, :, ::SAMPLED].mT
    keys = torch.cat([k, torch.ones_like(k[..., :1])], -1).mT  # [B, H, E + 1, Nk]
    outs, sums = list[Tensor](), list[Tensor]()
    for part in q.split(QUERY_BLOCK, 2):
        part = part * scale
        peak = torch.matmul(part, some).amax(-1, keepdim=True).clamp_min(0)
        score = torch.matmul(torch.cat([part, -peak], -1), keys)
        outs.append(torch.matmul(score.softmax(-1), v))
        sums.append(score.logsumexp(-1).float() + peak[..., 0].float())
    return Partial(torch.cat(outs, 2), torch.cat(sums, 2))


def merge(a: Partial, b: Partial) -> Tensor:
    """Attention [B, H, Nq, E] over both parts' keys together."""
    share = torch.sigmoid(b.lse - a.lse)[..., None]
    return a.out.lerp(b.out, share.to(a.out.dtype))
