"""Settings of everything that may spend less than full compute: one tree, to TOML and back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import tomlkit
from tomlkit.exceptions import TOMLKitError

from worldstride.atomic import atomic_write
from worldstride.attention import Selection, Sparsity
from worldstride.context.kept import KeptContext
from worldstride.context.policy import PUBLISHED, PoseView, SpatialMemory, TemporalWindow
from worldstride.denoising.policy import AdaptiveSteps, StepCache
from worldstride.errors import InputError, did_you_mean, integer_from, number_in


@dataclass(frozen=True)
class AttentionReuse:
    """Attention to the context is computed once for several evaluations of a chunk, attention within it every time.

    FlashBlock (arXiv 2602.05305): the two parts are merged by their log-sum-exps.
    """

    evaluations: int = 2
    """Evaluations that share one attention to the context; 1 computes it every time."""

    def __post_init__(self) -> None:
        integer_from("acceleration.attention.evaluations", self.evaluations, 1)


@dataclass(frozen=True)
class FrozenContext:
    """Of a model whose evaluations hold context and new latents in one sequence: the context's keys and values are
    computed once for several evaluations of a chunk, whose later ones compute the new latents alone."""

    evaluations: int | None = None
    """Evaluations that share one computation of the context; None shares it among all of a chunk's."""

    def __post_init__(self) -> None:
        if self.evaluations is not None:
            integer_from("acceleration.frozen.evaluations", self.evaluations, 1)


