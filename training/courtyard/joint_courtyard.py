"""A small model of Matrix-Game-3.0's structure for procedural worlds: its configuration, codec, adapter and weights.

Memory, past and new latents are one sequence, by the package's own code for Matrix-Game-3.0. What is its own: latents
are folded pixels (no VAE), and the network predicts clean latents, since a token has more values than channels. Worlds
are seen through 80 degrees where that code takes 90: tokens are told rays of another lens, which training makes good,
and retrieval takes views to be a little wider than they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from checkpoint import load_state, save_state
from torch import Tensor

from worldstride import noise as noises
from worldstride.acceleration import resolve
from worldstride.attention import Attend, Dense, attend
from worldstride.engine import Engine, EngineSource
from worldstride.errors import InputError
from worldstride.models.courtyard.codec import from_levels, to_levels
from worldstride.models.matrix_game3.adapter import MatrixGame3, MG3Inputs
from worldstride.models.matrix_game3.config import FRAMES, MG3Config
from worldstride.models.matrix_game3.model import MG3Network, Text
from worldstride.protocol import Context

SIZE = 64
"""Pixels of a frame's height and width."""
CONFIG = MG3Config(
    channels=192, pixels=4, width=384, heads=6, depth=8, hidden=1536, text=32, rows=8, steered=(0, 1, 2, 3),
    action_width=128, action_heads=2, key_width=32,
)  # fmt: skip
"""27 M parameters; a latent has 64 tokens."""
STEPS, SHIFT = 8, 3.0
"""Solver steps and shift of the noise schedule at full compute."""
LEAST = 0.05
"""Noise level below which velocities are taken as at it: they are a difference divided by it."""


def folded(frames: Tensor, pixels: int) -> Tensor:
    """Frames [..., 4 T, H, W, 3] as latents [..., T, 4 * 3 * pixels^2, H / pixels, W / pixels]."""
    parts = frames.unflatten(-2, (-1, pixels)).unflatten(-4, (-1, pixels)).unflatten(-6, (-1, FRAMES))
    lead = parts.ndim - 7  # [..., T, 4, h, p, w, p, 3]
    order = (0, 1, 6, 3, 5, 2, 4)
    return parts.permute(*range(lead), *(lead + i for i in order)).flatten(-6, -3)


def unfolded(latents: Tensor, pixels: int) -> Tensor:
    """Undo `folded`."""
    parts = latents.unflatten(-3, (FRAMES, 3, pixels, pixels))  # [..., T, 4, 3, p, p, h, w]
    lead = parts.ndim - 7
    order = (0, 1, 5, 3, 6, 4, 2)
    parts = parts.permute(*range(lead), *(lead + i for i in order))  # [..., T, 4, h, p, w, p, 3]
    return parts.flatten(-3, -2).flatten(-4, -3).flatten(-5, -4)


