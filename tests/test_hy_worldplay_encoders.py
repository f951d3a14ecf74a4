"""HY-WorldPlay's text and image encoders in both layouts, and the command that makes a prompt with them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from hy_encoders import GLYPHS, TEXT, VISION, picture, tiny, write_converted, write_original
from hy_golden import HEIGHT, WIDTH, engine, golden, network, relative
from worldstride.cli import main
from worldstride.errors import CheckpointError, InputError, MissingDependencyError
from worldstride.models.hy_worldplay.adapter import HYPrompt, HYWorldPlay
from worldstride.models.hy_worldplay.encoders import LONGEST, PromptEncoders, _pipeline, load_encoders
from worldstride.models.hy_worldplay.prompts import fit_image, load_prompt

SIGN = 'a street with a sign "OPEN 24h" and another “café”, and "OPEN 24h" again'
WRITERS: dict[str, Callable[[Path], Path]] = {"converted": write_converted, "original": write_original}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write(tmp_path_factory.mktemp(name)) for name, write in WRITERS.items()}


@pytest.fixture(scope="module", params=list(WRITERS))
def encoders(request: pytest.FixtureRequest, folders: dict[str, Path]) -> PromptEncoders:
    return load_encoders(folders[request.param], "cpu", torch.float32)


@pytest.fixture
def broken(request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to break, of the layout that a test asks for."""
    return Path(shutil.copytree(folders[request.param], tmp_path / "encoders"))


# What is computed, against plain calls


@torch.no_grad()
def language_states(text: str) -> Tensor:
    """The third last hidden states of the user's words and what comes after, tokenised by hand."""
    given = _pipeline().system_message
    before = f"<|im_start|>system\n{given}<|im_end|>\n<|im_start|>user\n"
    words, model = tiny().words, tiny().language.model.language_model
    special = {"<|im_start|>": words.convert_tokens_to_ids("<|im_start|>")}
    head, whole = (
        words(part, add_special_tokens=False).input_ids
        for part in (before, f"{before}{text}<|im_end|>\n<|im_start|>assistant\n")
    )
    assert head.count(special["<|im_start|>"]) == 2
    hidden = model(input_ids=torch.tensor([whole]), output_hidden_states=True).hidden_states
    assert len(hidden) == 5
    return hidden[2][:, len(head) :]


@torch.no_grad()
def glyph_states(written: str) -> Tensor:
    ids = [byte + 3 for byte in written.encode()] + [1]
    return tiny().glyphs(input_ids=torch.tensor([ids])).last_hidden_state


@torch.no_grad()
def vision_states(frame: Tensor) -> Tensor:
    small = Image.fromarray(frame.numpy()).resize((28, 28), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(small)).float().permute(2, 0, 1)[None] / 127.5 - 1
    return tiny().vision(pixel_values=pixels).last_hidden_state


def test_the_language_model_gives_its_third_last_states_of_the_words_alone(encoders: PromptEncoders):
    states = encoders.encode(SIGN, picture(), negative="blurred")
    assert relative(states["text"], language_states(SIGN)) <= 1e-5
    assert relative(states["negative_text"], language_states("blurred")) <= 1e-5
    assert states["text"].shape == (1, len(SIGN.encode()) + 13, TEXT)  # <|im_end|>\n<|im_start|>assistant\n
    assert set(states) == {"text", "glyphs", "vision", "negative_text", "negative_glyphs"}


def test_an_empty_text_is_a_space(encoders: PromptEncoders):
    states = encoders.encode("", picture())
    for name in ("text", "negative_text"):
        assert relative(states[name], language_states(" ")) <= 1e-5


def test_what_is_quoted_goes_to_the_glyph_encoder(encoders: PromptEncoders):
    states = encoders.encode(SIGN, picture(), negative='no "EXIT"')
    # the padded states see no padding; every quotation once
    assert relative(states["glyphs"], glyph_states('Text "OPEN 24h". Text "café". ')) <= 1e-5
    assert relative(states["negative_glyphs"], glyph_states('Text "EXIT". ')) <= 1e-5


def test_without_quotation_marks_there_are_no_glyphs(encoders: PromptEncoders):
    states = encoders.encode("a street with a sign 'OPEN'", picture())
    assert states["glyphs"].shape == states["negative_glyphs"].shape == (1, 0, GLYPHS)


def test_long_quotations_are_cut_and_what_cannot_be_encoded_is_refused(encoders: PromptEncoders):
    states = encoders.encode(f'"{"x" * 400}"', picture())
    assert states["glyphs"].shape == (1, 256, GLYPHS)
    assert encoders.encode("x" * (LONGEST - 13), picture())["text"].shape == (1, LONGEST, TEXT)
    with pytest.raises(InputError, match=f"may have {LONGEST} tokens, got {LONGEST + 1}; shorten 'xxxx"):
        encoders.encode("x" * (LONGEST - 12), picture())
    with pytest.raises(InputError, match="unknown device 'gpu'; use 'cpu'"):
        load_encoders(encoders.path, "gpu")
    with pytest.raises(InputError, match="the negative text must be a string, got NoneType"):
        encoders.encode("x", picture(), negative=None)  # type: ignore[arg-type]


