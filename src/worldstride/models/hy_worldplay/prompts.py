"""A prompt's encoder states in a file, and the first image at the model's size: what playing needs of a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from torch import Tensor

from worldstride.errors import InputError, SaveFileError, did_you_mean
from worldstride.models.hy_worldplay.loading import HEIGHT, WIDTH
from worldstride.models.hy_worldplay.text import STATES
from worldstride.picture import fit_picture, read_picture
from worldstride.savefile import PROMPT, read_save, write_save

_MODEL = "hy_worldplay"


def fit_image(image: str | Path | Image.Image, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    """A picture, or its file, as uint8 [height, width, 3].

    Turned as its camera was held, cut around the middle to the shape of the frame, and resized with Lanczos. Raises
    `InputError` on a file that is no picture.
    """
    return fit_picture(image if isinstance(image, Image.Image) else read_picture(image), height, width)


def save_prompt(path: str | Path, states: Mapping[str, Tensor], text: str, negative: str = "") -> None:
    """Write the states of a prompt, in the precision they have, with what was encoded beside them.

    `states` are as `PromptEncoders.encode` gives them. Raises `InputError` on states that are none of a prompt, and
    where the file cannot be written.
    """
    if wrong := _wrong(states):
        raise InputError(wrong)
    write_save(path, {"model": _MODEL, "text": text, "negative": negative}, dict(states), PROMPT)


def load_prompt(path: str | Path) -> dict[str, Tensor]:
    """The states that `save_prompt` wrote, for `Engine.open(..., prompt=...)`.

    Raises `SaveFileError` where the file is missing, damaged, no prompt, or another model's.
    """
    header, states = read_save(path, PROMPT)
    if header.get("model") != _MODEL:
        raise SaveFileError(f"{path} is a prompt for {header.get('model')!r}, not for {_MODEL!r}")
    if wrong := _wrong(states):
        raise SaveFileError(f"{path}: {wrong}")
    return states


def _wrong(states: Mapping[str, Tensor]) -> str:
    """What keeps states from being a prompt's; empty where nothing does. Channels are the network's to check."""
    for name, tensor in states.items():
        if name not in STATES:
            return f"unknown prompt states {name!r}{did_you_mean(name, STATES)}; known: {', '.join(STATES)}"
        expected = "[1, N]" if name.endswith("_mask") else "[1, N, channels]"
        if tensor.dim() != expected.count(",") + 1 or len(tensor) != 1:
            return f"states {name!r} must be {expected}, got {list(tensor.shape)}"
        if not name.endswith("_mask") and not (tensor.is_floating_point() and bool(tensor.isfinite().all())):
            return f"states {name!r} must be finite numbers, got some that are not, or {tensor.dtype}"
    if absent := [name for name in ("text", "vision") if name not in states]:
        return f"a prompt needs states named {' and '.join(absent)}, got {sorted(states) or 'none'}"
    return ""
