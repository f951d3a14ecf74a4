"""Held-out walks with their truth: frames of the renderer, and what is known of every pixel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from worldstride import noise as noises
from worldstride import worlds
from worldstride.camera import camera_from_pose

FIRST_SEED = 1_000_000
"""Seeds of held-out worlds start here; training samples its worlds from generators on the device instead."""
Trajectory = Literal["walk", "look away and back", "spin", "out and back", "loop", "random keys", "stand"]
TRAJECTORIES: tuple[Trajectory, ...] = get_args(Trajectory)
CLASSES = ("revisited", "recent", "novel", "moving")
"""Classes of pixels: on still surfaces, seen before but not in the recent window, seen in it, never seen; and on
surfaces that move."""

_AWAY = 24  # frames of half a turn
_HOLD, _KEYS = 6, -3  # frames for which random keys are held, and the stream of a seed that draws them
_BLOCK = 32  # frames whose co-visibility is computed at once


@dataclass(frozen=True, eq=False)
class HeldOutWorld:
    """A walk through a world that no training saw."""

    family: str
    seed: int
    walk: Trajectory
    given: int
    """Frames at the head that the model is given."""
    frames: Tensor
    """Truth, uint8 [n, H, W, 3]."""
    cameras: Tensor
    """[n, 4, 4]"""
    pose: Tensor
    """The cameras as poses [1, n, 4]."""
    masks: dict[str, Tensor]
    """Pixels of each of `CLASSES`, bool [n - given, H, W]."""

    @property
    def truth(self) -> Tensor:
        """The frames to be dreamt, float [n - given, 3, H, W] in [0, 1]."""
        return self.frames[self.given :].movedim(-1, 1).float() / 255


def look_away_walk(scene: worlds.Scene, start: Tensor, given: int, frames: int, side: int = 1) -> Tensor:
    """Stand for `given` frames, then turn half around and back, again and again: poses [1, frames, 4].

    `start` is a pose [1, 4] inside the scene, `side` 1 begins to the right, -1 to the left; the next turn goes to the
    other side. A small drift to and fro keeps two views of one place from being the same picture. Half a turn takes
    24 frames, or less of a turn is made where the walk is shorter.
    """
    away = max(1, min(_AWAY, (frames - given) // 2))
    poses = [start]
    for i in range(1, frames):
        phase = i - given
        swing, back = divmod(phase, 2 * away) if phase >= 0 else (0, 0)
        turn = 0.0 if phase < 0 else (math.pi / _AWAY) * (1 if back < away else -1) * (-1) ** swing * side
        drift = 0.02 * math.cos(0.35 * i)  # metres; sums to at most 6 cm to and fro
        poses.append(worlds.step_pose(scene, poses[-1], drift, 0.0, turn, 0.0, float(i)))
    return torch.stack(poses, 1)


def trajectory(scene: worlds.Scene, kind: Trajectory, given: int, frames: int, seed: int) -> Tensor:
    """Poses [1, frames, 4] of a kind of trajectory; all kinds begin where the seed's walk begins.

    The first `given` frames are those that a model is shown. Way out and way back, of equal length, come after them.
    """
    walk = worlds.sample_walk(scene, frames, noises.stream(seed))
    if kind == "walk":
        return walk
    if kind == "look away and back":
        return look_away_walk(scene, walk[:, 0], given, frames, 1 if seed % 4 < 2 else -1)
    if kind == "out and back":
        out = given + -(-(frames - given) // 2)
        return torch.cat([walk[:, :out], walk[:, :out].flip(1)], 1)[:, :frames]
    forward, turn = torch.full((frames,), 0.1), torch.full((frames,), math.tau / 64)  # metres and radians a frame
    if kind == "spin":
        forward, turn = torch.zeros(frames), torch.full((frames,), math.tau / 48)
    if kind == "stand":
        forward = turn = torch.zeros(frames)
    if kind == "random keys":
        generator = noises.stream(seed, _KEYS)
        held = torch.randint(0, 3, (2, -(-frames // _HOLD)), generator=generator).repeat_interleave(_HOLD, 1)
        forward, turn = 0.1 * (held[0] - 0.5).clamp_min(-0.5), 0.09 * (held[1] - 1)
    poses = [walk[:, 0]]
    for i in range(1, frames):
        poses.append(worlds.step_pose(scene, poses[-1], float(forward[i]), 0.0, float(turn[i]), 0.0, float(i)))
    return torch.stack(poses, 1)


def held_out_world(
    family: str, seed: int, walk: Trajectory, given: int, chunks: Sequence[int], windows: Sequence[int], size: int,
    device: torch.device | str = "cpu",
) -> HeldOutWorld:  # fmt: skip
    """Render one held-out walk of `given` frames and chunks of so many frames, on a device; results are on the CPU.

    `windows` holds each chunk's number of recent frames, which divides seen pixels into recent and revisited ones.
    """
    frames = given + sum(chunks)
    scene = worlds.scene_from_seed(family, [seed])
    path = trajectory(scene, walk, given, frames, seed)
    scene, pose = scene.to(device), path.to(device)
    time = torch.arange(frames, dtype=torch.float32, device=device)[None]
    pictures = worlds.render(scene, pose, time, size)[0].movedim(1, -1)
    starts, begin = [], given
    for count, window in zip(chunks, windows, strict=True):
        starts += [(begin, window)] * count
        begin += count
    masks = walk_classes(scene, pose, time, given, torch.tensor(starts, device=device), size)
    masks = {name: m.cpu() for name, m in masks.items()}
    return HeldOutWorld(family, seed, walk, given, pictures.cpu(), camera_from_pose(path)[0], path, masks)


def pixel_classes(recent: Tensor, before: Tensor, moving: Tensor) -> dict[str, Tensor]:
    """Masks bool [..., H, W] of `CLASSES`, from what is known at half the resolution, bool [..., H/2, W/2].

    Args:
        recent: pixels whose surface some frame of the recent window shows.
        before: pixels whose surface some older frame shows.
        moving: pixels of surfaces that move.
    """
    still = ~moving
    small = {
        "revisited": before & ~recent & still,
        "recent": recent & still,
        "novel": ~before & ~recent & still,
        "moving": moving,
    }
    return {name: m.repeat_interleave(2, -1).repeat_interleave(2, -2) for name, m in small.items()}


def walk_classes(
    scene: worlds.Scene, pose: Tensor, time: Tensor, given: int, starts: Tensor, size: int
) -> dict[str, Tensor]:
    """Masks bool [C, size, size] of `CLASSES` for the C frames from `given` on of a walk with poses [1, n, 4].

    By exact co-visibility at half the resolution; starts [C, 2] = first frame of each frame's chunk, its recent frames.
    """
    half, ids = size // 2, torch.arange(pose.shape[1], device=pose.device)[:, None]
    parts = []
    for first in range(0, len(starts), _BLOCK):
        part = slice(given + first, given + min(first + _BLOCK, len(starts)))
        seen = worlds.covisible(scene, pose[:, part], time[:, part], pose, time, half)[0]  # [n, c, half, half]
        begin, window = starts[first : first + _BLOCK].unbind(1)
        near = ((ids < begin) & (ids >= begin - window))[..., None, None]
        older = (ids < begin - window)[..., None, None]
        parts.append(((seen & near).any(0), (seen & older).any(0)))
    recent, before = (torch.cat(p) for p in zip(*parts, strict=True))
    return pixel_classes(recent, before, worlds.moving_pixels(scene, pose[:, given:], time[:, given:], half)[0])
