"""A session is one live world: everything that it knows is in one object that the caller owns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from worldstride.acceleration import Acceleration, resolve
from worldstride.camera import check_cameras
from worldstride.context.history import History
from worldstride.context.planning import Planned, Wanted, plan_contexts
from worldstride.context.selection import Lookup
from worldstride.context.similarity import View
from worldstride.control import Action, actions_per_frame
from worldstride.denoising.policy import plan_denoising
from worldstride.denoising.stopwatch import Stopwatch
from worldstride.errors import InputError, integer_from
from worldstride.playing import Per
from worldstride.protocol import (
    ChunkShape,
    EncodesPrompt,
    FillsSlots,
    FreezesContext,
    KeepsLatents,
    LabelsMotion,
    Led,
    Navigator,
    Recalls,
    WorldModel,
)
from worldstride.state import Chunk, SessionState, moved_on, shown
from worldstride.stepping import Made, Pending, carry_out, grouped
from worldstride.trajectory import Trajectory
from worldstride.wishes import Wish, acting, along

if TYPE_CHECKING:
    from worldstride.engine import Engine


_ALL = 1_000_000  # more evaluations than any chunk has


class Session:
    """One world, stepped chunk by chunk. Made by `Engine.new`, `Engine.open` or `worldstride.open`."""

    def __init__(
        self, engine: Engine, state: SessionState, navigator: Navigator, acceleration: Acceleration | str | Path
    ) -> None:
        self.engine, self._state, self._navigator = engine, state, navigator
        self._acceleration = resolve(acceleration)
        self._views: dict[object, View] = {}  # made of settings and intrinsics alone, so no part of the state
        self._encoded: Any = None  # likewise of the prompt alone

    @property
    def acceleration(self) -> Acceleration:
        """Settings in force; assign a preset's name, a TOML file or settings, and the next chunk follows them."""
        return self._acceleration

    @acceleration.setter
    def acceleration(self, value: Acceleration | str | Path) -> None:
        self._acceleration = resolve(value)

    @property
    def camera(self) -> np.ndarray:
        """Camera-to-world matrix [4, 4] of the last frame."""
        return self._state.camera.numpy().copy()

    @property
    def frame(self) -> int:
        """Number of frames that the world has so far."""
        return self._state.frame

    @property
    def history(self) -> History:
        """The bank of finished latents; read only."""
        return self._state.history

    def step(
        self,
        action: Action | Sequence[Action] | None = None,
        *,
        cameras: np.ndarray | Tensor | None = None,
        noise: Tensor | None = None,
        recall: Sequence[int] | None = None,
    ) -> Chunk:
        """Generate the next chunk.

        `action` is held for the whole chunk, or one action a frame is given; or `cameras` [F, 4, 4] say where the
        camera goes; neither means standing still. `noise` [clean + new, ...] replaces the session's own, `recall`
        names places in the history to bring back in place of those that retrieval finds (of a model that fills slots
        one for each, before slots are merged). Raises `InputError` on bad input, and then the session is as it was.
        """
        return self._step(action, cameras, noise, self._state.intrinsics, recall)

    @torch.inference_mode()
    def _step(
        self, action: Action | Sequence[Action] | None, cameras: np.ndarray | Tensor | None, noise: Tensor | None,
        own_intrinsics: Tensor | None, recall: Sequence[int] | None = None,
    ) -> Chunk:  # fmt: skip
        (made,) = carry_out(planned([self._ask(action, cameras, noise, own_intrinsics, recall)]))
        return self._finish(made)

    def _ask(
        self, action: Action | Sequence[Action] | None, cameras: np.ndarray | Tensor | None, noise: Tensor | None,
        own_intrinsics: Tensor | None, recall: Sequence[int] | None,
    ) -> _Asked:  # fmt: skip
        model, state, clock = self.engine.model, self._state, Stopwatch(torch.device("cpu"))
        shape = model.chunk(state.chunk)
        noise = None if noise is None else self._noise(shape, noise)
        frame_cameras, actions = self._where(action, cameras, shape.frames)
        intrinsics = model.intrinsics if own_intrinsics is None else own_intrinsics
        settings = in_force(self._acceleration, state.chunk)
        lookup = Lookup(
            state.history, shape, frame_cameras, state.points, intrinsics, settings.window, settings.memory,
            recall=recall, rule=model if isinstance(model, (Recalls, FillsSlots)) else None,
            merged=bool(settings.merged),
        )  # fmt: skip
        view = self._view(settings, intrinsics)
        wanted = Wanted(lookup, state.policy, settings.temporal, settings.spatial, view)
        clock.mark()
        return _Asked(self, state, settings, wanted, actions, noise, own_intrinsics, clock.seconds()[0])

    def _pend(self, asked: _Asked, planned: Planned, select: float) -> Pending:
        """The chunk that was asked for with the context that was planned for it, in `select` seconds."""
        model, state, settings, clock = self.engine.model, asked.state, asked.settings, Stopwatch(torch.device("cpu"))
        context, signals, policy = planned
        plan, caching, knowing = plan_denoising(
            model.sampler, settings.steps, settings.shift, settings.solver, settings.cache, settings.adaptive,
            _shared(settings, model, len(context.rows) + asked.wanted.lookup.shape.clean),
            signals.pose, policy.caching, policy.knowing, settings.name,
        )  # fmt: skip
        absent = None
        if settings.kept is not None and isinstance(model, KeepsLatents):
            added = signals.pose.added if signals.pose is not None and context.memory else None
            absent = state.kept.absent(settings.kept, state.history, context, added)
        clock.mark()
        seconds = {"control": asked.control, "select": select + clock.seconds()[0]}
        chunk = asked.wanted.lookup
        return Pending(
            self, state, settings, chunk.shape, chunk.coming, asked.actions, asked.own_intrinsics, signals, context,
            absent, plan, replace(policy, caching=caching, knowing=knowing), asked.noise, seconds, self._prompt(),
            self._led(chunk, asked.actions),
        )  # fmt: skip

    def _finish(self, made: Made) -> Chunk:
        state = moved_on(made.left)
        state.history.settle()
        chunk = shown(made, state)
        # one assignment: whatever interrupts a step, the session is the one before it or the one after it
        self._state = state
        return chunk

    def correct(self, frames: np.ndarray | Tensor) -> None:
        """Replace what the last chunk showed by frames uint8 [F, H, W, 3] that should have been seen there.

        The world goes on from them: a robot's own camera, or the truth that a model is measured against. What is
        remembered changes; a streaming decoder's state and the measured change of the scene stay as the chunk made
        them. Raises `InputError` where there is no last chunk or the frames do not fit it.
        """
        state, model = self._state, self.engine.model
        if not state.chunk:
            raise InputError("there is no chunk to correct yet; step first")
        if not isinstance(frames, (np.ndarray, Tensor)):
            raise InputError(f"frames must be an array or tensor uint8 [F, H, W, 3], got {type(frames).__name__}")
        shape = model.chunk(state.chunk - 1)
        pictures = torch.as_tensor(np.ascontiguousarray(frames) if isinstance(frames, np.ndarray) else frames)
        if len(pictures) != shape.frames:
            raise InputError(f"chunk {state.chunk - 1} has {shape.frames} frames, got {len(pictures)}")
        try:
            with torch.inference_mode():
                latents = model.decoder.encode(pictures[None])[0]
        except InputError as error:
            raise InputError(f"frames of chunk {state.chunk - 1} cannot be encoded apart: {error}") from error
        if len(latents) != shape.new:
            raise InputError(f"{len(pictures)} frames encode to {len(latents)} latents, the chunk has {shape.new}")
        self._state = replace(state, history=state.history.replaced(latents))

    def stream(self, actions: Iterable[Action | Sequence[Action] | None], ahead: bool = False) -> Iterator[Chunk]:
        """Step by each action in turn, as `step` takes it.

        With `ahead` the next action is asked for, and its chunk begun, before the frames of this one are waited for: a
        GPU decodes a chunk beside the making of the next. Chunks are the same, bit for bit. The price: an action is
        asked for one decoding earlier than by `step`, so `actions` cannot wait for what the chunk before it shows; a
        chunk comes when the next one's work is queued (on a CPU, where nothing is gained, done); a GPU holds a context
        while it decodes.

        Between chunks the session is the one after the chunk it gave last, to be saved, forked, corrected, stepped, or
        left for good; what was begun and no longer follows is made anew. What fails ahead fails when it is due.
        `actions` may set `acceleration` for the chunk it is asked for; `InputError` where it steps or corrects.
        """
        if not isinstance(actions, Iterable):
            raise InputError(f"stream takes actions one after the other, got {type(actions).__name__}; step takes one")
        return self._follow(acting(actions), ahead)

    def play(self, trajectory: Trajectory, per: Per = "frame", ahead: bool = False) -> Iterator[Chunk]:
        """Step along a trajectory; a last part shorter than a chunk is filled up by standing still.

        A trajectory's intrinsics become the session's with its first chunk; a model that was made for others raises
        `InputError`. Its entries are frames, or latents where a latent is several frames (as pose strings and files of
        HY-WorldPlay count): an action is then held that long, and cameras in between are on the way. `ahead` begins a
        chunk before the frames of the one before are waited for, see `stream`.
        """
        return self._follow(along(trajectory, per, self.engine.model, self._state.intrinsics), ahead)

    def _follow(self, wishes: Iterator[Wish], ahead: bool) -> Iterator[Chunk]:
        if ahead:
            from worldstride.streaming import made_ahead

            yield from made_ahead(self, wishes)
            return
        for wish in wishes:
            action, cameras, intrinsics = wish(self._state)
            yield self._step(action, cameras, None, intrinsics)

    def fork(self, noise_seed: int | None = None) -> Session:
        """An independent session that goes on from here; with another noise seed it dreams something else."""
        state = replace(self._state, history=self._state.history.fork(), decoder=dict(self._state.decoder))
        if noise_seed is not None:
            state.noise_seed = noise_seed
        other = Session(self.engine, state, self._navigator, self._acceleration)
        other._encoded = self._encoded
        return other

    def save(self, path: str | Path) -> None:
        """Write the session to one file, atomically; `worldstride.open` goes on from it bit for bit."""
        from worldstride.saving import save_session

        save_session(self.engine, self._state, self._navigator.settings, self._acceleration, path)

    def _where(
        self, action: Action | Sequence[Action] | None, cameras: np.ndarray | Tensor | None, frames: int
    ) -> tuple[Tensor, tuple[Action, ...]]:
        if cameras is None:
            actions, start = actions_per_frame(Action() if action is None else action, frames), self._state.camera
            if self._state.frame:
                last = self._state.history.entries[-1:]
                before = last[0].shown.actions[-1] if last and last[0].shown.actions else None
                return self._navigator.cameras(start, actions, self._state.frame, before), actions
            moving = actions[1:]  # a world's very first frame is seen from where it begins
            rest = start[None, :0].view(0, 4, 4)
            if moving:
                rest = self._navigator.cameras(start, moving, 1, actions[0])
            return torch.cat([start[None], rest]), actions
        if action is not None:
            raise InputError("step takes an action or cameras, not both")
        given = torch.as_tensor(cameras, dtype=torch.float32).cpu()
        check_cameras(given)
        if len(given) != frames:
            raise InputError(f"chunk {self._state.chunk} has {frames} frames, got {len(given)} cameras")
        return given.clone(), ()

    def _prompt(self) -> Any:
        """What the model makes of the prompt once for all chunks, where it does."""
        model = self.engine.model
        if self._encoded is None and isinstance(model, EncodesPrompt):
            self._encoded = model.encode_prompt(self._state.prompt, self.engine.attention)
        return self._encoded

    def _led(self, chunk: Lookup, actions: tuple[Action, ...]) -> tuple[Led, ...]:
        """What leads to each new latent, as the history keeps it."""
        model, shape, before = self.engine.model, chunk.shape, chunk.history.cameras(slice(-1, None))
        if isinstance(model, LabelsMotion):
            return model.label(chunk.coming[list(shape.latent_frames)], before[0] if len(before) else None)
        return tuple(actions[i] for i in shape.latent_frames) if actions else (None,) * shape.new

    def _view(self, settings: Acceleration, intrinsics: Tensor) -> View | None:
        """The view that scores from cameras are taken with, made once for its settings and intrinsics."""
        if not settings.looks:
            return None
        key = (settings.pose, tuple(intrinsics.flatten().tolist()))
        if key not in self._views:
            self._views = {key: settings.pose.look(intrinsics)}
        return self._views[key]

    def _noise(self, shape: ChunkShape, given: Tensor) -> Tensor:
        size = (shape.clean + shape.new, *self.engine.model.latent_shape)
        if tuple(given.shape) != size:
            raise InputError(
                f"noise of chunk {self._state.chunk} must have shape {list(size)}, got {list(given.shape)}"
            )
        return given


