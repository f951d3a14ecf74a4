"""`worldstride gate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import torch
from tqdm import tqdm
from tyro.conf import arg

from worldstride.bench.environment import engine_facts, environment
from worldstride.bench.gate import (
    KINDS,
    NEEDED,
    ChunkSignals,
    agreement,
    area_under_curve,
    decisions,
    observe,
    score_of,
)
from worldstride.bench.results import write_json
from worldstride.commands.options import EngineOptions, Family, ModelName, OptionalPath
from worldstride.commands.table import table
from worldstride.context.policy import PUBLISHED, PoseView, SpatialMemory
from worldstride.errors import InputError

BALL = PoseView("ball")
GATES: dict[str, tuple[SpatialMemory, PoseView]] = {
    "published": (PUBLISHED, BALL),
    "published, frustum": (PUBLISHED, PoseView()),
    "relative": (SpatialMemory("similarity", 0.7, margin=0.05, hysteresis=0.05), BALL),
    "added": (SpatialMemory(), PoseView()),
    "added, ball": (SpatialMemory(), BALL),
}
"""Gates that are compared, each with what a camera is taken to see; "added" is the default of `SpatialMemory`."""


@dataclass(frozen=True)
class Gate:
    """How well gates on retrieved memory agree with what procedural worlds truly show; runs no model."""

    model: ModelName
    """Name of the model, whose camera, window and chunk are used."""
    worlds: int = 16
    """Held-out worlds for each kind of trajectory."""
    frames: int = 128
    """Frames of a trajectory."""
    family: Family = "courtyard"
    """Family of worlds."""
    out: OptionalPath = None
    """JSON file for all numbers."""
    engine: Annotated[EngineOptions, arg(name="")] = field(default_factory=EngineOptions)

    def run(self, command: str) -> int:
        """Measure, print, and write."""
        if self.worlds < 1:
            raise InputError(f"--worlds must be at least 1, got {self.worlds}")
        engine = self.engine.load(self.model)
        shape, seen = engine.model.chunk(1), dict[str, list[ChunkSignals]]()
        looks = {p.view: p.look(engine.model.intrinsics) for _, p in GATES.values()}
        with tqdm(total=len(looks) * len(KINDS) * self.worlds, unit="trajectory", desc="gate") as bar:
            for name, view in looks.items():
                seen[name] = observe(
                    view, KINDS, self.worlds, self.frames, shape.window, shape.frames, self.family,
                    advance=bar.update,
                )  # fmt: skip
        rows = [row for name, (settings, pose) in GATES.items() for row in _rows(name, settings, seen[pose.view])]
        _print(rows)
        if self.out is not None:
            facts = {"family": self.family, "worlds": self.worlds, "frames": self.frames, "needed": NEEDED}
            where = environment(torch.device("cpu"), command)
            gates = {name: {**asdict(settings), **asdict(pose)} for name, (settings, pose) in GATES.items()}
            engine_row = engine_facts(engine)
            write_json(
                self.out,
                {"format": "worldstride-gate", **where, "engine": engine_row, **facts, "gates": gates, "rows": rows},
            )
            print(f"\nall numbers: {self.out}")
        return 0


def _rows(name: str, settings: SpatialMemory, chunks: Sequence[ChunkSignals]) -> list[dict[str, Any]]:
    made, rows = decisions(chunks, settings), list[dict[str, Any]]()
    for kind in (*KINDS, "all"):
        mine = [i for i, c in enumerate(chunks) if kind in ("all", c.trajectory)]
        truth = [chunks[i].truth >= NEEDED for i in mine]
        rows.append(
            {
                "gate": name, "trajectory": kind, "chunks": len(mine), "revisits": sum(truth) / len(mine),
                "open": sum(made[i] for i in mine) / len(mine), **agreement(truth, [made[i] for i in mine]),
                "auc": area_under_curve(truth, [score_of(chunks[i], settings) for i in mine]),
            }
        )  # fmt: skip
    return rows


def _print(rows: Sequence[Mapping[str, Any]]) -> None:
    names = ("revisits", "open", "precision", "recall", "auc")
    cells = [[r["gate"], r["trajectory"], str(r["chunks"]), *(f"{r[n]:.2f}" for n in names)] for r in rows]
    print(table(("gate", "trajectory", "chunks", *names), cells))
    print(f"\na chunk is a revisit where at least {NEEDED:.0%} of its pixels were seen before and not in the window")
