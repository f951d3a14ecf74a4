"""Block-sparse attention in a chunk: settings, and the `Attend` that carries them out and says what it did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from worldstride.attention.cost import Decision, Rates, Shape, Way, decide
from worldstride.attention.dense import Attend, Attending
from worldstride.attention.layout import STYLES, Layout, Style, join, runs
from worldstride.attention.partial import Partial, merge
from worldstride.attention.preparation import KeyCache, prepare_queries
from worldstride.attention.selection import PARTS, BlockList, Selection, density, select
from worldstride.attention.sparse import attend_blocks, cannot, implementation
from worldstride.errors import InputError, integer_from, number_in

Pass = Literal["context", "chunk"]
"""Which pass attends: that which encodes the context, or an evaluation of the chunk."""


@dataclass(frozen=True)
class Sparsity:
    """Queries attend to some blocks of the context: the chunk's own tokens and text are always attended to."""

    tile: tuple[int, int, int] = (4, 8, 4)
    """Latents, rows and columns of a block, at most 128 tokens together."""
    layout: Style = "serpentine"
    """How blocks lie where the grid is no multiple of the tile; see `attention.layout`."""
    denoise: Selection | None = None
    """What the chunk's queries choose from the context; None attends to all of it."""
    context: Selection | None = None
    """What context latents choose from each other while they are encoded together, and new ones from those that were
    kept; None attends to all."""
    dense_layers: int = 1
    """First layers that attend to everything; published deployments keep one."""
    expect: float = 0.5
    """Share of the blocks that a rule by mass is taken to list when it is decided how to attend."""
    obey: bool = False
    """Attend sparsely even where dense attention is predicted to be as fast, or no kernel is there for it."""

    def __post_init__(self) -> None:
        if isinstance(self.tile, list):  # as JSON and TOML have it
            object.__setattr__(self, "tile", tuple(self.tile))
        if self.layout not in get_args(Style):
            raise InputError(f"sparsity.layout must be boxes or serpentine, got {self.layout!r}")
        STYLES[self.layout]((1, 1, 1), self.tile)  # says what is wrong with the tile
        integer_from("sparsity.dense_layers", self.dense_layers, 0)
        number_in("sparsity.expect", self.expect, 0, 1)
        if not isinstance(self.obey, bool):
            raise InputError(f"sparsity.obey must be true or false, got {self.obey!r}")
        for name in ("denoise", "context"):
            rule = getattr(self, name)
            if rule is not None and not isinstance(rule, Selection):
                raise InputError(f"sparsity.{name} must be a selection, got {rule!r}")
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
    """What computed sparse attention; "none" where none was sparse."""
    decisions: dict[str, Decision]
    """For each kind and size of attention what was decided, and from which prediction."""
    bytes: int
    """Bytes of the context's keys and values in blocks, beside those that the model holds."""
    note: str = ""
    """What else it cost."""


