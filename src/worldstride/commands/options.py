"""Options that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from tyro.conf import Positional, arg

from worldstride.acceleration import Acceleration
from worldstride.engine import Engine, Weights, load
from worldstride.models.quantised import Scheme

DTypeName = Literal["float32", "bfloat16"]
ModelName = Annotated[Positional[str], arg(metavar="MODEL")]
OptionalText = Annotated[str | None, arg(metavar="STR")]
OptionalInt = Annotated[int | None, arg(metavar="INT")]
OptionalPath = Annotated[Path | None, arg(metavar="PATH")]
Family = Literal["courtyard", "plain", "corridor"]


@dataclass(frozen=True)
class EngineOptions:
    """Where the model comes from and where it computes."""

    weights: Weights = "pretrained"
    """Trained weights, or seeded random ones, which measure speed and never quality; also `--random-weights`."""
    path: OptionalPath = None
    """Checkpoint, where the model does not ship inside the package."""
    device: OptionalText = None
    """"cpu", "cuda" or "cuda:1"; without it a GPU where there is one."""
    dtype: Annotated[DTypeName | None, arg(metavar="{float32,bfloat16}")] = None
    """Number format; without it what the device multiplies natively."""
    decoder: OptionalText = None
    """Decoder, where the model has several (`worldstride models`)."""
    quantise: Annotated[Scheme | None, arg(metavar="{float8,int8}")] = None
    """Weights in 8 bits: less memory, other results; needs torchao (`worldstride[quantised]`)."""
    compile: bool = False
    """Compile the model first: slower to start, then faster; a CPU needs a C++ compiler."""

    def load(self, model: str, acceleration: Acceleration | str | Path = "off") -> Engine:
        """The engine that these options ask for."""
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        of = (model, self.path, self.weights, self.device, acceleration, dtype, self.compile, self.decoder)
        return load(*of, self.quantise)
