"""How much of exact attention block selection finds, the shapes and data it is measured on, and the commands."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from attending import normal
from worldstride.attention import reference
from worldstride.attention.layout import BLOCK, Grid
from worldstride.attention.selection import Selection, everything, listed
from worldstride.bench import published
from worldstride.bench.attention_cases import CASES, Case, structured
from worldstride.bench.block_recall import (
    RULES,
    Recorder,
    Sample,
    averaged,
    layouts,
    masses,
    recalls,
    structured_sample,
)
from worldstride.cli import main
from worldstride.commands.attention import Attention
from worldstride.commands.block_recall import _tile
from worldstride.errors import InputError

NAMED = {c.name: c for c in CASES}
EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
STYLE = pytest.mark.parametrize("style", ["boxes", "serpentine"])

# cases


def test_cases_have_the_sizes_of_their_models():
    area = 30 * 52
    for latents in (8, 12, 16, 24):
        case = NAMED[f"HY-WorldPlay chunk, {latents} latents"]
        assert (case.kept, case.keys, math.prod(case.queries)) == (4 * area, latents * area, 4 * area)
    context = NAMED["HY-WorldPlay context pass"]
    assert (context.kept, context.keys) == (930, 20 * area + 930)
    assert (NAMED["Matrix-Game-3.0 new latents"].kept, NAMED["Matrix-Game-3.0 new latents"].keys) == (0, 19 * 880)
    assert NAMED["Cosmos 720p"].keys == 24 * 44 * 80
    assert len(NAMED) == len(CASES)


@EACH_CASE
def test_what_is_kept_of_the_history_makes_the_density(case: Case):
    history = math.prod(case.history)
    for density in (0.05, 0.17, 0.25, 0.31, 0.5, 0.9, 1.0):
        keep = case.keep(density)
        if keep is None:
            assert density < case.kept / case.keys
        elif keep > 0:
            assert (case.kept + keep * history) / case.keys == pytest.approx(density)
            assert keep <= 1
        else:
            assert case.kept / case.keys == pytest.approx(density, abs=0.01)
    assert case.keep(1.0) == 1.0


def test_what_is_always_kept_can_be_denser_than_asked_for():
    eight, sixteen = NAMED["HY-WorldPlay chunk, 8 latents"], NAMED["HY-WorldPlay chunk, 16 latents"]
    assert eight.keep(0.31) is None  # the chunk itself is half of all keys
    assert eight.keep(0.5) == 0
    assert eight.keep(0.4999) == 0  # by no more than a hair
    assert sixteen.keep(0.25) == 0
    assert sixteen.keep(0.625) == pytest.approx(0.5)


@EACH_CASE
@STYLE
def test_layouts_cover_queries_and_every_span_of_keys(case: Case, style: Any):
    queries, spans = case.layouts(style)
    assert queries.tokens == math.prod(case.queries)
    assert sum(s.tokens for s in spans) == case.keys
    assert sum(s.tokens for s in spans if s.free == 0) == case.kept
    assert spans[0].free == spans[0].blocks
    for layout in (queries, *spans):
        assert torch.equal(layout.order.sort().values, torch.arange(layout.tokens))
        assert int(layout.sizes.max()) <= BLOCK
    assert len(spans) == 1 + (case.current is not None) + (case.text > 0)


# structured data

GRID = (3, 10, 12)


def test_structured_data_has_its_shape_and_is_seeded():
    q, k = structured(GRID, 3, 32, seed=1, batch=2)
    assert q.shape == k.shape == (2, 3, 360, 32)
    assert q.dtype == k.dtype == torch.float32
    again = structured(GRID, 3, 32, seed=1, batch=2)
    assert torch.equal(q, again[0])
    assert torch.equal(k, again[1])
    assert not torch.allclose(q, structured(GRID, 3, 32, seed=2, batch=2)[0], atol=0.1)
    assert not torch.equal(q[0], q[1])
    assert not torch.equal(q[:, 0], q[:, 1])
    assert not torch.equal(q, k)
    state = torch.random.get_rng_state()
    structured(GRID, 1, 8, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_later_latents_continue_the_video():
    """A latent is the same whichever call made it, up to its noise."""
    batch = 64  # noise of features is 0.5 a token, and means of so many are near what they have in common
    q, k = structured((4, 6, 8), 2, 32, seed=3, batch=batch)
    later_q, later_k = structured((2, 6, 8), 2, 32, seed=3, later=2, batch=batch)
    bound = 5 * 0.5 * (2 / batch) ** 0.5
    for whole, part in ((q, later_q), (k, later_k)):
        tail = whole[:, :, -2 * 48 :].mean(0)
        assert float((tail - part.mean(0)).abs().max()) < bound
        assert float((tail - whole[:, :, : 2 * 48].mean(0)).abs().mean()) > bound / 3  # and the video moves
    assert not torch.equal(q[:, :, -96:], later_q)  # noise is of its own


def test_keys_near_in_place_score_higher_than_far_ones():
    q, k = structured((1, 16, 24), 4, 64, seed=5)
    scores = (q @ k.mT * 64**-0.5).mean((0, 1))
    rows, columns = torch.arange(384) // 24, torch.arange(384) % 24
    apart = (rows[:, None] - rows).abs() + (columns[:, None] - columns).abs()
    near, middle, far = (
        float(scores[(low <= apart) & (apart < high)].mean()) for low, high in ((1, 3), (3, 8), (15, 40))
    )
    assert near > middle + 0.1
    assert near > far + 0.1


def test_queries_look_near_in_time_more_than_far_off():
    q, k = structured((12, 6, 8), 4, 64, seed=5)
    scores = (q @ k.mT * 64**-0.5).mean((0, 1)).unflatten(0, (12, 48)).unflatten(2, (12, 48))
    same_place = scores.diagonal(dim1=1, dim2=3).mean(-1)  # [latent, latent]
    assert float(same_place.diagonal().mean()) > float(same_place[0, 6:].mean())


# recall


def small_sample(seed: int = 1) -> Sample:
    case = Case("small", 1, 2, (2, 9, 10), (2, 4, 4), (5, 9, 10), (2, 9, 10), channels=32)
    q, own = structured(case.queries, 2, 32, seed, 5)
    old = structured(case.history, 2, 32, seed)[1]
    return Sample("structured, small", 3, q, torch.cat([old, own], 2), case.queries, (2, 0, 3))


@STYLE
def test_masses_are_shares_of_exact_attention(style: Any):
    sample = small_sample()
    queries, keys = layouts(sample, (2, 4, 4), style)
    q, k, mass = masses(sample, queries, keys)
    assert mass.shape == (1, 2, 180, keys.blocks)
    assert torch.allclose(mass.sum(-1), torch.ones(1, 2, 180), atol=1e-5)
    assert torch.equal(q, sample.q[:, :, queries.order])
    assert torch.equal(k, sample.k[:, :, keys.order])
    # attention to ones that mark a block is the share that falls on it
    for block in (0, keys.blocks // 2, keys.blocks - 1):
        mark = (keys.owner == block).float()[keys.inverse].expand(1, 2, -1)
        truth = reference(sample.q, sample.k, mark[..., None].expand(-1, -1, -1, 32))[..., 0]
        assert torch.allclose(mass[..., block].double(), truth[:, :, queries.order], atol=1e-5)


def test_blocks_of_a_sample_keep_the_chunk_and_lie_within_segments():
    sample = small_sample()
    queries, keys = layouts(sample, (2, 4, 4), "boxes")
    past = 5 * 90
    assert (queries.tokens, keys.tokens, queries.free) == (180, past + 180, queries.blocks)
    for i, numbers in enumerate(keys.order.split(keys.sizes.tolist())):
        low, high = int(numbers.min()), int(numbers.max())
        assert (low >= past) is bool(keys.kept[i])
        assert not low < 2 * 90 <= high
        assert not low < past <= high


def test_a_list_is_a_table_again():
    _, keys = layouts(small_sample(), (2, 4, 4), "serpentine")
    table = torch.rand(1, 2, 5, keys.blocks, generator=torch.Generator().manual_seed(0)) < 0.5
    table[..., 0] = True
    assert torch.equal(listed(table, keys).table(), table)
    table[..., 0] = False
    assert torch.equal(listed(table, keys).table(), table)
    queries, _ = layouts(small_sample(), (2, 4, 4), "serpentine")
    assert bool(everything(1, 2, queries, keys).table().all())


def test_all_blocks_have_all_of_the_attention():
    for row in recalls(small_sample(), (2, 4, 4), "boxes", (1.0,), (), RULES):
        figures = [row[n] for n in ("kept", "density", "recall", "context_recall")]
        assert figures == pytest.approx([1.0] * 4, abs=1e-5)
        assert 0 < row["context_mass"] < 1


def test_no_rule_beats_the_best_and_every_one_beats_chance():
    """Of structured data, on average over worlds; rules that keep more than was asked for are not compared."""
    rules = {name: rule for name, rule in RULES.items() if rule.guard is None}
    assert len(rules) > 5
    rows = [r for seed in (1, 2) for r in recalls(small_sample(seed), (2, 4, 4), "boxes", (0.2, 0.5), (), rules)]
    for row in rows:  # no rule in no world
        best = next(
            r for r in rows if r["rule"] == "best possible" and r["keep"] == row["keep"]
            and r["context_mass"] == row["context_mass"]
        )  # fmt: skip
        for figure in ("recall", "context_recall"):
            assert best[figure] >= row[figure] - 1e-6
    mean = {(r["rule"], r["keep"]): r for r in averaged(rows, ("rule", "keep"))}
    assert {rule for rule, _ in mean} == {*rules, "best possible", "random"}
    for (rule, keep), row in mean.items():
        assert row["samples"] == 2
        if rule != "random":
            assert row["context_recall"] > mean["random", keep]["context_recall"]
        # recall is what falls on the chunk and what is found of the rest
        assert row["recall"] == pytest.approx(1 - row["context_mass"] * (1 - row["context_recall"]), abs=0.02)
    for rule in {rule for rule, _ in mean}:
        assert mean[rule, 0.5]["context_recall"] > mean[rule, 0.2]["context_recall"]


def test_recall_is_that_of_the_blocks_that_are_listed():
    """A context of four blocks, of which every query looks at one: who finds it, finds everything."""
    grid, tokens = (1, 4, 4), 16
    axis = torch.eye(5).repeat_interleave(tokens, 0)  # [80, 5]: one direction a latent
    k = torch.zeros(1, 1, 5 * tokens, 8)
    k[0, 0, :, :5] = 40 * axis
    q = torch.zeros(1, 1, tokens, 8)
    q[..., 2] = 40.0  # all look at the third latent
    sample = Sample("made", 0, q, k, grid, (4,))
    rows = recalls(sample, (1, 4, 4), "boxes", (0.25,), (0.9,), {"mean": Selection(), "mass": Selection("mass")})
    for row in rows:
        if row["rule"] != "random":
            assert row["recall"] == pytest.approx(1.0)
            assert row["context_recall"] == pytest.approx(1.0)
            assert (row["kept"], row["density"]) == pytest.approx((1 / 4, 2 / 5))
        assert row["context_mass"] == pytest.approx(1.0)
        assert (row["sample"], row["layer"], row["tile"], row["layout"]) == ("made", 0, [1, 4, 4], "boxes")
    assert [(r["rule"], r.get("keep"), r.get("mass")) for r in rows] == [
        ("mean", 0.25, None), ("mass", 0.25, None), ("best possible", 0.25, None), ("random", 0.25, None),
        ("mean", None, 0.9), ("mass", None, 0.9),
    ]  # fmt: skip


def test_shares_of_mass_are_asked_of_rules_that_predict_attention():
    rows = recalls(small_sample(), (2, 4, 4), "boxes", (), (0.5, 0.95), RULES)
    assert {r["rule"] for r in rows} == {name for name, rule in RULES.items() if rule.score != "cosine"}
    found = {(r["rule"], r["mass"]): r for r in rows}
    for rule in {r["rule"] for r in rows}:
        assert found[rule, 0.95]["recall"] >= found[rule, 0.5]["recall"]
        assert found[rule, 0.95]["kept"] >= found[rule, 0.5]["kept"]
    assert found["mass", 0.95]["kept"] > found["mass", 0.5]["kept"]


def test_means_are_taken_over_rows_that_agree():
    figures = ("kept", "density", "recall", "context_recall", "context_mass")

    def row(tile: list[int], keep: float | None, value: float) -> dict[str, Any]:
        return {"tile": tile, "keep": keep, "sample": value, **dict.fromkeys(figures, value)}

    rows = [row([1, 4, 4], 0.5, 1.0), row([1, 4, 4], 0.5, 2.0), row([1, 4, 4], None, 5.0), row([2, 4, 4], 0.5, 7.0)]
    mean = averaged(rows, ("tile", "keep"))
    assert [(r["tile"], r["keep"], r["samples"]) for r in mean] == [
        ([1, 4, 4], 0.5, 2), ([1, 4, 4], None, 1), ([2, 4, 4], 0.5, 1),
    ]  # fmt: skip
    for name in figures:
        assert [r[name] for r in mean] == [1.5, 5.0, 7.0]
    assert averaged([], ("tile",)) == []


def test_a_recorder_attends_densely_and_keeps_attention_to_a_context():
    recorder = Recorder()
    q, k, v = (normal(1, 2, n, 16, seed=i) for i, n in enumerate((6, 20, 20)))
    part = recorder(q, k, v, lse=True)
    truth = reference(q, k, v, lse=True)
    assert torch.allclose(part.out.double(), truth.out, atol=1e-5)
    assert torch.allclose(part.lse.double(), truth.lse, atol=1e-5)
    recorder(q, k[:, :, :6], v[:, :, :6])  # among themselves
    ((seen_q, seen_k),) = recorder.seen
    assert torch.equal(seen_q, q)
    assert torch.equal(seen_k, k)


def test_a_structured_sample_is_a_chunk_behind_its_history():
    case = Case("tiny", 1, 16, (2, 4, 6), (2, 4, 4), (3, 4, 6), (2, 4, 6), channels=16)
    sample = structured_sample(case, 2, torch.device("cpu"))
    assert sample.name == "structured, tiny"
    assert (sample.q.shape, sample.k.shape) == ((1, 2, 48, 16), (1, 2, 5 * 24, 16))
    assert (sample.grid, sample.segments) == ((2, 4, 6), (3,))
    assert torch.equal(sample.k[:, :, :72], structured((3, 4, 6), 2, 16, 1)[1])
    assert torch.equal(sample.q, structured((2, 4, 6), 2, 16, 1, 3)[0])


# the published design


@pytest.mark.parametrize(
    ("grid", "tile"),
    [((4, 8, 4), (4, 8, 4)), ((5, 9, 7), (2, 8, 8)), ((1, 1, 1), (4, 8, 4)), ((3, 30, 13), (4, 4, 8))],
    ids=str,
)
def test_tokens_in_boxes_come_back(grid: Grid, tile: Grid):
    x = normal(2, 3, math.prod(grid), 4) + 10  # nothing is zero but what is padded
    cut = published.tiled(x, grid, tile)
    counts = [-(-n // s) for n, s in zip(grid, tile, strict=True)]
    assert cut.shape == (2, 3, math.prod(counts), math.prod(tile), 4)
    assert torch.equal(published.untiled(cut, grid, tile), x)
    assert int((cut != 0).sum()) == x.numel()


def test_boxes_hold_neighbours():
    grid, tile = (2, 5, 4), (2, 4, 2)
    numbers = (1 + torch.arange(40.0)).view(1, 1, 40, 1)
    cut = published.tiled(numbers, grid, tile)[0, 0, :, :, 0]
    video = numbers.view(grid)
    assert torch.equal(cut[0], video[:, :4, :2].flatten())
    assert torch.equal(cut[1], video[:, :4, 2:].flatten())
    assert cut[2].view(tile)[:, 0].flatten().tolist() == video[:, 4, :2].flatten().tolist()
    assert not cut[2].view(tile)[:, 1:].any()


# commands


def failure(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    return error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_the_benchmark_of_attention_says_that_it_needs_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "rows.json"
    error = failure(["attention", "--out", str(out)], capsys)
    assert error == "error: the benchmark needs a CUDA GPU; the default device here is cpu\n"
    assert not out.exists()


def test_cases_that_are_not_known_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("worldstride.commands.attention.pick_device", lambda: torch.device("cuda"))
    with pytest.raises(InputError, match=r"no case matches wan or sora; known: HY-.*Cosmos 720p"):
        Attention(("wan", "sora")).run("")
    with pytest.raises(InputError, match="--rounds must be an integer of at least 1, got 0"):
        Attention(rounds=0).run("")


def test_recall_of_the_shipped_world_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "recall.json"
    command = ["block-recall", "courtyard", "--worlds", "1", "--chunks", "2", "--tiles", "1x4x4", "--keeps", "0.25"]
    assert main([*command, "--shares", "0.9", "--no-synthetic", "--device", "cpu", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert str(out) in printed
    found = json.loads(out.read_text())
    assert found["format"] == "worldstride-recall"
    rows = {(r["rule"], r["keep"], r["mass"]): r for r in found["rows"]}
    assert len(rows) == len(found["rows"])
    asked = {(name, 0.25, None) for name in (*RULES, "best possible", "random")}
    asked |= {(name, None, 0.9) for name, rule in RULES.items() if rule.score != "cosine"}
    assert rows.keys() == asked
    for (rule, keep, _), row in rows.items():
        # eight layers at three evaluations
        assert (row["kind"], row["tile"], row["layout"], row["samples"]) == ("courtyard", [1, 4, 4], "boxes", 24)
        assert row["kept"] <= row["density"] <= 1
        assert 0 < row["context_recall"] <= 1
        if keep is not None and RULES.get(rule, Selection()).guard is None:
            assert row["kept"] == pytest.approx(0.25)
            assert row["recall"] <= rows["best possible", 0.25, None]["recall"] + 1e-6
    mass, random = rows["mass", 0.25, None], rows["random", 0.25, None]
    assert mass["context_recall"] > random["context_recall"] > 0.05
    assert {r["layer"] for r in found["layers"]} == set(range(8))
    assert all(r["samples"] == 3 for r in found["layers"])
    # the table says the same
    header, *lines = [line for line in printed.splitlines() if line.strip()]
    assert header.split()[:5] == ["data", "tile", "layout", "asked", "rule"]
    (line,) = [words for words in map(str.split, lines) if words[:1] == ["courtyard"] and "random" in words]
    assert line[1:5] == ["1x4x4", "boxes", "keep", "0.25"]
    figures = [random[n] for n in ("kept", "density", "context_recall", "recall")]
    assert line[-4:] == [f"{f:.3f}" for f in figures]


@pytest.mark.parametrize("text", ["4x8", "4x8x4x1", "4,8,4", "axbxc", "4x-8x4", "", "4xx4", "1.5x4x4"])
def test_a_tile_that_is_none_is_refused_before_anything_is_loaded(
    text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def no_model(*_: object, **__: object) -> None:
        raise RuntimeError("a model was loaded")

    monkeypatch.setattr("worldstride.commands.options.load", no_model)
    error = failure(["block-recall", "courtyard", f"--tiles={text}"], capsys)
    assert error == f"error: a tile is latents x rows x columns, such as 4x8x4, got {text!r}\n"


def test_tiles_are_read():
    assert _tile("4x8x4") == (4, 8, 4)
    assert _tile("1x16x2") == (1, 16, 2)


@pytest.mark.parametrize(("option", "text"), [("--worlds", "--worlds must be"), ("--chunks", "--chunks must be")])
def test_numbers_below_one_are_refused(option: str, text: str, capsys: pytest.CaptureFixture[str]):
    assert text in failure(["block-recall", "courtyard", option, "0"], capsys)


def test_recall_of_a_model_that_is_not_known_is_refused(capsys: pytest.CaptureFixture[str]):
    assert "unknown model 'cortyard' (did you mean 'courtyard'?)" in failure(["block-recall", "cortyard"], capsys)
