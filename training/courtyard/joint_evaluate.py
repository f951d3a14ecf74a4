"""What approximations cost the small joint model: held-out worlds against the true renderer, and against full compute.

`python training/courtyard/joint_evaluate.py --weights OUT --accelerations off fewer.toml --out result.json`. Every arm
plays the same worlds with the same cameras and noise, in closed loop and with the truth put in place of every chunk.
Worlds are shared out among processes, `--at-once` of them a GPU.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
import tyro
from jobs import Job, run_jobs, visible_gpus
from joint_courtyard import joint_engine, joint_of, prompt, read_engine, read_network
from origin import commit

from worldstride.acceleration import Acceleration, resolve
from worldstride.bench.environment import environment
from worldstride.bench.quality import Table, score, summarise
from worldstride.bench.results import make_folder, write_json
from worldstride.bench.rollout import summary
from worldstride.bench.trials import Mode, NoiseBank, Roll, noise_seed, step_rolls
from worldstride.bench.walks import CLASSES, FIRST_SEED, HeldOutWorld, Trajectory, held_out_world
from worldstride.engine import Engine, pick_device, pick_dtype
from worldstride.errors import InputError
from worldstride.levers import levers
from worldstride.models.matrix_game3.adapter import MEMORY, NEW, PAST
from worldstride.models.matrix_game3.config import FRAMES
from worldstride.models.quantised import Scheme, named, parted, quantised
from worldstride.protocol import ChunkShape
from worldstride.report import ChunkReport

FORMAT = "worldstride-joint-courtyard"
LATER = ChunkShape(NEW, NEW * FRAMES, clean=PAST, memory=MEMORY)
"""Chunks but a world's first."""
MODES: tuple[Mode, ...] = get_args(Mode)
LEAST_WIDE = 256
"""Rows and columns of layers that are put in 8 bits: of all the wide ones of this small model."""
SEEDS = (1, 2)
"""Noise seeds: the energy score takes two samples."""
WALKS: tuple[Trajectory, ...] = ("out and back", "walk")
"""Kinds of trajectory, which take turns."""


@dataclass(frozen=True)
class Settings:
    """What to play."""

    weights: Path
    """Folder that joint_train.py wrote."""
    accelerations: tuple[str, ...] = ("off",)
    """Presets and .toml files, also with weights in 8 bits ("off+int8"); full compute is played in any case."""
    out: Path = Path("out/joint_evaluation.json")
    worlds: int = 16
    chunks: int = 5
    """Of each world: 57 frames, then 40 a chunk."""
    family: str = "courtyard"
    device: str | None = None
    at_once: int = 3
    """Processes that share a GPU, or the CPU."""
    part: int | None = None
    """Play this part of the worlds alone and write what came of it to `out`; set by the script itself."""
    parts: int = 1


@dataclass(frozen=True)
class Played:
    """One arm in one world and mode."""

    table: Table
    reports: list[list[ChunkReport]]
    """One list a noise seed."""


Results = dict[tuple[str, Mode], dict[int, Played]]
"""Name of an arm and mode -> number of a world -> what came of it."""


@dataclass(frozen=True)
class Arm:
    """One thing to try: settings, and how weights are quantised."""

    settings: Acceleration
    scheme: Scheme | None = None

    @property
    def name(self) -> str:
        """Name for tables."""
        return named(self.settings.name, self.scheme)


def arms_of(names: Sequence[str]) -> list[Arm]:
    """What to try by name, full compute first; `InputError` where two have one name."""
    arms = [Arm(resolve("off"))]
    for name in names:
        plain, scheme = parted(name)
        arm = Arm(resolve(plain), scheme)
        arms += [arm] if arm != arms[0] else []
    if len({a.name for a in arms}) != len(arms):
        raise InputError(f"accelerations need names of their own, got {', '.join(a.name for a in arms)}")
    return arms


def held_out(engine: Engine, s: Settings, number: int, walk: Trajectory | None = None) -> HeldOutWorld:
    """A world with its truth; of its first chunk one frame is given, later ones go on from four latents. Kinds of walks
    take turns where none is asked for."""
    shapes = [engine.model.chunk(k) for k in range(s.chunks)]
    frames = [shape.frames - (k == 0) for k, shape in enumerate(shapes)]
    recent = [FRAMES * shape.clean or 1 for shape in shapes]
    walk, side = walk or WALKS[number % len(WALKS)], engine.frame_size[0]
    return held_out_world(s.family, FIRST_SEED + number, walk, 1, frames, recent, side, engine.device)


