"""Speed of a rollout: every acceleration in one run, step by step in turn, so that all meet the same machine."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch

from worldstride.acceleration import Acceleration
from worldstride.bench.results import quantile
from worldstride.control import Action
from worldstride.engine import Engine
from worldstride.errors import InputError, WorldstrideError
from worldstride.report import ChunkReport

STAGES = ("control", "select", "context", "denoise", "decode", "total")
"""Stages of a step, as a chunk's report times them."""
RANDOM_WEIGHTS_NOTE = "random weights: times and memory are those of the model, the pictures say nothing about quality"

_MOVES = (Action(frozenset({"KeyW"})), Action(frozenset({"ArrowRight"})), Action(frozenset({"KeyW", "ArrowRight"})))
_FIRST_FRAME = """
import json, sys, time
begin = time.perf_counter()
import torch, worldstride
options = json.loads(sys.argv[1])
if options["threads"]:
    torch.set_num_threads(options["threads"])
imported = time.perf_counter()
dtype = getattr(torch, options["dtype"]) if options["dtype"] else None
place, compiled = options["device"], options["compile"]
engine = worldstride.load(options["model"], options["path"], options["weights"], place, dtype=dtype, compile=compiled)
loaded = time.perf_counter()
session = engine.new(seed=0)
session.step()
engine.wait()
done = time.perf_counter()
print(json.dumps({"import": imported - begin, "load": loaded - imported, "new_and_step": done - loaded}))
"""


def measure(
    engine: Engine, accelerations: Sequence[Acceleration], chunks: int, warmup: int, seed: int = 0,
    advance: Callable[[], object] = lambda: None,
) -> list[dict[str, object]]:  # fmt: skip
    """One row an acceleration: times of the stages, speed, context and (on a GPU) peak memory.

    Each acceleration plays its own session of the same world; `warmup` chunks are played first and not counted.
    `advance` is called after every step.
    """
    if chunks < 1 or warmup < 0 or not accelerations:
        got = f"{chunks}, {warmup} and {len(accelerations)}"
        raise InputError(f"a benchmark needs chunks >= 1, warmup >= 0 and at least one acceleration, got {got}")
    sessions = [engine.new(seed) for _ in accelerations]
    for session, settings in zip(sessions, accelerations, strict=True):
        session.acceleration = settings
    reports: list[list[ChunkReport]] = [[] for _ in sessions]
    peaks = [0] * len(sessions)
    gpu = engine.device.type == "cuda"
    for k in range(warmup + chunks):
        for i, session in enumerate(sessions):
            if gpu:
                torch.cuda.reset_peak_memory_stats(engine.device)
            report = session.step(_MOVES[k % len(_MOVES)]).report
            if gpu:
                peaks[i] = max(peaks[i], torch.cuda.max_memory_allocated(engine.device))
            if k >= warmup:
                reports[i].append(report)
            advance()
    return [
        {"name": a.name, "acceleration": a.to_json(), **summary(r), "gpu_peak_bytes": peak or None}
        for a, r, peak in zip(accelerations, reports, peaks, strict=True)
    ]


def summary(reports: Sequence[ChunkReport]) -> dict[str, object]:
    """Speed of chunks that were played: stage times in milliseconds, frames per second, size of the context."""
    seconds = sum(r.seconds["total"] for r in reports)
    stages = {
        stage: {"p50": quantile(times, 0.5), "p95": quantile(times, 0.95)}
        for stage in STAGES
        if (times := [1000 * r.seconds[stage] for r in reports])
    }
    return {
        "chunks": len(reports),
        "frames_per_second": sum(r.frames for r in reports) / max(seconds, 1e-9),
        "stage_ms": stages,
        "evaluations_per_chunk": sum(e.computed for r in reports for e in r.evaluations) / max(len(reports), 1),
        "context_latents": max((r.context_latents for r in reports), default=0),
        "context_bytes": max((r.context_bytes for r in reports), default=0),
    }


def peak_memory() -> int | None:
    """Most bytes of main memory that this process has held; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def time_to_first_frame(engine: Engine, dtype: str | None, threads: int | None) -> dict[str, float]:
    """Seconds from starting a fresh Python to the first chunk of frames, and of its parts."""
    source = engine.source
    options = {
        "model": source.model, "path": source.path, "weights": source.weights, "device": str(engine.device),
        "dtype": dtype, "threads": threads, "compile": source.compiled,
    }  # fmt: skip
    begin = time.perf_counter()
    child = subprocess.run(
        [sys.executable, "-c", _FIRST_FRAME, json.dumps(options)], capture_output=True, text=True, check=False
    )
    total = time.perf_counter() - begin
    if child.returncode:
        reason = (child.stderr.strip().splitlines() or ["no output"])[-1]
        raise WorldstrideError(f"measuring the time to the first frame failed in its own process: {reason}")
    parts: dict[str, float] = json.loads(child.stdout.strip().splitlines()[-1])
    return {"total": total, **parts}
