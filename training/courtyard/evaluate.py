"""Evaluate courtyard weights on held-out worlds: `python training/courtyard/evaluate.py --weights FILE --out FILE`.

Three families: the plain static court, the full courtyard (rooms, moving things, long walks) and the corridor, which
training never saw. Teacher-forced (context = truth) and closed loop (context = own frames). Noise is fixed by walk
and chunk, so that rows differ by what their name says only.
"""

from __future__ import annotations

import datetime
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import tyro
from closed_loop import LOOK_GIVEN, LOOK_HOME, LOOK_OUT, look_away, mirrored, retrace, roll, seen_before
from heldout import HeldOut, Memory, Walks, images, sample, shoot
from jobs import Job, run_jobs, visible_gpus
from origin import commit
from PIL import Image
from torch import Tensor

from worldstride import worlds
from worldstride.bench import metrics
from worldstride.bench.environment import hardware
from worldstride.bench.results import write_json
from worldstride.bench.walks import FIRST_SEED
from worldstride.engine import pick_dtype
from worldstride.models.courtyard.adapter import CourtyardModel
from worldstride.models.courtyard.weights import read_network, shipped

Row = dict[str, object]


@dataclass(frozen=True)
class Settings:
    """What to evaluate."""

    weights: Path | None = None
    """Weights file; the shipped one if left out."""
    out: Path = Path("out/evaluation")
    """Folder for evaluation.json and the sheets."""
    plain: int = 512
    """Plain worlds."""
    courtyard: int = 128
    """Full worlds, and corridors."""
    walk: int = 512
    """Frames of the full world's walks in which the camera comes back."""
    loop: int = 64
    """Worlds in closed loop."""
    chunks: int = 32
    """Chunks in closed loop."""
    drift: int = 100
    """Chunks of the drift measurement."""
    part: str | None = None
    """One part alone (see `PARTS`); all, merged, if left out."""
    at_once: int = 1
    """Parts that share a GPU (or the CPU)."""
    smoke: bool = False
    """Few worlds and chunks, to see that everything runs."""


RECALLED: tuple[Memory, ...] = ("pose", "random", "oracle")
"""Ways of choosing memory whose share of the revisited pixels is measured."""


