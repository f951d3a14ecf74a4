"""Speed benchmarks and what results carry with them."""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import worldstride
from worldstride.acceleration import resolve
from worldstride.bench.environment import environment
from worldstride.bench.results import plain, quantile, write_json
from worldstride.bench.rollout import STAGES, Share, measure
from worldstride.cli import main
from worldstride.commands.bench import _bound
from worldstride.errors import InputError
from worldstride.models.wan import umt5


def test_bench_writes_every_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, threads = tmp_path / "bench.json", torch.get_num_threads()
    arguments = ["bench", "rollout", "courtyard", "--weights", "random", "--chunks", "2", "--warmup", "1"]
    assert main([*arguments, "--accelerations", "off", "steps-2", "--threads", "1", "--out", str(out)]) == 0
    assert torch.get_num_threads() == threads
    result = json.loads(out.read_text())
    assert result["command"].startswith("worldstride bench rollout courtyard --weights random")
    assert "nothing about quality" in result["note"]
    assert result["hardware"]["cpu_threads_used"] == 1
    assert {"worldstride", "python", "torch"} <= result["versions"].keys()
    assert [row["name"] for row in result["rows"]] == ["off", "steps-2"]
    for row, evaluations in zip(result["rows"], (8, 2), strict=True):
        assert row["chunks"] == 2
        assert row["evaluations_per_chunk"] == evaluations
        assert set(row["stage_ms"]) == set(STAGES)
        assert all(0 <= row["stage_ms"][s]["p50"] <= row["stage_ms"][s]["p95"] for s in STAGES)
        assert row["frames_per_second"] > 0
        assert row["context_bytes"] > 0
    first = result["first_frame_seconds"]
    assert first["total"] >= first["import"] + first["load"] + first["new_and_step"] > 0
    assert os.name == "nt" or result["peak_memory_bytes"] > 50 * 2**20
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("denoise ms", "steps-2", "time to first frame", "peak memory", "quality"))


def test_accelerations_take_turns() -> None:
    engine, steps = worldstride.load("courtyard", weights="random"), []
    rows = measure(engine, [resolve("steps-4"), resolve("steps-2")], 1, 0, advance=lambda: steps.append(1))
    assert len(steps) == 2
    assert [row["evaluations_per_chunk"] for row in rows] == [4, 2]
    with pytest.raises(InputError, match="got 0, 0 and 1"):
        measure(engine, [resolve("off")], 0, 0)


def test_a_session_answers_for_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sessions on a GPU whose weights take 100: one keeps 10 and needs 5 for a moment, the other 40 and 30."""
    state = {"now": 100, "most": 0}

    def reset(device: torch.device) -> None:
        state["most"] = state["now"]

    def step(keeps: int, passing: int) -> None:
        state["most"] = max(state["most"], state["now"] + keeps + passing)
        state["now"] += keeps

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: state["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: state["most"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    one, two = (Share(torch.device("cuda"), held=100) for _ in range(2))
    for share, keeps, passing in ((one, 10, 5), (two, 40, 30), (one, 0, 5), (two, -20, 30)):
        with share.used():
            step(keeps, passing)
    assert (one.peak, two.peak) == (115, 170)
    assert (one.held, two.held) == (110, 120)


def test_bench_refuses_wrong_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "rollout", "courtyard", "--weights", "random", "--threads", "0"]) == 2
    assert "--threads must be at least 1, got 0" in capsys.readouterr().err
    assert main(["bench", "rollout", "courtyard", "--weights", "random", "--accelerations", "warp"]) == 2
    assert "unknown acceleration 'warp'" in capsys.readouterr().err


def test_memory_is_bounded_as_on_a_smaller_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["bench", "rollout", "courtyard", "--device", "cpu", "--gigabytes", "24"]) == 2
    assert "--gigabytes bounds a GPU's memory, and this runs on cpu" in capsys.readouterr().err
    asked = list[tuple[float, int | None]]()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=48e9))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: asked.append(given))
    _bound(torch.device("cuda"), 24)
    _bound(torch.device("cuda:1"), 12)
    assert asked == [(0.5, None), (0.25, 1)]
    with pytest.raises(InputError, match=r"must be above 0 and at most 48\.0, got 80"):
        _bound(torch.device("cuda"), 80)


def test_an_encoder_is_held_where_umt5_encodes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for of in (["rollout", "courtyard"], ["walk", "matrix_game3"]):
        assert main(["bench", *of, "--weights", "random", "--encoder"]) == 2
        assert "--encoder is for a rollout of matrix_game3 and hy_worldplay_wan" in capsys.readouterr().err
    monkeypatch.setattr("worldstride.commands.bench._TOLD_BY_UMT5", ("courtyard",))  # small, and so is the encoder
    small = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 2}
    monkeypatch.setattr(umt5, "FULL", {**umt5.FULL, **small})
    out = tmp_path / "held.json"
    few = ["--chunks", "1", "--warmup", "0", "--accelerations", "steps-2", "--dtype", "bfloat16", "--out", str(out)]
    assert main(["bench", "rollout", "courtyard", "--weights", "random", "--encoder", *few]) == 0
    encoder = umt5.drawn_encoder(torch.device("cpu"), torch.bfloat16)
    assert json.loads(out.read_text())["encoder_bytes"] == 2 * sum(p.numel() for p in encoder.parameters())
    assert encoder.get_input_embeddings() is encoder.encoder.embed_tokens  # one table, held once


def test_results_are_valid_json(tmp_path: Path) -> None:
    write_json(tmp_path / "r.json", {"a": (1, math.nan), "b": {"c": math.inf}, "d": "text", "e": None})
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": [1, None], "b": {"c": None}, "d": "text", "e": None}
    facts = environment(torch.device("cpu"), "worldstride x")
    assert plain(facts) == facts
    assert list(tmp_path.iterdir()) == [tmp_path / "r.json"]


def test_quantiles() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([0.0, 1.0], 0.95) == pytest.approx(0.95)
    assert math.isnan(quantile([], 0.5))
