"""Time of block-sparse attention against dense attention, side by side in one run on a GPU."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from worldstride.attention.choice import Dense
from worldstride.attention.cost import Rates, Shape, decide
from worldstride.attention.layout import Layout, Style
from worldstride.attention.partial import Partial, merge
from worldstride.attention.preparation import Blocks, KeyCache, Preparation, prepare_queries, turning
from worldstride.attention.selection import BlockList, Selection, density, listed, select
from worldstride.attention.sparse import Implementation, attend_blocks, cannot
from worldstride.attention.sparsity import without
from worldstride.bench import published
from worldstride.bench.attention_cases import Case, structured
from worldstride.errors import InputError

Run = Callable[[], object]


@dataclass(frozen=True, eq=False)
class Prepared:
    """A case with its data on the device."""

    case: Case
    queries: Layout
    spans: list[Layout]
    raw: dict[str, Tensor]
    """Queries, keys and values [B, H, N, E] in natural order, as projections leave them."""
    how: dict[str, Preparation]
    """Norm and rotary angles of the queries ("q") and of each span's keys (its number)."""
    ready: Blocks
    cache: KeyCache
    turned: Callable[[Tensor], Tensor]
    """Norm and rotation of the queries, in natural order, compiled by torch: what a dense model does, too."""

    @property
    def newest(self) -> int:
        """The span that every solver step writes anew: the chunk's own, or else the whole sequence."""
        return 0 if self.case.current is None else 1

    def span(self, i: int) -> tuple[Tensor, Tensor]:
        """Keys and values of span i, in natural order."""
        at = sum(s.tokens for s in self.spans[:i])
        part = slice(at, at + self.spans[i].tokens)
        return self.raw["k"][:, :, part], self.raw["v"][:, :, part]

    def write(self, i: int) -> None:
        """Prepare the keys and values of span i."""
        self.cache.write(i, *self.span(i), self.how[str(i)])

    def prepare(self, rule: Selection) -> Blocks:
        """Prepare the queries."""
        return prepare_queries(self.raw["q"], self.queries, self.how["q"], alike=rule.guard is not None)

    def choose(self, queries: Blocks, rule: Selection) -> BlockList:
        """Blocks for prepared queries."""
        return select(queries.summary, self.cache.summary, self.queries, self.cache.layout, rule)

    def attend(self, queries: Blocks, blocks: BlockList, how: Implementation) -> Partial:
        """Attention to listed blocks."""
        cache = self.cache
        return attend_blocks(queries.x, cache.k, cache.v, blocks, self.queries, cache.layout, using=how)

    def step(self, rule: Selection, how: Implementation) -> Run:
        """All that one solver step does in one layer: prepare its tokens, choose, attend."""

        def run() -> object:
            queries = self.prepare(rule)
            self.write(self.newest)
            return self.attend(queries, self.choose(queries, rule), how)

        return run


