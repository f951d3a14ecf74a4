"""Shapes of attention in real models, on their real grids of tokens, and structured data to run them on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from worldstride.attention.layout import STYLES, Grid, Layout, Style, runs
from worldstride.attention.measuring import Size


@dataclass(frozen=True)
class Case:
    """One attention of a real model."""

    name: str
    batch: int
    heads: int
    queries: Grid
    tile: Grid
    history: Grid
    """Grid of the keys among which blocks are chosen."""
    current: Grid | None = None
    """Grid of the keys that are always attended to."""
    text: int = 0
    """Text keys, always attended to."""
    channels: int = 128
    densities: tuple[float, ...] = (0.17, 0.25, 0.31, 0.5, 1.0)

    def layouts(self, style: Style) -> tuple[Layout, list[Layout]]:
        """Layout of the queries, and of each span of keys."""
        make = STYLES[style]
        spans = [make(self.history, self.tile)]
        if self.current is not None:
            spans.append(make(self.current, self.tile).always())
        if self.text:
            spans.append(runs(self.text).always())
        return make(self.queries, self.tile), spans

    @property
    def kept(self) -> int:
        """Keys that are always attended to."""
        return (0 if self.current is None else math.prod(self.current)) + self.text

    @property
    def keys(self) -> int:
        """Keys."""
        return math.prod(self.history) + self.kept

    @property
    def size(self) -> Size:
        """What dense attention is measured at."""
        return Size(self.channels, self.batch * self.heads, math.prod(self.queries), self.keys)

    def keep(self, density: float) -> float | None:
        """Share of the history that makes a density; None where what is always kept is denser by more than a hair."""
        share = (density * self.keys - self.kept) / math.prod(self.history)
        return min(1.0, max(0.0, share)) if share > -0.01 else None


def _decode(latents: int) -> Case:
    return Case(
        f"HY-WorldPlay chunk, {latents} latents", 2, 16, (4, 30, 52), (4, 8, 4), (latents - 4, 30, 52), (4, 30, 52)
    )


CASES: tuple[Case, ...] = (
    _decode(8),
    _decode(12),
    _decode(16),
    _decode(24),
    Case("HY-WorldPlay context pass", 2, 16, (20, 30, 52), (4, 8, 4), (20, 30, 52), None, 930),
    Case("Matrix-Game-3.0 whole sequence", 1, 24, (19, 22, 40), (4, 4, 8), (19, 22, 40)),
    Case("Matrix-Game-3.0 new latents", 1, 24, (10, 22, 40), (4, 4, 8), (19, 22, 40)),
    Case("Cosmos 720p", 1, 16, (24, 44, 80), (4, 8, 4), (24, 44, 80)),
)
"""Matrix-Game-3.0 and Cosmos attend within one sequence, so no key is kept beforehand, as published for the former."""


def structured(
    grid: Grid, heads: int, channels: int, seed: int, later: int = 0, batch: int = 1, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Queries and keys [batch, heads, N, channels] in natural order, float32, as a video's: smooth, moving, per head.

    A token's features are waves over the picture that move with time (content), and waves of its place and time
    (nearness); heads mix and sharpen them differently, and each token adds noise. Two calls with one seed belong to one
    video, the second's latents `later` than the first's.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw).to(device)

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=draw).to(device)

    axes = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
    places = torch.stack(axes, -1).view(-1, 3).float() + torch.tensor([float(later), 0.0, 0.0], device=device)
    area = places / torch.tensor([1.0, 30.0, 52.0], device=device)
    waves, half = channels // 4, channels // 2
    drift = area[:, 1:] + 0.05 * area[:, :1] * normal(1, 2)
    content = drift @ (12 * normal(2, waves)) + 2 * math.pi * uniform(waves)
    scales = torch.tensor([[0.35], [9.0], [9.0]], device=device)
    nearness = area @ (scales * normal(3, waves)) + 2 * math.pi * uniform(waves)
    features = torch.cat([content.cos(), content.sin(), nearness.cos(), nearness.sin()], -1)  # [N, channels]
    balance, sharp = uniform(heads, 1), 1.2 + 1.8 * uniform(heads, 1)
    weight = sharp * torch.cat([balance.expand(-1, half), 1 - balance.expand(-1, half)], -1).sqrt()
    turn = torch.linalg.qr(normal(heads, channels, channels))[0]
    base = (features * weight[:, None]) @ turn  # [heads, N, channels]
    noise = torch.Generator(device).manual_seed(seed * 7919 + later + 1)
    q, k = (base + 0.5 * torch.randn(batch, *base.shape, generator=noise, device=device) for _ in range(2))
    return q, k + 0.5 * normal(heads, 1, channels)
