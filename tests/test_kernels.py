"""The Triton kernels in Triton's interpreter, on a CPU: against the same written out in torch.

Warp-specialised ones have no interpreter; `test_kernels_gpu` runs them, and all others compiled.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from attending import BOUND, beyond, error, layouts, normal, poison, rows, rules, shuffled, some_blocks
from worldstride.attention import ops, selection, sparse
from worldstride.attention import reference as dense_reference
from worldstride.attention.layout import Layout, boxes, join, runs, serpentine
from worldstride.attention.partial import Partial
from worldstride.attention.preparation import Blocks, KeyCache, Preparation, prepare_queries, turning
from worldstride.attention.selection import (
    BlockList,
    Selection,
    Summary,
    choose,
    everything,
    listed,
    score,
    summarise,
    unit_sums,
)
from worldstride.errors import InputError

pytest.importorskip("triton", minversion="3.4", reason="the kernels need Triton 3.4 or newer")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton's interpreter is off: on a GPU the kernels run compiled", allow_module_level=True)

from worldstride.attention import kernels

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),  # minus infinity in numpy
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
CASES = layouts()
EACH_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
RULES = rules()
E = 64
"""Channels of a head."""


for name in ("attend_listed", "attend_all", "select_blocks", "prepare_blocks"):
    operator = getattr(ops, name)
    operator.register_kernel("cpu", operator._init_fn)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks whether the plain kernel can run here is told so, as on a GPU with Triton."""
    monkeypatch.setattr(ops, "usable", lambda how, x: "" if how == "triton" else "no interpreter runs it")


