"""The trainer's evaluation: held-out chunks, and many processes on a few GPUs."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from worldstride.context import retrieval
from worldstride.models.courtyard.config import CourtyardConfig

FOLDER = Path(__file__).parents[1] / "training" / "courtyard"
SMALL = CourtyardConfig(size=24, width=64, depth=2, heads=1, refine=6, memory=3, window=8)


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        names = ("evaluate", "heldout", "jobs", "origin")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def test_jobs_wait_for_a_gpu_of_those_given(
    scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-5a")
    code = """
import os, sys
from pathlib import Path
mine = Path(sys.argv[1]) / os.environ["CUDA_VISIBLE_DEVICES"]
mine.touch(exist_ok=False)
print(mine.name)
mine.unlink()
sys.exit(int(sys.argv[2]))
"""
    jobs = [
        scripts.jobs.Job(f"j{i}", (sys.executable, "-c", code, str(tmp_path), str(7 * (i == 3))), tmp_path / f"{i}.log")
        for i in range(5)
    ]
    assert scripts.jobs.run_jobs(jobs) == {"j0": 0, "j1": 0, "j2": 0, "j3": 7, "j4": 0}
    assert {(tmp_path / f"{i}.log").read_text().strip() for i in range(5)} == {"4", "GPU-5a"}
    with pytest.raises(ValueError, match="at least 1, got 0"):
        scripts.jobs.run_jobs(jobs, 0)


def test_visible_gpus(scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for count, given, expected in ((2, None, ["0", "1"]), (2, "4,5", ["4", "5"]), (1, "3,99", ["3"]), (0, "", [])):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        if given is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        assert scripts.jobs.visible_gpus() == expected


@pytest.mark.parametrize("failing", [(), ("drift",), "all"])
def test_a_merge_says_which_parts_are_missing(
    scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: Sequence[str]
) -> None:
    parts = list(scripts.evaluate.PARTS)
    failing = parts if failing == "all" else list(failing)
    (tmp_path / "evaluation-drift.json").write_text(json.dumps({"seconds": 9, "rows": {"stale": {}}}))

    def run(jobs: Sequence[SimpleNamespace], at_once: int) -> dict[str, int]:
        for job in jobs:
            assert job.command[-2:] == ("--part", job.name)
            if job.name not in failing:
                facts = {"seconds": 1.5, "commit": "abc1234", "rows": {job.name: {"psnr": 20.0}}}
                (tmp_path / f"evaluation-{job.name}.json").write_text(json.dumps(facts))
        return {job.name: int(job.name in failing) for job in jobs}

    monkeypatch.setattr(scripts.evaluate, "run_jobs", run)
    assert scripts.evaluate.spread(scripts.evaluate.Settings(out=tmp_path)) == bool(failing)
    merged = json.loads((tmp_path / "evaluation.json").read_text())
    assert merged["missing"] == failing
    assert list(merged["rows"]) == [p for p in parts if p not in failing]
    assert "commit" in merged
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation.json"]


def test_the_commit_is_named_where_there_is_git(scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    name = scripts.origin.commit()
    assert name is None or set(name) <= set("0123456789abcdef")
    monkeypatch.setenv("PATH", "")
    assert scripts.origin.commit() is None


def test_memory_begins_where_the_window_of_the_run_ends(scripts: SimpleNamespace) -> None:
    held = scripts.heldout.HeldOut(scripts.heldout.sample("plain", 3, SMALL, torch.device("cpu"), 32), SMALL)
    for window in (8, 3):
        before = held.start - window
        weights = held._seen.flatten(2)
        for i, start in enumerate(held.start.tolist()):
            wanted = ~weights[i, start - window : start].any(0)
            covers = (weights[i : i + 1, : start - window] & wanted).float()
            valid = torch.ones(covers.shape[:2], dtype=torch.bool)
            expected = retrieval.greedy(covers, valid, 3).sort(1).values
            assert torch.equal(held.memory("oracle", 3, window)[i : i + 1], expected)
        for how in ("pose", "random", "oracle"):
            assert bool((held.memory(how, 3, window) < before[:, None]).all())
        # all that is not recent is a candidate: asked for every frame there is, the last one is among them
        least = int(before.min())
        row = int(before.argmin())
        assert held.memory("pose", least, window)[row].tolist() == list(range(least))
    assert held.memory("none", 3, 8).shape == (3, 0)
