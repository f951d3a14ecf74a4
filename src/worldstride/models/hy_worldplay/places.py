"""Where tokens are: rotary angles of a grid, and projective matrices of cameras.

Every token attends in two streams. In the first, queries and keys turn with their place in the window (three axes,
Su et al., 2021). In the second they are carried into a frame common to all cameras by their own camera's projection
matrix P (PRoPE, Li et al., 2025, arXiv 2507.10496): q P^T, P^-1 k and P^-1 v, and P maps the result back, so that only
relative projections count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from worldstride import camera, rope


class Places(NamedTuple):
    """Places of T latents' tokens, latent after latent."""

    cos: Tensor
    """Cosines of rotary angles, float32 [N, head_dim / 2]."""
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


def rotary_table(
    ranks: Tensor, rows: int, columns: int, channels: Sequence[int], theta: float
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T rows columns, sum(channels) / 2] of latents at ranks [T], by latent, row and column.

    `channels` names a head's channels for each of the three axes; pairs of an axis turn by position theta^(-2 i / n).
    """
    device = ranks.device
    axes = torch.meshgrid(
        ranks.double(), torch.arange(rows, device=device).double(), torch.arange(columns, device=device).double(),
        indexing="ij",
    )  # fmt: skip
    parts = [
        rope.angles(axis.flatten(), [theta ** (-2 * i / n) for i in range(n // 2)])
        for axis, n in zip(axes, channels, strict=True)
    ]
    turn = torch.cat(parts, -1)
    return turn.cos().float(), turn.sin().float()


def projections(cameras: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """P and P^-1, float32 [..., 4, 4], of cameras-to-world [..., 4, 4] with normalised intrinsics [..., 3, 3].

    P is the diagonal of the focal lengths times world-to-camera; the principal point does not enter.
    """
    cameras, focal = cameras.float(), intrinsics.float().diagonal(dim1=-2, dim2=-1)[..., :2]
    scale = torch.cat([focal, torch.ones_like(focal)], -1)
    return scale[..., :, None] * camera.invert(cameras), cameras / scale[..., None, :]


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
    return torch.cat([turn(q, at.cos, at.sin), carry(q, at.project.mT)])


def of_keys(k: Tensor, v: Tensor, at: Places) -> tuple[Tensor, Tensor]:
    """Keys and values [B, heads, N, E] of both streams, likewise."""
    keys = torch.cat([turn(k, at.cos, at.sin), carry(k, at.unproject)])
    return keys, torch.cat([v, carry(v, at.unproject)])


def back(out: Tensor, at: Places) -> Tensor:
    """Attention's results [2 B, heads, N, E] of both streams as tokens [B, N, 2 heads E], first stream first."""
    turned, carried = out.chunk(2)
    both = torch.cat([turned, carry(carried, at.project)], 1)  # [B, 2 heads, N, E]
    return both.transpose(1, 2).flatten(2)