@dataclass(frozen=True, eq=False)
class _Asked:
    """A chunk that is asked for, its cameras known and its context not yet."""

    session: Session
    state: SessionState
    settings: Acceleration
    wanted: Wanted
    actions: tuple[Action, ...]
    noise: Tensor | None
    own_intrinsics: Tensor | None
    control: float
    """Seconds that it took so far."""


def planned(asked: Sequence[_Asked]) -> list[Pending]:
    """Plan chunks; what cameras tell is computed for all worlds at once."""
    clock = Stopwatch(torch.device("cpu"))
    contexts = plan_contexts([a.wanted for a in asked])
    clock.mark()
    select = clock.seconds()[0] / max(len(asked), 1)
    return [a.session._pend(a, one, select) for a, one in zip(asked, contexts, strict=True)]


@torch.inference_mode()
def step_together(
    sessions: Sequence[Session], cameras: Sequence[np.ndarray | Tensor] | None = None,
    actions: Sequence[Action | Sequence[Action] | None] | None = None, noise: Sequence[Tensor] | None = None,
    recall: Sequence[Sequence[int] | None] | None = None, limit: int | None = None,
) -> list[Chunk]:  # fmt: skip
    """The next chunk of several sessions: those whose plans fit are made as one batch.

    `cameras`, `actions`, `noise` and `recall` hold one entry a session, as for `Session.step`. `limit` bounds a batch.
    Bits may differ from stepping alone, since sums of a batch round otherwise. The sessions must be different ones.
    """
    if len(set(map(id, sessions))) != len(sessions):
        raise InputError("step_together needs different sessions; fork a session to step it twice")
    if limit is not None:
        integer_from("limit", limit, 1)
    count = len(sessions)
    every = [[None] * count if given is None else list(given) for given in (actions, cameras, noise, recall)]
    if any(len(given) != count for given in every):
        raise InputError(f"step_together needs one entry for each of {count} sessions, got {[len(g) for g in every]}")
    pending = planned([
        s._ask(action, where, start, s._state.intrinsics, places)
        for s, action, where, start, places in zip(sessions, *every, strict=True)
    ])  # fmt: skip
    made = [m for group in grouped(pending, limit) for m in carry_out(group)]
    before = [s._state for s in sessions]
    try:
        chunks = {id(m.left.pending.session): m.left.pending.session._finish(m) for m in made}
    except BaseException:  # whatever interrupts, all sessions are the ones before it
        for session, state in zip(sessions, before, strict=True):
            session._state = state
        raise
    return [chunks[id(s)] for s in sessions]


def _shared(settings: Acceleration, model: WorldModel, given: int) -> int | None:
    """Evaluations that share one attention to the context, or one computation of it; None where none do.

    `given` counts latents that are remembered or gone on from; without any there is nothing to freeze.
    """
    if isinstance(model, FreezesContext):
        frozen = settings.frozen
        return None if frozen is None or not given else frozen.evaluations or _ALL
    return None if settings.attention is None else settings.attention.evaluations


def in_force(settings: Acceleration, chunk: int) -> Acceleration:
    """What holds for a chunk: the first ones of a world may be made at full compute."""
    return Acceleration(settings.name) if chunk < settings.warmup else settings
