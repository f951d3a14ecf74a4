"""Attention to listed blocks, on any device: against one masked softmax in float64."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from attending import BOUND, beyond, error, layouts, normal, rows, shuffled, some_blocks
from worldstride.attention import Partial, merge, ops, sparse, versions
from worldstride.attention import reference as dense_reference
from worldstride.attention.layout import Layout, boxes, join, runs, serpentine
from worldstride.attention.selection import BlockList, Selection, everything, listed, select, summarise
from worldstride.attention.sparse import attend_blocks, cannot, implementation
from worldstride.errors import InputError

CASES = layouts()
EACH_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
FLOAT = torch.float32


def inputs(
    queries: Layout, keys: Layout, dtype: torch.dtype = FLOAT, batch: int = 2, heads: int = 3, channels: int = 32
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (queries.tokens, keys.tokens, keys.tokens)
    q, k, v = (normal(batch, heads, n, channels, seed=i, dtype=dtype) for i, n in enumerate(sizes))
    return q, k, v


def bias_of(kind: str, tokens: int) -> Tensor | None:
    shapes = {"keys": (tokens,), "batch": (2, tokens), "heads": (2, 3, tokens)}
    return None if kind == "none" else 2 * normal(*shapes[kind], seed=5)


def check(part: Partial, truth: Partial, dtype: torch.dtype = FLOAT) -> None:
    """Output and log-sum-exp against the reference; not a number fails."""
    assert part.out.dtype == dtype
    assert part.lse.dtype == FLOAT
    assert error(part.out, truth.out) <= BOUND[dtype]
    off = (part.lse.double() - truth.lse).abs() / (1 + truth.lse.abs())
    assert float(off.max()) <= {FLOAT: 1e-5, torch.float16: 1e-3, torch.bfloat16: 0.012}[dtype]


def untiled(part: Partial, queries: Layout) -> Partial:
    """From block order to natural order."""
    return Partial(*(t[:, :, queries.inverse] for t in part))


@pytest.mark.parametrize("kind", ["none", "keys", "batch", "heads"])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@EACH_CASE
def test_attention_to_listed_blocks_equals_a_masked_softmax(case: tuple[Layout, Layout], dtype: torch.dtype, kind: str):
    queries, keys = case
    given = inputs(queries, keys, dtype)
    found, bias = some_blocks(queries, keys, 2, 3), bias_of(kind, keys.tokens)
    truth = sparse.reference(*given, found, queries, keys, bias)
    part = attend_blocks(*given, found, queries, keys, bias=bias, natural=False)
    check(part, truth, dtype)


@EACH_CASE
def test_heads_have_lists_of_their_own(case: tuple[Layout, Layout]):
    queries, keys = case
    q, k, v = inputs(queries, keys)
    found = some_blocks(queries, keys, 2, 3)
    if keys.free > 2:
        assert len({tuple(of) for of in rows(found).values()}) > 1
    whole = attend_blocks(q, k, v, found, queries, keys, natural=False)
    for b in range(2):
        for h in range(3):
            own = (slice(b, b + 1), slice(h, h + 1))
            of = BlockList(found.blocks[own], found.counts[own])
            truth = sparse.reference(q[own], k[own], v[own], of, queries, keys)
            check(Partial(whole.out[own], whole.lse[own]), truth)


@EACH_CASE
def test_outputs_come_in_natural_or_in_block_order(case: tuple[Layout, Layout]):
    queries, keys = case
    given, found = inputs(queries, keys), some_blocks(queries, keys, 2, 3)
    natural = attend_blocks(*given, found, queries, keys)
    ordered = attend_blocks(*given, found, queries, keys, natural=False)
    assert torch.equal(natural.out[:, :, queries.order], ordered.out)
    assert torch.equal(natural.lse[:, :, queries.order], ordered.lse)


@EACH_CASE
def test_the_order_of_a_list_and_what_lies_behind_it_change_nothing(case: tuple[Layout, Layout]):
    queries, keys = case
    given, found = inputs(queries, keys), some_blocks(queries, keys, 2, 3)
    plain = attend_blocks(*given, found, queries, keys)
    for other in (shuffled(found), shuffled(found, 1), beyond(found)):
        part = attend_blocks(*given, other, queries, keys)
        check(part, plain)
        check(part, untiled(sparse.reference(*given, other, queries, keys), queries))


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@EACH_CASE
def test_everything_is_dense_attention(case: tuple[Layout, Layout], dtype: torch.dtype):
    queries, keys = case
    given = inputs(queries, keys, dtype)
    bias = bias_of("batch", keys.tokens)
    part = attend_blocks(*given, everything(2, 3, queries, keys), queries, keys, bias=bias, natural=False)
    check(part, dense_reference(*given, bias=bias, lse=True), dtype)


def test_the_reference_sees_what_is_listed_and_nothing_else():
    queries, keys = CASES["chunk and history"]
    q, k, v = inputs(queries, keys, batch=1, heads=1)
    found = some_blocks(queries, keys, 1, 1)
    truth = sparse.reference(q, k, v, found, queries, keys)
    starts = keys.starts.tolist()
    for (_, _, block), numbers in rows(found).items():
        some = slice(*queries.starts[block : block + 2].tolist())
        seen = torch.cat([torch.arange(starts[n], starts[n + 1]) for n in numbers])
        own = dense_reference(q[:, :, some], k[:, :, seen], v[:, :, seen], lse=True)
        assert torch.allclose(truth.out[:, :, some], own.out)
        assert torch.allclose(truth.lse[:, :, some], own.lse)


@pytest.mark.parametrize("garbage", [1e4, torch.inf, torch.nan], ids=str)
def test_tokens_of_blocks_that_are_not_listed_never_take_part(garbage: float):
    """Not even where a gap is filled up with them."""
    queries, keys = serpentine((2, 9, 11), (2, 8, 8)), join([boxes((3, 9, 11), (2, 8, 8)), runs(70)])
    q, k, v = inputs(queries, keys)
    table = torch.zeros(2, 3, queries.blocks, keys.blocks, dtype=torch.bool)
    table[..., 1::2] = True  # every second one, the first and the last of which are ragged
    found = listed(table, keys)
    truth = sparse.reference(q, k, v, found, queries, keys)
    hidden = keys.owner % 2 == 0
    k[:, :, hidden], v[:, :, hidden] = garbage, garbage
    check(attend_blocks(q, k, v, found, queries, keys, natural=False), truth)


def test_a_context_without_history_attends_to_what_is_kept():
    queries, keys = CASES["nothing but what is kept"]
    given = inputs(queries, keys)
    q, k = (summarise(t, layout) for t, layout in zip(given, (queries, keys), strict=False))
    found = select(q, k, queries, keys, Selection(keep=0.25))
    assert keys.free == 0
    assert bool((found.counts[..., 1] == keys.blocks).all())
    part = attend_blocks(*given, found, queries, keys, natural=False)
    check(part, dense_reference(*given, lse=True))


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_history_and_chunk_merged_are_both_together(dtype: torch.dtype):
    queries, chunk, history = (make((2, 9, 11), (2, 8, 8)) for make in (serpentine, serpentine, boxes))
    both = join([history, chunk.always()])
    q, k, v = inputs(queries, both, dtype)
    past = some_blocks(queries, history, 2, 3)
    chosen = torch.zeros(2, 3, queries.blocks, both.blocks, dtype=torch.bool)
    for (b, h, i), numbers in rows(past).items():
        chosen[b, h, i, numbers] = True
    chosen[..., history.blocks :] = True
    cut = history.tokens
    parts = [
        attend_blocks(q, k[:, :, :cut], v[:, :, :cut], past, queries, history),
        attend_blocks(q, k[:, :, cut:], v[:, :, cut:], everything(2, 3, queries, chunk), queries, chunk),
    ]
    truth = sparse.reference(q, k, v, listed(chosen, both), queries, both)
    check(merge(*parts), untiled(truth, queries), dtype)


def test_inputs_of_any_strides_are_taken():
    queries, keys = CASES["ragged boxes"]
    found = some_blocks(queries, keys, 2, 3)
    packed = normal(2, keys.tokens, 2, 3, 32)
    k, v = packed.unbind(2)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    q = normal(2, queries.tokens, 3, 32, seed=1).transpose(1, 2)
    bias = normal(keys.tokens, 2, seed=2).T
    part = attend_blocks(q, k, v, found, queries, keys, bias=bias, natural=False)
    check(part, sparse.reference(q, k, v, found, queries, keys, bias))


# what cannot be


Q, K = layouts()["ragged boxes"]
SIX = some_blocks(Q, K, 2, 3)
GOOD = dict(zip("qkv", inputs(Q, K), strict=True))
LONG, MANY = normal(2, 3, K.tokens + 1, 32), f"\\(2, 3, {K.tokens}, 32\\)"
WRONG = {
    "too few queries": (
        {"q": GOOD["q"][:, :, 1:]},
        rf"queries \(2, 3, {Q.tokens - 1}, 32\) hold {Q.tokens - 1} tokens",
    ),
    "too many keys": ({"k": LONG}, rf"keys must be {MANY}.*got \(2, 3, {K.tokens + 1}, 32\)"),
    "heads of keys": ({"k": GOOD["k"][:, :2]}, rf"keys must be {MANY}.*got \(2, 2, {K.tokens}, 32\)"),
    "channels": ({"v": GOOD["v"][..., :16]}, rf"values must be {MANY}.*got \(2, 3, {K.tokens}, 16\)"),
    "precision": ({"v": GOOD["v"].half()}, "values are torch.float16 on cpu, queries torch.float32 on cpu"),
    "device": ({"k": GOOD["k"].to("meta")}, "keys are torch.float32 on meta, queries torch.float32 on cpu"),
    "list of other heads": (
        {"listed": BlockList(SIX.blocks[:, :2], SIX.counts[:, :2])},
        rf"blocks \(2, 3, {Q.blocks}, {K.blocks}\) and counts \(2, 3, {Q.blocks}, 2\), got \(2, 2, {Q.blocks}, ",
    ),
    "list of other keys": (
        {"listed": BlockList(SIX.blocks[..., 1:], SIX.counts)},
        rf"got .*{Q.blocks}, {K.blocks - 1}\)",
    ),
    "counts": ({"listed": BlockList(SIX.blocks, SIX.counts[..., :1])}, rf"and \(2, 3, {Q.blocks}, 1\)"),
    "bias of heads": ({"bias": torch.zeros(2, 1, K.tokens)}, rf"key bias is \[{K.tokens}\].*got \(2, 1, {K.tokens}\)"),
    "bias of queries": ({"bias": torch.zeros(Q.tokens, K.tokens)}, rf"got \({Q.tokens}, {K.tokens}\)"),
    "bias of fewer": ({"bias": torch.zeros(K.tokens - 1)}, rf"got \({K.tokens - 1},\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_inputs_that_do_not_fit_are_named(name: str):
    wrong, text = WRONG[name]
    given = {**GOOD, "listed": SIX, "queries": Q, "keys": K}
    attend_blocks(**given)
    with pytest.raises(InputError, match=text):
        attend_blocks(**{**given, **wrong})


def test_a_cpu_gathers_and_says_why_it_runs_no_kernel():
    q = torch.zeros(2, 3, Q.tokens, 64, dtype=torch.bfloat16)
    k = v = torch.zeros(2, 3, K.tokens, 64, dtype=torch.bfloat16)
    assert implementation(q) == "gather"
    assert cannot(q, "gather") == ""
    for how in ("triton", "gluon"):
        with pytest.raises(InputError, match=f"{how} is not possible here: it needs a CUDA device, .* is on cpu"):
            attend_blocks(q, k, v, SIX, Q, K, using=how)
        assert cannot(q.float(), how) == "it needs float16 or bfloat16, the queries are float32"
        assert cannot(q[..., :32], how) == "it needs heads of 64 or 128 channels, the queries have 32"
    zeros = attend_blocks(q, k, v, SIX, Q, K, using="gather")
    assert not zeros.out.any()


@pytest.mark.parametrize(
    ("how", "version", "capability", "text"),
    [
        ("triton", None, (9, 0), "triton is not installed"),
        ("triton", "of unknown version", (9, 0), r"needs triton 3\.4 or newer, installed is of unknown version"),
        ("triton", "3.3.1", (9, 0), r"needs triton 3\.4 or newer, installed is 3\.3\.1"),
        ("triton", "3.4.0", (7, 5), r"compute capability 8\.0 or higher, the device has 7\.5"),
        ("triton", "3.4.0", (8, 0), "^$"),
        ("triton", "4.0.0", (12, 0), "^$"),
        ("gluon", "3.6.0", (9, 0), "^$"),
        ("gluon", "3.6.0+git1234", (9, 0), "^$"),
        ("gluon", "3.6.0", (8, 9), r"compute capability 9\.x, the device has 8\.9"),
        ("gluon", "3.6.0", (10, 0), r"compute capability 9\.x, the device has 10\.0"),
        ("gluon", "3.5.1", (9, 0), r"triton 3\.6 up to, not with, 3\.8; installed is 3\.5\.1"),
        ("gluon", "3.8.1", (9, 0), r"triton 3\.6 up to, not with, 3\.8; installed is 3\.8\.1"),
        ("gluon", "3.10.0", (9, 0), r"triton 3\.6 up to, not with, 3\.8; installed is 3\.10\.0"),
    ],
)
def test_what_triton_and_device_can_run(
    monkeypatch: pytest.MonkeyPatch, how: str, version: str | None, capability: tuple[int, int], text: str
):
    monkeypatch.setattr(versions, "INSTALLED", version)
    monkeypatch.setattr(versions, "_VERSION", versions._numbers(version))
    assert re.search(text, versions.unusable(how, capability))


def test_an_implementation_is_chosen_by_what_can_run(monkeypatch: pytest.MonkeyPatch):
    q = torch.zeros(1, 1, 1, 64, dtype=torch.float16)
    for can, expected in (({"gluon", "triton"}, "gluon"), ({"triton"}, "triton"), (set(), "gather")):
        monkeypatch.setattr(ops, "usable", lambda how, x, can=can: "" if how in can else "not here")
        assert implementation(q) == expected
        assert implementation(q.float()) == "gather"
