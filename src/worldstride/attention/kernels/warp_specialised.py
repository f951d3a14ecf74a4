"""Attention to listed blocks of keys, in Gluon for Hopper: a warp that loads, two groups of warps that compute.

The structure is FlashAttention-3's (Shah et al., 2024, arXiv 2407.08608): the loading warp keeps two blocks of keys and
values on their way by the copy engine; each group of four warps owns 64 queries, and computes the softmax of one block
while the matrix units multiply the weights of the block before with its values. Programs stay and take one tile
(block of queries, head) after the other; the next tile's queries are loaded before the last one's output is written.
"""

# A compiler reads this, not Python: types of values are its own.
# pyright: basic, reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from worldstride.attention.layout import BLOCK

LN2 = gl.constexpr(0.6931471805599453)
LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _load(q_desc, k_desc, v_desc, buffers, barriers, table, heads, tiles, width):
    """The loading warp: queries of every tile, and its blocks of keys and values, as room becomes free."""
    q_rooms, k_rooms, v_rooms = buffers
    q_ready, q_free, k_ready, k_free, v_ready, v_free = barriers
    blocks, counts, q_starts, k_starts, q_blocks = table
    STAGES: gl.constexpr = k_rooms.type.shape[0]
    HALF: gl.constexpr = q_rooms.type.shape[3]
    turn = 0  # blocks loaded so far
    number = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        pair = tile // q_blocks
        b = pair // heads
        h = pair % heads
        first = gl.load(q_starts + tile % q_blocks)
        total = gl.load(counts + 2 * tile + 1)
        listed = blocks + tile * width
        start = gl.load(k_starts + gl.load(listed, mask=total > 0, other=0))
        for group in gl.static_range(2):
            room = number % 2 * 2 + group
            mbarrier.wait(q_free.index(room), number // 2 & 1 ^ 1)
            mbarrier.expect(q_ready.index(room), q_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                q_desc, [b, h, first + group * HALF, 0], q_ready.index(room), q_rooms.index(room)
            )
        for j in range(total):
            room = turn % STAGES
            phase = turn // STAGES & 1
            ahead = gl.load(listed + gl.minimum(j + 1, total - 1))  # on its way while the warp waits for room
            mbarrier.wait(k_free.index(room), phase ^ 1)
            mbarrier.expect(k_ready.index(room), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(k_desc, [b, h, start, 0], k_ready.index(room), k_rooms.index(room))
            mbarrier.wait(v_free.index(room), phase ^ 1)
            mbarrier.expect(v_ready.index(room), v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(v_desc, [b, h, start, 0], v_ready.index(room), v_rooms.index(room))
            start = gl.load(k_starts + ahead)
            turn += 1
        number += 1


@gluon.jit
def _weights(
    s, m, bias, start, length, scale, MASKED: gl.constexpr, HAS_BIAS: gl.constexpr, BN: gl.constexpr, S: gl.constexpr
):  # fmt: skip
    """Weights of one block's scores, the new greatest score of each row, and how much older sums fade."""
    lane = gl.arange(0, BN, layout=gl.SliceLayout(0, S))
    if HAS_BIAS:
        extra = gl.load(bias + start + lane, mask=lane < length, other=0.0).to(gl.float32)
        s = s * scale + gl.expand_dims(extra * LOG2E, 0)
        unit = 1.0
    else:
        unit = scale
    if MASKED:
        s = gl.where(gl.expand_dims(lane, 0) < length, s, -float("inf"))
    new = gl.maximum(m, gl.max(s, 1))
    p = gl.exp2(s * unit - gl.expand_dims(new * unit, 1))
    return p, new, gl.exp2((m - new) * unit)


@gluon.jit
def _step(
    q, rooms, barriers, p, o, m, l, turn, more, bias, start, length, scale, MASKED: gl.constexpr,
    HAS_BIAS: gl.constexpr, HALF: gl.constexpr, BN: gl.constexpr, E: gl.constexpr, S: gl.constexpr, O: gl.constexpr,
    P: gl.constexpr,
):  # fmt: skip
    """Scores and softmax of block `turn` beside the values of the block before."""
    k_rooms, v_rooms = rooms
    k_ready, k_free, v_ready, v_free = barriers
    STAGES: gl.constexpr = k_rooms.type.shape[0]
    room = turn % STAGES
    before = (turn - 1) % STAGES
    keys = k_rooms.index(room).reshape([BN, E]).permute([1, 0])
    scoring = warpgroup_mma(q, keys, gl.zeros([HALF, BN], gl.float32, S), use_acc=False, is_async=True)
    mbarrier.wait(v_ready.index(before), (turn - 1) // STAGES & 1)
    summing = warpgroup_mma(p, v_rooms.index(before).reshape([BN, E]), o, is_async=True)
    s = warpgroup_mma_wait(1, deps=[scoring])
    mbarrier.arrive(k_free.index(room), count=1)
    weights, m, fade = _weights(s, m, bias, start, length, scale, MASKED, HAS_BIAS, BN, S)
    l = l * fade + gl.sum(weights, 1)
    p = gl.convert_layout(weights.to(p.dtype), P)
    # waited for here and not at the top of the next step: the assembler would move the wait for the values before the
    # softmax, were there no loop between them
    mbarrier.wait(k_ready.index((turn + 1) % STAGES), (turn + 1) // STAGES & 1, pred=more)
    o = warpgroup_mma_wait(0, deps=[summing])
    mbarrier.arrive(v_free.index(before), count=1)
    o = o * gl.expand_dims(gl.convert_layout(fade, gl.SliceLayout(1, O)), 1)
    return p, o, m, l


@gluon.jit
def _compute(
    group: gl.constexpr, buffers, barriers, table, tensors, sizes, strides, HAS_ROWS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """One group of four warps: half the queries of every tile."""
    q_rooms, k_rooms, v_rooms = buffers
    q_ready, q_free, k_ready, k_free, v_ready, v_free = barriers
    blocks, counts, q_starts, k_starts, q_blocks = table
    out, lse, rows, bias = tensors
    scale, heads, tiles, tokens, width = sizes
    out_b, out_h, out_n, bias_b, bias_h = strides
    STAGES: gl.constexpr = k_rooms.type.shape[0]
    HALF: gl.constexpr = q_rooms.type.shape[3]
    BN: gl.constexpr = k_rooms.type.shape[3]
    E: gl.constexpr = k_rooms.type.shape[4]
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, E, 16])
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O, k_width=2)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // E, E // 8], [4, 1], [1, 0])  # 16 bytes a thread
    dtype: gl.constexpr = k_rooms.dtype
    rooms = (k_rooms, v_rooms)
    bars = (k_ready, k_free, v_ready, v_free)
    turn = 0
    number = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        pair = tile // q_blocks
        b = pair // heads
        h = pair % heads
        first = gl.load(q_starts + tile % q_blocks)
        size = gl.load(q_starts + tile % q_blocks + 1) - first
        full = gl.load(counts + 2 * tile)
        total = gl.load(counts + 2 * tile + 1)
        listed = blocks + tile * width
        extra = bias + b.to(gl.int64) * bias_b + h.to(gl.int64) * bias_h if HAS_BIAS else bias
        room = number % 2 * 2 + group
        q = q_rooms.index(room).reshape([HALF, E])
        mbarrier.wait(q_ready.index(room), number // 2 & 1)
        m = gl.full([HALF], -1e30, gl.float32, gl.SliceLayout(1, S))
        l = gl.zeros([HALF], gl.float32, gl.SliceLayout(1, S))
        o = gl.zeros([HALF, E], gl.float32, O)
        if total > 0:
            # the first block: nothing to sum beside it
            mbarrier.wait(k_ready.index(turn % STAGES), turn // STAGES & 1)
            keys = k_rooms.index(turn % STAGES).reshape([BN, E]).permute([1, 0])
            s = warpgroup_mma(q, keys, gl.zeros([HALF, BN], gl.float32, S), use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(k_free.index(turn % STAGES), count=1)
            block = gl.load(listed)
            start = gl.load(k_starts + block)
            length = gl.load(k_starts + block + 1) - start
            weights, m, _ = _weights(s, m, extra, start, length, scale, True, HAS_BIAS, BN, S)
            l = gl.sum(weights, 1)
            p = gl.convert_layout(weights.to(dtype), P)
            turn += 1
            mbarrier.wait(k_ready.index(turn % STAGES), turn // STAGES & 1, pred=total > 1)
            for j in range(1, full):
                if HAS_BIAS:
                    start = gl.load(k_starts + gl.load(listed + j))
                p, o, m, l = _step(
                    q, rooms, bars, p, o, m, l, turn, j + 1 < total, extra, start, BN, scale, False,
                    HAS_BIAS, HALF, BN, E, S, O, P,
                )  # fmt: skip
                turn += 1
            for j in range(gl.maximum(full, 1), total):
                block = gl.load(listed + j)
                start = gl.load(k_starts + block)
                length = gl.load(k_starts + block + 1) - start
                p, o, m, l = _step(
                    q, rooms, bars, p, o, m, l, turn, j + 1 < total, extra, start, length, scale, True,
                    HAS_BIAS, HALF, BN, E, S, O, P,
                )  # fmt: skip
                turn += 1
            mbarrier.arrive(q_free.index(room), count=1)
            last = turn - 1
            mbarrier.wait(v_ready.index(last % STAGES), last // STAGES & 1)
            o = warpgroup_mma(p, v_rooms.index(last % STAGES).reshape([BN, E]), o, is_async=True)
            o = warpgroup_mma_wait(0, deps=[o])
            mbarrier.arrive(v_free.index(last % STAGES), count=1)
        else:
            mbarrier.arrive(q_free.index(room), count=1)

        # where nothing was attended to, or all was hidden by a bias: zeros, with a log-sum-exp of minus infinity
        share = gl.where(l > 0, 1.0 / l, 0.0)
        o = o * gl.expand_dims(gl.convert_layout(share, gl.SliceLayout(1, O)), 1)
        unit = 1.0 if HAS_BIAS else scale
        lane = group * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, S))
        at = first + lane
        if HAS_ROWS:
            at = gl.load(rows + at, mask=lane < size, other=0).to(gl.int32)
        whole = gl.where(l > 0, m * unit * LN2 + gl.log(l), -float("inf"))
        gl.store(lse + pair.to(gl.int64) * tokens + at, whole, mask=lane < size)
        lane = group * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, WIDE))
        at = first + lane
        if HAS_ROWS:
            at = gl.load(rows + at, mask=lane < size, other=0).to(gl.int32)
        columns = gl.arange(0, E, layout=gl.SliceLayout(0, WIDE))
        place = gl.expand_dims(at.to(gl.int64) * out_n, 1) + gl.expand_dims(columns, 0)
        base = out + b.to(gl.int64) * out_b + h.to(gl.int64) * out_h
        gl.store(base + place, gl.convert_layout(o.to(dtype), WIDE), mask=gl.expand_dims(lane < size, 1))
        number += 1


@gluon.jit
def _upper(
    buffers, barriers, table, tensors, sizes, strides, HAS_ROWS: gl.constexpr, HAS_BIAS: gl.constexpr
):  # fmt: skip
    _compute(0, buffers, barriers, table, tensors, sizes, strides, HAS_ROWS, HAS_BIAS)


@gluon.jit
def _lower(
    buffers, barriers, table, tensors, sizes, strides, HAS_ROWS: gl.constexpr, HAS_BIAS: gl.constexpr
):  # fmt: skip
    _compute(1, buffers, barriers, table, tensors, sizes, strides, HAS_ROWS, HAS_BIAS)


@gluon.jit
def forward(
    q_desc, k_desc, v_desc,  # blocks [1, 1, 64, E] of the queries [B, H, N, E], [1, 1, 128, E] of keys and values
    out, lse,  # [B, H, Nq, E] of any strides, [B, H, Nq]
    blocks, counts,  # [B, H, Mq, width], [B, H, Mq, 2]
    q_starts, k_starts,  # [Mq + 1], [Mk + 1]
    rows, bias,  # natural index of each row [Nq]; [B, H, Nk] of any strides
    scale, heads, q_blocks, tiles, tokens, width, out_b, out_h, out_n, bias_b, bias_h,
    HAS_ROWS: gl.constexpr, HAS_BIAS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """`scale` is in base 2: log2(e) / sqrt(E). Where none is listed the output is zero."""
    q_rooms = gl.allocate_shared_memory(q_desc.dtype, [4] + q_desc.block_type.shape, q_desc.layout)
    k_rooms = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_rooms = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(4):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(q_free.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)  # both groups read every block
        mbarrier.init(v_free.index(i), count=2)
    fence_async_shared()
    buffers = (q_rooms, k_rooms, v_rooms)
    barriers = (q_ready, q_free, k_ready, k_free, v_ready, v_free)
    table = (blocks, counts, q_starts, k_starts, q_blocks)
    tensors = (out, lse, rows, bias)
    sizes = (scale, heads, tiles, tokens, width)
    strides = (out_b, out_h, out_n, bias_b, bias_h)
    gl.warp_specialize(
        [
            (_upper, (buffers, barriers, table, tensors, sizes, strides, HAS_ROWS, HAS_BIAS)),
            (_lower, (buffers, barriers, table, tensors, sizes, strides, HAS_ROWS, HAS_BIAS)),
            (_load, (q_desc, k_desc, v_desc, buffers, barriers, table, heads, tiles, width)),
        ],
        [4, 1],  # warps of the second and third
        [240, 24],  # registers of a thread
    )


def descriptors(q: Tensor, k: Tensor, v: Tensor) -> tuple[TensorDescriptor, TensorDescriptor, TensorDescriptor]:
    """What the copy engine has to know of queries, keys and values [B, H, N, E]."""
    shape = [1, 1, BLOCK, q.shape[-1]]
    kind = gl.float16 if q.dtype == torch.float16 else gl.bfloat16
    layout = gl.NVMMASharedLayout.get_default_for(shape, kind)
    half = [1, 1, BLOCK // 2, q.shape[-1]]
    pairs = ((q, half), (k, shape), (v, shape))
    return tuple(TensorDescriptor.from_tensor(t, size, layout) for t, size in pairs)  # type: ignore[return-value]
