"""Dense attention: every backend against float64, and how a backend is chosen."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from worldstride.attention import Dense, Partial, attend, choices, reference, written
from worldstride.attention.backends import BACKENDS, Backend, Need, need_of, unmeasured
from worldstride.attention.choice import KEY_BUCKET, SPLIT_FROM
from worldstride.attention.dense import compute
from worldstride.attention.measuring import (
    MEASURED_KEYS,
    TIE,
    Measurement,
    Place,
    Timing,
    measure,
    place_of,
)
from worldstride.engine import Engine
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


class Fake:
    """Backends that compute in float32 and remember how many keys they were given."""

    def __init__(self, **plans: Any) -> None:
        self.seen: list[tuple[str, int]] = []
        self.backends = {name: self.backend(name, plan) for name, plan in plans.items()}

    def backend(self, name: str, plans: Any, **other: Any) -> Backend:
        def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, lse: bool) -> tuple[Tensor, Tensor | None]:
            self.seen.append((name, k.shape[2]))
            return written.in_float32(q, k, v, bias, lse)

        return Backend(name, lambda need: None, run, plans=plans, **other)


def everywhere(*timings: Timing, head_dim: int = 16) -> Measurement:
    grid = [(i, j, n, False) for i in (0, 1) for j in (0, 1) for n in (0, 1, 2)]
    return Measurement("today", {Place(head_dim, *p): timings for p in [*grid, (1, 1, 1, True)]})


def dense(fake: Fake, *timings: Timing, lengths: Iterable[int] = ()) -> Dense:
    return Dense(CPU, FLOAT, everywhere(*timings), lengths, backends=fake.backends)


PLANNED, FREE = Timing("planned", 1.0, True), Timing("free", 2.0, False)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (100, [("free", 100)]),
        (KEY_BUCKET, [("planned", KEY_BUCKET)]),
        (SPLIT_FROM - 1, [("free", SPLIT_FROM - 1)]),
        (SPLIT_FROM, [("planned", SPLIT_FROM)]),
        (SPLIT_FROM + 1, [("planned", SPLIT_FROM), ("free", 1)]),
        (3 * KEY_BUCKET + 700, [("planned", 3 * KEY_BUCKET), ("free", 700)]),
        (5000, [("planned", 5000)]),
    ],
)
@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_new_key_lengths_build_no_plans(keys: int, expected: list[tuple[str, int]], lse: bool, biased: bool):
    fake = Fake(planned="always", free="never")
    q, k, v = inputs(5, keys)
    bias = bias_of("heads", keys) if biased else None
    made = dense(fake, PLANNED, FREE, lengths=[5000])(q, k, v, bias=bias, lse=lse)  # type: ignore[call-overload]
    assert fake.seen == expected
    truth = reference(q, k, v, bias=bias, lse=True)
    assert isinstance(made, Partial) == lse
    assert error(made.out if isinstance(made, Partial) else made, truth.out) < 1e-5
    if isinstance(made, Partial):
        assert torch.allclose(made.lse.double(), truth.lse, atol=1e-4)


def test_a_growing_context_meets_a_plan_for_each_bucket_only():
    fake = Fake(planned="always", free="never")
    attending, q = dense(fake, PLANNED, FREE), inputs(1, 1)[0]
    for keys in range(1000, 12000, 333):
        k = torch.zeros(2, 3, keys, 16)
        attending(q, k, k)
    assert {n for name, n in fake.seen if name == "planned"} == {i * KEY_BUCKET for i in range(2, 6)}


def test_lengths_are_announced_on_a_copy():
    fake = Fake(planned="always", free="never")
    plain = dense(fake, PLANNED, FREE)
    announced = plain.plan([4500]).plan([4500, 4600])
    q, k, v = inputs(2, 4600)
    announced(q, k, v)
    plain(q, k, v)
    assert fake.seen == [("planned", 4600), ("planned", 2 * KEY_BUCKET), ("free", 4600 - 2 * KEY_BUCKET)]
    assert (plain.key_lengths, announced.key_lengths) == ((), (4500, 4600))
    for wrong in (0, 2.5, True):
        with pytest.raises(InputError, match="a number of keys must be an integer of at least 1"):
            plain.plan([wrong])  # type: ignore[list-item]


def test_two_parts_have_to_be_worth_it():
    for ms, expected in ((1.05, ["free"]), (1.5, ["planned", "free"])):
        fake = Fake(planned="always", free="never")
        dense(fake, PLANNED, Timing("free", ms, False))(*inputs(2, 5000))
        assert [name for name, _ in fake.seen] == expected


def test_without_a_way_to_part_keys_they_stay_together():
    fake = Fake(planned="always")
    dense(fake, PLANNED)(*inputs(2, 5000))
    assert fake.seen == [("planned", 5000)]
    # what gives no log-sum-exp cannot be a part: the one that does takes its place
    fake = Fake(planned="always", free="never")
    fake.backends["default"] = fake.backend("default", "as torch chooses", lse=False)
    attending = dense(fake, Timing("default", 0.9, True), PLANNED, FREE)
    attending(*inputs(2, 5000))
    attending(*inputs(2, 4096))
    attending(*inputs(2, 4096), lse=True)
    assert fake.seen == [("planned", 4096), ("free", 904), ("default", 4096), ("planned", 4096)]


def test_what_was_not_measured_goes_by_the_rule():
    fake = Fake(free="never")
    attending = dense(fake, FREE)
    for channels, dtype in ((8, FLOAT), (16, torch.bfloat16)):
        q, k, v = inputs(4, 6, dtype, channels)
        assert torch.equal(attending(q, k, v), attend(q, k, v))
    assert fake.seen == []
    attending(*inputs(4, 6))
    assert fake.seen == [("free", 6)]


def test_sizes_fall_into_ranges():
    assert place_of(64, 8, 1024, 2048, False) == place_of(64, 1, 1, 1, False) == Place(64, 0, 0, 0, False)
    assert place_of(64, 9, 1025, 2049, False) == place_of(64, 32, 6240, 16384, False) == Place(64, 1, 1, 1, False)
    assert place_of(128, 32, 6240, 37440, False) == Place(128, 1, 1, 2, False)
    assert place_of(64, 1, 1, 1, True) == place_of(64, 99, 9999, 99999, True)


def test_a_choice_is_traced_and_leaves_the_number_of_keys_open():
    fake = Fake()
    for name in ("planned", "free"):  # remembering what was seen is not traceable
        fake.backends[name] = Backend(name, lambda need: None, written.in_float32)
    graphs: list[object] = []

    def count(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    attending = dense(fake, PLANNED, FREE)
    compiled = torch.compile(lambda q, k, v, of: of(q, k, v), backend=count, fullgraph=True)
    for keys in (5000, 5001, 6000, 7001):
        q, k, v = inputs(3, keys)
        assert torch.equal(compiled(q, k, v, attending), attending(q, k, v))
    assert len(graphs) <= 2
    torch.compiler.reset()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure at sizes that a CPU computes at once."""
    monkeypatch.setattr("worldstride.attention.measuring.MEASURED_ROWS", (2, 3))
    monkeypatch.setattr("worldstride.attention.measuring.MEASURED_QUERIES", (20, 40))
    monkeypatch.setattr("worldstride.attention.measuring.MEASURED_KEYS", (33, 64, 100))


