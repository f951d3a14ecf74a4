"""umT5's encoder in Wan's own file, which Matrix-Game-3.0 is published with: its names for transformers' tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from worldstride.errors import CheckpointError, MissingDependencyError
from worldstride.models.drawing import drawn
from worldstride.models.pickled import Pickled
from worldstride.models.published import Source, filled

FILE = "models_t5_umt5-xxl-enc-bf16.pth"
"""The file: 242 tensors in bfloat16, 11.4 GB."""
TOKENIZER = "google/umt5-xxl"
"""Folder of the tokenizer beside it."""

FULL = {
    "vocab_size": 256_384, "d_model": 4096, "d_kv": 64, "num_heads": 64, "d_ff": 10_240, "num_layers": 24,
    "relative_attention_num_buckets": 32,
}  # fmt: skip
"""Sizes of the published encoder, 5.7 billion parameters."""

_WHOLE = {"embed_tokens": "token_embedding", "final_layer_norm": "norm"}
_BLOCK = {
    "0.layer_norm": "norm1", "0.SelfAttention.q": "attn.q", "0.SelfAttention.k": "attn.k",
    "0.SelfAttention.v": "attn.v", "0.SelfAttention.o": "attn.o",
    "0.SelfAttention.relative_attention_bias": "pos_embedding.embedding", "1.layer_norm": "norm2",
    "1.DenseReluDense.wi_0": "ffn.gate.0", "1.DenseReluDense.wi_1": "ffn.fc1", "1.DenseReluDense.wo": "ffn.fc2",
}  # fmt: skip
_WIDE = ".wo.weight"
"""What transformers keeps in float32 in a model in float16, whose numbers end too soon for it."""


def sources(layers: int) -> dict[str, Source]:
    """For every tensor of transformers' `UMT5Stack` that of Wan's file."""
    made = {f"{ours}.weight": Source((f"{theirs}.weight",)) for ours, theirs in _WHOLE.items()}
    for i in range(layers):
        for ours, theirs in _BLOCK.items():
            made[f"block.{i}.layer.{ours}.weight"] = Source((f"blocks.{i}.{theirs}.weight",))
    return made


def sizes_of(tensors: Mapping[str, Tensor], origin: str) -> dict[str, int]:
    """Sizes of the encoder that tensors by Wan's names have, as `UMT5Config` takes them; `CheckpointError` where they
    are of none."""
    try:
        words, width = tensors["token_embedding.weight"].shape
        buckets, heads = tensors["blocks.0.pos_embedding.embedding.weight"].shape
        inner, _ = tensors["blocks.0.attn.q.weight"].shape
        hidden, _ = tensors["blocks.0.ffn.fc1.weight"].shape
        return {
            "vocab_size": words, "d_model": width, "d_kv": inner // heads, "num_heads": heads, "d_ff": hidden,
            "num_layers": len({found[1] for name in tensors if (found := re.match(r"blocks\.(\d+)\.", name))}),
            "relative_attention_num_buckets": buckets,
        }  # fmt: skip
    except KeyError as error:
        raise CheckpointError(f"{origin} is no umT5 encoder of Wan: it has no tensor {error}") from error
    except (ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{origin} is no umT5 encoder of Wan: {error} in the shapes of its tensors") from error


def config_of(transformers: Any, sizes: Mapping[str, int]) -> Any:
    """A `UMT5Config` of `transformers`, the library, with these sizes."""
    return transformers.UMT5Config(
        **sizes, feed_forward_proj="gated-gelu", relative_attention_max_distance=128, layer_norm_epsilon=1e-6,
        dropout_rate=0.0,
    )  # fmt: skip


def read(transformers: Any, file: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A `UMT5EncoderModel` of `transformers`, the library, with the weights of a file, each moved by itself.

    Names are checked both ways. Raises `CheckpointError` that names what is missing, left over or of another shape.
    """
    tensors = Pickled(file, ())
    sizes = sizes_of(tensors, str(file))
    config = config_of(transformers, sizes)
    with torch.device("meta"):
        model = transformers.UMT5EncoderModel(config)
    layers = sizes["num_layers"]
    what = f"umT5 encoder of {layers} blocks"
    stack = filled(lambda: model.encoder, sources(layers), tensors, str(file), what)
    for name, parameter in stack.named_parameters():
        kind = torch.float32 if dtype == torch.float16 and name.endswith(_WIDE) else dtype
        parameter.data = parameter.data.to(device, kind)
    model.set_input_embeddings(stack.embed_tokens)  # the two are one table, which would be there twice by their names
    return model.requires_grad_(False).eval()


def drawn_encoder(device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Of full size, with seeded random weights: for memory; `MissingDependencyError` without transformers."""
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError("umT5 needs transformers: pip install 'worldstride[encoders]'") from error
    model = drawn(lambda: transformers.UMT5EncoderModel(config_of(transformers, FULL)), device, dtype, seed=2)
    model.set_input_embeddings(model.encoder.embed_tokens)  # as in `read`
    return model
