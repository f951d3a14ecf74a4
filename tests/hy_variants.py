"""What tests of HY-WorldPlay's variants do alike."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from worldstride import Acceleration, Action, Session
from worldstride.models.video_decoder import VideoCodec

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


def write_vae(folder: Path, vae: nn.Module, config: Mapping[str, object]) -> None:
    """A new folder with a VAE's weights and `config.json`."""
    folder.mkdir(parents=True)
    tensors = {name: t.contiguous() for name, t in vae.state_dict().items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Other weights in the same file."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    """Whether each tensor of `a` is that of `b`, bit for bit."""
    theirs = b.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in a.state_dict().items())
