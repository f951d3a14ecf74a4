"""What a world is given: encoder states of its prompt, and its first image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from worldstride.errors import InputError, did_you_mean
from worldstride.models.hy_worldplay.config import HYConfig
from worldstride.models.hy_worldplay.placed import FIRST
from worldstride.models.hy_worldplay.text import NEGATIVE, STATES, Prompt


def check_names(prompt: Mapping[str, Tensor], states: Sequence[str] = STATES) -> None:
    """Raise `InputError` on names that none of the encoder states has."""
    known = [*states, "image"]
    for name in prompt:
        if name not in known:
            raise InputError(f"unknown prompt states {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")


def states(prompt: Mapping[str, Tensor], sign: str, config: HYConfig, device: torch.device) -> Prompt:
    """The prompt whose states' names begin with `sign`, without masked rows; the image's states have no sign.

    "text" [1, L, ...] and "vision" [1, V, ...] are needed, "glyphs" [1, G, ...] and masks [1, N] may be left out;
    `InputError` on what is missing or does not fit.
    """
    for name in (f"{sign}text", "vision"):
        if name not in prompt:
            guided = " beside 'text', being guided" if sign else ""
            found = sorted(prompt) or "none"
            raise InputError(f"HY-WorldPlay needs encoder states named '{name}'{guided}, got {found}")
    text = prompt[f"{sign}text"].to(device)
    glyphs, vision = (
        prompt[name].to(device) if name in prompt else text.new_zeros(1, 0, channels)
        for name, channels in ((f"{sign}glyphs", config.glyphs), ("vision", config.vision))
    )
    masks = [
        prompt[name].to(device) if name in prompt else torch.ones(of.shape[:2], device=device)
        for name, of in ((f"{sign}text_mask", text), (f"{sign}glyphs_mask", glyphs))
    ]
    return Prompt.masked(text, masks[0], glyphs, masks[1], vision)


def sampled(config: HYConfig, guided: bool, generator: torch.Generator) -> Mapping[str, Tensor]:
    """States of 200 tokens of text, no glyphs, and an image; of a guided model as many of the negative prompt."""
    sizes = {"text": (200, config.text), "vision": (729, config.vision)}
    sizes |= {f"{NEGATIVE}text": (200, config.text)} if guided else {}
    return {name: torch.randn(1, *size, generator=generator) for name, size in sizes.items()}


def planes(image: Tensor | None, numbers: Sequence[int], batch: int, latent: tuple[int, ...], weight: Tensor) -> Tensor:
    """The first image's latent [1, C, h, w] and its mask at the world's first latent, else zeros: [B, T, C + 1, h, w].

    `numbers` are the labels of the T latents, `latent` is the shape (C, h, w) of one, and `weight` says where and in
    which precision.
    """
    shape = (batch, len(numbers), latent[0] + 1, *latent[1:])
    made = torch.zeros(shape, device=weight.device, dtype=weight.dtype)
    if image is not None:
        for i, number in enumerate(numbers):
            if number == FIRST:
                made[:, i, :-1] = image.to(made)
                made[:, i, -1] = 1
    return made
