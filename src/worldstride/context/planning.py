"""What a chunk remembers, by policies from signals: for one world or for many at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from worldstride.context.dynamics import Dynamics, latent_change, window_length
from worldstride.context.gate import PoseScores
from worldstride.context.history import History
from worldstride.context.policy import PolicyState, SpatialMemory, TemporalWindow
from worldstride.context.selection import ContextPlan, Lookup, Signals, bounded, select, spans
from worldstride.context.similarity import View, added_share, clip_similarity, similarity, visible
from worldstride.protocol import ChunkShape

_AT_MOST = 50_000_000
"""Bytes that what cameras see may take for worlds that are scored together."""


@dataclass(frozen=True, eq=False)
class Wanted:
    """A chunk whose context is to be planned by policies."""

    lookup: Lookup
    """The chunk; its bounds on window and memory hold for the policies too."""
    state: PolicyState
    temporal: TemporalWindow | None = None
    spatial: SpatialMemory | None = None
    view: View | None = None
    """What scores from cameras are taken with; None where nobody asks for them."""


Planned = tuple[ContextPlan, Signals, PolicyState]
"""What a chunk remembers, from which signals, and the policies' next state."""


def plan_context(wanted: Wanted) -> Planned:
    """Plan one chunk; without policies this is `selection.select` alone, and the state is as it was."""
    return plan_contexts([wanted])[0]


def plan_contexts(wanted: Sequence[Wanted]) -> list[Planned]:
    """`plan_context` for several worlds: what comes from cameras is computed together where histories are as long."""
    windowed = [_windowed(w) for w in wanted]
    looking = [(i, w.view) for i, w in enumerate(wanted) if w.view is not None]
    scores = _scores([(windowed[i], view) for i, view in looking])
    found = {i: score for (i, _), score in zip(looking, scores, strict=True)}
    gated = [_gated(w, one, found.get(i)) for i, (w, one) in enumerate(zip(wanted, windowed, strict=True))]
    lookups = [replace(one, reason=one.reason or "full compute") for one, _ in gated]
    planned = list[Planned]()
    for i, (plan, signals) in enumerate(select(lookups)):
        dynamics = wanted[i].state.dynamics if wanted[i].temporal is not None else Dynamics()
        change = dynamics.changes[-1] if dynamics.changes else None
        signals = replace(signals, change=change, dynamics=dynamics.average, pose=found.get(i))
        planned.append((plan, signals, gated[i][1]))
    return planned


def _because(one: Lookup, reason: str, **changes: Any) -> Lookup:
    """The lookup with changes, and one reason more."""
    return replace(one, reason=f"{one.reason}; {reason}" if one.reason else reason, **changes)


def _windowed(wanted: Wanted) -> Lookup:
    """The lookup with the window that follows the scene's change."""
    one, temporal, dynamics = wanted.lookup, wanted.temporal, wanted.state.dynamics
    asked = [f"{name} {n}" for name, n in (("window", one.window), ("memory", one.memory)) if n is not None]
    one = replace(one, reason=f"{' and '.join(asked)} asked for" if asked else "")
    if temporal is None:
        return one
    longest = bounded(one.shape.window, one.window)
    window = window_length(dynamics, longest, temporal.scale, temporal.opposite, temporal.multiple)
    if window >= longest:
        return replace(one, window=window)
    less = f"window {window} of {longest}: change {dynamics.average:.3g}, median {dynamics.median:.3g}"
    return _because(one, less, window=window)


