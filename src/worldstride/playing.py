"""What of a trajectory is a chunk's: entries of frames, or of latents that are several frames each."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from worldstride.camera import between
from worldstride.control import Action, actions_per_frame
from worldstride.errors import InputError
from worldstride.protocol import ChunkShape
from worldstride.trajectory import Trajectory

Per = Literal["frame", "latent"]
"""What an entry of a trajectory stands for."""


def part_of(
    trajectory: Trajectory, first: int, shape: ChunkShape, per: Per, here: Tensor, fresh: bool
) -> tuple[int, tuple[Action, ...] | None, Tensor | None]:
    """How many entries from `first` on a chunk takes, and its frames' actions or cameras [F, 4, 4].

    `here` [4, 4] is the camera of the last frame. `fresh` is a world that has shown nothing: its very first latent is
    seen from `here`, and takes a camera but no action. Where entries run out the camera stands still.
    """
    if per not in get_args(Per):
        raise InputError(f"per must be frame or latent, got {per!r}")
    ends = range(shape.frames) if per == "frame" else shape.latent_frames
    counts = [end - before for before, end in zip((-1, *ends[:-1]), ends, strict=True)]  # frames of each entry
    if trajectory.cameras is not None:
        given, path = trajectory.cameras[first : first + len(counts)], list[Tensor]()
        for i, count in enumerate(counts):
            there = given[min(i, len(given) - 1)]
            path.append(between(here, there, count) if count > 1 else there[None])
            here = there
        return len(counts), None, torch.cat(path)
    still = [Action()] * (fresh and per == "latent")
    taken = len(counts) - len(still)
    moves = [*still, *(trajectory.actions or ())[first : first + taken]]
    moves += [Action()] * (len(counts) - len(moves))
    held = (actions_per_frame(move, count) for move, count in zip(moves, counts, strict=True))
    return taken, tuple(action for each in held for action in each), None
