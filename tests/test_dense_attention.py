"""Dense attention: every backend against float64, and how a backend is chosen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from worldstride.attention import Dense, Partial, attend, reference
from worldstride.attention.backends import BACKENDS, Need, need_of, unmeasured
from worldstride.attention.dense import compute
from worldstride.errors import InputError

CPU, FLOAT = torch.device("cpu"), torch.float32
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 0.02}
SIZES = [(1, 1), (5, 63), (257, 130), (64, 1000)]
"""Queries and keys."""


def inputs(queries: int, keys: int, dtype: torch.dtype = FLOAT, channels: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(queries + keys)
    q, k, v = (torch.randn(2, 3, n, channels, generator=generator).to(dtype) for n in (queries, keys, keys))
    return q, k, v


def bias_of(kind: str, keys: int) -> Tensor | None:
    if kind == "none":
        return None
    shape = {"keys": (keys,), "batch": (2, keys), "heads": (2, 3, keys)}[kind]
    bias = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(keys)) - 30
    bias[..., 1::3] = -torch.inf  # the first key always counts
    return bias


def error(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize(("queries", "keys"), SIZES)
@pytest.mark.parametrize("kind", ["none", "keys", "batch", "heads"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_backend_equals_the_reference(queries: int, keys: int, kind: str, dtype: torch.dtype):
    q, k, v = inputs(queries, keys, dtype)
    bias = bias_of(kind, keys)
    truth, ran = reference(q, k, v, bias=bias, lse=True), set[str]()
    for backend in BACKENDS.values():
        if backend.why_not(need_of(q, bias)) is not None:
            continue
        ran.add(backend.name)
        for lse in (False, True) if backend.lse else (False,):
            out, total = compute(backend, q, k, v, bias, lse)
            assert out.dtype == dtype
            assert error(out, truth.out) < BOUND[dtype], backend.name
            assert (total is not None) == lse
            if total is not None:
                assert total.dtype == torch.float32
                off = (total.double() - truth.lse).abs() / (1 + truth.lse.abs())
                assert float(off.max()) < (2e-6 if dtype == FLOAT else 0.012), backend.name
    assert ran == {"sdpa", "math"} | ({"blocked"} if dtype == torch.bfloat16 else set())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attend_gives_what_was_asked_for(dtype: torch.dtype):
    q, k, v = inputs(70, 45, dtype)
    bias = bias_of("heads", 45)
    out, part = attend(q, k, v, bias=bias), attend(q, k, v, bias=bias, lse=True)
    assert isinstance(out, Tensor)
    assert isinstance(part, Partial)
    truth = reference(q, k, v, bias=bias)
    assert error(out, truth) < BOUND[dtype]
    assert error(part.out, truth) < BOUND[dtype]


def test_half_precision_takes_tensors_of_any_strides():
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs(40, 60, torch.bfloat16))
    assert error(attend(q, k[..., ::2, :], v[..., ::2, :]), reference(q, k[..., ::2, :], v[..., ::2, :])) < 0.02


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bias_counts_in_natural_units_and_minus_infinity_hides(dtype: torch.dtype):
    q, k, v = inputs(30, 40, dtype)
    twice = attend(q, torch.cat([k, k[:, :, :7]], 2), torch.cat([v, v[:, :, :7]], 2), lse=True)
    weights = torch.zeros(40)
    weights[:7] = torch.tensor(2.0).log()
    weighted = attend(q, k, v, bias=weights, lse=True)
    assert torch.allclose(weighted.out, twice.out, atol=1e-5 if dtype == FLOAT else 0.03)
    assert torch.allclose(weighted.lse, twice.lse, atol=1e-5 if dtype == FLOAT else 0.05)
    hiding = torch.zeros(2, 40)
    hiding[0, 11:], hiding[1, :29] = -torch.inf, -torch.inf
    seen = attend(q, k, v, bias=hiding)
    assert torch.allclose(seen[0], attend(q[:1], k[:1, :, :11], v[:1, :, :11])[0], atol=0.03)
    assert torch.allclose(seen[1], attend(q[1:], k[1:, :, 29:], v[1:, :, 29:])[0], atol=0.03)


@pytest.mark.parametrize("offset", [-1e4, 3e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_all_keys_have_in_common_changes_the_log_sum_exp_only(offset: float, dtype: torch.dtype):
    q, k, v = inputs(30, 40, dtype)
    plain, moved = attend(q, k, v, lse=True), attend(q, k, v, bias=torch.full((40,), offset), lse=True)
    assert error(moved.out, plain.out.double()) < (1e-6 if dtype == FLOAT else 0.01)
    assert torch.allclose(moved.lse, plain.lse + offset, atol=0.05)


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_every_key_is_hidden_or_there_is_none_attention_is_zeros(lse: bool, dtype: torch.dtype):
    q, k, v = inputs(6, 9, dtype)
    hiding = torch.zeros(2, 3, 9)
    hiding[0, 1] = -torch.inf
    for backend in ("blocked", "sdpa", "math") if not lse else ("blocked", "math"):
        if BACKENDS[backend].why_not(need_of(q, hiding)) is None:
            out, total = compute(BACKENDS[backend], q, k, v, hiding, lse)
            assert not out[0, 1].any()
            assert bool(out.isfinite().all())
            if total is not None:
                assert bool((total[0, 1] == -torch.inf).all())
                assert int(total.isfinite().sum()) == 5 * 6
    empty = attend(q, k[:, :, :0], v[:, :, :0], lse=True)
    assert empty.out.shape == q.shape
    assert empty.out.dtype == dtype
    assert not empty.out.any()
    assert bool((empty.lse == -torch.inf).all())
    assert attend(q[:, :, :0], k, v).shape == (2, 3, 0, 16)


def test_gradients_flow_through_plain_attention():
    for dtype in (FLOAT, torch.bfloat16):
        q, k, v = (t.requires_grad_() for t in inputs(5, 8, dtype))
        attend(q, k, v).sum().backward()
        assert q.grad is not None
        assert bool(q.grad.any())


SHAPE = torch.zeros(2, 3, 4, 8)
WRONG = {
    "three dimensions": ((SHAPE[0], SHAPE, SHAPE), None, r"q \[3, 4, 8\], k \[2, 3, 4, 8\]"),
    "lengths": ((SHAPE, SHAPE, SHAPE[:, :, 1:]), None, r"one value.*k \[2, 3, 4, 8\], v \[2, 3, 3, 8\]"),
    "heads": ((SHAPE, SHAPE[:, 1:], SHAPE[:, 1:]), None, r"batch and heads.*q \[2, 3, 4, 8\], k \[2, 2, 4, 8\]"),
    "channels": ((SHAPE[..., 1:], SHAPE, SHAPE), None, r"channels a head.*q \[2, 3, 4, 7\], k \[2, 3, 4, 8\]"),
    "precision": ((SHAPE, SHAPE.half(), SHAPE.half()), None, r"precision, got torch.float32, torch.float16"),
    "integers": ((SHAPE.int(),) * 3, None, r"floating-point precision, got torch.int32"),
    "devices": ((SHAPE, SHAPE, SHAPE.to("meta")), None, r"one device, got cpu, cpu, meta"),
    "bias": ((SHAPE, SHAPE, SHAPE), torch.zeros(3), r"\[4\], \[2, 4\] or \[2, 3, 4\], got \[3\]"),
    "bias of heads": ((SHAPE, SHAPE, SHAPE), torch.zeros(2, 1, 4), r"\[4\], \[2, 4\] or \[2, 3, 4\], got \[2, 1, 4\]"),
    "bias of queries": ((SHAPE, SHAPE, SHAPE), torch.zeros(2, 3, 4, 4), r"got \[2, 3, 4, 4\]"),
    "mask": ((SHAPE, SHAPE, SHAPE), torch.ones(4).bool(), r"floating-point on cpu, got torch.bool"),
    "bias elsewhere": ((SHAPE, SHAPE, SHAPE), torch.zeros(4, device="meta"), r"on cpu, got torch.float32 on meta"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_shape_and_the_rule(name: str):
    tensors, bias, text = WRONG[name]
    for attending in (attend, Dense(CPU, FLOAT)):
        with pytest.raises(InputError, match=text):
            attending(*tensors, bias=bias)


@pytest.mark.parametrize(
    ("need", "plain", "with_lse"),
    [
        (Need("cpu", (0, 0), torch.bfloat16, 64, False), "blocked", "blocked"),
        (Need("cpu", (0, 0), torch.bfloat16, 64, True), "blocked", "blocked"),
        (Need("cpu", (0, 0), torch.float32, 64, True), "sdpa", "math"),
        (Need("mps", (0, 0), torch.float16, 64, False), "sdpa", "math"),
        (Need("cuda", (9, 0), torch.bfloat16, 128, False), "sdpa", "flash"),
        (Need("cuda", (9, 0), torch.bfloat16, 128, True), "sdpa", "efficient"),
        (Need("cuda", (9, 0), torch.bfloat16, 512, False), "sdpa", "efficient"),
        (Need("cuda", (9, 0), torch.float32, 128, False), "sdpa", "efficient"),
        (Need("cuda", (7, 5), torch.float16, 64, False), "sdpa", "efficient"),
        (Need("cuda", (7, 5), torch.bfloat16, 64, False), "sdpa", "math"),
        (Need("cuda", (9, 0), torch.bfloat16, 60, False), "sdpa", "math"),
    ],
)
def test_without_measuring_the_first_that_can_is_taken(need: Need, plain: str, with_lse: str):
    assert [unmeasured(need, lse).name for lse in (False, True)] == [plain, with_lse]


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@gpu
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (200, 333), (130, 5000)])
@pytest.mark.parametrize("kind", ["none", "keys", "batch", "heads"])
@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_backend_equals_the_reference_on_a_gpu(
    queries: int, keys: int, kind: str, channels: int, dtype: torch.dtype
):
    q, k, v = (t.cuda() for t in inputs(queries, keys, dtype, channels))
    bias = bias_of(kind, keys)
    bias = None if bias is None else bias.cuda()
    truth = reference(q, k, v, bias=bias, lse=True)
    for backend in BACKENDS.values():
        if backend.why_not(need_of(q, bias)) is not None:
            continue
        for lse in (False, True) if backend.lse else (False,):
            out, total = compute(backend, q, k, v, bias, lse)
            assert error(out, truth.out) < 2 * max(BOUND[dtype], 2e-3), backend.name
            if total is not None:
                assert total.shape == truth.lse.shape, backend.name
                assert torch.allclose(total.double(), truth.lse, atol=0.02), backend.name
