"""What training minimises: noise laid over frames, and the error of predicted frames. Pure, so that it compiles."""

from __future__ import annotations

import torch
from torch import Tensor

from worldstride.models.courtyard.codec import from_levels
from worldstride.models.courtyard.config import CourtyardConfig


def noised(levels: Tensor, noise: Tensor, amount: Tensor) -> tuple[Tensor, Tensor]:
    """Frames uint8 [lead, ...] with `amount` [lead] of the noise laid over, and without: both in the noise's precision.

    (1 - amount) frame + amount noise, computed in float32.
    """
    clean = from_levels(levels)
    wide = amount.reshape(amount.shape + (1,) * (levels.ndim - amount.ndim))
    return torch.lerp(clean, noise.float(), wide).to(noise.dtype), clean.to(noise.dtype)


def errors(config: CourtyardConfig, predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared error [B, R] of patches [B, R, C, n, values], and mean squared jump of it across patch borders.

    The jump is a quadratic form of the error like the squared error itself, so its best prediction is the same
    conditional mean and sampling stays right; it only makes errors that end at a border dearer.
    """
    difference = predicted.float() - target.float()
    cells = difference.unflatten(-2, config.grid).unflatten(-1, (3, *config.patch))  # [B, R, C, rows, cols, 3, h, w]
    across = cells[:, :, :, :, 1:, :, :, 0] - cells[:, :, :, :, :-1, :, :, -1]
    down = cells[:, :, :, 1:, :, :, 0] - cells[:, :, :, :-1, :, :, -1]
    jump = (across.square().flatten(2).mean(2) + down.square().flatten(2).mean(2)) / 2
    return difference.square().mean((2, 3, 4)), jump
