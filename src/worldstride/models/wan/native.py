"""Wan2.2's own VAE file: its names for the tensors that diffusers' conversion names otherwise."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from worldstride.errors import CheckpointError, InputError
from worldstride.models.wan.vae import WanVAEConfig

LATENTS_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891, 0.157,
    -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502, -0.2055, -0.0322,
    0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123, -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.052,
    0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
LATENTS_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165,
    0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917,
    0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.06,
    0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip
"""Of latents; from the `config.json` of the VAE of Wan-AI/Wan2.2-TI2V-5B-Diffusers. The file itself holds none."""

_RESIDUAL = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}
_RULES = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.downsamples\.(\d+)\.downsamples\.\d+\.(resample|time_conv)", r".down_blocks.\1.downsampler.\2"),
    (r"\.upsamples\.(\d+)\.upsamples\.\d+\.(resample|time_conv)", r".up_blocks.\1.upsampler.\2"),
    (r"\.downsamples\.(\d+)\.downsamples\.(\d+)\.", r".down_blocks.\1.resnets.\2."),
    (r"\.upsamples\.(\d+)\.upsamples\.(\d+)\.", r".up_blocks.\1.resnets.\2."),
    (r"\.(residual\.[0236])\.", lambda m: f".{_RESIDUAL[m[1]]}."),
    (r"\.shortcut\.", ".conv_shortcut."),
)


def config_of(tensors: Mapping[str, Tensor], origin: str) -> WanVAEConfig:
    """The configuration that tensors by diffusers' names have; `CheckpointError` where they are no VAE of Wan2.2."""
    finest, block = WanVAEConfig(), re.compile(r"encoder\.down_blocks\.0\.resnets\.\d+\.conv1\.weight")
    try:
        z_dim = len(tensors["post_quant_conv.weight"])
        known = z_dim == len(LATENTS_MEAN)
        return WanVAEConfig(
            base_dim=len(tensors["encoder.conv_in.weight"]),
            decoder_base_dim=len(tensors["decoder.conv_in.weight"]) // finest.dim_mult[-1], z_dim=z_dim,
            num_res_blocks=sum(block.fullmatch(name) is not None for name in tensors),
            latents_mean=LATENTS_MEAN if known else (), latents_std=LATENTS_STD if known else (),
        )  # fmt: skip
    except (KeyError, InputError) as error:
        raise CheckpointError(f"{origin} is no VAE of Wan2.2: {error}") from error


def converted(tensors: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Tensors by diffusers' names, which some may have already; `CheckpointError` where two become one."""
    made = dict[str, Tensor]()
    for name, tensor in tensors.items():
        new = name
        for pattern, into in _RULES:
            new = re.sub(pattern, into, new)
        if new in made:
            raise CheckpointError(f"{origin}: {name!r} is the second tensor that stands for {new!r}")
        made[new] = tensor
    return made
