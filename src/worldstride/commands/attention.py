"""`worldstride attention`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from tyro.conf import arg

from worldstride.attention import Dense, rates, versions
from worldstride.attention.layout import Style
from worldstride.bench import attention as bench
from worldstride.bench.attention_cases import CASES
from worldstride.bench.environment import environment
from worldstride.bench.results import write_json
from worldstride.commands.options import OptionalPath
from worldstride.commands.table import table
from worldstride.engine import pick_device, pick_dtype
from worldstride.errors import InputError, integer_from


@dataclass(frozen=True)
class Attention:
    """Measure block-sparse against dense attention at real models' shapes; needs a CUDA GPU, runs no model."""

    cases: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ()
    """Cases whose names contain one of these; all without any."""
    layouts: Annotated[tuple[Style, ...], arg(metavar="LAYOUT ...")] = ("serpentine", "boxes")
    """How blocks lie: serpentine, boxes."""
    rounds: int = 15
    """Times that each is measured; times are medians."""
    keep: float = 0.175
    """Share of the history that the comparison with the published design keeps."""
    out: OptionalPath = None
    """JSON file for all numbers."""

    def run(self, command: str) -> int:
        """Measure, print, and write."""
        integer_from("--rounds", self.rounds, 1)
        device = pick_device()
        if device.type != "cuda":
            raise InputError(f"the benchmark needs a CUDA GPU; the default device here is {device}")
        chosen = [c for c in CASES if not self.cases or any(word.lower() in c.name.lower() for word in self.cases)]
        if not chosen:
            raise InputError(f"no case matches {' or '.join(self.cases)}; known: {', '.join(c.name for c in CASES)}")
        dtype, begin = pick_dtype(device), time.perf_counter()
        with torch.inference_mode():
            dense = Dense.measured(device, dtype).tuned(case.size for case in chosen)
            found = rates.measured(dense, device, dtype, chosen[0].channels)
            rows = list[dict[str, Any]]()
            for row in bench.table(chosen, self.layouts, dense, found, device, dtype, self.rounds):
                rows.append(row)
                print(f"{time.perf_counter() - begin:6.1f} s  {_line(row)}", flush=True)
            held = [c for c in chosen if c.current is not None]
            pairs = [bench.against_published(c, self.keep, device, dtype, self.rounds) for c in held[-1:]]
        print(f"\n{_table(rows)}\n")
        for pair in pairs:
            print(f"{pair['case']}, one step of one layer at density {pair['density']:.3f}:")
            print("\n".join(f"  {name}: {ms:.3f} ms" for name, ms in pair["ms"].items()))
        if self.out is not None:
            where = environment(device, command)
            kept = {"triton": versions.INSTALLED, "cudnn": torch.backends.cudnn.version()}
            result = {
                "format": "worldstride-attention", **where, **kept, "dtype": str(dtype).removeprefix("torch."),
                "rounds": self.rounds, "rates": None if found is None else asdict(found),
                "dense_choices": dense.describe(), "rows": rows, "published": pairs,
            }  # fmt: skip
            write_json(self.out, result)
            print(f"\nall numbers: {self.out}")
        return 0


def _line(row: Mapping[str, Any]) -> str:
    fast = ", ".join(f"{how} {x:.2f} x" for how, x in row["speedup_with_selection"].items())
    way = row["decision"]["way"]
    return f"{row['case']}, {row['layout']}, {row['density']:.3f}: {fast}; {way} {row['dispatched_speedup']:.2f} x"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Everything that matters of the rows."""
    lines = []
    for r in rows:
        ms, of, ways = r["ms"], r["of_dense"], list(r["speedup_with_selection"])
        parts = [
            r["case"], r["layout"], f"{r['queries']}x{r['keys']}", f"{r['density']:.3f}", f"{ms['dense, cudnn']:.3f}",
            f"{r['tflops']['dense, cudnn']:.0f}",
        ]  # fmt: skip
        for how in ways:
            parts += [f"{ms[how]:.3f}", f"{of[how]:.2f}", f"{r['speedup_with_selection'][how]:.2f}"]
        parts += [f"{1000 * ms['select']:.0f}", f"{r['overhead_us']['select and prepare queries']:.0f}"]
        parts += [f"{r['overhead_us']['beyond norm and rotation']:.0f}", f"{r['overhead_allowed_us']:.0f}"]
        lines.append([*parts, r["decision"]["way"], f"{r['dispatched_speedup']:.2f}"])
    ways = list(rows[0]["speedup_with_selection"])
    each = [word for how in ways for word in (f"{how} ms", "of dense", "speedup")]
    first = ["case", "layout", "shape", "density", "cudnn ms", "TF"]
    return table([*first, *each, "select us", "+ queries", "beyond", "allowed", "dispatch", "speedup"], lines)
