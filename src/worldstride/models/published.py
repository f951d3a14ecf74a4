"""Published weights: tensors of a network made from those of a file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from worldstride.errors import CheckpointError

Network = TypeVar("Network", bound=nn.Module)
How = Literal["as it is", "flat", "rows", "columns", "sum"]


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


def filled(
    make: Callable[[], Network], table: Mapping[str, Source] | None, tensors: Mapping[str, Tensor], origin: str,
    what: str, device: torch.device | None = None, dtype: torch.dtype | None = None, idle: Collection[str] = (),
) -> Network:  # fmt: skip
    """A network that is `what`, its tensors made from published ones, moved to a device and precision one by one.

    No table: of the same names; no device or precision: as they are. `idle` ones must be there, and nothing is made of
    them. Names are checked both ways. Raises `CheckpointError` that names what is missing, left over or of another
    shape; `origin` says in it where the tensors are from.
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
