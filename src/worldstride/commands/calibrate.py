"""`worldstride calibrate`."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from tqdm import tqdm
from tyro.conf import arg

from worldstride.acceleration import save_settings
from worldstride.atomic import atomic_write, temporary_beside
from worldstride.bench.calibrate import COUNTED, Calibration, Seen, calibrate
from worldstride.bench.compare import held_out
from worldstride.bench.environment import engine_facts, environment
from worldstride.bench.page import figure, signed
from worldstride.bench.results import write_json
from worldstride.bench.rollout import RANDOM_WEIGHTS_NOTE
from worldstride.bench.trials import Mode
from worldstride.bench.walks import FIRST_SEED, Trajectory
from worldstride.commands.options import EngineOptions, Family, ModelName
from worldstride.commands.table import table
from worldstride.errors import InputError, integer_from, number_in

NOT_REACHABLE, INTERRUPTED = 1, 130


@dataclass(frozen=True)
class Calibrate:
    """Find the fastest settings within a quality budget, by measurement; write them as a TOML preset.

    Beside the preset go a plot of all settings that were tried (.svg) and all numbers (.json). Exit status 1 where no
    faster setting meets the budget. Ctrl-C ends the search with what was found.
    """

    model: ModelName
    """Name of the model."""
    budget: float = 2.0
    """Most loss of the energy score in percent, for revisited, recent and novel pixels each, at the upper end of the
    paired interval over worlds."""
    worlds: int = 8
    """Held-out worlds; more make the intervals narrower, and so the budget easier to meet."""
    chunks: int = 16
    """Chunks in each world."""
    family: Family = "courtyard"
    """Kind of the worlds."""
    walks: tuple[Trajectory, ...] = ("out and back",)
    """Kinds of walk, which take turns over the worlds."""
    mode: Mode = "forced"
    """"forced" judges each chunk by itself; "closed" lets errors add up, as a player sees them, and needs more
    worlds."""
    trials: int = 30
    """Most settings to measure."""
    out: Path = Path("calibrated.toml")
    """The preset; plot and numbers take its name with .svg and .json."""
    seed: int = FIRST_SEED + 10_000
    """Seed of the first world; others than `worldstride compare` takes, so that a preset is judged on new ones."""
    engine: Annotated[EngineOptions, arg(name="")] = field(default_factory=EngineOptions)

    def run(self, command: str) -> int:
        """Search, print what was seen, write."""
        number_in("--budget", self.budget, 0, 1000, open_low=True)
        if self.out.suffix != ".toml":
            raise InputError(f"--out must be a .toml file, got {self.out}")
        temporary_beside(self.out)  # refuses a missing folder before the work
        engine = self.engine.load(self.model)
        integer_from("--worlds", self.worlds, 2)
        begin = time.perf_counter()
        with tqdm(total=self.worlds, unit="world", desc="truth") as bar:
            worlds = held_out(engine, self.family, self.worlds, self.chunks, self.walks, self.seed, bar.update)
        with tqdm(total=self.trials, unit="setting", desc=self.model) as bar:

            def advance(one: Seen) -> None:
                bar.set_postfix_str(f"{one.settings.name}: {one.speedup:.2f}x, {signed(one.worst)} %", refresh=False)
                bar.update()

            found = calibrate(engine, worlds, self.chunks, self.budget, self.mode, self.trials, advance)
        rows = [one.to_json() for one in found.seen]
        facts: dict[str, Any] = {
            "format": "worldstride-calibrate", **environment(engine.device, command), "engine": engine_facts(engine),
            "note": RANDOM_WEIGHTS_NOTE if engine.source.weights == "random" else "", "family": self.family,
            "budget": self.budget, "worlds": [w.seed for w in worlds], "chunks": self.chunks, "walks": self.walks,
            "mode": self.mode, "seconds": time.perf_counter() - begin, "rows": rows,
            "interrupted": found.interrupted, "chosen": None if found.chosen is None else found.chosen.settings.name,
        }  # fmt: skip
        write_json(self.out.with_suffix(".json"), facts)
        with atomic_write(self.out.with_suffix(".svg")) as temporary:
            temporary.write_text(figure(rows), encoding="utf-8")
        _print(found)
        return self._conclude(found, facts)

    def _conclude(self, found: Calibration, facts: dict[str, Any]) -> int:
        best, beside = (
            found.chosen,
            f"plot and numbers: {self.out.with_suffix('.svg')}, {self.out.with_suffix('.json')}",
        )
        if best is None and found.interrupted:
            print(f"\ninterrupted before any settings met the budget\n{beside}", file=sys.stderr)
            return INTERRUPTED
        if best is None:
            near = found.closest
            seen = "nothing was faster than full compute"
            if near is not None:
                seen = f"best seen is {near.settings.name!r}: {signed(near.worst)} % at {near.speedup:.2f}x"
            print(f"\na budget of {self.budget:g} % is not reachable; {seen}\n{beside}", file=sys.stderr)
            return NOT_REACHABLE
        chip = facts["hardware"]
        made_on = chip.get("gpu") or chip.get("cpu") or chip["device"]
        comment = (
            f"{best.settings.name}: {best.speedup:.2f}x the speed of full compute in context and denoising, "
            f"{signed(best.worst)} % energy score\nat the upper end of the class that loses most; budget "
            f"{self.budget:g} %, {self.worlds} {self.family} worlds x {self.chunks} chunks, {self.mode}\n"
            f"{self.model} {facts['engine']['fingerprint'][:12]}, {made_on}, {facts['date']}"
        )
        if found.absent:
            comment += f"\nno {' or '.join(found.absent)} pixels in these worlds: nothing is known of them"
        save_settings(replace(best.settings, name=self.out.stem), self.out, comment)
        print(f"\npreset: {self.out} ({best.settings.name})\n{beside}")
        return 0


def _print(found: Calibration) -> None:
    cells = []
    for one in sorted(found.seen, key=lambda s: s.speedup):
        losses = [signed(one.quality["loss"][c]["high"]) for c in COUNTED]
        mark = "<" if one is found.chosen else ""
        cells.append([one.settings.name, f"{one.speedup:.2f}", *losses, signed(one.worst), mark])
    print(table(("settings", "core x", *(f"{c} %" for c in COUNTED), "worst %", ""), cells))
    print("\nloss of the energy score at the upper end of its paired interval")
    if found.absent:
        print(f"no {' or '.join(found.absent)} pixels in these worlds: nothing is known of them; other walks have them")
