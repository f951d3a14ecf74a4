"""The files of saved sessions and prompts: one safetensors file whose metadata holds a header and a checksum of all."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from worldstride.atomic import atomic_write
from worldstride.errors import InputError, SaveFileError

FORMAT = "worldstride-session"
"""Name of the format in the metadata."""
VERSION = 1
"""Version of the formats that this package writes and reads."""


@dataclass(frozen=True)
class Kind:
    """What a file holds, in the words of its metadata and of errors."""

    format: str
    """Name of the format in the metadata."""
    name: str
    remedy: str
    """What to do about a damaged one."""


SESSION = Kind(FORMAT, "saved session", "use an earlier save")
PROMPT = Kind("worldstride-prompt", "saved prompt", "encode it anew")

_HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors format itself
_ENTRIES = {"format", "version", "header", "sha256"}


def write_save(path: str | Path, header: dict[str, Any], tensors: dict[str, Tensor], kind: Kind = SESSION) -> None:
    """Write `header` (JSON data; tuples come back as lists) and `tensors` to `path`, atomically.

    Every tensor keeps its bits, dtype and shape; device, strides, shared storage and gradients are not kept.
    Raises `InputError` if the header is no JSON data or a tensor cannot be stored.
    """
    try:
        text = json.dumps(header)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the header of a save file must be JSON data: {error}") from None
    stored = {name: _plain(name, tensor) for name, tensor in tensors.items()}
    metadata = {"format": kind.format, "version": str(VERSION), "header": text, "sha256": _digest(kind, text, stored)}
    with atomic_write(path) as temporary:
        try:
            # bytes first: the library's own writer leaves files that only their owner can read
            temporary.write_bytes(safetensors.torch.save(stored, metadata))
        except (SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"cannot store these tensors in {path}: {error}") from error


def read_save(path: str | Path, kind: Kind = SESSION) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The (header, tensors) of a file by `write_save`; tensors are on the CPU and independent of the file.

    Raises `SaveFileError` if the file is missing, not ours, of another version, or damaged anywhere.
    """
    try:
        with Path(path).open("rb") as file:
            metadata = _metadata(path, file.read(8), file, kind)
            file.seek(0)
            data = file.read()
    except OSError as error:
        raise SaveFileError(f"cannot read the {kind.name} {path}: {error.strerror or error}") from None
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # a damaged file fails in many ways inside the parser, all mean the same
        raise SaveFileError(f"{path} is damaged or cut short ({error}); {kind.remedy}") from None
    if _digest(kind, metadata["header"], tensors) != metadata["sha256"]:
        raise SaveFileError(f"{path} is damaged: its contents miss their checksum; {kind.remedy}")
    return json.loads(metadata["header"]), tensors


def _metadata(path: str | Path, prefix: bytes, file: Any, kind: Kind) -> dict[str, str]:
    """The metadata of a safetensors file; looks at no tensor, so a large foreign file is refused at once."""
    length = int.from_bytes(prefix, "little")
    foreign = f"{path} is no {kind.name} ({{}}); expected a file written by worldstride, format {kind.format!r}"
    if len(prefix) < 8 or not 2 <= length <= _HEADER_LIMIT:
        raise SaveFileError(foreign.format("it does not begin as a safetensors file, or is cut short"))
    try:
        metadata = json.loads(file.read(length).decode("utf-8"))["__metadata__"]
        name = metadata["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise SaveFileError(foreign.format("its safetensors header is missing, foreign or damaged")) from None
    if name != kind.format:
        raise SaveFileError(foreign.format(f"its format is {name!r}"))
    if metadata.get("version") != str(VERSION):
        raise SaveFileError(
            f"{path} is a {kind.name} of version {metadata.get('version')!r}; this release reads version "
            f"{VERSION}: open it with the release that wrote it"
        )
    if set(metadata) != _ENTRIES or not all(isinstance(value, str) for value in metadata.values()):
        raise SaveFileError(f"{path} is damaged: its metadata must hold {sorted(_ENTRIES)}")
    return metadata


def _plain(name: str, tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU that owns its storage (safetensors refuses shared storage)."""
    if not name or name == "__metadata__":
        raise InputError(f"a tensor of a save file cannot be named {name!r}")
    if not isinstance(tensor, Tensor):
        raise InputError(f"entry {name!r} of a save file must be a tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise InputError(f"tensor {name!r} must be dense and hold data, not {tensor.layout}, {tensor.device}")
    plain = tensor.detach().resolve_conj().resolve_neg().cpu()
    return plain.clone(memory_format=torch.contiguous_format)


def _digest(kind: Kind, header: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 (hexadecimal) over format, version, header and every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(json.dumps([kind.format, VERSION, header]).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
