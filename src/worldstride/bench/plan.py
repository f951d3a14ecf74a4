"""Window lengths recorded in one world and replayed in another: for speed of a model whose weights say nothing.

The temporal window follows what changes in the frames. Random weights make frames of noise, so what it decides there is
no measure of anything; what it decided on the same walk in a trained world is one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from worldstride.acceleration import Acceleration
from worldstride.context.selection import bounded
from worldstride.control import Action
from worldstride.engine import Engine
from worldstride.errors import InputError, number_in
from worldstride.protocol import ChunkShape

FORMAT = "worldstride-plan"


@dataclass(frozen=True)
class Plan:
    """What a temporal window decided, chunk after chunk."""

    shares: tuple[float, ...]
    """Length of each chunk's window as a share of the longest one, in [0, 1]."""
    settings: str
    """Name of the settings that decided."""

    def __post_init__(self) -> None:
        for i, share in enumerate(self.shares):
            number_in(f"share {i} of the plan", share, 0, 1)

    def settle(self, settings: Acceleration, chunk: int, shape: ChunkShape) -> Acceleration:
        """Settings of one chunk: the plan's window in place of their temporal one; without one, as they are."""
        if settings.temporal is None:
            return settings
        if chunk >= len(self.shares):
            raise InputError(f"the plan is of {len(self.shares)} chunks, and chunk {chunk} is to be played")
        longest = bounded(shape.window, settings.window)
        multiple = settings.temporal.multiple
        window = max(multiple, round(self.shares[chunk] * longest / multiple) * multiple)
        return replace(settings, temporal=None, window=min(window, longest))


def record(engine: Engine, settings: Acceleration, actions: Sequence[Action], seed: int = 0) -> Plan:
    """What the temporal window of `settings` decides on a walk of one action a chunk."""
    if settings.temporal is None:
        raise InputError(f"settings {settings.name!r} have no temporal window, so there is nothing to record")
    session, shares = engine.sample(seed), list[float]()
    session.acceleration = settings
    for chunk, action in enumerate(actions):
        held, longest = len(session.history), bounded(engine.model.chunk(chunk).window, settings.window)
        report = session.step(action).report
        whole = held <= longest and len(report.context.window) == held
        shares.append(1.0 if whole else len(report.context.window) / longest)
    return Plan(tuple(shares), settings.name)


def read_plan(path: Path) -> Plan:
    """A plan that `worldstride bench plan` wrote; `InputError` on anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the plan {path}: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("shares"), list):
        raise InputError(f'{path} is no plan: it must say "format": "{FORMAT}" and hold a list of shares')
    return Plan(tuple(found["shares"]), str(found.get("settings", "")))
