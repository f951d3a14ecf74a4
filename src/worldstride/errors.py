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
    """A saved session cannot be read: not ours, damaged, of another version, or of another model."""


class MissingDependencyError(WorldstrideError, ImportError):
    """An optional package is needed; the text says which extra installs it."""


class ContractError(WorldstrideError):
    """A model breaks the protocol (raised by `worldstride.testing.check_model`)."""


def did_you_mean(word: object, known: Sequence[str]) -> str:
    """A hint at the known word nearest to an unknown one, to stand behind it in a text; empty where none is near."""
    near = difflib.get_close_matches(str(word), known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
