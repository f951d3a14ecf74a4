"""Train the small joint model: `torchrun --nproc-per-node 4 training/courtyard/joint_train.py --minutes 6.5 --out OUT`.

Flow matching on rendered walks, the network predicting clean latents. A window is a world's first chunk, or four past
and ten new latents, with the five that Matrix-Game-3.0's own rule brings back or without any.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import get_args

import torch
import tyro
from group import Group
from joint_courtyard import CONFIG, SHIFT, SIZE, predicted, prompt, read_network, save_network
from joint_data import LENGTH, Batch, Kind, Walks
from optimizer import Optimizer, average_into, rate_at
from origin import commit
from torch import Tensor

from worldstride.bench.results import make_folder, write_json
from worldstride.models.matrix_game3.config import MG3Config
from worldstride.models.matrix_game3.layers import Block
from worldstride.models.matrix_game3.model import MG3Network

KINDS: tuple[Kind, ...] = get_args(Kind)
WARM = 20
"""Steps before the clock starts; every kind of window is compiled in the first of them."""


@dataclass(frozen=True)
class Settings:
    """All settings of a run."""

    out: Path = Path("out/joint")
    """Where weights and facts go."""
    model: MG3Config = field(default_factory=lambda: CONFIG)
    side: int = SIZE
    """Pixels of a frame's height and width."""
    minutes: float = 6.5
    """Length of the run after warm-up; the learning rate follows it."""
    steps: int = 1_000_000
    """Most optimiser steps; whichever of the two ends first."""
    batch: int = 96
    """Windows a GPU a step."""
    walks: int = 1024
    """Most walks held a GPU."""
    begun: int = 384
    """Walks that a run begins with."""
    length: int = LENGTH
    """Latents of a walk."""
    fresh: int = 16
    """Walks that are rendered at once."""
    refresh_every: int = 20
    """Steps between two of which `fresh` walks are rendered anew."""
    plain: float = 0.3
    """Share of walks in plain static courts; the others have rooms and moving things."""
    first: float = 0.12
    """Share of steps on first chunks."""
    alone: float = 0.2
    """Share of the other steps that are without memory."""
    noisy: float = 0.7
    """Share of windows whose past and memory have light noise, as what a model made has."""
    matrix_rate: float = 0.02
    """Muon's learning rate."""
    rate: float = 2e-3
    """AdamW's learning rate."""
    warmup: int = 100
    """Steps over which the rates rise."""
    decay: float = 0.6
    """Share of the run over which they fall linearly to 1 %."""
    average: float = 0.997
    """Decay of the averaged weights."""
    state_minutes: float = 2.0
    """Minutes between saved weights."""
    initial: Path | None = None
    """Folder of an earlier run whose averaged weights this one begins with; take another seed, for other worlds."""
    seed: int = 0
    compile: bool = True
    smoke: bool = False
    """A few steps of a tiny model on the CPU, to see that everything runs."""

    def for_smoke(self) -> Settings:
        """The same run in miniature."""
        tiny = replace(
            self.model, width=32, heads=2, depth=2, hidden=64, frequencies=16, text=8, rows=4, steered=(0,),
            action_width=16, key_width=8, turned=4,
        )  # fmt: skip
        steps = 6 if self.steps > 100 else self.steps
        return replace(
            self, model=tiny, side=16, steps=steps, batch=2, walks=2, length=25, fresh=2, plain=0.5, compile=False
        )


