"""The command line from outside: what is printed, what is written, exit statuses."""

import builtins
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import worldstride
from worldstride.acceleration import PRESETS, resolve
from worldstride.cli import main
from worldstride.commands.table import table
from worldstride.video import read_video

RANDOM = ["--weights", "random"]
ROLLOUT = ["rollout", "courtyard", *RANDOM, "--acceleration", "steps-2"]


def failure(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    return error


def test_version_models_and_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"worldstride {worldstride.__version__}\n"
    assert main(["models"]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("name", "parameters", "licence", "courtyard", "Apache-2.0"))
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for word in (
        "torch:",
        "cpu instructions:",
        "default device:",
        "number format:",
        "attention:",
        "log-sum-exp",
        "triton:",
        "courtyard weights:",
        "av:",
    ):
        assert word in printed


@pytest.mark.parametrize(
    "command",
    [
        "rollout",
        "prompt",
        "compare",
        "calibrate",
        "bench",
        "gate",
        "decisions",
        "attention",
        "block-recall",
        "verify",
        "presets",
        "models",
        "doctor",
    ],
)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"worldstride {command}" in capsys.readouterr().out


def test_presets_are_printed_as_they_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, settings in PRESETS.items():
        assert main(["presets", name]) == 0
        printed = capsys.readouterr().out
        assert "measured on courtyard" in printed
        assert "on any other model their quality is unmeasured" in printed
        (tmp_path / "printed.toml").write_text(printed)
        assert resolve(tmp_path / "printed.toml") == settings
    assert main(["presets"]) == 0
    assert capsys.readouterr().out.count("\nname = ") == len(PRESETS)
    assert "did you mean 'balanced'" in failure(["presets", "balance"], capsys)


def test_unknown_model(capsys: pytest.CaptureFixture[str]) -> None:
    known = "courtyard, hy_worldplay, hy_worldplay_wan, matrix_game3"
    expected = f"error: unknown model 'cortyard' (did you mean 'courtyard'?); known: {known}\n"
    for command in (["rollout", "cortyard", "--trajectory", "w-4"], ["bench", "rollout", "cortyard"]):
        assert failure(command, capsys) == expected


def test_bad_trajectory_marks_the_place(capsys: pytest.CaptureFixture[str]) -> None:
    error = failure([*ROLLOUT, "--trajectory", "w-6,z-3"], capsys)
    assert "character 5: found 'z'" in error
    _, text, mark = error.rstrip("\n").split("\n")
    assert text[mark.index("^")] == "z"


def test_wrong_device_and_wrong_outputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown device 'toaster'" in failure([*ROLLOUT, "--trajectory", "w-4", "--device", "toaster"], capsys)
    nowhere = str(tmp_path / "nowhere" / "walk.mp4")
    assert "does not exist" in failure([*ROLLOUT, "--trajectory", "w-4", "-o", nowhere], capsys)
    gif = str(tmp_path / "walk.gif")
    assert "a video file ends in .mp4" in failure([*ROLLOUT, "--trajectory", "w-4", "-o", gif], capsys)
    same = ["-o", str(tmp_path / "x.mp4"), "--report", str(tmp_path / "x.mp4")]
    assert "cannot both be" in failure([*ROLLOUT, "--trajectory", "w-4", *same], capsys)
    assert not list(tmp_path.glob("*.mp4"))


def no_model(*_: object, **__: object) -> None:
    raise RuntimeError("a model was loaded")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-o", "w.gif"], "a video file ends in .mp4"),
        (["-o", "w.mp4", "--fps", "0"], "fps must be"),
        (["-o", "w.mp4", "--scale", "0"], "scale must be"),
        (["-o", "w.mp4", "--save", "w.mp4"], "the video and the saved world cannot both be w.mp4"),
        (["-o", "w.mp4", "--save", "w.json"], "the report and the saved world cannot both be w.json"),
        (["-o", "w.mp4", "--report", "sub/../w.mp4"], "the video and the report cannot both be"),
        (["--report", "old.world", "--from", "old.world"], "the world to go on from and the report cannot both be"),
        (["--save", "old.world", "--from", "old.world", "--dtype", "float32"], "leave out --dtype float32"),
        (["--save", "old.world", "--from", "old.world", "--compile"], "leave out --compile"),
        (["--report", "walk.json"], "the report would overwrite the trajectory walk.json"),
    ],
)
def test_rollout_refuses_before_any_work(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pytest.importorskip("av")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("worldstride.commands.options.load", no_model)
    monkeypatch.setattr("worldstride.commands.rollout.open_session", no_model)
    (tmp_path / "sub").mkdir()
    (tmp_path / "old.world").write_text("old")
    (tmp_path / "walk.json").write_text('[{"keys": ["KeyW"], "frames": 4}]')
    trajectory = "walk.json" if "trajectory" in words else "w-4"
    assert words in failure(["rollout", "courtyard", "--trajectory", trajectory, *arguments], capsys)
    assert (tmp_path / "old.world").read_text() == "old"


def test_missing_pyav_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without_av(name: str, *rest: Any) -> Any:
        if name == "av":
            raise ImportError("No module named 'av'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_av)
    with monkeypatch.context() as patch:
        patch.setattr("worldstride.commands.options.load", no_model)  # refused before any work
        error = failure([*ROLLOUT, "--trajectory", "w-4", "-o", str(tmp_path / "walk.mp4")], capsys)
    assert "worldstride[video]" in error
    report = tmp_path / "walk.json"
    assert main([*ROLLOUT, "--trajectory", "w-4", "--report", str(report)]) == 0  # no video was asked for
    assert len(json.loads(report.read_text())["chunks"]) == 1


def test_rollout_writes_video_report_and_world(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("av")
    video, world = tmp_path / "walk.mp4", tmp_path / "walk.world"
    arguments = ["--trajectory", "w-6,right-3", "--seed", "7", "--noise-seed", "3", "--scale", "2"]
    assert main([*ROLLOUT, *arguments, "-o", str(video), "--save", str(world)]) == 0
    output = capsys.readouterr()
    assert "12 frames in" in output.out
    assert "frames/s" in output.err  # the progress bar
    assert tuple(read_video(video).shape) == (8 + 12, 192, 192, 3)
    report = json.loads((tmp_path / "walk.json").read_text())
    assert report["interrupted"] is False
    assert report["error"] is None
    assert report["world"] == {"family": "courtyard", "seed": 7, "noise_seed": 3}
    assert [c["index"] for c in report["chunks"]] == [0, 1, 2]
    assert report["totals"]["frames"] == 12
    assert report["totals"]["evaluations"] == 6
    assert {"versions", "hardware", "command", "date", "engine", "trajectory"} <= report.keys()
    assert report["acceleration"]["name"] == "steps-2"

    onward = tmp_path / "onward.json"
    going_on = ["rollout", "courtyard", "--trajectory", "left-4", "--from", str(world), "--report", str(onward)]
    assert main(going_on) == 0
    later = json.loads(onward.read_text())
    assert [c["index"] for c in later["chunks"]] == [3]
    assert later["acceleration"]["name"] == "steps-2"
    assert "leave out --seed" in failure([*going_on, "--seed", "1"], capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["onward.json", "walk.json", "walk.mp4", "walk.world"]


def test_a_saved_world_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    pytest.importorskip("av")
    whole, first, second = (tmp_path / f"{name}.mp4" for name in ("whole", "first", "second"))
    world = tmp_path / "a.world"
    assert main([*ROLLOUT, "--trajectory", "w-4,right-4", "-o", str(whole), "--scale", "1"]) == 0
    assert main([*ROLLOUT, "--trajectory", "w-4", "-o", str(first), "--scale", "1", "--save", str(world)]) == 0
    going_on = ["rollout", "courtyard", "--trajectory", "right-4", "--from", str(world), "-o", str(second)]
    assert main([*going_on, "--scale", "1"]) == 0
    assert len(read_video(second)) == 4  # its first frames are in the first video
    reports = [json.loads((tmp_path / f"{n}.json").read_text())["chunks"] for n in ("whole", "first", "second")]
    assert [c["signals"] for c in reports[0]] == [c["signals"] for c in reports[1] + reports[2]]


def test_rollout_along_cameras(tmp_path: Path) -> None:
    poses = np.tile(np.eye(4), (5, 1, 1))
    poses[:, 2, 3] = np.linspace(0, 0.4, 5)
    np.save(tmp_path / "poses.npy", poses)
    report = tmp_path / "r.json"
    assert main([*ROLLOUT, "--family", "plain", "--trajectory", str(tmp_path), "--report", str(report)]) == 0
    assert len(json.loads(report.read_text())["chunks"]) == 2


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to one process")
def test_ctrl_c_leaves_a_playable_video_and_a_valid_report(tmp_path: Path) -> None:
    pytest.importorskip("av")
    video, world = tmp_path / "walk.mp4", tmp_path / "walk.world"
    arguments = [*ROLLOUT, "--trajectory", "w-4000", "-o", str(video), "--save", str(world), "--scale", "1"]
    log = tmp_path / "log"
    with log.open("wb") as stream:
        child = subprocess.Popen([sys.executable, "-m", "worldstride.cli", *arguments], stdout=stream, stderr=stream)
        try:
            deadline = time.monotonic() + 60
            while b"8/4000" not in log.read_bytes() and time.monotonic() < deadline and child.poll() is None:
                time.sleep(0.05)
            child.send_signal(signal.SIGINT)
            assert child.wait(30) == 130, log.read_text()
        finally:
            child.kill()
    assert "Traceback" not in log.read_text()
    report = json.loads((tmp_path / "walk.json").read_text())
    assert report["interrupted"] is True
    chunks = report["chunks"]
    assert len(chunks) >= 1
    assert [c["index"] for c in chunks] == list(range(len(chunks)))
    assert len(read_video(video)) == 8 + 4 * len(chunks)
    assert worldstride.open(world).frame == 8 + 4 * len(chunks)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "walk.json", "walk.mp4", "walk.world"]


def test_a_failure_in_the_middle_is_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def play(*_: object) -> Iterator[None]:
        raise MemoryError("no room")
        yield

    monkeypatch.setattr(worldstride.Session, "play", play)
    report = tmp_path / "r.json"
    with pytest.raises(MemoryError):
        main([*ROLLOUT, "--trajectory", "w-4", "--report", str(report)])
    assert json.loads(report.read_text())["error"] == "MemoryError: no room"


def test_tables_align() -> None:
    assert table(("a", "n"), [("x", "1.0"), ("long", "10.5")]).splitlines() == [
        "a        n",
        "----  ----",
        "x      1.0",
        "long  10.5",
    ]
