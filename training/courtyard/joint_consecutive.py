"""What features of consecutive chunks have in common in the small joint model, and what taking them over costs.

`python training/courtyard/joint_consecutive.py --weights OUT --out result.json`. X-Cache (arXiv 2604.20289) skips a
block where its input is like that of the same block and evaluation a chunk before (cosine at least 0.97), and adds what
the block had added then. Here every block is computed, its input and what it adds are compared with those a chunk
before, and an arm takes the latter in every other chunk, whether they are alike or not; another arm takes what the
evaluation before added, in the same blocks. Keys and values of a context that comes again are compared, too.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import tyro
from joint_courtyard import prompt, read_engine, read_network
from joint_evaluate import SEEDS, Settings, held_out
from origin import commit
from torch import Tensor

from worldstride.bench.environment import environment
from worldstride.bench.quality import Table, score, summarise
from worldstride.bench.results import make_folder, write_json
from worldstride.bench.trials import NoiseBank, noise_seed
from worldstride.bench.walks import HeldOutWorld
from worldstride.engine import Engine, pick_device
from worldstride.models.matrix_game3.adapter import NEW, PAST, MatrixGame3
from worldstride.models.matrix_game3.layers import Block
from worldstride.models.matrix_game3.model import MG3Network
from worldstride.session import step_together

FORMAT = "worldstride-joint-consecutive"
Movement = Literal["walk", "stand"]
Noise = Literal["own", "same"]
"""Of a chunk: its own, or that of the chunk before, which no session takes."""
Arm = Literal["full", "chunk before", "evaluation before"]
"""Where all blocks, but for the first and the last, take over what they add, in all evaluations but a chunk's last (and
in the third arm its first)."""
MOVEMENTS, NOISES, ARMS = get_args(Movement), get_args(Noise), get_args(Arm)
FLOOR = 0.97
"""Least cosine of published reuse."""
NAMES = ("input", "added", "memory keys", "memory values", "past keys", "past values")
"""What is compared."""


class Likeness:
    """How like pairs of tensors are, over all of them."""

    def __init__(self) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64)  # new^2, old^2, new * old, (new - old)^2

    def add(self, new: Tensor, old: Tensor) -> None:
        """Count a pair of one shape."""
        a, b = new.double(), old.double()
        self._sums += torch.stack([t.sum() for t in (a * a, b * b, a * b, (a - b).square())]).cpu()

    def facts(self) -> dict[str, float]:
        """Their cosine, and their difference relative to the new ones' size."""
        new, old, both, gap = self._sums.tolist()
        return {"cosine": both / (new * old) ** 0.5, "difference": (gap / new) ** 0.5}


@dataclass
class Seen:
    """What one block did in one evaluation."""

    entered: Tensor
    """Its input at the new latents [B, N, width]."""
    added: Tensor
    """What it added to that."""
    pair: tuple[Tensor, Tensor]
    """Keys, turned, and values of all latents [B, heads, T, tokens, head_dim]."""


class Watch:
    """Stands around a network's blocks, records what they do, and puts what they added before in its place."""

    def __init__(self, network: MG3Network, tokens: int, evaluations: int) -> None:
        self._number = {id(block): i for i, block in enumerate(network.blocks)}
        self._last = evaluations - 1
        self._tokens, self._evaluation, self._begun = tokens, -1, (torch.empty(0), (torch.empty(0),) * 2)
        self.before: dict[tuple[int, int], Seen] = {}
        """Of the chunk before, by evaluation and block."""
        self.now: dict[tuple[int, int], Seen] = {}
        self.taken: Arm = "full"
        """Where blocks take over what they add, in the chunk under way."""

    def turn_to_next(self) -> None:
        """The chunk under way is the one before from now on."""
        self.before, self.now, self._evaluation = self.now, {}, -1

    def begin(self, block: Block, x: Tensor, *given: object) -> object:
        """Stand in for `Block.begin`."""
        self._evaluation += self._number[id(block)] == 0
        made = Block.begin(block, x, *given)
        k, v = (t.unflatten(2, (-1, self._tokens)) for t in made[1][1:])
        self._begun = x[:, -NEW * self._tokens :].clone(), (k.clone(), v.clone())
        return made

    def end(self, block: Block, *given: object) -> Tensor:
        """Stand in for `Block.end`."""
        out, key = Block.end(block, *given), (self._evaluation, self._number[id(block)])
        entered, pair = self._begun
        if (added := self._taken(*key)) is not None:
            out = torch.cat([out[:, : -entered.shape[1]], entered + added], 1)
        self.now[key] = Seen(entered, out[:, -entered.shape[1] :] - entered, pair)
        return out

    def _taken(self, evaluation: int, block: int) -> Tensor | None:
        """What a block takes over; None where it is computed."""
        if self.taken == "full" or evaluation == self._last or block in (0, len(self._number) - 1):
            return None
        if self.taken == "chunk before":
            return self.before[evaluation, block].added
        return self.now[evaluation - 1, block].added if evaluation else None


