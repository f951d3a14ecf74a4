"""Walks for the small joint model: rendered on the device, folded into latents, and windows of them as batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from data import FAMILIES, take
from joint_courtyard import folded, padded
from torch import Tensor

from worldstride import camera, worlds
from worldstride.models.courtyard.codec import from_levels
from worldstride.models.matrix_game3 import rays, retrieval
from worldstride.models.matrix_game3.adapter import FIRST, NEW, PAST
from worldstride.models.matrix_game3.config import FRAMES
from worldstride.models.matrix_game3.controls import CONTROLS, followed
from worldstride.models.matrix_game3.retrieval import ASKING, SINK

Kind = Literal["first", "alone", "recalling"]
"""A world's first chunk; a later one without memory; one with its five slots."""
LENGTH = 55
"""Latents of a walk: a first chunk and four more."""
EARLIEST = 6
"""First latent of the earliest window that something is brought back to."""
_AT_ONCE = 14  # views whose points are carried at once


@dataclass(frozen=True)
class Batch:
    """Windows of B walks, all of a kind."""

    kind: Kind
    clean: Tensor
    """Latents [B, T, C, h, w] in [-1, 1]: the window's, the given ones first."""
    memory: Tensor | None
    """Remembered ones [B, 5, C, h, w]."""
    cameras: Tensor
    """What tokens are told of cameras [B, 5 + T, 4, 4], remembered ones first."""
    numbers: Tensor
    """Places in time [B, 5 + T]."""
    keys: Tensor
    """Keyboard of the window's frames [B, F, 6]."""
    mouse: Tensor
    """[B, F, 2]"""

    @property
    def given(self) -> int:
        """Latents that the window begins with."""
        return 1 if self.kind == "first" else PAST


def frames_of(latents: int) -> int:
    """Frames that a world's first latents show."""
    return FRAMES * (latents - 1) + 1


@torch.no_grad()
def seen_by(cameras: Tensor, grid: Tensor) -> Tensor:
    """Points [P, T, T] of the view of each latent that each latent shows: of its frames the one that shows most.

    As `retrieval.shares` counts them, for cameras [P, frames, 4, 4] of walks of T latents.
    """
    made = []
    for frames in cameras.double():
        asking, turned, eyes = frames[::FRAMES], frames[:, :3, :3], frames[:, None, :3, 3]
        counts = []
        for views in asking.split(_AT_ONCE):
            points = (grid @ views[:, :3, :3].mT + views[:, None, :3, 3])[:, None]  # [some, 1, 1000, 3]
            counts.append(retrieval.in_view((points - eyes) @ turned).sum(-1))  # [some, frames]
        by_frame = torch.cat(counts)  # [T, frames]
        later = by_frame[:, 1:].unflatten(1, (-1, FRAMES)).amax(-1)
        made.append(torch.cat([by_frame[:, :1], later], 1))
    return torch.stack(made).int()