def rolls_of(engine: Engine, world: HeldOutWorld, settings: Acceleration, modes: Sequence[Mode]) -> list[Roll]:
    """A world to be played in modes, with every noise seed; nothing is shown yet, not even the given frame."""
    begun = engine.open(world.frames[:1], world.cameras[:1], prompt(joint_of(engine).config), seed=world.seed)
    begun.acceleration = settings
    return [Roll(begun.fork(noise_seed(world, seed)), world, seed, mode) for mode in modes for seed in SEEDS]


def play(
    engine: Engine, world: HeldOutWorld, settings: Acceleration, chunks: int, noise: NoiseBank
) -> dict[Mode, tuple[np.ndarray, list[list[ChunkReport]]]]:
    """Frames uint8 [seeds, C, H, W, 3] after the given one, and reports, of both modes.

    Modes and seeds share cameras, and so what is brought back: they are stepped as one batch. Where what frames show
    decides, they must not decide for each other.
    """
    rolls = rolls_of(engine, world, settings, MODES)
    shown: list[list[np.ndarray]] = [[] for _ in rolls]
    reports: list[list[ChunkReport]] = [[] for _ in rolls]
    at, limit = 0, 1 if settings.adaptive is not None or settings.temporal is not None else None
    for k in range(chunks):
        for i, made in enumerate(step_rolls(engine, rolls, k, at, noise, limit=limit)):
            shown[i].append(made.frames)
            reports[i].append(made.report)
        at += engine.model.chunk(k).frames
    out: dict[Mode, tuple[np.ndarray, list[list[ChunkReport]]]] = {}
    for mode in MODES:
        mine = [i for i, roll in enumerate(rolls) if roll.mode == mode]
        out[mode] = np.stack([np.concatenate(shown[i])[1:] for i in mine]), [reports[i] for i in mine]
    return out


def played(s: Settings, arms: Sequence[Arm], numbers: Sequence[int]) -> Results:
    """All arms in some worlds."""
    device = pick_device(s.device)
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in training
    engine, results = read_engine(s.weights, device, pick_dtype(device)), Results()
    side = joint_of(engine).config.side
    engines = {arm.scheme: engine for arm in arms if arm.scheme is None} | {
        arm.scheme: joint_engine(quantised(joint_of(engine).network, arm.scheme, LEAST_WIDE), size=engine.frame_size[0])
        for arm in arms if arm.scheme is not None
    }  # fmt: skip
    for number in numbers:
        world, noise, full = held_out(engine, s, number), NoiseBank(), dict[Mode, np.ndarray]()
        for arm in arms:
            for mode, (frames, reports) in play(engines[arm.scheme], world, arm.settings, s.chunks, noise).items():
                table = score(frames, full.setdefault(mode, frames), world, (side, side), device)
                results.setdefault((arm.name, mode), {})[number] = Played(table, reports)
        print(f"world {number}", flush=True)
    return results


def shared(s: Settings, arms: Sequence[Arm]) -> Results:
    """All arms in all worlds, by as many processes as there is room for."""
    parts = min(s.worlds, max(1, len(visible_gpus())) * s.at_once)
    if parts == 1:
        return played(s, arms, range(s.worlds))
    results = Results()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{part}.pt" for part in range(parts)]
        jobs = [Job(str(i), _command(s, i, parts, file), file.with_suffix(".log")) for i, file in enumerate(files)]
        codes = run_jobs(jobs, s.at_once)
        for (name, code), job in zip(sorted(codes.items()), sorted(jobs, key=lambda j: j.name), strict=True):
            if code and job.log is not None:
                raise SystemExit(f"part {name} failed:\n{job.log.read_text()}")
        for file in files:
            for key, tables in torch.load(file, weights_only=False).items():
                results.setdefault(key, {}).update(tables)
    return {(a.name, mode): dict(sorted(results[a.name, mode].items())) for a in arms for mode in MODES}


def _command(s: Settings, part: int, parts: int, out: Path) -> tuple[str, ...]:
    chosen = {
        "--weights": s.weights, "--worlds": s.worlds, "--chunks": s.chunks, "--family": s.family, "--part": part,
        "--parts": parts, "--out": out, **({} if s.device is None else {"--device": s.device}),
    }  # fmt: skip
    return (
        sys.executable, __file__, *(str(word) for pair in chosen.items() for word in pair), "--accelerations",
        *s.accelerations,
    )  # fmt: skip


