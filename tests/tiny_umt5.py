"""umT5 at a tiny size, written in both published layouts."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import wan_tiny
from worldstride.models.hy_worldplay.wan_encoder import WanTextEncoder

LETTERS = [chr(i) for i in range(32, 127)]
PICKLED = "models_t5_umt5-xxl-enc-bf16.pth"
_PARTS = {
    "layer.0.layer_norm": "norm1", "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.0.SelfAttention": "attn", "layer.1.layer_norm": "norm2", "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1", "layer.1.DenseReluDense.wo": "ffn.fc2",
}  # fmt: skip


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


def native() -> dict[str, Tensor]:
    """The weights by Wan's own names."""
    made = dict[str, Tensor]()
    for name, tensor in umt5()[0].encoder.state_dict().items():
        short = name
        for ours, theirs in _PARTS.items():
            short = short.replace(f".{ours}.", f".{theirs}.")
        short = re.sub(r"^block\.", "blocks.", short)
        short = short.replace("embed_tokens", "token_embedding").replace("final_layer_norm", "norm")
        made[short] = tensor.clone()
    return made


def write_native(folder: Path, weights: object = None) -> Path:
    """The layout of Skywork/Matrix-Game-3.0; other weights where they are given."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(native() if weights is None else weights, folder / PICKLED)
    umt5()[1].save_pretrained(folder / "google" / "umt5-xxl")
    return folder


def held(encoder: WanTextEncoder) -> Any:
    """The module that an encoder holds."""
    assert encoder._held is not None
    return encoder._held[0]
