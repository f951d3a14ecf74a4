"""Random draws for worlds and walks: one generator, any device, and pairs of clearly different colours."""

from __future__ import annotations

import torch
from torch import Tensor


class Dice:
    """Draws on the generator's device and hands the numbers over on `device`.

    A CPU generator gives the same world on every machine; a CUDA one samples thousands of worlds without a
    copy.
    """

    def __init__(self, device: torch.device | str, generator: torch.Generator | None) -> None:
        self.device = torch.device(device)
        self.generator = generator

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform numbers in [low, high), float32 of `shape`."""
        where = self.generator.device if self.generator is not None else self.device
        draw = torch.rand(*shape, device=where, generator=self.generator).to(self.device)
        return low + (high - low) * draw

    def integers(self, count: int, *shape: int) -> Tensor:
        """Whole numbers 0 .. count - 1, int64 of `shape`."""
        return (self.uniform(*shape) * count).long().clamp_max(count - 1)

    def sign(self, *shape: int) -> Tensor:
        """-1.0 or +1.0 with equal chance."""
        return torch.where(self.uniform(*shape) < 0.5, 1.0, -1.0)

    def permutation(self, batch: int, count: int) -> Tensor:
        """An independent order of 0 .. count - 1 for every world, int64 [batch, count]."""
        return self.uniform(batch, count).argsort(1)

    def pair(self, batch: int, count: int, saturation: float = 0.35, value: float = 0.35) -> Tensor:
        """Two clearly different colours for each of `count` surfaces, [batch, count, 2, 3] in [0, 1]."""
        hue = self.uniform(batch, count)
        span = 1 - saturation
        first = hsv(hue, saturation + span * self.uniform(batch, count), 0.62 + 0.38 * self.uniform(batch, count))
        other = (hue + 0.15 + 0.5 * self.uniform(batch, count)) % 1
        dark = value * 0.7 + 0.4 * self.uniform(batch, count)
        second = hsv(other, saturation + span * self.uniform(batch, count), dark)
        return torch.stack([first, second], 2)

    def sky(self, batch: int) -> Tensor:
        """Colours of the horizon and the zenith, [batch, 2, 3]."""
        hue, grey, light = self.uniform(batch, 2), self.uniform(batch, 2), self.uniform(batch, 2)
        return hsv(hue, 0.1 + 0.6 * grey, 0.55 + 0.45 * light)


def hsv(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """RGB [..., 3] of hue, saturation and value [...], all in [0, 1]."""
    k = (torch.tensor([5.0, 3.0, 1.0], device=hue.device) + hue[..., None] * 6) % 6
    return value[..., None] - (value * saturation)[..., None] * torch.minimum(k, 4 - k).clamp(0, 1)
