"""Fused kernels for a GPU. Imported when one of them is first launched, because it imports triton.

Launchers only: shapes were checked by their callers, and nothing here waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from worldstride.attention.kernels import forward as plain
from worldstride.attention.kernels import prepare as preparing
from worldstride.attention.kernels import select as selecting
from worldstride.attention.layout import BLOCK
from worldstride.attention.selection import Selection
from worldstride.errors import InputError

LOG2E = 1.4426950408889634
ROWS = 16
"""Blocks of queries that one program scores for: the least that matrix units take."""
CHUNK = 32
"""Blocks of keys that one program scores."""


def attend_listed(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, counts: Tensor, q_starts: Tensor, k_starts: Tensor,
    rows: Tensor | None, bias: Tensor | None, how: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [B, H, Nq, E] (memory ordered B, Nq, H, E, as the next projection wants it) and log-sum-exp [B, H, Nq].

    A list may be one row [Mk] for all.
    """
    q, k, v = (t if _described(t) else t.clone(memory_format=torch.contiguous_format) for t in (q, k, v))
    batch, heads, tokens, channels = q.shape
    out = torch.empty(batch, tokens, heads, channels, device=q.device, dtype=q.dtype).transpose(1, 2)
    lse = torch.empty(batch, heads, tokens, device=q.device, dtype=torch.float32)
    q_blocks, width = len(q_starts) - 1, blocks.shape[-1] if blocks.dim() > 1 else 0
    tiles = batch * heads * q_blocks
    if tiles * width >= 2**31:
        raise InputError(f"a list of {tiles} rows of {width} blocks is longer than the kernels can address (2^31)")
    weight = q.new_empty(0) if bias is None else bias.expand(batch, heads, -1)
    if bias is not None and weight.stride(2) != 1:
        weight = weight.contiguous()
    offsets = (*out.stride()[:3], *(weight.stride()[:2] if bias is not None else (0, 0)))
    tables = (out, lse, blocks, counts, q_starts, k_starts, q_starts if rows is None else rows, weight)
    scale, flags = channels**-0.5 * LOG2E, {"HAS_ROWS": rows is not None, "HAS_BIAS": bias is not None}
    if how == "gluon":
        from worldstride.attention.kernels import warp_specialised as fast

        stages = 2 if channels == 128 else 4  # what fits into 227 KiB beside two tiles' queries
        programs = min(tiles, torch.cuda.get_device_properties(q.device).multi_processor_count)
        kernel: Any = fast.forward
        kernel[(programs,)](
            *fast.descriptors(q, k, v), *tables, scale, heads, q_blocks, tiles, tokens, width, *offsets, **flags,
            STAGES=stages, num_warps=4, maxnreg=168,
        )  # fmt: skip
        return out, lse
    shape = [1, 1, BLOCK, channels]
    described = (TensorDescriptor.from_tensor(t, shape) for t in (q, k, v))
    options: Any = {"num_warps": 8, "num_stages": 3 if channels == 64 or roomy(q.device) else 2}
    kernel = plain.forward
    kernel[(q_blocks, batch * heads)](
        *described, *tables, scale, heads, tokens, width, *offsets, **flags, BM=BLOCK, BN=BLOCK, E=channels, **options
    )
    return out, lse


def _described(t: Tensor) -> bool:
    """Whether the copy engine can read a tensor where it lies: multiples of 16 bytes, nothing repeated by strides."""
    strides = [s * t.element_size() for s in t.stride()[:-1]]
    return t.data_ptr() % 16 == 0 and t.stride(-1) == 1 and all(s and s % 16 == 0 for s in strides)


def attend_all(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, how: str) -> tuple[Tensor, Tensor]:
    """Attention to all keys: one list that every block of queries shares."""
    keys, tiles = k.shape[2], q.shape[0] * q.shape[1] * _cdiv(q.shape[2], BLOCK)
    counts = torch.empty(tiles, 2, device=q.device, dtype=torch.int32)
    counts[:, 0], counts[:, 1] = keys // BLOCK, _cdiv(keys, BLOCK)
    row = torch.arange(_cdiv(keys, BLOCK), device=q.device, dtype=torch.int32)
    q_starts, k_starts = (_starts(t.shape[2], q.device) for t in (q, k))
    return attend_listed(q, k, v, row, counts, q_starts, k_starts, None, bias, how)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _starts(tokens: int, device: torch.device) -> Tensor:
    return (torch.arange(_cdiv(tokens, BLOCK) + 1, device=device, dtype=torch.int32) * BLOCK).clamp_max(tokens)


