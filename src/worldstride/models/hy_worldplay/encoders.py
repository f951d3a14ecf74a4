"""Text and image encoders of HY-WorldPlay: what a prompt's states are computed with, once, before anybody plays.

The chat template, what of a text goes to the glyph encoder, and how it is put come from diffusers' pipeline of
HunyuanVideo-1.5, which HY-WorldPlay is built on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from worldstride.errors import CheckpointError, InputError
from worldstride.models.hy_worldplay import encoder_files
from worldstride.models.hy_worldplay.prompts import fit_image

LONGEST = 1000
"""Tokens of a text, with the few that the chat template puts behind it."""


class PromptEncoders:
    """Made by `load_encoders`. Each encoder is read when it is needed and let go of before the next."""

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.path, self.device, self.dtype = path, device, dtype

    @torch.no_grad()
    def encode(self, text: str, image: str | Path | Image.Image, negative: str = "") -> dict[str, Tensor]:
        """The states of a prompt, on the CPU, as `Engine.open` takes them.

        "text" [1, L, 3584] and "negative_text" are the language model's, in its precision; "glyphs" [1, G, 1472] and
        "negative_glyphs" ByT5's of what stands in double quotation marks, of the first 256 bytes, G = 0 where nothing
        does; "vision" [1, 729, 1152] SigLIP's of the image as `fit_image` makes it. Rows of padding are left out, so
        there are no masks. Models that are not guided ignore the negative states. Raises `InputError` on a text of more
        than `LONGEST` tokens or an image that cannot be read, `CheckpointError` on files that do not fit.
        """
        texts = {"": text, "negative_": negative}
        for sign, words in texts.items():
            if not isinstance(words, str):
                raise InputError(f"the {sign.replace('_', ' ')}text must be a string, got {type(words).__name__}")
        picture = Image.fromarray(fit_image(image).numpy())
        states = {"vision": self._vision(picture)}
        states |= {f"{sign}glyphs": made for sign, made in zip(texts, self._glyphs(list(texts.values())), strict=True)}
        states |= {f"{sign}text": made for sign, made in zip(texts, self._text(list(texts.values())), strict=True)}
        return {name: states[name] for name in sorted(states)}

    def _vision(self, picture: Image.Image) -> Tensor:
        model, processor = encoder_files.image_encoder(self.path)
        pipeline = _pipeline(image_encoder=model.to(self.device), feature_extractor=processor)
        made = pipeline.encode_image(picture, 1, self.device, torch.float32).cpu()
        let_go(model, self.device)
        return made

    def _glyphs(self, texts: list[str]) -> list[Tensor]:
        model, tokenizer = encoder_files.glyph_encoder(self.path)
        pipeline = _pipeline(text_encoder_2=model.to(self.device), tokenizer_2=tokenizer)
        none, made = torch.zeros(1, 1, 1), list[Tensor]()
        for text in texts:
            # states that are given are not computed: the language model is not there
            _, _, states, mask = pipeline.encode_prompt(
                text, self.device, torch.float32, prompt_embeds=none, prompt_embeds_mask=none[0]
            )
            made.append(states[:, mask[0].bool()].cpu())
        let_go(model, self.device)
        return made

    def _text(self, texts: list[str]) -> list[Tensor]:
        model, tokenizer = encoder_files.language_model(self.path, self.dtype)
        pipeline = _pipeline(text_encoder=model.to(self.device), tokenizer=tokenizer)
        # what all chats begin with is the template's; with Qwen's tokenizer as many tokens as diffusers counts
        first, second = (_tokens(tokenizer, pipeline.system_message, word) for word in ("a", "b"))
        crop = next((i for i in range(min(len(first), len(second))) if first[i] != second[i]), None)
        if crop is None:
            raise CheckpointError(f"{self.path}: the chat template of the language model leaves out what users say")
        pipeline.prompt_template_encode_start_idx = crop
        none, made = torch.zeros(1, 1, 1), list[Tensor]()
        for text in texts:
            count = len(_tokens(tokenizer, pipeline.system_message, text)) - crop
            if count > LONGEST:
                raise InputError(f"a text may have {LONGEST} tokens, got {count}; shorten {text[:40]!r}...")
            # padding is neither seen nor kept, and at full length would cost five times as much as most texts
            pipeline.tokenizer_max_length = count
            states, mask, _, _ = pipeline.encode_prompt(
                text, self.device, self.dtype, prompt_embeds_2=none, prompt_embeds_mask_2=none[0]
            )
            made.append(states[:, mask[0].bool()].cpu())
        let_go(model, self.device)
        return made


def load_encoders(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> PromptEncoders:
    """Encoders below a folder, in either of two layouts (see `encoder_files`); nothing is read yet.

    The language model computes in `dtype`, 15 GB in half precision; the two others, 0.9 and 1.7 GB, in float32. Raises
    `CheckpointError` that names what is missing and where it comes from, `MissingDependencyError` without transformers
    and diffusers.
    """
    place = device_of(device)
    encoder_files.libraries()
    for encoder in ("language model", "glyph encoder", "image encoder"):
        encoder_files.find_encoder(Path(path), encoder)
    return PromptEncoders(Path(path), place, dtype)


def device_of(device: torch.device | str) -> torch.device:
    """The device of a name; `InputError` where there is none."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"unknown device {device!r}; use 'cpu', 'cuda' or 'cuda:1'") from error


def let_go(model: nn.Module, device: torch.device) -> None:
    """Give an encoder's memory on a device back, whoever may still refer to it."""
    model.to("meta")
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _pipeline(**parts: Any) -> Any:
    """diffusers' pipeline with some of its encoders and nothing else."""
    _, diffusers = encoder_files.libraries()
    with torch.device("meta"):  # the pipeline asks its VAE for sizes, and is not made without one
        vae = diffusers.AutoencoderKLHunyuanVideo15()
    every = (
        "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "image_encoder", "feature_extractor",
        "transformer", "scheduler", "guider",
    )  # fmt: skip
    return diffusers.HunyuanVideo15ImageToVideoPipeline(vae=vae, **{**dict.fromkeys(every), **parts})


def _tokens(tokenizer: Any, system: str, text: str) -> list[int]:
    """Tokens of a chat that says `text`; an empty one is a space there, too."""
    chat = [{"role": "system", "content": system}, {"role": "user", "content": text or " "}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
