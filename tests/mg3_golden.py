"""Matrix-Game-3.0 at golden size: the recorded case, its network, and engines that play on it."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from worldstride import Action, Engine, Session
from worldstride.acceleration import resolve
from worldstride.bench.verify_matrix_game3 import config_of
from worldstride.engine import EngineSource
from worldstride.models.matrix_game3.adapter import MatrixGame3
from worldstride.models.matrix_game3.controls import CONTROLS, TURN
from worldstride.models.matrix_game3.model import MG3Network
from worldstride.models.matrix_game3.weights import build
from worldstride.models.video_decoder import VideoDecoder
from worldstride.models.wan.vae import WanVAE, WanVAEConfig

GOLDEN = Path(__file__).parent / "golden" / "matrix_game3_tiny.npz"
HEIGHT, WIDTH = 64, 96
CHUNKS = ((0, 57), (57, 97), (97, 137))
"""Frames of the recorded chunks."""


@cache
def case() -> dict[str, Tensor]:
    """All that was recorded."""
    with np.load(GOLDEN) as opened:
        return {name: torch.from_numpy(opened[name]) for name in opened.files}


@cache
def published() -> dict[str, Tensor]:
    """The network's weights by their published names."""
    return {name.removeprefix("w/"): tensor for name, tensor in case().items() if name.startswith("w/")}


@cache
def network() -> MG3Network:
    """The recorded one."""
    return build(config_of(published(), {}), published(), "the golden case")


@cache
def vae() -> WanVAE:
    """A VAE with seeded random weights, as small as may be."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return WanVAE(WanVAEConfig(base_dim=4, decoder_base_dim=4, num_res_blocks=1)).requires_grad_(False).eval()


def model(storage: torch.dtype = torch.float32, guidance: float | None = None, **more: bool) -> MatrixGame3:
    """The recorded model, which rounds no levels."""
    decoder = VideoDecoder(vae(), HEIGHT, WIDTH)
    return MatrixGame3(network(), decoder, storage, guidance=guidance, **{"rounded": False, **more})


def engine(of: MatrixGame3 | None = None) -> Engine:
    """An engine that plays on it."""
    source = EngineSource("matrix_game3", None, "random", "golden", "float32")
    return Engine(of or model(), source, resolve("off"), CONTROLS)


def begin(of: Engine | None = None) -> Session:
    """The recorded world, with the recorded image's latent."""
    frames = torch.zeros(1, HEIGHT, WIDTH, 3, dtype=torch.uint8)
    session = (of or engine()).open(frames, torch.eye(4)[None], {"text": case()["context"][None]})
    session._state.prompt["image"] = case()["image_latent"][:, :, 0]
    return session


def actions(first: int, end: int) -> list[Action]:
    """What was done in the recorded frames."""
    unit = math.radians(TURN) / CONTROLS.mouse
    made = list[Action]()
    for keys, (down, right) in zip(case()["keyboard"][first:end], case()["mouse"][first:end].tolist(), strict=True):
        held = {key for key, on in zip(("KeyW", "KeyS", "KeyA", "KeyD"), keys.tolist(), strict=False) if on}
        made.append(Action(held, (right * unit, down * unit)))
    return made


def noise(k: int) -> Tensor:
    """What chunk k was made from [T, C, h, w]."""
    return case()[f"c{k}/noise"][0].transpose(0, 1)


def expected() -> Tensor:
    """All latents [35, C, h, w]."""
    return case()["all_latents"][0].transpose(0, 1)
