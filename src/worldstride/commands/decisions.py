"""`worldstride decisions`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tqdm import tqdm

from worldstride.bench.decisions import GEOMETRIES, HISTORIES, SETTINGS, measure
from worldstride.bench.environment import environment
from worldstride.bench.results import write_json
from worldstride.commands.options import OptionalPath
from worldstride.commands.table import table
from worldstride.errors import integer_from


@dataclass(frozen=True)
class Decisions:
    """Measure what decisions cost at the sizes of real models, on the CPU; no model runs."""

    repeats: int = 15
    """Chunks that are decided for each row."""
    out: OptionalPath = None
    """JSON file for all numbers."""

    def run(self, command: str) -> int:
        """Measure, print, and write."""
        integer_from("--repeats", self.repeats, 1)
        with tqdm(total=len(GEOMETRIES) * len(HISTORIES) * len(SETTINGS), unit="row", desc="decisions") as bar:
            rows = measure(self.repeats, advance=bar.update)
        cells = [
            (r["geometry"], r["preset"], str(r["history"]), f"{r['ms_p50']:.1f}", f"{r['ms_p95']:.1f}",
             f"{r['chunk_seconds']:.2f}", f"{100 * float(str(r['share'])):.2f}")
            for r in rows
        ]  # fmt: skip
        headers = ("geometry", "preset", "history", "ms", "p95", "chunk s", "share %")
        print(table(headers, [[str(c) for c in line] for line in cells]))
        for name, geometry in GEOMETRIES.items():
            print(f"{name}: chunk time is {geometry.source}")
        if self.out is not None:
            where = environment(torch.device("cpu"), command)
            write_json(self.out, {"format": "worldstride-decisions", **where, "repeats": self.repeats, "rows": rows})
            print(f"\nall numbers: {self.out}")
        return 0
