"""The bank of finished latents with their cameras: newest on the device, older on the host, bounded in number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from worldstride import camera
from worldstride.control import Action
from worldstride.errors import InputError
from worldstride.protocol import Led

TURN_METRES = 1.0
"""Metres that weigh as much as a turn by one radian when the least telling frame is sought."""


class Shown(NamedTuple):
    """The frames that a latent shows."""

    cameras: Tensor
    """[n, 4, 4] float32, on the host."""
    actions: tuple[Action, ...] = ()
    """What was done in each; empty where nothing is known."""


@dataclass(frozen=True, eq=False)
class Remembered:
    """One finished latent."""

    index: int
    """Number of the latent in its world, from 0."""
    latent: Tensor
    """[...] in the precision the model committed."""
    camera: Tensor
    """[4, 4] float32, on the host."""
    led: Led
    """What led to it: an action, a number that means something to the model, or nothing that is known."""
    shown: Shown


class History:
    """Append-only for the caller; entries are immutable, so that forks share them.

    At most `limit` latents are kept: beyond that, among all but the first `sink` and the newest `hot`, the latent
    whose neighbours in time lie nearest is let go, so that key frames of every place stay; where latents are brought
    back in clips, a whole clip goes. Latents older than the newest `hot` are moved to the host.
    """

    def __init__(
        self, limit: int = 4096, hot: int = 32, sink: int = 4, entries: tuple[Remembered, ...] = (), clip: int = 1
    ) -> None:
        least = hot + sink + 2 * clip
        if limit < least:
            raise InputError(f"history limit must be at least hot + sink + {2 * clip} = {least}, got {limit}")
        self.limit, self.hot, self.sink, self.clip = limit, hot, sink, clip
        self._entries = list(entries)
        self._total = entries[-1].index + 1 if entries else 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def total(self) -> int:
        """Latents ever finished, kept or not."""
        return self._total

    @property
    def entries(self) -> tuple[Remembered, ...]:
        """What is kept, oldest first."""
        return tuple(self._entries)

    @property
    def bytes(self) -> int:
        """Bytes of kept latents, device and host together."""
        return sum(e.latent.numel() * e.latent.element_size() for e in self._entries)

    def fork(self) -> History:
        """An independent history with the same entries."""
        return History(self.limit, self.hot, self.sink, self.entries, self.clip)

    def append(
        self, latents: Tensor, cameras: Tensor, led: tuple[Led, ...], settle: bool = True,
        shown: Sequence[Shown] | None = None,
    ) -> None:  # fmt: skip
        """Add latents [T, ...] with cameras [T, 4, 4]; without `settle` older ones stay on the device until then.

        `shown` tells of each latent's frames; without it each shows one, at its camera.
        """
        cameras = cameras.cpu()
        every = [Shown(one[None]) for one in cameras] if shown is None else shown
        for latent, pose, of, frames in zip(latents, cameras, led, every, strict=True):
            own = Shown(frames.cameras.cpu().clone(), frames.actions)
            self._entries.append(Remembered(self._total, latent.clone(), pose.clone(), of, own))
            self._total += 1
        while len(self._entries) > self.limit:
            first = self._least_telling()
            del self._entries[first : first + self.clip]
        if settle:
            self.settle()

    def settle(self) -> None:
        """Move latents older than the newest `hot` to the host, which waits for the device."""
        for i in range(len(self._entries) - self.hot - 1, -1, -1):
            entry = self._entries[i]
            if entry.latent.device.type == "cpu":
                break  # all before it are there
            self._entries[i] = replace(entry, latent=entry.latent.cpu())

    def replaced(self, latents: Tensor) -> History:
        """A history whose newest latents are these [T, ...]; cameras and what led to them stay."""
        newest = [
            replace(e, latent=latent.clone()) for e, latent in zip(self._entries[-len(latents) :], latents, strict=True)
        ]
        return History(self.limit, self.hot, self.sink, (*self._entries[: -len(latents)], *newest), self.clip)

    def _least_telling(self) -> int:
        """Place of the clip to let go: its first latent stands for it."""
        clip, begin = self.clip, self.sink or self.clip
        stop = len(self._entries) - self.hot
        poses = torch.stack([e.camera for e in self._entries[begin - clip : stop + 1 : clip]])
        gap = camera_distance(poses[:-1], poses[1:])
        detour = gap[:-1] + gap[1:]  # of clip i + 1 from both neighbours
        return int(detour.argmin()) * clip + begin

    def cameras(self, rows: slice | list[int] = slice(None)) -> Tensor:
        """Cameras [N, 4, 4] of kept entries, by place in the bank."""
        chosen = self._entries[rows] if isinstance(rows, slice) else [self._entries[i] for i in rows]
        return torch.stack([e.camera for e in chosen]) if chosen else torch.empty(0, 4, 4)

    def latents(self, rows: list[int], device: torch.device, shape: tuple[int, ...]) -> Tensor:
        """Latents [N, ...] of kept entries, on the device."""
        if not rows:
            return torch.empty(0, *shape, device=device)
        found = [self._entries[i].latent for i in rows]
        away = [i for i, latent in enumerate(found) if latent.device != device]
        if away:  # all in one transfer
            for i, latent in zip(away, torch.stack([found[i] for i in away]).to(device).unbind(), strict=True):
                found[i] = latent
        return torch.stack(found)


def camera_distance(a: Tensor, b: Tensor) -> Tensor:
    """Metres between cameras [..., 4, 4] plus `TURN_METRES` per radian between their directions."""
    moved = (a[..., :3, 3] - b[..., :3, 3]).norm(dim=-1)
    trace = camera.relative(a, b)[..., :3, :3].diagonal(dim1=-2, dim2=-1).sum(-1)
    return moved + TURN_METRES * ((trace - 1) / 2).clamp(-1, 1).arccos()
