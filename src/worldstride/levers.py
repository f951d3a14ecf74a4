"""What every lever that was asked for did in a run: how often it fired, and why not where it did not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from worldstride.acceleration import Acceleration
from worldstride.context.gate import Score
from worldstride.context.selection import bounded
from worldstride.protocol import ChunkShape
from worldstride.report import ChunkReport, densities

LEVERS = (
    "steps", "solver", "window", "memory", "temporal", "spatial", "kept", "cache", "adaptive", "merged", "attention",
    "frozen", "sparsity",
)  # fmt: skip
"""Fields of `Acceleration` that save something."""


@dataclass(frozen=True)
class Lever:
    """One lever over a run."""

    name: str
    fired: int
    """Chunks in which it saved something."""
    chunks: int
    """Chunks that were made."""
    note: str
    """What it saved, or why it did not."""

    def __str__(self) -> str:
        return f"{self.name}: fired in {self.fired} of {self.chunks} chunks; {self.note}"

    def to_json(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


def levers(settings: Acceleration, shape: ChunkShape, reports: Sequence[ChunkReport]) -> list[Lever]:
    """Every lever that `settings` ask for, over the chunks of a run of a model whose chunks are of `shape`."""
    found = []
    for name in LEVERS:
        asked = getattr(settings, name)
        if asked is None or asked is False:
            continue
        fired = sum(name in r.levers for r in reports)
        note = _saved(name, shape, reports) if fired else _why_not(name, settings, shape, reports)
        found.append(Lever(name, fired, len(reports), note))
    return found


def _saved(name: str, shape: ChunkShape, reports: Sequence[ChunkReport]) -> str:
    count = max(len(reports), 1)

    def mean(value: Callable[[ChunkReport], float]) -> str:
        return f"{sum(map(value, reports)) / count:.1f}"

    return {
        "steps": f"{mean(lambda r: sum(e.computed for e in r.evaluations))} evaluations a chunk",
        "solver": "in place of Euler",
        "window": f"{mean(lambda r: len(r.context.window))} of {shape.window} recent latents a chunk",
        "memory": f"{mean(lambda r: len(r.context.memory))} of {shape.memory} retrieved latents a chunk",
        "temporal": f"{mean(lambda r: len(r.context.window))} of {shape.window} recent latents a chunk",
        "spatial": f"{mean(lambda r: len(r.context.memory))} of {shape.memory} retrieved latents a chunk",
        "kept": f"{mean(lambda r: r.encoded_latents)} of {mean(lambda r: r.context_latents)} context latents encoded",
        "cache": f"{mean(lambda r: sum(not e.computed for e in r.evaluations))} outputs reused a chunk",
        "adaptive": f"{mean(lambda r: sum(e.computed for e in r.evaluations))} evaluations a chunk",
        "attention": f"{mean(lambda r: sum(e.computed and not e.attended for e in r.evaluations))} evaluations a chunk "
        "reused attention to the context",
        "merged": f"{mean(lambda r: len(r.context.memory))} of {mean(lambda r: r.context.filled)} slots a chunk",
        "frozen": f"{mean(lambda r: sum(e.computed and not e.attended for e in r.evaluations))} evaluations a chunk "
        "computed the new latents alone",
        "sparsity": _sparsity(reports),
    }[name]


def _sparsity(reports: Sequence[ChunkReport]) -> str:
    words = [f"{share:.3f} ({kind})" for kind, share in sorted(densities(reports).items())]
    notes = dict.fromkeys(r.sparsity.note for r in reports if r.sparsity is not None and r.sparsity.note)
    return "; ".join([f"mean density {', '.join(words)}", *notes])


def _why_not(name: str, settings: Acceleration, shape: ChunkShape, reports: Sequence[ChunkReport]) -> str:
    if not reports:
        return "no chunk was made"
    if all(r.index < settings.warmup for r in reports):
        return f"the first {settings.warmup} chunks are made at full compute"
    late = [r for r in reports if r.index >= settings.warmup]
    if name in ("spatial", "memory") and not any(r.signals.candidates for r in late):
        return "nothing was old enough to be retrieved"
    if name == "spatial" and settings.spatial is not None:
        whole = bounded(shape.memory, settings.memory)
        if settings.spatial.exploring >= whole:
            return f"{settings.spatial.exploring} latents while exploring are no fewer than {whole}"
        low = settings.spatial.threshold - settings.spatial.hysteresis
        return f"{_range(late, settings.spatial.score)} never fell below {low:g}"
    if name == "cache" and settings.cache is not None:
        if all(settings.cache.computed(len(r.evaluations)) is None for r in late):
            return f"{len(late[0].evaluations)} steps leave none between the first and the last that are computed"
        return f"{_range(late, settings.cache.score)} never reached {settings.cache.threshold:g} with its margin"
    if name == "adaptive" and settings.adaptive is not None:
        if settings.adaptive.few >= min(r.steps for r in late):
            return f"{settings.adaptive.few} steps where known are no fewer than elsewhere"
        return f"{_range(late, settings.adaptive.score)} never reached {settings.adaptive.threshold:g}"
    if name == "temporal":
        known = [r.signals.dynamics for r in late if r.signals.dynamics is not None]
        return (
            f"smoothed change {min(known):.3g} to {max(known):.3g} never asked for less" if known else "no change known"
        )
    if name in ("window", "memory", "steps"):
        return "full compute is no more than was asked for"
    if name == "solver":
        return "the model brings its own solver"
    if name == "merged":
        return "no latent was in two slots" if any(r.context.slots for r in late) else "the model fills no slots"
    if name == "sparsity":
        known = [r.sparsity for r in late if r.sparsity is not None]
        decisions = [d for r in known for d in r.decisions.values()]
        if any(way != "dense" for r in known for way in r.calls):
            return "every block was chosen"
        if decisions:
            return f"every attention was dense: {decisions[0].reason}"
        asked = "no attention was asked to be sparse: all layers are dense_layers, or there was no context"
        return asked if known else "the model attends to no blocks"
    if name == "kept":
        anew = "every context was encoded anew"
        least = None if settings.kept is None else settings.kept.anew
        keeps = settings.kept is None or not settings.kept.incremental or any(r.kept_bytes for r in reports)
        if keeps and least is not None:
            return f"{anew}: {_range(late, 'added')} against {least:g}"
        return anew if keeps else f"{anew}: the model keeps no latents"
    asked = settings.attention if name == "attention" else settings.frozen
    if asked is not None and asked.evaluations == 1:
        return "every evaluation computes its own"
    return "no evaluation could reuse it: the model shares none, is guided, or takes one evaluation a chunk"


def _range(reports: Sequence[ChunkReport], score: Score) -> str:
    values = [v for r in reports if r.signals.pose is not None and (v := r.signals.pose.of(score)) is not None]
    return f"score {score!r} from {min(values):.2f} to {max(values):.2f}" if values else f"score {score!r}, unknown,"
