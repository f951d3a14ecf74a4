"""Noise as a pure function of seed, chunk and draw: the same on every device, and nothing to save but numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def stream(*key: int) -> torch.Generator:
    """A CPU generator whose state depends on the key alone; different keys give unrelated streams."""
    state = np.random.SeedSequence([k & (2**64 - 1) for k in key]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 ^ int(state[1]))


def normal(shape: Sequence[int], *key: int) -> Tensor:
    """Standard normal noise of a shape, float32 on the CPU, fixed by the key (seed, chunk, draw)."""
    return torch.randn(*shape, generator=stream(*key))
