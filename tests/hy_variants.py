"""What tests of HY-WorldPlay's variants do alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from worldstride import Acceleration, Action, Session
from worldstride.models.hy_worldplay.decoder import VideoCodec

FORWARD, BACK, RIGHT, LEFT = (Action({key}) for key in ("KeyW", "KeyS", "ArrowRight", "ArrowLeft"))


def latents(session: Session) -> Tensor:
    """All that a session has made [N, C, h, w]."""
    return torch.stack([e.latent for e in session.history.entries])


def replayed(session: Session, settings: Acceleration | str, moves: Iterable[Action]) -> tuple[Session, list[Any]]:
    """The session after a walk, and its chunks' reports."""
    session.acceleration = settings
    return session, [session.step(move).report for move in moves]


def streamed(vae: VideoCodec, z: Tensor, split: tuple[int, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """Frames of latents decoded in pieces, and the state after them."""
    state, parts = dict[str, Tensor](), list[Tensor]()
    for part in z.split(split, 2):
        frames, state = vae.decode(part, state)
        parts.append(frames)
    return torch.cat(parts, 2), state
