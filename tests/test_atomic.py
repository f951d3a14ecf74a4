"""Files that are complete or absent, and what a user reads where neither can be had."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from worldstride.atomic import atomic_write, put_in_place
from worldstride.errors import InputError


def test_atomic_write_replaces_or_leaves_alone(tmp_path: Path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("one")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as temporary:
        temporary.write_text("two")
        raise KeyboardInterrupt
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="folder"), atomic_write(tmp_path):
        pass


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOSPC, errno.EROFS])
def test_a_refused_replacement_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int):
    def refuse(source: object, target: object, **_: object) -> None:
        raise OSError(code, os.strerror(code), str(source), None, str(target))

    path = tmp_path / "a.txt"
    path.write_text("one")
    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(Path, "replace", refuse)  # some versions of pathlib keep their own reference
    expected = f"cannot write {path}: {os.strerror(code)}; choose a folder you can write to"
    with pytest.raises(InputError) as raised, atomic_write(path) as temporary:
        temporary.write_text("two")
    assert str(raised.value) == expected
    assert isinstance(raised.value.__cause__, OSError)
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]
    other = tmp_path / "b.txt"
    other.write_text("two")
    with pytest.raises(InputError) as raised:
        put_in_place(other, path)
    assert str(raised.value) == expected


def test_a_failing_flush_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError, match="No space left"), atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("one")
    assert list(tmp_path.iterdir()) == []


def test_a_temporary_that_cannot_be_made_is_an_input_error(tmp_path: Path):
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(InputError, match=r"cannot write .*a\.txt: .*; choose"), atomic_write(folder / "a.txt") as file:
        folder.rmdir()
        file.write_text("one")


def test_a_full_disk_is_an_input_error(tmp_path: Path):
    with pytest.raises(InputError, match="No space left"), atomic_write(tmp_path / "a.txt"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write through an open file raises it


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "another file"),
        OSError(errno.EPIPE, "Broken pipe"),
        ConnectionResetError("by the peer"),
        RuntimeError("of the caller"),
        InputError("of the caller"),
    ],
)
def test_errors_of_the_block_pass_unchanged(tmp_path: Path, error: Exception):
    with pytest.raises(type(error)) as raised, atomic_write(tmp_path / "a.txt"):
        raise error
    assert raised.value is error
    assert list(tmp_path.iterdir()) == []
