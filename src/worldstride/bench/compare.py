"""Settings against full compute and against the truth: the same held-out worlds, cameras and noise for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from worldstride.acceleration import Acceleration
from worldstride.bench.quality import Table, score, summarise
from worldstride.bench.rollout import Speed, summary
from worldstride.bench.trials import Arm, Mode, NoiseBank, Party
from worldstride.bench.walks import FIRST_SEED, HeldOutWorld, Trajectory, held_out_world
from worldstride.engine import Engine
from worldstride.errors import InputError
from worldstride.levers import levers
from worldstride.report import ChunkReport

NO_MEMORY = Acceleration("no memory", memory=0)
"""Full compute that forgets everything but the recent window: what memory is worth."""
SEEDS = (1, 2)
"""Noise seeds: the energy score takes two samples."""


@dataclass(frozen=True, eq=False)
class Trial:
    """One arm in one mode, in the worlds that are finished."""

    arm: Arm
    mode: Mode
    tables: dict[int, Table] = field(default_factory=dict)
    """Number of a world -> its scores."""
    reports: list[list[ChunkReport]] = field(default_factory=list)
    """One list a session."""


@dataclass(eq=False)
class Comparison:
    """Every arm in every mode and world, as far as they are finished. The first arm is full compute."""

    engine: Engine
    worlds: tuple[HeldOutWorld, ...]
    chunks: int
    trials: list[Trial]
    shown: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)
    """Name of an arm -> number of a world -> frames uint8 [C, H, W, 3] of the first seed in closed loop."""
    interrupted: bool = False

    def rows(self) -> list[dict[str, object]]:
        """One row of the table for every arm and mode: quality, what it loses, speed, what its levers did."""
        out: list[dict[str, object]] = []
        for trial in self.trials:
            full = next(t for t in self.trials if t.mode == trial.mode)
            known = [w for w in trial.tables if w in full.tables]
            if not known:
                continue
            reports = [r for session in trial.reports for r in session]
            mine, base = summary(reports), summary([r for session in full.reports for r in session])
            quality = summarise([trial.tables[w] for w in known], [full.tables[w] for w in known])
            shape = self.engine.model.chunk(max(1, trial.arm.settings.warmup))
            did = levers(trial.arm.settings, shape, reports)
            out.append(
                {
                    "name": trial.arm.name, "mode": trial.mode, "recall": trial.arm.recall, "worlds": len(known),
                    "acceleration": trial.arm.settings.to_json(), "quality": quality, "speed": mine,
                    "speedup": {k: _a_chunk(base, k) / max(_a_chunk(mine, k), 1e-12) for k in ("core", "total")},
                    "by_walk": self._by_walk(trial, full, known),
                    "levers": [lever.to_json() for lever in did],
                }
            )  # fmt: skip
        return out

    def _by_walk(self, trial: Trial, full: Trial, known: Sequence[int]) -> dict[str, dict[str, object]]:
        """Kind of walk -> worlds and loss there (see `quality.summarise`); nothing where all walks are alike."""
        walks: dict[str, list[int]] = {}
        for number in known:
            walks.setdefault(self.worlds[number].walk, []).append(number)
        if len(walks) == 1:
            return {}
        losses = {
            w: summarise([trial.tables[i] for i in n], [full.tables[i] for i in n])["loss"] for w, n in walks.items()
        }
        return {w: {"worlds": len(walks[w]), "loss": loss} for w, loss in losses.items()}

    def curves(self, most: int = 6) -> list[dict[str, object]]:
        """What happened chunk by chunk in the first worlds, in closed loop where that was played."""
        mode = self.trials[0].mode
        out: list[dict[str, object]] = []
        for i, world in list(enumerate(self.worlds))[:most]:
            counts = [self.engine.model.chunk(k).frames for k in range(self.chunks)]
            trials = [t for t in self.trials if t.mode == mode and i in t.tables]
            if not trials:
                continue
            psnr = {t.arm.name: [float(v.nanmean()) for v in t.tables[i]["psnr"]["all"].split(counts)] for t in trials}
            shares = [float(m.float().mean()) for m in world.masks["revisited"].split(counts)]
            out.append(
                {"seed": world.seed, "walk": world.walk, "given": world.given, "revisited": shares, "psnr": psnr}
            )
        return out


def _a_chunk(speed: Speed, stage: str) -> float:
    """Seconds a chunk; after Ctrl-C arms may have made different numbers of them."""
    return speed["seconds"][stage] / max(speed["chunks"], 1)


def held_out(
    engine: Engine, family: str, count: int, chunks: int, walks: Sequence[Trajectory], seed: int = FIRST_SEED,
    advance: Callable[[], object] = lambda: None,
) -> tuple[HeldOutWorld, ...]:  # fmt: skip
    """Held-out worlds of the size that a model shows; kinds of trajectory take turns."""
    if count < 1 or chunks < 1 or not walks:
        raise InputError(f"a comparison needs at least one world, chunk and walk, got {count}, {chunks}, {len(walks)}")
    shapes = [engine.model.chunk(k) for k in range(chunks)]
    height, width = engine.frame_size
    if height != width or height % 2:
        raise InputError(
            f"the renderer's truth is square with an even side; {engine.model.name!r} shows {height} x {width}"
        )
    worlds, frames, windows = list[HeldOutWorld](), [s.frames for s in shapes], [s.window for s in shapes]
    for i in range(count):
        walk = walks[i % len(walks)]
        worlds.append(held_out_world(family, seed + i, walk, shapes[0].window, frames, windows, height, engine.device))
        advance()
    return tuple(worlds)


def brackets() -> tuple[Arm, ...]:
    """Full compute with no, random and the best possible memory."""
    return (
        Arm(NO_MEMORY), Arm(Acceleration("random memory"), "random"), Arm(Acceleration("oracle memory"), "oracle")
    )  # fmt: skip


def plain(steps: Sequence[int]) -> tuple[Acceleration, ...]:
    """The plain loop on fewer steps, each with the schedule that measured best: what every saved step is up against."""
    return tuple(Acceleration(f"{n} plain steps", steps=n) for n in steps)


def compare(
    engine: Engine, arms: Sequence[Arm], worlds: Sequence[HeldOutWorld], chunks: int,
    modes: Sequence[Mode] = ("closed",), block: int | None = None, advance: Callable[[], object] = lambda: None,
) -> Comparison:  # fmt: skip
    """Play all arms in all worlds. The first arm must be full compute; the others are measured against it.

    On a CPU arms take turns chunk by chunk and every chunk is made alone, so that all meet the same machine. On a GPU
    `block` worlds run together, arm by arm. `advance` is called for every chunk of a world and seed. After Ctrl-C
    what is finished stays.
    """
    names = [a.name for a in arms]
    if not names or len(set(names)) != len(names):
        raise InputError(f"a comparison needs settings with names of their own, got {', '.join(names) or 'none'}")
    if replace(arms[0].settings, name="off") != Acceleration():
        raise InputError(f"the first settings of a comparison must be full compute, got {names[0]!r}")
    alone = engine.device.type == "cpu"
    size = 1 if alone else block or len(worlds)
    result = Comparison(engine, tuple(worlds), chunks, [Trial(a, m) for m in modes for a in arms])
    noise = dict[int, NoiseBank]()
    try:
        _warm_up(engine, arms, worlds[:size], alone, chunks)
        for mode in modes:
            for at in range(0, len(worlds), size):
                trials, numbers = [t for t in result.trials if t.mode == mode], range(at, min(at + size, len(worlds)))
                _play(result, trials, numbers, alone, noise.setdefault(at, NoiseBank()), advance)
                if alone:
                    noise.clear()  # kept from mode to mode where a GPU would wait for it
    except KeyboardInterrupt:
        result.interrupted = True
    return result


def growing(engine: Engine) -> int:
    """Chunks until a context has grown to its full size, and one more."""
    shape = engine.model.chunk(1)
    return -(-(shape.sink + shape.memory + shape.window) // shape.new) + 1


def _warm_up(engine: Engine, arms: Sequence[Arm], worlds: Sequence[HeldOutWorld], alone: bool, chunks: int) -> None:
    """The first step of all pays for setting up kernels; what is compiled must have met contexts of every size."""
    if engine.source.compiled:
        for arm in arms:
            party = Party(engine, worlds[:1], arm, "closed", SEEDS, 1 if alone else None)
            for _ in range(min(chunks, growing(engine))):
                party.step()
    for arm in arms[:1] if alone else arms:
        party = Party(engine, worlds, arm, "closed", SEEDS, 1 if alone else None)
        for _ in range(1 if alone else 2):
            party.step()


def _play(
    result: Comparison, trials: Sequence[Trial], numbers: range, alone: bool, noise: NoiseBank,
    advance: Callable[[], object],
) -> None:  # fmt: skip
    engine, worlds = result.engine, [result.worlds[i] for i in numbers]
    turns = [list(trials)] if alone else [[t] for t in trials]
    full: np.ndarray | None = None
    for group in turns:
        parties = [Party(engine, worlds, t.arm, t.mode, SEEDS, 1 if alone else None, noise) for t in group]
        for _ in range(result.chunks):
            for party in parties:
                party.step()
                for _ in range(len(worlds) * len(SEEDS)):
                    advance()
        for trial, party in zip(group, parties, strict=True):
            frames = party.frames
            full = frames if full is None else full
            tables = dict[int, Table]()
            for w, number in enumerate(numbers):
                tables[number] = score(frames[:, w], full[:, w], worlds[w], patch_of(engine), engine.device)
                if trial.mode == result.trials[0].mode and number < _GALLERY:
                    result.shown.setdefault(trial.arm.name, {})[number] = frames[0, w]
            trial.reports.extend(party.reports)
            trial.tables.update(tables)  # last, so that what has scores has reports


_GALLERY = 6  # worlds whose frames are kept for pictures


def patch_of(engine: Engine) -> tuple[int, int] | None:
    """Height and width of the model's patches, where it has any."""
    patch = getattr(getattr(engine.model, "config", None), "patch", None)
    return patch if isinstance(patch, tuple) else None