class Trainer:
    """One process's share of a run."""

    def __init__(self, settings: Settings, group: Group) -> None:
        self.s, self.group, self.device = settings, group, group.device
        self.commit = commit()  # of what is run, not of what is there when it ends
        torch.manual_seed(settings.seed)
        config = settings.model
        self.network = begun(MG3Network(config)) if settings.initial is None else _earlier(settings.initial, config)
        self.network.to(self.device)
        self.averaged, self.working = (MG3Network(config).to(self.device) for _ in range(2))
        self.averaged.requires_grad_(False)
        self.averaged.load_state_dict(self.network.state_dict())
        self.working.to(torch.bfloat16 if group.cuda else torch.float32)
        """What computes: a copy of the weights in the precision of the device's matrix units."""
        self.optimizer = Optimizer(self.network, settings.matrix_rate, settings.rate)
        # generators of the training worlds never meet those of single seeded worlds, which live on the CPU
        self.generator = torch.Generator(self.device).manual_seed(2**40 + 1000 * settings.seed + group.rank)
        # the order of kinds is the same in every process, so that all compile the same shapes at once
        self.order = torch.Generator().manual_seed(settings.seed)
        self.states = prompt(config)["text"].to(self.device)
        self.step, self.progress = 0, 0.0
        self.losses: dict[Kind, list[Tensor]] = {kind: [] for kind in KINDS}
        """Of every step since the last report."""
        self.history: list[dict[str, float]] = []
        millions = sum(p.numel() for p in self.network.parameters()) / 1e6
        self.group.log(f"{millions:.2f} M parameters, {group.size} process(es), torch {torch.__version__}")
        torch.backends.cuda.enable_cudnn_sdp(False)  # plans for every shape, and pixels over time are many and short
        if settings.compile and group.cuda:
            from torch._dynamo import config as compiling  # slow to import

            compiling.recompile_limit = 64  # three kinds of windows, and blocks of two kinds
            for name in ("begin", "ask", "steer", "press", "end"):
                setattr(self.working, name, torch.compile(getattr(Block, name), dynamic=False))
        sizes = (settings.walks, settings.fresh, settings.plain, settings.side, config.pixels)
        self.walks = Walks(*sizes, self.generator, settings.length, settings.begun)
        self.group.wait()
        self.group.log(f"{self.walks.count} walks")

    def run(self) -> None:
        """Train to the end of the schedule."""
        s, begin = self.s, None
        saved = time.perf_counter()
        while True:
            if self.step == WARM:
                self.group.wait()
                begin = time.perf_counter()
                self.group.log("warm")
            if self.step % 20 == 0:
                elapsed = 0.0 if begin is None else (time.perf_counter() - begin) / (60 * s.minutes)
                self.progress = self.group.agree(max(elapsed, self.step / s.steps))
            self.progress = max(self.progress, self.step / s.steps)
            if self.progress >= 1:
                break
            if self.step % s.refresh_every == s.refresh_every - 1:
                self.walks.refresh()
            facts = self.train_step(self._kind())
            self.step += 1
            if self.step % 100 == 0 or self.step in (1, 2, 3, 4, WARM):
                self._report(facts, begin)
            if self.group.rank == 0 and time.perf_counter() - saved > 60 * s.state_minutes:
                saved = time.perf_counter()
                self._save(saved - (begin or self.group.born))
        self.group.wait()
        seconds = time.perf_counter() - (begin or self.group.born)
        if self.group.rank == 0:
            self._save(seconds)
        self.group.log(f"trained {self.step} steps in {seconds:.1f} s after warm-up")

    def _kind(self) -> Kind:
        first, alone = torch.rand(2, generator=self.order).tolist()
        if self.step < 2 * len(KINDS):
            return KINDS[self.step % len(KINDS)]
        return "first" if first < self.s.first else "alone" if alone < self.s.alone else "recalling"

    def train_step(self, kind: Kind) -> dict[str, Tensor | float]:
        """One optimiser step."""
        s, ours, theirs = self.s, list(self.network.parameters()), list(self.working.parameters())
        with torch.no_grad():
            torch._foreach_copy_(theirs, ours)
        loss, error = self.loss(self.walks.draw(s.batch, kind))
        loss.backward()
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = None if other.grad is None else other.grad.float()
            other.grad = None
        self.group.average_gradients(ours)
        rate = rate_at(self.step, s.warmup, self.progress, s.decay)
        norm = self.optimizer.step(rate)
        average_into(self.averaged, self.network, self.step, s.average)
        self.losses[kind].append(loss.detach())
        return {"loss": loss.detach(), "error": error.detach(), "norm": norm, "rate": rate}

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What is minimised over a batch, and its mean squared error."""
        count, given = len(batch.clean), batch.given

        def uniform() -> Tensor:
            return torch.rand(count, device=self.device, generator=self.generator)

        def normal(like: Tensor) -> Tensor:
            return torch.randn(like.shape, device=self.device, generator=self.generator)

        def noised(clean: Tensor, amount: Tensor) -> Tensor:
            return torch.lerp(clean, normal(clean), amount.view(-1, 1, 1, 1, 1))

        with torch.no_grad():
            shifted = 1.2 * normal(uniform()) + math.log(SHIFT)
            # the first evaluation of a chunk sees nothing but noise, which is rare otherwise
            sigma = torch.where(uniform() < 0.1, 1 - 0.02 * uniform(), torch.sigmoid(shifted))
            light = 0.25 * uniform().square() * (uniform() < self.s.noisy)
            past = batch.clean[:, :given]
            if batch.kind != "first":  # an image is as it is given
                past = noised(past, light)
            x = torch.cat([past, noised(batch.clean[:, given:], sigma)], 1)
            memory = None if batch.memory is None else noised(batch.memory, light)
            levels = torch.zeros(x.shape[:2], device=self.device)
            levels[:, given:] = (1000 * sigma).floor()[:, None]
        told = (batch.cameras, batch.numbers, batch.keys, batch.mouse)
        text = self.working.text(self.states)
        made = predicted(self.working, text, (x, levels), memory, told, self.s.side)
        error = (made[:, given:].float() - batch.clean[:, given:]).square().mean((1, 2, 3, 4))
        return (error / sigma.clamp_min(0.1)).mean(), error.mean()

    def _report(self, facts: dict[str, Tensor | float], begin: float | None) -> None:
        values = {name: float(value) for name, value in facts.items()}
        for kind, losses in self.losses.items():
            values[kind] = float(torch.stack(losses).mean()) if losses else math.nan
            losses.clear()
        pace = (self.step - WARM) / (time.perf_counter() - begin) if begin else 0.0
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.group.cuda else 0.0
        self.history.append({"step": self.step, "progress": self.progress, **values})
        means = ", ".join(f"{kind} {values[kind]:.5f}" for kind in KINDS)
        self.group.log(
            f"step {self.step} {100 * self.progress:.1f} % mean loss {means} mse {values['error']:.4f} "
            f"norm {values['norm']:.2f} rate {values['rate']:.3f} {pace:.2f} steps/s {peak:.1f} GiB"
        )

    def _facts(self) -> dict[str, object]:
        settings = {k: (str(v) if isinstance(v, Path) else v) for k, v in asdict(self.s).items()}
        return {
            "step": self.step, "progress": self.progress, "samples": self.step * self.s.batch * self.group.size,
            "processes": self.group.size, "settings": settings,
        }  # fmt: skip

    def _save(self, seconds: float) -> None:
        """Weights, and how they came about: a run that is killed leaves both behind."""
        sha = save_network(
            self.s.out, self.averaged, {"step": self.step, "side": self.s.side, "progress": self.progress}
        )
        name = torch.cuda.get_device_name() if self.group.cuda else "cpu"
        facts = {
            "seconds": seconds, "device": name, "torch": torch.__version__, "commit": self.commit,
            "weights_sha256": sha,
        }  # fmt: skip
        write_json(self.s.out / "joint_training.json", {**self._facts(), **facts, "history": self.history})


def _earlier(folder: Path, config: MG3Config) -> MG3Network:
    """Weights of an earlier run; `ValueError` where they are of another network."""
    network = read_network(folder)[0]
    if network.config != config:
        raise ValueError(f"{folder} holds weights of {network.config}, the run is for {config}")
    return network


def begun(network: MG3Network) -> MG3Network:
    """The network with its blocks' gates open, as trained ones are."""
    with torch.no_grad():
        for block in network._blocks():
            block.table[:, [2, 5]] = 1.0
    return network


def main() -> None:
    """Command line."""
    settings = tyro.cli(Settings, description=__doc__)
    make_folder(settings.out)
    group = Group()
    Trainer(settings.for_smoke() if settings.smoke else settings, group).run()
    group.leave()


if __name__ == "__main__":
    main()
