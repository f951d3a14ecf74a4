"""Block-sparse attention in a chunk: settings, and the `Attend` that carries them out and says what it did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from worldstride.attention.cost import Decision, Rates, Shape, Way, decide
from worldstride.attention.dense import Attend
from worldstride.attention.layout import Grid, Layout, boxes, join, serpentine
from worldstride.attention.partial import Partial, merge
from worldstride.attention.preparation import KeyCache, prepare_queries
from worldstride.attention.selection import PARTS, BlockList, Selection, density, select
from worldstride.attention.sparse import attend_blocks, implementation
from worldstride.errors import InputError, integer_from

_LAYOUTS = {"boxes": boxes, "serpentine": serpentine}


@dataclass(frozen=True)
class Sparsity:
    """Queries attend to some blocks of the context: the chunk's own tokens and text are always attended to."""

    tile: tuple[int, int, int] = (4, 8, 4)
    """Latents, rows and columns of a block, at most 128 tokens together."""
    layout: Literal["boxes", "serpentine"] = "serpentine"
    """How blocks lie where the grid is no multiple of the tile; see `attention.layout`."""
    denoise: Selection | None = None
    """What the chunk's queries choose from the context; None attends to all of it."""
    context: Selection | None = None
    """What context latents choose from each other while they are encoded; None attends to all."""
    dense_layers: int = 1
    """First layers that attend to everything; published deployments keep one."""
    obey: bool = False
    """Attend sparsely even where dense attention is predicted to be as fast."""

    def __post_init__(self) -> None:
        if isinstance(self.tile, list):  # as JSON and TOML have it
            object.__setattr__(self, "tile", tuple(self.tile))
        if self.layout not in _LAYOUTS:
            raise InputError(f"sparsity.layout must be boxes or serpentine, got {self.layout!r}")
        _LAYOUTS[self.layout]((1, 1, 1), self.tile)  # says what is wrong with the tile
        integer_from("sparsity.dense_layers", self.dense_layers, 0)
        if self.denoise is None and self.context is None:
            raise InputError("sparsity needs denoise, context or both; with neither everything is attended to")


@dataclass(frozen=True)
class SparsityReport:
    """What block-sparse attention did in a chunk."""

    calls: dict[str, int]
    """How many attentions went each way: dense, sparse, hybrid."""
    density: dict[str, float]
    """Share of query-key pairs attended to in all layers: "chunk" of a chunk's queries, "context" of the context's;
    each where a rule was given."""
    implementation: str
    """What computed sparse attention."""
    decisions: dict[str, Decision]
    """For each kind and size of attention what was decided, and from which prediction."""


class SparseAttend:
    """Sparse attention of one chunk. Models that know it ask `at` for a layer's; dense attention is what it was."""

    def __init__(
        self, dense: Attend, settings: Sparsity, grid: tuple[int, int], segments: Sequence[int],
        rates: Callable[[int], Rates | None] = lambda _: None, layouts: dict[object, Layout] | None = None,
    ) -> None:  # fmt: skip
        """Nothing is computed yet.

        Args:
            dense: what attends densely.
            settings: what is asked for.
            grid: rows and columns of a latent's tokens.
            segments: latents of each part of the context in the order of the model's tokens, such as memory and
                window; no block reaches from one into another.
            rates: what attention costs on the device for heads of so many channels; where it gives None, what was
                asked for is done.
            layouts: layouts made before, and what this one makes: for the owner to hand on.
        """
        self.dense, self.settings, self.grid, self.rates = dense, settings, grid, rates
        self.segments = tuple(n for n in segments if n)
        self._layouts = {} if layouts is None else layouts
        self._decisions: dict[str, Decision] = {}
        self._calls: dict[Way, int] = {"dense": 0, "sparse": 0, "hybrid": 0}
        self._densities: dict[str, list[tuple[Tensor | float, int]]] = {}
        self._implementation = "none"
        self._layers: dict[int, LayerAttend] = {}

    def at(self, layer: int) -> LayerAttend:
        """Attention of one layer; the same object each time, since it keeps the context's blocks."""
        if layer not in self._layers:
            self._layers[layer] = LayerAttend(self, layer >= self.settings.dense_layers)
        return self._layers[layer]

    def report(self) -> SparsityReport:
        """What was done so far; waits for the device."""
        density = {
            kind: sum(float(share) * n for share, n in found) / sum(n for _, n in found)
            for kind, found in self._densities.items()
        }
        calls = {way: n for way, n in self._calls.items() if n}
        return SparsityReport(calls, density, self._implementation, dict(self._decisions))

    def layout(self, frames: int, device: torch.device, kept: bool = False) -> Layout:
        """Blocks of some latents; the context's lie within its segments."""
        parts = self.segments if not kept and sum(self.segments) == frames else (frames,)
        key = (parts, self.grid, self.settings.tile, self.settings.layout, str(device), kept)
        if key not in self._layouts:
            made = join([_LAYOUTS[self.settings.layout](self._span(n), self.settings.tile) for n in parts])
            self._layouts[key] = (made.always() if kept else made).to(device)
        return self._layouts[key]

    def joined(self, history: Layout, own: Layout) -> Layout:
        """The context's blocks and then the chunk's."""
        key = (id(history), id(own))
        if key not in self._layouts:
            self._layouts[key] = join([history, own])
        return self._layouts[key]

    def decided(self, kind: str, q: Tensor, queries: Layout, keys: Layout, kept: int, rule: Selection) -> Decision:
        """How to attend, decided once for each kind and size."""
        name = f"{kind}, {q.shape[2]} x {keys.tokens}"
        if name not in self._decisions:
            listed = keys.blocks - keys.free + (rule.budget(keys.free) if rule.mass is None else keys.free / 2)
            shape = Shape(
                q.shape[0], q.shape[1], q.shape[3], q.shape[2], keys.tokens, kept, queries.blocks,
                keys.blocks - keys.free, listed,
            )  # fmt: skip
            self._decisions[name] = decide(shape, None if self.settings.obey else self.rates(q.shape[3]))
        return self._decisions[name]

    def note(self, kind: str, way: Way, q: Tensor, keys: int, share: Tensor | float = 1.0) -> None:
        """Count one attention."""
        self._calls[way] += 1
        self._densities.setdefault(kind, []).append((share, q.shape[0] * q.shape[1] * q.shape[2] * keys))
        if way != "dense":
            self._implementation = implementation(q)

    def _span(self, frames: int) -> Grid:
        return (frames, *self.grid)

    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, lse: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, lse: Literal[True]
    ) -> Partial: ...

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, lse: bool = False
    ) -> Tensor | Partial:
        """Dense attention: what a model that knows no blocks gets."""
        return self.dense(q, k, v, bias=bias, lse=lse)  # type: ignore[call-overload]