class Evaluation:
    """Collects rows and prints them."""

    def __init__(self, settings: Settings) -> None:
        small = replace(settings, plain=4, courtyard=2, walk=40, loop=2, chunks=3, drift=4)
        self.s = small if settings.smoke else settings
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network, self.fingerprint = read_network(settings.weights or shipped())
        dtype = pick_dtype(device)
        self.device, self.model = device, CourtyardModel(network.to(device, dtype).eval(), dtype)
        self.config, self.rows, self.begin = network.config, {}, time.perf_counter()

    def record(self, name: str, row: Row) -> None:
        """Keep and print one row."""
        self.rows[name] = row
        self.save()
        text = " ".join(
            f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if "_ci" not in k
        )
        print(f"[{time.perf_counter() - self.begin:6.1f}] {name}: {text}", flush=True)

    def quality(self, image: Tensor, truth: Tensor, masks: dict[str, Tensor], second: Tensor | None = None) -> Row:
        """All metrics of images [N, F, 3, H, W], whole and by class of pixels."""
        row: Row = {}
        for name, mask in {"all": None, **masks}.items():
            values = metrics.psnr(image, truth, mask)
            row[f"{name}_psnr"], row[f"{name}_psnr_ci"] = metrics.mean(values), metrics.interval(values)
            row[f"{name}_ssim"] = metrics.mean(metrics.ssim(image, truth, mask))
            row[f"{name}_sharpness"] = self.ratio(image, truth, mask)
            if second is not None:
                values = metrics.energy_score(image, second, truth, mask)
                row[f"{name}_energy"], row[f"{name}_energy_ci"] = metrics.mean(values), metrics.interval(values)
        row["seam"] = self.borders(image, truth)
        return row

    def ratio(self, image: Tensor, truth: Tensor, mask: Tensor | None = None) -> float:
        """Sharpness: mean gradient over the truth's, patch borders left out."""
        patch = self.config.patch
        return metrics.mean(metrics.gradient(image, mask, patch)) / metrics.mean(metrics.gradient(truth, mask, patch))

    def borders(self, image: Tensor, truth: Tensor) -> float:
        """Mean gradient across patch borders over the truth's."""
        patch = self.config.patch
        return metrics.mean(metrics.seam(image, patch)) / metrics.mean(metrics.seam(truth, patch))

    def teacher_forced(self, family: str, count: int, revisits: int | None = None) -> HeldOut:
        """One chunk a walk, by memory and by steps; with `revisits`, coming back in walks of so many frames."""
        held = HeldOut(
            sample(family, count, self.config, self.device, revisits), self.config, revisiting=revisits is not None
        )
        masks, classes = held.masks(), held.frame_classes()
        family = family if revisits is None else f"{family} coming back"
        self.record(
            f"{family}/shares",
            {
                "worlds": count,
                "frames": held.walks.pose.shape[1],
                **{k: float(v.float().mean()) for k, v in masks.items()},
                **{f"frames_{k}": int(v.sum()) for k, v in classes.items()},
                **{f"recall_{how}": held.recall(how) for how in RECALLED},
            },
        )
        runs = [
            ("pose", 8),
            ("pose", 4),
            ("pose", 2),
            ("none", 8),
            ("random", 8),
            ("oracle", 8),
            ("none", 4),
            ("random", 4),
            ("oracle", 4),
        ]
        for how, steps in runs:
            image, second = (held.run(self.model, how, steps, seed) for seed in (1, 2))
            row = self.quality(image, held.truth, masks, second)
            whole = metrics.psnr(image, held.truth)
            row |= {f"frame_{k}_psnr": metrics.mean(whole[v]) for k, v in classes.items()}
            if steps == 8 and how == "pose":
                row["noise_floor_psnr"] = metrics.mean(metrics.psnr(image, second))
            self.record(f"{family}/teacher-forced/{how}/{steps} steps", row)
        return held

    def more_schedules(self, held: HeldOut, family: str) -> None:
        """Shifts, numbers of steps and solvers, and fewer memory or window frames, teacher-forced."""
        for solver, tried in SCHEDULES.items():
            for steps, shifts in tried.items():
                for shift in shifts:
                    name = f"{family}/schedule/{'' if solver == 'euler' else solver + ' '}{steps} steps shift {shift}"
                    self._short(name, held, steps=steps, shift=float(shift), solver=solver)
        for memory, window in ((4, 8), (2, 8), (1, 8), (8, 4), (8, 2), (4, 4)):
            self._short(f"{family}/context/memory {memory} window {window}", held, count=memory, window=window)

    def _short(self, name: str, held: HeldOut, **how: Any) -> None:
        image, second = (held.run(self.model, "pose", seed=seed, **how) for seed in (1, 2))
        whole, energy = metrics.psnr(image, held.truth), metrics.energy_score(image, second, held.truth)
        row: Row = {"energy": metrics.mean(energy), "sharpness": self.ratio(image, held.truth)}
        for k, v in held.frame_classes().items():
            row |= {f"frame_{k}_psnr": metrics.mean(whole[v]), f"frame_{k}_energy": metrics.mean(energy[v])}
        self.record(name, row)

    def closed_loop(self, family: str) -> None:
        """Rollouts along walks: quality by class, with each kind of memory and number of steps."""
        given, frames = self.config.window, self.config.window + self.config.chunk * self.s.chunks
        walks = sample(family, self.s.loop, self.config, self.device, frames)
        masks = seen_before(walks, given, frames, self.config)
        truth = images(walks.patches[:, given:], self.config)
        kept = []
        for how, steps in (("pose", 8), ("pose", 4), ("pose", 2), ("none", 8), ("random", 8), ("oracle", 8)):
            first, second = (
                images(roll(self.model, walks, given, frames, how, steps, s)[:, given:], self.config) for s in (1, 2)
            )
            self.record(f"{family}/closed loop/{how}/{steps} steps", self.quality(first, truth, masks, second))
            kept.append(first)
        self.sheet(f"{family}_closed_loop", [truth, kept[0], kept[1], kept[3]])

    def returning(self, family: str) -> None:
        """Look away and back, and back over a known path, in closed loop."""
        count, plain = self.s.loop, family == "plain"
        scene = worlds.scene_from_seed(family, range(FIRST_SEED + 5000, FIRST_SEED + 5000 + count), self.device)
        generator = torch.Generator(self.device).manual_seed(77)
        known, back = (64, 40) if plain else (160, 64)
        there = worlds.sample_walk(scene, known, generator)
        heading = torch.rand(count, generator=torch.Generator().manual_seed(78)).to(self.device) * 6.2832
        away = look_away(scene, there[:, 0, :2], heading, self.config)
        home = retrace(shoot(scene, there, self.config), known, self.config, back)
        for how, steps in (("pose", 8), ("pose", 4), ("pose", 2), ("none", 8), ("none", 4), ("random", 8)):
            row = self._look(away, how, steps)
            image = images(roll(self.model, home, known, known + back, how, steps)[:, known:], self.config)
            truth = images(home.patches[:, known:], self.config)
            values = metrics.psnr(image, truth)
            row |= {
                "retrace_psnr": metrics.mean(values), "retrace_psnr_ci": metrics.interval(values),
                "retrace_first8": metrics.mean(values[:, :8]), "retrace_last8": metrics.mean(values[:, -8:]),
                "retrace_sharpness": self.ratio(image, truth),
            }  # fmt: skip
            self.record(f"{family}/returning/{how}/{steps} steps", row)

    def _look(self, away: Walks, how: str, steps: int) -> Row:
        patches = roll(self.model, away, LOOK_GIVEN, away.pose.shape[1], how, steps)  # type: ignore[arg-type]
        image, truth = images(patches, self.config), images(away.patches, self.config)
        values = metrics.psnr(image, truth)
        out, back = mirrored()
        consistent = metrics.psnr(image[:, back], image[:, out])
        if steps == 4 and how == "pose":
            self.sheet(f"look_away_{len(away.scene.floor[0])}", [truth[:, 8:], image[:, 8:]])
        return {
            "look_home_psnr": metrics.mean(values[:, LOOK_HOME]),
            "look_home_psnr_ci": metrics.interval(values[:, LOOK_HOME]),
            "look_out_sharpness": self.ratio(image[:, LOOK_OUT], truth[:, LOOK_OUT]),
            "look_sharpness": self.ratio(image[:, 8:], truth[:, 8:]),
            "look_self_consistency": metrics.mean(consistent),
            "look_seam": self.borders(image[:, 8:], truth[:, 8:]),
        }

    def drifting(self) -> None:
        """Quality by tenths of a long rollout in the full world."""
        given, frames = self.config.window, self.config.window + self.config.chunk * self.s.drift
        walks = sample("courtyard", self.s.loop, self.config, self.device, frames)
        masks = seen_before(walks, given, frames, self.config)
        truth = images(walks.patches[:, given:], self.config)
        for steps in (8, 4):
            image = images(roll(self.model, walks, given, frames, "pose", steps)[:, given:], self.config)
            bounds = torch.linspace(0, frames - given, 11).long().tolist()
            row: Row = {}
            for i, (a, b) in enumerate(pairwise(bounds)):
                if b == a:
                    continue
                part = slice(a, b)
                row[f"tenth{i}_psnr"] = metrics.mean(metrics.psnr(image[:, part], truth[:, part]))
                for name in ("recent", "revisited"):
                    row[f"tenth{i}_{name}_psnr"] = metrics.mean(
                        metrics.psnr(image[:, part], truth[:, part], masks[name][:, part])
                    )
                row[f"tenth{i}_sharpness"] = self.ratio(image[:, part], truth[:, part])
                row[f"tenth{i}_contrast"] = float(
                    image[:, part].std((-1, -2)).mean() / truth[:, part].std((-1, -2)).mean()
                )
            self.record(f"courtyard/drift/{steps} steps", row)
            if steps == 8:
                self.sheet("courtyard_drift", [truth, image])

    def sheet(self, name: str, rows: list[Tensor], worlds_shown: int = 4, columns: int = 14) -> None:
        """Save a contact sheet: for a few worlds, one row each of the given image sequences [N, F, 3, H, W]."""
        pick = torch.linspace(0, rows[0].shape[1] - 1, columns).long()
        strips = [
            torch.cat(list((r[w, pick].clamp(0, 1) * 255).round().to(torch.uint8).cpu()), -1)
            for w in range(min(worlds_shown, len(rows[0])))
            for r in rows
        ]
        self.s.out.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.cat(strips, 1).movedim(0, -1).numpy()).save(self.s.out / f"{name}.png", optimize=True)

    def save(self) -> None:
        """Write the part's rows."""
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name() if cuda else hardware(self.device)["cpu"]
        facts = {
            "command": "python training/courtyard/evaluate.py " + " ".join(sys.argv[1:]),
            "date": datetime.date.today().isoformat(),
            "device": name,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": commit(),
            "weights_sha256": self.fingerprint,
            "dtype": str(self.model.dtype),
            "seconds": time.perf_counter() - self.begin,
            "rows": self.rows,
        }
        self.s.out.mkdir(parents=True, exist_ok=True)
        write_json(self.s.out / f"evaluation-{self.s.part}.json", facts)


