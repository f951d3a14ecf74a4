"""`worldstride doctor`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass

import torch

from worldstride.attention import Dense, rates
from worldstride.attention.versions import INSTALLED, capability, unusable
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
        dense = Dense.measured(device, dtype)
        for line in dense.describe():
            _say("attention", line)
        if found := rates.measured(dense, device, dtype, 128):
            _say("sparse attention", f"{found.block:.2f} us a block of keys, {found.tile:.1f} us a tile, heads of 128")
        _say("triton", kernels(device))
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


def kernels(device: torch.device) -> str:
    """Whether kernels written in Triton can run here, and why not otherwise."""
    if INSTALLED is None:
        return "not installed; attention goes without kernels of its own: pip install triton"
    if device.type != "cuda":
        return f"{INSTALLED}, without use: kernels need a CUDA GPU, the default device is {device.type}"
    lacks = {how: unusable(how, capability(device)) for how in ("gluon", "triton")}
    words = [f"{how}: {lack}" if lack else f"{how} kernel of block-sparse attention" for how, lack in lacks.items()]
    return f"{INSTALLED} ({'; '.join(words)})"


def _say(name: str, value: object) -> None:
    print(f"{name + ':':<22}{value}")
