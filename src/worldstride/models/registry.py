"""The models that can be loaded by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from worldstride.errors import InputError, did_you_mean
from worldstride.models.courtyard.weights import load_courtyard
from worldstride.protocol import WorldModel

Loader = Callable[[Path | None, Literal["pretrained", "random"], torch.device, torch.dtype], tuple[WorldModel, str]]


@dataclass(frozen=True)
class ModelEntry:
    """One loadable model, as `worldstride models` lists it."""

    name: str
    parameters: str
    weights: str
    """Where the weights come from."""
    licence: str
    load: Loader
    """(path, weights, device, dtype) -> model and the SHA-256 of its weights."""


MODELS: tuple[ModelEntry, ...] = (ModelEntry("courtyard", "7.4 M", "in the package", "Apache-2.0", load_courtyard),)


def find(name: str) -> ModelEntry:
    """The entry of a name; `InputError` lists the known ones and the nearest."""
    for entry in MODELS:
        if entry.name == name:
            return entry
    known = [entry.name for entry in MODELS]
    raise InputError(f"unknown model {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
