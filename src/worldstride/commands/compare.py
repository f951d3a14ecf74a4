"""`worldstride compare`."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tqdm import tqdm
from tyro.conf import arg

from worldstride.acceleration import PRESETS, Acceleration, resolve
from worldstride.bench.ablation import ablation
from worldstride.bench.compare import NO_MEMORY, SEEDS, Comparison, brackets, compare, held_out
from worldstride.bench.compare import plain as plain_loop
from worldstride.bench.environment import engine_facts, environment
from worldstride.bench.page import MODES, SPLIT, cell, number, signed, write_page
from worldstride.bench.results import make_folder, write_json
from worldstride.bench.results import plain as plain_values
from worldstride.bench.rollout import RANDOM_WEIGHTS_NOTE
from worldstride.bench.sheet import contact_sheet, filmed, pictured, save_picture, side_by_side
from worldstride.bench.trials import Arm, Mode
from worldstride.bench.walks import CLASSES, FIRST_SEED, Trajectory
from worldstride.commands.options import EngineOptions, Family, ModelName, OptionalInt, OptionalText
from worldstride.commands.table import table
from worldstride.engine import Engine
from worldstride.errors import InputError, MissingDependencyError, did_you_mean
from worldstride.levers import Lever
from worldstride.video import VideoWriter, check_video

FULL = Acceleration("full compute")
"""What everything is measured against."""
INTERRUPTED = 130


@dataclass(frozen=True)
class Compare:
    """Measure what settings save and what they cost: against full compute and the truth, on held-out worlds.

    Writes all numbers, a contact sheet, a video and a page. Ctrl-C keeps the worlds that are finished.
    """

    model: ModelName
    """Name of the model."""
    worlds: int = 3
    """Held-out worlds; intervals are over worlds, so more make them narrower."""
    chunks: int = 12
    """Chunks in each world; 12 of the courtyard's turn half around and back."""
    family: Family = "courtyard"
    """Kind of the worlds."""
    accelerations: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ("light-interaction", "balanced", "fast")
    """Presets or .toml files; full compute is always played too."""
    walks: tuple[Trajectory, ...] = ("look away and back", "walk")
    """Kinds of walk, which take turns over the worlds."""
    modes: tuple[Mode, ...] = ("closed",)
    """"closed": the model goes on from its own frames. "forced": from the truth, so that each chunk stands alone."""
    brackets: Literal["no-memory", "all", "off"] = "no-memory"
    """Full compute with other memory, to know what memory can be worth: "no-memory" forgets everything but the recent
    window; "all" also plays random memory, and an oracle's that knows what each frame shows; "off" plays neither."""
    plain: Annotated[tuple[int, ...], arg(metavar="STEPS ...")] = ()
    """Numbers of steps at which the plain loop is played too: what every saved step is up against."""
    ablate: OptionalText = None
    """Preset or .toml file whose levers are also played alone, one after another, and left out one by one."""
    only: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ()
    """Play only the settings of these names, as tables show them, out of all that are asked for; full compute is always
    played. For a table that is made in several runs."""
    block: OptionalInt = None
    """Worlds that run together on a GPU; all where none is given. A CPU plays every chunk alone."""
    out: Path = Path("out/compare")
    """Folder for the page and its files."""
    seed: int = FIRST_SEED
    """Seed of the first world; worlds from 1000000 on were kept from training."""
    fps: int = 10
    """Frames per second of the video."""
    video: bool = True
    """Write a video."""
    engine: Annotated[EngineOptions, arg(name="")] = field(default_factory=EngineOptions)

    def run(self, command: str) -> int:
        """Play, write the files, print the tables; 130 after Ctrl-C, with what was finished."""
        arms = self._arms()
        self._check_numbers()
        no_video = self._check_video()
        make_folder(self.out)
        engine = self.engine.load(self.model)
        begin = time.perf_counter()
        played = self._play(engine, arms)
        rows = played.rows()
        if not rows:
            print("interrupted before a world was finished; nothing was written", file=sys.stderr)
            return INTERRUPTED
        facts: dict[str, Any] = {
            "format": "worldstride-compare",
            **environment(engine.device, command),
            "engine": engine_facts(engine),
            "note": RANDOM_WEIGHTS_NOTE if engine.source.weights == "random" else "",
            "family": self.family,
            "chunks": self.chunks,
            "walks": self.walks,
            "modes": self.modes,
            "seeds": {"worlds": [w.seed for w in played.worlds], "noise": SEEDS},
            "interrupted": played.interrupted,
            "seconds": time.perf_counter() - begin,
            "shares": _shares(played),
            "pictured": pictured(played),
            "filmed": filmed(played),
            "rows": rows,
            "worlds": played.curves(),
        }
        page = self._write(facts, played, no_video)
        _print(facts)
        print(f"\npage: {page}")
        if played.interrupted:
            print("interrupted: the files hold what was finished", file=sys.stderr)
        return INTERRUPTED if played.interrupted else 0

    def _arms(self) -> list[Arm]:
        """Full compute, what was asked for, and what these are held against."""
        asked = [a for a in map(resolve, self.accelerations) if a != PRESETS["off"]]
        arms = [Arm(FULL), *map(Arm, asked)]
        arms += {"all": brackets(), "no-memory": (Arm(NO_MEMORY),), "off": ()}[self.brackets]
        arms += map(Arm, plain_loop(self.plain))
        if self.ablate is not None:
            # the whole may be asked for as well; it is played once
            arms += (Arm(a) for a in ablation(resolve(self.ablate)) if a not in asked)
        names = [a.name for a in arms]
        twice = next((n for n in names if names.count(n) > 1), None)
        if twice is not None:
            raise InputError(f"two settings are called {twice!r}; each needs a name of its own, or leave one out")
        unknown = next((n for n in self.only if n not in names), None)
        if unknown is not None:
            raise InputError(f"--only: no settings are called {unknown!r}{did_you_mean(unknown, names)}")
        return [a for a in arms if not self.only or a.name in (FULL.name, *self.only)]

    def _check_numbers(self) -> None:
        """Refuse before the work what would be refused after the model is loaded."""
        for name in ("worlds", "chunks", "block"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} must be at least 1, got {value}")
        for name in ("walks", "modes"):
            if not getattr(self, name):
                raise InputError(f"--{name} needs at least one value")
        if len(set(self.modes)) != len(self.modes):
            raise InputError(f"--modes must differ from each other, got {' '.join(self.modes)}")

    def _check_video(self) -> str:
        """Why there will be no video, or nothing; raises what cannot be used before the work, not after it."""
        if not self.video:
            return "No video was asked for."
        try:
            check_video(self._video, self.fps)
        except MissingDependencyError as error:  # the numbers and the page are worth having without it
            print(f"no video will be written: {error}")
            return f"No video was written: {error}"
        return ""

    def _play(self, engine: Engine, arms: Sequence[Arm]) -> Comparison:
        with tqdm(total=self.worlds, unit="world", desc="truth") as bar:
            worlds = held_out(engine, self.family, self.worlds, self.chunks, self.walks, self.seed, bar.update)
        total = self.worlds * self.chunks * len(arms) * len(self.modes) * len(SEEDS)
        with tqdm(total=total, unit="chunk", desc=self.model) as bar:
            return compare(engine, arms, worlds, self.chunks, self.modes, self.block, bar.update)

    @property
    def _video(self) -> Path:
        return self.out / "compare.mp4"

    def _write(self, facts: Mapping[str, Any], played: Comparison, no_video: str) -> Path:
        write_json(self.out / "compare.json", facts)
        sheet, page = self.out / "sheet.png", self.out / "index.html"
        save_picture(contact_sheet(played), sheet)
        if not no_video:
            self._film(played, self._video)
        shown = plain_values(facts)
        write_page(page, shown if isinstance(shown, dict) else {}, sheet, None if no_video else self._video, no_video)
        return page

    def _film(self, played: Comparison, path: Path) -> None:
        parts = side_by_side(played)
        first = next(parts)
        with VideoWriter(path, self.fps, (first.shape[1], first.shape[2])) as video:
            video.write(first)
            for part in parts:
                video.write(part)


