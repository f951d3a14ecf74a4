"""What features of consecutive chunks have in common in the small joint model, and what taking them over costs.

`python training/courtyard/joint_consecutive.py --weights OUT --out result.json`. X-Cache (arXiv 2604.20289) skips a
block where its input is like that of the same block and evaluation a chunk before, and adds what the block had added
then. Here every block is computed, and its input and what it adds are compared with those a chunk before. One arm takes
the latter in every other chunk, whether inputs are alike or not; one takes what the same blocks added in the chunk's
own first evaluation. Keys and values of a context that comes again are compared, too.
"""

from __future__ import annotations

import shlex
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import tyro
from joint_courtyard import joint_of, read_engine
from joint_evaluate import SEEDS, Settings, held_out, rolls_of
from joint_watch import ARMS, FLOOR, Arm, Likeness, Watch, watched
from origin import commit
from torch import Tensor

from worldstride.acceleration import resolve
from worldstride.bench.environment import environment
from worldstride.bench.quality import Table, score, summarise
from worldstride.bench.results import make_folder, write_json
from worldstride.bench.trials import NoiseBank, step_rolls
from worldstride.bench.walks import HeldOutWorld
from worldstride.engine import Engine, pick_device
from worldstride.models.matrix_game3.adapter import NEW, PAST

FORMAT = "worldstride-joint-consecutive"
Movement = Literal["walk", "stand"]
Noise = Literal["own", "same"]
"""Of a chunk: its own, or that of the chunk before, which no session takes."""
MOVEMENTS: tuple[Movement, ...] = get_args(Movement)
PLAYED: tuple[tuple[Noise, Arm], ...] = (*(("own", arm) for arm in ARMS), ("same", "full"), ("same", "chunk before"))
NAMES = ("input", "added", "memory keys", "memory values", "past keys", "past values")
"""What is compared."""


class SameNoise(NoiseBank):
    """Noise that is the same for all chunks but a world's first."""

    def draw(self, seed: int, chunk: int, size: Sequence[int], device: torch.device) -> Tensor:
        """See `NoiseBank.draw`."""
        return super().draw(seed, min(chunk, 1), size, device)


class Compared:
    """Likeness of consecutive chunks, by name, evaluation and block."""

    def __init__(self) -> None:
        self._found = defaultdict[tuple[str, int, int], Likeness](Likeness)

    def add(self, watch: Watch, numbers: Sequence[int], before: Sequence[int]) -> None:
        """Count the chunk under way; `numbers` are its latents' in the order of its tokens, `before` those of the one
        before."""
        for (evaluation, block), seen in watch.now.items():
            old = watch.before[evaluation, block]
            self._found["input", evaluation, block].add(seen.entered, old.entered)
            if seen.added is not None and old.added is not None:
                self._found["added", evaluation, block].add(seen.added, old.added)
        # in a chunk's first evaluation: remembered latents that the chunk before had, and past ones that were new in
        # it, as its last evaluation had them
        held, slots = before[:-NEW], len(numbers) - NEW - PAST
        again = [(i, held.index(n)) for i, n in enumerate(numbers[:slots]) if n in held]
        gone_on = [(slots + i, len(before) - PAST + i) for i in range(PAST)]
        for kind, places, evaluation in (("memory", again, 0), ("past", gone_on, watch.last)):
            mine, theirs = ([pair[side] for pair in places] for side in (0, 1))
            for block in range(watch.depth if places else 0):
                new, old = watch.now[0, block], watch.before[evaluation, block]
                for name, one, other in (("keys", new.keys, old.keys), ("values", new.values, old.values)):
                    self._found[f"{kind} {name}", 0, block].add(one[:, :, mine], other[:, :, theirs])

    def facts(self) -> dict[str, list[list[dict[str, float]]]]:
        """By name: a row an evaluation, a place a block."""
        made: dict[str, list[list[dict[str, float]]]] = {name: [] for name in NAMES}
        for (name, _, block), likeness in sorted(self._found.items()):
            if block == 0:
                made[name].append([])
            made[name][-1].append(likeness.facts())
        return {name: rows for name, rows in made.items() if rows}


