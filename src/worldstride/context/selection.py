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
from worldstride.protocol import KINDS, ChunkShape, FillsSlots, Recalls


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
    """Places in the history bank that the chunk attends to, each in order of time; slots of a model that `FillsSlots`
    are in its own order, and may repeat."""

    sink: tuple[int, ...]
    memory: tuple[int, ...]
    window: tuple[int, ...]
    reason: str = "full compute"
    slots: tuple[int, ...] = ()
    """Of a model that `FillsSlots`: the slot that each latent of the memory is in; empty for others."""
    filled: int = 0
    """Slots that were filled, before those that hold the same latent were merged."""

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


def bounded(most: int, asked: int | None) -> int:
    """The model's own number, or fewer where a bound asks for fewer."""
    return most if asked is None else min(asked, most)


def spans(kept: int, shape: ChunkShape, window: int | None = None) -> tuple[int, int]:
    """Numbers of sink and recent latents among `kept` ones; between them lies what may be retrieved."""
    recent = min(bounded(shape.window, window), kept)
    return min(shape.sink, kept - recent), recent


@dataclass(frozen=True, eq=False)
class Lookup:
    """A chunk whose context is to be chosen."""

    history: History
    shape: ChunkShape
    coming: Tensor
    """Cameras of the chunk's frames [F, 4, 4]."""
    points: Tensor
    """Sample points of retrieval [P, 3]."""
    intrinsics: Tensor
    """Normalised [3, 3]."""
    window: int | None = None
    """Bound on recent latents; None keeps what full compute would."""
    memory: int | None = None
    """Bound on retrieved latents, likewise."""
    reason: str = "full compute"
    recall: Sequence[int] | None = None
    """Places between sink and window to bring back in place of those found by pose."""
    rule: Recalls | FillsSlots | None = None
    """What finds them by a rule of the model's own; None is greedy coverage."""
    merged: bool = False
    """Whether slots that hold the same latent become one."""

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Latents before the chunk; of them in the sink, recent and to be retrieved."""
        kept = len(self.history) - self.shape.clean
        sink, recent = spans(kept, self.shape, self.window)
        return kept, sink, recent, min(bounded(self.shape.memory, self.memory), kept - recent - sink)


def select(lookups: Sequence[Lookup]) -> list[tuple[ContextPlan, Signals]]:
    """Choose the context of several worlds' chunks, those with as many latents in one call.

    The re-imposed latents at the head of a chunk are part of the chunk, not of its context.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, one in enumerate(lookups):
        groups.setdefault((one.counts, one.shape, one.points.shape), []).append(i)
    out: dict[int, tuple[ContextPlan, Signals]] = {}
    for places in groups.values():
        out |= zip(places, _selected([lookups[i] for i in places]), strict=True)
    return [out[i] for i in range(len(lookups))]


_Found = tuple[Sequence[int], Sequence[float], float]
"""Places that are brought back, how much of the coming views each shows, and how much the newest latent does."""


def _selected(group: Sequence[Lookup]) -> list[tuple[ContextPlan, Signals]]:
    """Plans of worlds with equal counts."""
    kept, sink, recent, count = group[0].counts
    candidates = list(range(sink, kept - recent))
    if not count and (asked := next((one for one in group if one.recall), None)):
        bound = asked.shape.memory if asked.memory is None else asked.memory
        raise InputError(
            f"recall names {list(asked.recall or ())}, but this chunk brings nothing back: {len(candidates)} latents "
            f"lie between sink and window, and at most {bound} may be retrieved"
        )
    if not kept:
        found, speeds = list[_Found]([((), (), 0.0)] * len(group)), [(0.0, 0.0)] * len(group)
    else:
        last = torch.stack([one.history.cameras([kept - 1]) for one in group]).float()  # [B, 1, 4, 4]
        speeds = _speeds(last, [one.coming for one in group])
        if group[0].rule is None:
            found = _by_coverage(group, candidates)
        else:
            found = [_by_rule(one, one.rule, candidates) for one in group if one.rule is not None]
    made = list[tuple[ContextPlan, Signals]]()
    for one, (chosen, alike, newest), (metres, degrees) in zip(group, found, speeds, strict=True):
        stay, slots = _merged(one, chosen, alike)
        memory, shown, window = [chosen[i] for i in stay], [alike[i] for i in stay], range(kept - recent, kept)
        plan = ContextPlan(
            tuple(range(sink)), tuple(memory), tuple(window), one.reason, tuple(slots), len(chosen) if slots else 0
        )
        made.append((plan, Signals(tuple(shown), newest, len(candidates), metres=metres, degrees=degrees)))
    return made


