"""Loading: names, devices, settings and weights files, and what is said when they are wrong."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import worldstride
from joint_model import JointModel
from walking import FORWARD, same
from worldstride import Acceleration, Engine
from worldstride.acceleration import PRESETS, resolve, save_settings
from worldstride.denoising.policy import AdaptiveSteps
from worldstride.errors import CheckpointError, InputError
from worldstride.models.courtyard.adapter import CourtyardModel
from worldstride.models.courtyard.config import CourtyardConfig
from worldstride.models.courtyard.model import Block
from worldstride.models.courtyard.weights import FILE, random_network
from worldstride.models.registry import ModelEntry


def test_unknown_words_are_answered():
    with pytest.raises(InputError, match=r"unknown model 'courtyrd' .did you mean 'courtyard'"):
        worldstride.load("courtyrd")
    with pytest.raises(InputError, match="weights must be 'pretrained' or 'random', got 'none'"):
        worldstride.load("courtyard", weights="none")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="unknown device 'toaster'"):
        worldstride.load("courtyard", weights="random", device="toaster")
    with pytest.raises(InputError, match="unknown acceleration 'warp'; presets: off, "):
        worldstride.load("courtyard", weights="random", acceleration="warp")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where none is")
def test_a_missing_gpu_is_named():
    with pytest.raises(InputError, match="sees no CUDA GPU"):
        worldstride.load("courtyard", weights="random", device="cuda")


def test_acceleration_from_a_file(tiny_engine: Engine, tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text("steps = 3\nmemory = 0\n[adaptive]\nfew = 2\nthreshold = 1.0\n")
    session = tiny_engine.new(seed=1)
    session.acceleration = path
    assert session.acceleration == Acceleration("mine", steps=3, memory=0, adaptive=AdaptiveSteps(2, threshold=1.0))
    assert len(session.step().report.evaluations) == 2  # standing still, everything is known


@pytest.mark.parametrize("name", worldstride.PRESETS)
def test_settings_to_toml_and_back(name: str, tmp_path: Path):
    settings = worldstride.PRESETS[name]
    save_settings(settings, tmp_path / "a.toml", "measured on\ntwo lines")
    assert resolve(tmp_path / "a.toml") == settings
    assert (tmp_path / "a.toml").read_text().startswith("# measured on\n# two lines\n")
    assert Acceleration.from_json(json.loads(json.dumps(settings.to_json()))) == settings


MEASURED = sorted((Path(__file__).parents[1] / "benchmarks").glob("*/*.toml"))


@pytest.mark.parametrize("path", MEASURED, ids=[p.stem for p in MEASURED])
def test_settings_that_were_measured_can_be_read(path: Path):
    assert len(MEASURED) > 15
    settings = resolve(path)
    assert settings.name in (path.stem, "calibrated")
    assert settings != PRESETS["off"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step = 3", r"mine.toml: unknown setting 'step' .did you mean 'steps'.*; known: name, steps"),
        ("spatial = 1", "mine.toml.spatial must be a table of settings, got int"),
        ("[spatial]\ntreshold = 1", r"mine.toml.spatial: unknown setting 'treshold' .did you mean 'threshold'"),
        ("[", "cannot read acceleration settings"),
        ("steps = 0", "acceleration.steps must be an integer of at least 1, got 0"),
        ("steps = true", "acceleration.steps must be an integer"),
        ("window = 1.5", "acceleration.window must be an integer"),
        ("warmup = -1", "acceleration.warmup must be an integer of at least 0"),
        ("shift = -1", "acceleration.shift must be a number above 0"),
        ("shift = nan", "acceleration.shift must be a number above 0"),
        ('shift = "2"', "acceleration.shift must be a number above 0"),
        ('solver = "heun"', "acceleration.solver must be euler or unipc, got 'heun'"),
        ("[cache]\nthreshold = 1.2", "acceleration.cache.threshold must be a number at least 0 and at most 1"),
        ("[cache]\nfirst = 0", "acceleration.cache.first must be an integer of at least 1"),
        ('[cache]\nrule = "guess"', "acceleration.cache.rule must be one of hold, extrapolate"),
        ("[cache]\nscore = 'added'\nmargin = 0.1", "acceleration.cache.margin goes with score 'similarity'"),
        ("[adaptive]\nfew = 0", "acceleration.adaptive.few must be an integer"),
        ("steps = 3\n[adaptive]\nfew = 3", "acceleration.adaptive.few must be below acceleration.steps, 3, got 3"),
        ("[adaptive]\nchange = nan", "acceleration.adaptive.change must be a number"),
        ("[adaptive]\nscore = 'new'", "acceleration.adaptive.score must be one of added, known, similarity"),
        ("[kept]\nsees = 'some'", "acceleration.kept.sees must be one of all, before, itself"),
        ("[kept]\nincremental = 1", "acceleration.kept.incremental must be true or false"),
        ("[kept]\nlimit = 0", "acceleration.kept.limit must be an integer of at least 1"),
        ("[attention]\nevaluations = 0", "acceleration.attention.evaluations must be an integer of at least 1"),
        ("[pose]\nreach = 0", "acceleration.pose.reach must be a number above 0"),
        ("[pose]\nview = 'dome'", "acceleration.pose.view must be one of frustum, ball"),
    ],
)
def test_bad_settings_are_refused(tiny_engine: Engine, tmp_path: Path, text: str, message: str):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    session = tiny_engine.new(seed=1)
    with pytest.raises(InputError, match=message):
        session.acceleration = path
    assert session.acceleration == Acceleration()


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(InputError, match=r"unknown acceleration 'light-interacton' .did you mean 'light-interaction'"):
        resolve("light-interacton")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, tiny_config: CourtyardConfig) -> Path:
    path = tmp_path_factory.mktemp("weights") / FILE
    tensors = {k: v.half().contiguous() for k, v in random_network(tiny_config).state_dict().items()}
    save_file(tensors, path, {"format": "worldstride-courtyard", "config": json.dumps(vars(tiny_config))})
    return path


def test_weights_from_a_file_or_its_folder(weights: Path, tmp_path: Path):
    engines = [worldstride.load("courtyard", path, device="cpu") for path in (weights, weights.parent)]
    assert len({e.source.fingerprint for e in engines}) == 1
    assert len(engines[0].source.fingerprint) == 64
    session = engines[0].new(seed=3)
    session.save(tmp_path / "a.world")
    assert same(session.step(FORWARD), worldstride.open(tmp_path / "a.world").step(FORWARD))


def _damaged(weights: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """Paths of bad checkpoints with what their errors say."""
    yield "missing.safetensors", "cannot read weights"
    (folder / "cut").write_bytes(weights.read_bytes()[:5000])
    yield "cut", "is no valid courtyard weights file"
    (folder / "text").write_text("these are no weights")
    yield "text", "is no valid courtyard weights file"
    save_file({"x": torch.zeros(2)}, folder / "foreign")
    yield "foreign", "format is None, not 'worldstride-courtyard'"
    config = json.dumps(vars(CourtyardConfig(size=24, width=64, depth=2, heads=1, refine=6)))
    for name, metadata, text in (
        ("unconfigured", {}, "no valid courtyard weights file"),
        ("misconfigured", {"config": json.dumps({"size": 25})}, "size must be a multiple of patch_height"),
        ("unknown", {"config": json.dumps({"sizes": 24})}, "sizes"),
        ("untyped", {"config": json.dumps({"depth": "two"})}, "depth must be an integer of at least 1, got 'two'"),
        ("shapes", {"config": config}, r"\d+ tensors do not fit its configuration; first '.*': expected .* found"),
    ):
        save_file({"place": torch.zeros(3, 64)}, folder / name, {"format": "worldstride-courtyard", **metadata})
        yield name, text


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="compiles C++")
def test_a_compiled_model_shows_the_same_world_and_goes_on_from_a_save(weights: Path, tmp_path: Path):
    plain, compiled = (worldstride.load("courtyard", weights, device="cpu", compile=c) for c in (False, True))
    assert (plain.source.compiled, compiled.source.compiled) == (False, True)
    runs = [cast(CourtyardModel, engine.model).network.run for engine in (plain, compiled)]
    assert runs[0] is Block.forward is not runs[1]
    one, two = plain.new(seed=2), compiled.new(seed=2)
    pairs = [(one.step(FORWARD).frames, two.step(FORWARD).frames) for _ in range(3)]
    assert all(int(np.abs(a.astype(int) - b.astype(int)).max()) <= 3 for a, b in pairs)
    two.save(tmp_path / "a.world")
    again = worldstride.open(tmp_path / "a.world")
    assert again.engine.source.compiled
    assert same(two.step(FORWARD), again.step(FORWARD))


def test_what_cannot_be_compiled_is_refused(weights: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"needs a compiler for cpu, and g\+\+ is not found"):
        worldstride.load("courtyard", weights, device="cpu", compile=True)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    entry = ModelEntry("joint", "0", "nowhere", "none", lambda *_: (JointModel(), "none"))
    monkeypatch.setattr("worldstride.engine.find", lambda name: entry)
    with pytest.raises(InputError, match="'joint' cannot be compiled; load it with compile=False"):
        worldstride.load("joint", weights="random", device="cpu", compile=True)


def test_bad_checkpoints_are_named(weights: Path, tmp_path: Path):
    for name, text in _damaged(weights, tmp_path):
        with pytest.raises(CheckpointError, match=text):
            worldstride.load("courtyard", tmp_path / name, device="cpu")


def test_random_weights_take_no_path(weights: Path):
    with pytest.raises(InputError, match="come from no file"):
        worldstride.load("courtyard", path=weights, weights="random")