def _shares(played: Comparison) -> dict[str, float]:
    """How much of all frames each class of pixels is, in all worlds."""
    return {c: sum(float(w.masks[c].float().mean()) for w in played.worlds) / len(played.worlds) for c in CLASSES}


def _print(facts: Mapping[str, Any]) -> None:
    speed = ["evals", "encoded", "GFLOP", "core ms", "p95", "core x", "total x"]
    headers = ["settings", *speed, "energy", "loss %", *SPLIT, "sharp", "PSNR", "to full", "MiB", "kept MiB"]
    for mode in facts["modes"]:
        rows = [row for row in facts["rows"] if row["mode"] == mode]
        if not rows:
            continue
        title, meaning = MODES[mode]
        print(f"\n{title}: {meaning} ({rows[0]['worlds']} worlds)\n")
        shown, *lines = _aligned([headers, *(_line(row, reference=row is rows[0]) for row in rows)])
        print(table(shown, lines))
        if walks := _walks(rows):
            print(walks)
        levers = [f"  {row['name']}: {Lever(**lever)}" for row in rows for lever in row["levers"]]
        print("\n".join(["", "levers:", *levers] if levers else []))
    print("\ncosts are a chunk's, x is the speed-up over full compute, core is context and denoising")
    print("loss is the energy score's against full compute, in brackets the upper end of its paired 95 % interval")
    print("PSNR rises when steps are dropped, because one step returns the blurred mean, so it is no headline")
    if facts["note"]:
        print(f"\n{facts['note']}")


