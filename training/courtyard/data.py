"""Training data: worlds rendered on the fly into a pool of walks, and batches drawn from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from retriever import Retriever
from torch import Tensor

from worldstride import camera, worlds
from worldstride.models.courtyard.config import CourtyardConfig
from worldstride.models.courtyard.model import patchify

FAMILIES: dict[str, tuple[Callable[..., worlds.Scene], Callable[..., Tensor], int]] = {
    # family: its worlds, its walks, frames of a walk
    "plain": (worlds.sample_plain, worlds.sample_plain_walk, 64),
    "courtyard": (worlds.sample_courtyard, worlds.sample_walk, 256),
}
FAR_GAP = 16.0
"""Largest rank, counted from the chunk after the window, that a later target chunk is told."""


@dataclass(frozen=True)
class ContextKind:
    """How many frames of each kind a batch's context holds."""

    memory: int
    window: int
    sink: int = 0


@dataclass(frozen=True)
class Batch:
    """R target chunks of C frames against one shared context of F frames, for B walks."""

    context: Tensor
    """Context patches [B, F, n, values], uint8."""
    context_cameras: Tensor
    """[B, F, 4, 4]"""
    context_ranks: Tensor
    """[B, F] ranks in the window."""
    context_kinds: Tensor
    """[B, F] 0 recent, 1 memory, 2 sink."""
    target: Tensor
    """Target patches [B, R, C, n, values], uint8."""
    target_cameras: Tensor
    """[B, R, C, 4, 4]"""
    target_ranks: Tensor
    """[B, R, C]"""
    walks: Tensor
    """[B] rows of the pool."""
    target_frames: Tensor
    """[B, R C] frames of the pool that the targets are."""


def context_ranks(kind: ContextKind, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ranks and kinds [F] of a context: sink, then memory, then the window up to rank -1; chunks start at 0."""
    ranks = torch.arange(-(kind.sink + kind.memory + kind.window), 0, device=device)
    kinds = torch.tensor([2] * kind.sink + [1] * kind.memory + [0] * kind.window)
    return ranks, kinds.to(device, non_blocking=True)


def take(pool: Tensor, rows: Tensor, frames: Tensor) -> Tensor:
    """pool [P, N, ...], rows [B], frames [B, K] -> [B, K, ...]."""
    return pool[rows[:, None], frames]


class Pool:
    """Walks of one family as uint8 patches on the device; the oldest are rendered anew as training goes."""

    def __init__(
        self,
        family: str,
        size: int,
        fresh: int,
        config: CourtyardConfig,
        generator: torch.Generator,
        trace: Callable[..., tuple[Tensor, Tensor, Tensor]] = worlds.trace,
        frames: int | None = None,
        at_once: int = 16,
    ) -> None:
        self._sample, self._walk, default = FAMILIES[family]
        self.family, self.frames, self.config, self.fresh = family, frames or default, config, fresh
        self.generator, self._trace, self._next = generator, trace, 0
        self.device = generator.device
        self._block = min(fresh, max(1, at_once * 64 // self.frames))  # worlds in one call, always as many
        if fresh < 1 or fresh % self._block:
            raise ValueError(
                f"{family}: fresh worlds are rendered {max(1, self._block)} at once, so their number must be a "
                f"multiple of that, got {fresh}"
            )
        if size < fresh:
            raise ValueError(f"{family}: the pool must hold at least the {fresh} fresh worlds, got a size of {size}")
        size -= size % fresh
        shape = (size, self.frames, config.tokens, config.values)
        self.patches = torch.empty(shape, dtype=torch.uint8, device=self.device)
        self.cameras = torch.empty(size, self.frames, 4, 4, device=self.device)
        self.own: Tensor | None = None
        """The model's own predictions of the same frames, once training asks for them."""
        self.retriever = Retriever(self.device)
        for _ in range(size // fresh):
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Render `fresh` new worlds in place of the oldest."""
        at, self._next = self._next, (self._next + self.fresh) % len(self.patches)
        scene = self._sample(self.fresh, self.device, self.generator)
        pose = self._walk(scene, self.frames, self.generator)
        self.cameras[at : at + self.fresh] = camera.camera_from_pose(pose)
        block = self._block
        time = torch.arange(self.frames, device=self.device, dtype=torch.float32).expand(block, -1)
        for i in range(0, self.fresh, block):
            image = worlds.render(scene[i : i + block], pose[i : i + block], time, self.config.size, trace=self._trace)
            self.patches[at + i : at + i + block] = patchify(image, self.config.patch)
        if self.own is not None:
            self.own[at : at + self.fresh] = self.patches[at : at + self.fresh]

    @torch.no_grad()
    def draw(
        self, batch: int, kind: ContextKind, targets: int, random_memory: float, own: float, first_only: float = 0.0
    ) -> Batch:
        """A batch: retrieval as at inference, a share of random memory, a share of contexts from `self.own`.

        Memory is retrieved for all target chunks together, or for a share `first_only` of walks for the first alone, as
        a session does it.
        """
        n, c, device, g = self.frames, self.config.chunk, self.device, self.generator

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, device=device, generator=g)

        rows = torch.randint(len(self.patches), (batch,), device=device, generator=g)
        first = kind.sink + kind.memory + kind.window
        start = (first + uniform(batch) * (n - c - first + 1)).long().clamp_max(n - c)  # [B] first frame of the chunk
        near = (start + 1 + uniform(batch) * 12).long().clamp_max(n - c)
        far = (start + uniform(batch) * (n - c - start + 1)).long().clamp_max(n - c)
        starts = torch.stack([start, near, far], 1)[:, :targets]  # [B, R]
        frames = (starts[..., None] + torch.arange(c, device=device)).flatten(1)  # [B, R C]
        recent = start[:, None] - kind.window + torch.arange(kind.window, device=device)
        parts = [torch.arange(kind.sink, device=device).expand(batch, -1)]
        if kind.memory:
            wanted = torch.where(uniform(batch, 1) < first_only, start[:, None], starts)  # [B, R]
            parts.append(self._memory(rows, wanted, start, kind, random_memory, uniform))
        index = torch.cat([*parts, recent], 1)  # [B, F]
        context = take(self.patches, rows, index)
        if self.own is not None and own:
            mine = (uniform(batch, 1) < own) & (uniform(batch, index.shape[1]) < 0.75)
            context = torch.where(mine[..., None, None], take(self.own, rows, index), context)
        gap = (starts - start[:, None]).clamp_max(int(FAR_GAP))
        ranks, kinds = context_ranks(kind, device)
        return Batch(
            context,
            take(self.cameras, rows, index),
            ranks.expand(batch, -1),
            kinds.expand(batch, -1),
            take(self.patches, rows, frames).unflatten(1, (-1, c)),
            take(self.cameras, rows, frames).unflatten(1, (-1, c)),
            gap[..., None] + torch.arange(c, device=device),
            rows,
            frames,
        )

    def _memory(
        self,
        rows: Tensor,
        starts: Tensor,
        start: Tensor,
        kind: ContextKind,
        random: float,
        uniform: Callable[..., Tensor],
    ) -> Tensor:
        ends = torch.stack([starts, starts + self.config.chunk - 1], -1).flatten(1)  # first and last coming frame
        coming, before = take(self.cameras, rows, ends), start - kind.window
        chosen = self.retriever.memory(coming, self.cameras[rows], before, kind.memory, kind.window)
        anywhere = (uniform(len(rows), kind.memory) * before[:, None]).long()
        # ranks follow time, here as in a session
        return torch.where(uniform(len(rows), 1) < random, anywhere, chosen).sort(1).values
