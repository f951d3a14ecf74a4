"""Floating-point operations of Matrix-Game-3.0's evaluations (specification, section 6)."""

from __future__ import annotations

from worldstride.models.matrix_game3.config import PATCH, SEEN, MG3Config


def evaluation_flops(config: MG3Config, tokens: int, latents: float, seen: float, density: float = 1.0) -> float:
    """Of one evaluation of latents of `tokens` tokens that attend to `seen` latents each, or to a share of them.

    What is made once a chunk or once a prompt is left out: cameras, keyboard, the text's keys and values.
    """
    width, inner, count = config.width, config.action_width, latents * tokens
    block = 2 * width * (6 * width + 2 * config.hidden)  # qkv and output, question and answer of the text, MLP
    block += 4 * width * (density * seen * tokens + config.rows)
    action = 2 * inner * (width + inner + 3 * inner + 3 * width) + 2 * 4 * inner * seen
    ends = 2 * 2 * PATCH**2 * config.channels * width
    return count * (config.depth * block + len(config.steered) * action + ends)


def chunk_flops(config: MG3Config, tokens: int, latents: int) -> float:
    """Of what is made once a chunk: cameras and keyboard."""
    width, count = config.width, latents * tokens
    cameras = 2 * width * (4 * config.depth + 2) * width + 2 * 9 * width
    keys = SEEN * config.key_width * 2 * config.action_width * 2
    return count * cameras + latents * len(config.steered) * keys
