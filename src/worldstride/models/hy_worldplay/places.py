"""Where tokens are: rotary angles of a grid, and projective matrices of cameras."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from worldstride import camera, rope


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
    angles = torch.cat(parts, -1)
    return angles.cos().float(), angles.sin().float()


def projections(cameras: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """P and P^-1, float32 [..., 4, 4], of cameras-to-world [..., 4, 4] with normalised intrinsics [..., 3, 3].

    P is the diagonal of the focal lengths times world-to-camera; the principal point does not enter.
    """
    cameras, focal = cameras.float(), intrinsics.float().diagonal(dim1=-2, dim2=-1)[..., :2]
    scale = torch.cat([focal, torch.ones_like(focal)], -1)
    return scale[..., :, None] * camera.invert(cameras), cameras / scale[..., None, :]