def _line(row: Mapping[str, Any], reference: bool) -> list[str]:
    speed, core, losses = row["speed"], row["speed"]["stage_ms"]["core"], []
    for group in ("all", *SPLIT):
        loss = cell(row, "loss", group)
        known = loss["mean"] == loss["mean"] and not reference
        losses.append(_bracketed(loss) if known else "-")
    psnr = [cell(row, metric)["mean"] for metric in ("psnr", "psnr_full")]
    values = [
        *((speed[key], 1) for key in ("evaluations_per_chunk", "encoded_latents", "gigaflops_per_chunk")),
        (core["p50"], 1), (core["p95"], 1), (row["speedup"]["core"], 2), (row["speedup"]["total"], 2),
        (cell(row, "energy")["mean"], 4),
    ]  # fmt: skip
    late = [number(cell(row, "sharpness")["mean"], 2), number(psnr[0]), "-" if reference else number(psnr[1])]
    head = [number(value, digits) for value, digits in values]
    held = (number(speed[key] / 2**20) for key in ("context_bytes", "kept_bytes"))
    return [row["name"], *head, *losses, *late, *held]


def _bracketed(loss: Mapping[str, float]) -> str:
    """A mean and the upper end of its interval."""
    return f"{signed(loss['mean'])} ({signed(loss['high'])})"


def _walks(rows: Sequence[Mapping[str, Any]]) -> str:
    """Losses of all pixels by kind of walk; empty where all walks are alike."""
    kinds = rows[0]["by_walk"]
    if not kinds:
        return ""
    lines = [["loss %, by walk", *(f"{kind} ({of['worlds']})" for kind, of in kinds.items())]]
    for row in rows[1:]:
        lines.append([row["name"], *(_bracketed(of["loss"]["all"]) for of in row["by_walk"].values())])
    shown, *rest = _aligned(lines)
    return f"\n{table(shown, rest)}"


def _aligned(lines: Sequence[Sequence[str]]) -> list[list[str]]:
    """Lines whose cells, all but the first, stand to the right: headers, and losses with their brackets too."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [[line[0], *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))] for line in lines]