class Clock:
    """Milliseconds by the name of the backend that ran; counts what it is asked."""

    def __init__(self, fake: Fake, **ms: float) -> None:
        self.fake, self.ms, self.asked = fake, ms, 0

    def __call__(self, call: Callable[[], object]) -> float:
        self.asked += 1
        call()
        return self.ms[self.fake.seen[-1][0]]


def names(times: Iterable[Timing]) -> list[str]:
    return [t.backend for t in times]


@pytest.mark.usefixtures("small")
def test_the_fastest_is_chosen_and_of_equals_the_first():
    fake = Fake(slow="never", first="never", second="always")
    found = measure(CPU, FLOAT, [16], fake.backends.values(), Clock(fake, slow=3.0, first=1.02, second=1.0))
    assert len(found.times) == 2 * 2 * len(MEASURED_KEYS) + 1
    assert all(names(times) == ["first", "second", "slow"] for times in found.times.values())
    assert all([t.plans for t in times] == [False, True, False] for times in found.times.values())
    found = measure(CPU, FLOAT, [16], fake.backends.values(), Clock(fake, slow=3.0, first=TIE + 0.01, second=1.0))
    assert names(found.times[Place(16, 0, 0, 0, False)]) == ["second", "first", "slow"]
    assert found.refused == {}


