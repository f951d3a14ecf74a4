"""umT5 at a tiny size."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

import wan_tiny
from worldstride.models.hy_worldplay.wan_encoder import WanTextEncoder

LETTERS = [chr(i) for i in range(32, 127)]


@cache
def umt5() -> tuple[Any, Any]:
    """A model, and a tokenizer whose tokens are letters."""
    torch.manual_seed(0)
    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    tokenizer = transformers.T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0)
    config = transformers.UMT5Config(
        vocab_size=len(tokenizer), d_model=wan_tiny.TINY.text, d_ff=8, d_kv=4, num_heads=2, num_layers=2,
    )  # fmt: skip
    model = transformers.UMT5EncoderModel(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model, tokenizer


def write_converted(folder: Path) -> Path:
    """The layout of a repository for diffusers."""
    model, tokenizer = umt5()
    model.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def held(encoder: WanTextEncoder) -> Any:
    """The module that an encoder holds."""
    assert encoder._held is not None
    return encoder._held[0]
