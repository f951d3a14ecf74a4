"""Rollouts and benchmarks of models that begin with an image, on the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hy_golden import CPU, VAE, golden
from worldstride.bench.rollout import STAGES
from worldstride.cli import main
from worldstride.commands.beginning import read_prompt
from worldstride.errors import InputError
from worldstride.models.hy_worldplay.loading import random_model
from worldstride.models.hy_worldplay.prompts import save_prompt
from worldstride.models.registry import ModelEntry, find
from worldstride.picture import fit_picture, read_picture
from worldstride.trajectory import counts_latents
from worldstride.video import read_video

HEIGHT, WIDTH = 32, 48


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every variant of HY-WorldPlay is tiny and takes two steps; whatever its weights, they count as asked for."""

    def load(path: Path | None, weights: str, device: torch.device, dtype: torch.dtype) -> Any:
        variant = "ar_distilled_action_model" if path is None else path.name
        made = random_model(golden().config, VAE, CPU, torch.float32, HEIGHT, WIDTH, variant=variant)
        made.steps = 2
        return made, "0" * 64

    def found(name: str) -> ModelEntry:
        entry = find(name)
        return replace(entry, load=load) if entry.name == "hy_worldplay" else entry

    monkeypatch.setattr("worldstride.engine.find", found)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Options that name an image and a prompt."""
    shades = np.linspace(0, 255, 60 * 90 * 3).reshape(60, 90, 3).astype(np.uint8)
    Image.fromarray(shades).save(tmp_path / "first.png")
    states = golden().prompt
    save_file({**states, "negative_text": states["text"].clone()}, tmp_path / "prompt.safetensors", {"text": "a lake"})
    return ["--image", str(tmp_path / "first.png"), "--prompt", str(tmp_path / "prompt.safetensors")]


def failure(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    return capsys.readouterr().err


ROLLOUT = ["rollout", "hy_worldplay", "--trajectory", "w-16,right-15", "--device", "cpu"]
JOINT = ["--path", "bidirectional_model"]


@pytest.mark.usefixtures("small")
def test_a_rollout_begins_with_an_image_and_a_prompt(files: list[str], tmp_path: Path, capsys: Any):
    pytest.importorskip("av")
    video, world = tmp_path / "walk.mp4", tmp_path / "walk.world"
    assert main([*ROLLOUT, *JOINT, *files, "--noise-seed", "3", "-o", str(video), "--save", str(world)]) == 0
    assert "125 frames in" in capsys.readouterr().out
    assert tuple(read_video(video).shape) == (125, 4 * HEIGHT, 4 * WIDTH, 3)  # 32 latents in two chunks
    report = json.loads(video.with_suffix(".json").read_text())
    assert report["world"] == {"image": "first.png", "prompt": "prompt.safetensors", "seed": 0, "noise_seed": 3}
    assert (report["fps"], report["per"], report["note"]) == (24, "latent", "")
    assert [c["frames"] for c in report["chunks"]] == [61, 64]
    assert [c["context_latents"] for c in report["chunks"]] == [0, 16]

    onward = tmp_path / "on.mp4"
    going_on = ["rollout", "hy_worldplay", *JOINT, "--trajectory", "w-16", "--from", str(world), "-o", str(onward)]
    assert main([*going_on, "--scale", "1"]) == 0
    assert tuple(read_video(onward).shape) == (64, HEIGHT, WIDTH, 3)
    assert "a saved world knows its image and prompt" in failure([*going_on, *files], capsys)


@pytest.mark.usefixtures("small")
def test_a_rollout_takes_what_the_prompt_command_saves_and_refuses_damage(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    saved, states = tmp_path / "saved.safetensors", golden().prompt
    save_prompt(saved, states, "a lake")
    given = ["--trajectory", "w-3", *files[:2], "--prompt", str(saved), "--report", str(tmp_path / "r.json")]
    options = ["rollout", "hy_worldplay", "--device", "cpu", *given]
    assert main(options) == 0
    assert {name: t.tolist() for name, t in read_prompt(saved).items()} == {n: t.tolist() for n, t in states.items()}
    whole = saved.read_bytes()
    for damaged, told in (
        (whole[:-1] + bytes([whole[-1] ^ 1]), "damaged: its contents miss their checksum; encode it anew"),
        (whole[:-9], "cannot read the prompt"),
    ):
        saved.write_bytes(damaged)
        assert told in failure(options, capsys)


@pytest.mark.usefixtures("small")
def test_another_image_is_another_world(files: list[str], tmp_path: Path):
    pytest.importorskip("av")
    shown = []
    for i, shade in enumerate((20, 230)):
        Image.new("RGB", (48, 32), (shade,) * 3).save(tmp_path / "first.png")
        options = ["--trajectory", "w-3", "-o", str(tmp_path / f"{i}.mp4"), "--per", "latent"]
        assert main(["rollout", "hy_worldplay", "--device", "cpu", *files, *options]) == 0
        shown.append(read_video(tmp_path / f"{i}.mp4").float())
    assert shown[0].shape[0] == 13
    assert (shown[0] - shown[1]).abs().mean() > 1


@pytest.mark.usefixtures("small")
def test_random_weights_make_up_what_is_missing(tmp_path: Path, capsys: Any):
    report = tmp_path / "r.json"
    arguments = ["rollout", "--trajectory", "w-3", "--model", "hy_worldplay", "--random-weights", "--device", "cpu"]
    assert main([*arguments, "--report", str(report)]) == 0
    made = json.loads(report.read_text())
    assert made["world"] == {"image": "made up", "prompt": "made up", "seed": 0, "noise_seed": 0}
    assert "nothing about quality" in made["note"]
    assert made["engine"]["weights"] == "random"
    assert "nothing about quality" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_pose_files_count_latents_and_others_frames(tmp_path: Path, files: list[str]):
    path = np.tile(np.eye(4), (20, 1, 1))
    path[:, 2, 3] = np.arange(20) * 0.08
    inner = [[969.697, 0, 960], [0, 969.697, 540], [0, 0, 1]]
    poses = {str(i): {"extrinsic": pose.tolist(), "K": inner} for i, pose in enumerate(path[:8])}
    (tmp_path / "poses.json").write_text(json.dumps(poses))
    (tmp_path / "cameras.json").write_text(json.dumps({"cameras": path.tolist()}))
    (tmp_path / "keys.json").write_text('[{"keys": ["KeyW"], "frames": 13}]')
    np.save(tmp_path / "path.npy", path)
    counts = {"poses.json": 2, "cameras.json": 2, "keys.json": 1, "path.npy": 2, "w-8": 3}
    for name, chunks in counts.items():
        source = name if name == "w-8" else str(tmp_path / name)
        assert counts_latents(source) == (name in ("poses.json", "w-8"))
        report = tmp_path / "r.json"
        options = ["--trajectory", source, "--report", str(report), "--device", "cpu", "--acceleration", "steps-2"]
        assert main(["rollout", "hy_worldplay", *files, *options]) == 0
        made = json.loads(report.read_text())
        assert (name, len(made["chunks"])) == (name, chunks)
        assert made["per"] == ("latent" if name in ("poses.json", "w-8") else "frame")


@pytest.mark.usefixtures("small")
def test_what_is_missing_or_wrong_is_said(files: list[str], tmp_path: Path, capsys: Any):
    image, prompt = files[:2], files[2:]
    assert "'hy_worldplay' begins with an image; give --image" in failure([*ROLLOUT, *prompt], capsys)
    assert "needs encoder states of a prompt; give --prompt" in failure([*ROLLOUT, *image], capsys)
    assert "leave out --family plain" in failure([*ROLLOUT, *files, "--family", "plain"], capsys)
    assert "no image nowhere.png" in failure([*ROLLOUT, *prompt, "--image", "nowhere.png"], capsys)
    assert "no prompt nowhere" in failure([*ROLLOUT, *image, "--prompt", "nowhere"], capsys)
    assert "cannot read the image" in failure([*ROLLOUT, *prompt, "--image", prompt[1]], capsys)
    assert "it must be a safetensors file" in failure([*ROLLOUT, *image, "--prompt", image[1]], capsys)
    over = [*ROLLOUT, *files, "--report", image[1]]
    assert "the report would overwrite the image" in failure(over, capsys)
    assert "the saved world would overwrite the prompt" in failure([*ROLLOUT, *files, "--save", prompt[1]], capsys)
    save_file({"txet": torch.zeros(1)}, tmp_path / "other.safetensors")
    wrong = [*ROLLOUT, *image, "--prompt", str(tmp_path / "other.safetensors")]
    assert "unknown prompt states 'txet' (did you mean 'text'" in failure(wrong, capsys)
    court = ["rollout", "courtyard", "--random-weights", "--trajectory", "w-4"]
    assert "begins in a procedural world; leave out --image" in failure([*court, *image], capsys)
    assert "begins in a procedural world; leave out --prompt" in failure([*court, *prompt], capsys)


def test_pictures_are_covered_and_cut_in_the_middle(tmp_path: Path):
    shades = np.zeros((40, 100, 3), np.uint8)
    shades[:, 20:80] = 200  # what a frame of 2 by 3 keeps
    Image.fromarray(shades).save(tmp_path / "wide.png")
    picture = read_picture(tmp_path / "wide.png")
    frame = fit_picture(picture, 20, 30)
    assert (tuple(frame.shape), frame.dtype) == ((20, 30, 3), torch.uint8)
    assert (frame.int() - 200).abs().max() < 20  # a sharp filter overshoots at edges
    assert not fit_picture(picture, 20, 50)[:, :6].any()
    tall = Image.new("L", (3, 9), 77)
    tall.save(tmp_path / "tall.png")
    assert fit_picture(read_picture(tmp_path / "tall.png"), 32, 48).eq(77).all()
    with pytest.raises(InputError, match="no image"):
        read_picture(tmp_path / "none.png")


@pytest.mark.usefixtures("small")
def test_a_benchmark_says_what_every_step_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    first = {"total": 3.0, "import": 1.0, "load": 1.0, "new_and_step": 1.0}
    monkeypatch.setattr("worldstride.commands.bench.time_to_first_frame", lambda *_: first)  # a process of its own
    out = tmp_path / "b.json"
    options = [*JOINT, "--chunks", "1", "--warmup", "0", "--device", "cpu", "--out", str(out)]
    arguments = ["bench", "rollout", "--accelerations", "off", "--model", "hy_worldplay", "--random-weights"]
    assert main([*arguments, *options]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert set(row["stage_ms"]) == set(STAGES)
    assert len(row["evaluation_ms"]) == 2
    assert sum(row["evaluation_ms"]) <= row["stage_ms"]["denoise"]["p50"]
    assert row["tflops"] == pytest.approx(row["gigaflops_per_chunk"] / 1000 / row["seconds"]["core"])
    assert row["gigaflops_per_chunk"] > 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("TFLOP/s", "peak GiB", "evaluations, ms by solver step"))


def test_a_model_without_a_name_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "rollout", "--model"])
    assert stop.value.code == 2
    assert "'model'" in capsys.readouterr().err
    assert "unknown model 'nothing'" in failure(["bench", "rollout", "--model=nothing"], capsys)
