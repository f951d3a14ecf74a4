"""How a rollout's world begins: in a procedural world, or with an image and a prompt from files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from worldstride.engine import Engine
from worldstride.errors import InputError
from worldstride.models.hy_worldplay.prompts import load_prompt
from worldstride.picture import fit_picture
from worldstride.protocol import BeginsWithImage, EncodesPrompt
from worldstride.savefile import PROMPT
from worldstride.session import Session


def read_prompt(path: Path) -> dict[str, Tensor]:
    """Encoder states of a prompt by name: of a file by `worldstride prompt`, or of any other safetensors file.

    The former is refused where it is damaged (`SaveFileError`); `InputError` where a file cannot be read.
    """
    if not path.is_file():
        raise InputError(f"no prompt {path}; give a safetensors file of encoder states")
    try:
        with safe_open(path, "pt") as file:
            own = (file.metadata() or {}).get("format") == PROMPT.format
        return load_prompt(path) if own else load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"cannot read the prompt {path}: {error}; it must be a safetensors file") from error


@dataclass(frozen=True)
class Beginning:
    """What a rollout's world begins with; files are read when this is made, before any model is loaded."""

    seed: int
    noise_seed: int | None
    family: str | None
    """Kind of a procedural world."""
    picture: Image.Image | None
    """First image."""
    prompt: dict[str, Tensor] | None
    """Encoder states."""

    def session(self, engine: Engine) -> Session:
        """A new world of the engine's model. Random weights need neither image nor prompt: both are made up.

        `InputError` on what is missing, and on what the model does not begin with.
        """
        model = engine.model
        if not isinstance(model, BeginsWithImage):
            for name, value in (("image", self.picture), ("prompt", self.prompt)):
                if value is not None:
                    raise InputError(f"{model.name!r} begins in a procedural world; leave out --{name}")
            return engine.new(self.seed, self.noise_seed, self.family or "courtyard")
        if self.family is not None:
            raise InputError(f"{model.name!r} begins with an image; leave out --family {self.family}")
        picture = None if self.picture is None else fit_picture(self.picture, *engine.frame_size)[None]
        if engine.source.weights == "random":
            return engine.sample(self.seed, self.noise_seed, picture, self.prompt)
        if picture is None:
            raise InputError(f"{model.name!r} begins with an image; give --image")
        if self.prompt is None and isinstance(model, EncodesPrompt):
            raise InputError(f"{model.name!r} needs encoder states of a prompt; give --prompt, a safetensors file")
        return engine.open(picture, torch.eye(4)[None], self.prompt, self.seed, self.noise_seed)
