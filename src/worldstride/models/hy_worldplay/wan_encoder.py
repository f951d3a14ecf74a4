"""umT5, the text encoder of HY-WorldPlay's WAN-5B variant and of Matrix-Game-3.0: what their prompts' states are
computed with, once.

How a text is cleaned and cut into tokens comes from diffusers' pipeline of Wan, which both are built on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from worldstride.errors import CheckpointError, InputError
from worldstride.models.hy_worldplay import encoder_files
from worldstride.models.hy_worldplay.encoders import device_of, let_go
from worldstride.models.hy_worldplay.wan_adapter import ROWS
from worldstride.models.shards import read_json
from worldstride.models.wan import umt5


class WanTextEncoder:
    """Made by `load_wan_encoder`; for several prompts a context manager:

        with load_wan_encoder("Matrix-Game-3.0", "cuda") as encoder:
            states = [encoder.encode(text) for text in texts]

    Weights are on the device from `open` to `close`, which is what `with` calls, and at no other time: a prompt that is
    encoded while they are not has them read for itself alone.
    """

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.path, self.device, self.dtype = path, device, dtype
        self._held: tuple[nn.Module, Any] | None = None

    def open(self) -> WanTextEncoder:
        """Read the weights to the device, unless they are there; `CheckpointError` on files that do not fit."""
        if self._held is None:
            self._held = encoder_files.wan_text_encoder(self.path, self.dtype, self.device)
        return self

    def close(self) -> None:
        """Give the memory back, on a GPU to whoever else uses it; nothing where nothing is held. `open` reads anew."""
        if self._held is not None:
            (model, _), self._held = self._held, None
            let_go(model, self.device)

    def __enter__(self) -> WanTextEncoder:
        return self.open()

    def __exit__(self, *error: object) -> None:
        self.close()

    @torch.no_grad()
    def encode(self, text: str, negative: str | None = None) -> dict[str, Tensor]:
        """The states of a prompt, on the CPU, as `Engine.open` takes them: "text" [1, L, 4096] in the given precision,
        and "negative_text" where a negative prompt is given.

        Rows of padding are left out; the model fills them up with zeros, as the pipeline does. Raises `InputError` on
        what is no text or has more than 512 tokens, `CheckpointError` on files that do not fit.
        """
        texts = {"text": text} if negative is None else {"text": text, "negative_text": negative}
        for one in texts.values():
            if not isinstance(one, str):
                raise InputError(f"the text must be a string, got {type(one).__name__}")
        if self._held is None:
            with self:
                return self.encode(text, negative)
        model, tokenizer = self._held
        _, diffusers = encoder_files.libraries()
        clean, counts = diffusers.pipelines.wan.pipeline_wan.prompt_clean, dict[str, int]()
        for name, one in texts.items():
            counts[name] = len(tokenizer(clean(one)).input_ids)
            if counts[name] > ROWS:
                raise InputError(f"a text may have {ROWS} tokens, got {counts[name]}; shorten {one[:40]!r}...")
        pipeline, made = diffusers.WanPipeline(tokenizer=tokenizer, text_encoder=model, vae=None, scheduler=None), {}
        for name, one in texts.items():  # padding is not seen: states are the same without it
            states, _ = pipeline.encode_prompt(
                one, do_classifier_free_guidance=False, max_sequence_length=counts[name], device=self.device,
                dtype=self.dtype,
            )  # fmt: skip
            made[name] = states.cpu()
        return made


def load_wan_encoder(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> WanTextEncoder:
    """umT5's encoder in one of two layouts: `text_encoder` and `tokenizer` of `Wan-AI/Wan2.2-TI2V-5B-Diffusers`, or
    Wan's own file and `google/umt5-xxl`, as `Skywork/Matrix-Game-3.0` holds them.

    The folder is the one given, the one around it, or that of Wan-AI in or beside it, so that a model's serves.
    Nothing is read yet; 11 GB in half precision. Raises `CheckpointError` that names what is missing and where it comes
    from, `MissingDependencyError` without transformers and diffusers.
    """
    place = device_of(device)
    encoder_files.libraries()
    given, name = Path(path).absolute(), encoder_files.WAN.split("/")[1]
    around = (given / name, given.parent, given.parent / name, given.parent.parent / name)
    root = next((folder for folder in (given, *around) if _has(folder)), Path(path))
    encoder_files.find_encoder(root, "text encoder of Wan")
    if not _has(root):
        raise CheckpointError(
            f"{root / 'text_encoder'} holds a model of type {_kind(root)!r}, not umT5; that comes from "
            f"{encoder_files.WAN}"
        )
    return WanTextEncoder(root, place, dtype)


def _has(folder: Path) -> bool:
    """Whether umT5 is what a folder holds, in either layout."""
    return _kind(folder) == "umt5" or (folder / umt5.FILE).is_file()


def _kind(folder: Path) -> object:
    """What the configuration of a folder's text encoder says that it is; None where there is none."""
    config = folder / "text_encoder" / "config.json"
    return read_json(config).get("model_type") if config.is_file() else None
