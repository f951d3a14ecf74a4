"""umT5's states for HY-WorldPlay's WAN-5B variant, and the command that makes a prompt of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

import wan_tiny
from hy_golden import relative
from tiny_umt5 import umt5, write_converted
from worldstride.cli import main
from worldstride.errors import CheckpointError, InputError
from worldstride.models.hy_worldplay.prompts import load_prompt
from worldstride.models.hy_worldplay.wan_adapter import ROWS
from worldstride.models.hy_worldplay.wan_encoder import WanTextEncoder, load_wan_encoder

NAME = "Wan2.2-TI2V-5B-Diffusers"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What of Wan's repository is read."""
    return write_converted(tmp_path / NAME)


@torch.no_grad()
def plain(cleaned: str) -> Tensor:
    """States of a cleaned text among 512 tokens, most of them padding that is not seen."""
    model, tokenizer = umt5()
    ids = tokenizer(cleaned).input_ids
    padded, seen = torch.zeros(1, ROWS, dtype=torch.long), torch.zeros(1, ROWS)
    padded[0, : len(ids)], seen[0, : len(ids)] = torch.tensor(ids), 1
    return model(padded, seen).last_hidden_state[:, : len(ids)]


@pytest.mark.parametrize(("text", "cleaned"), [("a lake", "a lake"), ("  a \n\t lake &amp;amp; sun ", "a lake & sun")])
def test_states_are_the_models_of_the_cleaned_text(folder: Path, text: str, cleaned: str):
    states = load_wan_encoder(folder, "cpu", torch.float32).encode(text)
    assert set(states) == {"text"}
    assert relative(states["text"], plain(cleaned)) <= 1e-5
    assert states["text"].shape[1] == len(umt5()[1](cleaned).input_ids) > len(cleaned) - 4


def test_half_precision_is_kept_and_no_text_is_a_text(folder: Path):
    states = load_wan_encoder(folder).encode("")["text"]
    assert (states.dtype, list(states.shape)) == (torch.bfloat16, [1, 1, wan_tiny.TINY.text])


def test_a_negative_prompt_is_encoded_beside_it(folder: Path):
    states = load_wan_encoder(folder, "cpu", torch.float32).encode("a lake", "blurry")
    assert set(states) == {"text", "negative_text"}
    assert relative(states["text"], plain("a lake")) <= 1e-5
    assert relative(states["negative_text"], plain("blurry")) <= 1e-5


def test_the_command_writes_prompts_of_matrix_game3(folder: Path, tmp_path: Path):
    """With states of the negative prompt, empty unless given: one file serves both of its models."""
    file = tmp_path / "prompt.safetensors"
    options = ["prompt", "matrix_game3", "--path", str(folder), "--text", "a lake", "-o", str(file)]
    assert main([*options, "--dtype", "float32", "--device", "cpu"]) == 0
    states = load_prompt(file)
    assert {name: list(t.shape[2:]) for name, t in states.items()} == {
        "text": [wan_tiny.TINY.text], "negative_text": [wan_tiny.TINY.text],
    }  # fmt: skip
    assert states["negative_text"].shape[1] == 1


def test_a_text_that_is_too_long_or_none_is_refused(folder: Path):
    encoder = load_wan_encoder(folder, dtype=torch.float32)
    count = encoder.encode("ab" * 250)["text"].shape[1]
    assert 500 < count <= ROWS
    with pytest.raises(InputError, match=r"a text may have 512 tokens, got \d+; shorten 'abab"):
        encoder.encode("ab" * 300)
    with pytest.raises(InputError, match="the text must be a string, got int"):
        encoder.encode(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [NAME, ".", "HY-WorldPlay", "HY-WorldPlay/wan_distilled_model"])
def test_the_folder_may_lie_in_or_beside_the_models(folder: Path, given: str):
    (folder.parent / "HY-WorldPlay" / "wan_distilled_model").mkdir(parents=True)
    assert load_wan_encoder(folder.parent / given).path.resolve() == folder.resolve()


def test_missing_parts_are_named_with_where_they_come_from(folder: Path, tmp_path: Path):
    def refused(text: str) -> None:
        with pytest.raises(CheckpointError, match=text):
            load_wan_encoder(folder)

    (folder / "text_encoder" / "config.json").rename(tmp_path / "config.json")
    refused(r"the text encoder of Wan in .* lacks text_encoder/config\.json; it comes from Wan-AI/Wan2\.2-TI2V-5B")
    (folder / "text_encoder" / "config.json").write_text(json.dumps({"model_type": "t5"}))
    refused(r"text_encoder holds a model of type 't5', not umT5; that comes from Wan-AI/Wan2\.2-TI2V-5B-Diffusers")
    shutil.copy(tmp_path / "config.json", folder / "text_encoder" / "config.json")
    (folder / "tokenizer" / "tokenizer_config.json").unlink()
    refused(r"lacks tokenizer/tokenizer_config\.json; it comes from Wan-AI")
    (folder / "text_encoder" / "model.safetensors").unlink()
    refused(r"lacks text_encoder/model\.safetensors\.index\.json or model\.safetensors; it comes from Wan-AI")
    shutil.rmtree(folder)
    folder.mkdir()
    refused(
        r"has no text encoder of Wan: it needs text_encoder and tokenizer from Wan-AI/Wan2\.2-TI2V-5B-Diffusers, or "
    )


def test_weights_that_do_not_fit_are_refused(folder: Path):
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    (folder / "text_encoder" / "config.json").write_text(json.dumps({**config, "num_layers": 3}))
    with pytest.raises(CheckpointError, match=r"its weights lack \d+ tensors of a UMT5EncoderModel"):
        load_wan_encoder(folder, dtype=torch.float32).open()


def test_the_command_writes_what_a_world_begins_with(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "prompt.safetensors"
    options = ["--path", str(folder), "--text", "a lake", "-o", str(file), "--device", "cpu", "--dtype", "float32"]
    assert main(["prompt", "hy_worldplay_wan", *options]) == 0
    assert "text 1 x " in " ".join(capsys.readouterr().out.split())
    prompt = load_prompt(file)
    assert torch.equal(prompt["text"], load_wan_encoder(folder, dtype=torch.float32).encode("a lake")["text"])
    of = wan_tiny.engine()
    chunk = of.open(wan_tiny.picture(), torch.eye(4)[None], prompt).step()
    assert chunk.frames.shape == (13, wan_tiny.HEIGHT, wan_tiny.WIDTH, 3)


def test_the_command_refuses_before_it_works(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(WanTextEncoder, "encode", None)

    def error(*more: str, model: str = "hy_worldplay_wan") -> str:
        options = ["--path", str(folder), "--text", "a", "-o", str(tmp_path / "p.safetensors")]
        assert main(["prompt", model, *options, *more]) == 2
        return capsys.readouterr().err

    assert "is its text alone; leave out --image first.png" in error("--image", "first.png")
    assert "is not guided; leave out --negative 'dark'" in error("--negative", "dark")
    assert "states of its first image; give --image" in error(model="hy_worldplay")
