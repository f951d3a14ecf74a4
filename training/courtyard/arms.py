"""Short runs of variants of the model, one a GPU at a time: which camera code, width, sink, refinement to keep.

`python training/courtyard/arms.py --out OUT --minutes 3` starts one `train.py` a variant and writes `OUT/arms.json`.
"""

from __future__ import annotations

import datetime
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from jobs import Job, run_jobs
from origin import commit

from worldstride.bench.results import write_json

ARMS: dict[str, dict[str, tuple[str, ...]]] = {
    "model": {
        "ray": ("--model.camera", "ray"),
        "projective": ("--model.camera", "projective"),
        "both": (),
        "ray, no refinement": ("--model.camera", "ray", "--model.refine", "0"),
        "ray, sink 4 for 4 of the memory": ("--model.camera", "ray", "--model.sink", "4", "--model.memory", "4"),
        "ray, width 320 x 5": (
            "--model.camera", "ray", "--model.width", "320", "--model.heads", "5", "--model.depth", "5",
        ),
        "ray, window 12": ("--model.camera", "ray", "--model.window", "12"),
    },
    "context": {
        "apart": ("--model.context", "apart"),
        "clips": ("--model.context", "clips"),
        "together": (),
        "apart, twice the rate": ("--model.context", "apart", "--rate", "2e-3", "--matrix-rate", "0.02"),
    },
}  # fmt: skip
"""By question: name of the arm and what it adds to the command line."""


@dataclass(frozen=True)
class Settings:
    """What to run."""

    of: Literal["model", "context"] = "model"
    """Which arms: variants of the model, or what context frames see."""
    out: Path = Path("out/arms")
    minutes: float = 3.0
    """Length of each run after compilation."""
    batch: int = 128
    initial: Path | None = None
    """Weights that every arm starts from, with half the usual rates and patches 12 x 8."""
    compile_cache: Path | None = None
    smoke: bool = False


def main() -> None:
    """Command line."""
    s = tyro.cli(Settings, description=__doc__)
    if s.of == "context" and s.initial is None:
        raise SystemExit("--of context compares what trained weights become: give --initial")
    script = Path(__file__).with_name("train.py")
    jobs: list[Job] = []
    folders: dict[str, Path] = {}
    for i, (name, extra) in enumerate(ARMS[s.of].items()):
        out = folders[name] = s.out / f"arm{i}"
        out.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(script), "--out", str(out), "--minutes", str(s.minutes), "--batch", str(s.batch)]
        command += ["--quick", "2", "--plain-pool", "3072", "--courtyard-pool", "640"]
        if s.initial is not None:
            command += ["--initial", str(s.initial), "--model.patch-width", "8", "--rate", "1e-3", "--own-from", "2"]
            command += ["--matrix-rate", "0.01", "--seam", "0.35"]
        command += extra
        if s.compile_cache is not None:
            command += ["--compile-cache", str(s.compile_cache)]
        if s.smoke:
            command += ["--smoke"]
        jobs.append(Job(name, tuple(command), out / "log.txt"))
    codes = run_jobs(jobs)
    missing = [name for name, code in codes.items() if code]
    results: list[dict[str, object]] = []
    for name, out in folders.items():
        last = (out / "log.txt").read_text().splitlines()[-3:]
        print(name, "exit", codes[name], *last, sep="\n  ", flush=True)
        if codes[name] == 0:
            facts = json.loads((out / "training.json").read_text())
            results.append({"name": name, "arguments": list(ARMS[s.of][name]), **facts})
    summary = {
        "command": "python training/courtyard/arms.py " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "commit": commit(),
        "missing": missing,
        "arms": results,
    }
    write_json(s.out / "arms.json", summary)
    if missing:
        print(f"failed: {', '.join(missing)}; see their log.txt", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
