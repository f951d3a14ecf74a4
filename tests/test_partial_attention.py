"""Attention over parts of the keys, merged, is attention over all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from worldstride.attention import Partial, attend, merge, reference
from worldstride.errors import InputError

SIZES = [(1, 2, 1), (63, 257, 1), (257, 63, 20), (5, 258, 257), (300, 500, 123)]
"""Queries, keys, keys of the first part."""
PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def inputs(queries: int, keys: int, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of 64 channels; scores grow with `scale`."""
    q, k, v = (torch.randn(2, 3, n, 64, generator=torch.Generator().manual_seed(n + i)) for i, n in
               enumerate((queries, keys, keys)))  # fmt: skip
    return (scale * q).to(dtype), k.to(dtype), v.to(dtype)


def parted(q: Tensor, k: Tensor, v: Tensor, cut: int) -> tuple[Partial, Partial]:
    return tuple(attend(q, k[:, :, s], v[:, :, s], lse=True) for s in (slice(cut), slice(cut, None)))  # type: ignore[return-value]


def error(out: Tensor, truth: Tensor) -> float:
    return float((out.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize(("queries", "keys", "cut"), SIZES)
@pytest.mark.parametrize("scale", [1.0, 30.0])
@PRECISIONS
def test_merged_parts_equal_the_whole(queries: int, keys: int, cut: int, scale: float, dtype: torch.dtype):
    q, k, v = inputs(queries, keys, scale, dtype)
    truth, merged = reference(q, k, v, lse=True), merge(*parted(q, k, v, cut))
    assert merged.out.dtype == dtype
    assert merged.lse.dtype == torch.float32
    assert error(merged.out, truth.out) < (1e-5 if dtype == torch.float32 else 0.02)
    off = (merged.lse.double() - truth.lse).abs() / (1 + truth.lse.abs())
    assert float(off.max()) < (2e-6 if dtype == torch.float32 else 0.012)
    if dtype == torch.float32 and scale == 1:
        assert torch.allclose(merged.out.double(), truth.out, atol=2e-6)


@pytest.mark.parametrize(("queries", "keys", "cut"), SIZES)
@pytest.mark.parametrize("scale", [1.0, 30.0])
@PRECISIONS
def test_a_part_is_attention_over_it_with_its_log_sum_exp(
    queries: int, keys: int, cut: int, scale: float, dtype: torch.dtype
):
    q, k, v = inputs(queries, keys, scale, dtype)
    for part, some in zip(parted(q, k, v, cut), (slice(cut), slice(cut, None)), strict=True):
        whole = reference(q, k[:, :, some], v[:, :, some], lse=True)
        assert error(part.out, whole.out) < (1e-5 if dtype == torch.float32 else 0.02)
        truth = whole.lse
        assert part.lse.dtype == torch.float32
        assert part.lse.shape == q.shape[:-1]
        # scores are as exact as the products that they are sums of, which may cancel
        size = q.norm(dim=-1) * k[:, :, some].norm(dim=-1).amax(-1, keepdim=True) / q.shape[-1] ** 0.5
        off = (part.lse.double() - truth).abs() / (1 + size)
        assert float(off.max()) < (2e-6 if dtype == torch.float32 else 0.012)


def test_it_does_not_matter_where_keys_are_split():
    q, k, v = inputs(7, 37, 2.0, torch.float32)
    truth = reference(q, k, v)
    for cut in range(1, 37):
        assert torch.allclose(merge(*parted(q, k, v, cut)).out.double(), truth, atol=2e-6), cut
    assert torch.allclose(attend(q, k, v).double(), truth, atol=2e-6)


@PRECISIONS
def test_merging_is_symmetric(dtype: torch.dtype):
    a, b = parted(*inputs(63, 90, 3.0, dtype), 31)
    one, other = merge(a, b), merge(b, a)
    assert torch.allclose(one.out, other.out, atol=1e-6 if dtype == torch.float32 else 0.02)
    assert torch.allclose(one.lse, other.lse, atol=1e-6)
    assert not torch.allclose(one.out, a.out, atol=0.05)


@PRECISIONS
def test_a_part_that_matters_alone_takes_all_weight(dtype: torch.dtype):
    a, b = parted(*inputs(5, 20, 1.0, dtype), 10)
    for gap in (200.0, 1e30):
        strong, weak = Partial(a.out, a.lse + gap), Partial(b.out, b.lse - gap)
        assert torch.equal(merge(strong, weak).out, a.out)
        assert torch.allclose(merge(weak, strong).out, a.out, atol=1e-6)
        assert torch.equal(merge(weak, strong).lse, strong.lse)


def test_large_scores_in_half_precision_keep_what_tells_them_apart():
    q, k, v = inputs(300, 500, 1.0, torch.bfloat16)
    q[..., 0], k[..., 0] = 30, 20  # every score is near 75, where bfloat16 is as coarse as 0.5
    parts = parted(q, k, v, 200)
    assert error(merge(*parts).out, reference(q, k, v)) < 0.02
    assert float((parts[0].lse.double() - reference(q, k[:, :, :200], v[:, :, :200], lse=True).lse).abs().max()) < 0.1


@PRECISIONS
def test_any_number_of_parts_makes_a_whole(dtype: torch.dtype):
    q, k, v = inputs(9, 60, 2.0, dtype)
    pieces = [attend(q, k[:, :, i : i + 13], v[:, :, i : i + 13], lse=True) for i in range(0, 60, 13)]
    truth, merged = reference(q, k, v, lse=True), merge(*pieces)
    assert error(merged.out, truth.out) < (1e-5 if dtype == torch.float32 else 0.02)
    assert error(merged.lse, truth.lse) < (1e-5 if dtype == torch.float32 else 0.02)
    assert merge(pieces[0]) is pieces[0]


@PRECISIONS
def test_parts_over_no_key_count_for_nothing(dtype: torch.dtype):
    q, k, v = inputs(7, 20, 1.0, dtype)
    whole, empty = attend(q, k, v, lse=True), attend(q, k[:, :, :0], v[:, :, :0], lse=True)
    odd = Partial(torch.ones_like(empty.out), empty.lse)  # what such a part holds is no matter
    for other in (empty, odd):
        for merged in (merge(whole, other), merge(other, whole), merge(other, whole, other)):
            assert torch.allclose(merged.out, whole.out, atol=1e-6)
            assert torch.equal(merged.lse, whole.lse)
        nothing = merge(other, odd)
        assert not nothing.out.any()
        assert bool((nothing.lse == -torch.inf).all())
    # a row may be empty where its neighbour is not
    rows = Partial(whole.out.clone(), whole.lse.clone())
    rows.lse[:, :, 3] = -torch.inf
    mixed = merge(rows, odd)
    assert not mixed.out[:, :, 3].any()
    assert torch.allclose(mixed.out[:, :, 4:], whole.out[:, :, 4:], atol=1e-6)


@PRECISIONS
def test_parts_with_a_bias_merge_like_the_whole(dtype: torch.dtype):
    q, k, v = inputs(9, 50, 1.0, dtype)
    bias = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)).expand(2, 3, 50).clone()
    bias[1, 2, :30] = -torch.inf  # one head of one world sees nothing of the first part
    parts = [attend(q, k[:, :, s], v[:, :, s], bias=bias[..., s], lse=True) for s in (slice(30), slice(30, None))]
    truth, merged = reference(q, k, v, bias=bias, lse=True), merge(*parts)
    assert error(merged.out, truth.out) < (1e-5 if dtype == torch.float32 else 0.02)
    assert error(merged.lse, truth.lse) < (1e-5 if dtype == torch.float32 else 0.02)


def test_parts_must_be_of_one_size():
    a = Partial(torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 4))
    for wrong in (
        Partial(a.out[:, :1], a.lse[:, :1]),
        Partial(a.out, a.lse[..., None]),
        Partial(a.out[..., 1:], a.lse),
    ):
        with pytest.raises(InputError, match=r"one size, got \[2, 3, 4, 8\]"):
            merge(a, wrong)
