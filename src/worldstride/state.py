"""What a world is between two chunks, and what a chunk makes of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from worldstride.context.history import History, Shown
from worldstride.context.kept import KeptLatents
from worldstride.context.planning import observe_change
from worldstride.context.policy import PolicyState
from worldstride.report import ChunkReport

if TYPE_CHECKING:
    from worldstride.made import Left, Made


@dataclass(frozen=True, eq=False)
class Chunk:
    """What one step of a session gives."""

    frames: np.ndarray
    """uint8 [F, H, W, 3]"""
    cameras: np.ndarray
    """Camera-to-world matrices of the frames, float32 [F, 4, 4]."""
    report: ChunkReport


@dataclass
class SessionState:
    """Everything that makes a session this one and no other; `saving.py` writes it, `Session.fork` copies it."""

    noise_seed: int
    points: Tensor
    """Sample points of retrieval [P, 3]."""
    history: History
    camera: Tensor
    """Camera [4, 4] of the last frame."""
    chunk: int = 0
    """Number of the next chunk."""
    frame: int = 0
    """Number of the next frame."""
    decoder: dict[str, Tensor] = field(default_factory=dict)
    prompt: dict[str, Tensor] = field(default_factory=dict)
    intrinsics: Tensor | None = None
    """Normalised intrinsics [3, 3] of this world's cameras; None takes the model's own."""
    world: tuple[str, int] | None = None
    """Family and seed of the procedural world, where there is one."""
    policy: PolicyState = field(default_factory=PolicyState)
    """What accelerating policies remember from chunk to chunk."""
    kept: KeptLatents = field(default_factory=KeptLatents)
    """What is kept of encoded latents."""


def moved_on(left: Left) -> SessionState:
    """The state after a chunk, from what the chunk leaves; its history is still to be settled."""
    p = left.pending
    state, shape, settings = p.state, p.shape, p.settings
    history = state.history.fork()
    numbers = [history.entries[i].index for i in p.context.rows]
    shown = [Shown(p.cameras[frames], p.actions[frames]) for frames in shape.shown]
    history.append(left.latents, p.cameras[list(shape.latent_frames)], p.led, settle=False, shown=shown)
    policy, kept = p.policy, state.kept
    if settings.temporal is not None:
        policy = observe_change(history, shape, settings.temporal.weight, policy)
    if settings.kept is not None and left.kept:
        whole = p.absent is not None and len(p.absent) == len(numbers)
        kept = kept.used(settings.kept, numbers, left.kept, whole)
    return replace(
        state, history=history, decoder=left.decoder, camera=p.cameras[-1].clone(), chunk=state.chunk + 1,
        frame=state.frame + shape.frames, intrinsics=p.own_intrinsics, policy=policy, kept=kept,
    )  # fmt: skip


def shown(made: Made, after: SessionState, total: float | None = None) -> Chunk:
    """What a chunk shows and reports, with the state after it; `total` seconds, or the sum of its stages."""
    p = made.left.pending
    encoded = len(p.context.rows) if p.absent is None else len(p.absent)
    seconds = {**made.seconds, "total": sum(made.seconds.values()) if total is None else total}
    report = ChunkReport(
        p.state.chunk, p.state.frame, p.shape.frames, p.settings.name, p.signals, p.context, made.context_latents,
        encoded, made.context_bytes, made.plan.sampler.steps, made.plan.sampler.solver, made.plan.reason,
        made.evaluations, made.acted(), made.flops(), seconds, made.batch, len(after.history), after.history.bytes,
        after.kept.bytes, made.sparsity,
    )  # fmt: skip
    return Chunk(made.frames, p.cameras.numpy().copy(), report)