class FoldedFrames:
    """`Decoder` without a VAE: a latent is the pixels of its four frames; a world's first latent is one frame."""

    def __init__(self, size: int, pixels: int, device: torch.device) -> None:
        self.size, self._pixels, self._device = (size, size), pixels, device

    def encode(self, frames: Tensor) -> Tensor:
        """Frames uint8 [B, 1 + 4 k or 4 k, H, W, 3] -> latents [B, 1 + k or k, C, h, w]."""
        if frames.dtype != torch.uint8 or frames.ndim != 5 or tuple(frames.shape[2:]) != (*self.size, 3):
            size = f"{self.size[0]}, {self.size[1]}, 3"
            raise InputError(f"frames must be uint8 [B, F, {size}], got {frames.dtype} {list(frames.shape)}")
        if frames.shape[1] % FRAMES > 1:
            raise InputError(f"latents show {FRAMES} frames, a world's first one; got {frames.shape[1]} frames")
        return from_levels(folded(padded(frames.to(self._device)), self._pixels))

    def decode(self, latents: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Decoder.decode`."""
        levels = to_levels(unfolded(latents.float(), self._pixels))
        begun = torch.ones(len(latents), 1, device=latents.device)
        return levels if state else levels[:, FRAMES - 1 :], {"begun": begun}


def padded(frames: Tensor) -> Tensor:
    """Frames [B, F, ...], of which a world's first stands four times."""
    lead = -frames.shape[1] % FRAMES
    return torch.cat([frames[:, :1].expand(-1, lead, *frames.shape[2:]), frames], 1)


class JointCourtyard(MatrixGame3):
    """`WorldModel` whose network predicts clean latents."""

    name = "courtyard_joint"

    def __init__(self, network: MG3Network, size: int = SIZE, steps: int = STEPS, shift: float = SHIFT) -> None:
        codec: Any = FoldedFrames(size, network.config.pixels, network.enter.weight.device)
        super().__init__(network, codec, torch.float32, steps, rounded=False, shift=shift)

    def velocity(
        self, x: Tensor, sigma: float, inputs: MG3Inputs, context: Context, attend: Attend
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """See `WorldModel.velocity`."""
        clean, captured = super().velocity(x, sigma, inputs, context, attend)
        velocity = (x.float() - clean) / max(sigma, LEAST)
        velocity[:, : inputs.given] = 0
        return velocity, captured


def prompt(config: MG3Config = CONFIG) -> dict[str, Tensor]:
    """The states that stand for text: the same in every world, as many as the network reads."""
    return {"text": noises.normal((1, config.rows, config.text), 0)}


def predicted(
    network: MG3Network, text: Text, window: tuple[Tensor, Tensor], memory: Tensor | None, told: tuple[Tensor, ...],
    side: int,
) -> Tensor:  # fmt: skip
    """Clean latents [B, T, C, h, w] as the network predicts them for whole windows; gradients flow.

    Args:
        network: in any precision.
        text: `MG3Network.text` of `prompt`.
        window: latents [B, T, C, h, w], and their noise levels in thousandths [B, T].
        memory: remembered latents [B, M, C, h, w].
        told: cameras as tokens are told them [B, M + T, 4, 4], places in time [B, M + T], keyboard and mouse.
        side: pixels of a frame's height and width.
    """
    cameras, numbers, keys, mouse = told
    # attention's backward pass is given whole tensors: prompts are expanded ones elsewhere
    pairs = ((t.expand(len(cameras), -1, -1, -1).contiguous() for t in pair) for pair in text.pairs)
    text = Text(tuple((k, v) for k, v in pairs), text.bias)
    count = 0 if memory is None else memory.shape[1]
    chunk = network.prepared(cameras, numbers, count, keys, mouse, network.ray_table(side, side))
    return network.velocity(*window, memory, chunk, text, attend)


def joint_engine(network: MG3Network, fingerprint: str = "", size: int = SIZE) -> Engine:
    """An engine around a network, on its device and in its precision."""
    weight = network.enter.weight
    kind = str(weight.dtype).removeprefix("torch.")
    source = EngineSource(JointCourtyard.name, None, "pretrained", fingerprint, kind)
    attention = Dense(weight.device, weight.dtype)  # by rule: arms on other GPUs choose alike
    return Engine(JointCourtyard(network.eval(), size), source, resolve("off"), attention=attention)


def joint_of(engine: Engine) -> JointCourtyard:
    """The small joint model of an engine."""
    if not isinstance(engine.model, JointCourtyard):
        raise TypeError(f"expected the small joint model, got {type(engine.model).__name__}")
    return engine.model


def save_network(folder: Path, network: MG3Network, facts: Mapping[str, object]) -> str:
    """Write weights in half precision, in files below 16 MiB; `facts` hold the step and the side of frames. Their
    SHA-256."""
    weights = {name: t.half() for name, t in network.state_dict().items()}
    save_state(folder, weights, {**facts, "config": asdict(network.config)})
    return _sha256(weights)


def read_network(folder: Path) -> tuple[MG3Network, str, int]:
    """What `save_network` wrote: the network in float32, its weights' SHA-256, and the side of frames."""
    if not (folder / "state.json").is_file():
        raise InputError(f"{folder} holds no trained weights: state.json, as joint_train.py writes it, is missing")
    tensors, facts = load_state(folder)
    sizes: Any = facts["config"]
    network = MG3Network(MG3Config(**{**sizes, "steered": tuple(sizes["steered"])}))
    network.load_state_dict({name: t.float() for name, t in tensors.items()})
    return network, _sha256(tensors), int(str(facts["side"]))


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    whole = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        whole.update(tensor.cpu().numpy().tobytes())
    return whole.hexdigest()


def read_engine(folder: Path, device: torch.device, dtype: torch.dtype) -> Engine:
    """An engine around weights of `save_network`."""
    network, fingerprint, side = read_network(folder)
    return joint_engine(network.to(device, dtype).requires_grad_(False), fingerprint, side)
