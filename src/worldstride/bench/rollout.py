"""Speed of a rollout: every acceleration in one run, step by step in turn, so that all meet the same machine."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypedDict

import torch

from worldstride.acceleration import Acceleration
from worldstride.bench.results import quantile
from worldstride.control import Action
from worldstride.engine import Engine
from worldstride.errors import InputError, WorldstrideError
from worldstride.report import ChunkReport, densities
from worldstride.session import Session

STAGES = ("control", "select", "fetch", "context", "denoise", "core", "decode", "total")
"""Stages of a step, as a chunk's report times them; "core" is context and denoising together."""
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
model, path, weights = (options[name] for name in ("model", "path", "weights"))
more = {name: options[name] for name in ("decoder", "quantise")}
engine = worldstride.load(model, path, weights, place, dtype=dtype, compile=compiled, **more)
loaded = time.perf_counter()
session = engine.sample(seed=0)
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

    Each acceleration plays its own session of the same world; `warmup` chunks are played first and not counted, but
    in peak memory, which is of weights and one session as if no other were there. `advance` is called after every step.
    """
    if chunks < 1 or warmup < 0 or not accelerations:
        got = f"{chunks}, {warmup} and {len(accelerations)}"
        raise InputError(f"a benchmark needs chunks >= 1, warmup >= 0 and at least one acceleration, got {got}")
    sessions, memory = list[Session](), _memory(engine.device, len(accelerations))
    for settings, share in zip(accelerations, memory, strict=True):
        with share.used():
            sessions.append(engine.sample(seed))
        sessions[-1].acceleration = settings
    reports: list[list[ChunkReport]] = [[] for _ in sessions]
    for k in range(warmup + chunks):
        for i, (session, share) in enumerate(zip(sessions, memory, strict=True)):
            with share.used():
                report = session.step(_MOVES[k % len(_MOVES)]).report
            if k >= warmup:
                reports[i].append(report)
            advance()
    return [
        {"name": a.name, "acceleration": a.to_json(), **summary(r), "gpu_peak_bytes": share.peak}
        for a, r, share in zip(accelerations, reports, memory, strict=True)
    ]


@dataclass
class Share:
    """Memory of a GPU that one of several sessions takes, with what was there before any."""

    device: torch.device
    held: int = 0
    peak: int | None = None

    @contextmanager
    def used(self) -> Iterator[None]:
        """Counts what is allocated inside as this session's, and leaves out what others hold meanwhile."""
        if self.device.type != "cuda":
            yield
            return
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        yield
        self.peak = max(self.peak or 0, self.held + torch.cuda.max_memory_allocated(self.device) - before)
        self.held += torch.cuda.memory_allocated(self.device) - before


def _memory(device: torch.device, sessions: int) -> list[Share]:
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    return [Share(device, held) for _ in range(sessions)]


class Speed(TypedDict):
    """Speed of chunks that were played."""

    chunks: int
    frames_per_second: float
    seconds: dict[str, float]
    """All chunks together: "core" (context and denoising) and "total"."""
    stage_ms: dict[str, dict[str, float]]
    """Stage -> median and 95th percentile in milliseconds a chunk; "core" is context and denoising."""
    evaluations_per_chunk: float
    """Computed ones."""
    reused_per_chunk: float
    """Solver steps whose evaluation was not computed."""
    attended_per_chunk: float
    """Evaluations that computed attention to the context."""
    context_latents: float
    """A chunk, on average."""
    encoded_latents: float
    """Of those, encoded for the chunk."""
    context_bytes: int
    """Most keys and values of one chunk."""
    kept_bytes: int
    """Most that was kept of encoded latents from chunk to chunk."""
    gigaflops_per_chunk: float | None
    tflops: float | None
    """Floating-point operations a second of context and denoising, in 10^12; None where the model does not tell."""
    evaluation_ms: list[float | None]
    """Median milliseconds of each solver step's evaluation (of both guidance branches), first to last; None where no
    chunk computed it."""
    density: dict[str, float]
    """Share of query-key pairs attended to, where attention was asked to be sparse: of the chunk, of the context."""
    batch: float
    """Chunks made together, on average."""


def summary(reports: Sequence[ChunkReport]) -> Speed:
    """Speed of chunks that were played, and what it was spent on."""
    count = max(len(reports), 1)
    cores = [r.seconds["context"] + r.seconds["denoise"] for r in reports]
    totals = [r.seconds["total"] for r in reports]
    times = {s: cores if s == "core" else [r.seconds[s] for r in reports] for s in STAGES}
    flops = [sum(r.flops.values()) for r in reports if r.flops]
    return {
        "chunks": len(reports),
        "frames_per_second": sum(r.frames for r in reports) / max(sum(totals), 1e-9),
        "seconds": {"core": sum(cores), "total": sum(totals)},
        "stage_ms": {
            stage: {"p50": 1000 * quantile(some, 0.5), "p95": 1000 * quantile(some, 0.95)}
            for stage, some in times.items() if some
        },
        "evaluations_per_chunk": sum(e.computed for r in reports for e in r.evaluations) / count,
        "reused_per_chunk": sum(not e.computed for r in reports for e in r.evaluations) / count,
        "attended_per_chunk": sum(e.computed and e.attended for r in reports for e in r.evaluations) / count,
        "context_latents": sum(r.context_latents for r in reports) / count,
        "encoded_latents": sum(r.encoded_latents for r in reports) / count,
        "context_bytes": max((r.context_bytes for r in reports), default=0),
        "kept_bytes": max((r.kept_bytes for r in reports), default=0),
        "gigaflops_per_chunk": sum(flops) / count / 1e9 if flops else None,
        "tflops": sum(flops) / max(sum(cores), 1e-9) / 1e12 if flops else None,
        "evaluation_ms": _each_evaluation(reports),
        "density": densities(reports),
        "batch": sum(r.batch for r in reports) / count,
    }  # fmt: skip


def _each_evaluation(reports: Sequence[ChunkReport]) -> list[float | None]:
    """Median milliseconds by solver step, over the chunks that computed it."""
    steps = max((len(r.evaluations) for r in reports), default=0)
    each = ([e.seconds for r in reports for e in r.evaluations[i : i + 1] if e.computed] for i in range(steps))
    return [1000 * quantile(some, 0.5) if some else None for some in each]


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
        "dtype": dtype, "threads": threads, "compile": source.compiled, "decoder": source.decoder,
        "quantise": source.quantised,
    }  # fmt: skip
    if engine.device.type == "cuda":
        torch.cuda.empty_cache()  # another process is to find the memory that sessions have let go of
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
