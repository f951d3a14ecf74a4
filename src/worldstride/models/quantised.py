"""Weights in 8 bits: less memory, and with 8-bit floats faster products, for other results. torchao computes them."""

from __future__ import annotations

from typing import Literal, TypeVar, get_args

import torch
from torch import nn

from worldstride.errors import InputError, MissingDependencyError

Scheme = Literal["float8", "int8"]
"""Weights as float8 (e4m3) with a scale a row, and what they are multiplied with rounded likewise, a scale a token, on
GPUs that multiply such numbers; or weights alone as 8-bit integers with a scale a row, on any device."""
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
LEAST = 1024
"""Layers with fewer rows or columns stay as they are: they are small, and what they tell is not."""


Network = TypeVar("Network", bound=nn.Module)


def quantised(network: Network, scheme: Scheme, least: int = LEAST) -> Network:
    """Another network with the linear layers of `network.blocks` in 8 bits; everything else is shared with it.

    Raises `InputError` on an unknown scheme and on a device that cannot multiply float8, `MissingDependencyError`
    without torchao.
    """
    if scheme not in SCHEMES:
        raise InputError(f"unknown quantisation {scheme!r}; known: {', '.join(SCHEMES)}")
    blocks = getattr(network, "blocks", None)
    config = getattr(network, "config", None)
    if not isinstance(blocks, nn.ModuleList) or config is None:
        raise InputError(f"a {type(network).__name__} has no blocks to quantise")
    weight = next(blocks.parameters())
    if scheme == "float8" and (
        weight.device.type != "cuda" or torch.cuda.get_device_capability(weight.device) < (8, 9)
    ):
        raise InputError(
            f"float8 needs an NVIDIA GPU of compute capability 8.9 or more, not {weight.device}; take int8"
        )
    if scheme == "float8" and weight.dtype != torch.bfloat16:
        raise InputError(f"float8 goes with a model in bfloat16, this one is in {weight.dtype}")
    try:
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Int8WeightOnlyConfig,
            PerRow,
            quantize_,
        )
    except ImportError as error:
        raise MissingDependencyError("weights in 8 bits need torchao: pip install 'worldstride[quantised]'") from error

    # settings of torch's compiler are everybody's, and stay as they are
    how = (
        Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
        if scheme == "float8"
        else Int8WeightOnlyConfig(set_inductor_config=False)
    )
    with torch.device("meta"):
        made = type(network)(config)
    made.load_state_dict(network.state_dict(), assign=True)
    made.requires_grad_(False).eval()
    quantize_(made.get_submodule("blocks"), how, lambda module, _: _fits(module, least))
    return made


def _fits(module: nn.Module, least: int) -> bool:
    return isinstance(module, nn.Linear) and min(module.weight.shape) >= least and not any(
        n % 16 for n in module.weight.shape
    )  # fmt: skip