def rows(results: Results, arms: Sequence[Arm]) -> list[dict[str, object]]:
    """One row of the table for every arm: quality in both modes, and what its levers did."""
    made = list[dict[str, object]]()
    for arm in arms:
        scores = dict[str, object]()
        for mode in MODES:
            mine, full = results[arm.name, mode], results[arms[0].name, mode]
            scores[mode] = summarise([p.table for p in mine.values()], [full[n].table for n in mine])
        reports = [r for mode in MODES for p in results[arm.name, mode].values() for each in p.reports for r in each]
        spent = summary(reports)
        kept = ("evaluations_per_chunk", "attended_per_chunk", "context_latents", "density", "gigaflops_per_chunk")
        did = [lever.to_json() for lever in levers(arm.settings, LATER, reports)]
        again = [recurring(each) for p in results[arm.name, MODES[0]].values() for each in p.reports]
        made.append(
            {
                "name": arm.name, "acceleration": arm.settings.to_json(), "quantised": arm.scheme,
                "worlds": len(results[arm.name, MODES[0]]),
                "scores": scores, **{name: spent[name] for name in kept}, "levers": did,
                "recurring": {name: sum(a[i] for a in again) / max(sum(a[0] for a in again), 1)
                              for i, name in ((1, "since the last chunk"), (2, "ever"))},
            }
        )  # fmt: skip
    return made


def recurring(reports: Sequence[ChunkReport]) -> tuple[int, int, int]:
    """Remembered latents of a world's chunks; those of them that the chunk before had as memory or past, and those that
    any earlier chunk had. Of no others could keys and values be kept from chunk to chunk."""
    count, last, ever, before, known = 0, 0, 0, set[int](), set[int]()
    for report in reports:
        memory = list(report.context.memory)
        count, last = count + len(memory), last + sum(m in before for m in memory)
        ever += sum(m in known for m in memory)
        made = report.history_latents - (NEW if report.index else report.history_latents)
        before = {*memory, *range(max(0, made - PAST), made)}
        known |= before
    return count, last, ever


def table(found: Sequence[dict[str, object]]) -> str:
    """Rows as text: energy score (lower is better) by class of pixels, PSNR, and what is lost against full compute."""
    classes = ("all", *CLASSES)
    lines = list[str]()
    for mode in MODES:
        head = "".join(f"{name:>11}" for name in (*classes, "psnr", "psnr full", "loss %", "evals", "memory"))
        lines.append(f"{mode:<28}{head}")
        for row in found:
            scores = row["scores"][mode]
            values = [1000 * scores["energy"][c]["mean"] for c in classes]
            values += [scores[m]["all"]["mean"] for m in ("psnr", "psnr_full", "loss")]
            values += [row["evaluations_per_chunk"], row["context_latents"]]
            lines.append(f"{row['name']:<28}" + "".join(f"{v:11.2f}" for v in values))
    return "\n".join([*lines, "energy scores in thousandths"])


def main() -> None:
    """Command line."""
    s = tyro.cli(Settings, description=__doc__)
    if s.worlds < 1 or s.chunks < 1 or s.at_once < 1:
        raise InputError(f"worlds, chunks and at-once must be at least 1, got {s.worlds}, {s.chunks}, {s.at_once}")
    arms = arms_of(s.accelerations)
    if s.part is not None:
        torch.set_num_threads(min(4, torch.get_num_threads()))  # others work beside this one
        torch.save(played(s, arms, range(s.part, s.worlds, s.parts)), s.out)
        return
    make_folder(s.out.parent)
    # of what is run, not of what is there when it ends
    origin = {"commit": commit(), "weights_sha256": read_network(s.weights)[1]}
    found, device = rows(shared(s, arms), arms), pick_device(s.device)
    facts = environment(device, "python training/courtyard/joint_evaluate.py " + shlex.join(sys.argv[1:]))
    setting = {"family": s.family, "worlds": s.worlds, "chunks": s.chunks, "walks": WALKS, "seeds": SEEDS}
    write_json(s.out, {"format": FORMAT, **facts, **origin, **setting, "rows": found})
    print(table(found), flush=True)


if __name__ == "__main__":
    main()
