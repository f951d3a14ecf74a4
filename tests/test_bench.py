"""Speed benchmarks and what results carry with them."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

import worldstride
from worldstride.acceleration import resolve
from worldstride.bench.environment import environment
from worldstride.bench.results import plain, quantile, write_json
from worldstride.bench.rollout import STAGES, measure
from worldstride.cli import main
from worldstride.errors import InputError


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


def test_bench_refuses_wrong_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "rollout", "courtyard", "--weights", "random", "--threads", "0"]) == 2
    assert "--threads must be at least 1, got 0" in capsys.readouterr().err
    assert main(["bench", "rollout", "courtyard", "--weights", "random", "--accelerations", "warp"]) == 2
    assert "unknown acceleration 'warp'" in capsys.readouterr().err


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