class SparseAttend(Attending):
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
                window, and of the chunk behind it; no block reaches from one into another.
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
        self._implementation, self._remark = "none", ""
        self._layers: dict[tuple[Pass, int], LayerAttend] = {}
        self._held = 0

    def at(self, layer: int, kind: Pass) -> LayerAttend:
        """Attention of one layer in one pass; the same object each time, since it keeps the context's blocks."""
        if (kind, layer) not in self._layers:
            rule = self.settings.denoise if kind == "chunk" else self.settings.context
            self._layers[kind, layer] = LayerAttend(self, kind, rule, layer >= self.settings.dense_layers)
        return self._layers[kind, layer]

    def report(self) -> SparsityReport:
        """What was done so far; waits for the device, once."""
        shares = [share for found in self._densities.values() for share, _ in found if isinstance(share, Tensor)]
        known = iter(torch.stack(shares).tolist() if shares else [])
        density = {}
        for kind, found in self._densities.items():
            pairs = [(next(known) if isinstance(share, Tensor) else share, n) for share, n in found]
            density[kind] = sum(share * n for share, n in pairs) / sum(n for _, n in pairs)
        calls = {way: n for way, n in self._calls.items() if n}
        held = self._held + sum(layer.bytes for layer in self._layers.values())
        return SparsityReport(calls, density, self._implementation, dict(self._decisions), held, self._remark)

    def let_go(self) -> None:
        """Free the context's blocks, when the chunk is done; what was done can still be told."""
        self._held += sum(layer.bytes for layer in self._layers.values())
        self._layers.clear()

    def layout(self, frames: int, device: torch.device) -> Layout:
        """Blocks of context latents, which lie within its segments."""
        return self._made((self._parts(frames), (), 0), device)

    def own(self, frames: int, device: torch.device, past: int = 0) -> Layout:
        """Blocks of a chunk's latents, always attended to; they are neighbours of the last of `past` latents."""
        return self._made(((), (frames,), 0), device, self._parts(past))

    def every(self, past: int, frames: int, rest: int, device: torch.device) -> Layout:
        """Blocks of the context's latents, then of the chunk's, then of tokens that lie on no grid."""
        return self._made((self._parts(past), (frames,) if frames else (), rest), device)

    def remark(self, text: str) -> None:
        """Something that the report is to say."""
        self._remark = text

    def _parts(self, past: int) -> tuple[int, ...]:
        """Latents of each part of a context of so many: the first segments, where they are as many together, or else
        the last, as where guidance leaves the memory out."""
        for segments, order in ((self.segments, 1), (self.segments[::-1], -1)):
            parts = [n for n, whole in zip(segments, accumulate(segments), strict=True) if whole <= past][::order]
            if sum(parts) == past:
                return tuple(parts)
        return (past,) if past else ()

    def _made(
        self, parts: tuple[tuple[int, ...], tuple[int, ...], int], device: torch.device, before: tuple[int, ...] = ()
    ) -> Layout:
        """Made on the host and sent to the device once: joining what is on a device would wait for it.

        Places on the grid count from the first latent, or go on behind parts that lie `before` it.
        """
        key = (parts, before, self.grid, self.settings.tile, self.settings.layout, str(device))
        if key not in self._layouts:
            make = STYLES[self.settings.layout]
            earlier, free, kept = (
                [make((n, *self.grid), self.settings.tile) for n in some] for some in (before, *parts[:2])
            )
            kept += [runs(parts[2])] if parts[2] else []
            made = join([*free, *(k.always() for k in kept)])
            if earlier:
                later = int(join(earlier).places[:, 0].max()) + 1
                made = replace(made, places=made.places + torch.tensor([later, 0, 0], dtype=torch.int32))
            self._layouts[key] = made.to(device)
        return self._layouts[key]

    def decided(self, kind: Pass, q: Tensor, queries: Layout, keys: Layout, kept: int, rule: Selection) -> Decision:
        """How to attend, decided once for each kind and size."""
        name = f"{kind}, {q.shape[0]} x {q.shape[1]} heads, {q.shape[2]} x {keys.tokens}"
        if name not in self._decisions:
            held = keys.blocks - keys.free
            chosen = rule.budget(keys.free) if rule.mass is None else self.settings.expect * keys.free
            shape = Shape(
                q.shape[0], q.shape[1], q.shape[3], q.shape[2], keys.tokens, kept, queries.blocks, keys.blocks, held,
                held + chosen,
            )  # fmt: skip
            lack, obey = cannot(q, "triton") if q.device.type == "cuda" else "", self.settings.obey
            rates = None if obey or lack else self.rates(q.shape[3])  # measuring takes a second
            self._decisions[name] = decide(shape, rates, lack, obey=obey)
        return self._decisions[name]

    def note(self, kind: Pass, way: Way, q: Tensor, keys: int, share: Tensor | float = 1.0) -> None:
        """Count one attention. A share may still be on its way on the device."""
        self._calls[way] += 1
        self._densities.setdefault(kind, []).append((share, q.shape[0] * q.shape[1] * q.shape[2] * keys))
        if way != "dense":
            self._implementation = implementation(q)

    def attended(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, lse: bool) -> Tensor | Partial:
        """Dense attention: what a model that knows no blocks gets."""
        return self.dense(q, k, v, bias=bias, lse=lse)  # type: ignore[call-overload]