@contextmanager
def watched(engine: Engine) -> Iterator[Watch]:
    """Watch an engine's network for a while."""
    model = engine.model
    if not isinstance(model, MatrixGame3):
        raise TypeError(f"expected the small joint model, got {type(model).__name__}")
    network, tokens = model.network, model.token_grid[0] * model.token_grid[1]
    before = network.begin, network.end
    watch = Watch(network, tokens, model.steps)
    network.begin, network.end = watch.begin, watch.end
    try:
        yield watch
    finally:
        network.begin, network.end = before


def play(
    engine: Engine, world: HeldOutWorld, chunks: int, noise: Noise, arm: Arm, found: dict[str, list[list[Likeness]]]
) -> np.ndarray:
    """Frames uint8 [seeds, C, H, W, 3] after the given one, in closed loop; full compute adds to what is `found`."""
    model, bank, at, shown = engine.model, NoiseBank(), 0, list[np.ndarray]()
    begun = engine.open(world.frames[:1], world.cameras[:1], prompt(model.config), seed=world.seed)
    sessions = [begun.fork(noise_seed(world, seed)) for seed in SEEDS]
    evaluations, depth, numbers = model.steps, len(model.network.blocks), list[int]()
    with watched(engine) as watch:
        for k in range(chunks):
            shape = model.chunk(k)
            watch.turn_to_next()
            watch.taken = arm if k >= 2 and k % 2 == 0 else "full"
            size, number = (shape.clean + shape.new, *model.latent_shape), k if noise == "own" else min(k, 1)
            drawn = [bank.draw(noise_seed(world, seed), number, size, engine.device) for seed in SEEDS]
            cameras = [world.cameras[at : at + shape.frames]] * len(SEEDS)
            made = step_together(sessions, cameras, noise=drawn)
            shown.append(np.stack([one.frames for one in made]))
            at += shape.frames
            before, report = numbers, made[0].report
            first = report.history_latents - shape.new - shape.clean
            numbers = [*report.context.memory, *range(first, first + shape.clean + shape.new)]
            if arm == "full" and k >= 2:
                compare(watch, found, evaluations, depth)
                compare_context(watch, found, evaluations, depth, numbers, before)
    return np.concatenate(shown, 1)[:, 1:]


def _table(found: dict[str, list[list[Likeness]]], name: str, evaluations: int, depth: int) -> list[list[Likeness]]:
    return found.setdefault(name, [[Likeness() for _ in range(depth)] for _ in range(evaluations)])


def compare(watch: Watch, found: dict[str, list[list[Likeness]]], evaluations: int, depth: int) -> None:
    """What blocks were given and added at the new latents, against the chunk before."""
    for (e, b), seen in watch.now.items():
        for name, one, other in (
            ("input", seen.entered, watch.before[e, b].entered), ("added", seen.added, watch.before[e, b].added),
        ):  # fmt: skip
            _table(found, name, evaluations, depth)[e][b].add(one, other)


def compare_context(
    watch: Watch, found: dict[str, list[list[Likeness]]], evaluations: int, depth: int, numbers: Sequence[int],
    before: Sequence[int],
) -> None:  # fmt: skip
    """Keys and values in the first evaluation of latents that the chunk before had: remembered ones, and past ones that
    were new in it, as its last evaluation had them."""
    held, slots = before[:-NEW], len(numbers) - NEW - PAST
    again = [(i, held.index(n)) for i, n in enumerate(numbers[:slots]) if n in held]
    gone_on = [(slots + i, len(before) - PAST + i) for i in range(PAST)]
    for prefix, places, e in (("memory", again, 0), ("past", gone_on, evaluations - 1)):
        if not places:
            continue
        mine, theirs = ([p[side] for p in places] for side in (0, 1))
        for b in range(depth):
            for i, name in enumerate(("keys", "values")):
                one, other = watch.now[0, b].pair[i][:, :, mine], watch.before[e, b].pair[i][:, :, theirs]
                _table(found, f"{prefix} {name}", 1, depth)[0][b].add(one, other)


