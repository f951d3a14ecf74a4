"""The first image of a world at the model's size, and a prompt's states in a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hy_encoders import GLYPHS, TEXT, VISION, picture
from worldstride.errors import InputError, SaveFileError
from worldstride.models.hy_worldplay.prompts import fit_image, load_prompt, save_prompt
from worldstride.savefile import PROMPT, write_save

# The first image


def test_an_image_is_cut_around_the_middle_and_resized():
    frame = fit_image(picture(200, 50), 50, 100)
    assert (frame.dtype, frame.shape) == (torch.uint8, (50, 100, 3))
    assert torch.equal(frame, torch.from_numpy(np.array(picture(200, 50)))[:, 50:150])
    tall = Image.fromarray(np.array(picture(200, 50)).transpose(1, 0, 2))
    assert torch.equal(fit_image(tall, 100, 50), frame.transpose(0, 1))
    assert fit_image(picture()).shape == (480, 832, 3)
    half = fit_image(picture(200, 100), 50, 100)
    assert (half.float() - torch.from_numpy(np.array(picture(200, 100))).float()[::2, ::2]).abs().max() <= 2


def test_an_image_is_turned_as_its_camera_was_held(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise
    picture(64, 32).save(tmp_path / "turned.png", exif=exif)
    expected = torch.from_numpy(np.array(picture(64, 32).rotate(-90, expand=True)))
    assert torch.equal(fit_image(tmp_path / "turned.png", 64, 32), expected)
    with Image.open(tmp_path / "turned.png") as opened:
        assert torch.equal(fit_image(opened, 64, 32), expected)
    grey = Image.new("LA", (64, 32), (100, 0))
    assert torch.equal(fit_image(grey, 32, 64), torch.full((32, 64, 3), 100, dtype=torch.uint8))


def test_what_is_no_image_is_refused(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    for name in ("a.png", "b.png"):
        with pytest.raises(InputError, match=f"(cannot read the|no) image .*{name}"):
            fit_image(tmp_path / name)


# Saved prompts


def states() -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(0)
    sizes = {"text": (7, TEXT), "glyphs": (0, GLYPHS), "vision": (4, VISION), "negative_text": (2, TEXT)}
    made = {name: torch.randn(1, *size, generator=drawn) for name, size in sizes.items()}
    return {**made, "text": made["text"].bfloat16()}


def test_a_saved_prompt_comes_back_with_its_bits(tmp_path: Path):
    file = tmp_path / "prompt.safetensors"
    save_prompt(file, states(), "a street", "blurred")
    back = load_prompt(file)
    assert back.keys() == states().keys()
    for name, tensor in states().items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)
    with safe_open(str(file), "pt") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "worldstride-prompt"
    assert json.loads(metadata["header"]) == {"model": "hy_worldplay", "text": "a street", "negative": "blurred"}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"txt": torch.ones(1, 1, 1)}, r"unknown prompt states 'txt' \(did you mean 'text'\?\)"),
        ({"image": torch.ones(1, 1, 1)}, "unknown prompt states 'image'"),
        ({"text": torch.ones(2, 7, TEXT)}, r"'text' must be \[1, N, channels\], got \[2, 7, 24\]"),
        ({"text_mask": torch.ones(1, 7, 1)}, r"'text_mask' must be \[1, N\], got \[1, 7, 1\]"),
        ({"vision": torch.full((1, 4, VISION), torch.nan)}, "'vision' must be finite numbers"),
        ({"vision": torch.ones(1, 4, VISION, dtype=torch.int64)}, "'vision' must be finite numbers.*int64"),
    ],
)
def test_states_that_are_no_prompt_are_not_saved(tmp_path: Path, change: dict[str, Tensor], text: str):
    with pytest.raises(InputError, match=text):
        save_prompt(tmp_path / "a", {**states(), **change}, "")
    with pytest.raises(InputError, match="needs states named text and vision, got none"):
        save_prompt(tmp_path / "a", {}, "")
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_prompt_are_refused(tmp_path: Path):
    file = tmp_path / "prompt.safetensors"
    save_prompt(file, states(), "a street")
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(SaveFileError, match="damaged: its contents miss their checksum; encode it anew"):
        load_prompt(file)
    file.write_bytes(good[:-9])
    with pytest.raises(SaveFileError, match=r"damaged or cut short .*; encode it anew"):
        load_prompt(file)
    save_file(states(), file)
    with pytest.raises(SaveFileError, match=r"no saved prompt .*format 'worldstride-prompt'"):
        load_prompt(file)
    with pytest.raises(SaveFileError, match="cannot read the saved prompt"):
        load_prompt(tmp_path / "nothing")
    write_save(file, {"model": "another"}, states(), PROMPT)
    with pytest.raises(
        SaveFileError, match="for 'another', not for 'hy_worldplay' or 'hy_worldplay_wan' or 'matrix_game3'"
    ):
        load_prompt(file)
    write_save(file, {"model": ["hy_worldplay"]}, states(), PROMPT)
    with pytest.raises(SaveFileError, match=r"a prompt for \['hy_worldplay'\], not for"):
        load_prompt(file)


def test_the_wan_variants_prompt_is_its_text_alone(tmp_path: Path):
    file, text = tmp_path / "prompt.safetensors", states()["text"]
    save_prompt(file, {"text": text}, "a street", model="hy_worldplay_wan")
    (name, back), *more = load_prompt(file).items()
    assert (name, more) == ("text", []) and torch.equal(back, text)
    with pytest.raises(InputError, match="unknown prompt states 'glyphs'; known: text, text_mask"):
        save_prompt(file, states(), "a street", model="hy_worldplay_wan")
    with pytest.raises(InputError, match="a prompt needs states named vision"):
        save_prompt(file, {"text": text}, "a street")
    with pytest.raises(InputError, match="prompts are saved for hy_worldplay or hy_worldplay_wan or matrix_game3"):
        save_prompt(file, states(), "a street", model="courtyard")
