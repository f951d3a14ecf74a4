"""The decision what a chunk remembers: sink, retrieved memory and recent window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worldstride.context import retrieval
from worldstride.context.gate import PoseScores
from worldstride.context.history import History
from worldstride.errors import InputError
from worldstride.protocol import KINDS, ChunkShape


@dataclass(frozen=True)
class Signals:
    """What is known before a chunk, in plain numbers."""

    similarity: tuple[float, ...]
    """Pose similarity of the coming views to each retrieved latent, in [0, 1], in order of time."""
    newest: float
    """Pose similarity to the newest latent."""
    candidates: int
    """Latents that could have been retrieved."""
    change: float | None = None
    """Mean squared change between the last two finished chunks; None where no policy asked."""
    dynamics: float | None = None
    """Its moving average."""
    pose: PoseScores | None = None
    """Scores from cameras; None where no policy asked."""
    metres: float = 0.0
    """Speed of the coming cameras, metres a frame."""
    degrees: float = 0.0
    """Turning speed of the coming cameras, degrees a frame."""


@dataclass(frozen=True)
class ContextPlan:
    """Places in the history bank that the chunk attends to, each in order of time."""

    sink: tuple[int, ...]
    memory: tuple[int, ...]
    window: tuple[int, ...]
    reason: str = "full compute"

    @property
    def rows(self) -> list[int]:
        """All places: sink, memory, window."""
        return [*self.sink, *self.memory, *self.window]

    def tables(self, clean: int = 0) -> tuple[Tensor, Tensor]:
        """Ranks and kinds [N] of the rows: the window ends just before the chunk, memory and sink lie before it.

        A chunk's first new latent has rank 0 and its `clean` re-imposed ones lie before that, so the window ends at
        rank -1 - clean.
        """
        count = len(self.rows)
        kinds = [KINDS.index("sink")] * len(self.sink) + [KINDS.index("memory")] * len(self.memory)
        return torch.arange(-count, 0) - clean, torch.tensor(kinds + [KINDS.index("recent")] * len(self.window))


def spans(kept: int, shape: ChunkShape, window: int | None = None) -> tuple[int, int]:
    """Numbers of sink and recent latents among `kept` ones; between them lies what may be retrieved."""
    recent = min(shape.window if window is None else min(window, shape.window), kept)
    return min(shape.sink, kept - recent), recent


def select(
    history: History, shape: ChunkShape, coming: Tensor, points: Tensor, intrinsics: Tensor,
    window: int | None = None, memory: int | None = None, reason: str = "full compute",
    recall: Sequence[int] | None = None,
) -> tuple[ContextPlan, Signals]:  # fmt: skip
    """Plan a chunk with cameras coming [F, 4, 4]; `window` and `memory` reduce what full compute would keep.

    The re-imposed latents at the head of the chunk are part of the chunk, not of its context. `recall` names places
    between sink and window to bring back in place of those found by pose.
    """
    kept = len(history) - shape.clean
    sink, recent = spans(kept, shape, window)
    wanted = shape.memory if memory is None else min(memory, shape.memory)
    candidates = list(range(sink, kept - recent))
    count = min(wanted, len(candidates))
    chosen: list[int] = []
    similarity: tuple[float, ...] = ()
    newest = 0.0
    if kept:
        # one call over everything that a signal needs: candidates, then the window, whose last is the newest
        seen = list(range(sink if count else kept - 1, kept))
        queries = coming.cpu().float()[[0, -1]]
        every = retrieval.coverage(queries[None], history.cameras(seen)[None].float(), points, intrinsics)  # [1, N, S]
        newest = float(retrieval.similarity(every)[0, -1])
        if count:
            weights, shown = every[:, : len(candidates)], every[:, len(candidates) :]
            valid = torch.ones(1, len(candidates), dtype=torch.bool)
            picks = retrieval.greedy(retrieval.unseen(weights, shown), valid, count)[0].sort().values
            if recall is not None:
                picks = torch.tensor(_checked(recall, candidates, count), dtype=torch.long) - sink
            chosen = [candidates[i] for i in picks.tolist()]
            similarity = tuple(retrieval.similarity(weights)[0][picks].tolist())
    plan = ContextPlan(tuple(range(sink)), tuple(chosen), tuple(range(kept - recent, kept)), reason)
    metres, degrees = _speed(history.cameras([kept - 1]), coming) if kept else (0.0, 0.0)
    return plan, Signals(similarity, newest, len(candidates), metres=metres, degrees=degrees)


def _checked(recall: Sequence[int], candidates: Sequence[int], count: int) -> list[int]:
    chosen, known = sorted(recall), set(candidates)
    if len(chosen) != count or len(set(chosen)) != count or not known.issuperset(chosen):
        raise InputError(
            f"recall must name {count} different places from {candidates[0]} to {candidates[-1]}, got {list(recall)}"
        )
    return chosen


def _speed(last: Tensor, coming: Tensor) -> tuple[float, float]:
    """Metres and degrees a frame from the newest remembered camera [1, 4, 4] along the coming ones [F, 4, 4]."""
    path = torch.cat([last.float(), coming.cpu().float()])
    moved = path[:, :3, 3].diff(dim=0).norm(dim=-1).mean()
    cosine = ((path[:-1, :3, :3] * path[1:, :3, :3]).sum((-1, -2)) - 1) / 2
    return float(moved), float(torch.rad2deg(cosine.clamp(-1, 1).arccos()).mean())
