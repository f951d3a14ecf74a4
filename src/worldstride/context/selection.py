"""The decision what a chunk remembers: sink, retrieved memory and recent window."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from worldstride.context import retrieval
from worldstride.context.history import History
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
    old_clip: float | None = None
    """Pose similarity of the best old clip; None where no policy asked or there is none."""
    newest_clip: float | None = None
    """Pose similarity of the newest clip; None where no policy asked."""
    added: float | None = None
    """Share of the coming views that old latents saw and the window did not; None as for `old_clip`."""


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
) -> tuple[ContextPlan, Signals]:  # fmt: skip
    """Plan a chunk with cameras coming [F, 4, 4]; `window` and `memory` reduce what full compute would keep.

    The re-imposed latents at the head of the chunk are part of the chunk, not of its context.
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
            chosen = [candidates[i] for i in picks.tolist()]
            similarity = tuple(retrieval.similarity(weights)[0][picks].tolist())
    plan = ContextPlan(tuple(range(sink)), tuple(chosen), tuple(range(kept - recent, kept)), reason)
    return plan, Signals(similarity, newest, len(candidates))
