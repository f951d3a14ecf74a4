"""Rotary position tables from explicit positions.

A channel pair (a, b) of a query or key is turned by an angle; a query then sees a key through the difference of
their angles only (Su et al., 2021). Positions may be any real numbers: ranks in a window, ray directions, points.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def angles(position: Tensor, frequencies: Sequence[float]) -> Tensor:
    """Angles [..., len(frequencies)] in radians of positions [...]: position x frequency."""
    table = torch.tensor(list(frequencies), dtype=position.dtype)
    return position[..., None] * table.to(position.device, non_blocking=True)  # else the GPU would be waited for


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel pairs (i, i + E/2) of x [..., E] by angles whose cosines and sines are [..., E/2]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