def play(
    engine: Engine, world: HeldOutWorld, chunks: int, noise: Noise, arm: Arm, compared: Compared | None = None
) -> np.ndarray:
    """Frames uint8 [seeds, C, H, W, 3] after the given one, in closed loop."""
    rolls, bank = rolls_of(engine, world, resolve("off"), ("closed",)), NoiseBank() if noise == "own" else SameNoise()
    at, shown, numbers = 0, list[np.ndarray](), list[int]()
    with watched(joint_of(engine)) as watch:
        for k in range(chunks):
            watch.turn_to_next(arm if k >= 2 and k % 2 == 0 else "full")
            made = step_rolls(engine, rolls, k, at, bank)
            shown.append(np.stack([one.frames for one in made]))
            shape, before, report = engine.model.chunk(k), numbers, made[0].report
            at += shape.frames
            first = report.history_latents - shape.new - shape.clean
            numbers = [*report.context.memory, *range(first, first + shape.clean + shape.new)]
            if compared is not None and k >= 2:
                compared.add(watch, numbers, before)
    return np.concatenate(shown, 1)[:, 1:]


@dataclass(frozen=True)
class Consecutive:
    """What to play."""

    weights: Path
    """Folder that joint_train.py wrote."""
    out: Path = Path("out/joint_consecutive.json")
    worlds: int = 6
    chunks: int = 5
    """Of each world; from the third on every other one takes over."""
    device: str | None = None


def measured(engine: Engine, s: Consecutive) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Likeness by movement and noise, and quality of every arm."""
    of = Settings(s.weights, worlds=s.worlds, chunks=s.chunks)
    tables = dict[tuple[Movement, Noise, Arm], list[Table]]()
    found = dict[tuple[Movement, Noise], Compared]()
    for number in range(s.worlds):
        for movement in MOVEMENTS:
            world, full = held_out(engine, of, number, movement), dict[Noise, np.ndarray]()
            for noise, arm in PLAYED:
                compared = found.setdefault((movement, noise), Compared())
                frames = play(engine, world, s.chunks, noise, arm, compared if arm == "full" else None)
                made = score(frames, full.setdefault(noise, frames), world, None, engine.device)
                tables.setdefault((movement, noise, arm), []).append(made)
        print(f"world {number}", flush=True)
    alike = [{"movement": way, "noise": noise, **compared.facts()} for (way, noise), compared in found.items()]
    scored = [
        {"movement": way, "noise": noise, "arm": arm, "scores": summarise(mine, tables[way, noise, "full"])}
        for (way, noise, arm), mine in tables.items()
    ]
    return alike, scored


def table(alike: Sequence[dict[str, Any]], scored: Sequence[dict[str, Any]]) -> str:
    """Both as text: mean cosines, the share of inputs of blocks but the first that pass for published reuse, losses."""
    lines = [_line("mean cosine", (*NAMES, f"input >= {FLOOR}"))]
    for row in alike:
        means = [np.mean([x["cosine"] for each in row[n] for x in each]) if n in row else np.nan for n in NAMES]
        passed = np.mean([x["passed"] for each in row["input"] for x in each[1:]])
        lines.append(_line(f"{row['movement']}, {row['noise']} noise", (*means, passed)))
    lines.append(_line("", ("loss %", "low", "high", "psnr full")))
    for row in scored:
        loss, full = (row["scores"][name]["all"] for name in ("loss", "psnr_full"))
        values = (np.nan if v is None else v for v in (loss["mean"], loss["low"], loss["high"], full["mean"]))
        lines.append(_line(f"{row['movement']}, {row['noise']} noise, {row['arm']}", values))
    return "\n".join(lines)


def _line(head: str, values: Iterable[str | float]) -> str:
    return f"{head:<36}" + "".join(f"{v:>15}" if isinstance(v, str) else f"{v:15.3f}" for v in values)


def main() -> None:
    """Command line."""
    s, code = tyro.cli(Consecutive, description=__doc__), commit()
    make_folder(s.out.parent)
    device = pick_device(s.device)
    facts = environment(device, "python training/courtyard/joint_consecutive.py " + shlex.join(sys.argv[1:]))
    engine = read_engine(s.weights, device, torch.float32)
    alike, scored = measured(engine, s)
    setting = {"worlds": s.worlds, "chunks": s.chunks, "seeds": SEEDS, "floor": FLOOR}
    origin = {"commit": code, "weights_sha256": engine.source.fingerprint}
    write_json(s.out, {"format": FORMAT, **facts, **origin, **setting, "likeness": alike, "rows": scored})
    print(table(alike, scored), flush=True)


if __name__ == "__main__":
    main()
