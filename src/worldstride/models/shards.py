"""Tensors of checkpoint files, read when they are asked for: one safetensors file, or several with an index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from worldstride.errors import CheckpointError

_PIECES, _PIECE = 64, 1 << 16
"""Of every file so many pieces of so many bytes enter its fingerprint, besides names and shapes."""


_FILES = (
    "diffusion_pytorch_model.safetensors.index.json", "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors", "model.safetensors",
)  # fmt: skip
"""Files that a folder's weights lie in, of which the first that is there is read."""


class Shards(Mapping[str, Tensor]):
    """Name -> tensor of safetensors files; nothing but names is held."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Raises `CheckpointError` on files that cannot be read, and on a name in two of them."""
        self.files, self._where = list(files), dict[str, Path]()
        for file in files:
            for name in _opened(file).keys():  # noqa: SIM118
                if name in self._where:
                    raise CheckpointError(f"tensor {name!r} is in {self._where[name].name} and in {file.name}")
                self._where[name] = file
        self._open = {file: _opened(file) for file in files}

    def __getitem__(self, name: str) -> Tensor:
        return self._open[self._where[name]].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def fingerprint(self) -> str:
        """SHA-256 of all names, shapes and precisions, and of pieces spread over the values: reading all takes long."""
        digest = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as opened:
                size = file.stat().st_size
                head = int.from_bytes(opened.read(8), "little")
                digest.update(opened.read(head))
                spread(digest, opened, 8 + head, size)
        return digest.hexdigest()


def spread(digest: hashlib._Hash, opened: BinaryIO, body: int, size: int) -> None:
    """Put pieces of a file of `size` bytes, spread over what begins at `body`, and its size into a digest."""
    for i in range(_PIECES):
        opened.seek(body + (size - body) * i // _PIECES)
        digest.update(opened.read(_PIECE))
    digest.update(size.to_bytes(8, "little"))


def find(folder: Path, names: Sequence[str]) -> list[Path]:
    """Files of the first of `names` (safetensors, or a JSON index of them) that a folder holds; empty without any."""
    for name in names:
        file = folder / name
        if not file.is_file():
            continue
        if file.suffix != ".json":
            return [file]
        listed = read_json(file).get("weight_map")
        if not isinstance(listed, dict):
            raise CheckpointError(f"{file} is no index of weights: it has no table 'weight_map'")
        files = [folder / str(shard) for shard in sorted(set(listed.values()))]
        if absent := [shard.name for shard in files if not shard.is_file()]:
            raise CheckpointError(f"{file} names {len(absent)} files that are not there: {', '.join(absent[:3])}")
        return files
    return []


def published(folder: Path, origin: str) -> Shards:
    """The tensors of a folder's safetensors files; a `CheckpointError` says that they come from `origin`."""
    files = find(folder, _FILES)
    if not files:
        raise CheckpointError(f"{folder} holds none of {', '.join(_FILES)}; it is the {origin}")
    return Shards(files)


def check_fit(module: nn.Module, tensors: Mapping[str, Tensor], file: Path, what: str) -> None:
    """Raise `CheckpointError` unless the tensors of `file` are by name and shape those of a module, made for `what`."""
    expected = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if wrong := sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k)):
        name = wrong[0]
        raise CheckpointError(
            f"{file}: {len(wrong)} tensors do not fit {what}; first {name!r}: expected "
            f"{expected.get(name, 'none')}, found {found.get(name, 'none')}"
        )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; `CheckpointError` where the file holds something else."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} must hold a JSON object, got {type(values).__name__}")
    return values


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read weights from {file}: {error}") from error
