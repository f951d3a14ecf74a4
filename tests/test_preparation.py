"""Queries, and keys and values, made ready: against the formula written out, and nothing left unwritten."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attending import error, normal, poison
from worldstride.attention.layout import Layout, boxes, join, runs, serpentine
from worldstride.attention.preparation import KeyCache, Preparation, prepare_queries, turning
from worldstride.attention.selection import PARTS, summarise
from worldstride.errors import InputError

LAYOUT = serpentine((3, 5, 7), (2, 4, 4))
SPANS = [boxes((3, 5, 7), (2, 4, 4)), serpentine((2, 5, 7), (2, 4, 4)).always(), runs(9).always()]
BATCH, HEADS, CHANNELS = 2, 3, 16
BOUND = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""One rounding."""


def tokens(layout: Layout, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(BATCH, HEADS, layout.tokens, CHANNELS, seed=seed, dtype=dtype)


def angles(layout: Layout, batch: int = 0) -> Tensor:
    """Cosines and sines side by side, [N, E] or [B, N, E]."""
    of = 6 * torch.rand(*([batch] if batch else []), layout.tokens, CHANNELS // 2)
    return turning(of.cos(), of.sin())


def weights(per_head: bool) -> Tensor:
    return normal(HEADS, CHANNELS, seed=7) if per_head else normal(CHANNELS, seed=7)


def by_hand(x: Tensor, how: Preparation) -> Tensor:
    """The formula in float64: one head's norm after the other, and a rotation as a product of complex numbers."""
    out = x.double().clone()
    for h in range(x.shape[1]):
        if how.weight is not None:
            weight = how.weight if how.weight.ndim == 1 else how.weight[h]
            out[:, h] /= (out[:, h].pow(2).sum(-1, keepdim=True) / x.shape[3] + how.eps).sqrt()
            out[:, h] *= weight.double()
    if how.angles is None:
        return out
    for b in range(x.shape[0]):
        turns = torch.view_as_complex((how.angles if how.angles.ndim == 2 else how.angles[b % len(how.angles)])
                                      .double().unflatten(-1, (-1, 2)).contiguous())  # fmt: skip
        for i in range(x.shape[3] // 2):
            at = [2 * i, 2 * i + 1] if how.interleaved else [i, i + x.shape[3] // 2]
            turned = torch.complex(out[b, :, :, at[0]], out[b, :, :, at[1]]) * turns[:, i]
            out[b, :, :, at] = torch.stack([turned.real, turned.imag], -1)
    return out


def ways(layout: Layout) -> dict[str, Preparation]:
    return {
        "nothing": Preparation(),
        "norm": Preparation(weights(False)),
        "norm of each head": Preparation(weights(True), eps=0.1),
        "pairs side by side": Preparation(None, angles(layout)),
        "pairs of halves": Preparation(None, angles(layout), interleaved=False),
        "norm, then angles of each world": Preparation(weights(True), angles(layout, BATCH)),
        "angles of all worlds": Preparation(weights(False), angles(layout, 1), interleaved=False),
    }


NAMES = pytest.mark.parametrize("name", ways(LAYOUT))
DTYPES = pytest.mark.parametrize("dtype", BOUND, ids=str)


@DTYPES
@NAMES
def test_a_preparation_is_its_formula(name: str, dtype: torch.dtype):
    x, how = tokens(LAYOUT, dtype=dtype), ways(LAYOUT)[name]
    found = how(x)
    assert found.dtype == dtype
    assert error(found, by_hand(x, how)) < BOUND[dtype]
    if name == "nothing":
        assert torch.equal(found, x)


def test_turning_puts_cosines_and_sines_side_by_side():
    cos, sin = torch.tensor([[0.1, 0.2], [0.3, 0.4]]), torch.tensor([[0.5, 0.6], [0.7, 0.8]])
    assert torch.equal(turning(cos, sin), torch.tensor([[0.1, 0.5, 0.2, 0.6], [0.3, 0.7, 0.4, 0.8]]))
    assert turning(cos[None], sin[None]).shape == (1, 2, 4)


@NAMES
def test_half_precision_weights_and_angles_are_widened(name: str):
    x, how = tokens(LAYOUT), ways(LAYOUT)[name]
    half = [None if t is None else t.half() for t in (how.weight, how.angles)]
    narrow = Preparation(*half, interleaved=how.interleaved, eps=how.eps)
    assert error(narrow(x), by_hand(x, narrow)) < BOUND[torch.float32]


@pytest.mark.parametrize("parts", [1, 4])
@DTYPES
@NAMES
def test_queries_come_in_block_order_with_their_summary(name: str, dtype: torch.dtype, parts: int):
    x, how = tokens(LAYOUT, dtype=dtype), ways(LAYOUT)[name]
    with poison():
        found = prepare_queries(x, LAYOUT, how, parts, alike=parts > 1)
    assert found.x.dtype == found.summary.means.dtype == dtype
    assert error(found.x, by_hand(x, how)[:, :, LAYOUT.order]) < BOUND[dtype]
    expected = summarise(found.x, LAYOUT, parts, alike=True)
    assert torch.equal(found.summary.means, expected.means)
    assert (found.summary.alike is None) == (parts == 1)
    if found.summary.alike is not None:
        assert torch.equal(found.summary.alike, expected.alike)


def held(cache: KeyCache) -> list[Tensor]:
    """Keys and values, and what is known of their blocks."""
    return [t for t in (cache.k, cache.v, cache.means, cache.units) if t is not None]


@pytest.mark.parametrize(("parts", "alike"), [(1, True), (4, False), (4, True)])
@DTYPES
def test_a_cache_holds_every_span_at_its_place(dtype: torch.dtype, parts: int, alike: bool):
    with poison():
        cache = KeyCache(SPANS, BATCH, HEADS, CHANNELS, dtype, parts, alike)
    assert bool(cache.k.isnan().all())
    at = 0
    written = torch.zeros(cache.layout.tokens, dtype=torch.bool)
    blocks = torch.zeros(cache.layout.blocks, dtype=torch.bool)
    for span in (1, 0, 2):  # in any order
        layout = SPANS[span]
        how = list(ways(layout).values())[3 + span]
        k, v = tokens(layout, 2 * span, dtype), tokens(layout, 2 * span + 1, dtype)
        cache.write(span, k, v, how)
        at, first = (sum(getattr(s, of) for s in SPANS[:span]) for of in ("tokens", "blocks"))
        some = slice(at, at + layout.tokens)
        written[some], blocks[first : first + layout.blocks] = True, True
        assert error(cache.k[:, :, some], by_hand(k, how)[:, :, layout.order]) < BOUND[dtype]
        assert torch.equal(cache.v[:, :, some], v[:, :, layout.order])
        for t in held(cache):
            there = blocks if t.ndim == 5 else written
            known = t != 0 if t is cache.v else t.isfinite()  # values are zeros before they are written
            assert bool((known == there.view(1, 1, -1, *[1] * (t.ndim - 3))).all())
    assert all(bool(t.isfinite().all()) for t in held(cache))
    whole = summarise(cache.k, cache.layout, parts, alike)
    assert torch.allclose(cache.means.float(), whole.means.float(), atol=2 * BOUND[dtype])
    assert cache.summary.means is cache.means
    assert (cache.summary.alike is None) == (not alike)
    if alike:
        assert torch.allclose(cache.summary.alike, whole.alike, atol=1e-5)


def test_a_span_is_written_again_and_the_others_stay():
    cache = KeyCache(SPANS, BATCH, HEADS, CHANNELS, torch.float32, alike=True)
    for span, layout in enumerate(SPANS):
        cache.write(span, tokens(layout, span), tokens(layout, span + 9))
    before = [t.clone() for t in held(cache)]
    cache.write(1, tokens(SPANS[1], 20), tokens(SPANS[1], 21))
    assert len(before) == 4
    for old, new in zip(before, held(cache), strict=True):
        first, size = ((getattr(s, "blocks" if new.ndim == 5 else "tokens")) for s in SPANS[:2])
        changed = (old != new).flatten(3).any(-1)
        assert bool(changed[:, :, first : first + size].all())
        assert not changed[:, :, :first].any()
        assert not changed[:, :, first + size :].any()


def test_a_cache_says_what_it_holds():
    layout = join(SPANS)
    plain = KeyCache(SPANS, BATCH, HEADS, CHANNELS, torch.bfloat16)
    guarded = KeyCache(SPANS, BATCH, HEADS, CHANNELS, torch.bfloat16, alike=True, joined=layout)
    assert guarded.layout is layout
    assert torch.equal(plain.layout.order, layout.order)
    assert torch.equal(plain.layout.kept, layout.kept)
    pairs, parts = BATCH * HEADS, layout.blocks * PARTS
    assert plain.bytes == pairs * CHANNELS * (2 * 2 * layout.tokens + 2 * parts)
    assert guarded.bytes == plain.bytes + pairs * CHANNELS * 4 * parts


def test_a_cache_keeps_keys_and_values_in_its_own_precision():
    cache = KeyCache(SPANS[:1], BATCH, HEADS, CHANNELS, torch.bfloat16)
    k, v = tokens(SPANS[0]), tokens(SPANS[0], 1)
    cache.write(0, k, v)
    order = SPANS[0].order
    assert torch.equal(cache.k, k[:, :, order].bfloat16())
    assert torch.equal(cache.v, v[:, :, order].bfloat16())
    assert torch.equal(cache.means, summarise(cache.k, SPANS[0]).means)


@NAMES
def test_slices_of_a_packed_projection_are_taken_as_they_are(name: str):
    how = ways(LAYOUT)[name]
    packed = normal(BATCH, LAYOUT.tokens, 3, HEADS, CHANNELS)
    q, k, v = (t.transpose(1, 2) for t in packed.unbind(2))
    assert not q.is_contiguous()
    found, same = (prepare_queries(t, LAYOUT, how) for t in (q, q.contiguous()))
    assert torch.equal(found.x, same.x)
    caches = [KeyCache([LAYOUT], BATCH, HEADS, CHANNELS, torch.float32) for _ in range(2)]
    caches[0].write(0, k, v, how)
    caches[1].write(0, k.contiguous(), v.contiguous(), how)
    for a, b in zip(*(held(c) for c in caches), strict=True):
        assert torch.equal(a, b)


# what cannot be


N = LAYOUT.tokens
ANGLES = angles(LAYOUT)
WRONG_QUERIES: dict[str, tuple[dict[str, Any], str]] = {
    "three dimensions": ({"x": normal(HEADS, N, CHANNELS)}, rf"\[B, H, {N}, E\].*got \({HEADS}, {N}, {CHANNELS}\)"),
    "other tokens": ({"x": normal(1, HEADS, N + 1, CHANNELS)}, rf"\[B, H, {N}, E\].*got \(1, {HEADS}, {N + 1}, "),
    "channels not innermost": (
        {"x": normal(1, HEADS, CHANNELS, N).mT},
        rf"channels innermost, got .* with strides \({HEADS * N * CHANNELS}, {N * CHANNELS}, 1, {N}\)",
    ),
    "weights": ({"weight": torch.ones(15)}, r"norm weights must be \[16\] or \[3, 16\], got \(15,\)"),
    "weights of heads": ({"weight": torch.ones(2, 16)}, r"norm weights must be .*got \(2, 16\)"),
    "angles of other tokens": ({"angles": ANGLES[1:]}, rf"angles must be one of .*got \({N - 1}, 16\)"),
    "angles of half": ({"angles": ANGLES[:, :8]}, rf"angles must be one of \({N}, 16\), .*got \({N}, 8\)"),
    "angles of worlds": ({"angles": ANGLES.expand(3, -1, -1)}, rf"angles must be one of .*got \(3, {N}, 16\)"),
    "angles not innermost": ({"angles": ANGLES.T.contiguous().T}, r"angles must be .*channels innermost"),
}


@pytest.mark.parametrize("name", WRONG_QUERIES)
def test_queries_that_do_not_fit_are_named(name: str):
    wrong, text = WRONG_QUERIES[name]
    good = normal(1, HEADS, N, CHANNELS)
    x = wrong.get("x", good)
    how = {"weight": weights(True), "angles": ANGLES, **{n: t for n, t in wrong.items() if n != "x"}}
    with pytest.raises(InputError, match=text):
        prepare_queries(x, LAYOUT, Preparation(**how))
    with pytest.raises(InputError, match=text):
        KeyCache([LAYOUT], 1, HEADS, CHANNELS, torch.float32).write(0, x, good, Preparation(**how))


def test_keys_and_values_that_do_not_fit_their_cache_are_named():
    cache = KeyCache(SPANS, BATCH, HEADS, CHANNELS, torch.float32)
    k = v = tokens(SPANS[0])
    count = SPANS[0].tokens
    for wrong, text in (
        ({"v": v[..., :8]}, rf"values \(2, 3, {count}, 8\) must be alike and fit the cache's \(2, 3, "),
        ({"v": v[:1]}, rf"keys \(2, 3, {count}, 16\) and values \(1, 3, {count}, 16\)"),
        ({"k": k[:1], "v": v[:1]}, rf"keys \(1, 3, {count}, 16\).*fit the cache"),
        ({"k": k[:, :2], "v": v[:, :2]}, rf"keys \(2, 2, {count}, 16\).*fit the cache"),
        ({"k": k[..., :8], "v": v[..., :8]}, rf"keys \(2, 3, {count}, 8\).*fit the cache"),
        ({"span": 1}, rf"\[B, H, {SPANS[1].tokens}, E\].*got \(2, 3, {count}, 16\)"),
    ):
        with pytest.raises(InputError, match=text):
            cache.write(**{"span": 0, "k": k, "v": v, **wrong})
