"""Moves, frames and cameras that session tests share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from joint_model import CELL, HEIGHT, WIDTH
from worldstride import Action, Chunk
from worldstride.camera import camera_from_pose
from worldstride.context import selection
from worldstride.context.history import History
from worldstride.context.selection import ContextPlan, Signals
from worldstride.protocol import ChunkShape

FORWARD, TURN = Action(frozenset({"KeyW"})), Action(frozenset({"ArrowRight"}), (3.0, -2.0))
MOVES = (FORWARD, TURN, Action(frozenset({"KeyS", "KeyD"})), FORWARD)


def first_frames(count: int = 1, height: int = CELL * HEIGHT, width: int = CELL * WIDTH) -> np.ndarray:
    values = torch.randint(0, 256, (count, height, width, 3), generator=torch.Generator().manual_seed(0))
    return values.to(torch.uint8).numpy()


def walk(count: int, step: float = 0.05) -> Tensor:
    """Cameras [count, 4, 4] that walk forward while turning."""
    i = torch.arange(1, count + 1) * step
    return camera_from_pose(torch.stack([i, 2 * i, i, torch.zeros(count)], -1))


def select(
    history: History, shape: ChunkShape, coming: Tensor, points: Tensor, intrinsics: Tensor, **bounds: Any
) -> tuple[ContextPlan, Signals]:
    """The choice for one world; see `Lookup`."""
    (chosen,) = selection.select([selection.Lookup(history, shape, coming, points, intrinsics, **bounds)])
    return chosen


def same(a: Chunk, b: Chunk) -> bool:
    return np.array_equal(a.frames, b.frames) and np.array_equal(a.cameras, b.cameras)


def levels_apart(a: Chunk, b: Chunk) -> int:
    """Greatest difference of two chunks' pixels, of 256 levels."""
    assert np.array_equal(a.cameras, b.cameras)
    return int(np.abs(a.frames.astype(int) - b.frames).max())
