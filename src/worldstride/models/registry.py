"""The models that can be loaded by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from worldstride.control import ControlSettings
from worldstride.errors import InputError, did_you_mean
from worldstride.models.courtyard.weights import load_courtyard
from worldstride.models.hy_worldplay.wan_loading import load_wan, load_worldplay
from worldstride.models.matrix_game3.controls import CONTROLS
from worldstride.models.matrix_game3.loading import DECODERS, ORIGIN, load_matrix_game3
from worldstride.protocol import WorldModel

Loader = Callable[..., tuple[WorldModel, str]]
"""(path, weights, device, dtype) -> model and the SHA-256 of its weights; `decoder` comes last where there are some."""


@dataclass(frozen=True)
class ModelEntry:
    """One loadable model, as `worldstride models` lists it."""

    name: str
    parameters: str
    weights: str
    """Where the weights come from."""
    licence: str
    load: Loader
    repository: str = ""
    """Where the weights are published, a second name of the model."""
    controls: ControlSettings = field(default_factory=ControlSettings)
    """How keys and mouse move the camera; as in the model's training walks."""
    frames_per_second: int = 10
    """Of videos that it was trained on."""
    decoders: tuple[str, ...] = ()
    """Decoders that can be chosen among, the usual one first."""


_WALKS = ControlSettings(0.02, math.radians(0.75), math.radians(0.75))
_TENCENT = (
    "Tencent HY-WorldPlay Community License: neither use nor outputs in the EU, the UK and South Korea; more than "
    "1 M monthly users need a licence; outputs must not improve other models"
)

MODELS: tuple[ModelEntry, ...] = (
    ModelEntry("courtyard", "7.4 M", "in the package", "Apache-2.0", load_courtyard),
    ModelEntry(
        "hy_worldplay", "8.6 B + VAE 1.3 B", "tencent/HY-WorldPlay, vae of tencent/HunyuanVideo-1.5", _TENCENT,
        load_worldplay, "tencent/HY-WorldPlay", _WALKS, 24,
    ),
    ModelEntry(
        "hy_worldplay_wan", "5.3 B + VAE 0.7 B",
        "wan_distilled_model of tencent/HY-WorldPlay, vae of Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        f"{_TENCENT}; the VAE is Apache-2.0", load_wan, "tencent/HY-WorldPlay/wan_distilled_model", _WALKS, 24,
    ),
    ModelEntry(
        "matrix_game3", "6.5 B + VAE 0.2 to 0.7 B", ORIGIN, "Apache-2.0", load_matrix_game3, ORIGIN, CONTROLS, 17,
        tuple(DECODERS),
    ),
)  # fmt: skip


def find(name: str) -> ModelEntry:
    """The entry of a name; `InputError` lists the known ones and the nearest."""
    for entry in MODELS:
        if name and name in (entry.name, entry.repository):
            return entry
    known = [entry.name for entry in MODELS]
    raise InputError(f"unknown model {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
