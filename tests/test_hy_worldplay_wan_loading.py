"""HY-WorldPlay's WAN-5B variant from files: published layouts, what is missing or foreign, and fingerprints."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import worldstride
from hy_golden import CPU
from hy_variants import rewrite, same_weights, write_vae
from wan_tiny import COLUMNS, ROWS, TINY, VAE, codec, codec_json, described, published, states
from worldstride import Action
from worldstride.cli import main
from worldstride.errors import CheckpointError, InputError
from worldstride.models.hy_worldplay.adapter import HYWorldPlay
from worldstride.models.hy_worldplay.wan_adapter import WanWorldPlay
from worldstride.models.hy_worldplay.wan_loading import HEIGHT, WIDTH, random_wan
from worldstride.models.hy_worldplay.wan_weights import build
from worldstride.models.registry import MODELS, find

CODEC = "Wan2.2-TI2V-5B-Diffusers"
WRAPPED = "model._fsdp_wrapped_module."


def pickled(tensors: dict[str, Any], file: Path, entry: str = "generator", **other: Any) -> None:
    """As what trained the model saves it: every block is wrapped, and so is the whole."""
    names = {n: WRAPPED + re.sub(r"^(blocks\.\d+\.)", r"\1_fsdp_wrapped_module.", n) for n in tensors}
    torch.save({entry: {names[n]: t for n, t in tensors.items()}, **other}, file)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as the model is published, with tiny weights; the base's config is all that is there of the base."""
    root = tmp_path / "HY-WorldPlay"
    (root / "wan_distilled_model").mkdir(parents=True)
    (root / "wan_transformer").mkdir()
    pickled(published(), root / "wan_distilled_model" / "model.pt")
    (root / "wan_transformer" / "config.json").write_text(json.dumps(described()))
    write_vae(root / CODEC / "vae", codec(), codec_json())
    return root


def loaded(path: Path, name: str = "hy_worldplay_wan", **other: Any) -> tuple[WanWorldPlay, str]:
    engine = worldstride.load(name, path=path, device="cpu", **{"dtype": torch.float32, **other})
    assert isinstance(engine.model, WanWorldPlay)
    return engine.model, engine.source.fingerprint


def is_tiny(of: WanWorldPlay) -> bool:
    vae = of.decoder.vae
    assert isinstance(vae, torch.nn.Module)
    return same_weights(of.network, build(TINY, published(), "the tiny file", CPU)) and same_weights(vae, codec())


def test_published_files_give_the_network(folder: Path):
    of, fingerprint = loaded(folder)
    assert is_tiny(of)
    assert of.config == TINY
    assert of.latent_shape == (4, 44, 80)
    assert (of.dtype, of.storage, of.name) == (torch.float32, torch.float32, "hy_worldplay_wan")
    assert re.fullmatch("[0-9a-f]{64}", fingerprint)
    for name in (
        "hy_worldplay_wan",
        "tencent/HY-WorldPlay",
        "hy_worldplay",
        "tencent/HY-WorldPlay/wan_distilled_model",
    ):
        again, mark = loaded(folder / "wan_distilled_model", name)
        assert is_tiny(again)
        assert mark == fingerprint
    half, _ = loaded(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.network.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.decoder.vae.parameters()} == {torch.bfloat16}
    assert half.storage == torch.bfloat16


def test_the_vae_may_lie_in_beside_or_under_a_name_of_its_own(folder: Path):
    for place in (folder.parent / CODEC / "vae", folder / "wan_vae"):
        old = next(folder.parent.rglob("diffusion_pytorch_model.safetensors")).parent
        place.parent.mkdir(exist_ok=True)
        old.rename(place)
        assert is_tiny(loaded(folder)[0])


@pytest.mark.parametrize("prefix", ["", "model.", "_fsdp_wrapped_module.", "model._fsdp_wrapped_module."])
def test_what_wrapped_the_model_is_left_out_of_names(folder: Path, prefix: str):
    file = folder / "wan_distilled_model" / "model.pt"
    torch.save({"generator": {prefix + n: t for n, t in published().items()}, "step": 3, "critic": {}}, file)
    assert is_tiny(loaded(folder)[0])


@pytest.mark.parametrize("where", ["model.pt", "vae"])
def test_a_fingerprint_tells_one_weight_from_another(folder: Path, where: str):
    before = loaded(folder)[1]
    assert loaded(folder)[1] == before
    if where == "vae":
        file = folder / CODEC / "vae" / "diffusion_pytorch_model.safetensors"
        rewrite(file, lambda t: t["decoder.conv_in.bias"][0].add_(1))
    else:
        tensors = {n: t.clone() for n, t in published().items()}
        tensors["proj_out.bias"][0] += 1
        pickled(tensors, folder / "wan_distilled_model" / "model.pt")
    assert loaded(folder)[1] != before


