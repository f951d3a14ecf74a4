"""What coming chunks are asked for: by actions that come one after the other, or along a trajectory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from worldstride.control import Action
from worldstride.errors import InputError
from worldstride.playing import Per, part_of
from worldstride.protocol import WorldModel
from worldstride.state import SessionState
from worldstride.trajectory import Trajectory

Wished = tuple[Action | Sequence[Action] | None, Tensor | None, Tensor | None]
"""An action or one a frame, or cameras [F, 4, 4]; and the intrinsics that the session goes on with."""
Wish = Callable[[SessionState], Wished]
"""What the next chunk is asked for with, from the state that it goes on from. The newest wish may be asked again, from
another state; `InputError` where it cannot be met."""


def acting(actions: Iterable[Action | Sequence[Action] | None]) -> Iterator[Wish]:
    """Each action in turn."""
    return (partial(_act, action) for action in actions)


def along(trajectory: Trajectory, per: Per, model: WorldModel, intrinsics: Tensor | None) -> Iterator[Wish]:
    """A trajectory chunk after chunk; `intrinsics` are the session's own, where the trajectory has none."""
    own = intrinsics if trajectory.intrinsics is None else _one_intrinsics(trajectory.intrinsics)
    done, taken = 0, 0

    def part(state: SessionState) -> Wished:
        nonlocal taken
        shape = model.chunk(state.chunk)
        taken, actions, cameras = part_of(trajectory, done, shape, per, state.camera, not state.frame)
        return actions, cameras, own

    while done < len(trajectory):
        yield part
        done += taken


def _act(action: Action | Sequence[Action] | None, state: SessionState) -> Wished:
    return action, None, state.intrinsics


def _one_intrinsics(intrinsics: Tensor) -> Tensor:
    flat = intrinsics.reshape(-1, 3, 3).float()
    if not torch.allclose(flat, flat[:1].expand_as(flat), atol=1e-4):
        raise InputError("the trajectory's intrinsics change from frame to frame; a session has one camera")
    return flat[0]
