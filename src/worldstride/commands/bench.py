"""`worldstride bench`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import torch
from tqdm import tqdm
from tyro.conf import Positional, arg

from worldstride.acceleration import Acceleration, resolve
from worldstride.bench.environment import engine_facts, environment
from worldstride.bench.plan import FORMAT, Plan, read_plan, record
from worldstride.bench.results import write_json
from worldstride.bench.rollout import RANDOM_WEIGHTS_NOTE, STAGES, measure, peak_memory, time_to_first_frame
from worldstride.bench.walk import out_and_back, walked, ways
from worldstride.commands.options import EngineOptions, ModelName, OptionalInt, OptionalPath
from worldstride.commands.table import table
from worldstride.engine import Engine, pick_device
from worldstride.errors import InputError
from worldstride.models.quantised import bytes_of
from worldstride.models.wan import umt5

_TOLD_BY_UMT5 = ("matrix_game3", "hy_worldplay_wan")


@dataclass(frozen=True)
class Bench:
    """Measure speed and memory. `compare` measures what an acceleration costs in quality."""

    benchmark: Positional[Literal["rollout", "walk", "plan"]]
    """What to measure: the interactive loop, or one walk out and back, played wholly in each way. `plan` records what
    a temporal window decides on that walk."""
    model: ModelName
    """Name of the model; also `--model NAME`."""
    chunks: int = 16
    """Chunks measured for each acceleration."""
    warmup: int = 3
    """Chunks played before, not counted; 3 fill the context."""
    accelerations: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ("off", "steps-4", "steps-2")
    """Presets or .toml files, measured in turn in one run; for a walk also with weights in 8 bits ("off+float8"), and
    `upstream`, the original's structure, and of matrix_game3 `upstream-bf16`, that without projections in float32."""
    plan: OptionalPath = None
    """For a walk: file of recorded windows, replayed in place of what settings would decide from frames."""
    ahead: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ()
    """For a walk: ways that are then played with each chunk begun before the frames of the one before are waited for;
    results are the same bits."""
    encoder: bool = False
    """For a rollout of a model whose text umT5 encodes: hold that encoder on the device meanwhile, at full size with
    random weights, so that peak memory counts it; needs transformers."""
    gigabytes: Annotated[float | None, arg(metavar="GB")] = None
    """Most memory of a GPU, in 10^9 bytes, that all of this may take, as on a smaller one; what does not fit fails."""
    threads: OptionalInt = None
    """CPU threads; without it torch's own choice."""
    out: OptionalPath = None
    """JSON file for all numbers."""
    engine: Annotated[EngineOptions, arg(name="")] = field(default_factory=EngineOptions)

    def run(self, command: str) -> int:
        """Measure, print, and write."""
        settings = [resolve(name) for name in self.accelerations if self.benchmark != "walk"]
        if self.benchmark == "plan" and (len(settings) != 1 or self.out is None):
            raise InputError(f"a plan is recorded of one setting into --out, got {len(settings)} and {self.out}")
        if self.ahead and self.benchmark != "walk":
            raise InputError(f"--ahead is for a walk; bench {self.benchmark} steps chunk by chunk")
        if self.encoder and (self.benchmark != "rollout" or self.model not in _TOLD_BY_UMT5):
            names = " and ".join(_TOLD_BY_UMT5)
            raise InputError(f"--encoder is for a rollout of {names}, not for bench {self.benchmark} {self.model}")
        plan = None if self.plan is None else read_plan(self.plan)
        if self.threads is not None and self.threads < 1:
            raise InputError(f"--threads must be at least 1, got {self.threads}")
        if self.gigabytes is not None:
            _bound(pick_device(self.engine.device), self.gigabytes)
        before = torch.get_num_threads()
        try:
            if self.threads is not None:
                torch.set_num_threads(self.threads)
            if self.benchmark == "plan":
                result = self._record(settings[0], command)
            else:
                result = self._walk(command, plan) if self.benchmark == "walk" else self._measure(settings, command)
        finally:
            torch.set_num_threads(before)
        {"walk": _print_walk, "plan": _print_plan, "rollout": _print}[self.benchmark](result)
        if self.out is not None:
            write_json(self.out, result)
            print(f"\nall numbers: {self.out}")
        return 0

    def _measure(self, settings: list[Any], command: str) -> dict[str, Any]:
        engine = self.engine.load(self.model)
        held = umt5.drawn_encoder(engine.device, getattr(torch, engine.source.dtype)) if self.encoder else None
        with tqdm(total=(self.warmup + self.chunks) * len(settings), unit="chunk", desc=self.model) as bar:
            rows = measure(engine, settings, self.chunks, self.warmup, advance=bar.update)
        return {
            "format": "worldstride-bench-rollout",
            **environment(engine.device, command),
            "engine": engine_facts(engine),
            "note": RANDOM_WEIGHTS_NOTE if engine.source.weights == "random" else "",
            "warmup": self.warmup,
            "gigabytes": self.gigabytes,
            "encoder_bytes": 0 if held is None else sum(map(bytes_of, held.parameters())),
            "rows": rows,
            "peak_memory_bytes": peak_memory(),
            "first_frame_seconds": time_to_first_frame(engine, self.engine.dtype, self.threads),
        }

    def _record(self, settings: Acceleration, command: str) -> dict[str, Any]:
        engine = self.engine.load(self.model)
        plan = record(engine, settings, out_and_back(self.chunks))
        return {
            "format": FORMAT, **environment(engine.device, command), "engine": engine_facts(engine),
            "settings": plan.settings, "acceleration": settings.to_json(), "shares": list(plan.shares),
        }  # fmt: skip

    def _walk(self, command: str, plan: Plan | None) -> dict[str, Any]:
        engine = self.engine.load(self.model)
        stepped, begun, rows = ways(engine, self.accelerations), ways(engine, self.ahead), list[dict[str, Any]]()
        chosen = [(way, False) for way in stepped] + [(way, True) for way in begun]
        result: dict[str, Any] = {
            "format": "worldstride-bench-walk", **environment(engine.device, command), "engine": engine_facts(engine),
            "note": RANDOM_WEIGHTS_NOTE if engine.source.weights == "random" else "", "warmup": self.warmup,
            "plan": None if plan is None else asdict(plan),
            "parameter_bytes": sum(map(bytes_of, _parameters(engine))), "rows": rows,
        }  # fmt: skip
        with tqdm(total=(self.warmup + self.chunks) * len(chosen), unit="chunk", desc=self.model) as bar:
            for way, ahead in chosen:
                rows.append(walked(way, self.chunks, self.warmup, plan, advance=bar.update, ahead=ahead))
                bar.write(f"{rows[-1]['name']}: {rows[-1]['seconds']['total']:.2f} s")
                if self.out is not None:  # what stops a long run must not take what is measured with it
                    write_json(self.out, result)
        return result


