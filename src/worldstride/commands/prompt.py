"""`worldstride prompt`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from tyro.conf import arg

from worldstride.atomic import temporary_beside
from worldstride.commands.options import ModelName, OptionalText
from worldstride.commands.table import table
from worldstride.engine import pick_device
from worldstride.errors import InputError
from worldstride.models.hy_worldplay.encoders import load_encoders
from worldstride.models.hy_worldplay.prompts import load_prompt, save_prompt
from worldstride.models.registry import find


@dataclass(frozen=True)
class Prompt:
    """Encode a text and a first image once and save the states, so that playing needs no encoder."""

    model: ModelName
    """Name of the model: hy_worldplay."""
    path: Annotated[Path, arg(metavar="PATH")]
    """Folder with the encoders."""
    text: str
    """What the world is like; what stands in double quotation marks is to be read in it."""
    image: Annotated[Path, arg(metavar="PATH")]
    """First image; cut around the middle and resized to the model's frames."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="PATH")]
    """File to write (.safetensors)."""
    negative: str = ""
    """What the world is not like, for guided models; others ignore it."""
    device: OptionalText = None
    """"cpu", "cuda" or "cuda:1"; without it a GPU where there is one."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Number format of the language model: 15 GB of memory in the first two, 30 GB in the last."""

    def run(self, command: str) -> int:
        """Encode, write, read back, and print what is in the file."""
        name = find(self.model).name
        if name != "hy_worldplay":
            raise InputError(f"{name!r} takes no prompt; hy_worldplay does")
        temporary_beside(self.output)  # refuses a missing folder before any work is done
        if self.output.resolve() == self.image.resolve():
            raise InputError(f"the prompt would overwrite the image {self.image}; give it another name")
        encoders = load_encoders(self.path, pick_device(self.device), getattr(torch, self.dtype))
        save_prompt(self.output, encoders.encode(self.text, self.image, self.negative), self.text, self.negative)
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
