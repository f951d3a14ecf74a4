"""Which blocks are attended to: hand-made cases with a known answer, and what holds for every list."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attending import layouts, normal, rows, rules
from worldstride.attention.layout import BLOCK, Layout, boxes, join, runs, serpentine
from worldstride.attention.selection import (
    PARTS,
    BlockList,
    Score,
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
    unit_sums,
)
from worldstride.errors import InputError

SCORES: list[Score] = ["mean", "cosine", "parts", "mass"]


def summary(means: Any, alike: float | list[float] = 1.0) -> Summary:
    """Of one head, from means [M, S, E] or [M, E]."""
    of = torch.as_tensor(means, dtype=torch.float32)
    of = of[:, None] if of.ndim == 2 else of
    return Summary(of[None, None], torch.as_tensor(alike, dtype=torch.float32).expand(1, 1, len(of)))


def random_summary(blocks: int, seed: int = 0, parts: int = PARTS, channels: int = 16) -> Summary:
    return Summary(normal(1, 2, blocks, parts, channels, seed=seed), normal(1, 2, blocks, seed=seed + 100).sigmoid())


def chosen(scores: list[float] | Tensor, rule: Selection, keys: Layout, queries: Layout | None = None) -> list[int]:
    """What one head's first block of queries attends to, by scores [Mk] or [Mq, Mk]."""
    queries = queries or runs(1)
    of = torch.as_tensor(scores, dtype=torch.float32).expand(1, 1, queries.blocks, keys.blocks)
    blank = [summary(torch.zeros(layout.blocks, 1, 1)) for layout in (queries, keys)]
    return rows(choose(of, *blank, queries, keys, rule))[0, 0, 0]


def table(found: BlockList) -> Tensor:
    """Which blocks are listed, bool [B, H, Mq, Mk]."""
    there = torch.arange(found.blocks.shape[-1]) < found.counts[..., 1:]
    return torch.zeros(found.blocks.shape, dtype=torch.bool).scatter(-1, found.blocks.long(), there)


# scores


def test_each_score_finds_what_it_looks_for():
    """One head, one block of queries of which three parts look along the first axis and one far along the second."""
    queries = torch.tensor([[1.0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 9, 0, 0]])  # [S, E]
    blocks = {
        "away": [[0.0, 0, 0, 5]] * 4,
        "long": [[3.0, 0, 9, 0]] * 4,  # the greatest product of means: 3 * 0.75 + 0 * 2.25
        "alike": [[0.1, 0.3, 0, 0]] * 4,  # exactly where the mean query looks
        "one part": [[0.0, 4, 0, 0], [0, -4, 0, 0], [-1, 0, 0, 0], [-1, 0, 0, 0]],  # cancels out in the mean
    }
    keys = torch.tensor(list(blocks.values()))
    layout = runs(4 * BLOCK)
    found = {}
    for of in SCORES:
        rule = Selection(of, keep=0.25)
        scores = score(summary(queries[None]), summary(keys), layout, rule)
        assert scores.shape == (1, 1, 1, 4)
        assert scores.dtype == torch.float32
        found[of] = list(blocks)[chosen(scores[0, 0], rule, layout)[0]]
    assert found == {"mean": "long", "cosine": "alike", "parts": "one part", "mass": "long"}


def by_hand(of: Score, queries: Tensor, keys: Tensor, sizes: list[int], smooth: bool) -> Tensor:
    """Scores [Mq, Mk] in float64 from means [M, S, E], one pair of blocks after the other."""
    q, k = queries.double(), keys.double()
    if smooth:
        k = k - sum(mean.mean(0) * n for mean, n in zip(k, sizes, strict=True)) / sum(sizes)
    out = torch.zeros(len(q), len(k), dtype=torch.float64)
    each = torch.zeros(len(q), q.shape[1], len(k), dtype=torch.float64)  # attention that a part of queries predicts
    for i, j in product(range(len(q)), range(len(k))):
        dots = q[i] @ k[j].T / q.shape[2] ** 0.5
        each[i, :, j] = dots.exp().sum(1) * sizes[j] / k.shape[1]
        if of == "mean":
            out[i, j] = dots.mean()
        elif of == "cosine":
            a, b = q[i].mean(0), k[j].mean(0)
            out[i, j] = a @ b / (a.norm() * b.norm())
        elif of == "parts":
            out[i, j] = each[i, :, j].sum().log()
    return (each / each.sum(2, keepdim=True)).mean(1) if of == "mass" else out


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("of", SCORES)
def test_scores_are_what_they_are_said_to_be(of: Score, smooth: bool, parts: int):
    layout = runs(4 * BLOCK + 17)
    rule = Selection(of, smooth=smooth)
    queries, keys = random_summary(3, parts=parts), random_summary(5, 1, parts)
    found = score(queries, keys, layout, rule)
    for head in range(2):
        truth = by_hand(of, queries.means[0, head], keys.means[0, head], layout.sizes.tolist(), smooth)
        assert torch.allclose(found[0, head].double(), truth, atol=1e-5)


