"""Published weights of HY-WorldPlay's transformer: the names that files have, and what becomes of them here.

Queries, keys and values of a block are one matrix here, and so are the projections of its two streams' results.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from worldstride.errors import CheckpointError
from worldstride.models.hy_worldplay.config import HYConfig
from worldstride.models.hy_worldplay.model import HYNetwork

Network = TypeVar("Network", bound=nn.Module)
How = Literal["as it is", "flat", "rows", "columns", "sum"]

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


@dataclass(frozen=True)
class Source:
    """Where a tensor comes from."""

    names: tuple[str, ...]
    """Tensors of the file."""
    how: How = "as it is"
    """What is made of them: a matrix of a convolution; of several, one below the other, side by side, or added."""
    columns: tuple[int, int | None] = (0, None)
    """The columns of a matrix that are taken."""

    def make(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The tensor here, from the file's."""
        parts = [tensors[name] for name in self.names]
        if self.how in ("as it is", "flat"):
            (one,) = parts
            one = one.flatten(1) if self.how == "flat" else one
            return one if self.columns == (0, None) else one[:, slice(*self.columns)].contiguous()
        return sum(parts[1:], parts[0]) if self.how == "sum" else torch.cat(parts, 0 if self.how == "rows" else 1)


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


def filled(
    make: Callable[[], Network], table: Mapping[str, Source] | None, tensors: Mapping[str, Tensor], origin: str,
    what: str, device: torch.device | None = None, dtype: torch.dtype | None = None, idle: Collection[str] = (),
) -> Network:  # fmt: skip
    """A network that is `what`, its tensors made from published ones; see `build`. No table: of the same names.

    `idle` ones must be there, and nothing is made of them.
    """
    with torch.device("meta"):
        network = make().requires_grad_(False)
    expected = network.state_dict()
    table = {name: Source((name,)) for name in expected} if table is None else table
    wanted = {name for source in table.values() for name in source.names}.union(idle)
    missing, foreign = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
    if missing or foreign:
        raise CheckpointError(f"{origin} is no {what}: {_listed(missing)} missing, {_listed(foreign)} unknown")
    made, wrong = dict[str, Tensor](), list[str]()
    for name, like in expected.items():
        source = table[name]
        try:
            made[name] = source.make(tensors).to(device, dtype)
        except RuntimeError:  # parts that do not go together
            wrong.append(f"{source.names[0]}: {[list(tensors[n].shape) for n in source.names]}")
            continue
        if made[name].shape != like.shape:
            wrong.append(f"{source.names[0]}: {list(made[name].shape)} where {list(like.shape)} is right")
    if wrong:
        raise CheckpointError(f"{origin}: {len(wrong)} tensors do not fit the configuration; first {wrong[0]}")
    network.load_state_dict(made, assign=True)
    return network.eval()


def _listed(names: list[str]) -> str:
    """How many, and the first few."""
    if not names:
        return "none"
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
