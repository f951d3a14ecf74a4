"""Files that are either complete or absent: write beside the target, then put in place in one move."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from worldstride.errors import InputError


def temporary_beside(path: str | Path) -> Path:
    """An unused name in the folder of `path` with the same suffix; nothing is created.

    Raises `InputError` if the folder does not exist or `path` is itself a folder.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise InputError(f"cannot write {target}: the folder {target.parent} does not exist; create it first")
    if target.is_dir():
        raise InputError(f"cannot write {target}: it is a folder; give the name of a file")
    return target.with_name(f".{target.stem[:100]}.{secrets.token_hex(6)}.tmp{target.suffix}")


def put_in_place(temporary: Path, path: str | Path) -> None:
    """Flush `temporary` to the disk and rename it to `path`, replacing an older file."""
    with temporary.open("r+b") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    if os.name != "nt":  # a rename survives a power cut only when its folder is flushed too; Windows cannot
        with contextlib.suppress(OSError):  # some network file systems refuse to flush a folder
            folder = os.open(Path(path).parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it becomes `path` when the block ends well.

    On any exception, Ctrl-C included, the temporary file is removed and an older file at `path` stays.
    Raises `InputError` if `path` cannot be a file there.
    """
    temporary = temporary_beside(path)
    try:
        yield temporary
        put_in_place(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one worth reading
            temporary.unlink()
        raise
