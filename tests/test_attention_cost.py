"""When sparse attention pays: predictions in plain numbers, and the file that rates are kept in."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from worldstride.attention import attend, rates
from worldstride.attention.cost import MARGIN, Rates, Shape, decide, dense_ms, fit, sparse_ms
from worldstride.errors import InputError

EVEN = Rates(units=100, dense=500.0, block=1.7, tile=2.0, choosing=20.0, merging=2000.0)
"""A block costs about what dense attention takes for it."""
CHUNK = Shape(2, 16, 128, 6400, 19200, 6400, q_blocks=50, blocks=150, kept_blocks=50, listed=75.0)
"""Three latents of 6400 tokens, two of which are history: 100 blocks of it, of which 25 are listed."""


def listing(share: float, shape: Shape = CHUNK) -> Shape:
    """The same with so much of the history."""
    return replace(shape, listed=shape.kept_blocks + share * (shape.blocks - shape.kept_blocks))


def test_dense_attention_is_predicted_from_its_operations():
    # 4 B H Nq Nk E operations at 500 TFLOP/s
    assert dense_ms(CHUNK, 19200, EVEN) == pytest.approx(4 * 32 * 6400 * 19200 * 128 / 500e12 * 1e3)
    assert dense_ms(CHUNK, 9600, EVEN) == pytest.approx(dense_ms(CHUNK, 19200, EVEN) / 2)
    assert dense_ms(CHUNK, 19200, replace(EVEN, dense=250.0)) == pytest.approx(2 * dense_ms(CHUNK, 19200, EVEN))


@pytest.mark.parametrize(("units", "turns"), [(100, 16), (1600, 1), (1599, 2), (1, 1600), (5000, 1)])
def test_tiles_are_worked_on_in_whole_turns(units: int, turns: int):
    assert sparse_ms(CHUNK, 75, replace(EVEN, units=units)) == pytest.approx(turns * (2 + 75 * 1.7) / 1e3)


def test_a_tile_with_less_than_nothing_to_do_costs_a_tile():
    assert sparse_ms(CHUNK, -3, EVEN) == sparse_ms(CHUNK, 0, EVEN) == pytest.approx(16 * 2 / 1e3)


def test_time_rises_with_what_is_listed():
    times = [sparse_ms(CHUNK, n, EVEN) for n in range(0, 200, 7)]
    assert all(a < b for a, b in pairwise(times))
    found = [decide(listing(share), EVEN).milliseconds for share in (0, 0.1, 0.3, 0.5, 0.9)]
    for way in ("sparse", "hybrid"):
        assert all(a[way] < b[way] for a, b in pairwise(found))
    assert len({of["dense"] for of in found}) == 1


def test_a_line_through_two_measurements_is_found_again():
    block, tile, turns = 0.9, 4.5, 7
    times = tuple(turns * (tile + n * block) / 1e3 for n in (32, 128))
    assert fit(times, (32, 128), turns) == pytest.approx((block, tile))  # type: ignore[arg-type]
    assert fit((1.0, 2.0), (1, 2), 1) == pytest.approx((1000.0, 0.0))


def test_measurements_that_make_no_sense_make_rates_that_can_be_used():
    assert fit((2.0, 1.0), (32, 128), 7)[0] == 1e-6  # more blocks in less time
    assert fit((1.0, 10.0), (32, 128), 7)[1] == 0.0  # more than twice as long for each: the line begins below nothing
    Rates(100, 500.0, *fit((2.0, 1.0), (32, 128), 7), 20.0, 2000.0)


def test_density_is_the_share_of_keys_that_are_attended_to():
    assert CHUNK.density == pytest.approx((6400 + 25 * 128) / 19200)
    assert listing(0).density == pytest.approx(1 / 3)
    assert listing(1).density == 1.0
    assert replace(CHUNK, listed=1000.0).density == 1.0
    # blocks of 16 tokens are no blocks of 128
    assert Shape(1, 4, 64, 384, 1152, 384, 24, 72, 24, 24 + 12.0).density == pytest.approx(0.5)
    assert Shape(1, 4, 64, 384, 384, 384, 24, 24, 24, 24.0).density == 1.0
    assert replace(CHUNK, listed=3.0).density == pytest.approx(1 / 3)  # what is kept is attended to in any case


def test_low_density_is_attended_to_sparsely():
    found = decide(listing(0.1), EVEN)
    assert (found.way, found.density) == ("sparse", pytest.approx((6400 + 1280) / 19200))
    assert found.milliseconds["sparse"] == pytest.approx((16 * (2 + 60 * 1.7) + EVEN.choosing) / 1e3)
    assert found.milliseconds["sparse"] == min(found.milliseconds.values())
    ratio = found.milliseconds["dense"] / found.milliseconds["sparse"]
    assert found.reason == f"predicted {ratio:.2f} times as fast as dense"


@pytest.mark.parametrize(("density", "way"), [(1.0, "dense"), (0.971, "dense"), (0.969, "sparse")])
@pytest.mark.parametrize("kept", [0, 6400])
def test_almost_everything_is_attended_to_densely(kept: int, density: float, way: str):
    """However fast the kernel is."""
    shape = replace(CHUNK, kept=kept, kept_blocks=kept // 128)
    shape = listing((density * 19200 - kept) / (19200 - kept), shape)
    found = decide(shape, replace(EVEN, block=0.1))
    assert found.way == way
    assert found.density == pytest.approx(1.0 if way == "dense" else density)
    assert ("saves nothing" in found.reason) is (way == "dense")
    assert list(found.milliseconds) == (
        ["dense"] if way == "dense" else ["dense", "sparse", "hybrid"][: 2 + (kept > 0)]
    )


@pytest.mark.parametrize(("share", "way"), [(0.98, "dense"), (0.9701, "dense"), (0.9699, "sparse"), (0.5, "sparse")])
def test_sparse_must_be_faster_by_a_margin(share: float, way: str):
    shape = Shape(1, 1, 128, 128, 12800, 0, 1, 100, 0, 50.0)
    # one tile of 50 blocks, against dense attention in 1 ms
    at = Rates(1, 4 * 128 * 12800 * 128 / 1e9, share * 1000 / 50, 0.0, 0.0, 1.0)
    assert decide(shape, at).way == way
    assert decide(shape, at).milliseconds == pytest.approx({"dense": 1.0, "sparse": share})
    assert decide(shape, at, margin=1.0).way == "sparse"
    assert MARGIN == 0.97


def test_a_way_that_is_not_faster_by_the_margin_is_named():
    shape = Shape(1, 1, 128, 128, 12800, 0, 1, 100, 0, 50.0)
    at = Rates(1, 4 * 128 * 12800 * 128 / 1e9, 0.98 * 20, 0.0, 0.0, 1.0)
    assert decide(shape, at).reason == "sparse was predicted to take 0.98 of dense attention's time"


def test_choosing_costs_and_can_make_dense_faster():
    shape = listing(0.1)
    assert decide(shape, EVEN).way == "sparse"
    slow = decide(shape, replace(EVEN, choosing=1e4))
    assert slow.way == "dense"
    assert slow.milliseconds["sparse"] == pytest.approx(decide(shape, EVEN).milliseconds["sparse"] + 10 - 0.02)


def test_many_kept_keys_and_a_poor_kernel_make_a_hybrid():
    # the kernel takes twice as long for a block as dense attention does: what is kept goes the dense way
    each = dense_ms(CHUNK, 128, EVEN) / 16 * 1e3  # microseconds of a block in each of 16 turns
    poor = replace(EVEN, block=2 * each, tile=0.0, choosing=1.0)
    found = decide(listing(0.2), poor)
    assert found.way == "hybrid"
    merge = 3 * 32 * 6400 * 128 * 2 / 2000e9 * 1e3
    expected = dense_ms(CHUNK, 6400, poor) + 16 * 20 * 2 * each / 1e3 + 1 / 1e3 + merge
    assert found.milliseconds["hybrid"] == pytest.approx(expected)
    assert found.density == pytest.approx((6400 + 20 * 128) / 19200)
    # a kernel as good needs no second way, a slow merge is no gain, and with few kept keys there is nothing to gain
    assert decide(listing(0.2), replace(poor, block=0.9 * each)).way == "sparse"
    assert decide(listing(0.2), replace(poor, merging=1.0)).way != "hybrid"
    assert decide(listing(0.2, replace(CHUNK, kept=128, kept_blocks=1)), poor).way != "hybrid"


@pytest.mark.parametrize("at", [None, EVEN])
@pytest.mark.parametrize("kept", [19200, 20000])
def test_where_every_key_is_kept_there_is_nothing_to_choose(at: Rates | None, kept: int):
    found = decide(replace(CHUNK, kept=kept), at)
    assert (found.way, found.density, found.reason) == ("dense", 1.0, "every key is kept")


def test_without_rates_what_was_asked_for_is_done():
    for share in (0.1, 1.0):
        found = decide(listing(share), None)
        assert (found.way, found.milliseconds) == ("sparse", {})
        assert found.density == listing(share).density
        assert "no rates" in found.reason


@pytest.mark.parametrize("at", [None, EVEN])
def test_without_a_kernel_attention_is_dense_and_the_reason_is_shown(at: Rates | None):
    found = decide(listing(0.1), at, "heads of 48 channels")
    assert (found.way, found.density) == ("dense", 1.0)
    assert found.reason == "no sparse kernel: heads of 48 channels"


@pytest.mark.parametrize("at", [None, EVEN, replace(EVEN, block=1e6)])
@pytest.mark.parametrize("lack", ["", "heads of 48 channels"])
def test_who_insists_is_obeyed_wherever_something_can_be_left_out(at: Rates | None, lack: str):
    for share in (0.1, 0.99, 1.0):
        found = decide(listing(share), at, lack, obey=True)
        assert (found.way, found.density) == ("sparse", listing(share).density)
        assert found.reason == "asked to obey"
    assert decide(replace(CHUNK, kept=19200), at, lack, obey=True).way == "dense"


@pytest.mark.parametrize("name", ["units", "dense", "block", "merging"])
@pytest.mark.parametrize("value", [0, -1.5, float("nan"), None])
def test_rates_that_cannot_be_are_named_with_their_value(name: str, value: float):
    with pytest.raises(InputError, match=rf"rates\.{name} must be a number above 0 .*, got {value!r}"):
        replace(EVEN, **{name: value})


@pytest.mark.parametrize("name", ["tile", "choosing"])
@pytest.mark.parametrize("value", [-1.5, float("nan")])
def test_times_are_never_below_nothing(name: str, value: float):
    with pytest.raises(InputError, match=rf"rates\.{name} must be a number at least 0 .*, got {value!r}"):
        replace(EVEN, **{name: value})


@pytest.mark.parametrize("name", ["tile", "choosing"])
def test_what_costs_nothing_may_be_nothing(name: str):
    assert getattr(replace(EVEN, **{name: 0.0}), name) == 0


# measured rates

CPU = torch.device("cpu")


def test_a_cpu_has_no_rates_and_writes_no_file(tmp_path: Path):
    file = tmp_path / "attention.json"
    assert rates.measured(attend, CPU, torch.bfloat16, 64, file) is None
    assert not list(tmp_path.iterdir())


HEADER: dict[str, object] = {"format": rates.FORMAT, "device": "a GPU", "dtype": "torch.bfloat16", "channels": 128}


def written(path: Path, **changes: object) -> Path:
    values = {**HEADER, "rates": asdict(EVEN), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}), encoding="utf-8")
    return path


def test_rates_are_read_from_their_file(tmp_path: Path):
    assert rates._load(written(tmp_path / "rates.json"), HEADER) == EVEN
    assert rates._load(written(tmp_path / "rates.json", more="than is known"), HEADER) == EVEN


STALE = {
    "another device": {"device": "another GPU"},
    "another precision": {"dtype": "torch.float16"},
    "other channels": {"channels": 64},
    "an older format": {"format": "worldstride attention rates 0"},
    "no device": {"device": None},
    "no rates": {"rates": None},
    "rates that are no table": {"rates": [1, 2, 3]},
    "a rate too few": {"rates": {k: v for k, v in asdict(EVEN).items() if k != "block"}},
    "a rate too many": {"rates": {**asdict(EVEN), "speed": 1.0}},
    "a rate that cannot be": {"rates": {**asdict(EVEN), "dense": 0.0}},
    "a rate that is a text": {"rates": {**asdict(EVEN), "dense": "fast"}},
    "a rate that is nothing": {"rates": {**asdict(EVEN), "dense": None}},
}


@pytest.mark.parametrize("name", STALE)
def test_a_file_of_other_things_is_as_good_as_none(name: str, tmp_path: Path):
    assert rates._load(written(tmp_path / "rates.json", **STALE[name]), HEADER) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"3", b'"rates"', b"\xff\xfe\x00", b"{}"], ids=repr)
def test_a_damaged_file_is_as_good_as_none(content: bytes, tmp_path: Path):
    file = tmp_path / "rates.json"
    assert rates._load(file, HEADER) is None  # not there
    assert rates._load(tmp_path, HEADER) is None  # a folder
    file.write_bytes(content)
    assert rates._load(file, HEADER) is None


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU with kernels, as far as whoever keeps rates can see; nothing runs on it."""
    monkeypatch.setattr(rates, "implementation", lambda q: "triton")
    monkeypatch.setattr(rates.choices, "made_with", lambda device: {"device": "a GPU"})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(rates.torch, "empty", lambda *size, **_: torch.zeros(size))
    return torch.device("cuda")


