"""A session is one live world: everything that it knows is in one object that the caller owns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from worldstride import noise as noises
from worldstride.acceleration import Acceleration, resolve
from worldstride.attention import attend
from worldstride.camera import check_cameras
from worldstride.context.history import History
from worldstride.context.policy import PolicyState, plan_context
from worldstride.context.selection import ContextPlan
from worldstride.context.similarity import View
from worldstride.control import Action, actions_per_frame
from worldstride.denoising import DenoisePlan, denoise
from worldstride.errors import InputError
from worldstride.navigation import Navigator
from worldstride.protocol import ChunkShape, Conditions, Context
from worldstride.report import ChunkReport
from worldstride.trajectory import Trajectory

if TYPE_CHECKING:
    from worldstride.engine import Engine


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


class Session:
    """One world, stepped chunk by chunk. Made by `Engine.new`, `Engine.open` or `worldstride.open`."""

    def __init__(
        self, engine: Engine, state: SessionState, navigator: Navigator, acceleration: Acceleration | str | Path
    ) -> None:
        self.engine, self._state, self._navigator = engine, state, navigator
        self._acceleration = resolve(acceleration)
        self._views: dict[object, View] = {}  # made of settings and intrinsics alone, so no part of the state

    @property
    def acceleration(self) -> Acceleration:
        """Settings in force; assign a preset's name, a JSON file or settings, and the next chunk follows them."""
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
    ) -> Chunk:
        """Generate the next chunk.

        `action` is held for the whole chunk, or one action a frame is given; or `cameras` [F, 4, 4] say where the
        camera goes; neither means standing still. `noise` [clean + new, ...] replaces the session's own. Raises
        `InputError` on bad input, and then the session is as it was.
        """
        return self._step(action, cameras, noise, self._state.intrinsics)

    @torch.inference_mode()
    def _step(
        self,
        action: Action | Sequence[Action] | None,
        cameras: np.ndarray | Tensor | None,
        noise: Tensor | None,
        own_intrinsics: Tensor | None,
    ) -> Chunk:
        model, state, clock = self.engine.model, self._state, _Clock(self.engine.wait)
        shape = model.chunk(state.chunk)
        frame_cameras, actions = self._where(action, cameras, shape.frames)
        clock.lap("control")
        intrinsics = model.intrinsics if own_intrinsics is None else own_intrinsics
        settings = self._acceleration
        context_plan, signals, policy = plan_context(
            state.history, shape, frame_cameras, state.points, intrinsics, state.policy, settings.window,
            settings.memory, settings.temporal, settings.spatial, self._view(intrinsics),
        )  # fmt: skip
        plan = DenoisePlan(model.sampler(settings.steps, settings.shift), _reason(settings))
        clock.lap("select")
        context = self._encode(context_plan, shape)
        clock.lap("context")
        conditions = self._conditions(shape, frame_cameras, actions, intrinsics)
        inputs = model.prepare(conditions)
        start, fresh = self._noise(shape, noise)
        latents, evaluations, plan = denoise(model, start, inputs, context, plan, attend, fresh)
        kept = model.commit(latents, inputs[0])
        clock.lap("denoise")
        frames, decoder = model.decoder.decode(kept, state.decoder)
        pictures = frames[0].cpu().numpy()
        clock.lap("decode")

        history = state.history.fork()
        history.append(kept[0], conditions.cameras[0, shape.clean :], _per_latent(actions, shape))
        report = ChunkReport(
            state.chunk, state.frame, shape.frames, settings.name, signals, context_plan, context.latents,
            context.bytes, plan.reason, evaluations, clock.seconds(), len(history), history.bytes,
        )  # fmt: skip
        # one assignment: whatever interrupts a step, the session is the one before it or the one after it
        self._state = replace(
            state, history=history, decoder=decoder, camera=frame_cameras[-1].clone(), chunk=state.chunk + 1,
            frame=state.frame + shape.frames, intrinsics=own_intrinsics, policy=policy,
        )  # fmt: skip
        return Chunk(pictures, frame_cameras.numpy().copy(), report)

    def play(self, trajectory: Trajectory) -> Iterator[Chunk]:
        """Step along a trajectory; a last part shorter than a chunk is filled up by standing still.

        A trajectory's intrinsics become the session's with its first chunk; a model that was made for others raises
        `InputError`.
        """
        given = trajectory.intrinsics
        intrinsics, done = self._state.intrinsics if given is None else _one_intrinsics(given), 0
        while done < len(trajectory):
            count = self.engine.model.chunk(self._state.chunk).frames
            if trajectory.cameras is not None:
                part = trajectory.cameras[done : done + count]
                missing = count - len(part)
                yield self._step(None, torch.cat([part, part[-1:].expand(missing, -1, -1)]), None, intrinsics)
            else:
                moves = (trajectory.actions or ())[done : done + count]
                yield self._step((*moves, *(Action(),) * (count - len(moves))), None, None, intrinsics)
            done += count

    def fork(self, noise_seed: int | None = None) -> Session:
        """An independent session that goes on from here; with another noise seed it dreams something else."""
        state = replace(self._state, history=self._state.history.fork(), decoder=dict(self._state.decoder))
        if noise_seed is not None:
            state.noise_seed = noise_seed
        return Session(self.engine, state, self._navigator, self._acceleration)

    def save(self, path: str | Path) -> None:
        """Write the session to one file, atomically; `worldstride.open` goes on from it bit for bit."""
        from worldstride.saving import save_session

        save_session(self.engine, self._state, self._navigator.settings, self._acceleration, path)

    def _where(
        self, action: Action | Sequence[Action] | None, cameras: np.ndarray | Tensor | None, frames: int
    ) -> tuple[Tensor, tuple[Action, ...]]:
        if cameras is None:
            actions = actions_per_frame(Action() if action is None else action, frames)
            return self._navigator.cameras(self._state.camera, actions, self._state.frame), actions
        if action is not None:
            raise InputError("step takes an action or cameras, not both")
        given = torch.as_tensor(cameras, dtype=torch.float32).cpu()
        check_cameras(given)
        if len(given) != frames:
            raise InputError(f"chunk {self._state.chunk} has {frames} frames, got {len(given)} cameras")
        return given.clone(), ()

    def _view(self, intrinsics: Tensor) -> View | None:
        """The view that the spatial gate looks through, made once for its settings and intrinsics."""
        spatial = self._acceleration.spatial
        if spatial is None:
            return None
        key = (spatial, tuple(intrinsics.flatten().tolist()))
        if key not in self._views:
            self._views = {key: spatial.look(intrinsics)}
        return self._views[key]

    def _encode(self, plan: ContextPlan, shape: ChunkShape) -> Context:
        model, history = self.engine.model, self._state.history
        positions, kinds = plan.tables(shape.clean)
        latents = history.latents(plan.rows, model.device, model.latent_shape)
        actions = [history.entries[i].action for i in plan.rows]
        # the plain loop encodes the whole context anew for every chunk; keeping parts of it is an acceleration
        return model.encode_context(
            latents[None], history.cameras(plan.rows)[None], actions, positions, kinds, None, attend
        )

    def _conditions(
        self, shape: ChunkShape, frame_cameras: Tensor, actions: tuple[Action, ...], intrinsics: Tensor
    ) -> Conditions:
        model, history = self.engine.model, self._state.history
        cameras, clean = frame_cameras[list(shape.latent_frames)], None
        if shape.clean:
            rows = list(range(len(history) - shape.clean, len(history)))
            clean = history.latents(rows, model.device, model.latent_shape)[None]
            cameras = torch.cat([history.cameras(rows), cameras])
        positions = torch.arange(-shape.clean, shape.new)
        return Conditions(
            self._state.chunk, cameras[None], frame_cameras[None], intrinsics, actions, positions, clean,
            self._state.prompt,
        )  # fmt: skip

    def _noise(self, shape: ChunkShape, given: Tensor | None) -> tuple[Tensor, Callable[[int], Tensor]]:
        model, state = self.engine.model, self._state
        size = (1, shape.clean + shape.new, *model.latent_shape)
        if given is not None and tuple(given.shape) != size[1:]:
            raise InputError(f"noise of chunk {state.chunk} must have shape {list(size[1:])}, got {list(given.shape)}")

        def draw(i: int) -> Tensor:
            return noises.normal(size, state.noise_seed, state.chunk, i).to(model.device)

        start = draw(0) if given is None else given[None].to(model.device)
        return start, lambda i: draw(i + 1)


class _Clock:
    """Wall time of stages."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait, self._laps = wait, dict[str, float]()
        self._begin = self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        self._wait()
        now = time.perf_counter()
        self._laps[name], self._last = now - self._last, now

    def seconds(self) -> dict[str, float]:
        return {**self._laps, "total": self._last - self._begin}


def _reason(settings: Acceleration) -> str:
    asked = [] if settings.steps is None else [f"{settings.steps} steps"]
    asked += [] if settings.shift is None else [f"shift {settings.shift:g}"]
    return f"{' and '.join(asked)} asked for by {settings.name!r}" if asked else "full compute"


def _per_latent(actions: tuple[Action, ...], shape: ChunkShape) -> tuple[Action | None, ...]:
    return tuple(actions[i] for i in shape.latent_frames) if actions else (None,) * shape.new


def _one_intrinsics(intrinsics: Tensor) -> Tensor:
    flat = intrinsics.reshape(-1, 3, 3).float()
    if not torch.allclose(flat, flat[:1].expand_as(flat), atol=1e-4):
        raise InputError("the trajectory's intrinsics change from frame to frame; a session has one camera")
    return flat[0]
