"""A block of Matrix-Game-3.0's transformer, and where its tokens are (specification, sections 2.2 and 2.3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldstride import rope
from worldstride.attention import Attend, LayerAttend
from worldstride.attention.streams import KeysValues, turn
from worldstride.models.layers import MLP, gated, merged, modulated
from worldstride.models.matrix_game3.config import MG3Config
from worldstride.models.matrix_game3.steering import Steering, Times, Told
from worldstride.models.wan.layers import TextProjection, WideProjection

Rows = tuple[Tensor, ...]
"""Shift, scale and gate of self-attention, then of the MLP: six times [B, T, width]."""


class Places(NamedTuple):
    """Cosines and sines [..., heads, N, head_dim / 2] of tokens' rotary angles: every head has its own frequencies."""

    cos: Tensor
    sin: Tensor


def places(config: MG3Config, latents: Tensor, rows: int, columns: int) -> Places:
    """Of latents at places in time [..., T] and their tokens on a grid, on the device of `latents`."""
    across, down = (torch.arange(n, device=latents.device).double() for n in (columns, rows))
    axes = latents.double()[..., None, None], down[:, None], across
    grid = torch.broadcast_tensors(*axes)  # [..., T, rows, columns] each
    heads = list[Tensor]()
    for share in torch.linspace(-1, 1, config.heads, dtype=torch.float64).tolist():
        theta = config.theta * (1 + config.spread * share)
        parts = [
            rope.angles(axis.flatten(-3), [theta ** (-j / pairs) for j in range(pairs)])
            for axis, pairs in zip(grid, config.rope, strict=True)
        ]
        heads.append(torch.cat(parts, -1))
    turned = torch.stack(heads, -3)
    return Places(turned.cos().float(), turned.sin().float())


class Camera(nn.Module):
    """What a block makes of the camera's tokens: a scale and a shift of every token, the same in every step."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.scale, self.shift = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Camera tokens [B, N, width] -> scale and shift [B, N, width]."""
        h = self.second(F.silu(self.first(seen))) + seen
        return self.scale(h), self.shift(h)


class Block(nn.Module):
    """Self-attention, camera, text, actions, MLP; what stands between one attention and the next."""

    def __init__(self, config: MG3Config, steered: bool) -> None:
        super().__init__()
        width = config.width
        self.table = nn.Parameter(torch.zeros(1, 6, width))
        self.project, self.out = WideProjection(width, config.heads), nn.Linear(width, width)
        self.camera = Camera(width)
        self.norm = nn.LayerNorm(width, eps=config.eps)
        self.words, self.told = TextProjection(width, config.heads), nn.Linear(width, width)
        self.steering = Steering(config) if steered else None
        self.mlp = MLP(width, config.hidden)

    def begin(self, x: Tensor, level: Tensor, at: Places) -> tuple[Rows, tuple[Tensor, Tensor, Tensor]]:
        """What modulates x [B, N, width] at levels' rows [B, T, 6, width], and queries, keys (both turned), values."""
        rows = (level + self.table).unbind(2)
        q, k, v = self.project(modulated(x, rows[0], rows[1]))
        return rows, (turn(q, at.cos, at.sin), turn(k, at.cos, at.sin), v)

    def ask(self, x: Tensor, out: Tensor, rows: Rows, seen: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """x after self-attention's result [B, heads, N, head_dim] and the camera, and its queries to the text.

        The norm stands in the stream itself, not only before attention.
        """
        x = gated(x, self.out(merged(out)), rows[2])
        x = self.norm((1 + seen[0]) * x + seen[1])
        return x, self.words(x)

    def steer(
        self, x: Tensor, words: Tensor, told: Told, times: Times
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
        """x after the text's result [B, heads, N, head_dim], and queries, keys and values of its pixels over time."""
        x = x + self.told(merged(words))
        return x, self._steering.moving(x, told, times)

    def press(self, x: Tensor, out: Tensor, told: Told, times: Times) -> tuple[Tensor, Tensor]:
        """x after its pixels saw each other, and its queries to the keyboard."""
        x = self._steering.moved_by(x, out)
        return x, self._steering.asking(x, told, times)

    def end(self, x: Tensor, out: Tensor, rows: Rows, told: Told | None) -> Tensor:
        """x after the keyboard's result, or the text's where the block is told no actions, and the MLP."""
        x = x + self.told(merged(out)) if told is None else self._steering.pressed_by(x, out, told)
        return gated(x, self.mlp(modulated(x, rows[3], rows[4])), rows[5])

    @property
    def _steering(self) -> Steering:
        if self.steering is None:
            raise ValueError("this block is told no actions")
        return self.steering


def answered(q: Tensor, words: tuple[Tensor, Tensor], bias: Tensor | None, attend: Attend) -> Tensor:
    """The text's result [B, heads, N, head_dim]; `bias` [L] counts rows that stand for several."""
    k, v = (t.expand(len(q), -1, -1, -1) for t in words)
    return attend(q, k, v) if bias is None else attend(q, k, v, bias=bias)


def looked(q: Tensor, k: Tensor, v: Tensor, first: int, past: KeysValues | None, attend: Attend) -> Tensor:
    """What latents see of each other [B, heads, Nq, head_dim], and of others' `past` keys and values before theirs.

    Queries are those of all tokens, or of all but the `first`. Where attention is block-sparse, a pass over all tokens
    chooses among all, one over new latents among those before them.
    """
    if past is not None:
        if isinstance(attend, LayerAttend):
            return attend.chunk(q, past, (k, v))
        k, v = (torch.cat(pair, 2) for pair in zip(past, (k, v), strict=True))
    elif isinstance(attend, LayerAttend):
        return attend.within(q, k, v) if q.shape[2] == k.shape[2] else attend.joined(q, k, v, first)
    return attend(q, k, v)
