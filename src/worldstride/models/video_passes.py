"""Passes over whole activations of video VAEs that a GPU with Triton makes in one read and one write.

Between convolutions everything is bound by memory: written out in torch, a norm, an activation and a copy are three
reads and three writes, and torch's own norm is slow over few channels. Activations are [B, C, T, H, W].
"""

from __future__ import annotations

import torch
from torch import Tensor

from worldstride.attention import ops

_TYPES = (torch.bfloat16, torch.float16, torch.float32)


def fused(x: Tensor, *others: Tensor) -> bool:
    """Whether kernels take x [B, C, T, H, W]: channels innermost, and neither a compiler nor gradients ask for torch's
    own operators. Of `others` only gradients matter."""
    if torch.compiler.is_compiling() or x.stride(1) != 1 or x.dtype not in _TYPES or not x.numel():
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *others)):
        return False
    return not ops.usable("triton", x)


@torch.library.custom_op("worldstride::norm_silu_into", mutates_args=("out",), device_types="cuda")
def norm_silu_into(x: Tensor, gamma: Tensor, out: Tensor) -> None:
    """SiLU of the root-mean-square norm of x [B, C, T, H, W], times gamma [C], into `out` of the same shape.

    Both have channels innermost; `out` may be any part of a larger tensor. All is in float32 and rounded once, where
    `F.silu(norm(x))` rounds after the norm, too: in half precision last bits differ.
    """
    from worldstride.models.kernels.video import launch_norm_silu

    launch_norm_silu(x, gamma, out)


@norm_silu_into.register_fake
def _(x: Tensor, gamma: Tensor, out: Tensor) -> None:
    return None


@torch.library.custom_op("worldstride::add_spread", mutates_args=("h",), device_types="cuda")
def add_spread(h: Tensor, x: Tensor, times: int, lead: int) -> None:
    """h [B, C, times T - lead, 2 H, 2 W] plus x [B, C m, T, H, W] in place, spread as `vae_layers.plus_spread` says.

    Both have channels innermost. The first `lead` of the finer frames are not there, and get nothing.
    """
    from worldstride.models.kernels.video import launch_spread

    launch_spread(h, x, times, lead, True)


@add_spread.register_fake
def _(h: Tensor, x: Tensor, times: int, lead: int) -> None:
    return None


@torch.library.custom_op("worldstride::spread_into", mutates_args=("out",), device_types="cuda")
def spread_into(out: Tensor, x: Tensor) -> None:
    """x [B, C, T, H, W] into `out` [B, C, T, 2 H, 2 W], by nearest neighbours; channels are innermost in both."""
    from worldstride.models.kernels.video import launch_spread

    launch_spread(out, x, 1, 0, False)


@spread_into.register_fake
def _(out: Tensor, x: Tensor) -> None:
    return None