class LayerAttend(Attending):
    """Attention of one layer in one pass of one chunk."""

    def __init__(self, owner: SparseAttend, kind: Pass, rule: Selection | None, sparse: bool) -> None:
        """`sparse` False attends densely everywhere, and so does a rule of None."""
        self._owner, self._rule, self._sparse = owner, rule, sparse
        self._kind: Pass = kind
        # the context that is in the cache, told by its very tensor: a batch whose worlds part gets new ones
        self._past: Tensor | None = None
        self._cache: KeyCache | None = None

    @property
    def bytes(self) -> int:
        """Bytes of the context in blocks."""
        return 0 if self._cache is None else self._cache.bytes

    def attended(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, lse: bool) -> Tensor | Partial:
        """Dense attention."""
        return self._owner.dense(q, k, v, bias=bias, lse=lse)  # type: ignore[call-overload]

    def within(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Latents of one pass attend to each other: q, k and v [B, H, N, E] in natural order -> [B, H, N, E].

        Sparse where they are context latents; a chunk's own are always attended to.
        """
        return self.joined(q, k, v, k.shape[2] if self._kind == "context" else 0, among=True)

    @overload
    def joined(
        self, q: Tensor, k: Tensor, v: Tensor, free: int, lse: Literal[False] = False, among: bool = False
    ) -> Tensor: ...

    @overload
    def joined(
        self, q: Tensor, k: Tensor, v: Tensor, free: int, lse: Literal[True], among: bool = False
    ) -> Partial: ...

    def joined(
        self, q: Tensor, k: Tensor, v: Tensor, free: int, lse: bool = False, among: bool = False
    ) -> Tensor | Partial:
        """New tokens attend to keys and values [B, H, Nk, E], of which `free` ones may be left out: the context's.

        These come first, in natural order; all others are attended to, in whatever order they lie. Blocks are not
        kept for a next call. With `among` they are the queries' own tokens, which attend to each other; without it new
        tokens stand behind them. Returns the output [B, H, Nq, E], with `lse` as a `Partial`.
        """
        rule, owner = self._rule, self._owner
        if rule is None or not self._sparse or not free:
            return self._densely(q, k, v, lse)
        tokens = owner.grid[0] * owner.grid[1]
        each, rest = free // tokens, k.shape[2] - free
        queries = owner.layout(each, q.device) if among else owner.own(q.shape[2] // tokens, q.device, each)
        keys = owner.every(each, 0, rest, q.device)
        way = owner.decided(self._kind, q, queries, keys, rest, rule).way
        if way == "dense":
            return self._densely(q, k, v, lse)
        guarded, spans = rule.guard is not None, [owner.layout(each, q.device)]
        if rest:
            spans.append(owner.every(0, 0, rest, q.device))
        cache = KeyCache(spans, q.shape[0], q.shape[1], q.shape[3], q.dtype, PARTS, guarded, keys)
        for i, some in enumerate((slice(free), slice(free, None))[: len(spans)]):
            cache.write(i, k[:, :, some], v[:, :, some])
        made = self._chosen(way, q, queries, cache, (k[:, :, free:], v[:, :, free:]), rule)
        return made if lse else made.out

    def chunk(self, q: Tensor, past: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]) -> Tensor:
        """New tokens attend to the context and to themselves: [B, H, Nq, E], all in natural order.

        Args:
            q: queries [B, H, Nq, E] of the chunk, or of new context latents, where the others were kept.
            past: keys and values [B, H, Np, E] of the context; put in blocks once for as long as they are the same.
            own: keys and values [B, H, Nq, E] of the new tokens.
        """
        rule, owner = self._rule, self._owner
        if rule is None or not self._sparse:
            return self._to_all(q, past, own)
        tokens = owner.grid[0] * owner.grid[1]
        before, made = past[0].shape[2] // tokens, q.shape[2] // tokens
        queries, keys = owner.own(made, q.device, before), owner.every(before, made, 0, q.device)
        way = owner.decided(self._kind, q, queries, keys, queries.tokens, rule).way
        if way == "dense":
            return self._to_all(q, past, own)
        if self._cache is None or self._past is not past[0]:
            spans = [owner.layout(before, q.device), queries]
            guarded = rule.guard is not None
            self._cache = KeyCache(spans, q.shape[0], q.shape[1], q.shape[3], q.dtype, PARTS, guarded, keys)
            self._cache.write(0, *past)
            self._past = past[0]
        self._cache.write(1, *own)
        return self._chosen(way, q, queries, self._cache, own, rule).out

    def _chosen(
        self, way: Way, q: Tensor, layout: Layout, cache: KeyCache, always: tuple[Tensor, Tensor], rule: Selection
    ) -> Partial:
        """Queries attend to blocks that the rule chooses and to those that the cache's layout keeps: `always`."""
        keys, kept = cache.layout, always[0].shape[2]
        blocks = prepare_queries(q, layout, alike=rule.guard is not None)
        listed = select(blocks.summary, cache.summary, layout, keys, rule)
        self._owner.note(self._kind, way, q, keys.tokens, _share(listed, layout, keys, kept, rule))
        if way == "sparse":
            return attend_blocks(blocks.x, cache.k, cache.v, listed, layout, keys)
        far = attend_blocks(blocks.x, cache.k, cache.v, without(listed, keys), layout, keys)
        return merge(far, self._owner.dense(q, *always, lse=True))

    def _to_all(self, q: Tensor, past: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]) -> Tensor:
        return self._densely(q, torch.cat([past[0], own[0]], 2), torch.cat([past[1], own[1]], 2), False)

    @overload
    def _densely(self, q: Tensor, k: Tensor, v: Tensor, lse: Literal[False]) -> Tensor: ...

    @overload
    def _densely(self, q: Tensor, k: Tensor, v: Tensor, lse: bool) -> Tensor | Partial: ...

    def _densely(self, q: Tensor, k: Tensor, v: Tensor, lse: bool) -> Tensor | Partial:
        if self._rule is not None:
            self._owner.note(self._kind, "dense", q, k.shape[2])
        return self.attended(q, k, v, None, lse)


def of_layer(attend: Attend, layer: int, kind: Pass) -> Attend:
    """How the tokens of one layer attend in one pass: a `LayerAttend`, if attention is sparse."""
    return attend.at(layer, kind) if isinstance(attend, SparseAttend) else attend


def _share(listed: BlockList, queries: Layout, keys: Layout, kept: int, rule: Selection) -> Tensor | float:
    """Density of a list, averaged over worlds and heads.

    Where all rows and blocks are as long as each other the host knows it, up to a span's last block.
    """
    if rule.mass is not None or rule.guard is not None or not keys.even:
        return density(listed, queries, keys).mean()
    return (kept + rule.budget(keys.free) * (keys.tokens - kept) / max(keys.free, 1)) / keys.tokens


def without(listed: BlockList, layout: Layout) -> BlockList:
    """The list without blocks that the layout keeps, which come last in it: those are attended to elsewhere."""
    free = listed.before(1) & ~layout.kept[listed.numbers()]
    order = (~free).int().sort(dim=-1, stable=True).indices
    counts = torch.stack([(free & listed.before(0)).sum(-1), free.sum(-1)], -1).int()
    return BlockList(listed.blocks.gather(-1, order), counts)
