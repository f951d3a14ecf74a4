"""HY-WorldPlay from published files: which are needed, where they lie, and where they come from."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import torch

from worldstride.errors import CheckpointError, InputError
from worldstride.models.drawing import drawn, storage_of, variant_of
from worldstride.models.hy_worldplay.adapter import HYWorldPlay
from worldstride.models.hy_worldplay.config import HYConfig
from worldstride.models.hy_worldplay.joint import HYJoint
from worldstride.models.hy_worldplay.model import HYNetwork
from worldstride.models.hy_worldplay.vae import VAEConfig, VideoVAE
from worldstride.models.hy_worldplay.weights import build
from worldstride.models.published import filled
from worldstride.models.shards import published, read_json
from worldstride.models.video_codec import laid_out
from worldstride.models.video_decoder import VideoDecoder

HEIGHT, WIDTH = 480, 832
"""Frame size that the 8B models were trained at."""
EightB = HYWorldPlay | HYJoint
"""The 8B models: autoregressive, and bidirectional."""
VARIANTS: dict[str, tuple[type[EightB], int, float | None]] = {
    "ar_distilled_action_model": (HYWorldPlay, 4, None), "ar_model": (HYWorldPlay, 50, 6.0),
    "ar_rl_model": (HYWorldPlay, 50, 6.0), "bidirectional_model": (HYJoint, 50, 6.0),
}  # fmt: skip
"""Folders of the 8B models, the distilled one first: class, steps, and scale of classifier-free guidance."""
_BASE = "tencent/HunyuanVideo-1.5"


def load_hy_worldplay(
    path: Path | None, weights: Literal["pretrained", "random"], device: torch.device, dtype: torch.dtype
) -> tuple[EightB, str]:
    """Model and fingerprint, for frames of 480 x 832.

    `path` is a folder as `tencent/HY-WorldPlay` is published, with the folder `vae` of `tencent/HunyuanVideo-1.5` in
    it, and then the distilled model is meant; or one of `VARIANTS` in such a folder. Random weights are of full size,
    and a path, which need not exist, then only names one of `VARIANTS`.
    Raises `CheckpointError` that names what is missing and where it comes from.
    """
    if weights == "random":
        variant = variant_of(path, VARIANTS)
        made = random_model(HYConfig(), VAEConfig(), device, dtype, variant=variant)
        return made, f"random: seed 0, {device.type}"
    if path is None:
        raise CheckpointError(
            "HY-WorldPlay does not ship with this package: give the folder of tencent/HY-WorldPlay as `path`"
        )
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder; give that of tencent/HY-WorldPlay")
    if path.name in VARIANTS:
        path, variant = path.parent, path.name
    else:
        variant = next(iter(VARIANTS))
    folder, (kind, steps, guidance) = path / variant, VARIANTS[variant]
    tensors = published(folder, f"folder {variant} of tencent/HY-WorldPlay")
    config = HYConfig()  # what is published needs none; a file beside the weights tells of other sizes
    try:
        if (folder / "config.json").is_file():
            config = HYConfig.from_json(read_json(folder / "config.json"))
        network = build(config, tensors, str(folder), device, dtype)
        vae, mark = _vae(path / "vae", device, dtype)
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from error
    whole = hashlib.sha256(f"{tensors.fingerprint()} {config} {mark} {vae.config}".encode()).hexdigest()
    return kind(network, VideoDecoder(vae, HEIGHT, WIDTH), storage_of(dtype), steps, guidance), whole


def random_model(
    config: HYConfig, vae: VAEConfig, device: torch.device, dtype: torch.dtype, height: int = HEIGHT,
    width: int = WIDTH, seed: int = 0, variant: str = next(iter(VARIANTS)),
) -> EightB:  # fmt: skip
    """One of `VARIANTS` with seeded random weights, drawn on the device: for speed and memory, never for quality."""
    network = drawn(lambda: HYNetwork(config), device, dtype, seed)
    codec = laid_out(drawn(lambda: VideoVAE(vae), device, dtype, seed + 1))
    kind, steps, guidance = VARIANTS[variant]
    return kind(network, VideoDecoder(codec, height, width), storage_of(dtype), steps, guidance)


def _vae(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[VideoVAE, str]:
    tensors = published(folder, f"folder vae of {_BASE}")
    config = folder / "config.json"
    settings = VAEConfig.from_json(read_json(config)) if config.is_file() else VAEConfig()
    vae = filled(lambda: VideoVAE(settings), None, tensors, str(folder), "VAE of its configuration", device, dtype)
    return laid_out(vae), tensors.fingerprint()
