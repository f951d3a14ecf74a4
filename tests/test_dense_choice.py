"""How a backend of dense attention is chosen: by ranges of sizes, or single sizes, that were measured once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from test_dense_attention import CPU, FLOAT, bias_of, error, inputs
from worldstride.attention import Dense, Partial, attend, choices, reference, written
from worldstride.attention.backends import Backend
from worldstride.attention.choice import KEY_BUCKET, SPLIT_FROM
from worldstride.attention.measuring import (
    MEASURED_KEYS,
    NEAR,
    ROUNDS,
    TIE,
    Measurement,
    Place,
    Size,
    Timing,
    in_turns,
    measure,
    place_of,
)
from worldstride.engine import Engine
from worldstride.errors import InputError


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


def test_sizes_can_be_measured_by_themselves():
    fake = Fake(planned="always", free="never", broken="never")
    measured = replace(everywhere(PLANNED, FREE), refused={"broken, heads of 16": "it is off"})
    plain = Dense(CPU, FLOAT, measured, backends=fake.backends)
    clock, size = Clock(fake, planned=1.0, free=0.99), Size(16, 6, 2, 4600)
    tuned = plain.tuned([size, size], clock)
    assert clock.asked == 2 * (1 + ROUNDS)
    assert tuned.tuned(iter([size]), clock) is tuned
    assert tuned.measurement is not None
    assert tuned.measurement.exact == {size: (Timing("free", 0.99, False), Timing("planned", 1.0, True))}
    assert "6 heads of 16, 2 queries, 4600 keys: free (0.99 ms, planned 1)" in tuned.describe()
    fake.seen.clear()
    whole, parted = [("free", 4600)], [("planned", 2 * KEY_BUCKET), ("free", 4600 - 2 * KEY_BUCKET)]
    q, k, v = inputs(2, 4600)
    for attending, given, expected in (
        (tuned, (q, k, v), whole),
        (plain, (q, k, v), parted),
        (tuned, (q[:, :, :1], k, v), parted),
        (tuned, (q[:1], k[:1], v[:1]), parted),
        (tuned, (q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)), whole),
        (tuned, (q, k[:, :, 1:], v[:, :, 1:]), [("planned", 4096), ("free", 503)]),
    ):
        out = attending(*given)
        assert error(out, reference(*given)) < 1e-5
        assert fake.seen == expected
        fake.seen.clear()
    tuned(q, k, v, bias=torch.zeros(4600))  # nothing was measured with a bias
    assert fake.seen == parted
    slow = plain.tuned([size], Clock(fake, planned=1.0, free=1.01))  # nor is what needs a plan held back
    fake.seen.clear()
    slow(q, k, v, lse=True)
    assert fake.seen == [("planned", 4600)]
    with pytest.raises(InputError, match="queries of a size must be an integer of at least 1, got 0"):
        plain.tuned([Size(16, 6, 0, 5)], clock)
    assert (unchosen := Dense(CPU, FLOAT)).tuned([size], clock) is unchosen


def test_of_backends_that_give_no_log_sum_exp_none_is_chosen_for_it():
    fake = Fake(free="never")
    fake.backends["default"] = fake.backend("default", "as torch chooses", lse=False)
    tuned = dense(fake, FREE).tuned([Size(16, 6, 2, 50)], Clock(fake, free=2.0, default=1.0))
    fake.seen.clear()
    tuned(*inputs(2, 50))
    tuned(*inputs(2, 50), lse=True)
    assert fake.seen == [("default", 50), ("free", 50)]


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

    attending = dense(fake, PLANNED, FREE).tuned([Size(16, 6, 3, 6000), Size(16, 6, 3, 9)], lambda call: 1.0)
    compiled = torch.compile(lambda q, k, v, of: of(q, k, v), backend=count, fullgraph=True)
    for keys, most in ((5000, 1), (5001, 2), (7001, 2), (6000, 3), (8003, 3)):  # a size of its own has one
        q, k, v = inputs(3, keys)
        assert torch.equal(compiled(q, k, v, attending), attending(q, k, v))
        assert len(graphs) <= most
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


def test_what_is_near_the_fastest_is_timed_in_turns():
    ran = list[str]()

    def timer(call: Callable[[], object]) -> float:
        call()
        first = ran.count(ran[-1]) == 1
        # the first of all finds the device cool
        return {"a": 0.9 if first else 1.1, "b": 1.05, "c": NEAR * 0.9 + 0.01, "d": 5.0}[ran[-1]]

    calls = {name: lambda name=name: ran.append(name) for name in "abcd"}
    assert in_turns(calls, timer) == pytest.approx({"a": 1.1, "b": 1.05, "c": NEAR * 0.9 + 0.01, "d": 5.0})
    assert ran[:4] == list("abcd")
    turns = ["".join(ran[i : i + 2]) for i in range(4, len(ran), 2)]
    assert len(turns) == ROUNDS
    assert {*turns} == {"ab", "ba"}
    ran.clear()
    assert in_turns(calls, timer, near=9.0)["d"] == 5.0
    assert len(ran) == 4 * (1 + ROUNDS)
    assert in_turns({}, timer) == {}


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

    plain = made()
    asked = clock.asked
    assert asked == 2 * 2 * 13
    first = plain.tuned([Size(16, 6, 4, 6)], clock)
    assert clock.asked == asked + 2
    again = made()
    assert again.tuned([Size(16, 6, 4, 6)], clock) is again
    assert again.origin == first.origin == f"kept in {file}"
    assert clock.asked == asked + 2
    assert again.measurement == first.measurement
    assert made(head_dims=[32], cache=str(file)).measurement == first.measurement
    assert clock.asked == asked + 2
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
        {**whole, "exact": [[16, 6, 4, 6, []]]},
        {**whole, "exact": [[16, 6, 4, [["one", 1.0, False]]]]},
        {**whole, "exact": [[16, 6, "4", 6, [["one", 1.0, False]]]]},
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
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
