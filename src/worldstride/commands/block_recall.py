"""`worldstride block-recall`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from tqdm import tqdm
from tyro.conf import arg

from worldstride.attention import boxes
from worldstride.attention.layout import Style
from worldstride.bench.attention_cases import CASES
from worldstride.bench.block_recall import RULES, Recorder, Sample, averaged, recalls, structured_sample
from worldstride.bench.environment import engine_facts, environment
from worldstride.bench.results import write_json
from worldstride.bench.walks import FIRST_SEED, held_out_world
from worldstride.commands.options import EngineOptions, ModelName, OptionalPath
from worldstride.commands.table import table
from worldstride.engine import Engine
from worldstride.errors import InputError, integer_from, number_in
from worldstride.protocol import AttendsSparsely


@dataclass(frozen=True)
class BlockRecall:
    """Measure how much of exact attention each rule of block selection finds, on a model and on structured data."""

    model: ModelName = "courtyard"
    """Name of the model whose activations are taken."""
    worlds: int = 4
    """Worlds that are walked."""
    chunks: int = 8
    """Chunks of each; activations are taken from the last."""
    tiles: Annotated[tuple[str, ...], arg(metavar="TxHxW ...")] = ("1x4x4", "1x8x4", "2x4x4", "4x4x4", "4x8x4")
    """Blocks of the model's tokens: latents x rows x columns."""
    keeps: Annotated[tuple[float, ...], arg(metavar="SHARE ...")] = (0.1, 0.175, 0.25, 0.5)
    """Shares of the context's blocks that are kept."""
    shares: Annotated[tuple[float, ...], arg(metavar="SHARE ...")] = (0.8, 0.9, 0.95)
    """Shares of attention that are asked for."""
    layout: Style = "boxes"
    """How blocks lie on the model's tokens."""
    synthetic: bool = True
    """Measure on structured data of HY-WorldPlay's shape, too."""
    out: OptionalPath = None
    """JSON file for all numbers."""
    engine: Annotated[EngineOptions, arg(name="")] = field(default_factory=EngineOptions)

    def run(self, command: str) -> int:
        """Measure, print, and write."""
        integer_from("--worlds", self.worlds, 1)
        integer_from("--chunks", self.chunks, 1)
        tiles = [_tile(text) for text in self.tiles]
        for name, shares in (("--keeps", self.keeps), ("--shares", self.shares)):
            for share in shares:
                number_in(name, share, 0, 1)
        engine, rows = self.engine.load(self.model), list[dict[str, Any]]()
        with torch.inference_mode():
            samples = list(tqdm(self._samples(engine), desc="activations", unit="attention"))
            for sample in tqdm(samples, desc="recall", unit="attention"):
                for tile in tiles:
                    rows += recalls(sample, tile, self.layout, self.keeps, self.shares, RULES)
            if self.synthetic:
                sample = structured_sample(CASES[0], 4, engine.device)
                for style in ("boxes", "serpentine"):
                    rows += recalls(sample, (4, 8, 4), style, self.keeps, self.shares, RULES)
        by = ("kind", "tile", "layout", "rule", "keep", "mass")
        for r in rows:
            r["kind"] = "structured" if r["sample"].startswith("structured") else self.model
        mean = averaged(rows, by)
        _print(mean)
        if self.out is not None:
            middle = sorted(self.keeps)[len(self.keeps) // 2]
            layers = averaged(
                [r for r in rows if r["kind"] == self.model and r.get("keep") == middle], ("layer", *by[1:])
            )
            where = environment(engine.device, command)
            result = {"format": "worldstride-recall", **where, "engine": engine_facts(engine), "rows": mean}
            write_json(self.out, {**result, "layers": layers})
            print(f"\nall numbers: {self.out}")
        return 0

    def _samples(self, engine: Engine) -> Iterator[Sample]:
        """Attention of every layer at the first, a middle and the last evaluation of each world's last chunk."""
        model = engine.model
        if not isinstance(model, AttendsSparsely):
            raise InputError(f"the model {model.name!r} does not say how its tokens lie; it attends to no blocks")
        recorder = Recorder()
        watched = Engine(model, engine.source, engine.acceleration, engine.controls, recorder)  # type: ignore[arg-type]
        shapes = [model.chunk(k) for k in range(self.chunks)]
        given, counts, size = shapes[0].window, [s.frames for s in shapes], engine.frame_size[0]
        for world in range(self.worlds):
            walk = held_out_world(
                "courtyard", FIRST_SEED + world, "out and back", given, counts, [s.window for s in shapes], size
            )
            session = watched.open(walk.frames[:given], walk.cameras[:given], seed=walk.seed)
            *before, last = walk.cameras[given:].split(counts)
            for cameras in before:
                session.step(cameras=cameras)
            recorder.seen.clear()
            chunk = session.step(cameras=last)
            plan, evaluations = chunk.report.context, len(chunk.report.evaluations)
            layers = len(recorder.seen) // evaluations
            segments = (len(plan.sink), len(plan.memory), len(plan.window))
            for e in sorted({0, evaluations // 2, evaluations - 1}):
                for layer in range(layers):
                    q, k = recorder.seen[e * layers + layer]
                    frames = q.shape[2] // (model.token_grid[0] * model.token_grid[1])
                    name = f"world {world}, evaluation {e}"
                    yield Sample(name, layer, q, k, (frames, *model.token_grid), segments)


def _tile(text: str) -> tuple[int, int, int]:
    parts = text.split("x")
    if len(parts) != 3 or not all(p.isascii() and p.isdigit() for p in parts):
        raise InputError(f"a tile is latents x rows x columns, such as 4x8x4, got {text!r}")
    tile = int(parts[0]), int(parts[1]), int(parts[2])
    boxes((1, 1, 1), tile)  # says what is wrong with it, before anything is walked
    return tile


def _print(rows: Sequence[dict[str, Any]]) -> None:
    lines = []
    for r in rows:
        asked = f"keep {r['keep']:g}" if r.get("keep") is not None else f"mass {r['mass']:g}"
        tile = "x".join(map(str, r["tile"]))
        figures = [f"{r[n]:.3f}" for n in ("kept", "density", "context_recall", "recall")]
        lines.append([r["kind"], tile, r["layout"], asked, r["rule"], *figures])
    lines.sort(key=lambda line: line[:4])
    print(table(["data", "tile", "layout", "asked", "rule", "kept", "density", "of the context", "recall"], lines))