def milliseconds(runs: Mapping[str, Run], rounds: int) -> dict[str, float]:
    """Median device time of each as a CUDA graph, so that launching from Python is not what is measured.

    They take turns, in another order each round, so that what the machine does to one it does to all: a long kernel
    leaves it hotter than a short one.
    """
    graphs = dict[str, torch.cuda.CUDAGraph]()
    for name, run in runs.items():
        for _ in range(2):  # compiles kernels, builds plans
            run()
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            run()
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
    shuffled, order = random.Random(0), list(graphs)
    for _ in range(rounds + 1):  # the first round warms up
        shuffled.shuffle(order)
        for name in order:
            graph = graphs[name]
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            marks[name].append((begin, end))
    torch.cuda.synchronize()
    times = {name: sorted(a.elapsed_time(b) for a, b in pairs[1:]) for name, pairs in marks.items()}
    return {name: taken[len(taken) // 2] for name, taken in times.items()}


def prepared(case: Case, style: Style, device: torch.device, dtype: torch.dtype) -> Prepared:
    """Data of a case: structured queries and keys, random values; norms and rotary angles at their full cost."""
    queries, spans = case.layouts(style)
    queries, spans = queries.to(device), [s.to(device) for s in spans]
    sizes = (case.heads, case.channels, 1)
    later = 0 if case.current is None else case.history[0]
    q, own = structured(case.queries, *sizes, later, case.batch, device)
    keys = [structured(case.history, *sizes, 0, case.batch, device)[1]]
    if case.current is not None:
        keys.append(own)
    if case.text:
        keys.append(torch.randn(case.batch, case.heads, case.text, case.channels, device=device))

    def laid(x: Tensor) -> Tensor:  # [B, N, H, E] in memory, as a linear layer leaves it
        return x.transpose(1, 2).to(dtype).contiguous().transpose(1, 2)

    raw = {"q": laid(q), "k": laid(torch.cat(keys, 2))}
    raw["v"] = torch.randn_like(raw["k"].transpose(1, 2)).transpose(1, 2)
    # the norm would take away how sharply heads look; its weight gives that back on average
    weight = raw["k"].float().square().mean().sqrt().expand(case.channels).contiguous()
    how = {}
    for name, layout in {"q": queries, **{str(i): s for i, s in enumerate(spans)}}.items():
        angle = torch.zeros(layout.tokens, case.channels // 2, device=device)  # the data holds positions already
        how[name] = Preparation(weight, turning(angle.cos(), angle.sin()))
    cache = KeyCache(spans, case.batch, case.heads, case.channels, dtype)
    ready = prepare_queries(raw["q"], queries, how["q"])
    data = Prepared(case, queries, spans, raw, how, ready, cache, torch.compile(how["q"].__call__, dynamic=False))
    for i in range(len(spans)):
        data.write(i)
    return data


def table(
    cases: Iterable[Case], styles: Iterable[Style], dense: Dense, rates: Rates | None, device: torch.device,
    dtype: torch.dtype, rounds: int = 15,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One row a case, layout and density."""
    for case in cases:
        for style in styles:
            data = prepared(case, style, device, dtype)
            few = rounds if case.keys < 60_000 else max(3, rounds // 3)
            for wanted in case.densities:
                keep = case.keep(wanted)
                if keep is not None:
                    yield {
                        "layout": style,
                        "wanted": wanted,
                        **_row(data, Selection("mean", keep=keep), dense, rates, few),
                    }
            del data
            torch.cuda.empty_cache()


def kernels(q: Tensor) -> list[Implementation]:
    """The fused kernels that run on such queries, the preferred one first; `InputError` where none does."""
    found: list[Implementation] = [how for how in ("gluon", "triton") if not cannot(q, how)]
    if not found:
        raise InputError(f"no sparse kernel runs here: {cannot(q, 'triton')}")
    return found


def _row(data: Prepared, rule: Selection, dense: Dense, rates: Rates | None, rounds: int) -> dict[str, Any]:
    case, cache, q = data.case, data.cache, data.ready.x
    layout, ways = cache.layout, kernels(q)
    chosen = data.choose(data.ready, rule)
    scattered = _scattered(chosen, layout)
    cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
    runs: dict[str, Run] = {
        "dense, cudnn": lambda: cudnn(q, cache.k, cache.v, None, False),
        "dense, torch's choice": lambda: F.scaled_dot_product_attention(q, cache.k, cache.v),
        "dense, dispatched": lambda: dense(q, cache.k, cache.v),
        "prepare queries": lambda: data.prepare(rule),
        "prepare new keys and values": lambda: data.write(data.newest),
        "norm and rotation of queries, compiled by torch": lambda: data.turned(data.raw["q"]),
        "select": lambda: data.choose(data.ready, rule),
        "select, by mass": lambda: data.choose(data.ready, Selection("mass", keep=rule.keep)),
    }
    if data.newest:
        runs["prepare history, once a chunk"] = lambda: data.write(0)
    for how in ways:
        runs[how] = lambda how=how: data.attend(data.ready, chosen, how)
        runs[f"{how}, random lists"] = lambda how=how: data.attend(data.ready, scattered, how)
        runs[f"{how}, whole step"] = data.step(rule, how)
    if 0 < layout.free < layout.blocks:
        runs["hybrid"] = _hybrid(data, chosen, ways[0])
    times = milliseconds(runs, rounds)
    base, real = times["dense, cudnn"], float(density(chosen, data.queries, layout).mean())
    flops = 4 * case.batch * case.heads * q.shape[2] * case.keys * case.channels
    decision = decide(_shape(data, float(chosen.counts[..., 1].float().mean())), rates)
    picked = {"dense": times["dense, dispatched"], "sparse": times[ways[0]], "hybrid": times.get("hybrid", 0.0)}
    taken = picked[decision.way] + (times["select"] if decision.way != "dense" else 0.0)
    return {
        "case": case.name, "batch": case.batch, "heads": case.heads, "channels": case.channels, "queries": q.shape[2],
        "keys": case.keys, "kept": case.kept, "rounds": rounds,
        "keep": rule.keep, "density": real, "blocks": layout.blocks, "ms": times,
        "tflops": {
            "dense, cudnn": flops / base / 1e9,
            **{name: flops * real / times[name] / 1e9 for how in ways for name in (how, f"{how}, random lists")},
        },
        "of_dense": {name: base * real / times[name] for how in ways for name in (how, f"{how}, random lists")},
        "speedup_with_selection": {how: base / (times[how] + times["select"]) for how in ways},
        "overhead_us": _overhead(times), "overhead_allowed_us": max(60.0, 50 * times[ways[0]]),
        "decision": asdict(decision), "dispatched_speedup": base / taken,
    }  # fmt: skip


def _overhead(times: Mapping[str, float]) -> dict[str, float]:
    """Microseconds that a step spends on being sparse: all of it, and beyond what dense attention's queries need."""
    total = times["select"] + times["prepare queries"]
    beyond = total - min(times["prepare queries"], times["norm and rotation of queries, compiled by torch"])
    return {"select and prepare queries": 1e3 * total, "beyond norm and rotation": 1e3 * beyond}


def _shape(data: Prepared, each: float) -> Shape:
    case, layout = data.case, data.cache.layout
    return Shape(
        case.batch, case.heads, case.channels, data.queries.tokens, case.keys, case.kept, data.queries.blocks,
        layout.blocks, layout.blocks - layout.free, each,
    )  # fmt: skip


def _scattered(like: BlockList, layout: Layout) -> BlockList:
    """A list with as many blocks, those that are not kept drawn at random."""
    order = torch.rand(like.blocks.shape, device=like.blocks.device).masked_fill(layout.kept, 2.0)
    return listed(order.argsort(-1, descending=True).argsort(-1) < like.counts[..., 1:], layout)


def _hybrid(data: Prepared, chosen: BlockList, how: Implementation) -> Run:
    """What is kept by dense attention, the rest by the sparse kernel, merged; without the selection."""
    cache, at, free = data.cache, data.spans[0].tokens, without(chosen, data.cache.layout)
    own = (cache.k[:, :, at:], cache.v[:, :, at:])

    def run() -> object:
        q = data.ready.x
        far = attend_blocks(q, cache.k, cache.v, free, data.queries, cache.layout, natural=False, using=how)
        out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, *own, None, True)[:2]
        return merge(far, Partial(out, lse.view(far.lse.shape)))

    return run


def against_published(
    case: Case, keep: float, device: torch.device, dtype: torch.dtype, rounds: int = 15
) -> dict[str, Any]:
    """One layer's attention in one solver step: this design, and the published one's structure at its own settings."""
    if case.current is None:
        raise InputError(f"the published design keeps the current chunk, {case.name!r} has none")
    rule = Selection("mean", keep=keep)
    ours, boxed = (prepared(case, style, device, dtype) for style in ("serpentine", "boxes"))
    grids, (old, new) = (case.queries, case.history, case.current), (ours.span(0), ours.span(1))
    # norm and rotation by torch, step by step, as there; the history's were done when it was written
    turned = (ours.how["0"](old[0]), old[1])
    ready = (ours.how["q"](ours.raw["q"]), (ours.how["1"](new[0]), new[1]))

    def whole() -> object:
        q, own = ours.how["q"](ours.raw["q"]), (ours.how["1"](new[0]), new[1])
        return published.attend(q, turned, own, grids, case.tile, keep)

    runs: dict[str, Run] = {
        "published structure": whole,
        "published structure without norm and rotation": lambda: published.attend(
            ready[0], turned, ready[1], grids, case.tile, keep
        ),
        "the same kernel in this design, boxes": boxed.step(rule, "triton"),
    }
    for how in kernels(ours.ready.x):
        runs[f"{how}, serpentine"] = ours.step(rule, how)
    runs["prepare history, once a chunk"] = lambda: ours.write(0)
    times = milliseconds(runs, rounds)
    share = (case.kept + keep * (case.keys - case.kept)) / case.keys
    return {"case": case.name, "keep": keep, "density": share, "ms": times}
