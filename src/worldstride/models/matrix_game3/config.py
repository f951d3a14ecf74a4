"""Sizes of Matrix-Game-3.0's transformer (specification, section 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from worldstride.errors import InputError, integer_from, number_in

PATCH = 2
"""Rows and columns of a latent that make one token."""
PIXELS = 16
KEYS, MOUSE = 6, 2
"""Numbers that the keyboard and the mouse give a frame."""
FRAMES = 4
"""Frames of a latent."""
SEEN = 3 * FRAMES
"""Frames whose actions a latent is told."""


@dataclass(frozen=True)
class MG3Config:
    """Every number that fixes the network; the defaults are the published 5B models'."""

    channels: int = 48
    """Channels of a latent."""
    pixels: int = 16
    """Pixels of a latent pixel's height and width."""
    width: int = 3072
    """Channels of a token."""
    heads: int = 24
    depth: int = 30
    """Blocks."""
    hidden: int = 14336
    """Channels inside the MLPs."""
    frequencies: int = 256
    """Channels of the sinusoidal embedding of noise levels."""
    text: int = 4096
    """Channels of umT5's states."""
    rows: int = 512
    """Rows of text, padding included, all of which are attended to."""
    steered: tuple[int, ...] = tuple(range(15))
    """Blocks that are told actions."""
    action_width: int = 1024
    """Channels of a token where it is told actions."""
    action_heads: int = 16
    key_width: int = 128
    """Channels of a frame's embedded keyboard."""
    turned: int = 8
    """Channels of an action head that turn with time."""
    action_theta: float = 256.0
    """Base of their frequencies."""
    theta: float = 10_000.0
    """Base of the rotary frequencies of self-attention, in the middle of the heads."""
    spread: float = 0.8
    """Share by which the base differs from it in the first and last head, smaller and greater."""
    eps: float = 1e-6
    """Of norms."""

    def __post_init__(self) -> None:
        whole = ("channels", "pixels", "width", "heads", "depth", "hidden", "frequencies", "text", "rows")
        for name in (*whole, "action_width", "action_heads", "key_width", "turned"):
            integer_from(name, getattr(self, name), 1)
        for name in ("theta", "action_theta", "eps"):
            number_in(name, getattr(self, name), 0, math.inf, open_low=True)
        number_in("spread", self.spread, 0, 0.999)
        for width, heads in ((self.width, self.heads), (self.action_width, self.action_heads)):
            if width % heads or width // heads % 2:
                raise InputError(f"heads must share the width in even parts, got {width} for {heads} heads")
        if self.turned % 2 or self.turned > self.action_width // self.action_heads:
            most = self.action_width // self.action_heads
            raise InputError(f"turned must be even and at most an action head's {most} channels, got {self.turned}")
        if self.frequencies % 2:
            raise InputError(f"frequencies must be even, got {self.frequencies}")
        if sorted({*self.steered}) != list(self.steered) or not all(0 <= i < self.depth for i in self.steered):
            raise InputError(f"steered must name blocks 0 to {self.depth - 1} in order, got {self.steered}")

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.width // self.heads

    @property
    def rope(self) -> tuple[int, int, int]:
        """Channel pairs of a head that turn with latent, row and column: thirds, and the rest to the latent."""
        pairs = self.head_dim // 2
        return pairs - 2 * (pairs // 3), pairs // 3, pairs // 3

    @property
    def side(self) -> int:
        """Pixels of a token's height and width."""
        return self.pixels * PATCH

    @property
    def camera(self) -> int:
        """Numbers that tell a token the rays of its pixels: origins and directions."""
        return 6 * self.side**2
