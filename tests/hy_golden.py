"""HY-WorldPlay at golden size: the recorded case, its network, and engines that play on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from worldstride import Engine, Session
from worldstride.acceleration import resolve
from worldstride.bench.verify_hy_worldplay import weights_of
from worldstride.engine import EngineSource
from worldstride.models.hy_worldplay import weights
from worldstride.models.hy_worldplay.adapter import HYWorldPlay
from worldstride.models.hy_worldplay.config import HYConfig
from worldstride.models.hy_worldplay.loading import random_model
from worldstride.models.hy_worldplay.model import HYNetwork
from worldstride.models.hy_worldplay.text import Prompt
from worldstride.models.hy_worldplay.vae import VAEConfig, VideoVAE
from worldstride.models.registry import find
from worldstride.models.video_decoder import VideoDecoder

GOLDEN = Path(__file__).parent / "golden" / "hy_worldplay_tiny.safetensors"
CPU = torch.device("cpu")
VAE = VAEConfig(latent_channels=4, block_out_channels=(8,) * 5, layers_per_block=1)
"""Smaller than the golden case's, which takes a second for a chunk."""
VAE_JSON = {"latent_channels": 4, "block_out_channels": [8] * 5, "layers_per_block": 1, "shift_factor": None}
"""The same as its `config.json` tells it."""
HEIGHT, WIDTH = 32, 48
"""Pixels of the sessions that are not golden: 2 x 3 latent pixels."""


@dataclass(frozen=True, eq=False)
class Golden:
    """The recorded case."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    published: Mapping[str, Tensor]
    """The transformer's weights by their published names."""
    config: HYConfig

    def given(self, name: str) -> Tensor:
        """An input or the result of the rollout."""
        return self.tensors[f"in_out/{name}"]

    @property
    def cameras(self) -> Tensor:
        """Camera-to-world [40, 4, 4]."""
        return torch.linalg.inv(self.given("viewmats")[0].double()).float()

    @property
    def prompt(self) -> dict[str, Tensor]:
        """As `Engine.open` takes it."""
        names = {"text": "text", "text_mask": "text_mask", "glyphs": "byt5", "glyphs_mask": "byt5_mask"}
        return {ours: self.given(theirs) for ours, theirs in {**names, "vision": "vis"}.items()}

    @property
    def states(self) -> Prompt:
        """As the network takes it."""
        return Prompt.masked(*(self.given(name) for name in ("text", "text_mask", "byt5", "byt5_mask", "vis")))


@cache
def golden() -> Golden:
    with safe_open(str(GOLDEN), "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in list(file.keys())}
    return Golden(metadata, tensors, weights_of(metadata, tensors), HYConfig.from_json(json.loads(metadata["config"])))


@cache
def network() -> HYNetwork:
    return weights.build(golden().config, golden().published, "the golden case").eval()


@cache
def vae() -> VideoVAE:
    return random_model(golden().config, VAE, CPU, torch.float32, HEIGHT, WIDTH).decoder.vae


def model(height: int = HEIGHT, width: int = WIDTH, storage: torch.dtype = torch.float32) -> HYWorldPlay:
    return HYWorldPlay(network(), VideoDecoder(vae(), height, width), storage)


def engine(of: HYWorldPlay | None = None) -> Engine:
    source = EngineSource("hy_worldplay", None, "random", "golden")
    return Engine(of or model(), source, resolve("off"), find("hy_worldplay").controls)


def begin(of: Engine, noise_seed: int = 3) -> Session:
    """A world that begins with a picture of noise, with the golden prompt."""
    height, width = of.model.decoder.size  # type: ignore[attr-defined]
    picture = torch.randint(256, (1, height, width, 3), generator=torch.Generator().manual_seed(1)).byte()
    return of.open(picture, torch.eye(4)[None], golden().prompt, seed=7, noise_seed=noise_seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(x: Tensor, truth: Tensor) -> float:
    """Largest error as a share of the truth's largest value."""
    assert x.shape == truth.shape
    return float((x.double() - truth.double()).abs().max() / truth.double().abs().max())