def inputs(queries: Layout, keys: Layout, dtype: torch.dtype, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (queries.tokens, keys.tokens, keys.tokens)
    q, k, v = (normal(1, heads, n, E, seed=i, dtype=dtype) for i, n in enumerate(sizes))
    return q, k, v


def attend(
    q: Tensor, k: Tensor, v: Tensor, found: BlockList, queries: Layout, keys: Layout, *, bias: Tensor | None = None,
    natural: bool = False,
) -> Partial:  # fmt: skip
    """By the plain kernel; what it leaves unwritten is no number."""
    order = queries.order if natural else None
    with poison():
        return Partial(
            *kernels.attend_listed(
                q, k, v, found.blocks, found.counts, queries.starts, keys.starts, order, bias, "triton"
            )
        )


def check(part: Partial, truth: Partial, dtype: torch.dtype) -> None:
    assert part.out.dtype == dtype
    assert part.lse.dtype == torch.float32
    assert error(part.out, truth.out) <= BOUND[dtype]
    assert float((part.lse.double() - truth.lse).abs().max()) <= (1e-5 if dtype == torch.float32 else 1e-3)


# attention


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@DTYPES
@EACH_CASE
def test_attention_to_listed_blocks_equals_the_reference(case: tuple[Layout, Layout], dtype: torch.dtype, biased: bool):
    queries, keys = case
    given = inputs(queries, keys, dtype)
    bias = 2 * normal(keys.tokens, seed=5) if biased else None
    found = beyond(some_blocks(queries, keys))
    truth = sparse.reference(*given, found, queries, keys, bias)
    check(attend(*given, found, queries, keys, bias=bias), truth, dtype)
    natural = attend(*given, found, queries, keys, bias=bias, natural=True)
    check(natural, Partial(*(t[:, :, queries.inverse] for t in truth)), dtype)


@pytest.mark.parametrize("shape", [(2, 1), (2, 3), (1, 3)], ids=str)
def test_worlds_and_heads_have_lists_and_biases_of_their_own(shape: tuple[int, int]):
    queries, keys = CASES["ragged boxes"]
    q, k, v = (normal(2, 3, layout.tokens, E, seed=i) for i, layout in enumerate((queries, keys, keys)))
    bias, found = 3 * normal(*shape, keys.tokens, seed=5), some_blocks(queries, keys, 2, 3)
    truth = sparse.reference(q, k, v, found, queries, keys, bias.expand(2, 3, -1))
    check(attend(q, k, v, found, queries, keys, bias=bias), truth, torch.float32)


def test_the_order_of_a_list_changes_nothing():
    queries, keys = runs(200), join([runs(5 * 128), boxes((3, 5, 7), (2, 4, 4))])
    given, found = inputs(queries, keys, torch.float32), some_blocks(queries, keys)
    truth = sparse.reference(*given, found, queries, keys)
    for seed in range(3):
        check(attend(*given, shuffled(found, seed), queries, keys), truth, torch.float32)


@DTYPES
def test_everything_is_dense_attention(dtype: torch.dtype):
    queries, keys = CASES["chunk and history"]
    q, k, v = inputs(queries, keys, dtype)
    part = attend(q, k, v, everything(1, 2, queries, keys), queries, keys)
    dense = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert error(part.out, dense) <= BOUND[dtype]


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("size", [30.0, -30.0])
def test_scores_of_any_size_are_taken(size: float, biased: bool):
    """Sums start from no score at all, and a block of small ones may come first or last."""
    queries, keys = runs(20), runs(3 * 128 + 40)
    q, k, v = inputs(queries, keys, torch.float32)
    q = q.abs() * size
    k = k.abs() * torch.cat([torch.full((128,), s) for s in (0.1, 3.0, 0.5, 1.0)])[: keys.tokens, None]
    bias = size * normal(keys.tokens, seed=5) if biased else None
    found = everything(1, 2, queries, keys)
    part, truth = (
        attend(q, k, v, found, queries, keys, bias=bias),
        sparse.reference(q, k, v, found, queries, keys, bias),
    )
    assert error(part.out, truth.out) <= 1e-4  # of scores in the thousands
    assert torch.allclose(part.lse.double(), truth.lse, rtol=1e-6, atol=1e-5)


@DTYPES
def test_minus_infinity_hides_a_key_and_where_all_are_hidden_attention_is_zeros(dtype: torch.dtype):
    queries, keys = runs(140), runs(2 * 128 + 30)
    q, k, v = inputs(queries, keys, dtype)
    bias = torch.zeros(1, 2, keys.tokens)
    bias[:, 0, :128], bias[:, 0, 200::2], bias[:, 1] = -torch.inf, -torch.inf, -torch.inf
    found = everything(1, 2, queries, keys)
    part = attend(q, k, v, found, queries, keys, bias=bias)
    truth = sparse.reference(q, k, v, found, queries, keys, bias)
    check(Partial(part.out[:, :1], part.lse[:, :1]), Partial(truth.out[:, :1], truth.lse[:, :1]), dtype)
    assert not part.out[:, 1].any()
    assert bool((part.lse[:, 1] == -torch.inf).all())


@pytest.mark.parametrize("garbage", [1e4, torch.inf, torch.nan], ids=str)
def test_tokens_of_blocks_that_are_not_listed_never_take_part(garbage: float):
    """A block with fewer tokens is loaded with those that follow it, whatever they are: a cache may be half written."""
    queries, keys = runs(140), join([boxes((3, 5, 7), (2, 4, 4)), runs(128), runs(9)])
    q, k, v = inputs(queries, keys, torch.float32)
    table = torch.zeros(1, 2, queries.blocks, keys.blocks, dtype=torch.bool)
    table[..., ::2] = True
    found = listed(table, keys)
    truth = sparse.reference(q, k, v, found, queries, keys)
    hidden = keys.owner % 2 == 1
    k[:, :, hidden], v[:, :, hidden] = garbage, garbage
    check(attend(q, k, v, found, queries, keys), truth, torch.float32)


def test_slices_of_a_packed_projection_are_taken_as_they_are():
    queries, keys = runs(140), runs(150)
    packed = normal(1, 150, 3, 2, E)
    q, k, v = (t.transpose(1, 2) for t in packed.unbind(2))
    q = q[:, :, :140]
    assert not q.is_contiguous()
    found = everything(1, 2, queries, keys)
    check(attend(q, k, v, found, queries, keys), sparse.reference(q, k, v, found, queries, keys), torch.float32)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("kind", ["every second", "one for all", "one for all keys of a head", "transposed"])
def test_a_bias_of_any_strides_is_taken(kind: str):
    queries, keys = runs(20), runs(150)
    given, found = inputs(queries, keys, torch.float16), everything(1, 2, queries, keys)
    wide = 3 * normal(keys.tokens, 2, seed=5)
    bias = {
        "every second": wide[:, 0],
        "one for all": wide[:1, 0].expand(keys.tokens),
        "one for all keys of a head": wide[0].view(1, 2, 1).expand(1, 2, keys.tokens),
        "transposed": wide.T[None],
    }[kind]
    part = sparse.attend_blocks(*given, found, queries, keys, bias=bias, using="triton")
    check(part, sparse.reference(*given, found, queries, keys, bias), torch.float16)


@pytest.mark.usefixtures("interpreted")
def test_attention_by_the_kernel_is_attention_gathered():
    queries, keys = CASES["chunk and history"]
    given, found = inputs(queries, keys, torch.float16), some_blocks(queries, keys)
    for bias in (None, normal(keys.tokens), normal(1, keys.tokens), normal(1, 2, keys.tokens)):
        for natural in (True, False):
            parts = [
                sparse.attend_blocks(*given, found, queries, keys, bias=bias, natural=natural, using=how)
                for how in ("triton", "gather")
            ]
            assert error(parts[0].out, parts[1].out) <= 1e-3
            assert torch.allclose(parts[0].lse, parts[1].lse, atol=2e-3)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("count", "other"), [(1, 1), (130, 128), (128, 300), (5, 257)])
