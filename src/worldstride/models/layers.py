"""Pieces that transformers of several models are made of."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FREQUENCIES = 256
"""Channels of the sinusoidal embedding of noise levels and action labels."""


class Embedder(nn.Module):
    """A number (noise level in thousandths, or action label) as a token's channels."""

    def __init__(self, width: int, frequencies: int = FREQUENCIES) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(frequencies, width), nn.Linear(width, width)

    def forward(self, numbers: Tensor) -> Tensor:
        """Numbers [...] -> [..., width], in the weights' precision."""
        half = self.first.in_features // 2
        steps = torch.arange(half, device=numbers.device, dtype=torch.float32)
        wave = numbers.float()[..., None] * torch.exp(-math.log(10_000) / half * steps)
        waves = torch.cat([wave.cos(), wave.sin()], -1).to(self.first.weight.dtype)
        return self.second(F.silu(self.first(waves)))


class MLP(nn.Module):
    """Two linear layers."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width], through the tanh form of GELU."""
        return self.down(F.gelu(self.up(x), approximate="tanh"))


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """Root-mean-square norm over the last dimension, in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * scale


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without parameters, in float32, then scale and shift; x [B, N, width], the others [B, T, width].

    The N tokens are T latents' with as many each: one row of modulation a latent, and none a token.
    """
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6).to(x.dtype).unflatten(1, (shift.shape[1], -1))
    return (normed * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2)


def gated(x: Tensor, added: Tensor, gate: Tensor) -> Tensor:
    """x + gate * added; x and added [B, N, width], gate [B, T, width]."""
    return x + (added.unflatten(1, (gate.shape[1], -1)) * gate[:, :, None]).flatten(1, 2)


def merged(out: Tensor) -> Tensor:
    """Attention's result [B, heads, N, E] as tokens [B, N, heads E]."""
    return out.transpose(1, 2).flatten(2)
