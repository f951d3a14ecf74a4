"""Settings that meet a quality budget, found by measurement on the model's own worlds.

The search begins at full compute. In every round each lever is tried one notch further than it stands, all else
equal; of those that still lose no more than the budget the fastest is kept, until none is faster. Thresholds are no
constants but quantiles of what the model's own trajectories show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from worldstride.acceleration import Acceleration, AttentionReuse
from worldstride.bench.compare import SEEDS, growing, patch_of
from worldstride.bench.quality import Table, score, summarise
from worldstride.bench.rollout import Speed, summary
from worldstride.bench.trials import Arm, Mode, NoiseBank, Party
from worldstride.bench.walks import HeldOutWorld
from worldstride.context.kept import KeptContext
from worldstride.context.planning import pose_scores
from worldstride.context.policy import PoseView, SpatialMemory, TemporalWindow
from worldstride.denoising.policy import AdaptiveSteps
from worldstride.engine import Engine
from worldstride.errors import InputError, number_in
from worldstride.protocol import KeepsLatents, ReusesAttention

COUNTED = ("revisited", "recent", "novel")
"""Classes of pixels that must each stay within the budget."""
_SHIFT = 2.0  # of the schedules that a second-order solver is tried with

Change = Callable[[Acceleration], Acceleration]


@dataclass(frozen=True, eq=False)
class Seen:
    """Settings as they were measured."""

    settings: Acceleration
    quality: dict[str, dict[str, dict[str, float]]]
    """See `quality.summarise`."""
    speed: Speed
    speedup: float
    """Of the core (context and denoising) over full compute."""

    def loss(self, pixels: str) -> dict[str, float]:
        """Mean and interval for a class of pixels; NaN where no world has it."""
        return self.quality["loss"].get(pixels, {"mean": math.nan, "high": math.nan})

    @property
    def worst(self) -> float:
        """Upper end of the paired interval of the loss, in percent, of the class that loses most.

        NaN where a class occurs in too few worlds to tell.
        """
        ends = [loss["high"] for loss in map(self.loss, COUNTED) if not math.isnan(loss["mean"])]
        return math.nan if any(map(math.isnan, ends)) else max(ends, default=math.nan)

    def to_json(self) -> dict[str, object]:
        """Plain values; the keys are those of a comparison's rows."""
        return {
            "name": self.settings.name, "acceleration": self.settings.to_json(), "quality": self.quality,
            "speed": self.speed, "speedup": {"core": self.speedup}, "worst": self.worst,
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Calibration:
    """Everything that was measured, full compute first."""

    seen: tuple[Seen, ...]
    budget: float
    interrupted: bool = False

    @property
    def absent(self) -> tuple[str, ...]:
        """Classes of pixels that no world has: nothing is known of them, and no budget was kept there."""
        return tuple(c for c in COUNTED if self.seen and math.isnan(self.seen[0].loss(c)["mean"]))

    @property
    def chosen(self) -> Seen | None:
        """The fastest that meets the budget; None where nothing faster than full compute does."""
        fine = [s for s in self.seen[1:] if s.worst <= self.budget and s.speedup > 1]
        return max(fine, key=lambda s: s.speedup, default=None)

    @property
    def closest(self) -> Seen | None:
        """Of what is faster than full compute, the one that loses least."""
        faster = [s for s in self.seen[1:] if s.speedup > 1 and not math.isnan(s.worst)]
        return min(faster, key=lambda s: s.worst, default=None)


def notches(engine: Engine, worlds: Sequence[HeldOutWorld]) -> dict[str, list[Change]]:
    """What can be tried, lever by lever, each a list from cautious to bold; levers that a model lacks are left out."""
    model = engine.model
    shape, full = model.chunk(1), model.sampler()
    found: dict[str, list[Change]] = {}
    if full.solver == "euler" and full.guidance is None:
        fewer = [n for n in (6, 5, 4, 3, 2) if n < full.steps]
        found["steps"] = [lambda a, n=n: _stepped(a, n) for n in fewer]
    known, added = score_quantiles(engine, worlds)
    if full.steps > 3:
        found["adaptive"] = [
            lambda a, t=t, less=less: replace(
                a, adaptive=AdaptiveSteps(max(1, (a.steps or full.steps) - less), a.shift, threshold=t)
            )
            for t, less in ((known(0.75), 1), (known(0.5), 1), (known(0.5), 2))
        ]  # fmt: skip
    if shape.memory:
        tries = ((added(0.3), shape.memory // 2), (added(0.5), shape.memory // 2), (added(0.3), 0), (added(0.5), 0))
        found["spatial"] = [
            lambda a, t=t, n=n: replace(a, spatial=SpatialMemory(threshold=t, hysteresis=0.25 * t, exploring=n))
            for t, n in tries
        ]
    if shape.window > 1:
        half = max(1, shape.window // 2)
        found["temporal"] = [
            lambda a, s=s: replace(a, temporal=TemporalWindow(scale=s, multiple=half)) for s in (2.0, 1.0, 0.5)
        ]
    if isinstance(model, ReusesAttention):
        found["attention"] = [lambda a, n=n: replace(a, attention=AttentionReuse(n)) for n in (2, 4)]
    if isinstance(model, KeepsLatents):
        found["kept"] = [lambda a, n=n: replace(a, kept=KeptContext(refresh=n)) for n in (2, 4, None)]
    return found


def _stepped(settings: Acceleration, steps: int) -> Acceleration:
    """So many steps of the second-order solver, and fewer still where adaptive steps ask for few."""
    adaptive = settings.adaptive
    if adaptive is not None:
        adaptive = replace(adaptive, few=max(1, min(adaptive.few, steps - 1)), shift=_SHIFT)
    return replace(settings, steps=steps, shift=_SHIFT, solver="unipc", adaptive=adaptive)


def score_quantiles(
    engine: Engine, worlds: Sequence[HeldOutWorld]
) -> tuple[Callable[[float], float], Callable[[float], float]]:
    """Quantiles of what is known of coming views and of what memory adds to the window, over the worlds' chunks."""
    model = engine.model
    view, known, added = PoseView().look(model.intrinsics), list[float](), list[float]()
    for world in worlds:
        at, k = world.given, 0
        while at < len(world.frames):
            shape = model.chunk(k)
            scores = pose_scores(world.cameras[:at], shape, world.cameras[at : at + shape.frames], view)
            known.append(scores.known)
            added += [] if scores.added is None else [scores.added]
            at, k = at + shape.frames, k + 1

    def of(values: list[float]) -> Callable[[float], float]:
        ordered = sorted(values) or [0.0]
        return lambda share: round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)

    return of(known), of(added)


def calibrate(
    engine: Engine, worlds: Sequence[HeldOutWorld], chunks: int, budget: float, mode: Mode = "forced",
    trials: int = 30, advance: Callable[[Seen], object] = lambda _: None,
) -> Calibration:  # fmt: skip
    """Search for the fastest settings whose loss stays within `budget` percent for every class of pixels.

    At most `trials` settings are measured; `advance` is called after each. Ctrl-C ends the search with what was seen.
    """
    number_in("budget", budget, 0, 1000, open_low=True)
    if trials < 2:
        raise InputError(f"a calibration needs at least 2 trials, full compute and one more, got {trials}")
    if len(worlds) < 2:
        raise InputError(f"a calibration needs at least 2 worlds to tell a loss from chance, got {len(worlds)}")
    bench = _Bench(engine, worlds, chunks, mode)
    seen = list[Seen]()

    def measure(settings: Acceleration) -> Seen:
        one = bench.measure(settings)
        seen.append(one)
        advance(one)
        return one

    levers = notches(engine, worlds)
    stand, current = dict.fromkeys(levers, 0), Acceleration("full compute")
    tried = {replace(current, name="off")}
    try:
        best = measure(current)
        _check_classes(best)
        while len(seen) < trials:
            fine = list[tuple[Seen, str]]()
            for name, steps in levers.items():
                if stand[name] >= len(steps) or len(seen) >= trials:
                    continue
                settings = steps[stand[name]](best.settings)
                while (key := replace(settings, name="off")) in tried and stand[name] + 1 < len(steps):
                    stand[name] += 1  # quantiles may well be equal
                    settings = steps[stand[name]](best.settings)
                if key in tried:
                    continue
                tried.add(key)
                one = measure(replace(settings, name=_named(settings)))
                if one.worst <= budget and one.speedup > best.speedup:
                    fine.append((one, name))
            if not fine:
                break
            best, lever = max(fine, key=lambda pair: pair[0].speedup)
            stand[lever] += 1
    except KeyboardInterrupt:
        if not seen:
            raise
        return Calibration(tuple(seen), budget, interrupted=True)
    return Calibration(tuple(seen), budget)


def _check_classes(full: Seen) -> None:
    """Every class must occur in two worlds at least, or no setting could show that it keeps the budget there."""
    for name in COUNTED:
        loss = full.loss(name)
        if math.isnan(loss["high"]) and not math.isnan(loss["mean"]):
            raise InputError(
                f"only one of the worlds has {name} pixels, too few to tell a loss from chance; give more worlds, "
                "longer walks or walks of another kind"
            )


class _Bench:
    """Measures settings against full compute in the same worlds with the same noise.

    Settings are measured minutes apart, and machines change their pace meanwhile. Full compute in one world keeps step
    with all of them, and speeds are told against it.
    """

    def __init__(self, engine: Engine, worlds: Sequence[HeldOutWorld], chunks: int, mode: Mode) -> None:
        self._engine, self._worlds, self._chunks = engine, worlds, chunks
        self._mode: Mode = mode
        self._noise, self._full = NoiseBank(), list[Table]()
        self._paces = 0.0
        self._growing = min(chunks, growing(engine))

    def measure(self, settings: Acceleration) -> Seen:
        engine, worlds = self._engine, self._worlds
        limit = 1 if engine.device.type == "cpu" else None

        def playing() -> Party:
            return Party(engine, worlds, Arm(settings), self._mode, SEEDS, limit, self._noise)

        def setting_pace() -> Party:
            return Party(engine, worlds[:1], Arm(Acceleration()), self._mode, SEEDS[:1], limit, self._noise)

        warming = [playing() if limit is None else Party(engine, worlds[:1], Arm(settings), self._mode, SEEDS, limit)]
        for warm in warming if self._full else [setting_pace(), *warming]:
            for _ in range(self._growing):  # every size of the context costs once
                warm.step()
        party, pacemaker = playing(), setting_pace()
        for _ in range(self._chunks):
            party.step()
            pacemaker.step()
        frames, patch = party.frames, patch_of(engine)
        tables = [score(frames[:, i], None, w, patch, engine.device) for i, w in enumerate(worlds)]
        speed, pace = (summary([r for session in p.reports for r in session]) for p in (party, pacemaker))
        paces = speed["seconds"]["core"] / max(pace["seconds"]["core"], 1e-12)
        if not self._full:
            self._full, self._paces = tables, paces
        return Seen(settings, summarise(tables, self._full), speed, self._paces / max(paces, 1e-12))


def _named(settings: Acceleration) -> str:
    """A short name that says what the settings do."""
    words = []
    if settings.steps is not None:
        words.append(f"{settings.steps} steps")
    if settings.adaptive is not None:
        words.append(f"{settings.adaptive.few} where {settings.adaptive.threshold:.2f} known")
    if settings.spatial is not None:
        words.append(f"memory {settings.spatial.exploring} below {settings.spatial.threshold:.2f}")
    if settings.temporal is not None:
        words.append(f"window x {settings.temporal.scale:g}")
    if settings.attention is not None:
        words.append(f"attention {settings.attention.evaluations}")
    if settings.kept is not None:
        words.append("kept" if settings.kept.refresh is None else f"kept {settings.kept.refresh}")
    return ", ".join(words)
