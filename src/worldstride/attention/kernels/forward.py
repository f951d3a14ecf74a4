"""Attention to listed blocks of keys, in Triton: one program a block of queries and head.

Online softmax in base 2 (Dao, 2023, arXiv 2307.08691). The list has full blocks first, so that their loop carries no
mask; the few blocks with fewer keys come last, and rows beyond their last key, which belong to another block or to
nobody, never enter the softmax. Where the next block begins is read an iteration ahead of its use.
"""

# A compiler reads this, not Python: types of values are its own.
# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _step(
    q, k_desc, v_desc, bias, b, h, start, length, acc, m, l, scale,
    MASKED: tl.constexpr, HAS_BIAS: tl.constexpr, BN: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """One block of keys: the sums so far, brought up to date."""
    k = k_desc.load([b, h, start, 0]).reshape(BN, E)
    s = tl.dot(q, k.T, input_precision="ieee")  # [BM, BN]
    lane = tl.arange(0, BN)
    if HAS_BIAS:
        extra = tl.load(bias + start + lane, mask=lane < length, other=0.0).to(tl.float32)
        s = s * scale + (extra * LOG2E)[None, :]
        unit = 1.0
    else:
        unit = scale  # folded into the exponent: one multiplication and addition a score
    if MASKED:
        s = tl.where(lane[None, :] < length, s, -float("inf"))
    new = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s * unit - (new * unit)[:, None])
    fade = tl.exp2((m - new) * unit)
    l = l * fade + tl.sum(p, 1)
    v = v_desc.load([b, h, start, 0]).reshape(BN, E)
    if MASKED:
        v = tl.where(lane[:, None] < length, v, 0.0)  # zero times what is no number would be none
    acc = acc * fade[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, new, l


@triton.jit
def forward(
    q_desc, k_desc, v_desc,  # blocks [1, 1, 128, E] of [B, H, N, E]
    out, lse,  # [B, H, Nq, E] of any strides, [B, H, Nq]
    blocks, counts,  # [B, H, Mq, width], [B, H, Mq, 2]
    q_starts, k_starts,  # [Mq + 1], [Mk + 1]
    rows, bias,  # natural index of each row [Nq]; [B, H, Nk] of any strides
    scale, heads, tokens, width, out_b, out_h, out_n, bias_b, bias_h,
    HAS_ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """`scale` is in base 2: log2(e) / sqrt(E)."""
    i = tl.program_id(0)
    pair = tl.program_id(1)
    b = pair // heads
    h = pair % heads
    first = tl.load(q_starts + i)
    size = tl.load(q_starts + i + 1) - first
    row = pair * tl.num_programs(0) + i
    full = tl.load(counts + 2 * row)
    total = tl.load(counts + 2 * row + 1)
    listed = blocks + row.to(tl.int64) * width
    if HAS_BIAS:
        bias += b.to(tl.int64) * bias_b + h.to(tl.int64) * bias_h
    q = q_desc.load([b, h, first, 0]).reshape(BM, E)
    acc = tl.zeros([BM, E], tl.float32)
    m = tl.full([BM], -1e30, tl.float32)
    l = tl.zeros([BM], tl.float32)

    start = tl.load(k_starts + tl.load(listed, mask=full > 0, other=0))
    ahead = tl.load(listed + 1, mask=full > 1, other=0)
    for j in tl.range(0, full):
        after = tl.load(k_starts + ahead)
        ahead = tl.load(listed + j + 2, mask=j + 2 < full, other=0)
        acc, m, l = _step(q, k_desc, v_desc, bias, b, h, start, BN, acc, m, l, scale, False, HAS_BIAS, BN, E)
        start = after
    for j in tl.range(full, total, num_stages=1):
        block = tl.load(listed + j)
        start = tl.load(k_starts + block)
        length = tl.load(k_starts + block + 1) - start
        acc, m, l = _step(q, k_desc, v_desc, bias, b, h, start, length, acc, m, l, scale, True, HAS_BIAS, BN, E)

    acc = acc * tl.where(l > 0, 1.0 / l, 0.0)[:, None]
    unit = 1.0 if HAS_BIAS else scale
    lane = tl.arange(0, BM)
    inside = lane < size
    at = first + lane
    if HAS_ROWS:
        at = tl.load(rows + at, mask=inside, other=0)
    total_lse = tl.where(l > 0, m * unit * LN2 + tl.log(l), -float("inf"))
    tl.store(lse + pair.to(tl.int64) * tokens + at, total_lse, mask=inside)
    base = out + b.to(tl.int64) * out_b + h.to(tl.int64) * out_h
    place = at.to(tl.int64)[:, None] * out_n + tl.arange(0, E)[None, :]
    tl.store(base + place, acc.to(out.dtype.element_ty), mask=inside[:, None])
