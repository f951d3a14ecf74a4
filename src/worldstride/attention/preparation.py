"""From what a projection gives to what block-sparse attention wants: normed, turned, in block order, summarised.

One kernel does it in one pass on a GPU with Triton; written out in torch everywhere else. Keys and values of the
context are prepared once a chunk and layer into a cache; a step adds those of its own tokens behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worldstride.attention import ops
from worldstride.attention.layout import Layout, join
from worldstride.attention.selection import PARTS, Summary, likeness, summarise, unit_sums
from worldstride.errors import InputError


@dataclass(frozen=True, eq=False)
class Preparation:
    """What happens to queries and keys between the projection and attention; nothing by default."""

    weight: Tensor | None = None
    """Weights of the RMS norm over a head's channels, [E] or [H, E]; None for no norm."""
    angles: Tensor | None = None
    """Cosine and sine of every channel pair's rotary angle side by side, in natural order, [N, E] or [B, N, E]: see
    `turning`. None for no rotation."""
    interleaved: bool = True
    """Whether channels 2i and 2i + 1 are a pair (HunyuanVideo, Wan), or i and i + E / 2."""
    eps: float = 1e-6
    """Added to the mean square before its root."""

    def __call__(self, x: Tensor) -> Tensor:
        """x [B, H, N, E] normed and turned in float32, in the precision it came in."""
        wide = x.float()
        if self.weight is not None:
            weight = self.weight[:, None] if self.weight.dim() == 2 else self.weight
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * weight.float()
        if self.angles is not None:
            turn = (self.angles[:, None] if self.angles.dim() == 3 else self.angles).float()
            cos, sin = turn[..., 0::2], turn[..., 1::2]
            a, b = (wide[..., 0::2], wide[..., 1::2]) if self.interleaved else wide.chunk(2, -1)
            a, b = a * cos - b * sin, a * sin + b * cos
            wide = torch.stack([a, b], -1).flatten(-2) if self.interleaved else torch.cat([a, b], -1)
        return wide.to(x.dtype)

    def check(self, x: Tensor) -> None:
        """Raise `InputError` where norm or angles do not fit x [B, H, N, E]."""
        batch, heads, tokens, channels = x.shape
        if self.weight is not None and self.weight.shape not in ((channels,), (heads, channels)):
            raise InputError(
                f"norm weights must be [{channels}] or [{heads}, {channels}], got {tuple(self.weight.shape)}"
            )
        fits = ((tokens, channels), (batch, tokens, channels), (1, tokens, channels))
        if self.angles is not None and (self.angles.shape not in fits or self.angles.stride(-1) != 1):
            raise InputError(
                f"angles must be one of {', '.join(map(str, fits))}, channels innermost, got {tuple(self.angles.shape)}"
            )


def turning(cos: Tensor, sin: Tensor) -> Tensor:
    """`Preparation.angles` [..., N, E] from cosines and sines [..., N, E / 2]."""
    return torch.stack([cos, sin], -1).flatten(-2)


PLAIN = Preparation()


@dataclass(frozen=True, eq=False)
class Blocks:
    """Tokens in block order with the summary of their blocks."""

    x: Tensor
    """[B, H, N, E]"""
    summary: Summary


def prepare_queries(
    x: Tensor, layout: Layout, preparation: Preparation = PLAIN, parts: int = PARTS, alike: bool = False
) -> Blocks:
    """Queries [B, H, N, E] in natural order, channels innermost, as `preparation` says and in block order."""
    _fits(x, layout, preparation)
    if ops.usable("triton", x):
        ready = preparation(x)[:, :, layout.order]
        return Blocks(ready, summarise(ready, layout, parts, alike))
    batch, heads, tokens, channels = x.shape
    out = torch.empty(batch, heads, tokens, channels, device=x.device, dtype=x.dtype)
    means = torch.empty(batch, heads, layout.blocks, parts, channels, device=x.device, dtype=x.dtype)
    units = torch.empty(means.shape, device=x.device) if alike else None
    _launch(x, None, layout, preparation, out, None, means, units, 0, 0)
    return Blocks(out, Summary(means, None if units is None else likeness(units, layout)))


