"""Context that is not rebuilt from nothing: keys and values of remembered latents are kept from chunk to chunk.

Only latents of which nothing is kept are encoded; ranks and kinds are given anew by the model (for rotary positions a
rotation of the temporal channels). Where latents see each other, a kept one holds what it saw when it was encoded and
not what it would see now, so keeping it is approximate. Where each sees only itself, keeping it is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from worldstride.attention import Attend
from worldstride.context.history import History
from worldstride.context.selection import ContextPlan
from worldstride.errors import InputError, integer_from, number_in
from worldstride.protocol import KINDS, Context, KeepsLatents, Recalled

Sees = Literal["all", "before", "itself"]


@dataclass(frozen=True)
class KeptContext:
    """Encode what is new and keep the rest."""

    incremental: bool = True
    """Keep keys and values from chunk to chunk; otherwise the whole context is encoded for every chunk, and `sees` is
    all that matters."""
    sees: Sees = "all"
    """What latents see when they are encoded: "all", everything in the context; "before", what precedes their own
    chunk, and that (chunk-causal); "itself", nothing else. The less, the cheaper, and the less goes stale; how much a
    model loses depends on what it was trained with."""
    refresh: int | None = None
    """Chunks after which the whole context is encoded anew; None never does. Lower it where quality drifts."""
    anew: float | None = None
    """Least share of the coming views, in [0, 1], that memory adds to the window at which the whole context is encoded
    anew: on a revisit old and new then see each other, while exploring nobody misses it. None never does; lower is
    safer and slower."""
    limit: int = 256
    """Latents whose keys and values are kept, those used last; more cost memory, fewer cost encoding."""

    def __post_init__(self) -> None:
        integer_from("acceleration.kept.limit", self.limit, 1)
        if self.refresh is not None:
            integer_from("acceleration.kept.refresh", self.refresh, 1)
        if self.anew is not None:
            number_in("acceleration.kept.anew", self.anew, 0, 1)
            if self.sees == "itself":
                raise InputError(
                    "acceleration.kept.anew changes nothing where latents see only themselves; leave it out"
                )
        if not isinstance(self.incremental, bool):
            raise InputError(f"acceleration.kept.incremental must be true or false, got {self.incremental!r}")
        if self.sees not in get_args(Sees):
            raise InputError(f"acceleration.kept.sees must be one of {', '.join(get_args(Sees))}, got {self.sees!r}")


@dataclass(frozen=True, eq=False)
class KeptLatents:
    """What a session keeps of its latents; entries are never written to, so that forks share them."""

    records: Mapping[int, Tensor] = field(default_factory=dict)
    """Number of a latent in its world -> what the model keeps of it, least recently used first."""
    age: int = 0
    """Chunks since the whole context was encoded."""
    sees: Sees = "all"
    """What the latents saw; what is kept under one setting is of no use under another."""

    @property
    def bytes(self) -> int:
        """Bytes that all records hold."""
        return sum({_storage(t): t.untyped_storage().nbytes() for t in self.records.values()}.values())

    def absent(
        self, settings: KeptContext, history: History, plan: ContextPlan, added: float | None = None
    ) -> tuple[int, ...]:
        """Which of the plan's rows (by place in `plan.rows`) have to be encoded; memory adds `added` to the window."""
        rows = plan.rows
        stale = self.sees != settings.sees or (settings.refresh is not None and self.age >= settings.refresh)
        revisit = settings.anew is not None and added is not None and added >= settings.anew
        if not settings.incremental or stale or revisit:
            return tuple(range(len(rows)))
        return tuple(i for i, row in enumerate(rows) if history.entries[row].index not in self.records)

    def used(
        self, settings: KeptContext, numbers: Sequence[int], records: Sequence[Tensor], whole: bool
    ) -> KeptLatents:
        """After a chunk whose context was latents `numbers` with `records`; `whole` if all of them are new."""
        if not settings.incremental:
            return self
        fresh = dict(zip(numbers, records, strict=True))
        old = self.records if self.sees == settings.sees else {}
        order = {**{k: v for k, v in old.items() if k not in fresh}, **fresh}
        newest = dict(list(order.items())[-max(settings.limit, len(fresh)) :])
        # latents of a chunk share their memory, which what goes must not leave with what stays
        if going := {_storage(t) for k, t in old.items() if newest.get(k) is not t}:
            newest = {k: t.clone() if _storage(t) in going else t for k, t in newest.items()}
        return KeptLatents(newest, 1 if whole else self.age + 1, settings.sees)