def _gated(wanted: Wanted, one: Lookup, scores: PoseScores | None) -> tuple[Lookup, PolicyState]:
    """The lookup, with less memory while exploring, and the next state."""
    spatial, state = wanted.spatial, wanted.state
    if spatial is None:
        return one, state
    scores = scores or PoseScores()
    revisiting = spatial.gate.decide(scores.of(spatial.score), scores.newest, state.revisiting)
    state = replace(state, revisiting=revisiting)
    if revisiting:
        return one, state
    whole = bounded(one.shape.memory, one.memory)
    memory, recall = min(whole, spatial.exploring), None if spatial.exploring < whole else one.recall
    seen = "nothing is old"
    if scores.old is not None:
        seen = (
            f"old views show {scores.old:.2f}, the newest {scores.newest:.2f}, and add {scores.added:.2f} to the recent"
        )
    kept = f"cut to {memory}" if memory else "dropped"
    return _because(one, f"exploring, memory {kept}: {seen}", memory=memory, recall=recall), state


def observe_change(history: History, shape: ChunkShape, weight: float, state: PolicyState) -> PolicyState:
    """The state after a chunk was finished: the change from the chunk before it is one more observation.

    Called when the chunk's frames have been fetched, so that reading the number does not wait for a GPU again.
    """
    rows = list(range(len(history) - 2 * shape.new, len(history)))
    if rows[0] < 0:
        return state
    newest = history.entries[-1].latent
    before, after = history.latents(rows, newest.device, tuple(newest.shape)).chunk(2)
    return replace(state, dynamics=state.dynamics.observe(float(latent_change(after, before)), weight))


def pose_scores(
    cameras: Tensor, shape: ChunkShape, coming: Tensor, view: View, window: int | None = None
) -> PoseScores:
    """What cameras tell of a chunk, in one batched call over the history's cameras [N, 4, 4], oldest first.

    Old are the cameras between sink and window; coming [F, 4, 4] is looked at by its first and last camera.
    """
    return _scored(cameras[None], shape, coming.cpu().float()[None, [0, -1]], view, window)[0]


def _scores(asked: Sequence[tuple[Lookup, View]]) -> list[PoseScores]:
    """`pose_scores` of several worlds; those with as many latents and an equal view share calls."""
    groups: dict[tuple[int, ChunkShape, int | None, int], list[int]] = {}
    views: list[View] = []
    for i, (one, view) in enumerate(asked):
        number = next((n for n, known in enumerate(views) if known.equals(view)), len(views))
        views += [view] * (number == len(views))
        groups.setdefault((len(one.history), one.shape, one.window, number), []).append(i)
    out: dict[int, PoseScores] = {}
    for (count, shape, window, number), every in groups.items():
        view = views[number]
        size = max(1, _AT_MOST // max(1, 2 * count * len(view.points)))
        for places in (every[i : i + size] for i in range(0, len(every), size)):
            cameras = torch.stack([asked[i][0].history.cameras() for i in places])
            ends = torch.stack([asked[i][0].coming.cpu().float()[[0, -1]] for i in places])
            out |= zip(places, _scored(cameras, shape, ends, view, window), strict=True)
    return [out[i] for i in range(len(asked))]


def _scored(cameras: Tensor, shape: ChunkShape, ends: Tensor, view: View, window: int | None) -> list[PoseScores]:
    """Scores of worlds with cameras [B, N, 4, 4] and coming ones ends [B, 2, 4, 4]."""
    batch, kept = len(cameras), cameras.shape[1] - shape.clean
    if not kept:
        return [PoseScores()] * batch
    first, recent = spans(kept, shape, window)
    # latents that the chunk goes on from are as near as the window: memory adds nothing to what they show
    seen = visible(ends, cameras[:, first:], view)  # [B, 2, N, P]
    past, near = seen.split([kept - recent - first, recent + shape.clean], 2)
    newest = similarity(seen[:, :, -shape.new :]).mean((1, 2)).tolist()
    known = seen.any(2).float().mean((1, 2)).tolist()
    clips = clip_similarity(similarity(past), shape.new)  # [B, clips]
    if not clips.shape[1]:
        return [PoseScores(None, n, None, k) for n, k in zip(newest, known, strict=True)]
    old, added = clips.amax(1).tolist(), added_share(past, near).tolist()
    return [PoseScores(*values) for values in zip(old, newest, added, known, strict=True)]
