"""What blocks of the small joint model do, chunk by chunk: recorded, compared, and taken over by other chunks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from joint_courtyard import JointCourtyard
from torch import Tensor

from worldstride.models.matrix_game3.adapter import NEW
from worldstride.models.matrix_game3.layers import Block
from worldstride.models.matrix_game3.model import MG3Network

Arm = Literal["full", "chunk before", "first evaluation"]
"""Where all blocks, but for the first and the last, take over what they add: nowhere; from the same evaluation of the
chunk before, in all but a chunk's last; from the chunk's first evaluation, in all between that and the last."""
ARMS: tuple[Arm, ...] = get_args(Arm)
FLOOR = 0.97
"""Least cosine of inputs at which published reuse takes over (X-Cache, arXiv 2604.20289, which takes it of a few
tokens)."""


class Likeness:
    """How like pairs of tensors are, over all of them, and how many pairs are more alike than `FLOOR`."""

    def __init__(self) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64)  # new^2, old^2, new * old, (new - old)^2
        self._passed, self._count = 0, 0

    def add(self, new: Tensor, old: Tensor) -> None:
        """Count a pair [B, ...] for each of B worlds."""
        a, b = new.flatten(1), old.flatten(1)
        sums = torch.stack([t.sum(1) for t in (a * a, b * b, a * b, (a - b).square())]).double().cpu()  # [4, B]
        self._sums += sums.sum(1)
        self._passed += int((sums[2] >= FLOOR * (sums[0] * sums[1]).sqrt()).sum())
        self._count += len(new)

    def facts(self) -> dict[str, float]:
        """Their cosine, their difference relative to the new ones' size, and the share that is more alike."""
        new, old, both, gap = self._sums.tolist()
        return {
            "cosine": both / (new * old) ** 0.5, "difference": (gap / new) ** 0.5, "passed": self._passed / self._count
        }  # fmt: skip


@dataclass
class Seen:
    """What one block did in one evaluation."""

    entered: Tensor
    """Its input at the new latents [B, N, width]."""
    keys: Tensor
    """Of all latents, turned [B, heads, T, tokens, head_dim]."""
    values: Tensor
    """Likewise."""
    added: Tensor | None = None
    """What it added to its input; None while it is at it."""


class Watch:
    """Stands around a network's blocks, records what they do, and puts what they added before in its place."""

    def __init__(self, network: MG3Network, tokens: int, evaluations: int) -> None:
        self._number = {id(block): i for i, block in enumerate(network.blocks)}
        self._tokens, self._evaluation = tokens, -1
        self.last, self.depth = evaluations - 1, len(self._number)
        """A chunk's last evaluation, and how many blocks there are."""
        self.before: dict[tuple[int, int], Seen] = {}
        """Of the chunk before, by evaluation and block."""
        self.now: dict[tuple[int, int], Seen] = {}
        self.arm: Arm = "full"
        """Where blocks take over what they add, in the chunk under way."""

    def turn_to_next(self, arm: Arm) -> None:
        """The chunk under way is the one before from now on."""
        self.before, self.now, self._evaluation, self.arm = self.now, {}, -1, arm

    def begin(self, block: Block, x: Tensor, *given: Any) -> Any:
        """Stand in for `Block.begin`."""
        number = self._number[id(block)]
        self._evaluation += number == 0
        made = Block.begin(block, x, *given)
        keys, values = (t.unflatten(2, (-1, self._tokens)).clone() for t in made[1][1:])
        self.now[self._evaluation, number] = Seen(x[:, -NEW * self._tokens :].clone(), keys, values)
        return made

    def end(self, block: Block, *given: Any) -> Tensor:
        """Stand in for `Block.end`."""
        out, number = Block.end(block, *given), self._number[id(block)]
        seen, source = self.now[self._evaluation, number], self.source(self._evaluation, number)
        if source is not None and source.added is not None:
            out = torch.cat([out[:, : -seen.entered.shape[1]], seen.entered + source.added], 1)
        seen.added = out[:, -seen.entered.shape[1] :] - seen.entered
        return out

    def source(self, evaluation: int, block: int) -> Seen | None:
        """Where a block takes over what it adds; None where it computes that."""
        if self.arm == "full" or evaluation == self.last or block in (0, self.depth - 1):
            return None
        if self.arm == "chunk before":
            return self.before[evaluation, block]
        return self.now[0, block] if evaluation else None


@contextmanager
def watched(model: JointCourtyard) -> Iterator[Watch]:
    """Watch a model's network for a while."""
    network = model.network
    watch, before = Watch(network, model.token_grid[0] * model.token_grid[1], model.steps), (network.begin, network.end)
    network.begin, network.end = watch.begin, watch.end
    try:
        yield watch
    finally:
        network.begin, network.end = before
