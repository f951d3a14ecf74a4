"""Scores of blocks and the choice among them, in Triton.

Scores are products of summaries on the matrix units, 16 blocks of queries and one head a program. The choice takes one
warp a block of queries: the least score that is still chosen is found bit by bit, floats being mapped to integers in
the same order, and 32 times it is asked how much would be chosen from here on. That needs no sorting, takes counts and
shares of attention alike, never leaves the warp, and numbers come out in ascending order. Both in one kernel took four
times as long (119 microseconds in place of 30 for 49 x 293 blocks of 32 heads on an H200): a program of 16 rows has to
wait for all its warps at each of the 32 questions.
"""

# A compiler reads this, not Python: types of values are its own.
# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

TINY = tl.constexpr(1e-12)


@triton.jit
def _unit(x):
    """Rows of length one."""
    return x * tl.rsqrt(tl.maximum(tl.sum(x * x, 1), 1e-24))[:, None]


@triton.jit
def _mean(means, at, inside, PARTS: tl.constexpr, E: tl.constexpr):
    """Means [rows, E] of whole blocks, float32: parts have equal shares."""
    e = tl.arange(0, E)
    total = tl.load(means + (at * PARTS)[:, None] * E + e[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        total += tl.load(means + (at * PARTS + part)[:, None] * E + e[None, :], mask=inside[:, None], other=0.0)
    return total / PARTS


@triton.jit
def _centre(means, starts, blocks, CHUNK: tl.constexpr, PARTS: tl.constexpr, E: tl.constexpr):
    """Mean [E] of all keys of a head."""
    total = tl.zeros([E], tl.float32)
    for first in range(0, blocks, CHUNK):
        at = first + tl.arange(0, CHUNK)
        inside = at < blocks
        end = tl.load(starts + at + 1, mask=inside, other=0)
        size = end - tl.load(starts + at, mask=inside, other=0)
        total += tl.sum(_mean(means, at, inside, PARTS, E) * size.to(tl.float32)[:, None], 0)
    return total / tl.load(starts + blocks).to(tl.float32)


@triton.jit
def score(
    q_means, k_means, starts,  # [B, H, Mq, PARTS, E], [B, H, Mk, PARTS, E], of keys [Mk + 1]
    scores,  # [B, H, lines, Mk], float32; a line is a block of queries, or a part of one
    q_blocks, k_blocks, scale,
    SCORE: tl.constexpr, BY_MASS: tl.constexpr, SMOOTH: tl.constexpr, PARTS: tl.constexpr, EACH: tl.constexpr,
    E: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Scores of `CHUNK` blocks of keys for `ROWS` blocks of queries, each as a whole (EACH 1) or part by part."""
    LINES: tl.constexpr = ROWS * EACH
    WIDE: tl.constexpr = SMOOTH or SCORE == "cosine"  # products of float32
    pair = tl.program_id(1).to(tl.int64)
    q_means += pair * q_blocks * PARTS * E
    k_means += pair * k_blocks * PARTS * E
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    real = line < q_blocks * EACH
    at = tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
    inside = at < k_blocks
    size = tl.load(starts + at + 1, mask=inside, other=1) - tl.load(starts + at, mask=inside, other=0)
    e = tl.arange(0, E)
    if SMOOTH:
        centre = _centre(k_means, starts, k_blocks, CHUNK, PARTS, E)
    if SCORE == "mean" or SCORE == "cosine":
        q = _mean(q_means, line, real, PARTS, E)
        k = _mean(k_means, at, inside, PARTS, E)
        if SMOOTH:
            k -= centre[None, :]
        if SCORE == "cosine":
            q, k = _unit(q), _unit(k)
            scale = 1.0
        if WIDE:
            s = tl.dot(q, k.T, input_precision="tf32x3") * scale  # [LINES, CHUNK]
        else:
            s = tl.dot(q.to(q_means.dtype.element_ty), k.to(q_means.dtype.element_ty).T, input_precision="ieee") * scale
        if BY_MASS:
            s += tl.log(size.to(tl.float32))[None, :]
    else:
        q = tl.load(q_means + line[:, None] * E + e[None, :], mask=real[:, None], other=0.0)
        s = tl.full([LINES, CHUNK], -1e30, tl.float32)
        total = tl.zeros([LINES, CHUNK], tl.float32)
        for part in tl.static_range(PARTS):
            k = tl.load(k_means + (at * PARTS + part)[:, None] * E + e[None, :], mask=inside[:, None], other=0.0)
            if WIDE:
                k = k.to(tl.float32) - centre[None, :]
                t = tl.dot(q.to(tl.float32), k.T, input_precision="tf32x3") * scale
            else:
                t = tl.dot(q, k.T, input_precision="ieee") * scale
            new = tl.maximum(s, t)
            total = total * tl.exp(s - new) + tl.exp(t - new)
            s = new
        s += tl.log(total) + tl.log(size.to(tl.float32) / PARTS)[None, :]  # tokens of a part
    to = (pair * q_blocks * EACH + line)[:, None] * k_blocks + at[None, :]
    tl.store(scores + to, s, mask=real[:, None] & inside[None, :])


@triton.jit
def _ordered(x):
    """Unsigned integers in the order of the floats x."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits | -2147483648).to(tl.uint32, bitcast=True)


@triton.jit
def choose(
    scores,  # what `score` wrote
    q_alike, k_alike,  # [B, H, Mq], [B, H, Mk]
    starts, kept,  # of keys [Mk + 1], [Mk]
    q_places, k_places,  # [Mq, 3], [Mk, 3]
    blocks, counts,  # [B, H, Mq, Mk], [B, H, Mq, 2]
    q_blocks, k_blocks, budget, share, guard, reach,
    SCORE: tl.constexpr, BY_MASS: tl.constexpr, GUARD: tl.constexpr, NEAR: tl.constexpr, EACH: tl.constexpr,
    WIDTH: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """See `selection.choose`, whose result this equals up to the rounding of scores."""
    row = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    at = tl.arange(0, WIDTH)
    inside = at < k_blocks
    line = (pair * q_blocks + row) * EACH
    if SCORE == "mass":
        s = tl.zeros([WIDTH], tl.float32)
        for part in tl.static_range(EACH):
            t = tl.load(scores + (line + part) * k_blocks + at, mask=inside, other=-1e30)
            t = tl.exp(t - tl.max(t, 0))  # of one row of attention
            s += t / (tl.sum(t, 0) * EACH)
    else:
        s = tl.load(scores + line * k_blocks + at, mask=inside, other=-1e30)
        if EACH > 1:  # log sum exp over the parts of the block of queries
            total = tl.full([WIDTH], 1.0, tl.float32)
            for part in tl.static_range(1, EACH):
                t = tl.load(scores + (line + part) * k_blocks + at, mask=inside, other=-1e30)
                new = tl.maximum(s, t)
                total = total * tl.exp(s - new) + tl.exp(t - new)
                s = new
            s += tl.log(total)
    size = tl.load(starts + at + 1, mask=inside, other=0) - tl.load(starts + at, mask=inside, other=0)
    held = (tl.load(kept + at, mask=inside, other=0) != 0) & inside
    if GUARD:
        held |= (tl.load(k_alike + pair * k_blocks + at, mask=inside, other=1.0) < guard) & inside
        own = tl.load(q_alike + pair * q_blocks + row + at * 0)
        held |= (own < guard) & inside
    near = tl.zeros([WIDTH], tl.int1)
    if NEAR:
        steps = tl.zeros([WIDTH], tl.int32)
        off = tl.zeros([WIDTH], tl.int1)
        for axis in tl.static_range(3):
            q_place = tl.load(q_places + row * 3 + axis)
            k_place = tl.load(k_places + at * 3 + axis, mask=inside, other=-1)
            steps += tl.abs(q_place - k_place)
            off |= (q_place < 0) | (k_place < 0)
        near = (steps <= reach) & ~off & inside
    free = inside & ~held
    if BY_MASS:
        if SCORE != "mass":
            s = tl.where(inside, tl.exp(s - tl.max(s, 0)), 0.0)
            s = s / tl.sum(s, 0)
        s = tl.where(inside, s, 0.0)
        weight = tl.where(free, s, 0.0)
        wanted = share * tl.sum(s, 0) - tl.sum(tl.where(held, s, 0.0), 0)
        wanted = tl.where(tl.sum(held.to(tl.int32), 0) > 0, wanted, tl.maximum(wanted, TINY))  # no list is empty
        key = _ordered(tl.where(free, s, -1.0))
    else:
        weight = tl.where(free, 1.0, 0.0)
        wanted = tl.minimum(budget * 1.0, tl.sum(weight, 0))
        key = _ordered(tl.where(near, float("inf"), s))
    least = tl.full([], 0, tl.uint32)
    bit = tl.full([], 2147483648, tl.uint32)
    for _ in range(32):
        trial = least | bit
        above = tl.sum(tl.where(key >= trial, weight, 0.0), 0)
        least = tl.where(above >= wanted, trial, least)
        bit = bit >> 1
    chosen = free & (key > least)
    ties = free & (key == least)
    missing = wanted - tl.sum(tl.where(chosen, weight, 0.0), 0)
    tied = tl.where(ties, weight, 0.0)
    chosen |= ties & (tl.cumsum(tied, 0) - tied < missing)
    if BY_MASS:
        chosen |= near & free
    chosen |= held

    whole = chosen & (size == FULL)
    full = tl.sum(whole.to(tl.int32), 0)
    count = tl.sum(chosen.to(tl.int32), 0)
    # one sum over both kinds: full ones count upwards in the low half of a word, the others in the high half
    order = tl.cumsum(tl.where(whole, 1, tl.where(chosen, 65536, 0)), 0)
    place = tl.where(whole, order & 65535, full + (order >> 16)) - 1
    base = pair * q_blocks + row
    tl.store(blocks + base * k_blocks + place, at, mask=chosen)
    tl.store(counts + base * 2, full)
    tl.store(counts + base * 2 + 1, count)
