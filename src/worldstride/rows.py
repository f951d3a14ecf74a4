"""Some worlds of a batch, picked without waiting for a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(values: Sequence[int] | Sequence[float], device: torch.device) -> Tensor:
    """Numbers as a tensor [N]; a tensor made on a GPU at once would wait for all the work in its queue."""
    return torch.tensor(values).to(device, non_blocking=True)


def rows_of(x: Tensor, rows: Sequence[int] | None) -> Tensor:
    """Worlds `rows` of x [B, ...]; None is all of them."""
    return x if rows is None else x.index_select(0, on_device(rows, x.device))
