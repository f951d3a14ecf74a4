"""The projection that blocks of both streams of HY-WorldPlay's transformer begin with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from worldstride.models.layers import rms_norm


class Projection(nn.Module):
    """Queries, keys and values from tokens; queries and keys normed over a head's channels."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(width, 3 * width)
        self.q_scale, self.k_scale = (nn.Parameter(torch.ones(width // heads)) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, N, width] -> three times [B, heads, N, head_dim]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        return rms_norm(q, self.q_scale), rms_norm(k, self.k_scale), v
