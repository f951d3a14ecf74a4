"""The trainer: its data, its optimisers, its files, and a run in miniature."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import worldstride
from worldstride import Action
from worldstride.models.courtyard.config import CourtyardConfig
from worldstride.models.courtyard.weights import random_network, read_network

FOLDER = Path(__file__).parents[1] / "training" / "courtyard"
SMALL = CourtyardConfig(size=24, width=64, depth=2, heads=1, refine=6, memory=3, window=2, sink=1)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def train(*arguments: str | Path) -> str:
    """Run the script and return what it printed."""
    command = [sys.executable, str(FOLDER / "train.py"), "--smoke", *map(str, arguments)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smoke")
    train("--out", out)
    return out


def test_a_smoke_run_writes_weights_that_load_and_play(smoke: Path):
    facts = json.loads((smoke / "training.json").read_text())
    assert facts["step"] == 6
    assert facts["contexts"] == 12
    assert facts["commit"] is None or len(facts["commit"]) >= 7
    engine = worldstride.load("courtyard", smoke / "weights.safetensors", device="cpu")
    chunk = engine.new(seed=1).step(Action(frozenset({"KeyW"})))
    assert chunk.frames.shape == (4, 24, 24, 3)
    assert all(path.stat().st_size < 16 * 2**20 for path in smoke.rglob("*"))


def test_a_run_mixes_contexts_encoded_at_once_and_chunk_by_chunk(tmp_path: Path):
    train("--out", tmp_path, "--kept-share", "0.5", "--steps", "20")
    history = json.loads((tmp_path / "training.json").read_text())["history"]
    losses = [h for h in history if "mean_loss" in h]
    for name in ("mean_loss", "mean_kept_loss"):
        assert any(h[name] is not None and h[name] > 0 for h in losses)
    scores = history[-1]
    assert all(scores[f"{family}_{how}_mse"] > 0 for family in ("plain", "courtyard") for how in ("kept", "whole"))


def test_training_moves_every_part_of_the_network(smoke: Path, training: SimpleNamespace):
    tensors, facts = training.checkpoint.load_state(smoke / "state")
    begun = training.train.Settings().for_smoke()
    torch.manual_seed(begun.seed)
    fresh = training.train.CourtyardNetwork(begun.model).state_dict()
    trained = training.checkpoint.part(tensors, "network")
    assert facts["progress"] == 1.0
    assert trained.keys() == fresh.keys()
    assert not [name for name, value in trained.items() if torch.equal(value, fresh[name])]
    assert all(bool(value.isfinite().all()) for value in trained.values())


def miniature(training: SimpleNamespace, **changes: object):
    settings = replace(training.train.Settings(steps=8).for_smoke(), smoke=True, **changes)
    return training.train.Trainer(settings, training.group.Group())


def test_a_run_goes_on_from_its_state(training: SimpleNamespace, tmp_path: Path):
    trainer = miniature(training, out=tmp_path)
    for _ in range(3):
        trainer.train_step(trainer.step)
        trainer.step += 1
    trainer._save_state()
    resumed = miniature(training, resume=tmp_path / "state")
    assert resumed.step == 3
    for name, value in trainer.network.state_dict().items():
        assert torch.equal(resumed.network.state_dict()[name], value)
    for name, value in trainer.averaged.state_dict().items():
        assert torch.equal(resumed.averaged.state_dict()[name], value.half().float())
    moments = trainer.optimizer.state()
    assert moments
    assert resumed.optimizer.state().keys() == moments.keys()
    assert all(torch.equal(value, moments[name]) for name, value in resumed.optimizer.state().items())
    train("--out", tmp_path / "more", "--resume", tmp_path / "state", "--steps", "8")
    facts = json.loads((tmp_path / "more" / "training.json").read_text())
    assert facts["step"] == 8
    assert facts["contexts"] == 2 * (8 - 3)
    after, _ = training.checkpoint.load_state(tmp_path / "more" / "state")
    assert not torch.equal(after["network.out.weight"], trainer.network.out.weight)


def test_the_same_seed_trains_the_same_weights(training: SimpleNamespace):
    def trained(seed: int) -> Tensor:
        trainer = miniature(training, seed=seed)
        trainer.train_step(0)
        return torch.cat([p.detach().flatten() for p in trainer.network.parameters()])

    a, b, other = trained(0), trained(0), trained(1)
    assert torch.equal(a, b)
    assert not torch.equal(a, other)


def test_states_are_split_below_the_limit_and_come_back(training: SimpleNamespace, tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{i}": torch.randn(1024, 1100, generator=generator) for i in range(8)}  # 4.3 MiB each
    tensors |= {"half": torch.ones(3).half(), "scalar": torch.tensor(2.0)}
    training.checkpoint.save_state(tmp_path, tensors, {"step": 5})
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 3
    assert all(path.stat().st_size < 16 * 2**20 for path in files)
    loaded, facts = training.checkpoint.load_state(tmp_path)
    assert facts["step"] == 5
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[k], v) and loaded[k].dtype == v.dtype for k, v in tensors.items())


def test_a_crash_while_saving_leaves_the_old_state(
    training: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def saved(step: int, value: float) -> None:
        tensors = {f"t{i}": torch.full((1024, 2048), value) for i in range(2)}  # 8 MiB each
        training.checkpoint.save_state(tmp_path, tensors, {"step": step})

    def loaded() -> tuple[object, set[float]]:
        tensors, facts = training.checkpoint.load_state(tmp_path)
        return facts["step"], {float(t.mean()) for t in tensors.values()}

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    saved(5, 1.0)
    for step in (5, 6):  # also a step that was saved before
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(training.checkpoint, "write_json", crash)
            saved(step, 2.0)
        assert loaded() == (5, {1.0})
    for value in (3.0, 4.0):
        saved(5, value)
        assert loaded() == (5, {value})
        assert len(list(tmp_path.iterdir())) == 3  # what state.json does not list is gone
    saved(6, 5.0)
    assert loaded() == (6, {5.0})
    names = ["state-6-0.safetensors", "state-6-1.safetensors", "state.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_a_run_starts_from_weights_of_its_own_configuration_only(
    training: SimpleNamespace, smoke: Path, tmp_path: Path
):
    trainer = miniature(training, initial=smoke / "weights.safetensors")
    trained, _ = read_network(smoke / "weights.safetensors")
    assert all(torch.equal(v, trained.state_dict()[k]) for k, v in trainer.network.state_dict().items())
    assert all(p.requires_grad for p in trainer.network.parameters())
    # with other patches everything that does not see pixels is as it was
    narrow = replace(trained.config, patch_width=12)
    other = miniature(training, initial=smoke / "weights.safetensors", model=narrow).network.state_dict()
    kept = {k for k, v in trained.state_dict().items() if v.shape == other[k].shape}
    assert all(torch.equal(other[k], trained.state_dict()[k]) for k in kept)
    assert {k.split(".")[0] for k in other.keys() - kept} == {"clean_in", "noisy_in", "out", "place"}
    training.checkpoint.save_weights(tmp_path / "w.safetensors", random_network(SMALL), SMALL, {})
    with pytest.raises(ValueError, match="the run is for"):
        miniature(training, initial=tmp_path / "w.safetensors")


def test_matrices_of_the_blocks_go_to_muon(training: SimpleNamespace):
    network = random_network(SMALL).requires_grad_(True)
    adam, muon = training.optimizer.Optimizer(network, 0.02, 0.002).parts
    assert [type(adam), type(muon)] == [torch.optim.AdamW, torch.optim.Muon]

    def names(part: torch.optim.Optimizer) -> set[str]:
        mine = {id(p) for group in part.param_groups for p in group["params"]}
        return {name for name, p in network.named_parameters() if id(p) in mine}

    matrices = ("q.weight", "k.weight", "v.weight", "o.weight", "up.weight", "down.weight")
    assert names(muon) == {f"blocks.{i}.{name}" for i in range(SMALL.depth) for name in matrices}
    assert names(adam) == {name for name, _ in network.named_parameters()} - names(muon)
    assert sum(len(g["params"]) for g in adam.param_groups) == len(names(adam))


def test_the_optimisers_state_round_trips_in_half_the_bytes(training: SimpleNamespace):
    def stepped(count: int):
        network = random_network(SMALL).requires_grad_(True)
        optimizer = training.optimizer.Optimizer(network, 0.02, 0.002)
        generator = torch.Generator().manual_seed(0)
        for _ in range(count):
            for p in network.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step(1.0)
        return optimizer

    state, fresh = stepped(2).state(), stepped(1)
    assert {v.dtype for v in state.values() if v.dim()} == {torch.bfloat16}
    fresh.load_state(state)
    assert fresh.state().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in fresh.state().items())


def pool(training: SimpleNamespace, seed: int = 0, frames: int = 40):
    generator = torch.Generator().manual_seed(seed)
    return training.data.Pool("courtyard", 2, 1, SMALL, generator, frames=frames)


@pytest.mark.parametrize(
    ("size", "fresh", "words"),
    [(64, 24, "a multiple of that, got 24"), (8, 16, "at least the 16 fresh worlds, got a size of 8"), (8, 0, "got 0")],
)
def test_pools_refuse_numbers_that_do_not_fit(training: SimpleNamespace, size: int, fresh: int, words: str):
    with pytest.raises(ValueError, match=words):
        training.data.Pool("plain", size, fresh, SMALL, torch.Generator())  # 16 plain worlds are rendered at once


@pytest.mark.parametrize("random_memory", [0.0, 1.0])
def test_contexts_hold_nothing_of_the_window_or_the_future_as_memory(training: SimpleNamespace, random_memory: float):
    walks = pool(training)
    walks.patches[:] = torch.arange(40, dtype=torch.uint8)[:, None, None]  # a frame's picture tells its number
    kind = training.data.ContextKind(3, 2, 1)
    for _ in range(20):
        batch = walks.draw(16, kind, 3, random_memory, 0.0)
        index = batch.context[:, :, 0, 0].long()
        start = batch.target_frames[:, 0]
        assert torch.equal(batch.target[:, :, :, 0, 0].flatten(1).long(), batch.target_frames)
        assert torch.equal(batch.context_kinds, torch.tensor([2, 1, 1, 1, 0, 0]).expand(16, -1))
        assert torch.equal(batch.context_ranks, torch.arange(-6, 0).expand(16, -1))
        assert bool((index[:, 0] == 0).all())
        memory = index[:, 1:4]
        assert bool((memory < start[:, None] - 2).all())
        assert bool((memory.diff(dim=1) >= 0).all())
        assert torch.equal(index[:, 4:], start[:, None] + torch.tensor([-2, -1]))
        assert bool((batch.target_frames < 40).all())
        assert bool((batch.target_frames >= start[:, None]).all())
        assert torch.equal(batch.context_cameras, walks.cameras[batch.walks[:, None], index])
        if not random_memory:
            assert bool((memory.diff(dim=1) > 0).all())  # retrieval picks no frame twice
        gap = (batch.target_frames.unflatten(1, (3, -1))[..., 0] - start[:, None]).clamp_max(16)
        assert torch.equal(batch.target_ranks, gap[..., None] + torch.arange(4))


def test_memory_can_be_retrieved_for_the_first_chunk_alone(training: SimpleNamespace):
    walks, kind = pool(training), training.data.ContextKind(3, 2)
    walks.patches[:] = torch.arange(40, dtype=torch.uint8)[:, None, None]
    retriever, different = training.retriever.Retriever(torch.device("cpu")), 0
    for _ in range(4):
        batch = walks.draw(16, kind, 3, 0.0, 0.0, first_only=1.0)
        start, ends = batch.target_frames[:, 0], batch.target_cameras[:, :, [0, -1]]
        first, every = (
            retriever.memory(views, walks.cameras[batch.walks], start - 2, 3, 2)
            for views in (ends[:, :1].expand(-1, 3, -1, -1, -1).flatten(1, 2), ends.flatten(1, 2))
        )
        index = batch.context[:, :3, 0, 0].long()
        assert torch.equal(index, first)
        different += int((first != every).any(1).sum())
    assert different


def test_batches_follow_the_generators_seed(training: SimpleNamespace):
    kind = training.data.ContextKind(3, 2, 1)

    def drawn(seed: int) -> list[Tensor]:
        walks = pool(training, seed, 24)
        walks.refresh()
        return list(vars(walks.draw(4, kind, 2, 0.3, 0.0)).values())

    a, b, other = drawn(0), drawn(0), drawn(1)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[1], other[1])


def test_own_predictions_enter_contexts_only_when_asked(training: SimpleNamespace):
    walks = pool(training, frames=24)
    walks.own = 255 - walks.patches
    kind, truth = training.data.ContextKind(0, 2), walks.patches

    def shown(own: float) -> tuple[Tensor, Tensor]:
        batch = walks.draw(16, kind, 1, 0.0, own)
        index = batch.target_frames[:, :1] + torch.tensor([-2, -1])
        return batch.context, truth[batch.walks[:, None], index]

    context, true = shown(0.0)
    assert torch.equal(context, true)
    context, true = shown(1.0)
    mine = (context == 255 - true).flatten(2).all(-1)
    assert bool(mine.any())
    assert bool((context == true).flatten(2).all(-1)[~mine].all())
    assert not bool(mine.all())


DRIVER = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from group import Group
from train import Settings, Trainer

group, out = Group(), Path(sys.argv[1])
trainer = Trainer(Settings(out=out, smoke=True).for_smoke(), group)
trainer.run()
seen = {"cameras": trainer.pools["plain"].cameras, "step": trainer.step}
torch.save({"network": trainer.network.state_dict(), **seen}, out / f"rank{group.rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_train_one_network_on_different_worlds(tmp_path: Path):
    (tmp_path / "driver.py").write_text(DRIVER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(FOLDER), *sys.path])}
    done = subprocess.run(
        [*launch, str(tmp_path / "driver.py"), str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    a, b = (torch.load(tmp_path / f"rank{i}.pt") for i in (0, 1))
    assert a["step"] == b["step"] == 6
    assert all(torch.equal(value, b["network"][name]) for name, value in a["network"].items())
    assert not torch.equal(a["cameras"], b["cameras"])
    assert json.loads((tmp_path / "training.json").read_text())["processes"] == 2
