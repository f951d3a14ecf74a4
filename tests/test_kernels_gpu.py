"""The kernels as they run on a GPU: against float64, compiled, captured, and without the host ever waiting."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from attending import beyond, error, layouts, normal, poison, shuffled, some_blocks
from worldstride.attention import Partial, merge, ops, sparse
from worldstride.attention import reference as dense_reference
from worldstride.attention.layout import Layout, boxes, join, runs, serpentine
from worldstride.attention.preparation import KeyCache, Preparation, prepare_queries, turning
from worldstride.attention.selection import (
    BlockList,
    Selection,
    Summary,
    choose,
    density,
    everything,
    listed,
    neighbours,
    score,
    select,
    summarise,
)
from worldstride.attention.sparse import Implementation, attend_blocks, cannot, implementation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
GPU = torch.device("cuda")
BOUND = {torch.bfloat16: 1e-2, torch.float16: 5e-4}
HOWS: list[Implementation] = ["triton", "gluon"]
EACH_HOW = pytest.mark.parametrize("how", HOWS)
DTYPES = pytest.mark.parametrize("dtype", BOUND, ids=str)
CHANNELS = pytest.mark.parametrize("channels", [64, 128])
GRID, TILE = (4, 30, 52), (4, 8, 4)
"""A chunk of HY-WorldPlay, no multiple of its tile."""
CASES = layouts()


def on_gpu(case: tuple[Layout, Layout]) -> tuple[Layout, Layout]:
    return case[0].to(GPU), case[1].to(GPU)


def inputs(
    queries: Layout, keys: Layout, dtype: torch.dtype, channels: int = 128, batch: int = 1, heads: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (queries.tokens, keys.tokens, keys.tokens)
    q, k, v = (normal(batch, heads, n, channels, seed=i, dtype=dtype).to(GPU) for i, n in enumerate(sizes))
    return q, k, v


def need(how: Implementation, q: Tensor) -> None:
    why = cannot(q, how)
    if why:
        pytest.skip(why)


def check(part: Partial, truth: Partial, dtype: torch.dtype) -> None:
    """Output and log-sum-exp against the reference; not a number fails."""
    assert part.out.dtype == dtype
    assert part.lse.dtype == torch.float32
    assert error(part.out, truth.out) <= BOUND[dtype]
    assert float((part.lse.double() - truth.lse).abs().max()) <= 1e-3


def untiled(part: Partial, queries: Layout) -> Partial:
    """From block order to natural order."""
    return Partial(*(t[:, :, queries.inverse] for t in part))


def attend(
    given: tuple[Tensor, Tensor, Tensor], found: BlockList, queries: Layout, keys: Layout, how: Implementation,
    **options: Any,
) -> Partial:  # fmt: skip
    """What is left unwritten is no number."""
    need(how, given[0])
    with poison():
        return attend_blocks(*given, found, queries, keys, using=how, **options)


# attention


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@CHANNELS
@DTYPES
@EACH_HOW
@pytest.mark.parametrize("make", [boxes, serpentine], ids=lambda make: make.__name__)
def test_a_chunk_attends_to_its_history(
    make: Callable[..., Layout], how: Implementation, dtype: torch.dtype, channels: int, biased: bool
):
    chunk = make(GRID, TILE)
    queries, keys = on_gpu((chunk, join([make(GRID, TILE), chunk.always(), runs(70).always()])))
    given = inputs(queries, keys, dtype, channels)
    bias = 2 * normal(1, 2, keys.tokens, seed=5).to(GPU) if biased else None
    found = beyond(some_blocks(queries, keys, 1, 2, 0.25))
    truth = sparse.reference(*given, found, queries, keys, bias)
    check(attend(given, found, queries, keys, how, bias=bias), untiled(truth, queries), dtype)
    check(attend(given, found, queries, keys, how, bias=bias, natural=False), truth, dtype)


@CHANNELS
@DTYPES
@EACH_HOW
@pytest.mark.parametrize("name", CASES)
def test_every_layout_is_attended_to_in_worlds_and_heads_of_their_own(
    name: str, how: Implementation, dtype: torch.dtype, channels: int
):
    queries, keys = on_gpu(CASES[name])
    given = inputs(queries, keys, dtype, channels, batch=2, heads=3)
    found = beyond(some_blocks(queries, keys, 2, 3))
    for shape in (None, (keys.tokens,), (2, keys.tokens), (2, 3, keys.tokens)):
        bias = None if shape is None else 2 * normal(*shape, seed=5).to(GPU)
        truth = sparse.reference(*given, found, queries, keys, bias)
        check(attend(given, found, queries, keys, how, bias=bias), untiled(truth, queries), dtype)


@CHANNELS
@EACH_HOW
def test_a_program_takes_one_tile_after_the_other(how: Implementation, channels: int):
    """More tiles than the GPU has processors, with lists of all lengths."""
    queries, keys = on_gpu((runs(300), join([boxes((9, 8, 16), (1, 8, 16)), boxes((3, 9, 11), (2, 8, 8))])))
    given = inputs(queries, keys, torch.bfloat16, channels, heads=200)
    rows = (1, 200, queries.blocks)
    share = torch.rand(*rows, 1, generator=torch.Generator().manual_seed(2)).to(GPU)
    table = torch.rand(*rows, keys.blocks, generator=torch.Generator().manual_seed(3)).to(GPU) < share
    table[..., 3] |= ~table.any(-1)
    table[:, 5], table[:, 6] = True, False
    table[:, 6, :, -1] = True  # one ragged block alone
    found = beyond(listed(table, keys))
    truth = sparse.reference(*given, found, queries, keys)
    check(attend(given, found, queries, keys, how, natural=False), truth, torch.bfloat16)


@CHANNELS
@DTYPES
@EACH_HOW
def test_all_blocks_are_dense_attention(how: Implementation, dtype: torch.dtype, channels: int):
    queries, keys = on_gpu((serpentine(GRID, TILE), boxes((8, *GRID[1:]), TILE)))
    q, k, v = inputs(queries, keys, dtype, channels, heads=4)
    part = attend((q, k, v), everything(1, 4, queries, keys), queries, keys, how, natural=False)
    dense = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert error(part.out, dense) <= BOUND[dtype]


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@CHANNELS
@DTYPES
@EACH_HOW
@pytest.mark.parametrize(("count", "other"), [(1, 1), (130, 128), (1024, 5000), (3001, 2047)])
def test_attention_to_all_keys_needs_no_list(
    count: int, other: int, how: Implementation, dtype: torch.dtype, channels: int, biased: bool
):
    q, k, v = (normal(2, 3, n, channels, seed=n + i, dtype=dtype).to(GPU) for i, n in enumerate((count, other, other)))
    need(how, q)
    bias = 2 * normal(1, 3, other, seed=5).to(GPU) if biased else None
    with poison():
        part = Partial(*ops.attend_all(q, k, v, bias, how))
    truth = dense_reference(q, k, v, bias=None if bias is None else bias.expand(2, 3, -1), lse=True)
    check(part, truth, dtype)


@EACH_HOW
def test_a_context_without_history_attends_to_what_is_kept(how: Implementation):
    queries, keys = on_gpu(CASES["nothing but what is kept"])
    given = inputs(queries, keys, torch.bfloat16)
    rule = Selection(keep=0.25)
    found = select(*(summarise(t, s) for t, s in zip(given, (queries, keys), strict=False)), queries, keys, rule)
    assert bool((found.counts[..., 1] == keys.blocks).all())
    part = attend(given, found, queries, keys, how, natural=False)
    check(part, sparse.reference(*given, everything(1, 2, queries, keys), queries, keys), torch.bfloat16)


@EACH_HOW
def test_the_order_of_a_list_changes_nothing(how: Implementation):
    queries, keys = on_gpu((runs(200), join([runs(9 * 128), boxes((3, 5, 7), (2, 4, 4))])))
    given, found = inputs(queries, keys, torch.float16), some_blocks(queries, keys)
    truth = sparse.reference(*given, found, queries, keys)
    for seed in range(3):
        part = attend(given, shuffled(found, seed), queries, keys, how, natural=False)
        check(part, truth, torch.float16)


@EACH_HOW
def test_a_call_gives_the_same_bits_again(how: Implementation):
    queries, keys = on_gpu((serpentine(GRID, TILE), boxes((8, *GRID[1:]), TILE)))
    given, found = inputs(queries, keys, torch.bfloat16, heads=8), some_blocks(queries, keys, 1, 8, 0.2)
    first, again = (attend(given, found, queries, keys, how) for _ in range(2))
    assert torch.equal(first.out, again.out)
    assert torch.equal(first.lse, again.lse)


@pytest.mark.parametrize("garbage", [1e4, torch.inf, torch.nan], ids=str)
@EACH_HOW
def test_tokens_of_blocks_that_are_not_listed_never_take_part(how: Implementation, garbage: float):
    """A block with fewer tokens is loaded with those that follow it: of a cache that is half written.

    Values there must be finite for Gluon, as the cache's are; keys may be anything.
    """
    queries, keys = on_gpu((runs(140), join([boxes((3, 5, 7), (2, 4, 4)), runs(128), runs(9)])))
    q, k, v = inputs(queries, keys, torch.bfloat16)
    table = torch.zeros(1, 2, queries.blocks, keys.blocks, dtype=torch.bool, device=GPU)
    table[..., ::2] = True
    found = listed(table, keys)
    truth = sparse.reference(q, k, v, found, queries, keys)
    hidden = keys.owner % 2 == 1
    k[:, :, hidden], v[:, :, hidden] = garbage, garbage if how == "triton" else 1e4
    check(attend((q, k, v), found, queries, keys, how, natural=False), truth, torch.bfloat16)


@EACH_HOW
def test_minus_infinity_hides_a_key_and_where_all_are_hidden_attention_is_zeros(how: Implementation):
    queries, keys = on_gpu((runs(140), runs(3 * 128 + 30)))
    given = inputs(queries, keys, torch.bfloat16)
    bias = torch.zeros(1, 2, keys.tokens, device=GPU)
    bias[:, 0, :128], bias[:, 0, 200::2], bias[:, 1] = -torch.inf, -torch.inf, -torch.inf
    found = everything(1, 2, queries, keys)
    part = attend(given, found, queries, keys, how, bias=bias, natural=False)
    truth = sparse.reference(*given, found, queries, keys, bias)
    check(*(Partial(of.out[:, :1], of.lse[:, :1]) for of in (part, truth)), torch.bfloat16)
    assert not part.out[:, 1].any()
    assert bool((part.lse[:, 1] == -torch.inf).all())


@EACH_HOW
def test_inputs_and_biases_of_any_strides_are_taken(how: Implementation):
    queries, keys = on_gpu((runs(150), runs(150)))
    q, k, v = (t.transpose(1, 2) for t in normal(2, 150, 3, 2, 128, dtype=torch.bfloat16).to(GPU).unbind(2))
    assert not q.is_contiguous()
    found = everything(2, 2, queries, keys)
    wide = 3 * normal(150, 2, seed=5).to(GPU)
    for bias in (None, wide[:, 0], wide[:1, 0].expand(150), wide.T, wide.T.expand(2, 2, 150)):
        truth = sparse.reference(q, k, v, found, queries, keys, bias)
        check(attend((q, k, v), found, queries, keys, how, bias=bias), truth, torch.bfloat16)


@EACH_HOW
def test_history_and_chunk_merged_are_both_together(how: Implementation):
    queries, chunk, history = (make(GRID, TILE).to(GPU) for make in (serpentine, serpentine, boxes))
    both = join([history, chunk])
    q, k, v = inputs(queries, both, torch.bfloat16)
    cut = history.tokens
    parts = [
        attend((q, k[:, :, some], v[:, :, some]), everything(1, 2, queries, of), queries, of, how)
        for some, of in ((slice(cut), history), (slice(cut, None), chunk))
    ]
    truth = sparse.reference(q, k, v, everything(1, 2, queries, both), queries, both)
    check(merge(*parts), untiled(truth, queries), torch.bfloat16)


def test_what_the_device_can_run_is_what_runs():
    q = torch.zeros(1, 1, 1, 128, dtype=torch.bfloat16, device=GPU)
    expected = next(how for how in ("gluon", "triton", "gather") if not cannot(q, how))
    assert implementation(q) == expected
    assert implementation(q.float()) == implementation(q[..., :32]) == "gather"
    queries, keys = on_gpu(CASES["ragged boxes"])
    given, found = inputs(queries, keys, torch.float32, 32), some_blocks(queries, keys)
    part = attend_blocks(*given, found, queries, keys, natural=False)
    assert error(part.out, sparse.reference(*given, found, queries, keys).out) <= 1e-5


# selection


WAYS: dict[str, dict[str, Any]] = {
    "keep": {"keep": 0.2},
    "mass": {"mass": 0.8},
    "smooth": {"keep": 0.2, "smooth": True},
    "guard": {"keep": 0.2, "guard": 0.2},
    "neighbours": {"keep": 0.2, "neighbours": 1},
    "all of it": {"mass": 0.5, "smooth": True, "guard": 0.2, "neighbours": 1},
}
RULES = {
    f"{of}, {name}": Selection(of, **way)  # type: ignore[arg-type]
    for of, (name, way) in product(("mean", "cosine", "parts", "mass"), WAYS.items())
    if of != "cosine" or "mass" not in way
}


def table(found: BlockList) -> Tensor:
    """Which blocks are listed, bool [B, H, Mq, Mk], once every list is seen to be in order."""
    width = found.blocks.shape[-1]
    place = torch.arange(width, device=GPU)
    there = place < found.counts[..., 1:]
    numbers = found.blocks.long().where(there, width)
    assert bool((numbers[there] >= 0).all() & (numbers[there] < width).all())
    for part in (place < found.counts[..., :1], (place >= found.counts[..., :1]) & there):
        both = part[..., 1:] & part[..., :-1]
        assert bool((numbers.diff(dim=-1) > 0)[both].all())  # ascending, and none twice
    return torch.zeros(*found.blocks.shape[:-1], width + 1, dtype=torch.bool, device=GPU).scatter(
        -1, numbers, True
    )[..., :-1]  # fmt: skip


@pytest.mark.parametrize(("channels", "parts"), [(64, 4), (128, 1), (128, 4)])
@pytest.mark.parametrize("name", RULES)
def test_the_kernel_selects_what_torch_selects(name: str, channels: int, parts: int):
    rule = RULES[name]
    queries, keys = on_gpu(
        (
            serpentine(GRID, TILE),
            join([boxes((8, *GRID[1:]), TILE), serpentine(GRID, TILE).always(), runs(70).always()]),
        )
    )
    q, k = (
        Summary(
            normal(2, 4, t.blocks, parts, channels, seed=i, dtype=torch.bfloat16).to(GPU),
            normal(2, 4, t.blocks, seed=i + 9).sigmoid().to(GPU),
        )
        for i, t in enumerate((queries, keys))
    )
    with poison():
        found = select(q, k, queries, keys, rule)
    scores = score(q, k, keys, rule)
    ours, truth = table(found), table(choose(scores, q, k, queries, keys, rule))
    full = (keys.sizes == 128).expand_as(ours)
    assert torch.equal(found.counts, torch.stack([(ours & full).sum(-1), ours.sum(-1)], -1).int())
    always = keys.kept.expand_as(ours).clone()
    if rule.guard is not None:
        assert q.alike is not None
        assert k.alike is not None
        always |= (k.alike < rule.guard)[:, :, None] | (q.alike < rule.guard)[..., None]
    assert bool(ours[always].all())
    assert float((ours & truth).sum() / truth.sum()) > 0.99
    assert float((ours & truth).sum() / ours.sum()) > 0.99
    more = (ours.sum(-1) - truth.sum(-1)).abs()
    assert int(more.max()) <= (0 if rule.mass is None else 1)  # where a share is reached to the last digit
    near = neighbours(queries, keys, rule.neighbours) if rule.neighbours is not None else torch.zeros_like(ours[0, 0])
    ranked = scores if rule.mass is None or rule.score != "mean" else scores + keys.sizes.float().log()
    free = ~always & ~near
    worst = ranked.masked_fill(~(ours & free), torch.inf).amin(-1)
    left = ranked.masked_fill(ours | ~free, -torch.inf).amax(-1)
    assert bool((left <= (1.01 * worst if rule.score == "mass" else worst + 1e-3)).all())


def test_summaries_of_tokens_are_selected_by():
    """As it comes from a preparation, with the share of pairs that a report shows."""
    queries, keys = on_gpu(CASES["chunk and history"])
    x, y = inputs(queries, keys, torch.bfloat16, heads=4)[:2]
    rule = Selection("mass", keep=0.4)
    q = prepare_queries(x, queries)
    cache = KeyCache([keys], 1, 4, 128, torch.bfloat16)
    cache.write(0, y, y)
    found = select(q.summary, cache.summary, queries, keys, rule)
    other = choose(score(q.summary, cache.summary, keys, rule), q.summary, cache.summary, queries, keys, rule)
    assert torch.equal(found.counts[..., 1], other.counts[..., 1])
    assert torch.allclose(density(found, queries, keys), density(other, queries, keys), atol=0.05)


# preparation


def preparations(tokens: int, batch: int, heads: int, channels: int) -> dict[str, Preparation]:
    of = 6 * torch.rand(batch, tokens, channels // 2, generator=torch.Generator().manual_seed(3)).to(GPU)
    angles = turning(of.cos(), of.sin())
    each, own = normal(channels, seed=7).to(GPU), normal(heads, channels, seed=8).to(GPU)
    return {
        "nothing": Preparation(),
        "norm and pairs side by side": Preparation(each.bfloat16(), angles[0]),
        "norm of each head and pairs of halves": Preparation(own, angles[0], interleaved=False, eps=0.1),
        "angles of each world": Preparation(None, angles),
        "angles of all worlds": Preparation(each, angles[:1]),
    }


@pytest.mark.parametrize("parts", [1, 4])
@CHANNELS
@DTYPES
@pytest.mark.parametrize("name", preparations(1, 1, 1, 2) if torch.cuda.is_available() else ["of a GPU"])
def test_the_kernel_prepares_what_torch_prepares(name: str, dtype: torch.dtype, channels: int, parts: int):
    batch, heads = 2, 6
    spans = [boxes((8, *GRID[1:]), TILE).to(GPU), serpentine(GRID, TILE).always().to(GPU), runs(70).always().to(GPU)]
    bound = {torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    with poison():
        cache = KeyCache(spans, batch, heads, channels, dtype, parts, alike=parts > 1)
    at = block = 0
    for span, layout in enumerate(spans):
        packed = normal(batch, layout.tokens, 3, heads, channels, seed=span, dtype=dtype).to(GPU)
        q, k, v = (t.transpose(1, 2) for t in packed.unbind(2))
        how = preparations(layout.tokens, batch, heads, channels)[name]
        cache.write(span, k, v, how)
        some, blocks = slice(at, at + layout.tokens), slice(block, block + layout.blocks)
        with poison():
            ready = prepare_queries(q, layout, how, parts, alike=parts > 1)
        alike = None if cache.summary.alike is None else cache.summary.alike[:, :, blocks]
        for x, out, summary in (
            (q, ready.x, ready.summary),
            (k, cache.k[:, :, some], Summary(cache.means[:, :, blocks], alike)),
        ):
            truth = summarise(out, layout, parts, alike=True)
            assert error(out, how(x)[:, :, layout.order]) < bound
            assert error(summary.means, truth.means) < bound
            assert (summary.alike is None) == (parts == 1)
            if summary.alike is not None:
                assert torch.allclose(summary.alike, truth.alike, atol=1e-4)
        assert torch.equal(cache.v[:, :, some], v[:, :, layout.order])
        at, block = at + layout.tokens, block + layout.blocks
        for t, end in ((cache.k, at), (cache.v, at), (cache.means, block), (cache.units, block)):
            if t is not None:
                assert bool(t[:, :, :end].isfinite().all())
                beyond = t[:, :, end:]  # nothing is written beyond a span
                assert not beyond.any() if t is cache.v else bool(beyond.isnan().all())


# all of it


class Step:
    """What a layer does in a step: its own keys behind the history's, which are there; then it chooses and attends."""

    def __init__(self, how: Implementation, rule: Selection, heads: int = 4, channels: int = 128) -> None:
        self.how, self.rule = how, rule
        self.queries = serpentine((2, 18, 22), (2, 8, 8)).to(GPU)
        self.spans = [boxes((6, 18, 22), (2, 8, 8)).to(GPU), self.queries.always(), runs(70).always().to(GPU)]
        shape = (1, self.queries.tokens, 3, heads, channels)
        self.alike = rule.guard is not None
        self.cache = KeyCache(self.spans, 1, heads, channels, torch.bfloat16, alike=self.alike)
        need(how, self.cache.k)
        for span in (0, 2):
            of = normal(2, 1, heads, self.spans[span].tokens, channels, seed=span, dtype=torch.bfloat16).to(GPU)
            self.cache.write(span, *of)
        self.given = [normal(*shape, seed=i, dtype=torch.bfloat16).to(GPU) for i in (5, 6)]
        of = 6 * torch.rand(self.queries.tokens, channels // 2, generator=torch.Generator().manual_seed(3)).to(GPU)
        self.preparation = Preparation(normal(channels, seed=7).to(GPU), turning(of.cos(), of.sin()))

    def __call__(self, packed: Tensor) -> Partial:
        q, k, v = (t.transpose(1, 2) for t in packed.unbind(2))
        ready = prepare_queries(q, self.queries, self.preparation, alike=self.alike)
        self.cache.write(1, k, v, self.preparation)
        found = select(ready.summary, self.cache.summary, self.queries, self.cache.layout, self.rule)
        return attend_blocks(
            ready.x, self.cache.k, self.cache.v, found, self.queries, self.cache.layout, using=self.how
        )

    def eager(self, packed: Tensor) -> Partial:
        """A copy of the result, from a cache that holds no number where this step writes."""
        first = self.spans[0].tokens
        self.cache.k[:, :, first : first + self.queries.tokens] = torch.nan
        return Partial(*(t.clone() for t in self(packed)))


STEP_RULES = pytest.mark.parametrize(
    "rule", [Selection(keep=0.25, neighbours=1), Selection("mass", mass=0.7, smooth=True, guard=0.0)],
    ids=lambda rule: rule.score,
)  # fmt: skip


def same(found: Partial, truth: Partial) -> None:
    assert bool(truth.out.isfinite().all())
    assert torch.equal(found.out, truth.out)
    assert torch.equal(found.lse, truth.lse)


@STEP_RULES
@EACH_HOW
def test_a_step_compiles_as_one_graph_and_equals_itself_uncompiled(how: Implementation, rule: Selection):
    step = Step(how, rule)
    truths = [step.eager(packed) for packed in step.given]
    assert not torch.equal(truths[0].out, truths[1].out)
    torch.compiler.reset()
    compiled = torch.compile(step.__call__, fullgraph=True)
    for packed, truth in zip(step.given, truths, strict=True):
        step.cache.k[:, :, step.spans[0].tokens :][:, :, : step.queries.tokens] = torch.nan
        same(compiled(packed), truth)
    torch.compiler.reset()


@STEP_RULES
@EACH_HOW
def test_a_captured_step_replays_on_other_inputs(how: Implementation, rule: Selection):
    step = Step(how, rule)
    truths = [step.eager(packed) for packed in step.given]
    static = step.given[0].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        part = step(static)
    for packed, truth in zip(reversed(step.given), reversed(truths), strict=True):
        static.copy_(packed)
        part.out.fill_(torch.nan)
        graph.replay()
        same(part, truth)


@STEP_RULES
@EACH_HOW
def test_the_host_never_waits_for_the_device(how: Implementation, rule: Selection):
    step = Step(how, rule)
    truth = step.eager(step.given[0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        part = step(step.given[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    same(part, truth)


@STEP_RULES
@EACH_HOW
def test_a_step_is_attention_to_what_it_selects(how: Implementation, rule: Selection):
    step = Step(how, rule)
    part = step(step.given[0])
    q = step.given[0].unbind(2)[0].transpose(1, 2)
    ready = prepare_queries(q, step.queries, step.preparation, alike=step.alike)
    keys = step.cache.layout
    found = select(ready.summary, step.cache.summary, step.queries, keys, rule)
    if rule.mass is None:
        assert float(density(found, step.queries, keys).max()) < 1
    truth = sparse.reference(ready.x, step.cache.k, step.cache.v, found, step.queries, keys)
    check(part, untiled(truth, step.queries), torch.bfloat16)


@EACH_HOW
def test_operators_do_what_their_fakes_and_schemas_say(how: Implementation):
    queries, keys = on_gpu(CASES["ragged boxes"])
    q, k, v = inputs(queries, keys, torch.bfloat16)
    need(how, q)
    found, only = some_blocks(queries, keys), ("test_schema", "test_faketensor")
    tables = (found.blocks, found.counts, queries.starts, keys.starts)
    for order, bias in ((None, None), (queries.order, torch.zeros(keys.tokens, device=GPU))):
        given = (q, k, v, *tables, order, bias, how)
        torch.library.opcheck(torch.ops.worldstride.attend_listed.default, given, test_utils=only)
    means = [summarise(t, layout).means for t, layout in ((q, queries), (k, keys))]
    given = (
        *means, None, None, keys.starts, keys.kept, queries.places, keys.places, 2, "mean", 0.25, None,
        False, None, None,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.worldstride.select_blocks.default, given, test_utils=("test_faketensor",))
    buffers = (torch.zeros_like(q), None, torch.zeros_like(means[0]), torch.zeros(means[0].shape, device=GPU))
    given = (q, None, None, None, queries.order, queries.starts, *buffers, 0, 0, True, 1e-6)
    torch.library.opcheck(torch.ops.worldstride.prepare_blocks.default, given, test_utils=only)


def test_kernels_are_used_where_they_can_be():
    q = torch.zeros(1, 1, 1, 128, dtype=torch.bfloat16, device=GPU)
    assert ops.usable("triton", q) == cannot(q, "triton")
    assert ops.usable("triton", q.cpu()) != ""