def test_attention_to_all_keys_equals_dense_attention(count: int, other: int, biased: bool):
    q, k, v = (normal(2, 3, n, E, seed=n + i) for i, n in enumerate((count, other, other)))
    bias = 2 * normal(1, 3, other, seed=5) if biased else None
    with poison():
        part = Partial(*kernels.attend_all(q, k, v, bias, "triton"))
    truth = dense_reference(q, k, v, bias=None if bias is None else bias.expand(2, 3, -1), lse=True)
    check(part, truth, torch.float32)


# selection


def select(q: Summary, k: Summary, queries: Layout, keys: Layout, rule: Selection) -> BlockList:
    with poison():
        return BlockList(
            *kernels.select_blocks(
                q.means, k.means, q.alike, k.alike, keys.starts, keys.kept, queries.places, keys.places,
                rule.budget(keys.free), rule,
            )
        )  # fmt: skip


def same(found: BlockList, expected: BlockList) -> None:
    assert torch.equal(found.counts, expected.counts)
    assert rows(found) == rows(expected)
    assert found.blocks.dtype == found.counts.dtype == torch.int32


@pytest.mark.parametrize("name", RULES)
def test_the_kernel_selects_what_torch_selects(name: str):
    rule = RULES[name]
    queries, keys = CASES["chunk and history"]
    x = [normal(1, 2, layout.tokens, E, seed=i) for i, layout in enumerate((queries, keys))]
    guarded = rule.guard is not None
    q, k = (summarise(t, layout, alike=guarded) for t, layout in zip(x, (queries, keys), strict=True))
    expected = choose(score(q, k, keys, rule), q, k, queries, keys, rule)
    same(select(q, k, queries, keys, rule), expected)


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("name", ["mean, mass", "cosine, smooth", "parts, keep", "mass, keep", "mass, all of it"])
def test_many_blocks_are_selected_from_in_several_programs_and_chunks(name: str, parts: int):
    rule = RULES[name]
    queries = boxes((1, 6, 11), (1, 2, 2))
    keys = join([boxes((7, 6, 5), (1, 2, 2)), runs(3 * 128), runs(9).always()])
    assert queries.blocks > kernels.ROWS
    assert keys.blocks == 67
    q, k = (
        Summary(normal(1, 1, layout.blocks, parts, E, seed=i), normal(1, 1, layout.blocks, seed=i + 9).sigmoid())
        for i, layout in enumerate((queries, keys))
    )
    expected = choose(score(q, k, keys, rule), q, k, queries, keys, rule)
    same(select(q, k, queries, keys, rule), expected)


@EACH_CASE
def test_a_kernel_selects_in_every_layout(case: tuple[Layout, Layout]):
    queries, keys = case
    for rule in (Selection(keep=0.5), Selection("mass", mass=0.5)):
        q, k = (summarise(normal(1, 2, t.tokens, E, seed=i), t) for i, t in enumerate(case))
        same(select(q, k, queries, keys, rule), choose(score(q, k, keys, rule), q, k, queries, keys, rule))


@pytest.mark.parametrize("way", [{"keep": 0.5}, {"mass": 0.4}], ids=["keep", "mass"])
def test_of_equal_scores_the_kernel_takes_smaller_numbers(way: dict[str, Any]):
    queries, keys, rule = runs(200), join([runs(7 * 128), runs(128).always()]), Selection("mass", **way)
    q, k = (Summary(torch.ones(1, 1, t.blocks, 4, E)) for t in (queries, keys))
    count = 3  # of 0.4, one eighth is there without choosing
    assert rows(select(q, k, queries, keys, rule)) == {(0, 0, i): [*range(count), 7] for i in range(2)}


