"""`worldstride prompt`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor
from tyro.conf import arg

from worldstride.atomic import temporary_beside
from worldstride.commands.options import ModelName, OptionalPath, OptionalText
from worldstride.commands.table import table
from worldstride.engine import pick_device
from worldstride.errors import InputError
from worldstride.models.hy_worldplay.encoders import load_encoders
from worldstride.models.hy_worldplay.prompts import load_prompt, save_prompt
from worldstride.models.hy_worldplay.wan_encoder import load_wan_encoder
from worldstride.models.registry import find

_OF_TEXT = {"hy_worldplay_wan": False, "matrix_game3": True}
"""Models whose prompt is a text alone, and whether one of their variants is guided."""


@dataclass(frozen=True)
class Prompt:
    """Encode a text, and a first image where the model asks for one, and save the states: playing needs no encoder."""

    model: ModelName
    """Name of the model: hy_worldplay, hy_worldplay_wan or matrix_game3."""
    path: Annotated[Path, arg(metavar="PATH")]
    """Folder with the encoders."""
    text: str
    """What the world is like; what stands in double quotation marks is to be read in it."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="PATH")]
    """File to write (.safetensors)."""
    image: OptionalPath = None
    """First image, for hy_worldplay; cut around the middle and resized to the model's frames."""
    negative: str = ""
    """What the world is not like, for guided models; others ignore it."""
    device: OptionalText = None
    """"cpu", "cuda" or "cuda:1"; without it a GPU where there is one."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Number format of the language model: 15 GB of memory in the first two, 30 GB in the last; of Wan's 11 and 23."""

    def run(self, command: str) -> int:
        """Encode, write, read back, and print what is in the file."""
        name = find(self.model).name
        if name not in _OF_TEXT and name != "hy_worldplay":
            raise InputError(f"{name!r} takes no prompt; hy_worldplay, {' and '.join(_OF_TEXT)} do")
        temporary_beside(self.output)  # refuses a missing folder before any work is done
        states = self._of_text(name) if name in _OF_TEXT else self._of_text_and_image()
        save_prompt(self.output, states, self.text, self.negative, name)
        rows = [
            (
                name,
                " x ".join(map(str, t.shape)),
                str(t.dtype).removeprefix("torch."),
                str(t.numel() * t.element_size()),
            )
            for name, t in load_prompt(self.output).items()
        ]
        print(table(("states", "shape", "format", "bytes"), rows))
        print(f"\n{self.output}: {self.output.stat().st_size} bytes")
        return 0

    def _of_text(self, name: str) -> dict[str, Tensor]:
        if self.image is not None:
            raise InputError(f"a prompt of {name} is its text alone; leave out --image {self.image}")
        guided = _OF_TEXT[name]
        if self.negative and not guided:
            raise InputError(f"{name} is not guided; leave out --negative {self.negative!r}")
        encoder = load_wan_encoder(self.path, pick_device(self.device), getattr(torch, self.dtype))
        return encoder.encode(self.text, self.negative if guided else None)

    def _of_text_and_image(self) -> dict[str, Tensor]:
        if self.image is None:
            raise InputError("a prompt of hy_worldplay holds states of its first image; give --image")
        if self.output.resolve() == self.image.resolve():
            raise InputError(f"the prompt would overwrite the image {self.image}; give it another name")
        encoders = load_encoders(self.path, pick_device(self.device), getattr(torch, self.dtype))
        return encoders.encode(self.text, self.image, self.negative)