def test_a_loaded_model_plays_at_full_frame_size(folder: Path):
    """Tiny weights, but 704 x 1280 pixels."""
    engine = worldstride.load("hy_worldplay", path=folder / "wan_distilled_model", device="cpu", dtype=torch.float32)
    session = engine.open(np.zeros((1, HEIGHT, WIDTH, 3), np.uint8), np.eye(4)[None], {"text": states()})
    session.acceleration = worldstride.Acceleration("one", steps=1)
    chunk = session.step(Action({"KeyW"}))
    assert chunk.frames.shape == (13, 704, 1280, 3)
    moved = np.linalg.norm(np.diff(chunk.cameras[:, :3, 3], axis=0), axis=1)
    assert moved == pytest.approx([0.02] * 12, rel=1e-3)  # 0.08 a latent, as in the training walks


# What is wrong, and where the right thing comes from


def refused(path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        loaded(path)


def test_what_is_missing_is_named_with_where_it_comes_from(folder: Path):
    with pytest.raises(CheckpointError, match="does not ship with this package: give the folder of tencent/HY-World"):
        worldstride.load("hy_worldplay_wan", device="cpu")
    refused(folder / "nowhere", "nowhere is no folder; give that of tencent/HY-WorldPlay, or wan_distilled_model in it")
    refused(folder / "wan_transformer", "is the model before distillation, which does not play; give wan_distilled_mod")
    with pytest.raises(CheckpointError, match="is the model before distillation"):
        worldstride.load("hy_worldplay", path=folder / "wan_transformer", device="cpu")
    with pytest.raises(InputError, match="random weights come from no file; leave out the path"):
        loaded(folder, weights="random")
    vae = folder / CODEC / "vae"
    (vae / "config.json").rename(vae / "other.json")
    refused(
        folder, "lacks config.json, which tells the statistics of latents; it is in the folder vae of Wan-AI/Wan2.2"
    )
    (vae / "diffusion_pytorch_model.safetensors").unlink()
    refused(folder, "vae holds none of .*; it is the folder vae of Wan-AI/Wan2.2-TI2V-5B-Diffusers")
    vae.rename(folder / "codec")
    refused(folder, f"no folder .*wan_vae nor .*HY-WorldPlay/{CODEC}/vae nor .*; it is the folder vae of Wan-AI/Wan2.2")
    (folder / "wan_distilled_model" / "model.pt").unlink()
    refused(folder, "model.pt is missing; it is part of the folder wan_distilled_model of tencent/HY-WorldPlay")


NAME = "blocks.1.attn1.to_out_prope.0.bias"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop(NAME), rf"no HY-WorldPlay WAN transformer of 3 blocks: 1 \({re.escape(NAME)}\) missing, none"),
        (lambda t: t.update(mystery=torch.zeros(2)), r"none missing, 1 \(mystery\) unknown"),
        (lambda t: t.update({"proj_out.bias": torch.zeros(5)}), r"first proj_out.bias: \[5\] where \[16\] is right"),
        (lambda t: t.update({"model." + NAME: t[NAME]}), "is the second tensor that stands for 'blocks.1.attn1"),
        (lambda t: t.update(step=3), "'generator' must name tensors, got int under '.*step'"),
    ],
    ids=["missing", "foreign", "shape", "twice", "a number"],
)
def test_foreign_weights_are_named(folder: Path, change: Callable[[dict[str, Any]], object], text: str):
    tensors = dict[str, Any](published())
    change(tensors)
    names = {n: n if n.startswith("model.") else f"model.{n}" for n in tensors}
    names |= {"model." + NAME: "_fsdp_wrapped_module.model." + NAME} if "model." + NAME in tensors else {}
    file = folder / "wan_distilled_model" / "model.pt"
    torch.save({"generator": {names[n]: t for n, t in tensors.items()}}, file)
    refused(folder, text)