@pytest.mark.parametrize("smooth", [False, True])
def test_predicted_shares_of_attention_sum_to_one(smooth: bool):
    found = score(random_summary(4), random_summary(6, 1), runs(700), Selection("mass", smooth=smooth))
    assert bool((found > 0).all())
    assert torch.allclose(found.sum(-1), torch.ones(1, 2, 4))


def test_uniform_keys_get_shares_by_their_tokens():
    layout = runs(2 * BLOCK + 32)
    keys = Summary(torch.ones(1, 2, 3, PARTS, 16))
    found = score(random_summary(2), keys, layout, Selection("mass"))
    assert torch.allclose(found, torch.tensor([128.0, 128, 32]).expand(1, 2, 2, 3) / 288)


def test_smoothing_changes_no_choice_by_the_product_of_means():
    layout = runs(20 * BLOCK + 5)
    queries, keys = random_summary(6), random_summary(21, 1)
    found = []
    for smooth in (False, True):
        rule = Selection("mean", keep=0.3, smooth=smooth)
        found.append(choose(score(queries, keys, layout, rule), queries, keys, runs(700), layout, rule))
    assert torch.equal(table(found[0]), table(found[1]))


@pytest.mark.parametrize("of", SCORES)
def test_smoothed_scores_do_not_notice_what_all_keys_have_in_common(of: Score):
    layout, rule = runs(5 * BLOCK + 40), Selection(of, smooth=True)
    queries, keys = random_summary(3), random_summary(6, 1)
    moved = keys._replace(means=keys.means + 3 * normal(16, seed=9))
    assert torch.allclose(*(score(queries, k, layout, rule) for k in (keys, moved)), atol=2e-5)
    if of != "mass":  # whose softmax does not notice anyhow
        plain = Selection(of)
        assert not torch.allclose(*(score(queries, k, layout, plain) for k in (keys, moved)), atol=0.1)


# how many


@pytest.mark.parametrize(
    ("keep", "blocks", "least", "count"),
    [(0.5, 5, 1, 2), (0.25, 7, 1, 1), (0.29, 100, 1, 29), (0.3, 10, 1, 3), (0, 5, 1, 1), (0.1, 5, 3, 3), (0.2, 2, 9, 2),
     (1, 4, 1, 4), (0.99, 4, 1, 3)],
)  # fmt: skip
def test_a_share_is_rounded_down_to_no_fewer_than_the_least(keep: float, blocks: int, least: int, count: int):
    rule = Selection(keep=keep, least=least)
    scores = torch.arange(blocks).flip(0).float()
    assert chosen(scores, rule, runs(blocks * BLOCK)) == list(range(count))
    assert rule.budget(blocks) == count


def test_the_best_scores_are_chosen():
    assert chosen([0.1, 5, -2, 3, 4], Selection(keep=0.6), runs(5 * BLOCK)) == [1, 3, 4]
    assert chosen([-5.0, -1, -torch.inf, -3, -4], Selection(keep=0.4), runs(5 * BLOCK)) == [1, 3]


def test_of_equal_scores_smaller_numbers_are_chosen():
    assert chosen([1.0] * 5, Selection(keep=0.6), runs(5 * BLOCK)) == [0, 1, 2]
    assert chosen([1.0, 2, 1, 2, 1], Selection(keep=0.6), runs(5 * BLOCK)) == [0, 1, 3]
    shares = torch.tensor([0.25, 0.125, 0.25, 0.125, 0.25])
    assert chosen(shares, Selection("mass", mass=0.5), runs(5 * BLOCK)) == [0, 2]


def test_what_the_layout_keeps_is_listed_and_not_counted():
    keys = join([runs(4 * BLOCK), runs(2 * BLOCK).always()])
    assert chosen([1.0, 3, 2, 0, -9, 9], Selection(keep=0.5), keys) == [1, 2, 4, 5]
    assert chosen([1.0, 3, 2, 0, -9, 9], Selection(keep=0), keys) == [1, 4, 5]
    only = runs(2 * BLOCK).always()
    assert chosen([0.0, 1], Selection(keep=0), only) == [0, 1]
    assert Selection(keep=1, least=3).budget(only.free) == 0