class Walks:
    """Walks on the device, some of every family; the oldest are rendered anew as training goes."""

    def __init__(
        self, size: int, fresh: int, plain: float, side: int, pixels: int, generator: torch.Generator,
        length: int = LENGTH, begun: int | None = None,
    ) -> None:  # fmt: skip
        """`size` walks of `length` latents, `fresh` of them rendered at once, a share `plain` in plain courts.

        `begun` of them are there at first, and the others come as training goes.
        """
        if not 0 < fresh <= size or length < FIRST + NEW:
            raise ValueError(f"walks need 0 < fresh <= size and {FIRST + NEW} latents, got {fresh}, {size}, {length}")
        size -= size % fresh
        self.device, self.generator, self.length = generator.device, generator, length
        self._fresh, self._plain, self._side, self._pixels, self._next = fresh, plain, side, pixels, 0
        self.count = 0
        """Walks that are there."""
        self._grid, self._asking = retrieval.frustum().to(self.device), torch.tensor(ASKING, device=self.device) + PAST
        shape = (size, length, FRAMES * 3 * pixels**2, side // pixels, side // pixels)
        self.latents = torch.empty(shape, dtype=torch.uint8, device=self.device)
        self.cameras = torch.empty(size, frames_of(length), 4, 4, device=self.device)
        self.seen = torch.empty(size, length, length, dtype=torch.int32, device=self.device)
        for _ in range(max(1, min(begun or size, size) // fresh)):
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Render `fresh` walks beside the others, or in place of the oldest."""
        at, self._next = self._next, (self._next + self._fresh) % len(self.latents)
        self.count = max(self.count, at + self._fresh)
        plain = round(self._plain * self._fresh)
        for family, count in (("plain", plain), ("courtyard", self._fresh - plain)):
            if count:
                self._render(family, slice(at, at + count))
                at += count

    def _render(self, family: str, rows: slice) -> None:
        sample, walk, _ = FAMILIES[family]
        count, frames = rows.stop - rows.start, frames_of(self.length)
        scene = sample(count, self.device, self.generator)
        pose = walk(scene, frames, self.generator)
        time = torch.arange(frames, device=self.device, dtype=torch.float32).expand(count, -1)
        pictures = worlds.render(scene, pose, time, self._side).movedim(2, -1)
        self.latents[rows] = folded(padded(pictures), self._pixels)
        self.cameras[rows] = camera.camera_from_pose(pose)
        self.seen[rows] = seen_by(self.cameras[rows], self._grid)

    def recalled(self, walks: Tensor, first: Tensor) -> Tensor:
        """Latents [B, 5] in the slots of windows that begin with latents `first` [B], as `retrieval.filled` has it."""
        asking = first[:, None] + self._asking
        shown = self.seen[walks[:, None], asking]  # [B, 5, T]
        latent = torch.arange(self.length, device=self.device)
        may = (latent > 0) & (latent < first[:, None, None])
        ranked = torch.where(may, shown * self.length - latent, -self.length)  # of equal ones the earliest
        return torch.cat([ranked.argmax(-1)[:, :-1], torch.full_like(first, SINK)[:, None]], 1)

    @torch.no_grad()
    def draw(self, count: int, kind: Kind) -> Batch:
        """Windows anywhere in walks."""
        walks = torch.randint(self.count, (count,), device=self.device, generator=self.generator)
        if kind == "first":
            return self.window(kind, walks, torch.zeros_like(walks))
        last = self.length - PAST - NEW
        first = torch.randint(EARLIEST, last + 1, (count,), device=self.device, generator=self.generator)
        return self.window(kind, walks, first)

    def window(self, kind: Kind, walks: Tensor, first: Tensor) -> Batch:
        """The windows of walks [B] that begin with latents [B]."""
        size = FIRST if kind == "first" else PAST + NEW
        numbers = first[:, None] + torch.arange(size, device=self.device)
        cameras = take(self.cameras, walks, FRAMES * numbers)
        clean, memory = from_levels(take(self.latents, walks, numbers)), None
        begin = size if kind == "first" else NEW  # new latents, of which a world's first has one frame
        frames = torch.arange(1 - FRAMES * begin, 1, device=self.device) + FRAMES * numbers[:, -1:]
        frames = frames[:, FRAMES - 1 :] if kind == "first" else frames
        past = cameras[:, : size - begin]
        keys, mouse = followed(past, take(self.cameras, walks, frames), CONTROLS)
        told = rays.stepwise(cameras.double())
        if kind == "recalling":
            slots = self.recalled(walks, first)
            memory = from_levels(take(self.latents, walks, slots))
            references = cameras[:, self._asking].double()
            told = torch.cat([rays.recalled(take(self.cameras, walks, FRAMES * slots).double(), references), told], 1)
            numbers = torch.cat([slots, numbers], 1)
        return Batch(kind, clean, memory, told.float(), numbers, keys, mouse)
