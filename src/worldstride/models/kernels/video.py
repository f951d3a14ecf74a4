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


@triton.jit(do_not_specialize=["pixels", "frames", "height", "width"])
def norm_silu(
    x, gamma, out,  # x and out [B, C, T, H, W], gamma [C]
    pixels, frames, height, width, eps,
    x_b, x_t, x_h, x_w, out_b, out_t, out_h, out_w,
    C: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`pixels` are those of all frames. WIDE is the power of two that holds C channels."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = rows < pixels
    at = tl.where(own, rows, 0)
    column, line = at % width, at // width
    row, frame = line % height, line // height
    time, batch = (frame % frames).to(tl.int64), (frame // frames).to(tl.int64)
    row, column = row.to(tl.int64), column.to(tl.int64)
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


def _strides(x: Tensor) -> tuple[int, int, int, int]:
    """Of all dimensions but channels."""
    batch, _, *others = x.stride()
    return batch, others[0], others[1], others[2]
