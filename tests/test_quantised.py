"""Weights in 8 bits: what is quantised, what that changes, and what is told of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import worldstride
from hy_variants import latents
from mg3_golden import CHUNKS, actions, begin, engine, model, network, noise
from worldstride.errors import InputError, SaveFileError
from worldstride.models.matrix_game3.adapter import MatrixGame3
from worldstride.models.quantised import bytes_of, quantised
from worldstride.models.registry import find

pytest.importorskip("torchao", reason="quantisation needs torchao")


@pytest.fixture(autouse=True)
def _no_gradients(no_gradients: None) -> None:
    """Nothing is trained."""


def test_blocks_are_quantised_and_the_rest_is_shared():
    plain, made = network(), quantised(network(), "int8", least=32)
    kinds = {name: type(p.data).__name__ for name, p in made.named_parameters()}
    assert kinds["blocks.0.mlp.up.weight"] == "Int8Tensor"
    assert kinds["blocks.0.project.qkv.weight"] == "Int8Tensor"
    assert kinds["enter.weight"] == "Tensor"
    assert made.enter.weight.data_ptr() == plain.enter.weight.data_ptr()
    assert type(plain.blocks[0].mlp.up.weight.data) is torch.Tensor  # the original stays as it was


def test_small_layers_stay():
    made = quantised(network(), "int8", least=10_000)
    assert all(type(p.data) is torch.Tensor for p in made.parameters())


def test_a_quantised_world_is_near_the_plain_one():
    of = model()
    of.network = quantised(network(), "int8", least=32)
    near, plain = begin(engine(of)), begin()
    for session in (near, plain):
        session.step(actions(*CHUNKS[0]), noise=noise(0))
    error = (latents(near) - latents(plain)).abs().max() / latents(plain).abs().max()
    assert 0 < float(error) < 0.1


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match="unknown quantisation 'int4'; known: float8, int8"):
        quantised(network(), "int4")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"float8 needs an NVIDIA GPU of compute capability 8\.9"):
        quantised(network(), "float8")
    with pytest.raises(InputError, match="Linear has no blocks to quantise"):
        quantised(torch.nn.Linear(2, 2), "int8")
    with pytest.raises(InputError, match="'courtyard' cannot be quantised"):
        worldstride.load("courtyard", device="cpu", quantise="int8")


def test_a_save_is_continued_with_the_same_weights_only(tmp_path: Path):
    session = begin()
    session.step(actions(*CHUNKS[0]), noise=noise(0))
    session.save(tmp_path / "a.world")
    other = engine(model().quantised("int8"))
    other.source = replace(other.source, quantised="int8")
    with pytest.raises(SaveFileError, match="whose weights are not quantised, the engine's are int8"):
        worldstride.open(tmp_path / "a.world", engine=other)


def test_an_engine_is_loaded_in_8_bits_and_so_are_its_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("worldstride.models.quantised.LEAST", 32)
    entry = find("matrix_game3")
    tiny = replace(entry, load=lambda *_, **__: (model(), "golden"))
    monkeypatch.setattr("worldstride.engine.find", lambda _: tiny)
    whole, small = (
        worldstride.load("matrix_game3", weights="random", device="cpu", quantise=q) for q in (None, "int8")
    )
    assert (whole.source.quantised, small.source.quantised) == (None, "int8")
    sizes = [sum(map(bytes_of, of.model.network.parameters())) for of in (whole, small)]  # type: ignore[attr-defined]
    assert sizes[1] < 0.8 * sizes[0]  # blocks are but a part of this small one
    session = begin(small)
    session.step(actions(*CHUNKS[0]), noise=noise(0))
    session.save(tmp_path / "a.world")
    opened = worldstride.open(tmp_path / "a.world")
    assert opened.engine.source == small.source
    for one in (session, opened):
        one.step(actions(*CHUNKS[1]), noise=noise(1))
    assert torch.equal(latents(opened), latents(session))


def test_a_model_of_its_own_kind_stays_one():
    """What a subclass changes holds for its weights in 8 bits, too."""

    class Other(MatrixGame3):
        name = "other"

    plain = model()
    other = Other(plain.network, plain.decoder, plain.storage)
    assert isinstance(other.quantised("int8"), Other)
    assert other.quantised("int8").network is not other.network
