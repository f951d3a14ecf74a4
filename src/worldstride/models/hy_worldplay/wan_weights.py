"""Published weights of the WAN-5B variant's transformer: diffusers' names, and two kinds of tensors that it adds.

Queries, keys and values of a block are one matrix here, the text's keys and values another, and the projections of
the two streams' results a third.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from worldstride.models.hy_worldplay.wan import WanConfig, WanNetwork
from worldstride.models.published import Source, filled

_LINEAR = {
    "enter": "patch_embedding", "leave": "proj_out", "rows": "condition_embedder.time_proj",
    "level.first": "condition_embedder.time_embedder.linear_1",
    "level.second": "condition_embedder.time_embedder.linear_2",
    "action.first": "condition_embedder.action_embedder.linear_1",
    "action.second": "condition_embedder.action_embedder.linear_2",
    "prompt.0": "condition_embedder.text_embedder.linear_1", "prompt.2": "condition_embedder.text_embedder.linear_2",
}  # fmt: skip
_BLOCK = {
    "norm": "norm2", "words.q": "attn2.to_q", "told": "attn2.to_out.0", "mlp.up": "ffn.net.0.proj",
    "mlp.down": "ffn.net.2",
}  # fmt: skip
_SCALES = {
    "project.q": "attn1.norm_q",
    "project.k": "attn1.norm_k",
    "words.q": "attn2.norm_q",
    "words.k": "attn2.norm_k",
}
_FUSED = {
    "project.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "words.kv": ("attn2.to_k", "attn2.to_v"),
}  # fmt: skip
_STREAMS = ("attn1.to_out.0", "attn1.to_out_prope.0")


def sources(config: WanConfig) -> dict[str, Source]:
    """For every tensor of a `WanNetwork` those of a published file; together they name each of the file's once."""
    made = {"table": Source(("scale_shift_table",))}
    for part in ("weight", "bias"):
        made.update({f"{ours}.{part}": Source((f"{theirs}.{part}",)) for ours, theirs in _LINEAR.items()})
    made["enter.weight"] = Source(made["enter.weight"].names, "flat")
    for i in range(config.depth):
        of = f"blocks.{i}."
        made[f"{of}table"] = Source((f"{of}scale_shift_table",))
        for ours, theirs in _SCALES.items():
            made[f"{of}{ours}_scale"] = Source((f"{of}{theirs}.weight",))
        for part in ("weight", "bias"):
            for ours, theirs in _BLOCK.items():
                made[f"{of}{ours}.{part}"] = Source((f"{of}{theirs}.{part}",))
            for ours, several in _FUSED.items():
                made[f"{of}{ours}.{part}"] = Source(tuple(f"{of}{theirs}.{part}" for theirs in several), "rows")
            names = tuple(f"{of}{theirs}.{part}" for theirs in _STREAMS)
            made[f"{of}out.{part}"] = Source(names, "columns" if part == "weight" else "sum")
    return made


def build(
    config: WanConfig, tensors: Mapping[str, Tensor], origin: str, device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> WanNetwork:  # fmt: skip
    """The network with published weights, moved to a device and precision one by one; None leaves them as they are.

    Names are checked both ways. Raises `CheckpointError` that names what is missing, left over or of another shape;
    `origin` says in it where the tensors are from.
    """
    what = f"HY-WorldPlay WAN transformer of {config.depth} blocks"
    return filled(lambda: WanNetwork(config), sources(config), tensors, origin, what, device, dtype)
