"""Layers of Wan2.2's transformer: queries and keys are normed over the channels of all heads together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from worldstride.attention.streams import KeysValues
from worldstride.errors import InputError
from worldstride.models.layers import rms_norm


def seen_rows(text: Tensor, mask: Tensor | None, name: str) -> Tensor:
    """Rows of a text's states [1, L, C] that its mask [1, L] leaves in, if it has one; `InputError` names the mask."""
    if mask is None:
        return text
    if mask.shape != text.shape[:2]:
        raise InputError(f"{name} must be {list(text.shape[:2])} like the text, got {list(mask.shape)}")
    return text[:, mask[0].to(text.device) > 0]


class WideProjection(nn.Module):
    """Queries, keys and values from tokens; queries and keys normed over the channels of all heads together."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(width, 3 * width)
        self.q_scale, self.k_scale = (nn.Parameter(torch.ones(width)) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, N, width] -> three times [B, heads, N, head_dim]."""
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = rms_norm(q, self.q_scale), rms_norm(k, self.k_scale)
        return _by_head(q, self.heads), _by_head(k, self.heads), _by_head(v, self.heads)


class TextProjection(nn.Module):
    """Queries from tokens, keys and values from the text; normed likewise."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.q, self.kv = heads, nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.q_scale, self.k_scale = (nn.Parameter(torch.ones(width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, width] -> queries [B, heads, N, head_dim]."""
        return _by_head(rms_norm(self.q(x), self.q_scale), self.heads)

    def of_text(self, words: Tensor) -> KeysValues:
        """Embedded text [1, L, width] -> keys and values [1, heads, L, head_dim]."""
        k, v = self.kv(words).chunk(2, -1)
        k, v = _by_head(rms_norm(k, self.k_scale), self.heads), _by_head(v, self.heads)
        return k.contiguous(), v.contiguous()


def _by_head(x: Tensor, heads: int) -> Tensor:
    """Tokens [B, N, width] as [B, heads, N, head_dim]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
