"""Exceptions that a user can cause. Each text says what was wrong, which value, and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class WorldstrideError(Exception):
    """Base of everything this package raises on purpose."""


class InputError(WorldstrideError, ValueError):
    """A value given by the caller cannot be used (wrong shape, range, name or type)."""


class TrajectoryError(InputError):
    """A trajectory's text or file cannot be read; the text marks the position where there is one."""


class CheckpointError(WorldstrideError):
    """A weights file is missing, foreign, damaged, or does not fit the model."""


class SaveFileError(WorldstrideError):
    """A saved session or prompt cannot be read: not ours, damaged, of another version, or of another model."""


class MissingDependencyError(WorldstrideError, ImportError):
    """An optional package is needed; the text says which extra installs it."""


class ContractError(WorldstrideError):
    """A model breaks the protocol (raised by `worldstride.testing.check_model`)."""


def did_you_mean(word: object, known: Sequence[str]) -> str:
    """A hint at the known word nearest to an unknown one, to stand behind it in a text; empty where none is near."""
    near = difflib.get_close_matches(str(word), known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def number_in(name: str, value: object, low: float, high: float, open_low: bool = False) -> None:
    """Raise `InputError` unless `value` is a number in [low, high], or in (low, high] where `open_low`."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not fits or (open_low and value == low):
        interval = f"{'above' if open_low else 'at least'} {low:g} and at most {high:g}"
        raise InputError(f"{name} must be a number {interval}, got {value!r}")


def integer_from(name: str, value: object, least: int) -> None:
    """Raise `InputError` unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be an integer of at least {least}, got {value!r}")
