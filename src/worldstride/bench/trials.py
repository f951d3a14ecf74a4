"""Rollouts of many held-out worlds at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from worldstride import noise as noises
from worldstride.acceleration import Acceleration
from worldstride.bench.recall import Recall, recalled
from worldstride.bench.walks import HeldOutWorld
from worldstride.context.selection import bounded
from worldstride.engine import Engine
from worldstride.report import ChunkReport
from worldstride.session import Session, step_together
from worldstride.state import Chunk

Mode = Literal["closed", "forced"]
"""Closed loop: the model goes on from its own frames, as a player sees it. Forced: the truth takes the place of every
chunk that was made, so that each chunk is judged by itself."""


@dataclass(frozen=True)
class Arm:
    """One thing to try: settings, and where memory comes from."""

    settings: Acceleration
    recall: Recall = "pose"

    @property
    def name(self) -> str:
        """Name for tables."""
        return self.settings.name


@dataclass(frozen=True, eq=False)
class Roll:
    """One world played once."""

    session: Session
    world: HeldOutWorld
    seed: int
    """Noise seed, of those of its world."""
    mode: Mode = "closed"


def step_rolls(
    engine: Engine, rolls: Sequence[Roll], chunk: int, at: int, noise: NoiseBank,
    recall: Sequence[Sequence[int] | None] | None = None, limit: int | None = None,
) -> list[Chunk]:  # fmt: skip
    """The chunk of this number of all rolls, whose frames begin at frame `at` of their worlds, in one batch or in
    batches of at most `limit`; the truth then takes its place in those that are forced."""
    shape = engine.model.chunk(chunk)
    ahead, size = slice(at, at + shape.frames), (shape.clean + shape.new, *engine.model.latent_shape)
    drawn = [noise.draw(noise_seed(r.world, r.seed), chunk, size, engine.device) for r in rolls]
    sessions, cameras = [r.session for r in rolls], [r.world.cameras[ahead] for r in rolls]
    made = step_together(sessions, cameras, noise=drawn, recall=recall, limit=limit)
    for roll in rolls:
        if roll.mode == "forced":
            roll.session.correct(roll.world.frames[ahead])
    return made


class Party:
    """One arm in some worlds, once for every noise seed, stepped together.

    Noise depends on the seed, the world and the chunk alone, so that arms differ by what they do. `limit` bounds a
    batch.
    """

    def __init__(
        self, engine: Engine, worlds: Sequence[HeldOutWorld], arm: Arm, mode: Mode, seeds: Sequence[int] = (1, 2),
        limit: int | None = None, noise: NoiseBank | None = None,
    ) -> None:  # fmt: skip
        self.arm, self._engine, self._limit = arm, engine, limit
        self._worlds, self._seeds, self._noise = list(worlds), list(seeds), noise or NoiseBank()
        self._rolls = [Roll(self._open(w, s), w, s, mode) for s in seeds for w in worlds]
        self._at, self._chunk = worlds[0].given, 0
        self._shown: list[np.ndarray] = []
        self.reports: list[list[ChunkReport]] = [[] for _ in self._rolls]
        """One list a session: all worlds of the first seed, then of the next."""

    @property
    def frames(self) -> np.ndarray:
        """What was shown, uint8 [seeds, worlds, C, H, W, 3]."""
        whole = np.concatenate(self._shown, 1)
        return whole.reshape(len(self._seeds), len(self._worlds), *whole.shape[1:])

    def step(self) -> None:
        """The next chunk of all sessions."""
        shape = self._engine.model.chunk(self._chunk)
        count = bounded(shape.memory, self.arm.settings.memory)
        once = [
            recalled(w, self.arm.recall, self._at, shape.frames, shape.window, count, self._engine.device)
            for w in self._worlds
        ]
        recall = once * len(self._seeds)
        done = step_rolls(self._engine, self._rolls, self._chunk, self._at, self._noise, recall, self._limit)
        self._shown.append(np.stack([c.frames for c in done]))
        for reports, chunk in zip(self.reports, done, strict=True):
            reports.append(chunk.report)
        self._at, self._chunk = self._at + shape.frames, self._chunk + 1

    def _open(self, world: HeldOutWorld, seed: int) -> Session:
        given = slice(world.given)
        session = self._engine.open(
            world.frames[given], world.cameras[given], seed=world.seed, noise_seed=noise_seed(world, seed)
        )
        session.acceleration = self.arm.settings
        return session


_SEEDS = 64  # noise seeds a world may have


def noise_seed(world: HeldOutWorld, seed: int) -> int:
    """A session's noise seed for one of a world's seeds."""
    return _SEEDS * world.seed + seed


class NoiseBank:
    """The noise that sessions would draw themselves, drawn once for all arms: a GPU would wait for the CPU's draws."""

    def __init__(self) -> None:
        self._drawn: dict[tuple[int, int], Tensor] = {}

    def draw(self, seed: int, chunk: int, size: Sequence[int], device: torch.device) -> Tensor:
        """Noise of a session with this seed for a chunk, on the device."""
        key = (seed, chunk)
        if key not in self._drawn:
            self._drawn[key] = noises.normal((1, *size), seed, chunk, 0)[0].to(device)
        return self._drawn[key]


def pictures(frames: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """Frames uint8 [..., H, W, 3] as float [..., 3, H, W] in [0, 1] on a device."""
    return torch.as_tensor(frames).to(device).movedim(-1, -3).float() / 255