SCHEDULES: dict[str, dict[int, tuple[float, ...]]] = {
    "euler": {
        1: (1,), 2: (1, 2, 5, 8), 3: (1, 2, 4.5), 4: (1, 2, 4, 6, 8), 5: (1, 2, 3.7), 6: (2, 3.5), 8: (1, 2, 3, 4, 6),
    },
    "unipc": {2: (1, 2, 3), 3: (1, 1.5, 2, 3), 4: (1, 1.5, 2, 3), 5: (1.5, 2, 3)},
}  # fmt: skip
"""Shifts that are tried, by solver and number of steps."""

PARTS: dict[str, Callable[[Evaluation], object]] = {
    "courtyard-loop": lambda e: e.closed_loop("courtyard"),
    "corridor-loop": lambda e: e.closed_loop("corridor"),
    "drift": lambda e: e.drifting(),
    "courtyard-returning": lambda e: e.returning("courtyard"),
    "courtyard": lambda e: e.more_schedules(e.teacher_forced("courtyard", e.s.courtyard), "courtyard"),
    "courtyard-coming-back": lambda e: e.teacher_forced("courtyard", e.s.courtyard, e.s.walk),
    "plain": lambda e: e.teacher_forced("plain", e.s.plain),
    "plain-schedules": lambda e: e.more_schedules(
        HeldOut(sample("plain", e.s.plain, e.config, e.device), e.config), "plain"
    ),
    "plain-returning": lambda e: e.returning("plain"),
    "corridor": lambda e: e.more_schedules(e.teacher_forced("corridor", e.s.courtyard), "corridor"),
}
"""Parts of the evaluation, each a process of its own where there are several GPUs; the longest first."""


