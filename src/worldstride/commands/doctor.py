"""`worldstride doctor`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from worldstride.bench.environment import hardware, versions
from worldstride.engine import pick_device, pick_dtype
from worldstride.errors import CheckpointError
from worldstride.models.courtyard.weights import shipped

_OPTIONAL = {"av": ("video files", "pip install 'worldstride[video]'")}
"""Module of an optional package: what it is for, how to get it."""


@dataclass(frozen=True)
class Doctor:
    """Say what this installation consists of and what it will compute with."""

    def run(self, command: str) -> int:
        """Print one fact a line; a missing optional part is no failure."""
        device = pick_device()
        dtype = pick_dtype(device)
        for name, version in versions().items():
            _say(name, version)
        for name, value in hardware(torch.device("cpu")).items():
            size = isinstance(value, int) and name.endswith("_bytes")
            label = name.removesuffix("_bytes").replace("_", " ")
            _say(label, f"{value / 2**30:.1f} GiB" if size else value)
        for i in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(i)
            _say(f"cuda:{i}", f"{facts.name}, {facts.total_memory / 2**30:.1f} GiB")
        _say("default device", device)
        _say("number format", str(dtype).removeprefix("torch."))
        _say("attention", attention_path(device, dtype))
        try:
            file = shipped()
            _say("courtyard weights", f"{file}, {file.stat().st_size / 1e6:.1f} MB")
        except CheckpointError as error:
            _say("courtyard weights", f"missing: {error}")
        for module, (purpose, how) in _OPTIONAL.items():
            found = importlib.util.find_spec(module) is not None
            have = f"{importlib.metadata.version(module)} ({purpose})" if found else ""
            _say(module, have or f"not installed; {purpose} need it: {how}")
        return 0


def attention_path(device: torch.device, dtype: torch.dtype) -> str:
    """How dense attention computes here: for torch's own, the kernels that heads of 64 channels can take."""
    if device.type == "cpu" and dtype == torch.bfloat16:
        return "products of matrices, block by block (worldstride.attention.dense)"
    q = torch.zeros(1, 1, 64, 64, device=device, dtype=dtype)
    works = []
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        try:
            with sdpa_kernel(getattr(SDPBackend, name)):
                F.scaled_dot_product_attention(q, q, q)
        except RuntimeError:  # torch's way of saying that a kernel does not exist here
            continue
        works.append(name.lower().replace("_", " "))
    return f"torch scaled_dot_product_attention ({', '.join(works)})"


def _say(name: str, value: object) -> None:
    print(f"{name + ':':<22}{value}")
