"""Passes of video VAEs over whole activations in one read and one write, in Triton: some pixels a program.

Activations are [B, C, T, H, W] of any strides with channels innermost. Offsets are 64 bits wide: activations have more
than 2^31 values.
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

TILE = 4096
"""Values of a program: with four warps, four vectors of 16 bytes a thread in half precision."""
EPS = 1e-24
"""Beside the mean of squares."""


@triton.jit
def places(pixels, frames, height, width, ROWS: tl.constexpr):
    """Which of a program's rows are pixels, and where those lie: world, frame, row and column."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = rows < pixels
    at = tl.where(own, rows, 0)
    line = at // width
    frame = line // height
    batch = (frame // frames).to(tl.int64)
    time = (frame % frames).to(tl.int64)
    return own, batch, time, (line % height).to(tl.int64), (at % width).to(tl.int64)


@triton.jit(do_not_specialize=["pixels", "frames", "height", "width"])
def norm_silu(
    x, gamma, out,  # x and out [B, C, T, H, W], gamma [C]
    pixels, frames, height, width, eps,
    x_b, x_t, x_h, x_w, out_b, out_t, out_h, out_w,
    C: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`pixels` are those of all frames. WIDE is the power of two that holds C channels."""
    own, batch, time, row, column = places(pixels, frames, height, width, ROWS)
    c = tl.arange(0, WIDE)
    mask = own[:, None] & (c < C)[None, :]
    source = batch * x_b + time * x_t + row * x_h + column * x_w
    value = tl.load(x + source[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(gamma + c, mask=c < C, other=0.0).to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, 1) / C + eps)[:, None] * scale[None, :]
    value = value / (1.0 + tl.exp(-value))
    target = batch * out_b + time * out_t + row * out_h + column * out_w
    tl.store(out + target[:, None] + c[None, :], value.to(out.dtype.element_ty), mask=mask)


def launch_norm_silu(x: Tensor, gamma: Tensor, out: Tensor) -> None:
    """SiLU of x [B, C, T, H, W] over its size times gamma [C], into out of the same shape."""
    batch, channels, *size = x.shape
    pixels = batch * size[0] * size[1] * size[2]
    wide = triton.next_power_of_2(channels)
    rows = max(1, TILE // wide)
    kernel: Any = norm_silu
    with torch.cuda.device_of(x):
        kernel[(triton.cdiv(pixels, rows),)](
            x, gamma, out, pixels, *size, EPS, *_strides(x), *_strides(out), C=channels, WIDE=wide, ROWS=rows,
            num_warps=4,
        )  # fmt: skip


@triton.jit(do_not_specialize=["pixels", "frames", "height", "width", "lead"])
def spread(
    x, h,  # x [B, C M, T, H, W], h [B, C, TIMES T - lead, 2 H, 2 W]
    pixels, frames, height, width, lead,
    x_b, x_t, x_h, x_w, h_b, h_t, h_h, h_w,
    C: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, TIMES: tl.constexpr, M: tl.constexpr,
    M_T: tl.constexpr, M_H: tl.constexpr, M_W: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Every pixel of x to its TIMES 2 2 finer ones of h; M = M_T M_H M_W values of a channel go to parts of them.

    What h holds stays, and gets it added, with ADD.
    """
    own, batch, time, row, column = places(pixels, frames, height, width, ROWS)
    c = tl.arange(0, WIDE)
    source = batch * x_b + time * x_t + row * x_h + column * x_w
    m = tl.arange(0, M)
    values = tl.arange(0, WIDE * M)
    inside = own[:, None] & (values < C * M)[None, :]
    value = tl.load(x + source[:, None] + values[None, :], mask=inside, other=0.0).to(tl.float32)
    for dt in tl.static_range(TIMES):
        frame = time * TIMES + dt - lead
        mask = (own & (frame >= 0))[:, None] & (c < C)[None, :]
        for dr in tl.static_range(2):
            for ds in tl.static_range(2):
                if M == 1:
                    added = value
                else:
                    k = (dt % M_T * M_H + dr % M_H) * M_W + ds % M_W
                    parts = value.reshape(ROWS, WIDE, M)
                    added = tl.sum(tl.where((m == k)[None, None, :], parts, 0.0), 2)
                target = batch * h_b + frame * h_t + (2 * row + dr) * h_h + (2 * column + ds) * h_w
                at = h + target[:, None] + c[None, :]
                if ADD:
                    added = tl.load(at, mask=mask, other=0.0).to(tl.float32) + added
                tl.store(at, added.to(h.dtype.element_ty), mask=mask)


def launch_spread(h: Tensor, x: Tensor, times: int, lead: int, add: bool) -> None:
    """x [B, C m, T, H, W] spread over the finer grid into h [B, C, times T - lead, 2 H, 2 W], or added to it."""
    batch, channels, *size = x.shape
    pixels = batch * size[0] * size[1] * size[2]
    several = channels // h.shape[1]
    over_time = min(several, times)
    over_rows = min(several // over_time, 2)
    wide = triton.next_power_of_2(h.shape[1])
    rows = max(1, TILE // 2 // (wide * several))
    kernel: Any = spread
    with torch.cuda.device_of(x):
        kernel[(triton.cdiv(pixels, rows),)](
            x, h, pixels, *size, lead, *_strides(x), *_strides(h), C=h.shape[1], WIDE=wide, ROWS=rows, TIMES=times,
            M=several, M_T=over_time, M_H=over_rows, M_W=several // over_time // over_rows, ADD=add,
            num_warps=4,
        )  # fmt: skip


def _strides(x: Tensor) -> tuple[int, int, int, int]:
    """Of all dimensions but channels."""
    batch, _, *others = x.stride()
    return batch, others[0], others[1], others[2]
