"""Published weights of Matrix-Game-3.0's transformer: the names that files have, and what becomes of them here.

Queries, keys and values of a block are one matrix here, and so are the text's keys and values; the layer that takes in
tokens with their mouse is two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from worldstride.errors import InputError
from worldstride.models.matrix_game3.config import MG3Config
from worldstride.models.matrix_game3.model import MG3Network
from worldstride.models.published import Source, filled

_LINEAR = {
    "enter": "patch_embedding", "leave": "head.head", "level.first": "time_embedding.0",
    "level.second": "time_embedding.2", "rows": "time_projection.1", "prompt.0": "text_embedding.0",
    "prompt.2": "text_embedding.2", "rays": "patch_embedding_wancamctrl", "first": "c2ws_hidden_states_layer1",
    "second": "c2ws_hidden_states_layer2",
}  # fmt: skip
_BLOCK = {
    "out": "self_attn.o", "camera.first": "cam_injector_layer1", "camera.second": "cam_injector_layer2",
    "camera.scale": "cam_scale_layer", "camera.shift": "cam_shift_layer", "norm": "norm3", "words.q": "cross_attn.q",
    "told": "cross_attn.o", "mlp.up": "ffn.0", "mlp.down": "ffn.2",
}  # fmt: skip
_SCALES = {
    "project.q": "self_attn.norm_q", "project.k": "self_attn.norm_k", "words.q": "cross_attn.norm_q",
    "words.k": "cross_attn.norm_k",
}  # fmt: skip
_FUSED = {
    "project.qkv": ("self_attn.q", "self_attn.k", "self_attn.v"), "words.kv": ("cross_attn.k", "cross_attn.v"),
}  # fmt: skip
_STEERING = {"embed.0": "keyboard_embed.0", "embed.2": "keyboard_embed.2", "mix": "mouse_mlp.2", "norm": "mouse_mlp.3"}
_PLAIN = {
    "pressed": "keyboard_attn_kv", "qkv": "t_qkv", "leave": "proj_mouse", "ask": "mouse_attn_q",
    "answer": "proj_keyboard",
}  # fmt: skip
_IDLE = ("img_attn_q_norm", "img_attn_k_norm", "key_attn_q_norm", "key_attn_k_norm")
"""Weights that files have and upstream never applies (specification, section 2.4)."""


_UNTOLD: dict[int, dict[str, int]] = {
    3072: {"heads": 24, "rows": 512, "turned": 8},
    64: {"heads": 4, "rows": 8, "turned": 4},
}
"""What weights do not tell, by width."""


def sources(config: MG3Config) -> dict[str, Source]:
    """For every tensor of an `MG3Network` those of a published file."""
    made, both = {"table": Source(("head.modulation",))}, ("weight", "bias")
    for part in both:
        made.update({f"{ours}.{part}": Source((f"{theirs}.{part}",)) for ours, theirs in _LINEAR.items()})
    made["enter.weight"] = Source(made["enter.weight"].names, "flat")
    for i in range(config.depth):
        of = f"blocks.{i}."
        made[f"{of}table"] = Source((f"{of}modulation",))
        for ours, theirs in _SCALES.items():
            made[f"{of}{ours}_scale"] = Source((f"{of}{theirs}.weight",))
        for part in both:
            made.update({f"{of}{ours}.{part}": Source((f"{of}{theirs}.{part}",)) for ours, theirs in _BLOCK.items()})
            for ours, several in _FUSED.items():
                made[f"{of}{ours}.{part}"] = Source(tuple(f"{of}{theirs}.{part}" for theirs in several), "rows")
    for i in config.steered:
        ours, theirs = f"blocks.{i}.steering.", f"blocks.{i}.action_model."
        for one, its in _PLAIN.items():
            made[f"{ours}{one}.weight"] = Source((f"{theirs}{its}.weight",))
        for part in both:
            made.update({f"{ours}{one}.{part}": Source((f"{theirs}{its}.{part}",)) for one, its in _STEERING.items()})
        joined = (f"{theirs}mouse_mlp.0.weight",)
        made[f"{ours}enter.weight"] = Source(joined, columns=(0, config.width))
        made[f"{ours}moved.weight"] = Source(joined, columns=(config.width, None))
        made[f"{ours}enter.bias"] = Source((f"{theirs}mouse_mlp.0.bias",))
    return made


def idle(config: MG3Config) -> frozenset[str]:
    """Tensors of a published file that nothing is made of."""
    return frozenset(f"blocks.{i}.action_model.{name}.weight" for i in config.steered for name in _IDLE)


def build(
    config: MG3Config, tensors: Mapping[str, Tensor], origin: str, device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> MG3Network:  # fmt: skip
    """The network with published weights, moved to a device and precision one by one; None leaves them as they are.

    Names are checked both ways. Raises `CheckpointError` that names what is missing, left over or of another shape;
    `origin` says in it where the tensors are from.
    """
    what = f"Matrix-Game-3.0 transformer of {config.depth} blocks"
    table = sources(config)
    return filled(lambda: MG3Network(config), table, tensors, origin, what, device, dtype, idle(config))


def config_of(weights: Mapping[str, Tensor], told: Mapping[str, Any]) -> MG3Config:
    """Sizes from a published file's tensors, and from entries that tell what those do not."""
    width, text = weights["text_embedding.0.weight"].shape
    blocks = {int(name.split(".")[1]) for name in weights if name.startswith("blocks.")}
    steered = {int(name.split(".")[1]) for name in weights if ".action_model." in name}
    of = f"blocks.{min(steered)}.action_model." if steered else ""
    sizes: dict[str, Any] = {
        "channels": weights["patch_embedding.weight"].shape[1], "width": width, "depth": len(blocks),
        "hidden": len(weights["blocks.0.ffn.0.bias"]), "frequencies": weights["time_embedding.0.weight"].shape[1],
        "text": text, "steered": tuple(sorted(steered)),
    }  # fmt: skip
    if of:
        inner = len(weights[f"{of}mouse_mlp.2.bias"])
        sizes |= {"action_width": inner, "action_heads": inner // len(weights[f"{of}img_attn_q_norm.weight"])}
        sizes |= {"key_width": len(weights[f"{of}keyboard_embed.0.bias"])}
    rest = {name for known in _UNTOLD.values() for name in known} - told.keys()
    if rest and width not in _UNTOLD:
        raise InputError(f"weights of width {width} do not tell {', '.join(sorted(rest))}")
    return MG3Config(**{**_UNTOLD.get(width, {}), **sizes, **told})
