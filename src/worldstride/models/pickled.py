"""Tensors of a checkpoint that torch pickled, read as weights alone and when they are asked for."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from worldstride.errors import CheckpointError
from worldstride.models.shards import spread

_LISTED = 5


class Pickled(Mapping[str, Tensor]):
    """Name -> tensor of one entry of a file of `torch.save`, whose values stay on disk until they are used.

    Nothing in the file is run: it is read with `weights_only`.
    """

    def __init__(
        self, file: Path, entry: str | Sequence[str], wrappers: Sequence[str] = (), prefixes: Sequence[str] = ()
    ) -> None:
        """The tensors of `entry`; of several entries, the first that there is, or else of the file itself.

        Args:
            file: the file.
            entry: the name of a table of tensors in it, or names that it may have; none where it is the table.
            wrappers: parts of names, each with its dot, that what trained the model put in anywhere; they are left out.
            prefixes: parts that names may begin with, likewise, once each.

        Raises `CheckpointError` on a file that cannot be read in this way, without the entry, or with two names that
        become one.
        """
        self.file, self._tensors = file, dict[str, Tensor]()
        for name, value in _table(file, entry).items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                raise CheckpointError(
                    f"{file}: {_said(entry)} must name tensors, got {type(value).__name__} under {str(name)!r}"
                )
            short = name
            for part in wrappers:
                short = short.replace(part, "")
            for part in prefixes:
                short = short.removeprefix(part)
            if short in self._tensors:
                raise CheckpointError(f"{file}: {name!r} is the second tensor that stands for {short!r}")
            self._tensors[short] = value

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def fingerprint(self) -> str:
        """SHA-256 of all names, shapes and precisions, and of pieces spread over the file: reading all takes long."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._tensors.items()):
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        with self.file.open("rb") as opened:
            spread(digest, opened, 0, self.file.stat().st_size)
        return digest.hexdigest()


def _table(file: Path, entry: str | Sequence[str]) -> Mapping[object, object]:
    try:
        held: object = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        said = str(error).strip().splitlines()
        raise CheckpointError(
            f"cannot read weights alone from {file}: {said[0] if said else type(error).__name__}"
        ) from error
    if not isinstance(held, Mapping):
        with_it = f" with {_said(entry)}" if entry else " of tensors"
        raise CheckpointError(f"{file} must hold a table{with_it}, got {type(held).__name__}")
    if not isinstance(entry, str):
        entry = next((name for name in entry if name in held), "")
        if not entry:
            return held
    if entry not in held:
        found = ", ".join(sorted(map(str, held))[:_LISTED]) or "nothing"
        raise CheckpointError(f"{file} has no entry {entry!r}; it holds {found}")
    table = held[entry]
    if not isinstance(table, Mapping):
        raise CheckpointError(f"{file}: {entry!r} must be a table of tensors, got {type(table).__name__}")
    return table


def _said(entry: str | Sequence[str]) -> str:
    names = [entry] if isinstance(entry, str) else entry
    return f"the entry {' or '.join(map(repr, names))}" if names else "what is in it"
