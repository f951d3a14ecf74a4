"""Published weights of HY-WorldPlay's transformer: the names that files have, and what becomes of them here.

Queries, keys and values of a block are one matrix here, and so are the projections of its two streams' results.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from worldstride.models.hy_worldplay.config import HYConfig
from worldstride.models.hy_worldplay.model import HYNetwork
from worldstride.models.published import Source, filled

_LINEAR = {
    "enter": "img_in.proj", "level.first": "time_in.mlp.0", "level.second": "time_in.mlp.2",
    "action.first": "action_in.mlp.0", "action.second": "action_in.mlp.2", "final": "final_layer.adaLN_modulation.1",
    "leave": "final_layer.linear", "prompt.glyphs.0": "byt5_in.layernorm", "prompt.glyphs.1": "byt5_in.fc1",
    "prompt.glyphs.3": "byt5_in.fc2", "prompt.glyphs.5": "byt5_in.fc3", "prompt.vision.0": "vision_in.proj.0",
    "prompt.vision.1": "vision_in.proj.1", "prompt.vision.3": "vision_in.proj.3", "prompt.vision.4": "vision_in.proj.4",
    "prompt.refiner.enter": "txt_in.input_embedder", "prompt.refiner.level.first": "txt_in.t_embedder.mlp.0",
    "prompt.refiner.level.second": "txt_in.t_embedder.mlp.2", "prompt.refiner.mean1": "txt_in.c_embedder.linear_1",
    "prompt.refiner.mean2": "txt_in.c_embedder.linear_2",
}  # fmt: skip
_REFINER = {
    "norm1": "norm1", "norm2": "norm2", "qkv": "self_attn_qkv", "out": "self_attn_proj", "up": "mlp.fc1",
    "down": "mlp.fc2", "gates": "adaLN_modulation.1",
}  # fmt: skip
_BLOCK = {"modulation": "mod.linear", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}


def sources(config: HYConfig) -> dict[str, Source]:
    """For every tensor of a `HYNetwork` those of a published file; together they name each of the file's once."""
    made = {"prompt.kind": Source(("cond_type_embedding.weight",))}
    both = ("weight", "bias")

    def linear(ours: str, theirs: str) -> None:
        made.update({f"{ours}.{part}": Source((f"{theirs}.{part}",)) for part in both})

    for ours, theirs in _LINEAR.items():
        linear(ours, theirs)
    made["enter.weight"] = Source(made["enter.weight"].names, "flat")
    for i in range(2):
        for ours, theirs in _REFINER.items():
            linear(f"prompt.refiner.blocks.{i}.{ours}", f"txt_in.individual_token_refiner.blocks.{i}.{theirs}")
    for i in range(config.depth):
        for block, stream in ((f"video.{i}", "img"), (f"words.{i}", "txt")):
            of = f"double_blocks.{i}.{stream}_"
            for ours, theirs in _BLOCK.items():
                linear(f"{block}.{ours}", of + theirs)
            for one in "qk":
                made[f"{block}.project.{one}_scale"] = Source((f"{of}attn_{one}_norm.weight",))
            for part in both:
                names = tuple(f"{of}attn_{one}.{part}" for one in "qkv")
                made[f"{block}.project.qkv.{part}"] = Source(names, "rows")
        linear(f"words.{i}.out", f"double_blocks.{i}.txt_attn_proj")
        names = (f"double_blocks.{i}.img_attn_proj", f"double_blocks.{i}.img_attn_prope_proj")
        made[f"video.{i}.out.weight"] = Source(tuple(f"{name}.weight" for name in names), "columns")
        made[f"video.{i}.out.bias"] = Source(tuple(f"{name}.bias" for name in names), "sum")
    return made


def build(
    config: HYConfig, tensors: Mapping[str, Tensor], origin: str, device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> HYNetwork:  # fmt: skip
    """The network with published weights, moved to a device and precision one by one; None leaves them as they are.

    Names are checked both ways. Raises `CheckpointError` that names what is missing, left over or of another shape;
    `origin` says in it where the tensors are from.
    """
    what = f"HY-WorldPlay transformer of {config.depth} blocks"
    return filled(lambda: HYNetwork(config), sources(config), tensors, origin, what, device, dtype)