def test_guarded_blocks_come_in_addition():
    keys, queries, rule = runs(5 * BLOCK), runs(2 * BLOCK), Selection(keep=0.4, guard=0.3)
    k = summary(torch.zeros(5, 1), [0.9, 0.2, 0.3, 0.9, 0.9])  # less alike, not as much
    q = summary(torch.zeros(2, 1), [0.5, 0.1])
    scores = torch.tensor([1.0, 9, 2, 3, 4]).expand(1, 1, 2, 5)
    found = rows(choose(scores, q, k, queries, keys, rule))
    assert found == {(0, 0, 0): [1, 3, 4], (0, 0, 1): [0, 1, 2, 3, 4]}


def test_neighbours_come_first_and_count():
    grid, tile = (2, 4, 6), (1, 2, 2)
    queries, keys = boxes((1, 4, 6), tile), join([boxes(grid, tile), runs(3)])
    assert keys.blocks == 13
    scores = torch.arange(13).float()  # the last are the best
    near = neighbours(queries, keys, 1)[0]
    assert near.nonzero().flatten().tolist() == [0, 1, 3, 6]  # right, below, and the same place one latent later
    rule = Selection(keep=6 / 13, neighbours=1)
    assert sorted(chosen(scores, rule, keys, queries)) == [0, 1, 3, 6, 11, 12]
    rule = Selection(keep=3 / 13, neighbours=1)
    assert chosen(scores, rule, keys, queries) == [0, 1, 3]  # no more than the share
    rule = Selection("mass", mass=0.3, neighbours=1)
    assert set(chosen(scores.softmax(0), rule, keys, queries)) == {0, 1, 3, 6, 12}


def test_neighbours_are_found_by_steps_on_the_grid_of_tiles():
    grid, tile = (4, 6, 9), (2, 3, 3)
    keys = join([boxes(grid, tile), runs(20), boxes((2, 6, 9), tile)])
    for reach in (0, 1, 2, 5):
        found = neighbours(keys, keys, reach)
        for i, j in product(range(keys.blocks), repeat=2):
            a, b = keys.places[i].tolist(), keys.places[j].tolist()
            apart = sum(abs(m - n) for m, n in zip(a, b, strict=True))
            assert bool(found[i, j]) == (apart <= reach and a[0] >= 0 and b[0] >= 0)


@given(st.lists(st.floats(-8, 8), min_size=1, max_size=12), st.floats(0, 1), st.integers(0, 3), st.integers(0, 40))
@settings(max_examples=80, deadline=None)
def test_a_share_of_attention_is_reached_by_the_fewest_blocks(scores: list[float], mass: float, kept: int, tail: int):
    count, blocks = min(kept, len(scores) - 1), len(scores)
    spans = [runs((blocks - count) * BLOCK - (tail if blocks - count else 0))]
    keys = join([*spans, runs(count * BLOCK).always()]) if count else spans[0]
    if keys.blocks != blocks:
        return
    share = torch.tensor(scores).softmax(0)
    found = chosen(share, Selection("mass", mass=mass), keys)
    always = keys.kept.nonzero().flatten().tolist()
    assert set(always) <= set(found)
    others = sorted((float(share[i]) for i in found if i not in always), reverse=True)
    base = float(share[always].sum())
    slack = 1e-5
    assert base + sum(others) >= mass - slack
    if others:
        assert base + sum(others[:-1]) < mass + slack
        left = [float(share[i]) for i in range(blocks) if i not in found]
        assert not left or max(left) <= others[-1]


def test_a_share_of_attention_takes_the_place_of_a_share_of_blocks():
    shares = torch.tensor([0.125, 0.5, 0.25, 0.125])
    assert chosen(shares, Selection("mass", keep=1.0, mass=0.6), runs(4 * BLOCK)) == [1, 2]
    assert chosen(shares, Selection("mass", keep=0.0, mass=1.0), runs(4 * BLOCK)) == [0, 1, 2, 3]


@pytest.mark.parametrize("of", ["mean", "parts", "mass"])
def test_no_list_is_empty_even_for_no_share_of_attention(of: Score):
    """Attention needs at least one block."""
    layout, rule = runs(4 * BLOCK), Selection(of, mass=0.0)
    q, k = random_summary(4), random_summary(4, 1)
    assert int(select(q, k, layout, layout, rule).counts[..., 1].min()) >= 1