def _bound(device: torch.device, gigabytes: float) -> None:
    """Let this process take so much of a GPU's memory and no more; `InputError` on a CPU, and on more than there is."""
    if device.type != "cuda":
        raise InputError(f"--gigabytes bounds a GPU's memory, and this runs on {device}")
    there = torch.cuda.get_device_properties(device).total_memory
    if not 0 < gigabytes * 1e9 <= there:
        raise InputError(f"--gigabytes must be above 0 and at most {there / 1e9:.1f}, got {gigabytes:g}")
    torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / there, device.index)  # takes no "cuda" without one


def _parameters(engine: Engine) -> list[torch.Tensor]:
    """All weights that the engine's model and decoder hold."""
    parts = (getattr(engine.model, "network", None), getattr(engine.model.decoder, "vae", None))
    return [p for part in parts if isinstance(part, torch.nn.Module) for p in part.parameters()]


def _print_plan(result: Mapping[str, Any]) -> None:
    print("window, share of the longest: " + " ".join(f"{share:.2f}" for share in result["shares"]))


def _print_walk(result: Mapping[str, Any]) -> None:
    headers = [
        "way",
        "total s",
        "x",
        "p50 s",
        "p95 s",
        "last s",
        *(f"{s} ms" for s in STAGES),
        "evals",
        "encoded",
        "GiB",
        "PFLOP",
        "TFLOP/s",
    ]
    first, rows = result["rows"][0]["seconds"]["total"], []
    for row in result["rows"]:
        total, chunk = row["seconds"]["total"], row["chunk_seconds"]
        times = [f"{row['stage_ms'][s]['p50']:.0f}" for s in STAGES]
        peak = "-" if row["gpu_peak_bytes"] is None else f"{row['gpu_peak_bytes'] / 2**30:.1f}"
        flops = ["-", "-"]
        if row["tflops"] is not None:
            flops = [f"{row['gigaflops_per_chunk'] * row['chunks'] / 1e6:.2f}", f"{row['tflops']:.0f}"]
        ends = [f"{row['evaluations_per_chunk']:.1f}", f"{row['encoded_latents']:.1f}", peak, *flops]
        whole = [f"{chunk[q]:.2f}" for q in ("p50", "p95", "last")]
        rows.append([row["name"], f"{total:.2f}", f"{first / total:.2f}", *whole, *times, *ends])
    print(table(headers, rows))
    print(f"\nweights {result['parameter_bytes'] / 2**30:.1f} GiB; stage times are medians over the walk's chunks")
    if any(row["ahead"] for row in result["rows"]):
        print("where chunks are begun ahead, stages overlap, and totals are wall time")
    if result["note"]:
        print(result["note"])


def _print(result: Mapping[str, Any]) -> None:
    costs = ["TFLOP", "TFLOP/s", "peak GiB"]
    headers = ["acceleration", "frames/s", *(f"{s} ms" for s in STAGES), "total p95", "context KiB", *costs]
    rows = []
    for row in result["rows"]:
        times = [f"{row['stage_ms'][s]['p50']:.1f}" for s in STAGES]
        last = [f"{row['stage_ms']['total']['p95']:.1f}", f"{row['context_bytes'] / 1024:.0f}"]
        told, peak = row["gigaflops_per_chunk"] is not None, row["gpu_peak_bytes"]
        cost = [f"{row['gigaflops_per_chunk'] / 1000:.4g}", f"{row['tflops']:.3g}"] if told else ["-", "-"]
        cost.append("-" if peak is None else f"{peak / 2**30:.1f}")
        rows.append([row["name"], f"{row['frames_per_second']:.1f}", *times, *last, *cost])
    print(table(headers, rows))
    print("\nevaluations, ms by solver step (- is reused):")
    for row in result["rows"]:
        print(f"  {row['name']}: {' '.join('-' if t is None else f'{t:.1f}' for t in row['evaluation_ms'])}")
    hardware = result["hardware"]
    where = f"{hardware.get('gpu', hardware['cpu'])}, {hardware['cpu_threads_used']} CPU threads"
    print(
        f"\n{where}, {result['engine']['dtype']}; times are medians; TFLOP a chunk and TFLOP/s of context and denoising"
    )
    first = result["first_frame_seconds"]
    print(f"time to first frame: {first['total']:.2f} s in a fresh process (import {first['import']:.2f} s)")
    if result["peak_memory_bytes"]:
        print(f"peak memory of this process: {result['peak_memory_bytes'] / 2**20:.0f} MiB")
    if result["note"]:
        print(result["note"])