def test_the_kernel_lists_a_block_even_for_no_share_of_attention():
    queries, keys, rule = runs(200), runs(5 * 128), Selection("mass", mass=0.0)
    q, k = (Summary(normal(1, 2, t.blocks, 4, E, seed=i)) for i, t in enumerate((queries, keys)))
    assert int(select(q, k, queries, keys, rule).counts[..., 1].min()) >= 1


def test_summaries_of_half_precision_are_selected_by():
    """Products of half precision are exact in float32, so choices are the same."""
    queries, keys = CASES["chunk and history"]
    x, y = (normal(1, 2, t.tokens, E, seed=i, dtype=torch.float16) for i, t in enumerate((queries, keys)))
    for rule in (Selection(keep=0.4), Selection("mass", keep=0.4), Selection("cosine", keep=0.4, smooth=True)):
        q, k = summarise(x, queries), summarise(y, keys)
        same(select(q, k, queries, keys, rule), choose(score(q, k, keys, rule), q, k, queries, keys, rule))


# preparation


SPAN = serpentine((2, 9, 11), (2, 8, 8))
AT, BLOCK_AT, ROOM, BLOCK_ROOM = 20, 2, SPAN.tokens + 50, SPAN.blocks + 3
"""Where the span lies in a cache that holds more."""


