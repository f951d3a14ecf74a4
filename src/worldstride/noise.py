"""Noise as a pure function of seed, chunk and draw: the same on every device, and nothing to save but numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def stream(*key: int) -> torch.Generator:
    """A CPU generator whose state depends on the key alone, up to 64 bits of each number.

    Keys of different lengths or numbers are hashed to different seeds. The generator takes 32 bits of seed, so two
    keys meet by chance once in four thousand million.
    """
    words = [len(key), *(word for k in key for word in (k & 0xFFFFFFFF, k >> 32 & 0xFFFFFFFF))]
    return torch.Generator().manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint32)[0]))


def normal(shape: Sequence[int], *key: int) -> Tensor:
    """Standard normal noise of a shape, float32 on the CPU, fixed by the key (seed, chunk, draw)."""
    return torch.randn(*shape, generator=stream(*key))
