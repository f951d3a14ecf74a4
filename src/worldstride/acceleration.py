"""Settings of everything that may spend less than full compute, and named presets of them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, cast

from worldstride.context.policy import SpatialMemory, TemporalWindow
from worldstride.errors import InputError, did_you_mean


@dataclass(frozen=True)
class Acceleration:
    """What to spend. Every field at None means full compute: the model's plain loop, bit for bit."""

    name: str = "off"
    """Name for reports."""
    steps: int | None = None
    """Solver steps; fewer are faster and softer."""
    shift: float | None = None
    """Shift of the noise schedule; None takes what measured best for the number of steps."""
    window: int | None = None
    """Most recent latents to attend to, at most the model's own number."""
    memory: int | None = None
    """Retrieved latents to attend to, at most the model's own number; 0 forgets everything but window and sink."""
    temporal: TemporalWindow | None = None
    """Let the window follow the scene's changes; `window` then bounds it."""
    spatial: SpatialMemory | None = None
    """Attend to retrieved memory on a revisit only; `memory` then bounds it."""

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("window", 1), ("memory", 0)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise InputError(f"acceleration.{name} must be an integer of at least {least}, got {value!r}")
        shift = self.shift
        number = isinstance(shift, (int, float)) and not isinstance(shift, bool)
        if shift is not None and not (number and 0 < shift < math.inf):
            raise InputError(f"acceleration.shift must be a positive number, got {shift!r}")
        if not isinstance(self.name, str) or not self.name:
            raise InputError(f"acceleration.name must be a text of at least one letter, got {self.name!r}")

    def to_json(self) -> dict[str, object]:
        """Plain values, for reports and saves."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: object, source: str = "acceleration") -> Acceleration:
        """Undo `to_json`; `InputError` names an unknown setting and the known ones."""
        return _from_json(cls, values, source)


_Settings = TypeVar("_Settings")
_BRANCHES: dict[str, type] = {"temporal": TemporalWindow, "spatial": SpatialMemory}
"""Settings that are settings themselves."""


def _from_json(kind: type[_Settings], values: object, source: str) -> _Settings:
    if not isinstance(values, dict):
        raise InputError(f"{source} must be a JSON object of settings, got {type(values).__name__}")
    known = [f.name for f in fields(cast(Any, kind))]
    for key in values:
        if key not in known:
            hint = did_you_mean(key, known)
            raise InputError(f"{source}: unknown setting {key!r}{hint}; known: {', '.join(known)}")
    given = {k: v for k, v in values.items() if k in _BRANCHES and v is not None}
    return kind(**{**values, **{k: _from_json(_BRANCHES[k], v, f"{source}.{k}") for k, v in given.items()}})


PRESETS: dict[str, Acceleration] = {
    "off": Acceleration(),
    "steps-4": Acceleration("steps-4", steps=4),
    "steps-2": Acceleration("steps-2", steps=2),
}
"""Named settings. "off" is full compute."""


def resolve(value: Acceleration | str | Path) -> Acceleration:
    """Settings from themselves, a preset's name, or a JSON file of settings."""
    if isinstance(value, Acceleration):
        return value
    if str(value) in PRESETS:
        return PRESETS[str(value)]
    path = Path(value)
    if path.suffix != ".json":
        raise InputError(
            f"unknown acceleration {str(value)!r}; presets: {', '.join(PRESETS)}, or a .json file of settings"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"cannot read acceleration settings from {path}: {error}") from error
    settings = Acceleration.from_json(values, str(path))
    return settings if "name" in values else Acceleration.from_json({**values, "name": path.stem})
