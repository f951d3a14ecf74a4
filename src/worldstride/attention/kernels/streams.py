"""Tokens placed for two streams of attention in one pass, in Triton: some tokens of one head a program.

One stream turns channel pairs (2 i, 2 i + 1) by rotary angles, the other multiplies every four channels by a matrix of
the token's latent; written out in torch that reads and writes everything several times.
"""

# A compiler reads this, not Python: types of values are its own.
# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32
"""Tokens of a program."""


@triton.jit
def place(
    x,  # [B, H, N, E] of any strides with channels innermost
    cos, sin,  # [N, E / 2]
    matrices,  # [B, T, 4, 4], of N / T tokens each
    turned, carried,  # [B, H, N, E] of any strides likewise
    heads, tokens, latents, each,
    x_b, x_h, x_n, turned_b, turned_h, turned_n, carried_b, carried_h, carried_n,
    FIRST: tl.constexpr, TURN: tl.constexpr, SECOND: tl.constexpr, CARRY: tl.constexpr,
    E: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """FIRST and SECOND say which stream is written; without TURN or CARRY it is written as it came."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    own = rows < tokens
    n = tl.where(own, rows, 0).to(tl.int64)
    e = tl.arange(0, E)
    mask = own[:, None]
    raw = tl.load(x + b * x_b + h * x_h + n[:, None] * x_n + e[None, :], mask=mask, other=0.0)
    quads = raw.to(tl.float32).reshape(BM, E // 4, 2, 2)
    even, odd = quads.split()
    x0, x2 = even.split()
    x1, x3 = odd.split()
    dtype = turned.dtype.element_ty
    if FIRST:
        at = turned + b * turned_b + h * turned_h + n[:, None] * turned_n + e[None, :]
        if TURN:
            pair = tl.arange(0, E // 2)
            table = n[:, None] * (E // 2) + pair[None, :]
            c0, c1 = tl.load(cos + table, mask=mask, other=0.0).reshape(BM, E // 4, 2).split()
            s0, s1 = tl.load(sin + table, mask=mask, other=0.0).reshape(BM, E // 4, 2).split()
            even = tl.join(x0 * c0 - x1 * s0, x2 * c1 - x3 * s1)
            odd = tl.join(x0 * s0 + x1 * c0, x2 * s1 + x3 * c1)
            tl.store(at, tl.join(even, odd).reshape(BM, E).to(dtype), mask=mask)
        else:
            tl.store(at, raw, mask=mask)
    if SECOND:
        at = carried + b * carried_b + h * carried_h + n[:, None] * carried_n + e[None, :]
        if CARRY:
            m = matrices + (b * latents + n // each)[:, None] * 16
            y0 = x0 * tl.load(m) + x1 * tl.load(m + 1) + x2 * tl.load(m + 2) + x3 * tl.load(m + 3)
            y1 = x0 * tl.load(m + 4) + x1 * tl.load(m + 5) + x2 * tl.load(m + 6) + x3 * tl.load(m + 7)
            y2 = x0 * tl.load(m + 8) + x1 * tl.load(m + 9) + x2 * tl.load(m + 10) + x3 * tl.load(m + 11)
            y3 = x0 * tl.load(m + 12) + x1 * tl.load(m + 13) + x2 * tl.load(m + 14) + x3 * tl.load(m + 15)
            even, odd = tl.join(y0, y2), tl.join(y1, y3)
            tl.store(at, tl.join(even, odd).reshape(BM, E).to(dtype), mask=mask)
        else:
            tl.store(at, raw, mask=mask)


def launch(
    x: Tensor, table: tuple[Tensor, Tensor] | None, matrices: Tensor | None, first: Tensor | None, second: Tensor | None
) -> None:
    """Write x [B, H, N, E] into `first`, turned by a table if there is one, and into `second`, carried by matrices."""
    batch, heads, tokens, channels = x.shape
    if not tokens:
        return
    some = first if first is not None else second
    one, other = (some if t is None else t for t in (first, second))
    if one is None or other is None:
        raise ValueError("one of the streams must be written")
    cos, sin = (x, x) if table is None else (t.contiguous() for t in table)
    latents = 1 if matrices is None else matrices.shape[1]
    matrices = x if matrices is None else matrices.contiguous()
    carries = matrices is not x
    kernel: Any = place
    with torch.cuda.device_of(x):
        kernel[(-(-tokens // ROWS), batch * heads)](
            x, cos, sin, matrices, one, other, heads, tokens, latents, tokens // latents,
            *x.stride()[:3], *one.stride()[:3], *other.stride()[:3], FIRST=first is not None, TURN=table is not None,
            SECOND=second is not None, CARRY=carries, E=channels, BM=ROWS, num_warps=4,
        )  # fmt: skip
