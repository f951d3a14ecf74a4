"""Every token is in one block, blocks are as compact as promised, and spans stay apart."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from worldstride.attention.layout import BLOCK, Grid, Layout, boxes, join, runs, serpentine
from worldstride.errors import InputError

GRIDS: list[Grid] = [(4, 30, 52), (8, 22, 40), (5, 22, 40), (19, 6, 9), (3, 30, 52), (1, 1, 1), (2, 1, 9), (7, 9, 2)]
TILES: list[Grid] = [(4, 8, 4), (4, 4, 8), (2, 8, 8), (1, 8, 16), (3, 5, 7), (1, 1, 1), (1, 128, 1)]
ANY_GRID = st.tuples(st.integers(1, 9), st.integers(1, 11), st.integers(1, 13))
ANY_TILE = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5))


def whole(layout: Layout, tokens: int) -> None:
    """Every token is in exactly one block, and whatever a layout says of itself is so."""
    assert layout.tokens == tokens
    assert torch.equal(layout.order.sort().values, torch.arange(tokens))
    assert (layout.order.dtype, layout.starts.dtype, layout.places.dtype) == (torch.int64, torch.int32, torch.int32)
    assert layout.starts[0] == 0
    assert layout.starts[-1] == tokens
    sizes = layout.sizes
    assert len(sizes) == len(layout.kept) == len(layout.places) == layout.blocks
    assert 1 <= int(sizes.min()) <= int(sizes.max()) <= BLOCK
    assert torch.equal(layout.order[layout.inverse], torch.arange(tokens))
    assert torch.equal(layout.inverse[layout.order], torch.arange(tokens))
    for block, (first, last) in enumerate(pairwise(layout.starts.tolist())):
        assert bool((layout.owner[first:last] == block).all())
    assert layout.free == int((~layout.kept).sum())


def coordinates(layout: Layout, grid: Grid) -> list[Tensor]:
    """Latent, row and column of each block's tokens."""
    where = torch.stack(torch.unravel_index(layout.order, grid), 1)
    return list(where.split(layout.sizes.tolist()))


def extent(where: Tensor) -> list[int]:
    return (where.amax(0) - where.amin(0) + 1).tolist()


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_token_of_a_grid_is_in_one_block(grid: Grid, tile: Grid):
    for layout in (boxes(grid, tile), serpentine(grid, tile)):
        whole(layout, grid[0] * grid[1] * grid[2])
        assert not layout.kept.any()
        assert int(layout.sizes.max()) <= tile[0] * tile[1] * tile[2]