def spread(settings: Settings) -> int:
    """Run every part in a process of its own, `at_once` a GPU, and merge what they wrote; 1 if a part is missing."""
    files = {part: settings.out / f"evaluation-{part}.json" for part in PARTS}
    for path in files.values():
        path.unlink(missing_ok=True)  # an earlier run's parts are no part of this one
    codes = run_jobs(
        [Job(part, (sys.executable, __file__, *sys.argv[1:], "--part", part)) for part in PARTS], settings.at_once
    )
    missing = [part for part, path in files.items() if codes[part] or not path.exists()]
    merged = [json.loads(path.read_text()) for part, path in files.items() if part not in missing]
    facts = {
        **(merged[0] if merged else {"commit": commit()}),
        "command": "python training/courtyard/evaluate.py " + " ".join(sys.argv[1:]),
        "gpus": len(visible_gpus()),
        "seconds": max((one["seconds"] for one in merged), default=0.0),
        "missing": missing,
        "rows": {name: row for one in merged for name, row in one["rows"].items()},
    }
    settings.out.mkdir(parents=True, exist_ok=True)
    write_json(settings.out / "evaluation.json", facts)
    for path in files.values():
        path.unlink(missing_ok=True)
    if missing:
        print(f"failed: {', '.join(missing)}; see above", file=sys.stderr)
    return 1 if missing else 0


def main() -> None:
    """Command line."""
    settings = tyro.cli(Settings, description=__doc__)
    if settings.part is None:
        raise SystemExit(spread(settings))
    if settings.part not in PARTS:
        raise SystemExit(f"unknown part {settings.part!r}; parts: {', '.join(PARTS)}")
    evaluation = Evaluation(settings)
    with torch.no_grad():
        PARTS[settings.part](evaluation)


if __name__ == "__main__":
    main()
