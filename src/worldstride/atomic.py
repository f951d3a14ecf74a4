"""Files that are either complete or absent: write beside the target, then put in place in one move."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from worldstride.errors import InputError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # full disk, quota, file size: errors of writing, without a name


def cannot_write(path: str | Path, error: OSError) -> InputError:
    """What a user reads where the operating system refuses to write `path`."""
    return InputError(f"cannot write {path}: {error.strerror or error}; choose a folder you can write to")


def temporary_beside(path: str | Path) -> Path:
    """An unused name in the folder of `path` with the same suffix; nothing is created.

    Raises `InputError` if the folder does not exist or cannot be looked into, or `path` is itself a folder.
    """
    target = Path(path)
    try:
        has_folder, is_folder = target.parent.is_dir(), target.is_dir()
    except OSError as error:
        raise cannot_write(target, error) from error
    if not has_folder:
        raise InputError(f"cannot write {target}: the folder {target.parent} does not exist; create it first")
    if is_folder:
        raise InputError(f"cannot write {target}: it is a folder; give the name of a file")
    return target.with_name(f".{target.stem[:100]}.{secrets.token_hex(6)}.tmp{target.suffix}")


def put_in_place(temporary: Path, path: str | Path) -> None:
    """Flush `temporary` to the disk and rename it to `path`, replacing an older file.

    Raises `InputError` where the system refuses: a full disk, or on Windows a target that a program holds open.
    """
    try:
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
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
    Raises `InputError` if `path` cannot be a file there or the temporary file cannot be written; every other
    exception of the block passes unchanged.
    """
    temporary = temporary_beside(path)
    try:
        yield temporary
        put_in_place(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the first error is the one worth reading
            temporary.unlink()
        if isinstance(error, OSError) and _is_of_writing(error, temporary):
            raise cannot_write(path, error) from error
        raise


def _is_of_writing(error: OSError, temporary: Path) -> bool:
    if error.filename is None:  # a write through an open file names no file
        return error.errno in _FULL
    return isinstance(error.filename, str | bytes | os.PathLike) and Path(os.fsdecode(error.filename)) == temporary