@given(grid=ANY_GRID, tile=ANY_TILE)
@settings(max_examples=60, deadline=None)
def test_boxes_are_boxes_at_their_places(grid: Grid, tile: Grid):
    layout = boxes(grid, tile)
    whole(layout, grid[0] * grid[1] * grid[2])
    assert layout.blocks == -(-grid[0] // tile[0]) * -(-grid[1] // tile[1]) * -(-grid[2] // tile[2])
    for where, place in zip(coordinates(layout, grid), layout.places, strict=True):
        first = place * torch.tensor(tile)
        size = torch.minimum(torch.tensor(tile), torch.tensor(grid) - first)
        assert torch.equal(where.amin(0), first)
        assert extent(where) == size.tolist()
        assert len(where) == int(size.prod())  # all that lies between its corners
        natural = (where[:, 0] * grid[1] + where[:, 1]) * grid[2] + where[:, 2]
        assert bool((natural.diff() > 0).all())


@given(grid=ANY_GRID, tile=ANY_TILE)
@settings(max_examples=60, deadline=None)
def test_a_serpentine_fills_its_blocks_and_never_jumps(grid: Grid, tile: Grid):
    layout = serpentine(grid, tile)
    whole(layout, grid[0] * grid[1] * grid[2])
    full = tile[0] * tile[1] * tile[2]
    assert bool((layout.sizes[:-1] == full).all())
    where = torch.stack(torch.unravel_index(layout.order, grid), 1)
    cells = torch.stack([where[:, 0] // tile[0], where[:, 1], where[:, 2] // tile[2]], 1)  # one row of a strip
    strung = torch.unique_consecutive(cells, dim=0)
    assert len(strung) == len(torch.unique(cells, dim=0))  # none is left and entered again
    assert bool((strung.diff(dim=0).abs().sum(1) == 1).all())
    for of, place in zip(where.split(layout.sizes.tolist()), layout.places, strict=True):
        assert torch.equal((of.double().mean(0) / torch.tensor(tile)).floor().int(), place)


@pytest.mark.parametrize("tile", [(4, 8, 4), (4, 4, 8)], ids=str)
@pytest.mark.parametrize("grid", [(4, 30, 52), (8, 30, 52), (4, 22, 40), (16, 22, 40)], ids=str)
def test_blocks_of_a_serpentine_are_compact(grid: Grid, tile: Grid):
    layout = serpentine(grid, tile)
    extents = torch.tensor([extent(where) for where in coordinates(layout, grid)])
    assert bool((extents[:, 0] <= 2 * tile[0]).all())
    assert bool((extents[:, 1] <= 2 * tile[1]).all())  # a strip at the edge may be half as wide
    assert bool((extents[:, 2] <= 2 * tile[2]).all())
    assert float((extents <= torch.tensor([tile[0], tile[1] + 1, tile[2]])).all(1).float().mean()) > 0.6


def test_a_serpentine_wastes_fewer_rows_than_boxes_where_the_grid_is_no_multiple():
    def rows(layout: Layout) -> float:
        """Rows that a kernel works on for every token."""
        return layout.blocks * BLOCK / layout.tokens

    grid, tile = (4, 30, 52), (4, 8, 4)
    assert rows(boxes(grid, tile)) == pytest.approx(1.067, abs=5e-4)
    assert rows(serpentine(grid, tile)) == pytest.approx(1.005, abs=5e-4)
    assert rows(boxes((4, 32, 52), tile)) == rows(serpentine((4, 32, 52), tile)) == 1


@given(tokens=st.integers(1, 600), size=st.integers(1, BLOCK))
@settings(max_examples=60, deadline=None)
def test_runs_are_consecutive(tokens: int, size: int):
    layout = runs(tokens, size)
    whole(layout, tokens)
    assert torch.equal(layout.order, torch.arange(tokens))
    assert layout.sizes.tolist()[:-1] == [size] * (layout.blocks - 1)
    assert bool((layout.places == -1).all())
    assert runs(tokens).blocks == -(-tokens // BLOCK)


def test_joined_spans_stay_apart_and_follow_each_other_in_time():
    parts = [boxes((5, 6, 7), (4, 4, 4)), runs(130), serpentine((3, 6, 7), (2, 4, 4)), boxes((1, 6, 7), (4, 4, 4))]
    joined = join(parts)
    whole(joined, sum(p.tokens for p in parts))
    token = block = 0
    times = []
    for part in parts:
        some = slice(token, token + part.tokens)
        assert torch.equal(joined.order[some], part.order + token)
        assert torch.equal(joined.starts[block : block + part.blocks + 1], part.starts + token)
        places = joined.places[block : block + part.blocks]
        assert torch.equal(places[:, 1:], part.places[:, 1:])
        if part is parts[1]:
            assert bool((places == -1).all())
        else:
            assert len(torch.unique(places[:, 0] - part.places[:, 0])) == 1
            times.append((int(places[:, 0].min()), int(places[:, 0].max())))
        token, block = token + part.tokens, block + part.blocks
    assert [first for first, _ in times] == [0, *(last + 1 for _, last in times[:-1])]


def test_what_is_kept_is_no_longer_free():
    history, chunk = boxes((5, 6, 7), (4, 4, 4)), serpentine((3, 6, 7), (2, 4, 4))
    always = chunk.always()
    assert (history.free, always.free) == (history.blocks, 0)
    assert bool(always.kept.all())
    assert not chunk.kept.any()
    assert torch.equal(always.order, chunk.order)
    joined = join([history, always, runs(9).always(), runs(200)])
    assert joined.free == history.blocks + 2
    assert joined.kept.tolist() == [False] * history.blocks + [True] * (chunk.blocks + 1) + [False] * 2
    whole(joined, history.tokens + chunk.tokens + 209)


def test_one_joined_span_is_itself_and_joining_is_associative():
    a, b, c = boxes((2, 3, 4), (2, 2, 2)), runs(5), serpentine((3, 3, 4), (2, 2, 2)).always()

    def alike(one: Layout, two: Layout) -> bool:
        pairs = [(getattr(one, of), getattr(two, of)) for of in ("order", "starts", "kept", "places")]
        return one.free == two.free and all(torch.equal(x, y) and x.dtype == y.dtype for x, y in pairs)

    assert alike(join([a]), a)
    assert alike(join([join([a, b]), c]), join([a, b, c]))
    assert alike(join([a, join([b, c])]), join([a, b, c]))


def test_a_layout_moves_to_a_device_as_a_whole():
    moved = boxes((2, 3, 4), (2, 2, 2)).to("meta")
    assert {t.device.type for t in (moved.order, moved.starts, moved.kept, moved.places)} == {"meta"}
    assert (moved.tokens, moved.blocks, moved.free) == (24, 4, 4)


@pytest.mark.parametrize("make", [boxes, serpentine], ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    ("grid", "tile", "text"),
    [
        ((0, 3, 4), (1, 1, 1), r"grid must be three positive integers.*got \(0, 3, 4\)"),
        ((2, 3), (1, 1, 1), r"grid must be .*got \(2, 3\)"),
        ((2, 3, 4.0), (1, 1, 1), r"grid must be .*got \(2, 3, 4\.0\)"),
        ((True, 3, 4), (1, 1, 1), r"grid must be .*got \(True, 3, 4\)"),
        ((2, 3, 4), (1, -2, 1), r"tile must be .*got \(1, -2, 1\)"),
        ((2, 3, 4), (1, 1, 1, 1), r"tile must be .*got \(1, 1, 1, 1\)"),
        ((2, 3, 4), (4, 8, 8), r"at most 128 tokens, got \(4, 8, 8\) with 256"),
    ],
)
def test_a_grid_or_tile_that_cannot_be_is_named(make, grid, tile, text: str):
    with pytest.raises(InputError, match=text):
        make(grid, tile)


def test_runs_and_joins_that_cannot_be_are_named():
    with pytest.raises(InputError, match="tokens must be an integer of at least 1, got 0"):
        runs(0)
    with pytest.raises(InputError, match=r"tokens must be .*got 2\.5"):
        runs(2.5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"size must be .*got 0"):
        runs(5, 0)
    with pytest.raises(InputError, match="at most 128 tokens, got 129"):
        runs(500, 129)
    with pytest.raises(InputError, match="at least one layout"):
        join([])
