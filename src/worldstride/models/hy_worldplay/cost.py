"""Floating-point operations of HY-WorldPlay's passes (specification, section 6)."""

from __future__ import annotations

from worldstride.models.hy_worldplay.config import HYConfig
from worldstride.models.hy_worldplay.wan import PATCH, WanConfig


def context_flops(config: HYConfig, tokens: int, encoded: int, seen: float) -> float:
    """Of encoding latents of `tokens` tokens that attend to `seen` latents each. The last block only projects."""
    ends = 2 * (3 * config.width + 2 * config.channels + 1) * config.width
    return encoded * tokens * ((config.depth - 1) * _token(config, seen * tokens) + ends)


def evaluation_flops(config: HYConfig, tokens: int, latents: float, context: float) -> float:
    """Of one evaluation of latents that attend to each other and to `context` remembered ones."""
    ends = 2 * (3 * config.channels + 1) * config.width
    return latents * tokens * (config.depth * _token(config, (latents + context) * tokens) + ends)


def _token(config: HYConfig, keys: float) -> float:
    """Of a token in a block: projections and MLP, and attention to so many keys in both streams."""
    width = config.width
    return 2 * width * (5 * width + 2 * config.hidden) + 2 * 4 * width * keys


def wan_context_flops(config: WanConfig, tokens: int, words: int, encoded: int, seen: float) -> float:
    """The same of the WAN-5B model, whose latents also attend to a text of `words` rows in every block."""
    ends = 2 * (3 * config.width + PATCH**2 * config.channels) * config.width
    return encoded * tokens * ((config.depth - 1) * _wan_token(config, words, seen * tokens) + ends)


def wan_evaluation_flops(config: WanConfig, tokens: int, words: int, latents: int, context: float) -> float:
    """The same of an evaluation."""
    ends = 2 * 2 * PATCH**2 * config.channels * config.width
    return latents * tokens * (config.depth * _wan_token(config, words, (latents + context) * tokens) + ends)


def _wan_token(config: WanConfig, words: int, keys: float) -> float:
    """Of a token in a block: projections and MLP, attention to so many keys in both streams, and to the text."""
    width = config.width
    return 2 * width * (7 * width + 2 * config.hidden) + 2 * 4 * width * keys + 4 * width * words
