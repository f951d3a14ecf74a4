"""Block-sparse attention in a chunk: settings, what a layer computes, and what is reported."""

from __future__ import annotations

import json
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attending import normal
from worldstride import Acceleration
from worldstride.acceleration import resolve, save_settings
from worldstride.attention import Selection, SparseAttend, Sparsity, attend, merge, reference, sparse, sparsity
from worldstride.attention.cost import Decision, Rates
from worldstride.attention.layout import Layout, boxes, join, serpentine
from worldstride.attention.preparation import KeyCache
from worldstride.attention.selection import select, summarise
from worldstride.errors import InputError

GRID, SEGMENTS, NEW, TILE = (5, 7), (2, 0, 3), 2, (2, 4, 4)
TOKENS, HEADS, CHANNELS = GRID[0] * GRID[1], 3, 32
ALL = Selection(keep=1.0)
STYLE = pytest.mark.parametrize("style", ["boxes", "serpentine"])
Pair = tuple[Tensor, Tensor]


def asking(style: str = "boxes", denoise: Selection | None = ALL, **given: Any) -> Sparsity:
    return Sparsity(TILE, style, denoise, **{"dense_layers": 0, **given})  # type: ignore[arg-type]


def tensors(latents: int, seed: int, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (normal(2, HEADS, latents * tokens, CHANNELS, seed=3 * seed + i) for i in range(3))
    return q, k, v


def chunk_inputs(seed: int = 0, past: int = sum(SEGMENTS), tokens: int = TOKENS) -> tuple[Tensor, Pair, Pair]:
    q, k, v = tensors(NEW, 2 * seed + 1, tokens)
    _, past_k, past_v = tensors(past, 2 * seed, tokens)
    return q, (past_k, past_v), (k, v)


def whole(past: Pair, own: Pair) -> Pair:
    return torch.cat([past[0], own[0]], 2), torch.cat([past[1], own[1]], 2)


def dense_truth(q: Tensor, past: Pair, own: Pair) -> Tensor:
    return reference(q, *whole(past, own))


def near(got: Tensor, truth: Tensor) -> bool:
    assert got.shape == truth.shape
    return torch.allclose(got.double(), truth.double(), atol=1e-5, rtol=0)


def layouts_of(style: str) -> tuple[Layout, Layout]:
    """Blocks of the chunk, and of the context and the chunk."""
    make = {"boxes": boxes, "serpentine": serpentine}[style]
    queries = make((NEW, *GRID), TILE)
    keys = join([*(make((n, *GRID), TILE) for n in SEGMENTS if n), queries.always()])
    return replace(queries, places=keys.places[-queries.blocks :]), keys  # the chunk lies behind the context


def by_hand(style: str, q: Tensor, past: Pair, own: Pair, rule: Selection) -> tuple[Tensor, float]:
    """One masked softmax in float64 over what the rule selects, and the share of pairs that are attended to."""
    queries, keys = layouts_of(style)
    k, v = (t[:, :, keys.order] for t in whole(past, own))
    x = q[:, :, queries.order]
    listed = select(summarise(x, queries, alike=True), summarise(k, keys, alike=True), queries, keys, rule)
    truth = sparse.reference(x, k, v, listed, queries, keys).out[:, :, queries.inverse]
    pairs = 0
    for row in torch.cartesian_prod(torch.arange(2), torch.arange(HEADS), torch.arange(queries.blocks)).tolist():
        numbers = listed.blocks[tuple(row)][: int(listed.counts[tuple(row)][1])].long()
        pairs += int(keys.sizes[numbers].sum()) * int(queries.sizes[row[2]])
    return truth, pairs / (2 * HEADS * queries.tokens * keys.tokens)


# a layer


@STYLE
@pytest.mark.parametrize("segments", [SEGMENTS, (5,), (1, 1, 3), ()], ids=str)
def test_keeping_everything_is_dense_attention(style: str, segments: tuple[int, ...]):
    owner = SparseAttend(attend, asking(style, context=ALL), GRID, segments)
    given = chunk_inputs()
    assert near(owner.at(0, "chunk").chunk(*given), dense_truth(*given))
    inner = tensors(5, 7)
    assert near(owner.at(0, "context").within(*inner), reference(*inner))
    assert owner.report().calls == {"sparse": 2}
    assert owner.report().density == pytest.approx({"chunk": 1.0, "context": 1.0})


def test_what_was_done_can_be_told_when_blocks_are_let_go():
    owner = SparseAttend(attend, asking("serpentine"), GRID, SEGMENTS)
    layer = owner.at(0, "chunk")
    layer.chunk(*chunk_inputs())
    before, gone = owner.report(), weakref.ref(layer)
    del layer
    owner.let_go()
    assert gone() is None
    assert before.bytes > 0
    assert owner.report() == before


RULES = {
    "mean": Selection("mean", keep=0.4),
    "cosine, smooth": Selection("cosine", keep=0.3, smooth=True),
    "parts": Selection("parts", keep=0.2),
    "mass": Selection("mass", keep=0.0),
    "share": Selection("mass", mass=0.6),
    "guard": Selection("mean", keep=0.3, guard=0.04),
    "neighbours": Selection("mean", keep=0.5, neighbours=1),
}


@STYLE
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_a_chunk_attends_to_what_is_selected_and_to_itself(style: str, rule: Selection):
    owner = SparseAttend(attend, asking(style, rule), GRID, SEGMENTS)
    given = chunk_inputs()
    truth, density = by_hand(style, *given, rule)
    assert near(owner.at(0, "chunk").chunk(*given), truth)
    assert not near(truth, dense_truth(*given))
    reported = owner.report().density["chunk"]
    if rule.mass is not None or rule.guard is not None or style == "boxes":
        assert reported == pytest.approx(density)
    assert NEW / (NEW + sum(SEGMENTS)) < reported < 1


@pytest.mark.parametrize("rule", [RULES["mean"], RULES["share"], RULES["guard"]], ids=["mean", "share", "guard"])
def test_context_latents_attend_to_what_is_selected_among_them(rule: Selection):
    owner = SparseAttend(attend, asking("serpentine", None, context=rule), GRID, SEGMENTS)
    q, k, v = tensors(5, 4)
    layout = join([serpentine((n, *GRID), TILE) for n in SEGMENTS if n])
    x, y, z = (t[:, :, layout.order] for t in (q, k, v))
    listed = select(summarise(x, layout, alike=True), summarise(y, layout, alike=True), layout, layout, rule)
    truth = sparse.reference(x, y, z, listed, layout, layout).out[:, :, layout.inverse]
    assert near(owner.at(0, "context").within(q, k, v), truth)
    assert not near(truth, reference(q, k, v))
    assert list(owner.report().density) == ["context"]


def test_without_a_rule_attention_is_dense_and_not_counted():
    given, inner = chunk_inputs(), tensors(5, 7)
    only_chunk = SparseAttend(attend, asking(denoise=Selection(keep=0.2)), GRID, SEGMENTS)
    assert near(only_chunk.at(0, "context").within(*inner), reference(*inner))
    assert (only_chunk.report().calls, only_chunk.report().density) == ({}, {})
    only_context = SparseAttend(attend, asking(denoise=None, context=Selection(keep=0.2)), GRID, SEGMENTS)
    assert near(only_context.at(0, "chunk").chunk(*given), dense_truth(*given))
    assert (only_context.report().calls, only_context.report().implementation) == ({}, "none")


def test_first_layers_attend_to_everything():
    low = Selection(keep=0.0)
    owner = SparseAttend(attend, asking(denoise=low, context=low, dense_layers=2), GRID, SEGMENTS)
    given, inner = chunk_inputs(), tensors(5, 7)
    for layer in range(4):
        assert near(owner.at(layer, "chunk").chunk(*given), dense_truth(*given)) is (layer < 2)
        assert near(owner.at(layer, "context").within(*inner), reference(*inner)) is (layer < 2)
        assert owner.at(layer, "chunk") is owner.at(layer, "chunk") is not owner.at(layer, "context")
    assert owner.at(0, "chunk") is not owner.at(1, "chunk")
    assert owner.report().calls == {"dense": 4, "sparse": 4}


def test_what_a_chunk_makes_anew_is_attended_to_densely():
    """A chunk without context, which is counted."""
    low = Selection(keep=0.0)
    owner = SparseAttend(attend, asking(denoise=low, context=low), GRID, SEGMENTS)
    inner = tensors(5, 7)
    assert near(owner.at(1, "chunk").within(*inner), reference(*inner))
    report = owner.report()
    assert (report.calls, report.density) == ({"dense": 1}, {"chunk": 1.0})
    assert (report.decisions, report.bytes) == ({}, 0)


def test_new_context_latents_choose_among_kept_ones_by_the_contexts_rule():
    given = chunk_inputs()
    owner = SparseAttend(attend, asking(denoise=ALL, context=Selection(keep=0.3)), GRID, SEGMENTS)
    other = SparseAttend(attend, asking(denoise=Selection(keep=0.3)), GRID, SEGMENTS)
    assert torch.equal(owner.at(1, "context").chunk(*given), other.at(1, "chunk").chunk(*given))
    assert owner.report().density["context"] == other.report().density["chunk"] < 1


@pytest.mark.parametrize("kind", ["chunk", "context"])
@pytest.mark.parametrize("segments", [SEGMENTS, (NEW,)], ids=str)
def test_new_latents_are_neighbours_of_what_lies_just_before_them(
    kind: Any, segments: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
):
    chosen, select = list[Tensor](), sparsity.select

    def watched(*args: Any) -> Any:
        found = select(*args)
        chosen.append(found.table())
        return found

    monkeypatch.setattr(sparsity, "select", watched)
    rule, (q, past, own) = Selection(keep=0.0, neighbours=1), chunk_inputs(past=sum(segments))
    owner = SparseAttend(attend, Sparsity((1, 4, 4), "boxes", rule, rule, dense_layers=0), GRID, segments)
    owner.at(1, kind).chunk(q, past, own)
    keys, values = (torch.cat(parts, 2) for parts in zip(past, own, strict=True))
    owner.at(1, kind).joined(q, keys, values, past[0].shape[2])
    layout = owner.layout(sum(segments), q.device)
    last = layout.places[:, 0] == layout.places[:, 0].max()
    assert len(chosen) == 2
    for table in chosen:
        first = table[:, :, : int(last.sum()), : layout.blocks]  # blocks of the chunk's first latents
        assert bool((first.sum(-1) == 1).all()) and not bool(first[..., ~last].any())


@pytest.mark.parametrize("words", [0, 5, 200])
@pytest.mark.parametrize("kind", ["chunk", "context"])
def test_joined_keys_are_attended_to_as_parts_are(kind: Any, words: int):
    """What may be left out stands first; text, on no grid, and the new tokens come behind it in any order."""
    q, past, own = chunk_inputs()
    text = tuple(normal(2, HEADS, words, CHANNELS, seed=90 + i) for i in range(2))
    keys, values = (torch.cat(parts, 2) for parts in zip(past, text, own, strict=True))
    free, truth = past[0].shape[2], reference(q, keys, values)
    for low, alike in ((Selection(keep=0.3), False), (ALL, True)):
        layer = SparseAttend(attend, asking(denoise=low, context=low), GRID, SEGMENTS).at(1, kind)
        got = layer.joined(q, keys, values, free)
        assert near(got, truth) is alike
        part = layer.joined(q, keys, values, free, lse=True)
        assert torch.allclose(part.out, got, atol=1e-6)
        assert torch.allclose(part.lse, attend(q, keys, values, lse=True).lse, atol=1e-5) is alike
        if not words:
            assert near(got, layer.chunk(q, past, own).double())
        # the context alone, joined with the rest afterwards
        far = layer.joined(q, *past, free, lse=True)
        near_by = attend(q, keys[:, :, free:], values[:, :, free:], lse=True)
        assert near(merge(far, near_by).out, got.double())
        assert layer.bytes == 0 or not words  # nothing of joined keys is kept
    assert torch.equal(layer.joined(q, keys, values, 0), attend(q, keys, values))


def test_whoever_knows_no_blocks_gets_dense_attention():
    owner = SparseAttend(attend, asking(denoise=Selection(keep=0.0)), GRID, SEGMENTS)
    q, k, v = tensors(2, 1)
    bias = normal(2, 2 * TOKENS, seed=9)
    truth = reference(q, k, v, bias=bias, lse=True)
    for how in (owner, owner.at(3, "chunk"), owner.at(3, "context")):
        assert near(how(q, k, v), reference(q, k, v))
        part = how(q, k, v, bias=bias, lse=True)
        assert near(part.out, truth.out)
        assert near(part.lse, truth.lse)
    assert owner.report().calls == {}


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Spans that were written into some cache."""
    seen = list[int]()

    class Counted(KeyCache):
        def write(self, span: int, *args: Any, **kwargs: Any) -> None:
            seen.append(span)
            super().write(span, *args, **kwargs)

    monkeypatch.setattr(sparsity, "KeyCache", Counted)
    return seen


def test_the_context_is_put_in_blocks_once_for_as_long_as_it_is_the_same(writes: list[int]):
    rule = Selection(keep=0.4)
    layer = SparseAttend(attend, asking(denoise=rule), GRID, SEGMENTS).at(0, "chunk")
    _, past, _ = chunk_inputs(0)
    for seed in (1, 2, 3):  # other queries and own keys in each step
        q, _, own = chunk_inputs(seed)
        assert near(layer.chunk(q, (past[0], past[1]), own), by_hand("boxes", q, past, own, rule)[0])
    assert Counter(writes) == {0: 1, 1: 3}
    _, other, _ = chunk_inputs(5)
    assert near(layer.chunk(q, other, own), by_hand("boxes", q, other, own, rule)[0])
    assert Counter(writes) == {0: 2, 1: 4}
    layer.chunk(q, (other[0].clone(), other[1].clone()), own)  # equal, but who knows
    assert Counter(writes) == {0: 3, 1: 5}


def test_layers_keep_contexts_of_their_own(writes: list[int]):
    rule = Selection(keep=0.4)
    owner = SparseAttend(attend, asking(denoise=rule), GRID, SEGMENTS)
    (q, first, own), (_, second, _) = chunk_inputs(0), chunk_inputs(1)
    for _ in range(2):
        for layer, past in enumerate((first, second)):
            assert near(owner.at(layer, "chunk").chunk(q, past, own), by_hand("boxes", q, past, own, rule)[0])
    assert Counter(writes) == {0: 2, 1: 4}


# which way


def decided_as(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparsity, "decide", lambda *_, **__: Decision(way, 0.5, {}, "for the test"))  # type: ignore[arg-type]


@STYLE
@pytest.mark.parametrize("rule", [RULES["mean"], RULES["share"], RULES["guard"], ALL], ids=str)
def test_both_sparse_ways_are_one_attention(style: str, rule: Selection, monkeypatch: pytest.MonkeyPatch):
    given = chunk_inputs()
    made = {}
    for way in ("sparse", "hybrid"):
        decided_as(way, monkeypatch)
        owner = SparseAttend(attend, asking(style, rule), GRID, SEGMENTS)
        made[way] = owner.at(0, "chunk").chunk(*given), owner.report()
        assert made[way][1].calls == {way: 1}
    assert near(made["hybrid"][0], made["sparse"][0])
    assert near(made["hybrid"][0], by_hand(style, *given, rule)[0])
    assert made["hybrid"][1].density == made["sparse"][1].density


def poor(queries: Layout, keys: Layout, block: float) -> Rates:
    """Rates of a kernel that takes `block` times what dense attention takes, for blocks of average size."""
    shape = 2 * HEADS * queries.tokens * CHANNELS * 4
    dense = 1e-6
    each = shape * (keys.tokens / keys.blocks) / dense / 1e9 * 1e3  # microseconds of a block of keys
    return Rates(1, dense, block * each / (2 * HEADS * queries.blocks), 0.0, 0.0, 1e9)


@pytest.mark.parametrize(("block", "way"), [(0.5, "sparse"), (2.0, "hybrid"), (9.0, "dense")])
def test_rates_decide_the_way(block: float, way: str):
    given, rule, asked = chunk_inputs(), Selection(keep=0.34), list[int]()
    rates = poor(*layouts_of("boxes"), block)

    def of(channels: int) -> Rates:
        asked.append(channels)
        return rates

    owner = SparseAttend(attend, asking(denoise=rule), GRID, SEGMENTS, of)
    for layer in range(3):
        truth = dense_truth(*given) if way == "dense" else by_hand("boxes", *given, rule)[0]
        assert near(owner.at(layer, "chunk").chunk(*given), truth)
    report = owner.report()
    assert report.calls == {way: 3}
    (name,) = report.decisions
    assert name == f"chunk, 2 x {HEADS} heads, {NEW * TOKENS} x {(NEW + sum(SEGMENTS)) * TOKENS}"
    assert report.decisions[name].way == way
    assert set(report.decisions[name].milliseconds) == {"dense", "sparse", "hybrid"}
    assert asked == [CHANNELS]  # decided once
    assert (report.density["chunk"] == 1) is (way == "dense")
    assert report.implementation == ("none" if way == "dense" else "gather")
    obeyed = SparseAttend(attend, asking(denoise=rule, obey=True), GRID, SEGMENTS, of)
    obeyed.at(0, "chunk").chunk(*given)
    assert obeyed.report().calls == {"sparse": 1}
    assert obeyed.report().decisions[name].reason == "asked to obey"


def test_context_latents_attend_densely_where_that_is_faster():
    inner = tensors(5, 7)
    layout = join([boxes((n, *GRID), TILE) for n in SEGMENTS if n])
    rates = poor(layout, layout, 9.0)
    owner = SparseAttend(attend, asking(denoise=None, context=Selection(keep=0.5)), GRID, SEGMENTS, lambda _: rates)
    assert near(owner.at(0, "context").within(*inner), reference(*inner))
    assert owner.report().calls == {"dense": 1}
    assert owner.report().density == {"context": 1.0}
    name = f"context, 2 x {HEADS} heads, {5 * TOKENS} x {5 * TOKENS}"
    assert set(owner.report().decisions[name].milliseconds) == {"dense", "sparse"}


# the report


def test_density_counts_every_pair_of_all_layers():
    """One block a latent of 4 x 4 tokens: what is attended to can be counted by hand."""
    half = Selection(keep=0.5)
    settings = Sparsity((1, 4, 4), "boxes", half, half, dense_layers=1)
    owner = SparseAttend(attend, settings, (4, 4), (4,))
    assert owner.report().density == {}
    given, inner = chunk_inputs(0, 4, 16), tensors(4, 7, 16)
    for layer in range(3):
        owner.at(layer, "context").within(*inner)
        owner.at(layer, "chunk").chunk(*given)
    report = owner.report()
    assert report.calls == {"dense": 2, "sparse": 4}
    # 2 of 4 context latents and both of the chunk, of 6; in two layers of three
    assert report.density["chunk"] == pytest.approx((1 + 2 * 4 / 6) / 3)
    assert report.density["context"] == pytest.approx((1 + 2 * 2 / 4) / 3)
    assert report.implementation == "gather"
    assert set(report.decisions) == {"chunk, 2 x 3 heads, 32 x 96", "context, 2 x 3 heads, 64 x 64"}
    assert all(d.way == "sparse" and "as asked" in d.reason for d in report.decisions.values())
    # more pairs count more: 2 latents see 10, of which 8 are context
    owner.at(1, "chunk").chunk(*chunk_inputs(1, 8, 16))
    assert owner.report().density["chunk"] == pytest.approx((6 + 2 * 4 + 6) / (3 * 6 + 10))
    assert "chunk, 2 x 3 heads, 32 x 160" in owner.report().decisions
    # keys, values and means of 4 parts of each of 6 blocks, in two layers; the longer context is in place of one
    size = 4 * 2 * HEADS * CHANNELS
    assert report.bytes == 2 * size * (2 * 96 + 4 * 6)
    assert owner.report().bytes == size * (2 * 96 + 4 * 6) + size * (2 * 160 + 4 * 10)
    assert len(report.decisions) == 2  # what was reported stays as it was


# layouts


def test_layouts_are_made_once_and_handed_on():
    shared = dict[object, Layout]()
    given = chunk_inputs()
    first = SparseAttend(attend, asking(context=ALL), GRID, SEGMENTS, layouts=shared)
    truth = first.at(0, "chunk").chunk(*given)
    made = dict(shared)
    assert len(made) == 3  # context, chunk, and both joined
    second = SparseAttend(attend, asking(context=ALL), GRID, SEGMENTS, layouts=shared)
    assert torch.equal(second.at(0, "chunk").chunk(*given), truth)
    second.at(1, "context").within(*tensors(5, 7))
    assert shared.keys() == made.keys()
    assert all(shared[key] is made[key] for key in made)
    for other in (asking("serpentine"), replace(asking(), tile=(1, 4, 4))):
        before = len(shared)
        SparseAttend(attend, other, GRID, SEGMENTS, layouts=shared).at(0, "chunk").chunk(*given)
        assert len(shared) == before + 3
    SparseAttend(attend, asking(), GRID, (3, 2), layouts=shared).at(0, "chunk").chunk(*given)
    assert sum(layout.tokens == 5 * TOKENS for layout in shared.values()) == 4


@STYLE
def test_no_block_reaches_from_one_part_of_the_context_into_another(style: str):
    owner = SparseAttend(attend, asking(style), GRID, (2, 0, 3))
    layout, cut = owner.layout(5, torch.device("cpu")), 2 * TOKENS
    for numbers in layout.order.split(layout.sizes.tolist()):
        assert bool((numbers < cut).all()) or bool((numbers >= cut).all())
    assert layout.free == layout.blocks
    other = owner.layout(4, torch.device("cpu"))  # not the whole context: its parts are unknown
    make = {"boxes": boxes, "serpentine": serpentine}[style]
    assert torch.equal(other.order, make((4, *GRID), TILE).order)
    kept = owner.own(5, torch.device("cpu"))  # nor is a chunk of as many latents cut
    assert torch.equal(kept.order, make((5, *GRID), TILE).order)
    assert (kept.free, bool(kept.kept.all())) == (0, True)
    both = owner.every(5, 2, 0, torch.device("cpu"))
    assert torch.equal(both.order[: layout.tokens], layout.order)
    assert torch.equal(both.order[layout.tokens :], owner.own(2, torch.device("cpu")).order + layout.tokens)
    assert (both.free, both.kept.tolist()) == (layout.blocks, [i >= layout.blocks for i in range(both.blocks)])
    # where the chunk's queries stand tells which blocks of the context are their neighbours: the last ones
    behind = owner.own(2, torch.device("cpu"), 5)
    assert torch.equal(behind.order, owner.own(2, torch.device("cpu")).order)
    assert torch.equal(behind.places, both.places[layout.blocks :])
    text = owner.every(5, 0, 130, torch.device("cpu"))
    assert (text.tokens, text.free, text.sizes[-2:].tolist()) == (layout.tokens + 130, layout.blocks, [128, 2])


# settings

FULL = Sparsity(
    (1, 8, 4), "boxes", Selection("mass", 0.3, least=2, guard=0.2), Selection("parts", mass=0.9, neighbours=1),
    dense_layers=2, expect=0.3, obey=True,
)  # fmt: skip


@pytest.mark.parametrize("settings", [FULL, Sparsity(denoise=ALL), Sparsity(context=ALL)], ids=["full", "a", "b"])
def test_settings_survive_being_written(settings: Sparsity, tmp_path: Path):
    whole = Acceleration("sparse", sparsity=settings)
    assert Acceleration.from_json(whole.to_json()) == whole
    again = Acceleration.from_json(json.loads(json.dumps(whole.to_json())))
    assert again == whole
    assert again.sparsity is not None
    assert isinstance(again.sparsity.tile, tuple)
    assert hash(again) == hash(whole)
    save_settings(whole, tmp_path / "sparse.toml")
    assert resolve(tmp_path / "sparse.toml") == whole


def test_defaults_are_those_of_published_deployments():
    settings = Sparsity(denoise=Selection())
    assert (settings.tile, settings.dense_layers, settings.obey) == ((4, 8, 4), 1, False)


UNKNOWN = [
    ({"sparsity": {"denoise": {}, "tiles": [1, 4, 4]}}, r"\.sparsity: unknown setting 'tiles' \(did .*'tile'"),
    ({"sparsity": {"denoise": {"kep": 0.5}}}, r"sparsity\.denoise: unknown setting 'kep' \(did you mean 'keep'\?\)"),
    ({"sparsity": {"context": {"scores": "mass"}}}, r"sparsity\.context: unknown setting 'scores' .*'score'"),
    ({"sparse": {}}, r"acceleration: unknown setting 'sparse'.*'sparsity'"),
    ({"sparsity": 0.25}, "acceleration.sparsity must be a table of settings, got float"),
    ({"sparsity": {"denoise": 0.25}}, "acceleration.sparsity.denoise must be a table of settings, got float"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "text"), UNKNOWN)
def test_unknown_settings_are_named_with_the_nearest_known(values: dict[str, Any], text: str):
    with pytest.raises(InputError, match=text):
        Acceleration.from_json(values)


WRONG = [
    ({"tile": (4, 8, 8)}, r"at most 128 tokens, got \(4, 8, 8\) with 256"),
    ({"tile": (0, 8, 4)}, r"tile must be three positive integers .* got \(0, 8, 4\)"),
    ({"tile": [4, 8]}, r"tile must be three positive integers .* got \(4, 8\)"),
    ({"tile": (4.0, 8, 4)}, r"tile must be three positive integers"),
    ({"layout": "snake"}, r"sparsity\.layout must be boxes or serpentine, got 'snake'"),
    ({"dense_layers": -1}, r"sparsity\.dense_layers must be an integer of at least 0, got -1"),
    ({"dense_layers": 1.5}, r"sparsity\.dense_layers must be an integer of at least 0, got 1\.5"),
    ({"expect": 1.5}, r"sparsity\.expect must be a number at least 0 and at most 1, got 1\.5"),
    ({"denoise": None}, "sparsity needs denoise, context or both"),
]


@pytest.mark.parametrize(("given", "text"), WRONG)
def test_settings_that_cannot_be_are_named(given: dict[str, Any], text: str):
    with pytest.raises(InputError, match=text):
        Sparsity(**{"denoise": ALL, **given})


LEVERS = sorted((Path(__file__).parents[1] / "benchmarks" / "levers").glob("sparse-*.toml"))


@pytest.mark.parametrize("file", LEVERS, ids=lambda f: f.stem)
def test_settings_that_were_measured_can_be_read(file: Path, tmp_path: Path):
    settings = resolve(file)
    assert settings.name == file.stem
    assert settings.sparsity is not None
    save_settings(settings, tmp_path / "again.toml")
    assert resolve(tmp_path / "again.toml") == settings
    # what was measured in the shipped world was measured as asked, whatever a device predicts
    assert settings.sparsity.obey


def test_some_settings_were_measured():
    assert len(LEVERS) >= 5
