"""How tokens are told what keyboard and mouse did: each pixel attends over time (specification, section 2.4).

First a token, joined with its latent's mouse, attends to the same pixel in all latents; then it asks the keyboard's
keys, one of which every latent has. Ranks in time count from 0 for remembered latents and for the window, each alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldstride.attention.streams import turn
from worldstride.errors import InputError
from worldstride.models.matrix_game3.config import FRAMES, KEYS, MOUSE, SEEN, MG3Config
from worldstride.rope import angles

UNTOLD_KEY, UNTOLD_MOUSE = -1.0, 1.0
"""What stands for keyboard and mouse where no action is told: in remembered latents, and without guidance."""


def grouped(actions: Tensor, latents: int) -> Tensor:
    """Actions of frames [B, F, C] as latents see them [B, latents, 12, C]: each its own frames' and those before.

    A world's first chunk has 4 (latents - 1) + 1 frames, and a latent sees the 12 before its last frame; a later one
    has 4 latents frames, and a latent sees its own four and 8 before. What lies before the first is like the first.
    """
    frames = actions.shape[1]
    if frames not in (FRAMES * latents, FRAMES * (latents - 1) + 1):
        right = f"{FRAMES * (latents - 1) + 1} (a world's first) or {FRAMES * latents}"
        raise InputError(f"actions of {latents} latents must be of {right} frames, got {frames}")
    before = SEEN - FRAMES if frames == FRAMES * latents else SEEN
    padded = torch.cat([actions[:, :1].expand(-1, before, -1), actions], 1)
    return torch.stack([padded[:, FRAMES * i : FRAMES * i + SEEN] for i in range(latents)], 1)


class Told(NamedTuple):
    """What one block's tokens are told of a chunk's actions, computed once a chunk."""

    mouse: Tensor
    """Added to what a latent's tokens begin with [B, T, action_width]."""
    keys: Tensor
    """Keys of the keyboard [B, heads, T, head_dim], normed and turned."""
    values: Tensor
    """[B, heads, T, head_dim]"""


class Times(NamedTuple):
    """Cosines and sines [T, head_dim / 2] of latents' ranks in time; channels that do not turn have angle 0."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, config: MG3Config, ranks: Sequence[int], device: torch.device) -> Times:
        """Of latents with these ranks."""
        pairs, half = config.action_width // config.action_heads // 2, config.turned // 2
        frequencies = [config.action_theta ** (-j / half) for j in range(half)] + [0.0] * (pairs - half)
        turned = angles(torch.tensor(list(ranks), dtype=torch.float64), frequencies)
        return cls(turned.cos().float().to(device), turned.sin().float().to(device))


class Steering(nn.Module):
    """One block's part."""

    def __init__(self, config: MG3Config) -> None:
        super().__init__()
        inner, self.heads, self.eps = config.action_width, config.action_heads, config.eps
        self.embed = nn.Sequential(
            nn.Linear(KEYS, config.key_width), nn.SiLU(), nn.Linear(config.key_width, config.key_width)
        )
        self.pressed = nn.Linear(SEEN * config.key_width, 2 * inner, bias=False)
        self.enter, self.moved = nn.Linear(config.width, inner), nn.Linear(SEEN * MOUSE, inner, bias=False)
        self.mix, self.norm = nn.Linear(inner, inner), nn.LayerNorm(inner)
        self.qkv, self.leave = nn.Linear(inner, 3 * inner, bias=False), nn.Linear(inner, config.width, bias=False)
        self.ask, self.answer = nn.Linear(config.width, inner, bias=False), nn.Linear(inner, config.width, bias=False)

    def told(self, keys: Tensor, mouse: Tensor, times: Times) -> Told:
        """From what latents see of keyboard [B, T, 12, 6] and mouse [B, T, 12, 2]."""
        k, v = self.pressed(self.embed(keys).flatten(2)).unflatten(-1, (2, self.heads, -1)).unbind(2)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        return Told(self.moved(mouse.flatten(2)), self._placed(k, times), v)

    def moving(self, x: Tensor, told: Told, times: Times) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B n, heads, T, head_dim] of pixels over time, from tokens x [B, T n, width]."""
        h = self.enter(x).unflatten(1, (told.mouse.shape[1], -1)) + told.mouse[:, :, None]  # [B, T, n, inner]
        h = self.norm(self.mix(F.gelu(h, approximate="tanh")))
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 2, 4, 1, 5).flatten(1, 2)
        return self._placed(q, times), self._placed(k, times), v

    def moved_by(self, x: Tensor, out: Tensor) -> Tensor:
        """x after what its pixels saw of each other [B n, heads, T, head_dim]."""
        return x + self.leave(self._back(out.unflatten(0, (len(x), -1))))

    def asking(self, x: Tensor, told: Told, times: Times) -> Tensor:
        """Queries [B, heads, n T, head_dim] to the keyboard: all pixels ask the same keys."""
        q = self.ask(x).unflatten(1, (told.mouse.shape[1], -1)).unflatten(-1, (self.heads, -1))
        q = self._placed(q.permute(0, 2, 3, 1, 4), times)  # [B, n, heads, T, head_dim]
        return q.transpose(1, 2).flatten(2, 3)

    def pressed_by(self, x: Tensor, out: Tensor, told: Told) -> Tensor:
        """x after the keyboard's answer [B, heads, n T, head_dim]."""
        return x + self.answer(self._back(out.unflatten(2, (-1, told.mouse.shape[1])).transpose(1, 2)))

    def _placed(self, x: Tensor, times: Times) -> Tensor:
        """x [..., T, head_dim], normed and turned by its latent's rank."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return turn(wide.to(x.dtype), times.cos, times.sin)

    def _back(self, out: Tensor) -> Tensor:
        """Results [B, n, heads, T, head_dim] as tokens [B, T n, inner]."""
        return out.permute(0, 3, 1, 2, 4).flatten(3).flatten(1, 2)