@pytest.mark.usefixtures("small")
def test_what_fails_or_is_wrong_is_left_out_and_says_why():
    fake = Fake(good="never", untimed="never")
    fake.backends["untimed"] = fake.backend("untimed", "never", timed=False)

    def broken(*_: object) -> Any:
        raise RuntimeError("no kernel image\nfor this device")

    def spoiled(how: Callable[[Any], Tensor], part: int) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            made = list(written.in_float32(*given))
            made[part] = made[part] if made[part] is None else how(made[part])
            return tuple(made)

        return run

    def large(*given: Any) -> Any:
        if given[1].shape[2] == 100:
            raise ValueError("too many keys")
        fake.seen.append(("large", 0))
        return written.in_float32(*given)

    runs = {
        "broken": broken,
        "nan": spoiled(lambda t: t.masked_fill(t > 0.1, torch.nan), 0),
        "off": spoiled(lambda t: 1.03 * t, 0),
        "sums": spoiled(lambda t: t + 1, 1),
        "large": large,
    }
    backends = {**fake.backends, **{n: Backend(n, lambda need: None, run) for n, run in runs.items()}}
    backends["other"] = Backend("other", lambda need: "it takes no bias" if need.bias else None, large)
    found = measure(CPU, FLOAT, [16], backends.values(), Clock(fake, good=1.0, large=2.0))
    few, many = found.times[Place(16, 0, 0, 0, False)], found.times[Place(16, 1, 1, 2, False)]
    assert names(few) == ["good", "large", "other"]
    assert names(many) == ["good"]
    assert names(found.times[Place(16, 1, 1, 1, True)]) == ["good", "large"]
    assert found.refused["broken, heads of 16"] == "RuntimeError: no kernel image"
    assert found.refused["nan, heads of 16"] == "its output is off by nan of its size"
    assert found.refused["off, heads of 16"] == "its output is off by 0.03 of its size"
    assert found.refused["sums, heads of 16, bias"].startswith("its log-sum-exp is off by 0.1")
    assert found.refused["large, heads of 16"] == "ValueError: too many keys (2 x 20 x 100)"
    assert found.refused["other, heads of 16, bias"] == "it takes no bias"
    assert not [what for what in found.refused if what.startswith(("good", "untimed"))]


@pytest.mark.usefixtures("small")
def test_choices_are_kept_in_a_file(tmp_path: Path):
    file, fake = tmp_path / "new" / "choices.json", Fake(one="never", two="always")
    clock = Clock(fake, one=2.0, two=1.0)

    def made(**other: Any) -> Dense:
        given = {"head_dims": (16, 32), "cache": file, "backends": fake.backends, "timer": clock, **other}
        return Dense.measured(CPU, FLOAT, **given)

    first = made()
    asked = clock.asked
    assert asked == 2 * 2 * 13
    again = made()
    assert clock.asked == asked
    assert again.measurement == first.measurement
    assert made(head_dims=[32], cache=str(file)).measurement == first.measurement
    assert clock.asked == asked
    assert [p.name for p in file.parent.iterdir()] == ["choices.json"]
    q, k, v = inputs(5, 6)
    fake.seen.clear()
    again(q, k, v)
    assert fake.seen == [("one", 6)]  # so few keys are not worth a plan
    text = file.read_text()
    whole = json.loads(text)
    stale = [
        {**whole, "made_with": {**whole["made_with"], "torch": "1.0"}},
        {**whole, "made_with": {**whole["made_with"], "device": "another"}},
        {**whole, "dtype": "torch.float16"},
        {**whole, "format": "of another kind"},
        {**whole, "head_dims": [64]},
        {**whole, "ranges": [[1], [2], [3]]},
        {**whole, "times": [[*whole["times"][0][:-1], [["gone", 1.0, False]]]]},
        {**whole, "times": [[*whole["times"][0][:-1], [["one", -1.0, False]]]]},
        {**whole, "times": [[*whole["times"][0][:-1], [["one", 1.0]]]]},
        {**whole, "times": [[16, "0", 0, 0, False, [["one", 1.0, False]]]]},
        {**whole, "times": [[16, 0, 0, 0, False, []]]},
        {**whole, "times": 3},
        {**whole, "refused": ["why"]},
        {name: value for name, value in whole.items() if name != "date"},
        [],
    ]
    for content in (*map(json.dumps, stale), "", text[:-20], "\x00", '{"format": NaN}'):
        file.write_text(content)
        before = clock.asked
        assert made().measurement is not None
        assert clock.asked == before + asked, content[:200]
        assert json.loads(file.read_text())["times"] == whole["times"]


