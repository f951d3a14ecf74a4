"""Result files: valid JSON, written whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from worldstride.atomic import atomic_write
from worldstride.errors import InputError


def plain(value: object) -> object:
    """The same value for JSON: tuples as lists, NaN and infinities, which JSON lacks, as null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(v) for v in value]
    return value


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write a result atomically."""
    text = json.dumps(plain(value), indent=1, allow_nan=False)
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def make_folder(path: Path) -> None:
    """Create a folder for results; `InputError` where that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {path}: {error.strerror or error}") from error


def quantile(values: Sequence[float], share: float) -> float:
    """Linear quantile, NaN of nothing."""
    if not values:
        return math.nan
    ordered, at = sorted(values), share * (len(values) - 1)
    low = math.floor(at)
    high = min(low + 1, len(values) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)
