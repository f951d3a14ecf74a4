"""Queries, or keys and values, made ready in one pass, in Triton: a part of a block and a few heads a program.

Tokens are read in natural order wherever the projection left them, normed (RMS), turned by rotary angles, and written
in block order; the mean of every part of their block is written beside them. A chunk's keys and values go through this
once for each layer, not once for each solver step. Heads of a program share their rotary angles.
"""

# A compiler reads this, not Python: types of values are its own.
# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _halves(x, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, E: tl.constexpr):
    """The first and the second of every channel pair, [ROWS, E / 2] each."""
    if INTERLEAVED:
        return x.reshape(ROWS, E // 2, 2).split()
    return x.reshape(ROWS, 2, E // 2).permute(0, 2, 1).split()


@triton.jit
def _whole(a, b, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, E: tl.constexpr):
    """Undo `_halves`."""
    both = tl.join(a, b)
    return both.reshape(ROWS, E) if INTERLEAVED else both.permute(0, 2, 1).reshape(ROWS, E)


@triton.jit
def prepare(
    x, v,  # [B, H, N, E] of any strides with channels innermost, natural order
    weight, angles,  # [H or 1, E]; cosine and sine of every pair side by side [B or 1, N, E], natural order
    order, starts,  # [N], [M + 1]
    out, v_out,  # [B, H, capacity, E], written from row `at` on
    means, units,  # [B, H, block capacity, PARTS, E]: means, and sums of unit vectors in float32, from block `block_at`
    heads, at, block_at, block_capacity, eps,
    x_b, x_h, x_n, v_b, v_h, v_n, out_b, out_h, v_out_b, v_out_h, weight_h, angle_b, angle_n,
    HAS_V: tl.constexpr, HAS_NORM: tl.constexpr, HAS_ANGLES: tl.constexpr, HAS_UNITS: tl.constexpr,
    INTERLEAVED: tl.constexpr, PARTS: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`out` and the like may be a cache that holds more: other rows and blocks are left as they are."""
    ROWS: tl.constexpr = BM // PARTS
    i = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    b = tl.program_id(2).to(tl.int64)
    first = tl.load(starts + i)
    size = tl.load(starts + i + 1) - first
    low = (part * size + PARTS - 1) // PARTS
    count = ((part + 1) * size + PARTS - 1) // PARTS - low
    own = count > 0
    low = tl.where(own, low, 0)  # a part without tokens, of a block of few, takes the block's mean
    count = tl.where(own, count, size)
    dtype = out.dtype.element_ty
    lane = tl.arange(0, ROWS)
    e = tl.arange(0, E)
    mask = (lane < count)[:, None]
    writes = mask & own
    row = tl.load(order + first + low + lane, mask=lane < count, other=0).to(tl.int32)  # of one head: 32 bits do
    if HAS_ANGLES:
        turn = tl.load((angles + b * angle_b) + (row[:, None] * angle_n + e[None, :]), mask=mask, other=0.0)
        c, s = turn.to(tl.float32).reshape(ROWS, E // 2, 2).split()
    to = (at + first + low + lane)[:, None] * E + e[None, :]
    for member in range(GROUP):
        h = (tl.program_id(1) * GROUP + member).to(tl.int64)
        y = tl.load((x + b * x_b + h * x_h) + (row[:, None] * x_n + e[None, :]), mask=mask, other=0.0).to(tl.float32)
        if HAS_V:
            value = tl.load((v + b * v_b + h * v_h) + (row[:, None] * v_n + e[None, :]), mask=writes, other=0.0)
        if HAS_NORM:
            gain = tl.load(weight + h * weight_h + e).to(tl.float32)
            y = y * tl.rsqrt(tl.sum(y * y, 1) / E + eps)[:, None] * gain[None, :]
        if HAS_ANGLES:
            p, q = _halves(y, INTERLEAVED, ROWS, E)
            y = _whole(p * c - q * s, p * s + q * c, INTERLEAVED, ROWS, E)
        y = y.to(dtype)
        tl.store((out + b * out_b + h * out_h) + to, y, mask=writes)
        if HAS_V:
            tl.store((v_out + b * v_out_b + h * v_out_h) + to, value.to(dtype), mask=writes)
        # the summary is of what was written; rows beyond the last are zero
        y = y.to(tl.float32)
        slot = ((b * heads + h) * block_capacity + block_at + i) * PARTS + part
        tl.store(means + slot * E + e, (tl.sum(y, 0) / count).to(dtype))
        if HAS_UNITS:
            unit = y * tl.rsqrt(tl.maximum(tl.sum(y * y, 1), 1e-20))[:, None]
            tl.store(units + slot * E + e, tl.where(own, tl.sum(unit, 0), 0.0))
