"""Settings taken apart: each lever alone, one after another, and all but one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from worldstride.acceleration import Acceleration
from worldstride.errors import InputError

GROUPS: dict[str, tuple[str, ...]] = {
    "temporal": ("temporal", "window"),
    "spatial": ("spatial", "memory"),
    "incremental": ("kept",),
    "attention": ("attention",),
    "solver and steps": ("solver", "steps", "shift", "adaptive"),
    "cache": ("cache",),
}
"""Readable name -> settings that belong together, in the order in which levers are added."""
BOTH, CONTEXT = ("temporal", "spatial"), "context"
"""Both levers on the length of the context, and their name together; tried and left out as one, no step of its own."""


def ablation(settings: Acceleration, extra: Mapping[str, Acceleration] | None = None) -> list[Acceleration]:
    """The settings whole, and what their levers do alone ("only"), one after another ("+") and left out ("without").

    Warm-up and view of the cameras, no levers by themselves, go along always. Settings that another name already
    stands for are left out, as is what would be full compute.

    Args:
        settings: what to take apart.
        extra: name -> settings of levers that are to be tried alone besides.
    """
    present = [name for name, fields in GROUPS.items() if any(getattr(settings, f) is not None for f in fields)]
    if not present:
        raise InputError(f"{settings.name!r} is full compute, with no lever to take apart; name settings that have one")
    arms = [settings]
    for name in present:
        arms.append(_only(settings, f"only {name}", [name]))
        if name == BOTH[1] and BOTH[0] in present:
            arms.append(_only(settings, f"only {CONTEXT}", BOTH))
    arms += [replace(other, name=f"only {name}") for name, other in (extra or {}).items()]
    arms += [_only(settings, f"+ {name}", present[: i + 1]) for i, name in enumerate(present)]
    left_out: list[tuple[str, tuple[str, ...]]] = [(name, (name,)) for name in present]
    if set(BOTH) <= set(present):
        left_out.insert(present.index(BOTH[1]) + 1, (CONTEXT, BOTH))
    arms += [_only(settings, f"without {name}", [n for n in present if n not in out]) for name, out in left_out]
    return _different(arms, _only(settings, settings.name, []))


def _only(settings: Acceleration, name: str, groups: Iterable[str]) -> Acceleration:
    kept = {field: getattr(settings, field) for group in groups for field in GROUPS[group]}
    return Acceleration(name, warmup=settings.warmup, pose=settings.pose, **kept)


def _different(arms: Iterable[Acceleration], nothing: Acceleration) -> list[Acceleration]:
    """The first of all that do the same; `nothing` is without levers."""
    seen, names, out = {replace(nothing, name="off")}, set[str](), list[Acceleration]()
    for arm in arms:
        does = replace(arm, name="off")
        if does in seen:
            continue
        if arm.name in names:
            raise InputError(f"two ablations of different settings are called {arm.name!r}; rename the extra one")
        seen.add(does)
        names.add(arm.name)
        out.append(arm)
    return out
