"""Saves: what they keep, and what they are never continued by."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import worldstride
from walking import FORWARD, TURN, first_frames, same, walk
from worldstride import Acceleration, ControlSettings, Engine
from worldstride.engine import EngineSource
from worldstride.errors import SaveFileError
from worldstride.savefile import read_save, write_save


@pytest.mark.parametrize("procedural", [True, False])
def test_a_save_keeps_its_controls(tiny_engine: Engine, procedural: bool, tmp_path: Path):
    quick = Engine(tiny_engine.model, tiny_engine.source, Acceleration(), ControlSettings(speed=0.2, turn=0.3))
    session = quick.new(seed=7) if procedural else quick.open(first_frames(4, 24, 24), walk(4))
    session.step(FORWARD)
    quick.controls = ControlSettings()
    session.save(tmp_path / "a.world")
    opened = worldstride.open(tmp_path / "a.world", engine=tiny_engine)
    assert same(session.step(TURN), opened.step(TURN))


def test_a_save_keeps_its_acceleration(tiny_engine: Engine, tmp_path: Path):
    session = tiny_engine.new(seed=7)
    session.acceleration = Acceleration("mine", steps=3, window=2)
    session.save(tmp_path / "a.world")
    assert worldstride.open(tmp_path / "a.world", engine=tiny_engine).acceleration == session.acceleration


@pytest.fixture
def saved(tiny_engine: Engine, tmp_path: Path) -> Path:
    session = tiny_engine.new(seed=7)
    session.step(FORWARD)
    session.save(tmp_path / "a.world")
    return tmp_path / "a.world"


def test_damaged_and_foreign_saves_are_refused(saved: Path, tiny_engine: Engine, tmp_path: Path):
    data = saved.read_bytes()
    middle = len(data) // 2
    cases = {
        "cut": data[:middle],
        "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
        "empty": b"",
        "text": b"no world at all, but long enough",
    }
    for name, content in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(SaveFileError):
            worldstride.open(path, engine=tiny_engine)
    save_file({"x": torch.zeros(3)}, tmp_path / "foreign", {"format": "other"})
    for name in ("foreign", "missing"):
        with pytest.raises(SaveFileError):
            worldstride.open(tmp_path / name, engine=tiny_engine)


@pytest.mark.parametrize("missing", ["engine", "history", "noise_seed", "controls", "tensor"])
def test_an_incomplete_save_is_refused(saved: Path, tiny_engine: Engine, tmp_path: Path, missing: str):
    header, tensors = read_save(saved)
    if missing == "tensor":
        del tensors["cameras"]
    else:
        del header[missing]
    write_save(tmp_path / "b.world", header, tensors)
    with pytest.raises(SaveFileError, match="no complete session"):
        worldstride.open(tmp_path / "b.world", engine=tiny_engine)


def test_a_save_is_never_continued_by_something_else(saved: Path, tiny_engine: Engine, joint: Engine):
    source = EngineSource("courtyard", None, "random", "0123456789abcdef")
    with pytest.raises(SaveFileError, match=r"saved with other weights of 'courtyard' \(SHA-256 tiny.*0123456789ab"):
        worldstride.open(saved, engine=Engine(tiny_engine.model, source, Acceleration()))
    with pytest.raises(SaveFileError, match="a world of model 'courtyard'; the engine runs 'joint'"):
        worldstride.open(saved, engine=joint)


def test_a_save_of_another_size_is_refused(saved: Path, full_engine: Engine):
    source = EngineSource("courtyard", None, "random", "tiny")
    with pytest.raises(SaveFileError, match=r"holds latents of shape \[6, 288\]"):
        worldstride.open(saved, engine=Engine(full_engine.model, source, Acceleration()))


def test_a_save_in_another_precision_is_refused(saved: Path, tiny_engine: Engine):
    source = dataclasses.replace(tiny_engine.source, dtype="bfloat16")
    other = Engine(tiny_engine.model, source, tiny_engine.acceleration)
    with pytest.raises(SaveFileError, match="made in float32, the engine computes in bfloat16"):
        worldstride.open(saved, engine=other)
    source = dataclasses.replace(tiny_engine.source, compiled=True)
    other = Engine(tiny_engine.model, source, tiny_engine.acceleration)
    with pytest.raises(SaveFileError, match="made by a model not compiled, the engine's is compiled; give one"):
        worldstride.open(saved, engine=other)
