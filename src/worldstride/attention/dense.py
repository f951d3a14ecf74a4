"""Dense attention: the plain path that every other way of attending is measured against."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_BLOCK = 256
"""Queries whose scores are held at once in `blocked`; a block's scores then stay in the cache."""
SAMPLED = 5
"""`blocked` seeks the greatest score of a query among every so many keys; prime to usual grids of tokens."""


class Attend(Protocol):
    """How tokens attend: (q, k, v) -> output. The loop passes one to the model; the model calls nothing else."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, H, Nq, E], k and v [B, H, Nk, E] -> [B, H, Nq, E]; every query sees every key."""
        ...


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention, scale 1/sqrt(E): q [B, H, Nq, E], k and v [B, H, Nk, E] -> [B, H, Nq, E].

    torch's fused attention, except for bfloat16 on a CPU, whose fused kernel leaves the matrix units idle.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return blocked(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def blocked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by matrix products a block of queries; scores are rounded to the inputs' precision.

    Rounding is relative, so large scores would lose what tells them apart. Each query's greatest score against some of
    the keys is therefore taken away inside the product, as one more channel, before anything is rounded. A peak below
    zero is left alone: then no score that matters can end up farther from zero than it was.
    """
    scale = q.shape[-1] ** -0.5
    some, parts = k[:, :, ::SAMPLED].mT, []
    keys = torch.cat([k, torch.ones_like(k[..., :1])], -1).mT  # [B, H, E + 1, Nk]
    for part in q.split(QUERY_BLOCK, 2):
        part = part * scale
        peak = torch.matmul(part, some).amax(-1, keepdim=True).clamp_min(0)
        parts.append(torch.matmul(torch.matmul(torch.cat([part, -peak], -1), keys).softmax(-1), v))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same in float64, written out: the truth in tests."""
    score = torch.einsum("bhqe,bhke->bhqk", q.double(), k.double()) / q.shape[-1] ** 0.5
    return torch.einsum("bhqk,bhke->bhqe", score.softmax(-1), v.double())