@pytest.mark.usefixtures("small")
def test_a_file_that_cannot_be_written_is_no_error(tmp_path: Path):
    fake = Fake(one="never")
    (tmp_path / "file").write_text("")
    for cache in (tmp_path, tmp_path / "file" / "choices.json"):
        made = Dense.measured(CPU, FLOAT, [16], cache, backends=fake.backends, timer=Clock(fake, one=1.0))
        assert made.measurement is not None
        assert made.origin.startswith("not kept: ")
        made(*inputs(2, 3))


def test_the_default_file_names_device_and_precision():
    file = choices.default_file(CPU, torch.bfloat16)
    assert file.name == "attention-cpu-bfloat16.json"
    assert "worldstride" in file.parts[-2].lower() or "worldstride" in str(file.parent).lower()


@pytest.mark.usefixtures("small")
def test_what_was_chosen_is_described():
    fake = Fake(one="never", two="never")
    fake.backends["bad"] = Backend("bad", lambda need: "it is for nothing", written.in_float32)
    found = measure(CPU, FLOAT, [16], fake.backends.values(), Clock(fake, one=2.0, two=10.625))
    lines = Dense(CPU, FLOAT, found, backends=fake.backends, origin="kept in x.json").describe()
    times = "one {} (2 ms, two 10.6)"
    ranges = ", ".join(times.format(reach) for reach in ("to 2048 keys", "to 16384 keys", "beyond"))
    assert lines[:2] == [
        f"24 heads of 16, 4096 queries: {ranges}", f"24 heads of 16, 4096 queries: {times.format('with a bias')}"
    ]  # fmt: skip
    assert f"measured {found.date}, kept in x.json" in lines
    assert "left out: bad, heads of 16: it is for nothing" in lines


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


@gpu
def test_choices_on_a_gpu_are_measured_once_and_attend_rightly(tmp_path: Path):
    device, file = torch.device("cuda"), tmp_path / "choices.json"
    made = Dense.measured(device, torch.bfloat16, [64], file)
    assert made.measurement is not None
    assert made.measurement.times
    assert Dense.measured(device, torch.bfloat16, [64], file).measurement == made.measurement
    for keys in (100, 2048, 4096, 5000, 20000):
        q, k, v = (t.cuda() for t in inputs(70, keys, torch.bfloat16, 64))
        truth = reference(q, k, v, lse=True)
        part = made(q, k, v, lse=True)
        for out in (made(q, k, v), part.out, made.plan([keys])(q, k, v)):
            assert error(out, truth.out) < 0.02
        assert torch.allclose(part.lse.double(), truth.lse, atol=0.02)


def test_nothing_is_measured_on_a_cpu(tiny_engine: Engine):
    q, k, v = inputs(3, 4)
    for dtype, ways in ((FLOAT, "sdpa, with log-sum-exp math"), (torch.bfloat16, "blocked, with log-sum-exp blocked")):
        made = Dense.measured(CPU, dtype)
        assert made.measurement is None
        assert made.describe() == [f"{ways}: the rule for {dtype} on cpu, where nothing is measured"]
    assert Dense(CPU, FLOAT).describe() == ["sdpa, with log-sum-exp math: the rule for torch.float32 on cpu"]
    own = tiny_engine.attention
    assert own is tiny_engine.attention
    assert (own.device, own.dtype, own.measurement) == (CPU, FLOAT, None)
    assert torch.equal(own(q, k, v), attend(q, k, v))


def test_the_engine_decides_how_tokens_attend(tiny_engine: Engine):
    asked: list[bool] = []

    class Spy(Dense):
        def __call__(self, q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Any:
            asked.append(how.get("lse", False))
            return super().__call__(q, k, v, **how)

    source, model = tiny_engine.source, tiny_engine.model
    spied = Engine(model, source, tiny_engine.acceleration, attention=Spy(CPU, FLOAT))
    assert (spied.new(seed=1).step().frames == tiny_engine.new(seed=1).step().frames).all()
    assert asked
    assert not any(asked)
