"""Attention over part of the keys, and how parts make a whole.

A softmax over a union of key sets is a weighted mean of the softmaxes over each; the weights follow from their
log-sum-exps. So attention over keys that do not change can be computed once and merged with attention over keys that
do (FlashBlock, arXiv 2602.05305), and parts of the keys can go to different kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from worldstride.errors import InputError


class Partial(NamedTuple):
    """Attention over some of the keys. Over none at all it is zeros, with a log-sum-exp of minus infinity."""

    out: Tensor
    """Softmax-weighted values [B, H, Nq, E]."""
    lse: Tensor
    """Natural logarithm of the sum of the exponentials of the scaled scores [B, H, Nq], float32."""


def merge(first: Partial, *others: Partial) -> Partial:
    """Attention over all parts' keys together, which must be different keys of the same queries.

    Parts over no key count for nothing, whatever finite numbers their `out` holds; the whole of only such parts is one,
    too. Raises `InputError` where shapes differ.
    """
    for other in others:
        first = _pair(first, other)
    return first


def _pair(a: Partial, b: Partial) -> Partial:
    if a.out.shape != b.out.shape or a.lse.shape != b.lse.shape or a.lse.shape != a.out.shape[:-1]:
        shapes = ", ".join(str(list(t.shape)) for t in (a.out, b.out, a.lse, b.lse))
        raise InputError(f"parts to merge must be out [B, H, Nq, E] and lse [B, H, Nq] of one size, got {shapes}")
    lse = torch.logaddexp(a.lse, b.lse)
    empty = lse == -torch.inf
    # of two infinities the difference would be no number
    share = torch.sigmoid((b.lse - a.lse).masked_fill(empty, 0))[..., None].to(a.out.dtype)
    return Partial(a.out.lerp(b.out, share) * ~empty[..., None], lse)
