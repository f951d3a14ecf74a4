"""Matrix-Game-3.0 from published files: which are needed, where they lie, and where they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from worldstride.errors import CheckpointError, InputError, did_you_mean
from worldstride.models.drawing import drawn, storage_of, variant_of
from worldstride.models.matrix_game3.adapter import GUIDANCE, MatrixGame3
from worldstride.models.matrix_game3.config import MG3Config
from worldstride.models.matrix_game3.model import MG3Network
from worldstride.models.matrix_game3.weights import build, config_of
from worldstride.models.pickled import Pickled
from worldstride.models.published import filled
from worldstride.models.shards import published, read_json
from worldstride.models.video_codec import laid_out
from worldstride.models.video_decoder import VideoDecoder
from worldstride.models.wan import native
from worldstride.models.wan.vae import WanVAE, WanVAEConfig

HEIGHT, WIDTH = 704, 1280
"""Frame size that the models were trained at."""
VARIANTS: dict[str, tuple[int, float | None]] = {"base_distilled_model": (3, None), "base_model": (50, GUIDANCE)}
"""Folders of the models, the distilled one first: steps, and scale of classifier-free guidance."""
DECODERS: dict[str, tuple[float, str]] = {
    "quarter": (0.25, "MG-LightVAE_v2.pth"), "half": (0.5, "MG-LightVAE.pth"), "full": (1.0, ""),
}  # fmt: skip
"""Decoders, upstream's own choice first: the share of channels that each keeps, and its file."""
ORIGIN = "Skywork/Matrix-Game-3.0"
_VAE, _LIGHT = "Wan2.2_VAE.pth", "light_vae"
REPACKS = {
    "base_distilled_model": "Matrix-Game-3.0-Base-Distilled-Diffusers",
    "base_model": "Matrix-Game-3.0-Base-Diffusers",
}
"""Repacks for diffusers of both models, whose files do not tell which of them they hold."""
_REPACK = f"FastVideo/{next(iter(REPACKS.values()))}"
_DECODING = ("decoder.", "post_quant_conv.")
_ENTRIES = ("state_dict", "gen_model", "generator")
_SIZES = {"num_heads": "heads", "text_len": "rows", "sigma_theta": "spread", "eps": "eps"}
"""Entries of a `config.json` that weights do not tell, and what they are here."""


def load_matrix_game3(
    path: Path | None, weights: Literal["pretrained", "random"], device: torch.device, dtype: torch.dtype,
    decoder: str | None = None,
) -> tuple[MatrixGame3, str]:  # fmt: skip
    """Model and fingerprint, for frames of 704 x 1280.

    `path` is a folder as `Skywork/Matrix-Game-3.0` is published, and then the distilled model is meant; or one of
    `VARIANTS` in it; or a repack for diffusers, whose transformer and VAE lie in folders of their own: its folder, or
    one around it, bears one of the names of `REPACKS`. `decoder` is one of `DECODERS`, without it upstream's own choice
    where its file is there. Random weights are of full size, and a path, which need not exist, then only names one of
    `VARIANTS`. Raises `CheckpointError` that names what is missing and where it comes from.
    """
    if decoder is not None and decoder not in DECODERS:
        known = list(DECODERS)
        raise InputError(f"unknown decoder {decoder!r}{did_you_mean(decoder, known)}; known: {', '.join(known)}")
    if weights == "random":
        variant = variant_of(path, VARIANTS)
        name = decoder or next(iter(DECODERS))
        vae = pruned(_statistics(WanVAEConfig()), DECODERS[name][0])
        made = random_matrix_game3(MG3Config(), vae, device, dtype, variant=variant)
        return made, f"random: seed 0, {device.type}, {variant}, {name} decoder"
    if path is None:
        raise CheckpointError(f"Matrix-Game-3.0 does not ship with this package: give the folder of {ORIGIN} as `path`")
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder; give that of {ORIGIN}, or {' or '.join(VARIANTS)} in it")
    root, folder, variant = _places(path)
    steps, guidance = VARIANTS[variant]
    tensors = published(folder, f"folder {folder.name} of {ORIGIN}")
    bare = {name.removeprefix("model."): name for name in tensors}
    given = _Renamed(tensors, bare)
    try:
        told = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        config = config_of(given, {ours: told[name] for name, ours in _SIZES.items() if name in told})
        network = build(config, given, str(folder), device, dtype)
        vae, mark = _vae(root, decoder, device, dtype)
        if vae.config.z_dim != config.channels:
            raise InputError(f"the VAE's latents have {vae.config.z_dim} channels, the transformer's {config.channels}")
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from error
    whole = hashlib.sha256(f"{tensors.fingerprint()} {config} {mark} {vae.config}".encode()).hexdigest()
    codec = VideoDecoder(laid_out(vae), HEIGHT, WIDTH)
    return MatrixGame3(network, codec, storage_of(dtype), steps, guidance, dtype != torch.float32), whole


