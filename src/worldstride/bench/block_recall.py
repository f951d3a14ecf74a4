"""How much of the attention block selection finds: recall of exact attention mass, on a model's activations and on
structured data.

Recall is the share of a query's softmax over all keys that falls on keys of listed blocks; of the context alone it is
the share of what falls on the context. Compared with the best possible choice of as many blocks (by exact mass of a
block of queries) and with a random one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from worldstride.attention import attend
from worldstride.attention.dense import Attend, Attending
from worldstride.attention.layout import STYLES, Grid, Layout, Style, join
from worldstride.attention.partial import Partial
from worldstride.attention.selection import Selection, listed, select, summarise
from worldstride.bench.attention_cases import Case, structured
from worldstride.errors import ContractError, InputError

RULES: dict[str, Selection] = {
    "mean": Selection("mean"),
    "cosine": Selection("cosine"),
    "cosine, smoothed keys": Selection("cosine", smooth=True),
    "parts": Selection("parts"),
    "parts, smoothed keys": Selection("parts", smooth=True),
    "mass": Selection("mass"),
    "mean, guarded": Selection("mean", guard=0.05),
    "mass, guarded": Selection("mass", guard=0.05),
    "mass, neighbours first": Selection("mass", neighbours=1),
}
"""Rules that differ in how they score; shares are set by whoever measures. A guard here is the share of blocks of keys
that it lets through, since how alike tokens are depends on the model."""


@dataclass(frozen=True, eq=False)
class Sample:
    """Queries of a chunk and all keys, in natural order: what one attention of one layer sees."""

    name: str
    layer: int
    q: Tensor
    """[B, H, Nq, E]"""
    k: Tensor
    """[B, H, Np + Nq, E]: the context's keys, then the chunk's own."""
    grid: Grid
    """Latents, rows and columns of the queries' tokens."""
    segments: tuple[int, ...]
    """Latents of each part of the context."""


class Recorder(Attending):
    """An `Attend` that keeps the queries and keys of every attention to a context, and attends densely."""

    def __init__(self, inner: Attend = attend) -> None:
        self.inner, self.seen = inner, list[tuple[Tensor, Tensor]]()

    def attended(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, lse: bool) -> Tensor | Partial:
        """Dense attention, remembered where keys are not the queries' own."""
        if k.shape[2] > q.shape[2]:
            self.seen.append((q.detach(), k.detach()))
        return self.inner(q, k, v, bias=bias, lse=lse)  # type: ignore[call-overload]


def layouts(sample: Sample, tile: Grid, style: Style) -> tuple[Layout, Layout]:
    """Blocks of the queries, and of the context followed by the chunk's own."""
    make = STYLES[style]
    own = make(sample.grid, tile)
    history = [make((n, *sample.grid[1:]), tile) for n in sample.segments if n]
    device = sample.q.device
    return own.to(device), join([*history, own.always()]).to(device)


def masses(sample: Sample, queries: Layout, keys: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys in block order, and exact attention [B, H, Nq, Mk] of every query to every block."""
    past = keys.tokens - queries.tokens
    order = torch.cat([keys.order[:past], queries.order + past])
    q, k = sample.q[:, :, queries.order].float(), sample.k[:, :, order].float()
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    shape = (*weights.shape[:3], keys.blocks)
    return q, k, torch.zeros(shape, device=q.device).index_add_(3, keys.owner, weights)


def recalls(
    sample: Sample, tile: Grid, style: Style, keeps: Sequence[float], shares: Sequence[float],
    rules: Mapping[str, Selection],
) -> list[dict[str, Any]]:  # fmt: skip
    """Recall of every rule at every share of blocks kept, and at every share of mass asked for."""
    if not sum(sample.segments):
        raise InputError(f"{sample.name} attends to no context, of which blocks could be chosen")
    queries, keys = layouts(sample, tile, style)
    q, k, mass = masses(sample, queries, keys)
    q_summary, k_summary = (summarise(x, layout, alike=True) for x, layout in ((q, queries), (k, keys)))
    sizes, free = keys.sizes.float(), ~keys.kept
    if k_summary.alike is None:
        raise ContractError("a summary with likeness was asked for and has none")
    alike = k_summary.alike[..., free].flatten()
    guards = {n: None if r.guard is None else float(alike.quantile(r.guard)) for n, r in rules.items()}
    block_mass = torch.zeros(*mass.shape[:2], queries.blocks, keys.blocks, device=q.device)
    block_mass.index_add_(2, queries.owner, mass)
    found = list[dict[str, Any]]()

    def row(rule: str, asked: str, value: float, table: Tensor) -> None:
        seen = (mass * table[:, :, queries.owner]).sum(-1)  # [B, H, Nq]
        context = (mass * (table[:, :, queries.owner] & free)).sum(-1) / (mass * free).sum(-1).clamp_min(1e-9)
        weight = (mass * free).sum(-1)  # a query that hardly looks at the context hardly counts for it
        kept = (table & free).float() @ sizes / sizes[free].sum()
        density = (table.float() @ sizes).mean() / sizes.sum()
        found.append(
            {
                "sample": sample.name, "layer": sample.layer, "tile": list(tile), "layout": style, "rule": rule,
                asked: value, "kept": float(kept.mean()), "density": float(density),
                "recall": float(seen.mean()), "context_recall": float((context * weight).sum() / weight.sum()),
                "context_mass": float(weight.mean()),
            }
        )  # fmt: skip

    for keep in keeps:
        count = Selection(keep=keep).budget(keys.free)
        for name, rule in rules.items():
            chosen = select(
                q_summary, k_summary, queries, keys, replace(rule, keep=keep, mass=None, guard=guards[name])
            )
            row(name, "keep", keep, chosen.table())
        random = torch.rand(block_mass.shape, generator=torch.Generator().manual_seed(0)).to(q.device)
        for name, score in (("best possible", block_mass), ("random", random)):
            rank = score.masked_fill(keys.kept, -1).argsort(-1, descending=True).argsort(-1)
            row(name, "keep", keep, listed((rank < count) | keys.kept, keys).table())
    for share in shares:
        for name, rule in rules.items():
            if rule.score != "cosine":
                chosen = select(q_summary, k_summary, queries, keys, replace(rule, mass=share, guard=guards[name]))
                row(name, "mass", share, chosen.table())
    return found


def averaged(rows: Iterable[Mapping[str, Any]], by: Sequence[str]) -> list[dict[str, Any]]:
    """Means of all figures over rows that agree in `by`."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for r in rows:
        groups.setdefault(tuple(str(r.get(name)) for name in by), []).append(r)
    figures = ("kept", "density", "recall", "context_recall", "context_mass")
    return [
        {**{n: g[0].get(n) for n in by}, "samples": len(g), **{n: sum(r[n] for r in g) / len(g) for n in figures}}
        for g in groups.values()
    ]


def structured_sample(case: Case, heads: int, device: torch.device) -> Sample:
    """Structured queries and keys of a case, some heads, in natural order."""
    later = case.history[0]
    q, own = structured(case.queries, heads, case.channels, 1, later, 1, device)
    old = structured(case.history, heads, case.channels, 1, 0, 1, device)[1]
    return Sample(f"structured, {case.name}", 0, q, torch.cat([old, own], 2), case.queries, (case.history[0],))