def roomy(device: torch.device) -> bool:
    """Whether a block may take the 225 KiB of shared memory that three stages of 128 channels need."""
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= 230_000


def select_blocks(
    q_means: Tensor, k_means: Tensor, q_alike: Tensor | None, k_alike: Tensor | None, starts: Tensor, kept: Tensor,
    q_places: Tensor, k_places: Tensor, budget: int, rule: Selection,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Blocks [B, H, Mq, Mk] and counts [B, H, Mq, 2] by `rule`; see `selection.choose`."""
    batch, heads, q_blocks, parts, channels = q_means.shape
    k_blocks, device = k_means.shape[2], q_means.device
    if k_blocks >= 2**15:
        raise InputError(f"the kernel chooses among fewer than {2**15} blocks of keys, got {k_blocks}")
    each = parts if rule.score in ("parts", "mass") else 1
    blocks = torch.empty(batch, heads, q_blocks, k_blocks, device=device, dtype=torch.int32)
    counts = torch.empty(batch, heads, q_blocks, 2, device=device, dtype=torch.int32)
    scores = torch.empty(batch, heads, q_blocks * each, k_blocks, device=device, dtype=torch.float32)
    q_means, k_means = q_means.contiguous(), k_means.contiguous()
    kind: Any = {"SCORE": rule.score, "BY_MASS": rule.mass is not None, "EACH": each}
    scoring: Any = selecting.score
    scoring[(_cdiv(q_blocks, ROWS), batch * heads, _cdiv(k_blocks, CHUNK))](
        q_means, k_means, starts, scores, q_blocks, k_blocks, channels**-0.5, **kind, SMOOTH=rule.smooth,
        PARTS=parts, E=channels, ROWS=ROWS, CHUNK=CHUNK, num_warps=4,
    )  # fmt: skip
    alike = (scores, scores) if q_alike is None or k_alike is None else (q_alike.contiguous(), k_alike.contiguous())
    width = max(32, 1 << (k_blocks - 1).bit_length())
    choosing: Any = selecting.choose
    choosing[(q_blocks, batch * heads)](
        scores, *alike, starts, kept, q_places, k_places, blocks, counts, q_blocks, k_blocks, budget,
        rule.mass or 0.0, rule.guard or 0.0, rule.neighbours or 0, **kind, GUARD=rule.guard is not None,
        NEAR=rule.neighbours is not None, WIDTH=width, FULL=BLOCK, num_warps=max(1, width // 1024),
    )  # fmt: skip
    return blocks, counts


def prepare_blocks(
    x: Tensor, v: Tensor | None, weight: Tensor | None, angles: Tensor | None, order: Tensor, starts: Tensor,
    out: Tensor, v_out: Tensor | None, means: Tensor, units: Tensor | None, at: int, block_at: int,
    interleaved: bool, eps: float,
) -> None:  # fmt: skip
    """Write rows `at` to at + N of `out` and `v_out`, and blocks `block_at` on of `means` and `units`."""
    batch, heads, _, channels = x.shape
    weight = None if weight is None else weight.contiguous()
    blank, parts = x if weight is None else weight, means.shape[3]
    longest = max(t.shape[2] * t.stride(2) for t in (x, x if v is None else v, out))
    if longest >= 2**31:
        raise InputError(f"the kernel addresses {2**31 - 1} values of a head's rows at most, got strides for {longest}")
    turns = blank if angles is None else angles
    value, value_out = (x, out) if v is None or v_out is None else (v, v_out)
    group = next(n for n in (4, 3, 2, 1) if heads % n == 0)
    kernel: Any = preparing.prepare
    kernel[((len(starts) - 1) * parts, heads // group, batch)](
        x, value, blank, turns, order, starts, out, value_out, means, means if units is None else units, heads, at,
        block_at, means.shape[2], eps,
        *x.stride()[:3], *value.stride()[:3], *out.stride()[:2], *value_out.stride()[:2],
        weight.stride(0) if weight is not None and weight.dim() == 2 else 0,
        turns.stride(0) if angles is not None and angles.dim() == 3 and angles.shape[0] > 1 else 0,
        turns.stride(-2) if angles is not None else 0,
        HAS_V=v is not None, HAS_NORM=weight is not None, HAS_ANGLES=angles is not None, HAS_UNITS=units is not None,
        INTERLEAVED=interleaved, PARTS=parts, E=channels, BM=BLOCK, GROUP=group, num_warps=2 if parts > 1 else 16,
    )  # fmt: skip