def _merged(one: Lookup, memory: Sequence[int], alike: Sequence[float]) -> tuple[list[int], list[int]]:
    """Which of a memory's slots stay, and their numbers: of those that hold the same latent the one that shows most of
    its view, where they are to be merged. Without numbers where the memory has no slots."""
    stay = [*range(len(memory))]
    if not isinstance(one.rule, FillsSlots):
        return stay, []
    slots = one.rule.slots(len(memory))
    if one.merged:
        best = {place: max((i for i in stay if memory[i] == place), key=alike.__getitem__) for place in memory}
        stay = sorted(best.values())
    return stay, [slots[i] for i in stay]


def _by_coverage(group: Sequence[Lookup], candidates: Sequence[int]) -> list[_Found]:
    """What greedy coverage brings back to worlds with equal counts."""
    kept, sink, _, count = group[0].counts
    # one call over everything that a signal needs: candidates, then the window, whose last is the newest
    seen = list(range(sink if count else kept - 1, kept))
    cameras = torch.stack([one.history.cameras(seen) for one in group]).float()  # [B, N, 4, 4]
    ends = torch.stack([one.coming.cpu().float()[[0, -1]] for one in group])
    points, intrinsics = (torch.stack([t.cpu() for t in of]) for of in zip(
        *((one.points, one.intrinsics) for one in group), strict=True
    ))  # fmt: skip
    every = retrieval.coverage(ends, cameras, points, intrinsics)  # [B, N, S]
    newest = retrieval.similarity(every[:, -1:])[:, 0].tolist()
    if not count:
        return [((), (), value) for value in newest]
    weights, shown = every[:, : len(candidates)], every[:, len(candidates) :]
    valid = torch.ones(weights.shape[:2], dtype=torch.bool)
    picks = retrieval.greedy(retrieval.unseen(weights, shown), valid, count).sort(1).values
    for i, one in enumerate(group):
        if one.recall is not None:
            picks[i] = torch.tensor(_checked(one.recall, candidates, count), dtype=torch.long) - sink
    alike = retrieval.similarity(weights).gather(1, picks).tolist()
    return list(zip((picks + sink).tolist(), alike, newest, strict=True))


def _by_rule(one: Lookup, rule: Recalls | FillsSlots, candidates: Sequence[int]) -> _Found:
    """What the model's own rule brings back to a world."""
    kept, _, _, count = one.counts
    cameras, coming = one.history.cameras(slice(0, kept)), one.coming.cpu().float()[list(one.shape.latent_frames)]
    (newest,) = rule.shown(cameras[-1:], coming, one.points)
    if not count:
        return (), (), newest
    if one.recall is not None:
        slots = isinstance(rule, FillsSlots)
        chosen = _slots(one.recall, candidates, count) if slots else _checked(one.recall, candidates, count, fewer=True)
        return chosen, rule.shown(cameras[chosen], coming, one.points), newest
    if isinstance(rule, FillsSlots):
        shown = [one.history.entries[i].shown.cameras for i in candidates]
        places = [i for i, of in zip(candidates, shown, strict=True) for _ in of]
        return *rule.fill(torch.cat(shown).float(), places, coming, count), newest
    return *rule.recall(cameras, coming, one.points, candidates, count), newest


def _checked(recall: Sequence[int], candidates: Sequence[int], count: int, fewer: bool = False) -> list[int]:
    chosen, known = sorted(recall), set(candidates)
    right = len(chosen) <= count if fewer else len(chosen) == count
    if not right or len(set(chosen)) != len(chosen) or not known.issuperset(chosen):
        many = f"at most {count}" if fewer else f"{count}"
        raise InputError(
            f"recall must name {many} different places from {candidates[0]} to {candidates[-1]}, got {list(recall)}"
        )
    return chosen


def _slots(recall: Sequence[int], candidates: Sequence[int], count: int) -> list[int]:
    """A place for each slot, in the slots' order."""
    chosen = list(recall)
    if len(chosen) != count or not set(candidates).issuperset(chosen):
        raise InputError(f"recall must name {count} places from {candidates[0]} to {candidates[-1]}, got {chosen}")
    return chosen


def _speeds(last: Tensor, coming: Sequence[Tensor]) -> list[tuple[float, float]]:
    """Metres and degrees a frame from the newest remembered cameras [B, 1, 4, 4] along the coming ones [F, 4, 4]."""
    path = torch.cat([last, torch.stack([c.cpu().float() for c in coming])], 1)
    moved = path[:, :, :3, 3].diff(dim=1).norm(dim=-1).mean(1)
    cosine = ((path[:, :-1, :3, :3] * path[:, 1:, :3, :3]).sum((-1, -2)) - 1) / 2
    turned = torch.rad2deg(cosine.clamp(-1, 1).arccos()).mean(1)
    return list(zip(moved.tolist(), turned.tolist(), strict=True))