def random_matrix_game3(
    config: MG3Config, vae: WanVAEConfig, device: torch.device, dtype: torch.dtype, height: int = HEIGHT,
    width: int = WIDTH, seed: int = 0, variant: str = next(iter(VARIANTS)),
) -> MatrixGame3:  # fmt: skip
    """A model with seeded random weights, drawn on the device: for speed and memory, never for quality."""
    network = drawn(lambda: MG3Network(config), device, dtype, seed)
    codec = VideoDecoder(laid_out(drawn(lambda: WanVAE(vae, eager=True), device, dtype, seed + 1)), height, width)
    steps, guidance = VARIANTS[variant]
    return MatrixGame3(network, codec, storage_of(dtype), steps, guidance, dtype != torch.float32)


class _Renamed(Mapping[str, Tensor]):
    """Tensors under other names."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _places(path: Path) -> tuple[Path, Path, str]:
    """The published folder, that of the transformer in it, and the variant."""
    if path.name in VARIANTS:
        return path.parent, path, path.name
    if (path / "transformer").is_dir():
        # a hub's cache names the folder around the one that is named by a revision
        folders = {*path.absolute().parts, *path.resolve().parts}
        for variant, repack in REPACKS.items():
            if any(folder.endswith(repack) for folder in folders):
                return path, path / "transformer", variant
        raise CheckpointError(
            f"{path} does not tell whether its model is distilled: name it, or a folder around it, "
            f"{' or '.join(REPACKS.values())}, as it is published"
        )
    variant = next(iter(VARIANTS))
    return path, path / variant, variant


def _statistics(config: WanVAEConfig) -> WanVAEConfig:
    return replace(config, latents_mean=native.LATENTS_MEAN, latents_std=native.LATENTS_STD)


def pruned(config: WanVAEConfig, share: float) -> WanVAEConfig:
    """The VAE whose decoder keeps a share of the channels; `InputError` on one that leaves parts of them."""
    kept = config.decoder_base_dim * share
    if kept < 1 or kept != int(kept):
        raise InputError(f"a decoder keeps a share of {config.decoder_base_dim} channels that is whole, got {share}")
    return replace(config, decoder_base_dim=int(kept))


def _vae(root: Path, decoder: str | None, device: torch.device, dtype: torch.dtype) -> tuple[WanVAE, str]:
    """The full VAE, its decoder in the place of which may stand a pruned one."""
    folder, file = root / "vae", root / _VAE
    if file.is_file():
        tensors = Pickled(file, _ENTRIES)
        whole = native.converted(tensors, str(file))
        config = native.config_of(whole, str(file))
    elif (folder / "config.json").is_file():
        tensors = published(folder, f"folder vae of {_REPACK}")
        whole, config = dict(tensors), WanVAEConfig.from_json(read_json(folder / "config.json"))
    else:
        raise CheckpointError(f"there is neither {file}, of {ORIGIN}, nor {folder} with config.json, as of {_REPACK}")
    marks = tensors.fingerprint()
    name, place = _student(root, decoder, config)
    if place is not None:
        if place.is_dir():
            own = part = published(place, f"folder {_LIGHT} of {_REPACK}")
        else:
            own = Pickled(place, _ENTRIES, wrappers=("module.",))
            part = native.converted(own, place.name)
        whole = {n: t for n, t in whole.items() if not n.startswith(_DECODING)}
        whole |= {n: t for n, t in part.items() if n.startswith(_DECODING)}
        marks = f"{marks} {own.fingerprint()}"
    config, what = pruned(config, DECODERS[name][0]), f"VAE with a {name} decoder"
    return filled(lambda: WanVAE(config, eager=True), None, whole, str(root), what, device, dtype), marks


def _student(root: Path, decoder: str | None, config: WanVAEConfig) -> tuple[str, Path | None]:
    """Which decoder is taken, and where the weights of a pruned one lie: in its file, or in the one folder of a repack,
    whose configuration tells which one that is."""
    light, kept, places = root / _LIGHT, None, dict[str, Path]()
    if (light / "config.json").is_file():
        kept = WanVAEConfig.from_json(read_json(light / "config.json")).decoder_base_dim
    for name, (share, file) in DECODERS.items():
        if file and (root / file).is_file():
            places[name] = root / file
        elif file and kept == config.decoder_base_dim * share:
            places[name] = light
    name = decoder or next(iter(places), "full")
    if DECODERS[name][1] and name not in places:
        missing = root / DECODERS[name][1]
        raise CheckpointError(
            f"{missing} is missing; it holds the decoder {name!r} and comes from {ORIGIN}; folder {_LIGHT} of a repack "
            f"would do, as {_REPACK} has it, where it holds that decoder"
        )
    return name, places.get(name)
