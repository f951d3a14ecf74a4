"""Closed loop: the model goes on from its own frames, for many worlds at once."""

from __future__ import annotations

import math

import torch
from data import ContextKind, take
from heldout import Memory, Walks, predict, shoot
from retriever import Retriever
from torch import Tensor

from worldstride import worlds
from worldstride.bench.walks import pixel_classes
from worldstride.context import retrieval
from worldstride.models.courtyard.adapter import CourtyardModel
from worldstride.models.courtyard.config import CourtyardConfig


@torch.no_grad()
def roll(
    model: CourtyardModel, walks: Walks, given: int, frames: int, how: Memory = "pose", steps: int = 8, seed: int = 1
) -> Tensor:
    """Patches uint8 [N, frames, n, values]: the first `given` are true, every other one is the model's own."""
    config, device = model.config, walks.pose.device
    count = len(walks.pose)
    rows, retriever = torch.arange(count, device=device), Retriever(device)
    out = walks.patches[:, :frames].clone()
    random = torch.Generator().manual_seed(5)
    for at in range(given, frames - config.chunk + 1, config.chunk):
        window = min(config.window, at)
        memory = 0 if how == "none" else min(config.memory, at - window)
        coming = walks.cameras[:, at : at + config.chunk]
        index = torch.arange(at - window, at, device=device).expand(count, -1)
        if memory:
            before = torch.full((count,), at - window, device=device)
            if how == "random":
                picks = (torch.rand(count, memory, generator=random).to(device) * before[:, None]).long().sort(1).values
            elif how == "oracle":
                picks = _true_coverage(walks, at, window, memory, config)
            else:
                picks = retriever.memory(coming[:, [0, -1]], walks.cameras[:, :at], before, memory, window)
            index = torch.cat([picks, index], 1)
        context, cameras = take(out, rows, index), take(walks.cameras, rows, index)
        kind = ContextKind(memory, window)
        out[:, at : at + config.chunk] = predict(model, context, cameras, kind, coming, 7000 * seed + at, steps)
    return out


def _true_coverage(walks: Walks, at: int, window: int, count: int, config: CourtyardConfig) -> Tensor:
    """Frames [N, count] that truly show most of what the window does not show of the chunk at frame `at`."""
    picks = []
    for i in range(0, len(walks.pose), 16):
        rows, now = slice(i, i + 16), slice(at, at + config.chunk)
        target = (walks.scene[rows], walks.pose[rows, now], walks.time[rows, now])
        seen = worlds.covisible(*target, walks.pose[rows, :at], walks.time[rows, :at], config.size // 2)
        wanted = ~seen[:, at - window :].any(1)
        weights = (seen[:, : at - window] & wanted[:, None]).flatten(2).float()
        valid = torch.ones(weights.shape[:2], dtype=torch.bool, device=weights.device)
        picks.append(retrieval.greedy(weights, valid, count).sort(1).values)
    return torch.cat(picks)


def seen_before(walks: Walks, given: int, frames: int, config: CourtyardConfig) -> dict[str, Tensor]:
    """Pixel classes bool [N, frames - given, H, W] of a rollout's frames, by what earlier frames truly show."""
    mask = config.size // 2
    shape = (len(walks.pose), frames - given, mask, mask)
    recent, before, moving = (torch.zeros(shape, dtype=torch.bool, device=walks.pose.device) for _ in range(3))
    for at in range(given, frames - config.chunk + 1, config.chunk):
        part, now = slice(at - given, at - given + config.chunk), slice(at, at + config.chunk)
        window = max(0, at - config.window)
        for i in range(0, len(walks.pose), 16):
            rows = slice(i, i + 16)
            target = (walks.scene[rows], walks.pose[rows, now], walks.time[rows, now])
            seen = worlds.covisible(*target, walks.pose[rows, :at], walks.time[rows, :at], mask)
            recent[rows, part], before[rows, part] = seen[:, window:].any(1), seen[:, :window].any(1)
            moving[rows, part] = worlds.moving_pixels(*target, mask)
    return pixel_classes(recent, before, moving)


def look_away(scene: worlds.Scene, spot: Tensor, heading: Tensor, config: CourtyardConfig) -> Walks:
    """At spot [N, 2], along heading [N]: 8 frames still, 32 turning by 180 degrees, 4 still, back, 4 still."""
    turn = torch.cat(
        [torch.zeros(8), torch.arange(1, 33) / 32, torch.ones(4), 1 - torch.arange(1, 33) / 32, torch.zeros(4)]
    ).to(spot.device)
    yaw = heading[:, None] + math.pi * turn  # [N, 80]
    still = spot[:, None].expand(-1, 80, -1)
    return shoot(scene, torch.cat([still, yaw[..., None], torch.zeros_like(yaw)[..., None]], -1), config)


LOOK_GIVEN, LOOK_OUT, LOOK_HOME = 8, slice(8, 40), slice(74, 80)
"""Frames of `look_away`: the true ones, those that turn away, and the start view again."""


def mirrored() -> tuple[Tensor, Tensor]:
    """Pairs of frames of `look_away` at the same pose, on the way out and on the way back."""
    back = torch.arange(44, 76)
    out = torch.cat([torch.arange(38, 7, -1), torch.tensor([7])])
    return out, back


def retrace(walks: Walks, known: int, config: CourtyardConfig, back: int = 40) -> Walks:
    """The first `known` frames of a walk, then `back` frames over the same path backwards."""
    there = torch.arange(known)
    order = torch.cat([there, there.flip(0)[1 : back + 1]]).to(walks.pose.device)
    return shoot(walks.scene, walks.pose[:, order], config)