@dataclass(frozen=True)
class Acceleration:
    """What to spend. Every lever at None means full compute: the model's plain loop, bit for bit."""

    name: str = "off"
    """Name for reports."""
    steps: int | None = None
    """Solver steps; fewer are faster and softer."""
    shift: float | None = None
    """Shift of the noise schedule; None takes what measured best for the number of steps."""
    solver: Literal["euler", "unipc"] | None = None
    """Solver in place of Euler; "unipc" (order 2) needs fewer steps for the same path. Other solvers stay."""
    window: int | None = None
    """Most recent latents to attend to, at most the model's own number."""
    memory: int | None = None
    """Retrieved latents to attend to, at most the model's own number; 0 forgets everything but window and sink."""
    merged: bool | None = None
    """Whether slots of memory that hold the same latent become one, of a model that fills slots: that which shows most
    of its view stays."""
    warmup: int = 0
    """First chunks of a world that are made at full compute."""
    pose: PoseView = field(default_factory=PoseView)
    """What cameras are taken to see; no lever by itself."""
    temporal: TemporalWindow | None = None
    """Let the window follow the scene's changes; `window` then bounds it."""
    spatial: SpatialMemory | None = None
    """Attend to retrieved memory on a revisit only; `memory` then bounds it."""
    kept: KeptContext | None = None
    """Keep keys and values of the context from chunk to chunk."""
    cache: StepCache | None = None
    """Reuse outputs of earlier steps on a revisit."""
    adaptive: AdaptiveSteps | None = None
    """Choose the number of steps by what is known of the coming views."""
    attention: AttentionReuse | None = None
    """Reuse attention to the context within a chunk."""
    frozen: FrozenContext | None = None
    """Compute the context once for several evaluations, of a model that has it in every one."""
    sparsity: Sparsity | None = None
    """Attend to some blocks of the context only."""

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("window", 1), ("memory", 0)):
            if getattr(self, name) is not None:
                integer_from(f"acceleration.{name}", getattr(self, name), least)
        integer_from("acceleration.warmup", self.warmup, 0)
        if self.merged is not None and not isinstance(self.merged, bool):
            raise InputError(f"acceleration.merged must be true or false, got {self.merged!r}")
        if self.shift is not None:
            number_in("acceleration.shift", self.shift, 0, 1e6, open_low=True)
        if self.steps is not None and self.adaptive is not None and self.adaptive.few >= self.steps:
            raise InputError(
                f"acceleration.adaptive.few must be below acceleration.steps, {self.steps}, got {self.adaptive.few}: "
                "it is the number of steps where less is needed"
            )
        if self.solver not in (None, "euler", "unipc"):
            raise InputError(f"acceleration.solver must be euler or unipc, got {self.solver!r}")
        if not isinstance(self.name, str) or not self.name:
            raise InputError(f"acceleration.name must be a text of at least one letter, got {self.name!r}")

    @property
    def looks(self) -> bool:
        """Whether some lever asks for scores from cameras."""
        asks = self.kept is not None and self.kept.anew is not None
        return asks or self.spatial is not None or self.cache is not None or self.adaptive is not None

    def to_json(self) -> dict[str, object]:
        """Plain values, for reports and saves."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: object, source: str = "acceleration") -> Acceleration:
        """Undo `to_json`; `InputError` names an unknown setting and the known ones."""
        return _from_json(cls, values, source)

    def to_toml(self) -> str:
        """Settings that are not None as TOML; `resolve` reads it."""
        return tomlkit.dumps(_given(self.to_json()))


_Settings = TypeVar("_Settings")
_BRANCHES: dict[str, type] = {
    "pose": PoseView, "temporal": TemporalWindow, "spatial": SpatialMemory, "kept": KeptContext, "cache": StepCache,
    "adaptive": AdaptiveSteps, "attention": AttentionReuse, "frozen": FrozenContext, "sparsity": Sparsity,
    "denoise": Selection, "context": Selection,
}  # fmt: skip
"""Settings that are settings themselves."""


def _from_json(kind: type[_Settings], values: object, source: str) -> _Settings:
    if not isinstance(values, dict):
        raise InputError(f"{source} must be a table of settings, got {type(values).__name__}")
    known = [f.name for f in fields(cast(Any, kind))]
    for key in values:
        if key not in known:
            hint = did_you_mean(key, known)
            raise InputError(f"{source}: unknown setting {key!r}{hint}; known: {', '.join(known)}")
    given = {k: v for k, v in values.items() if k in _BRANCHES and v is not None}
    return kind(**{**values, **{k: _from_json(_BRANCHES[k], v, f"{source}.{k}") for k, v in given.items()}})


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """Without what is None, which TOML cannot say; plain values before tables, as TOML wants them."""
    some = {k: _given(v) if isinstance(v, dict) else v for k, v in values.items() if v is not None}
    return dict(sorted(some.items(), key=lambda item: isinstance(item[1], dict)))


PRESETS: dict[str, Acceleration] = {
    "off": Acceleration(),
    "exact": Acceleration("exact"),
    "steps-4": Acceleration("steps-4", steps=4),
    "steps-2": Acceleration("steps-2", steps=2),
    "light-interaction": Acceleration(
        "light-interaction", window=4, warmup=3, pose=PoseView("ball"), spatial=PUBLISHED, cache=StepCache()
    ),
    "balanced": Acceleration(
        "balanced", steps=5, shift=2.0, solver="unipc",
        adaptive=AdaptiveSteps(3, shift=2.0, threshold=0.98, change=0.05),
    ),
    "fast": Acceleration(
        "fast", steps=5, shift=2.0, solver="unipc", kept=KeptContext(),
        adaptive=AdaptiveSteps(3, shift=2.0, threshold=0.98, change=0.05),
    ),
}  # fmt: skip
"""Named settings. "off" is full compute. "exact" takes levers that change nothing but rounding; what is exact in the
courtyard is always on, so there it is full compute too. "light-interaction" is the published method as published for
HY-WorldPlay (arXiv 2605.31158), save that similarity is taken between the chunk's first and last camera and all latents
of a clip, in the model's own field of view (the authors': four and two latents, 60 x 35 degrees). "balanced" and "fast"
were chosen by measurement on the courtyard; for other models they carry the same levers over, and their quality there
is unmeasured."""


def resolve(value: Acceleration | str | Path) -> Acceleration:
    """Settings from themselves, a preset's name, or a TOML file of settings."""
    if isinstance(value, Acceleration):
        return value
    if str(value) in PRESETS:
        return PRESETS[str(value)]
    if not isinstance(value, (str, Path)):
        raise InputError(f"an acceleration is settings, a preset's name or a .toml file, got {type(value).__name__}")
    path = Path(value)
    if path.suffix != ".toml":
        hint = did_you_mean(value, list(PRESETS))
        raise InputError(
            f"unknown acceleration {str(value)!r}{hint}; presets: {', '.join(PRESETS)}, or a .toml file of settings"
        )
    try:
        values = tomlkit.parse(path.read_text(encoding="utf-8")).unwrap()
    except (OSError, UnicodeDecodeError, TOMLKitError) as error:
        raise InputError(f"cannot read acceleration settings from {path}: {error}") from error
    settings = Acceleration.from_json(values, str(path))
    return settings if "name" in values else Acceleration.from_json({**values, "name": path.stem})


def save_settings(settings: Acceleration, path: str | Path, comment: str = "") -> None:
    """Write settings as TOML, atomically; lines of `comment` stand above them."""
    lines = "".join(f"# {line}\n" for line in comment.splitlines())
    with atomic_write(Path(path)) as temporary:
        temporary.write_text(lines + settings.to_toml(), encoding="utf-8")