class LayerAttend:
    """Attention of one layer in one chunk."""

    def __init__(self, owner: SparseAttend, sparse: bool) -> None:
        """`sparse` False attends densely everywhere."""
        self._owner, self._sparse = owner, sparse
        self._past: tuple[Tensor, Tensor] | None = None
        self._cache: KeyCache | None = None

    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, lse: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, lse: Literal[True]
    ) -> Partial: ...

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, lse: bool = False
    ) -> Tensor | Partial:
        """Dense attention."""
        return self._owner.dense(q, k, v, bias=bias, lse=lse)  # type: ignore[call-overload]

    def within(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Context latents attend to each other: q, k and v [B, H, N, E] in natural order -> [B, H, N, E]."""
        rule, owner = self._owner.settings.context, self._owner
        if rule is None:
            return owner.dense(q, k, v)
        if not self._sparse:
            owner.note("context", "dense", q, k.shape[2])
            return owner.dense(q, k, v)
        layout = owner.layout(q.shape[2] // (owner.grid[0] * owner.grid[1]), q.device)
        decision = owner.decided("context", q, layout, layout, 0, rule)
        if decision.way == "dense":
            owner.note("context", "dense", q, k.shape[2])
            return owner.dense(q, k, v)
        guarded = rule.guard is not None
        cache = KeyCache([layout], k.shape[0], k.shape[1], k.shape[3], k.dtype, alike=guarded, joined=layout)
        cache.write(0, k, v)
        queries = prepare_queries(q, layout, alike=guarded)
        listed = select(queries.summary, cache.summary, layout, layout, rule)
        owner.note("context", "sparse", q, k.shape[2], density(listed, layout, layout).mean())
        return attend_blocks(queries.x, cache.k, cache.v, listed, layout, layout).out

    def chunk(self, q: Tensor, past: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]) -> Tensor:
        """A chunk's tokens attend to the context and to themselves: [B, H, Nq, E], all in natural order.

        Args:
            q: queries [B, H, Nq, E] of the chunk.
            past: keys and values [B, H, Np, E] of the context; put in blocks once for as long as they are the same.
            own: keys and values [B, H, Nq, E] of the chunk.
        """
        rule, owner = self._owner.settings.denoise, self._owner
        if rule is None:
            return self._dense(q, past, own)
        if not self._sparse:
            owner.note("chunk", "dense", q, past[0].shape[2] + own[0].shape[2])
            return self._dense(q, past, own)
        tokens, guarded = owner.grid[0] * owner.grid[1], rule.guard is not None
        queries = owner.layout(q.shape[2] // tokens, q.device, kept=True)
        history = owner.layout(past[0].shape[2] // tokens, q.device)
        if self._cache is None or self._past is None or self._past[0] is not past[0]:
            joined = owner.joined(history, queries)
            self._cache = KeyCache(
                [history, queries], q.shape[0], q.shape[1], q.shape[3], q.dtype, PARTS, guarded, joined
            )
            self._cache.write(0, *past)
            self._past = past
        cache, keys = self._cache, self._cache.layout
        decision = owner.decided("chunk", q, queries, keys, queries.tokens, rule)
        if decision.way == "dense":
            owner.note("chunk", "dense", q, keys.tokens)
            return self._dense(q, past, own)
        cache.write(1, *own)
        blocks = prepare_queries(q, queries, alike=guarded)
        listed = select(blocks.summary, cache.summary, queries, keys, rule)
        owner.note("chunk", decision.way, q, keys.tokens, density(listed, queries, keys).mean())
        if decision.way == "sparse":
            return attend_blocks(blocks.x, cache.k, cache.v, listed, queries, keys).out
        far = attend_blocks(blocks.x, cache.k, cache.v, without(listed, keys), queries, keys)
        return merge(far, owner.dense(q, *own, lse=True)).out

    def _dense(self, q: Tensor, past: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]) -> Tensor:
        return self._owner.dense(q, *(torch.cat([old, new], 2) for old, new in zip(past, own, strict=True)))


def without(listed: BlockList, layout: Layout) -> BlockList:
    """The list without blocks that the layout keeps, which come last in it: those are attended to elsewhere."""
    held = layout.kept[listed.blocks.long().clamp(0, layout.blocks - 1)]
    there = torch.arange(layout.blocks, device=held.device) < listed.counts[..., 1:]
    full = torch.arange(layout.blocks, device=held.device) < listed.counts[..., :1]
    order = (held | ~there).int().sort(dim=-1, stable=True).indices
    free = there & ~held
    counts = torch.stack([(free & full).sum(-1), free.sum(-1)], -1).int()
    return BlockList(listed.blocks.gather(-1, order), counts)
