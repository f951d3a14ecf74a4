"""Measured choices of dense attention in a file, so that a device is measured once.

The file holds what it was measured with; where anything of that has changed, it is stale.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import platformdirs
import torch

from worldstride._version import __version__
from worldstride.atomic import atomic_write
from worldstride.attention import measuring, versions
from worldstride.attention.measuring import Measurement, Place, Size, Timing

FORMAT = "worldstride attention 2"
UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError)
"""What reading a file that holds something else can raise."""


def default_file(device: torch.device, dtype: torch.dtype) -> Path:
    """Where choices are kept unless another file is named: one a kind of GPU and precision, in the user's cache."""
    gpu = "".join(c if c.isalnum() else "-" for c in made_with(device)["device"].lower())
    name = f"attention-{gpu}-{str(dtype).removeprefix('torch.')}.json"
    return platformdirs.user_cache_path("worldstride", appauthor=False) / name


def made_with(device: torch.device) -> dict[str, str]:
    """Everything that a choice depends on besides the sizes."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "capability": ".".join(map(str, versions.capability(device))),
        "torch": torch.__version__,
        "cudnn": str(torch.backends.cudnn.version()) if cuda else "none",
        "triton": versions.INSTALLED or "none",
        "worldstride": __version__,
    }


def write(file: Path, content: Mapping[str, Any]) -> None:
    """Write what was measured; the folder is made. Raises `InputError` or `OSError` where the system refuses."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")


def read(file: Path, header: Mapping[str, Any]) -> Any:
    """What `write` wrote. Raises one of `UNREADABLE` where it is absent, damaged, or its header differs."""
    found = json.loads(file.read_text(encoding="utf-8"))
    if any(found[name] != value for name, value in header.items()):
        raise ValueError(f"{file} is of another device, other versions or another format")
    return found


def store(file: Path, measured: Measurement, device: torch.device, dtype: torch.dtype) -> None:
    """Write choices; raises like `write`."""
    whole = {**_header(device, dtype), "head_dims": list(measured.head_dims), "date": measured.date}
    rows = {"times": _rows(measured.times), "exact": _rows(measured.exact)}
    write(file, {**whole, "refused": dict(measured.refused), **rows})


def load(
    file: Path, device: torch.device, dtype: torch.dtype, dims: Sequence[int], known: Collection[str]
) -> Measurement | None:
    """Choices from a file; None where it is absent, damaged, of other things, or names unknown backends."""
    try:
        found = read(file, _header(device, dtype))
        if not {*dims} <= {*found["head_dims"]}:
            return None
        times = {_place(*row[:-1]): tuple(_timing(known, *t) for t in row[-1]) for row in found["times"]}
        exact = {_size(*row[:-1]): tuple(_timing(known, *t) for t in row[-1]) for row in found["exact"]}
        if not all((*times.values(), *exact.values())):
            return None
        refused = {str(name): str(why) for name, why in found["refused"].items()}
        return Measurement(str(found["date"]), times, refused, tuple(_whole(found["head_dims"])), exact)
    except UNREADABLE:
        return None  # measured again


def _header(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    grid = [measuring.MEASURED_ROWS, measuring.MEASURED_QUERIES, measuring.MEASURED_KEYS]
    ends = [measuring.ROWS, measuring.QUERIES, measuring.KEYS]
    grid, ends = ([list(part) for part in parts] for parts in (grid, ends))
    return {"format": FORMAT, "made_with": made_with(device), "dtype": str(dtype), "measured_at": grid, "ranges": ends}


def _rows(times: Mapping[Place, Sequence[Timing]] | Mapping[Size, Sequence[Timing]]) -> list[list[Any]]:
    return [[*at, [list(t) for t in found]] for at, found in times.items()]


def _place(head_dim: int, rows: int, queries: int, keys: int, bias: bool) -> Place:
    if type(bias) is not bool:
        raise ValueError("a place is four integers and whether there is a bias")
    _whole([head_dim, rows, queries, keys])
    return Place(head_dim, rows, queries, keys, bias)


def _size(head_dim: int, rows: int, queries: int, keys: int) -> Size:
    _whole([head_dim, rows, queries, keys])
    return Size(head_dim, rows, queries, keys)


def _whole(numbers: Sequence[int]) -> Sequence[int]:
    if not all(type(n) is int for n in numbers):
        raise ValueError(f"not all of {numbers} are integers")
    return numbers


def _timing(known: Collection[str], backend: str, ms: float, plans: bool) -> Timing:
    if backend not in known or not ms > 0 or type(plans) is not bool:
        raise ValueError("a timing is a known backend, milliseconds and whether there are plans")
    return Timing(backend, float(ms), plans)