@pytest.mark.parametrize("of", ["mean", "parts"])
def test_other_scores_predict_shares_of_attention(of: Score):
    keys, rule = runs(5 * BLOCK + 17), Selection(of, mass=0.7)
    q, k = random_summary(4), random_summary(6, 1)
    scores = score(q, k, keys, rule)
    weight = scores.double().exp() * (keys.sizes if of == "mean" else 1)
    share = weight / weight.sum(-1, keepdim=True)
    found = table(choose(scores, q, k, runs(500), keys, rule))
    held = (share * found).sum(-1)
    assert bool((held >= 0.7 - 1e-6).all())
    assert bool((held - share.masked_fill(~found, torch.inf).amin(-1) < 0.7).all())
    assert bool((share.masked_fill(~found, torch.inf).amin(-1) > share.masked_fill(found, 0).amax(-1)).all())


# lists


@pytest.mark.parametrize("rule", rules().values(), ids=rules().keys())
@pytest.mark.parametrize("case", layouts().values(), ids=layouts().keys())
def test_lists_hold_full_blocks_in_order_and_then_ragged_ones(case: tuple[Layout, Layout], rule: Selection):
    queries, keys = case
    x = [normal(1, 2, layout.tokens, 16, seed=i) for i, layout in enumerate(case)]
    q, k = (summarise(t, layout, alike=rule.guard is not None) for t, layout in zip(x, case, strict=True))
    found = select(q, k, queries, keys, rule)
    again = choose(score(q, k, keys, rule), q, k, queries, keys, rule)
    assert torch.equal(found.blocks, again.blocks)
    assert torch.equal(found.counts, again.counts)
    assert found.blocks.dtype == found.counts.dtype == torch.int32
    assert found.blocks.shape == (1, 2, queries.blocks, keys.blocks)
    assert bool((found.blocks.sort(-1).values == torch.arange(keys.blocks)).all())
    sizes, always = keys.sizes.tolist(), set(keys.kept.nonzero().flatten().tolist())
    for (b, h, i), blocks in rows(found).items():
        full = int(found.counts[b, h, i, 0])
        assert blocks[:full] == sorted(blocks[:full])
        assert blocks[full:] == sorted(blocks[full:])
        assert all((sizes[n] == BLOCK) == (place < full) for place, n in enumerate(blocks))
        assert always <= set(blocks)
        assert blocks
        if rule.mass is None and rule.guard is None:
            assert len(set(blocks) - always) == rule.budget(keys.free)


def test_everything_lists_every_block():
    queries, keys = layouts()["chunk and history"]
    found = everything(2, 3, queries, keys)
    assert bool(table(found).all())
    assert found.counts.shape == (2, 3, queries.blocks, 2)
    assert bool((found.counts == torch.tensor([int((keys.sizes == BLOCK).sum()), keys.blocks])).all())
    assert torch.allclose(density(found, queries, keys), torch.ones(2, 3))


@pytest.mark.parametrize("case", layouts().values(), ids=layouts().keys())
def test_a_table_becomes_a_list_and_density_counts_its_pairs(case: tuple[Layout, Layout]):
    queries, keys = case
    of = normal(2, 3, queries.blocks, keys.blocks) > 0.3
    found = listed(of, keys)
    assert torch.equal(table(found), of)
    pairs = of[:, :, queries.owner][..., keys.owner].double().mean((-2, -1))
    assert torch.allclose(density(found, queries, keys).double(), pairs, atol=1e-6)
    garbage = found.blocks.masked_fill(torch.arange(keys.blocks) >= found.counts[..., 1:], 2**29)
    assert torch.allclose(density(BlockList(garbage, found.counts), queries, keys).double(), pairs, atol=1e-6)


