"""HY-WorldPlay's WAN-5B variant from published files: which are needed, where they lie, and where they come from."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import torch

from worldstride.errors import CheckpointError, InputError
from worldstride.models.drawing import drawn, storage_of
from worldstride.models.hy_worldplay.encoder_files import WAN
from worldstride.models.hy_worldplay.loading import EightB, load_hy_worldplay
from worldstride.models.hy_worldplay.wan import WanConfig, WanNetwork
from worldstride.models.hy_worldplay.wan_adapter import WanWorldPlay
from worldstride.models.hy_worldplay.wan_weights import build
from worldstride.models.pickled import Pickled
from worldstride.models.published import filled
from worldstride.models.shards import published, read_json
from worldstride.models.video_codec import laid_out
from worldstride.models.video_decoder import VideoDecoder
from worldstride.models.wan.vae import WanVAE, WanVAEConfig

HEIGHT, WIDTH = 704, 1280
"""Frame size that the model was trained at."""
DISTILLED, BASE = "wan_distilled_model", "wan_transformer"
"""Folders of the published model: the weights that play, and those that they were distilled from."""
_WEIGHTS, _ENTRY = "model.pt", "generator"
_ORIGIN = "tencent/HY-WorldPlay"


def load_worldplay(
    path: Path | None, weights: Literal["pretrained", "random"], device: torch.device, dtype: torch.dtype
) -> tuple[EightB | WanWorldPlay, str]:
    """`load_wan` where the path names one of its folders, else `load_hy_worldplay`."""
    wan = path is not None and path.name in (DISTILLED, BASE)
    return (load_wan if wan else load_hy_worldplay)(path, weights, device, dtype)


def load_wan(
    path: Path | None, weights: Literal["pretrained", "random"], device: torch.device, dtype: torch.dtype
) -> tuple[WanWorldPlay, str]:
    """Model and fingerprint, for frames of 704 x 1280.

    `path` is a folder as `tencent/HY-WorldPlay` is published, or `wan_distilled_model` in it: there lies `model.pt`,
    which holds the whole transformer; `wan_transformer/config.json` beside it tells of other sizes than the published.
    The VAE is the folder `vae` of `Wan-AI/Wan2.2-TI2V-5B-Diffusers`, which lies in or beside that of HY-WorldPlay;
    or the same files in `wan_vae` in it. Random weights are of full size. Raises `CheckpointError` that names what is
    missing and where it comes from.
    """
    if weights == "random":
        if path is not None:
            raise InputError(f"random weights come from no file; leave out the path {str(path)!r}")
        return random_wan(WanConfig(), WanVAEConfig(), device, dtype), f"random: seed 0, {device.type}"
    root = _root(path)
    file = root / DISTILLED / _WEIGHTS
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; it is part of the folder {DISTILLED} of {_ORIGIN}")
    tensors, settings = Pickled(file, _ENTRY, ("_fsdp_wrapped_module.",), ("model.",)), root / BASE / "config.json"
    config = WanConfig()
    try:
        if settings.is_file():
            config = WanConfig.from_json(read_json(settings))
        network = build(config, tensors, str(file), device, dtype)
        vae, mark = _vae(root, device, dtype)
        if vae.config.z_dim != config.channels:
            raise InputError(f"the VAE's latents have {vae.config.z_dim} channels, the transformer's {config.channels}")
    except InputError as error:
        raise CheckpointError(f"{root}: {error}") from error
    whole = hashlib.sha256(f"{tensors.fingerprint()} {config} {mark} {vae.config}".encode()).hexdigest()
    return _model(network, vae, dtype, HEIGHT, WIDTH), whole


def random_wan(
    config: WanConfig, vae: WanVAEConfig, device: torch.device, dtype: torch.dtype, height: int = HEIGHT,
    width: int = WIDTH, seed: int = 0,
) -> WanWorldPlay:  # fmt: skip
    """A model with seeded random weights, drawn on the device: for speed and memory, never for quality."""
    network = drawn(lambda: WanNetwork(config), device, dtype, seed)
    return _model(network, drawn(lambda: WanVAE(vae), device, dtype, seed + 1), dtype, height, width)


def _model(network: WanNetwork, vae: WanVAE, dtype: torch.dtype, height: int, width: int) -> WanWorldPlay:
    return WanWorldPlay(network, VideoDecoder(laid_out(vae), height, width), storage_of(dtype))


def _root(path: Path | None) -> Path:
    """The folder of HY-WorldPlay that a path means."""
    if path is None:
        raise CheckpointError(
            f"HY-WorldPlay WAN does not ship with this package: give the folder of {_ORIGIN} as `path`"
        )
    if path.name == BASE:
        raise CheckpointError(f"{path} is the model before distillation, which does not play; give {DISTILLED}")
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder; give that of {_ORIGIN}, or {DISTILLED} in it")
    return path.parent if path.name == DISTILLED else path


def _vae(root: Path, device: torch.device, dtype: torch.dtype) -> tuple[WanVAE, str]:
    name = WAN.split("/")[1]
    places = (root / "wan_vae", root / name / "vae", root.absolute().parent / name / "vae")
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        raise CheckpointError(
            f"there is no folder {' nor '.join(str(place) for place in places)}; it is the folder vae of {WAN}"
        )
    tensors = published(folder, f"folder vae of {WAN}")
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} lacks config.json, which tells the statistics of latents; it is in the folder vae of {WAN}"
        )
    config = WanVAEConfig.from_json(read_json(folder / "config.json"))
    vae = filled(lambda: WanVAE(config), None, tensors, str(folder), "VAE of its configuration", device, dtype)
    return vae, tensors.fingerprint()