class KeyCache:
    """Keys and values of one layer in block order, with summaries: spans of tokens one after the other, none copied."""

    def __init__(
        self, spans: Sequence[Layout], batch: int, heads: int, channels: int, dtype: torch.dtype, parts: int = PARTS,
        alike: bool = False, joined: Layout | None = None,
    ) -> None:  # fmt: skip
        """Room for the spans' tokens.

        Args:
            spans: layouts of the spans in the order of their places; `always()` marks what every query attends to.
            batch: worlds (times streams).
            heads: heads.
            channels: channels of a head.
            dtype: precision of keys and values.
            parts: parts of a block whose means are kept.
            alike: know how alike a block's tokens are, for a rule with a guard.
            joined: `join(spans)`, where it is known: joining waits for a GPU.
        """
        self.spans, self.layout = tuple(spans), join(spans) if joined is None else joined
        device, tokens, blocks = self.layout.starts.device, self.layout.tokens, self.layout.blocks
        self.k = torch.empty(batch, heads, tokens, channels, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)  # a kernel reads what lies behind a block's last row, and weighs it by zero
        self.means = torch.empty(batch, heads, blocks, parts, channels, device=device, dtype=dtype)
        self.units = torch.empty(self.means.shape, device=device) if alike else None
        """Sums of unit vectors of each part, where `alike` was asked for."""

    @property
    def summary(self) -> Summary:
        """Summary of all blocks."""
        return Summary(self.means, None if self.units is None else likeness(self.units, self.layout))

    @property
    def bytes(self) -> int:
        """Bytes that are held."""
        return sum(t.numel() * t.element_size() for t in (self.k, self.v, self.means, self.units) if t is not None)

    def write(self, span: int, k: Tensor, v: Tensor, preparation: Preparation = PLAIN) -> None:
        """Fill one span from its keys and values [B, H, N, E] in natural order, channels innermost."""
        layout = self.spans[span]
        _fits(k, layout, preparation)
        if v.stride(-1) != 1:
            raise InputError(f"values must have channels innermost, got strides {v.stride()}")
        if v.shape != k.shape or k.shape[:2] != self.k.shape[:2] or k.shape[3] != self.k.shape[3]:
            raise InputError(
                f"keys {tuple(k.shape)} and values {tuple(v.shape)} must be alike and fit the cache's "
                f"{tuple(self.k.shape)}"
            )
        at, block = (sum(getattr(s, of) for s in self.spans[:span]) for of in ("tokens", "blocks"))
        if not ops.usable("triton", k):
            _launch(k, v, layout, preparation, self.k, self.v, self.means, self.units, at, block)
            return
        ready = preparation(k)[:, :, layout.order].to(self.k.dtype)
        self.k[:, :, at : at + layout.tokens] = ready
        self.v[:, :, at : at + layout.tokens] = v[:, :, layout.order]
        some, parts = slice(block, block + layout.blocks), self.means.shape[3]
        self.means[:, :, some] = summarise(ready, layout, parts).means
        if self.units is not None:
            self.units[:, :, some] = unit_sums(ready, layout, parts)


def _launch(
    x: Tensor, v: Tensor | None, layout: Layout, how: Preparation, out: Tensor, v_out: Tensor | None, means: Tensor,
    units: Tensor | None, at: int, block: int,
) -> None:  # fmt: skip
    ops.prepare_blocks(
        x, v, how.weight, how.angles, layout.order, layout.starts, out, v_out, means, units, at, block,
        how.interleaved, how.eps,
    )  # fmt: skip


def _fits(x: Tensor, layout: Layout, preparation: Preparation) -> None:
    if x.dim() != 4 or x.shape[2] != layout.tokens or x.stride(3) != 1:
        raise InputError(
            f"tokens must be [B, H, {layout.tokens}, E] for their layout, channels innermost, got {tuple(x.shape)} "
            f"with strides {x.stride()}"
        )
    preparation.check(x)
