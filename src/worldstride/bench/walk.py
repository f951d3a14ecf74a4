"""One walk, out and back, played in several ways by one model in one run: half of it explores, half revisits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from worldstride.acceleration import Acceleration, resolve
from worldstride.bench.plan import Plan
from worldstride.bench.results import quantile
from worldstride.bench.rollout import summary
from worldstride.bench.structure_hy_worldplay import UpstreamWorldPlay
from worldstride.bench.structure_matrix_game3 import UpstreamMatrixGame3
from worldstride.control import Action
from worldstride.engine import Engine
from worldstride.errors import InputError
from worldstride.models.hy_worldplay.adapter import HYWorldPlay
from worldstride.models.matrix_game3.adapter import MatrixGame3
from worldstride.models.quantised import Scheme, named, parted
from worldstride.protocol import Compilable, Quantises, WorldModel
from worldstride.session import Session

_STRUCTURES: Mapping[tuple[str, type], Callable[[Any], WorldModel]] = {
    ("upstream", HYWorldPlay): UpstreamWorldPlay,
    ("upstream", MatrixGame3): partial(UpstreamMatrixGame3, wide=True),
    ("upstream-bf16", MatrixGame3): partial(UpstreamMatrixGame3, wide=False),
}
"""Ways that compute in the structure of a model's original code: "upstream" as it ships, "upstream-bf16" without its
projections in float32."""
_AHEAD, _BACK, _RIGHT, _LEFT = (Action(frozenset({key})) for key in ("KeyW", "KeyS", "ArrowRight", "ArrowLeft"))
_OUT = (_AHEAD, _RIGHT, _AHEAD, _RIGHT, _RIGHT)
"""What is repeated on the way out: ahead, and around corners."""
_UNDOES = {_AHEAD: _BACK, _RIGHT: _LEFT}


@dataclass(frozen=True)
class Way:
    """How the walk is played."""

    name: str
    start: Callable[[], Engine]
    """Makes the engine when the walk begins: what one way needs is not held while another is played."""
    acceleration: Acceleration


def ways(engine: Engine, names: Sequence[str]) -> list[Way]:
    """Ways by name: original structures, presets, or settings files, behind which may stand how weights are quantised
    ("off+float8"). `InputError` on others, and on what the engine's model cannot do."""
    found = list[Way]()
    for name in names:
        plain, scheme = parted(name)
        if name in {way for way, _ in _STRUCTURES}:
            found.append(Way(name, partial(_rebuilt, engine, _structure(engine.model, name)), resolve("off")))
            continue
        start, settings = (lambda: engine), resolve(plain)
        if scheme is not None:
            if not isinstance(engine.model, Quantises):
                raise InputError(f"{engine.model.name!r} cannot be quantised; leave out +{scheme} of {name!r}")
            start = partial(_quantised, engine, engine.model, scheme)
        found.append(Way(named(settings.name, scheme), start, settings))
    return found


def _structure(model: WorldModel, name: str) -> Callable[[Any], WorldModel]:
    """What rebuilds the model in a structure of its original code."""
    known = {way: build for (way, kind), build in _STRUCTURES.items() if isinstance(model, kind)}
    if name not in known:
        of = ", ".join(kind.__name__ for way, kind in _STRUCTURES if way == name)
        raise InputError(
            f"the way {name!r} is known of {of} alone, not of {model.name!r} ({type(model).__name__}), which has "
            f"{', '.join(known) or 'accelerations only'}"
        )
    return known[name]


def _rebuilt(engine: Engine, build: Callable[[Any], WorldModel]) -> Engine:
    if engine.source.quantised is not None:
        raise InputError(f"an original structure is rebuilt of whole weights, not of {engine.source.quantised} ones")
    source = replace(engine.source, compiled=False)
    return Engine(build(engine.model), source, resolve("off"), engine.controls, engine.attention)


def _quantised(engine: Engine, model: Quantises, scheme: Scheme) -> Engine:
    made, source = model.quantised(scheme), replace(engine.source, quantised=scheme)
    if source.compiled and isinstance(made, Compilable):
        made.compile_passes()
    return Engine(made, source, resolve("off"), engine.controls, engine.attention)


def out_and_back(chunks: int) -> list[Action]:
    """Actions of a walk, one a chunk: ahead and around corners, and the same way backwards."""
    out = [_OUT[i % len(_OUT)] for i in range(chunks - chunks // 2)]
    return out + [_UNDOES[action] for action in reversed(out)][: chunks // 2]


def walked(
    way: Way, chunks: int, warmup: int, plan: Plan | None = None, seed: int = 0,
    advance: Callable[[], object] = lambda: None, ahead: bool = False,
) -> dict[str, object]:  # fmt: skip
    """Play a whole walk of `chunks` chunks; `warmup` chunks of a walk of its own come first and do not count.

    Where `plan` is given it decides windows in place of a temporal one, for that looks at frames. With `ahead` chunks
    are begun before the frames of the one before are waited for: the sum of their totals is then the whole walk's wall
    time, while otherwise it leaves out what the host does between stages. "wall_seconds" is that time either way.

    Returns the row of a table: what `rollout.summary` says, every chunk's stages, quantiles of whole chunks, and a
    GPU's peak memory.
    """
    if chunks < 2 or warmup < 0:
        raise InputError(f"a walk needs at least 2 chunks and a warm-up of 0 or more, got {chunks} and {warmup}")
    engine, wall = way.start(), 0.0
    for count in (warmup, chunks):
        session, reports = engine.sample(seed), []
        if engine.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(engine.device)
        begun = time.perf_counter()
        for chunk in session.stream(_settled(session, way, out_and_back(count), plan), ahead):
            reports.append(chunk.report)
            advance()
        wall = time.perf_counter() - begun
    whole = [r.seconds["total"] for r in reports]
    made = summary(reports)
    gpu = engine.device.type == "cuda"
    return {
        "name": f"{way.name}, ahead" if ahead else way.name, "acceleration": way.acceleration.to_json(), **made,
        "ahead": ahead, "wall_seconds": wall,
        "chunk_seconds": {"p50": quantile(whole, 0.5), "p95": quantile(whole, 0.95), "last": whole[-1]},
        "gpu_peak_bytes": torch.cuda.max_memory_allocated(engine.device) if gpu else None,
        "each": [
            {
                "context_latents": r.context_latents, "encoded_latents": r.encoded_latents,
                "evaluations": sum(e.computed for e in r.evaluations), "seconds": r.seconds, "levers": r.levers,
                "context": r.context.reason, "denoising": r.steps_reason, "flops": sum(r.flops.values()) or None,
                "evaluation_seconds": [e.seconds for e in r.evaluations if e.computed],
            }
            for r in reports
        ],
    }  # fmt: skip


def _settled(session: Session, way: Way, actions: Sequence[Action], plan: Plan | None) -> Iterator[Action]:
    """The actions; as each is asked for, the session gets its chunk's settings."""
    for k, action in enumerate(actions):
        settings = way.acceleration
        session.acceleration = settings if plan is None else plan.settle(settings, k, session.engine.model.chunk(k))
        yield action
