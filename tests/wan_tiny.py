"""HY-WorldPlay's WAN-5B variant at a tiny size: published tensors, its VAE's, and engines that play on them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from hy_golden import CPU, normal
from worldstride import Engine, Session
from worldstride.acceleration import resolve
from worldstride.engine import EngineSource
from worldstride.models.hy_worldplay.wan import WanConfig
from worldstride.models.hy_worldplay.wan_adapter import WanWorldPlay
from worldstride.models.hy_worldplay.wan_weights import build
from worldstride.models.registry import find
from worldstride.models.video_decoder import VideoDecoder
from worldstride.models.wan.vae import WanVAE, WanVAEConfig

TINY = WanConfig(channels=4, width=32, heads=2, depth=3, hidden=48, text=12)
ROWS, COLUMNS = 2, 3
"""Of tokens; a latent has twice as many rows and columns."""
HEIGHT, WIDTH = 32 * ROWS, 32 * COLUMNS
"""Pixels."""
VAE = WanVAEConfig(
    base_dim=4, decoder_base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=(-0.2, 0.1, 0.0, 0.4),
    latents_std=(0.5, 1.2, 0.8, 1.7),
)  # fmt: skip


def shapes(c: WanConfig) -> dict[str, tuple[int, ...]]:
    """Tensors of a published file, written down from the specification, section 5.3."""
    made: dict[str, tuple[int, ...]] = {"scale_shift_table": (1, 2, c.width)}

    def linear(name: str, outputs: int, inputs: int) -> None:
        made.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    linear("proj_out", 4 * c.channels, c.width)
    made["patch_embedding.weight"] = (c.width, c.channels, 1, 2, 2)
    made["patch_embedding.bias"] = (c.width,)
    for name, inputs in (("time", 256), ("action", 256), ("text", c.text)):
        linear(f"condition_embedder.{name}_embedder.linear_1", c.width, inputs)
        linear(f"condition_embedder.{name}_embedder.linear_2", c.width, c.width)
    linear("condition_embedder.time_proj", 6 * c.width, c.width)
    for i in range(c.depth):
        of = f"blocks.{i}"
        made[f"{of}.scale_shift_table"] = (1, 6, c.width)
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            linear(f"{of}.attn1.{name}", c.width, c.width)
            linear(f"{of}.attn2.{name}", c.width, c.width)
        linear(f"{of}.attn1.to_out_prope.0", c.width, c.width)
        for name in ("attn1.norm_q", "attn1.norm_k", "attn2.norm_q", "attn2.norm_k", "norm2"):
            made[f"{of}.{name}.weight"] = (c.width,)
        made[f"{of}.norm2.bias"] = (c.width,)
        linear(f"{of}.ffn.net.0.proj", c.hidden, c.width)
        linear(f"{of}.ffn.net.2", c.width, c.hidden)
    return made


@cache
def published() -> dict[str, Tensor]:
    """Random weights by their published names; norms' scales and biases are random, too."""
    made = {}
    for i, (name, shape) in enumerate(shapes(TINY).items()):
        x = normal(*shape, seed=i)
        scale = name.endswith("weight") and "norm" in name
        made[name] = 1 + 0.3 * x if scale else x * (0.3 if len(shape) < 2 else (x[0].numel() ** -0.5))
    return made


def described() -> dict[str, Any]:
    """A `config.json`."""
    return {
        "_class_name": "WanTransformer3DModel", "_diffusers_version": "0.35.0", "added_kv_proj_dim": None,
        "attention_head_dim": 16, "cross_attn_norm": True, "eps": 1e-06, "ffn_dim": 48, "freq_dim": 256,
        "image_dim": None, "in_channels": 4, "num_attention_heads": 2, "num_layers": 3, "out_channels": 4,
        "patch_size": [1, 2, 2], "pos_embed_seq_len": None, "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024, "text_dim": 12,
    }  # fmt: skip


@cache
def codec(config: WanVAEConfig = VAE) -> WanVAE:
    """A VAE with random weights; scales and biases are random, too."""
    made = WanVAE(config).requires_grad_(False).eval()
    for i, parameter in enumerate(made.parameters()):
        flat = parameter.squeeze().dim() < 2
        x = normal(*parameter.shape, seed=i)
        # biases around 0, scales around 1
        bias = flat and parameter.dim() == 1
        parameter.copy_(0.1 * x if bias else 1 + 0.3 * x if flat else x * parameter[0].numel() ** -0.5)
    return made


def codec_json(config: WanVAEConfig = VAE) -> dict[str, Any]:
    """A `config.json` of the VAE."""
    return {
        "_class_name": "AutoencoderKLWan", "_diffusers_version": "0.35.0", "attn_scales": [],
        "base_dim": config.base_dim, "clip_output": False, "decoder_base_dim": config.decoder_base_dim,
        "dim_mult": list(config.dim_mult), "dropout": 0.0, "in_channels": 12, "is_residual": True,
        "latents_mean": list(config.latents_mean), "latents_std": list(config.latents_std),
        "num_res_blocks": config.num_res_blocks, "out_channels": 12, "patch_size": 2,
        "scale_factor_spatial": config.space, "scale_factor_temporal": config.time,
        "temperal_downsample": list(config.temperal_downsample), "z_dim": config.z_dim,
    }  # fmt: skip


@torch.no_grad()
def model(storage: torch.dtype = torch.float32) -> WanWorldPlay:
    """Its network is its own, for tests that change it."""
    network = build(TINY, published(), "the tiny file", CPU).eval()
    return WanWorldPlay(network, VideoDecoder(codec(), HEIGHT, WIDTH), storage)


def engine(of: WanWorldPlay | None = None) -> Engine:
    source = EngineSource("hy_worldplay_wan", None, "random", "tiny")
    return Engine(of or model(), source, resolve("off"), find("hy_worldplay_wan").controls)


def states(seed: int = 50) -> Tensor:
    """umT5's of a short prompt."""
    return normal(1, 7, TINY.text, seed=seed)


def picture(seed: int = 1) -> Tensor:
    """A picture of noise."""
    return torch.randint(256, (1, HEIGHT, WIDTH, 3), generator=torch.Generator().manual_seed(seed)).byte()


def begin(of: Engine, noise_seed: int = 3) -> Session:
    """A world that begins with a picture of noise."""
    return of.open(picture(), torch.eye(4)[None], {"text": states()}, seed=7, noise_seed=noise_seed)