def test_the_image_encoder_sees_the_frame(encoders: PromptEncoders):
    states = encoders.encode("a street", picture())
    assert states["vision"].shape == (1, 4, VISION)
    assert relative(states["vision"], vision_states(fit_image(picture()))) <= 1e-5
    uncut = torch.from_numpy(np.array(picture()))
    assert relative(states["vision"], vision_states(uncut)) > 1e-3


def test_only_the_language_model_computes_in_half_precision(folders: dict[str, Path]):
    for dtype, error in ((torch.bfloat16, 0.1), (torch.float16, 0.02)):
        states = load_encoders(folders["original"], dtype=dtype).encode(SIGN, picture())
        kinds = {name: t.dtype for name, t in states.items() if not name.startswith("negative_")}
        assert kinds == {"text": dtype, "glyphs": torch.float32, "vision": torch.float32}
        assert 1e-6 < relative(states["text"], language_states(SIGN)) < error


def test_one_encoder_is_held_at_a_time(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    held = list[torch.nn.Module]()
    real = torch.nn.Module.to

    def to(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        if args == (torch.device("cpu"),):
            assert all(p.is_meta for other in held for p in other.parameters())
            held.append(module)
        return real(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    load_encoders(folders["converted"]).encode(SIGN, picture())
    assert len(held) == 3
    assert all(p.is_meta for other in held for p in other.parameters())


# What is missing or foreign

LLM, GLYPH = "text_encoder/llm", "text_encoder/Glyph-SDXL-v2"
PARTS = [
    ("original", LLM, "has no language model: it needs text_encoder/llm from Qwen/.*, or text_encoder and tokenizer"),
    ("original", f"{LLM}/tokenizer_config.json", "the language model in .* lacks .*Qwen/Qwen2.5-VL-7B-Instruct"),
    ("original", f"{LLM}/model-00001-of-*", "names 1 files that are not there"),
    ("original", f"{LLM}/model.safetensors.index.json", "lacks text_encoder/llm/model.safetensors.index.json or"),
    ("original", "text_encoder/byt5-small", "the glyph encoder in .* lacks .*byt5-small/config.json.*from google/"),
    ("original", f"{GLYPH}/checkpoints/byt5_model.pt", "byt5_model.pt; .*AI-ModelScope/Glyph-SDXL-v2"),
    ("original", f"{GLYPH}/assets/color_idx.json", "lacks .*color_idx.json; .*AI-ModelScope"),
    ("original", "vision_encoder", "no image encoder: .*Redux-dev .gated., or image_encoder and feature_extractor"),
    ("original", "vision_encoder/siglip/feature_extractor", "lacks .*preprocessor_config.json; .*FLUX.1-Redux-dev"),
    ("converted", "tokenizer", "lacks tokenizer/tokenizer_config.json; .*hunyuanvideo-community/HunyuanVideo-1.5"),
    ("converted", "text_encoder", "lacks text_encoder/config.json, text_encoder/model.safetensors.index.json or"),
    ("converted", "text_encoder_2/model.safetensors", "the glyph encoder in .* lacks text_encoder_2/model.safetensors"),
    ("converted", "image_encoder/config.json", "the image encoder in .* lacks image_encoder/config.json"),
]  # fmt: skip


@pytest.mark.parametrize(("broken", "part", "text"), PARTS, indirect=["broken"], ids=[f"{a}-{b}" for a, b, _ in PARTS])
def test_what_is_missing_is_named_with_where_it_comes_from(broken: Path, part: str, text: str):
    (gone,) = broken.glob(part)
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(CheckpointError, match=text):
        load_encoders(broken)


def refused(path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        load_encoders(path, dtype=torch.float32).encode("a street", picture())


@pytest.mark.parametrize("broken", ["original"], indirect=True)
def test_foreign_glyph_weights_are_refused(broken: Path):
    file = broken / "text_encoder" / "Glyph-SDXL-v2" / "checkpoints" / "byt5_model.pt"
    good = torch.load(file, weights_only=True)["state_dict"]
    final = "module.text_tower.encoder.final_layer_norm.weight"
    for state, text in (
        ({k: v for k, v in good.items() if k != final}, "first 'final_layer_norm.weight': .*found none"),
        ({**good, f"{final}2": good[final]}, "first 'final_layer_norm.weight2': expected none"),
        ({**good, final: good[final][:5]}, r"expected \(1472,\), found \(5,\)"),
        ({"other": good[final]}, "tensors do not fit google/byt5-small with 5 tokens"),
        ({"epoch": 3}, "must hold named tensors"),
    ):
        torch.save({"state_dict": state}, file)
        refused(broken, text)
    bare = {k.removeprefix("module.text_tower.encoder."): v for k, v in good.items() if "text_tower" in k}
    torch.save(bare, file)
    states = load_encoders(broken).encode('"x"', picture())
    assert relative(states["glyphs"], glyph_states('Text "x". ')) <= 1e-5
    torch.save({"state_dict": good, "arguments": Path("x")}, file)  # anything but data is not opened
    refused(broken, "cannot read tensors from .*byt5_model.pt")
    file.write_bytes(b"no file of torch")
    refused(broken, "cannot read tensors from .*byt5_model.pt")
    torch.save(bare, file)
    fonts = broken / "text_encoder" / "Glyph-SDXL-v2" / "assets" / "multilingual_10-lang_idx.json"
    fonts.write_text(json.dumps({"en-Serif": 0}))
    refused(broken, r"with 3 tokens .*embed_tokens.weight': expected \(387, 1472\), found \(389, 1472\)")


@pytest.mark.parametrize("broken", ["converted"], indirect=True)
def test_foreign_weights_are_refused_and_not_made_up(broken: Path):
    for folder in ("text_encoder", "text_encoder_2", "image_encoder"):
        file = broken / folder / "model.safetensors"
        good = load_file(file)
        name = next(k for k in sorted(good) if "layer_norm" in k or "layernorm" in k)
        save_file({k: v for k, v in good.items() if k != name}, file, {"format": "pt"})
        refused(broken, f"{folder}: its weights lack 1 tensors .*{name}'")
        save_file({**good, "another": torch.ones(1)}, file, {"format": "pt"})
        refused(broken, f"{folder}: its weights hold unknown 1 tensors .*first 'another'")
        file.write_bytes(b"nothing")
        refused(broken, f"transformers cannot read .*{folder}")
        save_file(good, file, {"format": "pt"})
    (broken / "tokenizer" / "chat_template.jinja").write_text("<|im_start|>")
    refused(broken, "the chat template of the language model leaves out what users say")
    (broken / "tokenizer" / "chat_template.jinja").unlink()
    refused(broken, "the tokenizer has no chat template")


@pytest.mark.parametrize("name", ["transformers", "diffusers"])
def test_a_missing_library_says_how_to_get_it(name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'worldstride\[encoders\]'"):
        load_encoders(folders["original"])


# The command, and a world that begins with what it wrote


def test_the_command_writes_what_a_world_begins_with(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    picture().save(tmp_path / "first.png")
    file = tmp_path / "prompt.safetensors"
    given = ["--path", str(folders["original"]), "--text", SIGN, "--image", str(tmp_path / "first.png")]
    rest = ["--output", str(file), "--negative", "blurred", "--device", "cpu", "--dtype", "float32"]
    assert main(["prompt", "hy_worldplay", *given, *rest]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"text 1 x {len(SIGN.encode()) + 13} x {TEXT} float32" in printed
    assert f"{file}: {file.stat().st_size} bytes" in printed
    prompt = load_prompt(file)
    for name, tensor in (
        load_encoders(folders["original"], dtype=torch.float32).encode(SIGN, picture(), "blurred").items()
    ):
        assert torch.equal(prompt[name], tensor)

    of, frame = engine(), fit_image(tmp_path / "first.png", HEIGHT, WIDTH)
    chunk = of.open(frame[None], torch.eye(4)[None], prompt).step()
    assert chunk.frames.shape == (13, HEIGHT, WIDTH, 3)
    used = of.model.encode_prompt(prompt, of.attention)  # type: ignore[attr-defined]
    assert isinstance(used, HYPrompt)
    rows = sum(prompt[name].shape[1] for name in ("text", "glyphs", "vision"))
    assert used.text[0][0].shape[2] == rows
    guided = HYWorldPlay(network(), of.model.decoder, guidance=6.0).encode_prompt(prompt, of.attention)  # type: ignore[arg-type]
    assert guided.negative[0][0].shape[2] == len("blurred") + 13 + prompt["vision"].shape[1]
    other = of.open(frame[None], torch.eye(4)[None], golden().prompt).step()
    assert not np.array_equal(np.asarray(chunk.frames), np.asarray(other.frames))


def test_the_command_refuses_before_it_works(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(PromptEncoders, "encode", None)
    picture().save(tmp_path / "first.png")

    def error(model: str = "hy_worldplay", path: Path = folders["original"], output: str = "prompt.safetensors") -> str:
        given = ["--path", str(path), "--text", "a", "--image", str(tmp_path / "first.png")]
        assert main(["prompt", model, *given, "-o", str(tmp_path / output)]) == 2
        return capsys.readouterr().err

    assert "'courtyard' takes no prompt; hy_worldplay, hy_worldplay_wan and matrix_game3 do" in error("courtyard")
    assert "has no language model: it needs text_encoder/llm" in error(path=tmp_path)
    assert "the folder" in error(output="none/prompt.safetensors")
    assert "the prompt would overwrite the image" in error(output="first.png")