@dataclass(frozen=True)
class Consecutive:
    """What to play."""

    weights: Path
    """Folder that joint_train.py wrote."""
    out: Path = Path("out/joint_consecutive.json")
    worlds: int = 6
    chunks: int = 5
    """Of each world; of the later ones every other is computed in full."""
    device: str | None = None


def measured(s: Consecutive) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Likeness by movement and noise, and quality of every arm."""
    device = pick_device(s.device)
    engine = read_engine(s.weights, device, torch.float32)
    of = Settings(s.weights, worlds=s.worlds, chunks=s.chunks)
    tables = dict[tuple[Movement, Noise, Arm], list[Table]]()
    found = dict[tuple[Movement, Noise], dict[str, list[list[Likeness]]]]()
    for number in range(s.worlds):
        for movement in MOVEMENTS:
            world = held_out(engine, of, number, movement)
            for noise in NOISES:
                full = None
                for arm in ARMS:
                    frames = play(engine, world, s.chunks, noise, arm, found.setdefault((movement, noise), {}))
                    full = frames if full is None else full
                    made = score(frames, full, world, None, device)
                    tables.setdefault((movement, noise, arm), []).append(made)
        print(f"world {number}", flush=True)
    alike = [
        {"movement": movement, "noise": noise, **{n: [[x.facts() for x in row] for row in t] for n, t in of.items()}}
        for (movement, noise), of in found.items()
    ]
    scored = [
        {"movement": movement, "noise": noise, "arm": arm, "scores": summarise(of, tables[movement, "own", "full"])}
        for (movement, noise, arm), of in tables.items()
    ]
    return alike, scored


def table(alike: Sequence[dict[str, Any]], scored: Sequence[dict[str, Any]]) -> str:
    """Both as text: mean cosines, how many inputs of blocks but the first pass for published reuse, and losses."""
    lines = [f"{'mean cosine':<28}" + "".join(f"{name:>15}" for name in (*NAMES, f"input >= {FLOOR}"))]
    for row in alike:
        cosines = {n: [[x["cosine"] for x in each] for each in row[n]] for n in NAMES if n in row}
        means = [np.mean(cosines[n]) if n in cosines else np.nan for n in NAMES]
        passed = 100 * np.mean([[c >= FLOOR for c in each[1:]] for each in cosines["input"]])
        lines.append(f"{row['movement'] + ', ' + row['noise'] + ' noise':<28}" + _numbers((*means, passed)))
    lines.append(f"{'':<44}" + "".join(f"{name:>15}" for name in ("loss %", "low", "high", "psnr full")))
    for row in scored:
        loss, name = row["scores"]["loss"]["all"], f"{row['movement']}, {row['noise']} noise, {row['arm']}"
        values = (loss["mean"], loss["low"], loss["high"], row["scores"]["psnr_full"]["all"]["mean"])
        lines.append(f"{name:<44}" + _numbers(np.nan if v is None else v for v in values))
    return "\n".join(lines)


def _numbers(values: Iterable[float]) -> str:
    return "".join(f"{value:15.3f}" for value in values)


def main() -> None:
    """Command line."""
    s = tyro.cli(Consecutive, description=__doc__)
    make_folder(s.out.parent)
    facts = environment(
        pick_device(s.device), "python training/courtyard/joint_consecutive.py " + shlex.join(sys.argv[1:])
    )
    alike, scored = measured(s)
    setting = {
        "worlds": s.worlds,
        "chunks": s.chunks,
        "seeds": SEEDS,
        "floor": FLOOR,
        "weights_sha256": read_network(s.weights)[1],
    }
    write_json(s.out, {"format": FORMAT, **facts, "commit": commit(), **setting, "likeness": alike, "rows": scored})
    print(table(alike, scored), flush=True)


if __name__ == "__main__":
    main()
