"""Floating-point operations of the courtyard network's passes; a multiplication with its addition counts two."""

from __future__ import annotations

import math

from worldstride.models.courtyard.config import CourtyardConfig
from worldstride.models.courtyard.geometry import FEATURES, projective_channels


def block_flops(config: CourtyardConfig, frames: int, seen: float) -> float:
    """One block over the tokens of `frames` frames that attend to `seen` frames each."""
    tokens, width = frames * config.tokens, config.width
    linear = 24 * tokens * width**2  # q, k, v, o, and the MLP of four times the width
    mapped = 4 * 2 * 4 * tokens * config.heads * projective_channels(config)  # q, k, v and the output, by 4x4 matrices
    return linear + mapped + 4 * tokens * seen * config.tokens * width


def head_flops(config: CourtyardConfig, frames: int) -> float:
    """From the last block to clean patches: projection and convolutions."""
    pixels = frames * config.size**2
    channels = config.refine - 3 if config.refine else 3
    flops = 2 * pixels * channels * config.width
    if config.refine:
        flops += 2 * 9 * pixels * (config.refine**2 + 3 * config.refine)
    return flops


def input_flops(config: CourtyardConfig, frames: int) -> float:
    """Patches and camera features to tokens."""
    return 2 * frames * config.tokens * config.width * (config.values + FEATURES)


def level_flops(config: CourtyardConfig) -> float:
    """The noise level's tables."""
    return 2 * config.width * (32 + 6 * config.width)


def context_flops(config: CourtyardConfig, encoded: int, seen: float) -> float:
    """See `Costed.context_flops`; frames that are encoded apart see no more than their chunk."""
    if config.context != "together":
        seen = 1 if config.context == "apart" else min(seen, config.chunk)
    if not encoded:
        return 0.0
    tokens, projected = encoded * config.tokens, projective_channels(config)
    last = (
        6 * tokens * config.width**2 + 3 * 2 * 4 * tokens * config.heads * projected
    )  # queries, keys and values alone
    blocks = (config.depth - 1) * block_flops(config, encoded, seen) + last
    return blocks + input_flops(config, encoded) + level_flops(config)


def evaluation_flops(config: CourtyardConfig, frames: int, context: float) -> float:
    """See `Costed.evaluation_flops`."""
    network = config.depth * block_flops(config, frames, frames + context)
    final = 4 * config.width**2
    return math.fsum((network, input_flops(config, frames), level_flops(config), head_flops(config, frames), final))
