"""Which kernels the installed Triton and the device can run. Triton is not imported to find out."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import torch

TRITON = (3, 4)
"""Oldest Triton with tensor descriptors made by the host."""
GLUON = ((3, 6), (3, 8))
"""Tritons whose Gluon the warp-specialised kernel is written for: from, up to and without. It was measured with 3.6 and
compiles to the same structure with 3.7. Gluon is experimental and changes from minor version to minor version (3.8
spills registers in one variant, 3.9 lacks a function that is used); any other Triton takes the plain kernel."""


def _installed() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # builds for other devices have other names
        return "of unknown version"


INSTALLED = _installed()
"""Version of the installed Triton; None where there is none. A constant, which `torch.compile` sees through."""


def _numbers(version: str | None) -> tuple[int, int]:
    major, _, rest = (version or "").partition(".")
    minor = rest.partition(".")[0]
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)


_VERSION = _numbers(INSTALLED)


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; (0, 0) elsewhere."""
    if device.type != "cuda":
        return 0, 0
    facts = torch.cuda.get_device_properties(device)  # a compiler takes it for a constant
    return facts.major, facts.minor


def unusable(how: str, capability: tuple[int, int]) -> str:
    """Why a kernel ("triton" or "gluon") cannot run on a device of such a capability; empty where it can."""
    if INSTALLED is None:
        return "triton is not installed"
    if _VERSION < TRITON:
        return f"it needs triton {TRITON[0]}.{TRITON[1]} or newer, installed is {INSTALLED}"
    if capability < (8, 0):
        return f"it needs compute capability 8.0 or higher, the device has {capability[0]}.{capability[1]}"
    if how == "gluon":
        if capability[0] != 9:
            return f"it is written for compute capability 9.x, the device has {capability[0]}.{capability[1]}"
        if not GLUON[0] <= _VERSION < GLUON[1]:
            oldest, newest = (".".join(map(str, v)) for v in GLUON)
            return f"it is written for triton {oldest} up to, not with, {newest}; installed is {INSTALLED}"
    return ""
