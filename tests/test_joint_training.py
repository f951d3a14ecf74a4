"""The small joint model: its codec, its data, and that training computes what a session does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from worldstride.acceleration import Acceleration, resolve
from worldstride.engine import Engine
from worldstride.models.matrix_game3 import retrieval
from worldstride.models.matrix_game3.adapter import NEW, PAST
from worldstride.models.matrix_game3.model import MG3Network

FOLDER = Path(__file__).parents[1] / "training" / "courtyard"
SIDE, LENGTH = 16, 35


def run(script: str, *arguments: str | Path) -> str:
    """Run a script and return what it printed."""
    command = [sys.executable, str(FOLDER / script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def walks(training: SimpleNamespace) -> Any:
    """Two walks of 137 frames, a plain one and a full one."""
    return training.joint_data.Walks(2, 2, 0.5, SIDE, 4, torch.Generator().manual_seed(0), LENGTH)


@pytest.fixture(scope="module")
def network(training: SimpleNamespace) -> MG3Network:
    """With weights that let every input count."""
    torch.manual_seed(0)
    made = training.joint_train.begun(MG3Network(training.joint_train.Settings().for_smoke().model))
    for name, p in made.named_parameters():
        if p.ndim == 2 and any(part in name for part in ("steering", "camera", "rays", "words", "told")):
            p.data.mul_(3)
    return made.requires_grad_(False)


def frames(training: SimpleNamespace, walks: Any, i: int) -> Tensor:
    """Of a walk, uint8 [F, H, W, 3]."""
    return training.joint_courtyard.unfolded(walks.latents[i], 4)[3:]


def test_folded_frames_come_back(training: SimpleNamespace):
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (2, 97, 24, 24, 3), generator=generator, dtype=torch.uint8)
    codec = training.joint_courtyard.FoldedFrames(24, 4, torch.device("cpu"))
    first, later = codec.encode(pictures[:, :57]), codec.encode(pictures[:, 57:])
    assert first.shape == (2, 15, 192, 6, 6)
    assert later.shape == (2, 10, 192, 6, 6)
    assert torch.equal(codec.encode(pictures), torch.cat([first, later], 1))
    assert torch.equal(first[0, 3, :, 0, 0].view(4, 3, 16)[1], first[0, 3, 48:96, 0, 0].view(3, 16))
    whole, _ = codec.decode(torch.cat([first, later], 1), {})
    assert torch.equal(whole, pictures)
    a, state = codec.decode(first[:, :4], {})
    b, state = codec.decode(first[:, 4:], state)
    c, _ = codec.decode(later, state)
    assert torch.equal(torch.cat([a, b, c], 1), pictures)
    for wrong in (pictures[:, :3], pictures[:, :, :8], pictures.float()):
        with pytest.raises(ValueError, match=r"latents show|frames must be uint8"):
            codec.encode(wrong)


def test_memory_is_what_the_models_own_rule_finds(walks: Any):
    grid, seen = retrieval.frustum(), []
    for i in range(2):
        for first in (6, 11, 14, 21):
            path = walks.cameras[i]
            owners = [-(-f // 4) for f in range(1, 4 * (first - 1) + 1)]
            coming = path[4 * (first + PAST) : 4 * (first + PAST + NEW) : 4]
            chosen, _ = retrieval.filled(path[1 : len(owners) + 1], owners, coming, grid)
            (mine,) = walks.recalled(torch.tensor([i]), torch.tensor([first])).tolist()
            assert mine == chosen
            seen.append(tuple(chosen))
    assert len(set(seen)) > 4


def test_walks_refuse_numbers_that_do_not_fit(training: SimpleNamespace):
    for size, fresh, length in ((2, 4, 25), (2, 0, 25), (2, 2, 24)):
        with pytest.raises(ValueError, match=f"25 latents, got {fresh}, {size}, {length}"):
            training.joint_data.Walks(size, fresh, 0.5, SIDE, 4, torch.Generator(), length)


def predicted(training: SimpleNamespace, network: MG3Network, batch: Any, x: Tensor, sigma: float) -> Tensor:
    """The new latents of a batch, as training computes them without noise on what is given."""
    levels = torch.zeros(x.shape[:2])
    levels[:, batch.given :] = int(1000 * sigma)
    text = network.text(training.joint_courtyard.prompt(network.config)["text"])
    told = (batch.cameras, batch.numbers, batch.keys, batch.mouse)
    return training.joint_courtyard.predicted(network, text, (x, levels), batch.memory, told, SIDE)[:, batch.given :]


@pytest.mark.parametrize("memory", [None, 0])
def test_training_computes_what_a_session_does(
    training: SimpleNamespace, walks: Any, network: MG3Network, monkeypatch: pytest.MonkeyPatch, memory: int | None
):
    """Cameras, actions, places in time and memory of every chunk, for two walks at once."""
    asked: list[list[tuple[Tensor, float, Tensor]]] = []
    later = "recalling" if memory is None else "alone"
    for i in range(2):
        engine: Engine = training.joint_courtyard.joint_engine(network, size=SIDE)
        plain, pictures, path = engine.model.velocity, frames(training, walks, i), walks.cameras[i]
        steps: list[tuple[Tensor, float, Tensor]] = []

        def velocity(x: Tensor, sigma: float, *rest: Any, plain: Any = plain, steps: Any = steps) -> Any:
            made = plain(x, sigma, *rest)
            steps.append((x.clone(), sigma, made[0].clone()))
            return made

        monkeypatch.setattr(engine.model, "velocity", velocity)
        prompt = training.joint_courtyard.prompt(network.config)
        session = engine.open(pictures[:1], path[:1], prompt, noise_seed=i)
        session.acceleration = Acceleration("two steps", steps=2, memory=memory)
        for at, end in ((0, 57), (57, 97), (97, 137)):
            report = session.step(cameras=path[at:end]).report
            assert report.context_latents == (5 if at and memory is None else 0)
            session.correct(pictures[at:end])
        asked.append(steps)
    for call, ((x, sigma, v), (other, _, w)) in enumerate(zip(*asked, strict=True)):
        chunk = call // 2
        kind, first = ("first", 0) if chunk == 0 else (later, 1 + 10 * chunk)
        batch = walks.window(kind, torch.arange(2), torch.tensor([first, first]))
        both, speed = torch.cat([x, other]), torch.cat([v, w])
        assert torch.equal(both[:, : batch.given], batch.clean[:, : batch.given])
        assert bool((speed[:, : batch.given] == 0).all())
        made = (both - max(sigma, 0.05) * speed)[:, batch.given :]
        trained = predicted(training, network, batch, both, sigma)
        assert torch.allclose(trained, made, atol=2e-5)
        changes = [
            {"keys": 1 - batch.keys}, {"mouse": batch.mouse + 0.1}, {"numbers": batch.numbers.flip(1)},
            {"cameras": batch.cameras.flip(1)},
        ]  # fmt: skip
        if batch.memory is not None:
            changes.append({"memory": batch.memory.flip(1)})
        for change in changes:  # each of them would be noticed
            wrong = predicted(training, network, replace(batch, **change), both, sigma)
            assert not torch.allclose(wrong, made, atol=2e-4), change


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("joint")
    run("joint_train.py", "--smoke", "--out", out)
    return out


def test_a_smoke_run_writes_weights_that_load_and_play(training: SimpleNamespace, smoke: Path):
    facts = json.loads((smoke / "joint_training.json").read_text())
    assert facts["step"] == 6
    assert facts["samples"] == 12
    assert facts["weights_sha256"] == training.joint_courtyard.read_network(smoke)[1]
    assert {h["step"] for h in facts["history"]} == {1, 2, 3, 4}
    engine = training.joint_courtyard.read_engine(smoke, torch.device("cpu"), torch.float32)
    start = torch.zeros(1, SIDE, SIDE, 3, dtype=torch.uint8)
    prompt = training.joint_courtyard.prompt(engine.model.config)
    session = engine.open(start, torch.eye(4)[None], prompt)
    assert [len(session.step().frames) for _ in range(2)] == [57, 40]
    with pytest.raises(ValueError, match=r"state\.json, as joint_train.py writes it, is missing"):
        training.joint_courtyard.read_engine(smoke / "absent", torch.device("cpu"), torch.float32)


def test_a_run_goes_on_from_an_earlier_ones_weights(training: SimpleNamespace, smoke: Path, tmp_path: Path):
    settings = replace(training.joint_train.Settings(out=tmp_path, initial=smoke, seed=1), walks=2).for_smoke()
    trainer = training.joint_train.Trainer(settings, training.group.Group())
    network, fingerprint, side = training.joint_courtyard.read_network(smoke)
    assert all(map(torch.equal, trainer.network.state_dict().values(), network.state_dict().values()))
    assert all(map(torch.equal, trainer.averaged.state_dict().values(), network.state_dict().values()))
    assert (len(fingerprint), side) == (64, SIDE)
    with pytest.raises(ValueError, match="holds weights of MG3Config"):
        training.joint_train.Trainer(replace(settings, model=training.joint_courtyard.CONFIG), training.group.Group())


def test_training_moves_every_part_of_the_network(training: SimpleNamespace, tmp_path: Path):
    settings = replace(training.joint_train.Settings(out=tmp_path).for_smoke(), seed=1)
    trainer = training.joint_train.Trainer(settings, training.group.Group())
    before = {name: p.clone() for name, p in trainer.network.named_parameters()}
    for kind in training.joint_train.KINDS:
        trainer.train_step(kind)
    still = [name for name, p in trainer.network.named_parameters() if torch.equal(p, before[name])]
    assert not still
    assert all(bool(p.isfinite().all()) for p in trainer.averaged.parameters())


def test_arms_are_measured_against_full_compute_in_both_modes(training: SimpleNamespace, smoke: Path, tmp_path: Path):
    pytest.importorskip("torchao", reason="one arm has weights in 8 bits")
    (tmp_path / "two.toml").write_text("steps = 2\nmemory = 3\n")
    out = tmp_path / "result.json"
    given = ("--weights", smoke, "--worlds", "2", "--chunks", "2", "--at-once", "2", "--device", "cpu")
    arms = ("off", tmp_path / "two.toml", "off+int8")
    printed = run("joint_evaluate.py", *given, "--accelerations", *arms, "--out", out)
    assert "psnr full" in printed
    facts = json.loads(out.read_text())
    assert facts["weights_sha256"] == training.joint_courtyard.read_network(smoke)[1]
    off, two, eight = facts["rows"]
    assert (off["name"], two["name"], eight["name"]) == ("off", "two", "off, int8")
    assert (off["quantised"], eight["quantised"]) == (None, "int8")
    assert off["recurring"] == {"since the last chunk": 0, "ever": 0}  # a first chunk has no context but its image
    assert (off["evaluations_per_chunk"], two["evaluations_per_chunk"]) == (8, 2)
    assert (off["context_latents"], two["context_latents"]) == (2.5, 1.5)  # a world's first chunk has none
    assert {lever["name"]: lever["fired"] for lever in two["levers"]} == {"steps": 16, "memory": 8}
    for mode in ("closed", "forced"):
        assert off["scores"][mode]["psnr_full"]["all"]["mean"] == pytest.approx(80)
        assert off["scores"][mode]["loss"]["all"]["mean"] == 0
        assert 0 < two["scores"][mode]["psnr_full"]["all"]["mean"] < 60
        assert {"all", "revisited", "recent", "novel"} <= off["scores"][mode]["energy"].keys()
    assert off["scores"]["closed"]["energy"] != off["scores"]["forced"]["energy"]
    (tmp_path / "other.toml").write_text('name = "two"\nsteps = 3\n')
    with pytest.raises(ValueError, match="names of their own, got off, two, two"):
        training.joint_evaluate.arms_of([str(tmp_path / "two.toml"), str(tmp_path / "other.toml")])


def test_latents_that_come_again_are_counted(training: SimpleNamespace):
    """Chunks of 15, 10 and 10 latents: 13 was past in the second, 1 memory in it, 2 in the one before."""
    memories = ((), (2, 2, 1), (1, 13, 2, 20), (2,))
    after = (15, 25, 35, 45)
    reports = [
        SimpleNamespace(index=k, history_latents=after[k], context=SimpleNamespace(memory=memory))
        for k, memory in enumerate(memories)
    ]
    assert training.joint_evaluate.recurring(reports) == (8, 4, 4)
    assert training.joint_evaluate.recurring([*reports[:2], reports[3]]) == (4, 1, 1)


def test_consecutive_chunks_are_compared(training: SimpleNamespace, smoke: Path, tmp_path: Path):
    out = tmp_path / "consecutive.json"
    given = ("--weights", smoke, "--worlds", "1", "--chunks", "3", "--device", "cpu", "--out", out)
    assert "chunk before" in run("joint_consecutive.py", *given)
    facts = json.loads(out.read_text())
    assert facts["weights_sha256"] == training.joint_courtyard.read_network(smoke)[1]
    compared = {(of["movement"], of["noise"]): of for of in facts["likeness"]}
    assert len(compared) == 4
    for (_, noise), of in compared.items():  # 8 evaluations of 2 blocks, of contexts the first one
        assert [len(of[n]) for n in ("input", "added", "memory keys", "past values")] == [8, 8, 1, 1]
        # what enters the first block is the latent alone: of a remembered one the same, of a new one its noise's
        assert of["memory keys"][0][0]["cosine"] == pytest.approx(1)
        assert of["memory keys"][0][1]["difference"] > 1e-4
        assert of["input"][0][0]["cosine"] == pytest.approx(1 if noise == "same" else 0, abs=0.1)
        assert of["input"][0][0]["passed"] == (noise == "same")
    rows = {(row["movement"], row["noise"], row["arm"]): row["scores"] for row in facts["rows"]}
    assert len(rows) == 10
    assert {"revisited", "moving"} <= rows["walk", "own", "full"]["energy"].keys()


def test_likeness_counts_pairs(training: SimpleNamespace):
    like = training.joint_watch.Likeness()
    like.add(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[6.0, 8.0], [1.0, 0.0]]))
    assert like.facts() == pytest.approx(
        {"cosine": 50 / (26 * 101) ** 0.5, "difference": (27 / 26) ** 0.5, "passed": 0.5}
    )


def test_blocks_take_over_what_they_are_told_to(training: SimpleNamespace):
    """All but the first and the last, in all evaluations but the last."""
    watch = training.joint_watch.Watch(SimpleNamespace(blocks=[object() for _ in range(4)]), 1, 4)
    watch.before, watch.now = ({(e, b): (name, e, b) for e in range(4) for b in range(4)} for name in ("before", "now"))
    taken = dict[str, dict[tuple[int, int], object]]()
    for arm in training.joint_watch.ARMS:
        watch.arm = arm
        sources = {(e, b): watch.source(e, b) for e in range(4) for b in range(4)}
        taken[arm] = {at: source for at, source in sources.items() if source is not None}
    assert taken == {
        "full": {},
        "chunk before": {(e, b): ("before", e, b) for e in (0, 1, 2) for b in (1, 2)},
        "first evaluation": {(e, b): ("now", 0, b) for e in (1, 2) for b in (1, 2)},
    }


def test_watching_changes_nothing_and_taking_over_does(training: SimpleNamespace, smoke: Path):
    """Of chunks of 56, 40 and 40 frames to come the third takes over."""
    consecutive, settings = training.joint_consecutive, training.joint_evaluate.Settings(smoke, chunks=3)
    model = replace(training.joint_train.Settings().for_smoke().model, depth=4)
    torch.manual_seed(0)
    engine = training.joint_courtyard.joint_engine(training.joint_train.begun(MG3Network(model)).eval(), size=SIDE)
    world = training.joint_evaluate.held_out(engine, settings, 0)
    full, before, first = (consecutive.play(engine, world, 3, "own", arm) for arm in training.joint_watch.ARMS)
    noise = training.joint_evaluate.NoiseBank()
    plain = training.joint_evaluate.play(engine, world, resolve("off"), 3, noise)["closed"][0]
    assert np.abs(full.astype(int) - plain).max() <= 1  # other batches round otherwise
    for arm in (before, first):
        assert np.array_equal(arm[:, :96], full[:, :96])
        assert np.abs(arm[:, 96:].astype(int) - full[:, 96:]).max() > 1
    assert not np.array_equal(before, first)


def test_modes_and_seeds_share_a_batch(training: SimpleNamespace, smoke: Path):
    evaluate = training.joint_evaluate
    engine = training.joint_courtyard.read_engine(smoke, torch.device("cpu"), torch.float32)
    world = evaluate.held_out(engine, evaluate.Settings(smoke, chunks=2), 0)
    noise = evaluate.NoiseBank()
    made = evaluate.play(engine, world, Acceleration("two", steps=2), 2, noise)
    assert {r.batch for _, reports in made.values() for each in reports for r in each} == {4}
    assert made["closed"][0].shape == (2, 96, SIDE, SIDE, 3)
    first, later = slice(0, 56), slice(56, 96)
    assert (made["closed"][0][:, first] == made["forced"][0][:, first]).all()
    assert (made["closed"][0][:, later] != made["forced"][0][:, later]).any()
    assert (made["closed"][0][0] != made["closed"][0][1]).any()
    session = engine.open(world.frames[:1], world.cameras[:1], training.joint_courtyard.prompt(engine.model.config))
    session.acceleration = Acceleration("two", steps=2)
    alone = [
        session.step(cameras=world.cameras[at:end], noise=noise.draw(evaluate.noise_seed(world, 1), k, size, "cpu"))
        for k, (at, end, size) in enumerate(((0, 57, ()), (57, 97, ())))
    ]
    difference = abs(alone[1].frames.astype(int) - made["closed"][0][0, later].astype(int))
    assert difference.max() <= 2  # sums of a batch round otherwise
