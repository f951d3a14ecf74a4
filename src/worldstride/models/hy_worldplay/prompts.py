"""A prompt's encoder states in a file, and the first image at the model's size: what playing needs of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from PIL import Image
from torch import Tensor

from worldstride.errors import InputError, SaveFileError, did_you_mean
from worldstride.models.hy_worldplay.loading import HEIGHT, WIDTH
from worldstride.models.hy_worldplay.text import NEGATIVE, STATES, WORDS
from worldstride.picture import fit_picture, read_picture
from worldstride.savefile import PROMPT, read_save, write_save

_NEEDED: Mapping[str, tuple[Sequence[str], Sequence[str]]] = MappingProxyType(
    {
        "hy_worldplay": (STATES, ("text", "vision")),
        "hy_worldplay_wan": (WORDS, ("text",)),
        "matrix_game3": ((*WORDS, *(NEGATIVE + word for word in WORDS)), ("text",)),
    }
)
"""Names of the states that each model takes, and of those that it cannot do without."""


def fit_image(image: str | Path | Image.Image, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    """A picture, or its file, as uint8 [height, width, 3].

    Turned as its camera was held, cut around the middle to the shape of the frame, and resized with Lanczos. Raises
    `InputError` on a file that is no picture.
    """
    return fit_picture(image if isinstance(image, Image.Image) else read_picture(image), height, width)


def save_prompt(
    path: str | Path, states: Mapping[str, Tensor], text: str, negative: str = "", model: str = "hy_worldplay"
) -> None:
    """Write the states of a prompt, in the precision they have, with what was encoded beside them.

    `states` are as `PromptEncoders.encode` gives them, or `WanTextEncoder.encode` for the others.
    Raises `InputError` on states that are none of a prompt for the model, and where the file cannot be written.
    """
    if model not in _NEEDED:
        raise InputError(f"prompts are saved for {' or '.join(_NEEDED)}, got {model!r}")
    if wrong := _wrong(states, model):
        raise InputError(wrong)
    write_save(path, {"model": model, "text": text, "negative": negative}, dict(states), PROMPT)


def load_prompt(path: str | Path) -> dict[str, Tensor]:
    """The states that `save_prompt` wrote, for `Engine.open(..., prompt=...)` of the model they were made for.

    Raises `SaveFileError` where the file is missing, damaged, no prompt, or for a model that is none of ours.
    """
    header, states = read_save(path, PROMPT)
    model = header.get("model")
    if not isinstance(model, str) or model not in _NEEDED:
        raise SaveFileError(f"{path} is a prompt for {model!r}, not for {' or '.join(map(repr, _NEEDED))}")
    if wrong := _wrong(states, model):
        raise SaveFileError(f"{path}: {wrong}")
    return states


def _wrong(states: Mapping[str, Tensor], model: str) -> str:
    """What keeps states from being a model's prompt; empty where nothing does. Channels are the network's to check."""
    known, needed = _NEEDED[model]
    for name, tensor in states.items():
        if name not in known:
            return f"unknown prompt states {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}"
        expected = "[1, N]" if name.endswith("_mask") else "[1, N, channels]"
        if tensor.dim() != expected.count(",") + 1 or len(tensor) != 1:
            return f"states {name!r} must be {expected}, got {list(tensor.shape)}"
        if not name.endswith("_mask") and not (tensor.is_floating_point() and bool(tensor.isfinite().all())):
            return f"states {name!r} must be finite numbers, got some that are not, or {tensor.dtype}"
    if absent := [name for name in needed if name not in states]:
        return f"a prompt needs states named {' and '.join(absent)}, got {sorted(states) or 'none'}"
    return ""
