"""Weights in 8 bits: less memory, and with 8-bit floats faster products, for other results. torchao computes them."""

from __future__ import annotations

import copy
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from worldstride.errors import InputError, MissingDependencyError

Scheme = Literal["float8", "int8"]
"""Weights as float8 (e4m3) with a scale a row, and what they are multiplied with rounded likewise, a scale a token, on
GPUs that multiply such numbers; or weights alone as 8-bit integers with a scale a row, on any device."""
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
LEAST = 1024
"""Layers with fewer rows or columns stay as they are: they are small, and what they tell is not."""

Network = TypeVar("Network", bound=nn.Module)


def quantised(network: Network, scheme: Scheme, least: int | None = None) -> Network:
    """Another network with the linear layers of `network.blocks` in 8 bits; everything else is shared with it.

    `least` None is `LEAST`. Raises `InputError` on an unknown scheme, on a network that is in 8 bits already, and on a
    device that cannot multiply float8; `MissingDependencyError` without torchao.
    """
    if scheme not in SCHEMES:
        raise InputError(f"unknown quantisation {scheme!r}; known: {', '.join(SCHEMES)}")
    blocks = getattr(network, "blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        raise InputError(f"a {type(network).__name__} has no blocks to quantise")
    if any(hasattr(p, "__tensor_flatten__") for p in blocks.parameters()):
        raise InputError("the network's weights are in 8 bits already; quantise one whose are not")
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
    shared = {id(t): t for t in (*network.parameters(), *network.buffers())}
    made = copy.deepcopy(network, shared)  # modules of its own around the same tensors
    wide = LEAST if least is None else least
    quantize_(made.get_submodule("blocks"), how, lambda module, _: _fits(module, wide))
    return made


def parted(name: str) -> tuple[str, Scheme | None]:
    """A name without the scheme that may stand behind it ("off+int8"), and the scheme."""
    plain, _, last = name.rpartition("+")
    for scheme in SCHEMES:
        if plain and scheme == last:
            return plain, scheme
    return name, None


def named(name: str, scheme: Scheme | None) -> str:
    """What tables call settings of this name with weights in 8 bits, or without."""
    return name if scheme is None else f"{name}, {scheme}"


def _fits(module: nn.Module, least: int) -> bool:
    sizes = module.weight.shape if isinstance(module, nn.Linear) else (1,)
    return min(sizes) >= least and not any(n % 16 for n in sizes)


def bytes_of(tensor: Tensor) -> int:
    """Bytes that a tensor holds, in 8 bits those of its numbers and scales."""
    parts: Any = getattr(tensor, "__tensor_flatten__", None)
    if parts is None:
        return tensor.numel() * tensor.element_size()
    return sum(bytes_of(getattr(tensor, name)) for name in parts()[0])