def encode_kept(
    model: KeepsLatents, recalled: Recalled, kept: Sequence[Sequence[Tensor | None]], sees: Sees, clip: int,
    attend: Attend,
) -> tuple[Context, Tensor | None]:  # fmt: skip
    """Context of N latents of B worlds, and what is to be kept of those that were encoded [B, A, ...]; None of none.

    Args:
        model: the model that keeps latents.
        recalled: all of them, but that its latents are those that have to be encoded alone [B, A, ...], in order.
        kept: for each latent what is kept of it in each world, or None in all worlds.
        sees: what latents see.
        clip: latents of a chunk, encoded together where they see what is before them.
        attend: how tokens attend.
    """
    records = [None if one[0] is None else _stack([r for r in one if r is not None]) for one in kept]
    absent = [i for i, record in enumerate(records) if record is None]
    latents, recent = recalled.latents, int((recalled.kinds == KINDS.index("recent")).sum())
    groups = clips(absent, len(kept), recent, clip) if sees == "before" else [absent] * bool(absent)
    done, fresh = 0, list[Tensor]()
    for group in groups:
        part, done = recalled.part(group, latents[:, done : done + len(group)]), done + len(group)
        if sees == "itself":
            made = _alone(model, part, attend)
        else:
            seen = [i for i, r in enumerate(records) if r is not None and (sees == "all" or i < group[0])]
            some = [r for i in seen if (r := records[i]) is not None]
            past = model.join_context(some, recalled.part(seen, latents[:, :0])) if seen else None
            made = model.encode_latents(part, past, attend)
            past = None  # gigabytes that the whole context can use
        fresh.append(made)
        for i, record in zip(group, made.unbind(1), strict=True):
            records[i] = record
    every = [r for r in records if r is not None]
    context = model.join_context(every, recalled)
    return context, torch.cat(fresh, 1) if len(fresh) > 1 else fresh[0] if fresh else None


def clips(absent: Sequence[int], count: int, recent: int, clip: int) -> list[list[int]]:
    """Places to encode out of `count`, those of one chunk together: the last `recent` are cut from their end."""
    groups: dict[tuple[bool, int], list[int]] = {}
    for i in absent:
        late = i >= count - recent
        key = (late, -((count - 1 - i) // clip) if late else i // clip)
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def _alone(model: KeepsLatents, recalled: Recalled, attend: Attend) -> Tensor:
    """What is kept of latents [B, A, ...] that see only themselves, all as worlds of their own: [B, A, ...]."""
    lead = recalled.latents.shape[:2]
    if recalled.led and len({*recalled.led}) > 1:  # worlds of a batch share what led to their latents
        parts = [recalled.part([i], recalled.latents[:, i : i + 1]) for i in range(lead[1])]
        return torch.cat([_alone(model, part, attend) for part in parts], 1)
    # each is a whole context: the same place in it whatever the window, for a model may rank latents from its start
    each = replace(
        recalled, latents=recalled.latents.flatten(0, 1)[:, None], cameras=recalled.cameras.flatten(0, 1)[:, None],
        positions=torch.tensor([-1]), kinds=torch.tensor([0]), led=recalled.led[:1], whole=1,
    )  # fmt: skip
    return model.encode_latents(each, None, attend)[:, 0].unflatten(0, lead)


def _storage(record: Tensor) -> int:
    return record.untyped_storage().data_ptr()


def _stack(records: Sequence[Tensor]) -> Tensor:
    """[B, ...]; as flat tensors, because a GPU copies those of many dimensions one by one."""
    if len(records) == 1:
        return records[0][None]
    return torch.stack([r.reshape(-1) for r in records]).view(-1, *records[0].shape)