class Harmful:
    """A pickle that would run something."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (Path("harm"), "done"))


def test_files_that_are_not_weights_alone_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    file = folder / "wan_distilled_model" / "model.pt"
    pickled({**published(), "extra": Harmful()}, file)
    refused(folder, "cannot read weights alone from .*model.pt: Weights only load failed")
    assert not (folder / "harm").exists()
    torch.save({"generator": published()}, file, _use_new_zipfile_serialization=False)
    refused(folder, "cannot read weights alone from .*model.pt: mmap can only be used with files saved with")
    pickled(published(), file)
    file.write_bytes(file.read_bytes()[:5000])
    refused(folder, r"cannot read weights alone from .*model.pt: \S+")
    file.write_bytes(b"")
    refused(folder, "cannot read weights alone from .*model.pt: ")
    for held, text in (
        ({"critic": {}, "step": 1}, "model.pt has no entry 'generator'; it holds critic, step"),
        ({}, "has no entry 'generator'; it holds nothing"),
        ([torch.zeros(1)], "must hold a table with the entry 'generator', got list"),
        ({"generator": torch.zeros(1)}, "'generator' must be a table of tensors, got Tensor"),
    ):
        torch.save(held, file)
        refused(folder, text)


def test_configurations_that_do_not_fit_are_named(folder: Path):
    config, vae = folder / "wan_transformer" / "config.json", folder / CODEC / "vae" / "config.json"
    config.write_text(json.dumps({**described(), "num_layers": 4}))
    refused(folder, r"of 4 blocks: 29 \(blocks.3")
    config.write_text(json.dumps({**described(), "layers": 4}))
    refused(folder, "HY-WorldPlay: unknown entry 'layers'")
    config.unlink()
    refused(folder, "no HY-WorldPlay WAN transformer of 30 blocks")  # without one it is the 5B model
    config.write_text(json.dumps(described()))
    vae.write_text(json.dumps({**codec_json(), "z_dims": 4}))
    refused(folder, "HY-WorldPlay: unknown VAE setting 'z_dims'")
    vae.write_text(json.dumps({**codec_json(), "base_dim": 8}))
    refused(folder, "tensors do not fit the configuration; first encoder")
    rewrite(vae.parent / "diffusion_pytorch_model.safetensors", lambda t: t.pop("quant_conv.bias"))
    vae.write_text(json.dumps(codec_json()))
    refused(folder, r"vae is no VAE of its configuration: 1 \(quant_conv.bias\) missing, none unknown")


def test_a_vae_of_other_latents_is_refused(folder: Path):
    config = folder / "wan_transformer" / "config.json"
    config.write_text(json.dumps({**described(), "in_channels": 8, "out_channels": 8}))
    wide = dict(published())
    wide["patch_embedding.weight"], wide["proj_out.weight"], wide["proj_out.bias"] = (
        torch.zeros(32, 8, 1, 2, 2), torch.zeros(32, 32), torch.zeros(32),
    )  # fmt: skip
    pickled(wide, folder / "wan_distilled_model" / "model.pt")
    refused(folder, "the VAE's latents have 4 channels, the transformer's 8")


# Random weights, and the list of models


def test_random_weights_are_seeded():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    size = (32 * ROWS, 32 * COLUMNS)
    one, same, other = (random_wan(TINY, VAE, CPU, torch.float32, *size, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    for part in (lambda m: m.network, lambda m: m.decoder.vae):
        assert same_weights(part(one), part(same))
        assert not same_weights(part(one), part(other))
    assert one.latent_shape == (4, 2 * ROWS, 2 * COLUMNS)


def test_the_entry_loads_the_full_size(monkeypatch: pytest.MonkeyPatch):
    """Without its numbers: memory for 6 billion of them is not asked for."""
    asked = list[Any]()

    def drawn(*given: Any) -> str:
        asked.append(given)
        return "the model"

    monkeypatch.setattr("worldstride.models.hy_worldplay.wan_loading.random_wan", drawn)
    made, mark = find("hy_worldplay_wan").load(None, "random", CPU, torch.bfloat16)
    assert (made, mark) == ("the model", "random: seed 0, cpu")
    config, vae, *rest = asked[0]
    assert (config.width, config.depth, vae.z_dim, vae.base_dim, vae.decoder_base_dim) == (3072, 30, 48, 160, 256)
    assert rest == [CPU, torch.bfloat16]
    assert (HEIGHT, WIDTH) == (704, 1280)


def test_the_list_of_models_tells_where_it_may_be_used(capsys: pytest.CaptureFixture[str]):
    assert main(["models"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("hy_worldplay_wan")]
    for text in ("5.3 B", "Community License", "EU, the UK and South Korea", "Wan2.2-TI2V-5B", "VAE is Apache-2.0"):
        assert text in line
    assert find("hy_worldplay").load is not find("hy_worldplay_wan").load
    assert len({entry.name for entry in MODELS} | {entry.repository for entry in MODELS} - {""}) == 2 * len(MODELS) - 1


def test_other_folders_are_still_the_8b_model(folder: Path):
    with pytest.raises(CheckpointError, match="it is the folder ar_distilled_action_model of tencent/HY-WorldPlay"):
        worldstride.load("hy_worldplay", path=folder, device="cpu")
    assert not issubclass(WanWorldPlay, HYWorldPlay)


def test_files_are_read_as_weights_alone_and_mapped_into_memory(folder: Path, monkeypatch: pytest.MonkeyPatch):
    calls, load = list[dict[str, Any]](), torch.load

    def looking(file: Path, **how: Any) -> Any:
        calls.append(how)
        return load(file, **how)

    monkeypatch.setattr(torch, "load", looking)
    loaded(folder)
    assert calls == [{"map_location": "cpu", "weights_only": True, "mmap": True}]