def preparations(batch: int, heads: int) -> dict[str, Preparation]:
    of = 6 * torch.rand(batch, SPAN.tokens, E // 2, generator=torch.Generator().manual_seed(3))
    angles, each, own = turning(of.cos(), of.sin()), normal(E, seed=7), normal(heads, E, seed=8)
    return {
        "nothing": Preparation(),
        "norm": Preparation(each),
        "norm of each head": Preparation(own, eps=0.1),
        "pairs side by side": Preparation(None, angles[0]),
        "pairs of halves": Preparation(None, angles[0], interleaved=False),
        "norm, then angles of each world": Preparation(own, angles),
        "half precision": Preparation(own.half(), angles.half(), interleaved=False),
        "angles within a wider table": Preparation(None, angles.repeat(1, 1, 2)[..., :E]),
    }


def prepare(
    x: Tensor, v: Tensor | None, how: Preparation, parts: int, alike: bool = True
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Into the middle of a cache without numbers."""
    batch, heads = x.shape[:2]
    out = torch.full((batch, heads, ROOM, E), torch.nan, dtype=x.dtype)
    v_out = None if v is None else out.clone()
    means = torch.full((batch, heads, BLOCK_ROOM, parts, E), torch.nan, dtype=x.dtype)
    units = torch.full(means.shape, torch.nan) if alike else None
    kernels.prepare_blocks(
        x, v, how.weight, how.angles, SPAN.order, SPAN.starts, out, v_out, means, units, AT, BLOCK_AT,
        how.interleaved, how.eps,
    )  # fmt: skip
    return out, v_out, means, units


def only(t: Tensor, first: int, count: int) -> Tensor:
    """The part [B, H, count, ...] that was to be written, once all around it is seen to be left as it was."""
    assert bool(t[:, :, :first].isnan().all())
    assert bool(t[:, :, first + count :].isnan().all())
    return t[:, :, first : first + count]


@pytest.mark.parametrize(("dtype", "parts"), [(torch.float32, 1), (torch.float16, 4)], ids=str)
@pytest.mark.parametrize("name", preparations(1, 1))
def test_the_kernel_prepares_what_torch_prepares(name: str, dtype: torch.dtype, parts: int):
    batch, heads = 2, 3
    packed = normal(batch, SPAN.tokens, 3, heads, E, dtype=dtype)
    _, x, v = (t.transpose(1, 2) for t in packed.unbind(2))
    how = preparations(batch, heads)[name]
    how.check(x)
    out, v_out, means, units = prepare(x, v, how, parts, alike=dtype == torch.float32)
    assert v_out is not None
    ready = how(x)[:, :, SPAN.order]
    bound = 1e-6 if dtype == torch.float32 else 5e-4
    assert error(only(out, AT, SPAN.tokens), ready) < bound
    assert torch.equal(only(v_out, AT, SPAN.tokens), v[:, :, SPAN.order])
    assert error(only(means, BLOCK_AT, SPAN.blocks), summarise(ready, SPAN, parts).means) < bound
    if units is not None:
        assert error(only(units, BLOCK_AT, SPAN.blocks), unit_sums(ready, SPAN, parts)) < bound


@pytest.mark.parametrize("heads", [1, 2, 4, 5, 6])
def test_any_number_of_heads_is_prepared(heads: int):
    x, how = normal(1, heads, SPAN.tokens, E), preparations(1, heads)["norm of each head"]
    out, _, means, units = prepare(x, None, how, 4)
    assert units is not None
    ready = how(x)[:, :, SPAN.order]
    assert error(only(out, AT, SPAN.tokens), ready) < 1e-6
    assert error(only(means, BLOCK_AT, SPAN.blocks), summarise(ready, SPAN, 4).means) < 1e-6
    assert error(only(units, BLOCK_AT, SPAN.blocks), unit_sums(ready, SPAN, 4)) < 1e-6


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_blocks_of_few_tokens_are_prepared(parts: int):
    layout = join([runs(3), runs(130), runs(1), runs(5)])
    x = normal(1, 1, layout.tokens, E)
    out = torch.full_like(x, torch.nan)
    means, units = (torch.full((1, 1, layout.blocks, parts, E), torch.nan) for _ in range(2))
    kernels.prepare_blocks(x, None, None, None, layout.order, layout.starts, out, None, means, units, 0, 0, True, 1e-6)
    assert torch.equal(out, x)
    assert torch.allclose(means, summarise(x, layout, parts).means, atol=1e-6)
    assert torch.allclose(units, unit_sums(x, layout, parts), atol=1e-5)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("alike", [False, True])
def test_a_cache_by_the_kernel_is_the_cache_by_torch(alike: bool, monkeypatch: pytest.MonkeyPatch):
    spans = [boxes((3, 9, 11), (2, 8, 8)), SPAN.always(), runs(9).always()]

    def written() -> tuple[KeyCache, Blocks]:
        with poison():
            cache = KeyCache(spans, 2, 3, E, torch.float32, alike=alike)
            for span, layout in enumerate(spans):
                cache.write(span, *normal(2, 2, 3, layout.tokens, E, seed=span), Preparation(normal(3, E, seed=9)))
            return cache, prepare_queries(normal(2, 3, SPAN.tokens, E), SPAN, Preparation(normal(E)), alike=alike)

    (ours, queries), _ = written(), monkeypatch.setattr(ops, "usable", lambda how, x: "torch is asked")
    theirs, others = written()
    assert error(ours.k, theirs.k) < 1e-6
    assert torch.equal(ours.v, theirs.v)
    assert error(queries.x, others.x) < 1e-6
    for a, b in ((ours.summary, theirs.summary), (queries.summary, others.summary)):
        assert error(a.means, b.means) < 1e-6
        assert (a.alike is None) == (b.alike is None) == (not alike)
        if a.alike is not None:
            assert b.alike is not None
            assert torch.allclose(a.alike, b.alike, atol=1e-6)


@pytest.mark.usefixtures("interpreted")
def test_angles_of_all_worlds_are_taken():
    x, angles = normal(3, 2, SPAN.tokens, E), preparations(1, 2)["pairs side by side"].angles
    assert angles is not None
    how = Preparation(None, angles[None])
    assert error(prepare_queries(x, SPAN, how).x, how(x)[:, :, SPAN.order]) < 1e-6


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("kind", ["weights", "weights of heads", "values"])
def test_tables_and_values_in_other_places_of_memory_are_taken_or_refused(kind: str):
    """Nothing is read as if it lay where it does not."""
    x, v = normal(2, 3, SPAN.tokens, E), normal(2, 3, SPAN.tokens, E, seed=1)
    weight = {"weights": normal(E, 2)[:, 0], "weights of heads": normal(E, 3).T, "values": None}[kind]
    if kind == "values":
        v = v.mT.contiguous().mT
    how, cache = Preparation(weight), KeyCache([SPAN], 2, 3, E, torch.float32)
    try:
        cache.write(0, x, v, how)
    except InputError as refused:
        assert "innermost" in str(refused)
    else:
        assert error(cache.k, how(x)[:, :, SPAN.order]) < 1e-6
        assert torch.equal(cache.v, v[:, :, SPAN.order])


# operators


def meta(*given: Any) -> list[Any]:
    return [t.to("meta") if isinstance(t, Tensor) else t for t in given]


def alike_in_memory(fakes: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
    """Sizes, strides and precisions of what an operator's fake promises and of what it makes."""
    for fake, real in zip(fakes, made, strict=True):
        assert fake.device.type == "meta"
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("natural", [False, True])
def test_attentions_fake_promises_what_it_makes(natural: bool, biased: bool):
    queries, keys = CASES["ragged boxes"]
    given, found = inputs(queries, keys, torch.float16), some_blocks(queries, keys)
    packed = given[0].transpose(1, 2).contiguous().transpose(1, 2)
    for q in (given[0], packed):
        all_of = (
            q, *given[1:], found.blocks, found.counts, queries.starts, keys.starts, queries.order if natural else None,
            torch.zeros(keys.tokens) if biased else None, "triton",
        )  # fmt: skip
        alike_in_memory(ops.attend_listed(*meta(*all_of)), kernels.attend_listed(*all_of))


def test_dense_attentions_fake_promises_what_it_makes():
    q, k, v = inputs(runs(20), runs(150), torch.float16)
    for of in (q, q.transpose(1, 2).contiguous().transpose(1, 2)):
        given = (of, k, v, None, "triton")
        alike_in_memory(ops.attend_all(*meta(*given)), kernels.attend_all(*given))


def test_selections_fake_promises_what_it_makes():
    queries, keys = CASES["chunk and history"]
    for name in ("mean, keep", "mass, all of it"):
        rule = RULES[name]
        q, k = (summarise(normal(2, 3, t.tokens, E), t, alike=rule.guard is not None) for t in (queries, keys))
        tables = (q.means, k.means, q.alike, k.alike, keys.starts, keys.kept, queries.places, keys.places, 3)
        plain = (rule.score, rule.keep, rule.mass, rule.smooth, rule.guard, rule.neighbours)
        alike_in_memory(ops.select_blocks(*meta(*tables), *plain), kernels.select_blocks(*tables, rule))


def test_preparation_says_what_it_writes_and_gives_nothing():
    schema = torch.ops.worldstride.prepare_blocks.default._schema
    written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    assert written == {"out", "v_out", "means", "units"}
    x, layout = normal(1, 2, 150, E), runs(150)
    buffers = (torch.empty_like(x), torch.empty_like(x), torch.empty(1, 2, 2, 4, E), None)
    given = (x, x, None, None, layout.order, layout.starts, *buffers, 0, 0, True, 1e-6)
    assert ops.prepare_blocks(*meta(*given)) is None


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "rule", [Selection(keep=0.4, neighbours=1), Selection("mass", mass=0.7, guard=0.0)], ids=["keep", "mass"]
)
def test_a_step_is_one_graph_and_equals_itself_uncompiled(rule: Selection):
    """What prepares, chooses and attends hides nothing from the compiler, cache included."""
    queries, history = serpentine((2, 9, 11), (2, 8, 8)), boxes((3, 9, 11), (2, 8, 8))
    alike = rule.guard is not None
    cache = KeyCache([history, queries.always()], 1, 2, E, torch.float16, alike=alike)
    cache.write(0, *normal(2, 1, 2, history.tokens, E, seed=1, dtype=torch.float16))
    of = 6 * torch.rand(queries.tokens, E // 2)
    how = Preparation(normal(E, seed=7), turning(of.cos(), of.sin()))

    def step(packed: Tensor) -> Partial:
        q, k, v = (t.transpose(1, 2) for t in packed.unbind(2))
        ready = prepare_queries(q, queries, how, alike=alike)
        cache.write(1, k, v, how)
        found = selection.select(ready.summary, cache.summary, queries, cache.layout, rule)
        return sparse.attend_blocks(ready.x, cache.k, cache.v, found, queries, cache.layout)

    given = [normal(1, queries.tokens, 3, 2, E, seed=i, dtype=torch.float16) for i in (2, 3)]
    truths = [step(packed) for packed in given]
    assert not torch.equal(truths[0].out, truths[1].out)
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for packed, truth in zip(given, truths, strict=True):
        cache.k[:, :, history.tokens :] = torch.nan
        part = compiled(packed)
        assert bool(part.out.isfinite().all())
        assert torch.equal(part.out, truth.out)
        assert torch.equal(part.lse, truth.lse)
    torch.compiler.reset()
