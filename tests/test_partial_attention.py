"""Attention over parts of the keys, merged, is attention over all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from worldstride.attention import Partial, attend, attend_partial, merge, reference

SIZES = [(1, 2, 1), (63, 257, 1), (257, 63, 20), (5, 258, 257), (300, 500, 123)]
"""Queries, keys, keys of the first part."""
PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def inputs(queries: int, keys: int, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of 64 channels; scores grow with `scale`."""
    q, k, v = (torch.randn(2, 3, n, 64, generator=torch.Generator().manual_seed(n + i)) for i, n in
               enumerate((queries, keys, keys)))  # fmt: skip
    return (scale * q).to(dtype), k.to(dtype), v.to(dtype)


def parted(q: Tensor, k: Tensor, v: Tensor, cut: int) -> tuple[Partial, Partial]:
    return attend_partial(q, k[:, :, :cut], v[:, :, :cut]), attend_partial(q, k[:, :, cut:], v[:, :, cut:])


def true_lse(q: Tensor, k: Tensor) -> Tensor:
    return (torch.einsum("bhqe,bhke->bhqk", q.double(), k.double()) / q.shape[-1] ** 0.5).logsumexp(-1)


def error(out: Tensor, truth: Tensor) -> float:
    return float((out.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize(("queries", "keys", "cut"), SIZES)
@pytest.mark.parametrize("scale", [1.0, 30.0])
@PRECISIONS
def test_merged_parts_equal_the_whole(queries: int, keys: int, cut: int, scale: float, dtype: torch.dtype):
    q, k, v = inputs(queries, keys, scale, dtype)
    truth, merged = reference(q, k, v), merge(*parted(q, k, v, cut))
    assert merged.dtype == dtype
    assert error(merged, truth) < (1e-5 if dtype == torch.float32 else 0.02)
    if dtype == torch.float32 and scale == 1:
        assert torch.allclose(merged.double(), truth, atol=2e-6)


@pytest.mark.parametrize(("queries", "keys", "cut"), SIZES)
@pytest.mark.parametrize("scale", [1.0, 30.0])
@PRECISIONS
def test_a_part_is_attention_over_it_with_its_log_sum_exp(
    queries: int, keys: int, cut: int, scale: float, dtype: torch.dtype
):
    q, k, v = inputs(queries, keys, scale, dtype)
    for part, some in zip(parted(q, k, v, cut), (slice(cut), slice(cut, None)), strict=True):
        assert error(part.out, reference(q, k[:, :, some], v[:, :, some])) < (1e-5 if dtype == torch.float32 else 0.02)
        truth = true_lse(q, k[:, :, some])
        assert part.lse.dtype == torch.float32
        assert part.lse.shape == q.shape[:-1]
        off = (part.lse.double() - truth).abs() / (1 + truth.abs())
        assert float(off.max()) < (2e-6 if dtype == torch.float32 else 0.012)


def test_it_does_not_matter_where_keys_are_split():
    q, k, v = inputs(7, 37, 2.0, torch.float32)
    truth = reference(q, k, v)
    for cut in range(1, 37):
        assert torch.allclose(merge(*parted(q, k, v, cut)).double(), truth, atol=2e-6), cut
    assert torch.allclose(attend(q, k, v).double(), truth, atol=2e-6)


@PRECISIONS
def test_merging_is_symmetric(dtype: torch.dtype):
    a, b = parted(*inputs(63, 90, 3.0, dtype), 31)
    assert torch.allclose(merge(a, b), merge(b, a), atol=1e-6 if dtype == torch.float32 else 0.02)
    assert not torch.allclose(merge(a, b), a.out, atol=0.05)


@PRECISIONS
def test_a_part_that_matters_alone_takes_all_weight(dtype: torch.dtype):
    a, b = parted(*inputs(5, 20, 1.0, dtype), 10)
    for gap in (200.0, 1e30):
        strong, weak = Partial(a.out, a.lse + gap), Partial(b.out, b.lse - gap)
        assert torch.equal(merge(strong, weak), a.out)
        assert torch.allclose(merge(weak, strong), a.out, atol=1e-6)


def test_large_scores_in_half_precision_keep_what_tells_them_apart():
    q, k, v = inputs(300, 500, 1.0, torch.bfloat16)
    q[..., 0], k[..., 0] = 30, 20  # every score is near 75, where bfloat16 is as coarse as 0.5
    parts = parted(q, k, v, 200)
    assert error(merge(*parts), reference(q, k, v)) < 0.02
    assert float((parts[0].lse.double() - true_lse(q, k[:, :, :200])).abs().max()) < 0.1
