"""What to bring back, chosen in other ways than by pose: the brackets of every rule on memory."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from worldstride import noise, worlds
from worldstride.bench.walks import HeldOutWorld

Recall = Literal["pose", "random", "oracle"]
_SIZE = 24  # pixels a side at which the oracle counts
_DRAW = -4  # stream of a world's seed for random memory


def recalled(
    world: HeldOutWorld, how: Recall, begin: int, frames: int, window: int, count: int, device: torch.device
) -> list[int] | None:
    """Frames to bring back for the chunk that begins at frame `begin`; None leaves it to retrieval.

    Random ones are drawn from all before the window. The oracle knows which pixels each frame shows, and chooses
    greedily those that show most of what neither the window nor a chosen one shows.
    """
    older = begin - window
    count = min(count, max(older, 0))
    if how == "pose" or not count:
        return None
    if how == "random":
        return torch.randperm(older, generator=noise.stream(world.seed, _DRAW, begin))[:count].sort().values.tolist()
    return _greedy(_seen(world, begin, frames, device), older, count)


def _seen(world: HeldOutWorld, begin: int, frames: int, device: torch.device) -> Tensor:
    """Which pixels of the coming frames every frame before shows: bool [begin, pixels]."""
    scene = worlds.scene_from_seed(world.family, [world.seed], device)
    pose = world.pose.to(device)
    time = torch.arange(begin + frames, dtype=torch.float32, device=device)[None]
    coming = slice(begin, begin + frames)
    seen = worlds.covisible(scene, pose[:, coming], time[:, coming], pose[:, :begin], time[:, :begin], _SIZE)
    return seen[0].flatten(1)


def _greedy(seen: Tensor, older: int, count: int) -> list[int]:
    left, old = ~seen[older:].any(0), seen[:older].clone()
    chosen = list[int]()
    for _ in range(count):
        # what is covered counts a little still, so that ties fall to frames that show much
        gain = (old & left).sum(1) + 0.01 * old.sum(1)
        gain[chosen] = -1
        best = int(gain.argmax())
        chosen.append(best)
        left = left & ~old[best]
    return sorted(chosen)
