"""The kernels as torch operators, so that `torch.compile` sees through them whole and CUDA graphs record them.

Each has a fake implementation that knows the shapes of its results. Triton is imported when one first runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from worldstride.attention import versions


@torch.library.custom_op("worldstride::attend_listed", mutates_args=(), device_types="cuda")
def attend_listed(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, counts: Tensor, q_starts: Tensor, k_starts: Tensor,
    rows: Tensor | None, bias: Tensor | None, how: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [B, H, Nq, E] and log-sum-exp [B, H, Nq] of attention to listed blocks; see `sparse.attend_blocks`."""
    from worldstride.attention import kernels

    return kernels.attend_listed(q, k, v, blocks, counts, q_starts, k_starts, rows, bias, how)


@attend_listed.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, counts: Tensor, q_starts: Tensor, k_starts: Tensor,
    rows: Tensor | None, bias: Tensor | None, how: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, heads, tokens, channels = q.shape
    return q.new_empty(batch, tokens, heads, channels).transpose(1, 2), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("worldstride::attend_all", mutates_args=(), device_types="cuda")
def attend_all(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, how: str) -> tuple[Tensor, Tensor]:
    """The same kernel over every key: dense attention that needs no plan for a number of keys."""
    from worldstride.attention import kernels

    return kernels.attend_all(q, k, v, bias, how)


@attend_all.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, how: str) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, channels = q.shape
    return q.new_empty(batch, tokens, heads, channels).transpose(1, 2), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("worldstride::select_blocks", mutates_args=(), device_types="cuda")
def select_blocks(
    q_means: Tensor, k_means: Tensor, q_alike: Tensor | None, k_alike: Tensor | None, starts: Tensor, kept: Tensor,
    q_places: Tensor, k_places: Tensor, budget: int, score: str, keep: float, mass: float | None, smooth: bool,
    guard: float | None, neighbours: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Blocks [B, H, Mq, Mk] and counts [B, H, Mq, 2]; see `selection.select`."""
    from worldstride.attention import kernels
    from worldstride.attention.selection import Selection

    rule = Selection(score, keep, mass, 1, smooth, guard, neighbours)  # type: ignore[arg-type]
    return kernels.select_blocks(q_means, k_means, q_alike, k_alike, starts, kept, q_places, k_places, budget, rule)


@select_blocks.register_fake
def _(
    q_means: Tensor, k_means: Tensor, q_alike: Tensor | None, k_alike: Tensor | None, starts: Tensor, kept: Tensor,
    q_places: Tensor, k_places: Tensor, budget: int, score: str, keep: float, mass: float | None, smooth: bool,
    guard: float | None, neighbours: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = q_means.shape[:3]
    return starts.new_empty(*rows, k_means.shape[2]), starts.new_empty(*rows, 2)


@torch.library.custom_op(
    "worldstride::prepare_blocks", mutates_args=("out", "v_out", "means", "units"), device_types="cuda"
)
def prepare_blocks(
    x: Tensor, v: Tensor | None, weight: Tensor | None, angles: Tensor | None, order: Tensor, starts: Tensor,
    out: Tensor, v_out: Tensor | None, means: Tensor, units: Tensor | None, at: int, block_at: int,
    interleaved: bool, eps: float,
) -> None:  # fmt: skip
    """Norm, turn, reorder and summarise tokens into the given buffers; see `preparation.Blocks.write`."""
    from worldstride.attention import kernels

    kernels.prepare_blocks(
        x, v, weight, angles, order, starts, out, v_out, means, units, at, block_at, interleaved, eps
    )


@prepare_blocks.register_fake
def _(
    x: Tensor, v: Tensor | None, weight: Tensor | None, angles: Tensor | None, order: Tensor, starts: Tensor,
    out: Tensor, v_out: Tensor | None, means: Tensor, units: Tensor | None, at: int, block_at: int,
    interleaved: bool, eps: float,
) -> None:  # fmt: skip
    return None


def usable(how: str, x: Tensor) -> str:
    """Why a kernel cannot run on x; empty where it can."""
    if x.device.type != "cuda":
        return f"it needs a CUDA device, the tensor is on {x.device.type}"
    return versions.unusable(how, versions.capability(x.device))