def test_a_device_is_measured_once(gpu: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    times = list[int]()

    def measure(dense: object, device: torch.device, dtype: torch.dtype, channels: int) -> Rates:
        times.append(channels)
        return replace(EVEN, units=channels)

    monkeypatch.setattr(rates, "measure", measure)
    file = tmp_path / "new folder" / "attention.json"
    for channels in (64, 128, 64, 128):
        assert rates.measured(attend, gpu, torch.bfloat16, channels, file) == replace(EVEN, units=channels)
    assert times == [64, 128]
    assert sorted(p.name for p in file.parent.iterdir()) == ["rates-128-attention.json", "rates-64-attention.json"]
    (file.parent / "rates-64-attention.json").write_text("damaged")
    rates.measured(attend, gpu, torch.bfloat16, 64, file)
    rates.measured(attend, gpu, torch.bfloat16, 64, file)
    assert times == [64, 128, 64]
    monkeypatch.setattr(rates, "implementation", lambda q: "gather")
    assert rates.measured(attend, gpu, torch.bfloat16, 64, file) is None


def test_rates_that_cannot_be_written_are_no_error(gpu: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rates, "measure", lambda *_: EVEN)
    (tmp_path / "file").write_text("no folder")
    unwritable = tmp_path / "file" / "attention.json"
    assert rates.measured(attend, gpu, torch.bfloat16, 64, unwritable) == EVEN
