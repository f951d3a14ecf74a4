"""Networks with random weights, drawn on a device, and the precision of latents that goes with a network's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from worldstride.errors import InputError
from worldstride.models.published import Network


def storage_of(dtype: torch.dtype) -> torch.dtype:
    """Precision of latents between steps for a network of some precision: bfloat16 in half precision, as upstream."""
    return torch.bfloat16 if dtype != torch.float32 else torch.float32


def variant_of(path: Path | None, variants: Iterable[str]) -> str:
    """The variant that random weights are drawn for: the first one, or the one that a path names; it need not exist."""
    known = list(variants)
    if path is not None and path.name not in known:
        raise InputError(
            f"random weights come from no file; leave out the path {str(path)!r}, or name one of {', '.join(known)}"
        )
    return known[0] if path is None else path.name


def drawn(make: Callable[[], Network], device: torch.device, dtype: torch.dtype, seed: int) -> Network:
    """A network with weights whose products keep the size of what they are given, drawn on the device; norms begin at
    one, biases at nothing."""
    with torch.device("meta"):
        module = make().requires_grad_(False)
    module.to(dtype).to_empty(device=device)  # in this order no second copy in float32 is ever held
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.squeeze().dim() == 1:
            parameter.fill_(1)
        else:
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
    return module.eval()