# summaries


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize(
    "layout", [runs(300), join([runs(3), runs(130), runs(1)]), serpentine((3, 5, 7), (2, 4, 4))],
    ids=["runs", "few tokens", "serpentine"],
)  # fmt: skip
def test_a_summary_is_means_of_parts_and_likeness_of_pairs(layout: Layout, parts: int):
    x = normal(2, 3, layout.tokens, 8) + 0.5
    found = summarise(x, layout, parts, alike=True)
    assert found.alike is not None
    assert found.means.shape == (2, 3, layout.blocks, parts, 8)
    assert found.alike.shape == (2, 3, layout.blocks)
    units = unit_sums(x, layout, parts)
    for block, of in enumerate(x.double().split(layout.sizes.tolist(), 2)):
        tokens = of.shape[2]
        for part in range(parts):
            mine = [i for i in range(tokens) if i * parts // tokens == part]
            truth = of[:, :, mine].mean(2) if mine else of.mean(2)
            assert torch.allclose(found.means[:, :, block, part].double(), truth, atol=1e-6)
            unit = torch.nn.functional.normalize(of[:, :, mine], dim=-1).sum(2)
            assert torch.allclose(units[:, :, block, part].double(), unit, atol=1e-5)
        unit = torch.nn.functional.normalize(of, dim=-1)
        pairs = torch.einsum("bhie,bhje->bhij", unit, unit).mean((-2, -1))
        assert torch.allclose(found.alike[:, :, block].double(), pairs, atol=1e-6)


def test_parts_of_a_full_block_are_its_quarters_in_order():
    x = torch.arange(BLOCK).float().view(1, 1, BLOCK, 1)
    assert summarise(x, runs(BLOCK), 4).means.flatten().tolist() == [15.5, 47.5, 79.5, 111.5]


def test_likeness_is_one_where_all_tokens_point_one_way_and_nothing_where_they_cancel():
    layout = runs(3 * BLOCK)
    one_way = torch.rand(BLOCK, 1).add(0.1) * torch.tensor([3.0, 4])
    x = torch.cat([one_way, torch.tensor([1.0, -2]).repeat(64, 1), torch.tensor([-3.0, 6]).repeat(64, 1),
                   torch.zeros(BLOCK, 2)])[None, None]  # fmt: skip
    found = summarise(x, layout, alike=True).alike
    assert found is not None
    assert torch.allclose(found, torch.tensor([1.0, 0, 0]), atol=1e-6)


def test_likeness_is_known_only_where_it_was_asked_for():
    layout, rule = runs(300), Selection(guard=0.5)
    plain, known = (summarise(normal(1, 2, 300, 8), layout, alike=alike) for alike in (False, True))
    assert plain.alike is None
    assert torch.equal(plain.means, known.means)
    select(known, known, layout, layout, rule)
    for pair in ((plain, known), (known, plain)):
        with pytest.raises(InputError, match=r"guard needs to know how alike .* alike=True"):
            select(*pair, layout, layout, rule)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_summaries_are_made_in_float32_and_kept_in_the_inputs_precision(dtype: torch.dtype):
    layout = runs(2 * BLOCK + 9)
    x = (normal(1, 2, layout.tokens, 8) + 40).to(dtype)
    found, wide = (summarise(t, layout, alike=True) for t in (x, x.float()))
    assert found.means.dtype == dtype
    assert found.alike is not None
    assert wide.alike is not None
    assert found.alike.dtype == torch.float32
    assert torch.equal(found.means, wide.means.to(dtype))
    assert torch.allclose(found.alike, wide.alike, atol=1e-5)


# errors


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"score": "median"}, "score must be one of mean, cosine, parts, mass, got 'median'"),
        ({"keep": None}, r"selection\.keep must be .*got None"),
        ({"keep": 1.5}, r"selection\.keep must be .* at most 1, got 1\.5"),
        ({"keep": -0.1}, r"selection\.keep must be .* at least 0.*got -0\.1"),
        ({"keep": float("nan")}, r"selection\.keep must be .*got nan"),
        ({"mass": 2}, r"selection\.mass must be .*got 2"),
        ({"guard": -2}, r"selection\.guard must be .* at least -1.*got -2"),
        ({"least": 0}, r"selection\.least must be .* at least 1, got 0"),
        ({"neighbours": -1}, r"selection\.neighbours must be .* at least 0, got -1"),
        ({"neighbours": 1.0}, r"selection\.neighbours must be .*got 1\.0"),
        ({"score": "cosine", "mass": 0.5}, "mass needs scores that predict attention"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(given: dict[str, Any], text: str):
    with pytest.raises(InputError, match=text):
        Selection(**given)


def test_summaries_that_do_not_fit_are_refused():
    queries, keys, layout, rule = random_summary(2), random_summary(3, 1), runs(300), Selection()
    score(queries, keys, layout, rule)
    with pytest.raises(InputError, match="queries have means of 4 parts of a block, keys of 1: take the same"):
        score(queries, random_summary(3, parts=1), layout, rule)
    with pytest.raises(InputError, match="keys have 3 blocks, their layout 4"):
        score(queries, keys, runs(500), rule)
    with pytest.raises(InputError, match=r"\(1, 1, 2, 4, 16\) and \(1, 2, 3, 4, 16\)"):
        score(Summary(queries.means[:, :1]), keys, layout, rule)
    with pytest.raises(InputError, match=r"\(1, 2, 2, 4, 8\) and \(1, 2, 3, 4, 16\)"):
        score(random_summary(2, channels=8), keys, layout, rule)
    with pytest.raises(InputError, match="table has 5 blocks of keys, the layout 3"):
        listed(torch.ones(1, 1, 1, 5, dtype=torch.bool), layout)
