"""The transformer of HY-WorldPlay's WAN-5B variant, on Wan2.2-TI2V-5B: the prompt's keys and values once a prompt,
context once a chunk, and the chunk's own tokens in every step.

Its blocks let tokens attend to each other in two streams and then to the text, which is no part of the first; keys and
values of context latents are kept before any place is given to them, as `model.HYNetwork` keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldstride.attention import Attend
from worldstride.attention.streams import KeysValues, Places
from worldstride.errors import InputError, integer_from, number_in
from worldstride.models.hy_worldplay.cached import CachedNetwork, Rows
from worldstride.models.hy_worldplay.config import check_heads, known_entries, latent_channels
from worldstride.models.layers import FREQUENCIES, MLP, Embedder, gated, merged, modulated
from worldstride.models.wan.layers import TextProjection, WideProjection

PATCH = 2
"""Rows and columns of a latent that make one token."""
EPS = 1e-6
"""Of the layer norm before attention to the text."""

_FIXED: dict[str, object] = {
    "patch_size": [1, PATCH, PATCH], "freq_dim": FREQUENCIES, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "eps": EPS, "image_dim": None, "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}  # fmt: skip
"""What the published configuration says, in diffusers' words; anything else would be another network."""
_READ = {
    "in_channels", "out_channels", "num_attention_heads", "attention_head_dim", "num_layers", "ffn_dim", "text_dim",
}  # fmt: skip
_IDLE = {"rope_max_seq_len"}
"""Entries that change nothing in the network."""


@dataclass(frozen=True)
class WanConfig:
    """Every number that fixes the network; the defaults are the published 5B model's."""

    channels: int = 48
    """Channels of a latent."""
    width: int = 3072
    """Channels of a token."""
    heads: int = 24
    depth: int = 30
    """Blocks."""
    hidden: int = 14336
    """Channels inside the MLPs."""
    theta: float = 10_000.0
    """Base of the rotary frequencies."""
    text: int = 4096
    """Channels of umT5's states."""

    def __post_init__(self) -> None:
        for name in ("channels", "width", "heads", "depth", "hidden", "text"):
            integer_from(name, getattr(self, name), 1)
        number_in("theta", self.theta, 0, math.inf, open_low=True)
        check_heads(self.width, self.heads)

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.width // self.heads

    @property
    def rope(self) -> tuple[int, int, int]:
        """Channels of a head that turn with latent, row and column: thirds, and what is left over to the latent."""
        side = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * side, side, side

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> WanConfig:
        """From the entries of a diffusers `config.json`; `InputError` on what this network cannot be."""
        entries = known_entries(values, "HY-WorldPlay's WAN-5B", _FIXED, _READ, _IDLE)
        for name in sorted(_READ):
            integer_from(name, entries[name], 1)
        heads = entries["num_attention_heads"]
        return cls(
            channels=latent_channels(entries), width=heads * entries["attention_head_dim"], heads=heads,
            depth=entries["num_layers"], hidden=entries["ffn_dim"], text=entries["text_dim"],
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class WanFrames:
    """Latents as the network takes them."""

    x: Tensor
    """Noisy or clean latents [B, T, channels, h, w]; h and w are even, and h w / 4 tokens are a latent."""
    levels: Tensor
    """Noise levels in thousandths [B, T]."""
    labels: Tensor
    """Action labels [B, T], 0 to 80."""
    at: Places


class WanBlock(nn.Module):
    """Self-attention in two streams, attention to the text, MLP; what stands before, between and after attention."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        width = config.width
        self.table = nn.Parameter(torch.zeros(1, 6, width))
        self.project, self.out = WideProjection(width, config.heads), nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.words, self.told = TextProjection(width, config.heads), nn.Linear(width, width)
        self.mlp = MLP(width, config.hidden)

    def begin(self, x: Tensor, level: Tensor) -> tuple[Rows, tuple[Tensor, Tensor, Tensor]]:
        """What modulates x [B, N, width] at levels' rows [B, T, 6, width], and its queries, keys and values."""
        rows = (level + self.table).unbind(2)
        return rows, self.project(modulated(x, rows[0], rows[1]))

    def ask(self, x: Tensor, both: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """x after self-attention's result of both streams [B, N, 2 width], and its queries to the text."""
        x = gated(x, self.out(both), rows[2])
        return x, self.words(self.norm(x))

    def end(self, x: Tensor, told: Tensor, rows: Rows) -> Tensor:
        """x after the text's result [B, heads, N, head_dim] and the MLP."""
        x = x + self.told(merged(told))
        return gated(x, self.mlp(modulated(x, rows[3], rows[4])), rows[5])


class WanNetwork(CachedNetwork[WanFrames]):
    """Stateless: `text`, `context`, `velocity`."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.enter, self.leave = (
            nn.Linear(config.channels * PATCH**2, width),
            nn.Linear(width, config.channels * PATCH**2),
        )
        self.level, self.action, self.rows = Embedder(width), Embedder(width), nn.Linear(width, 6 * width)
        self.prompt = nn.Sequential(nn.Linear(config.text, width), nn.GELU("tanh"), nn.Linear(width, width))
        self.blocks = nn.ModuleList(WanBlock(config) for _ in range(config.depth))
        self.table = nn.Parameter(torch.zeros(1, 2, width))
        self.begin = WanBlock.begin
        self.ask: Callable[..., tuple[Tensor, Tensor]] = WanBlock.ask
        self.end: Callable[..., Tensor] = WanBlock.end
        """What computes a block around its two attentions; compiled functions may stand in for them."""

    def compile_passes(self) -> None:
        """Have torch compile what stands around attention; attention itself, whose keys grow, is never compiled."""
        self.begin, self.ask = torch.compile(WanBlock.begin), torch.compile(WanBlock.ask)
        self.end = torch.compile(WanBlock.end)

    def text(self, states: Tensor) -> list[KeysValues]:
        """Keys and values [1, heads, L, head_dim] of umT5's states [1, L, text], a pair a block, for every chunk.

        No row is left out: where states were padded when the model was trained (512 rows), they must be here, too.
        """
        if states.dim() != 3 or len(states) != 1 or not states.shape[1] or states.shape[2] != self.config.text:
            raise InputError(f"text states must be [1, L, {self.config.text}], L at least 1, got {list(states.shape)}")
        words = self.prompt(states.to(self.enter.weight))
        return [block.words.of_text(words) for block in self._blocks()]

    def _blocks(self) -> Sequence[WanBlock]:
        return cast("Sequence[WanBlock]", self.blocks)

    def _through(
        self, block: WanBlock, x: Tensor, rows: Rows, both: Tensor, words: KeysValues, attend: Attend
    ) -> Tensor:
        x, q = self.ask(block, x, both, rows)
        k, v = (t.expand(len(q), -1, -1, -1) for t in words)
        return self.end(block, x, attend(q, k, v), rows)

    def _modulating(self, about: Tensor) -> Tensor:
        """[B, T, 6, width]"""
        return self.rows(F.silu(about)).unflatten(-1, (6, -1))

    def _seen(self, words: KeysValues) -> None:
        return None

    def _entered(self, frames: WanFrames) -> tuple[Tensor, Tensor]:
        if any(n % PATCH for n in frames.x.shape[3:]):
            raise InputError(f"latents must have even numbers of rows and columns, got {list(frames.x.shape[3:])}")
        patches = frames.x.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH))  # [B, T, C, H, 2, W, 2]
        patches = patches.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)  # [B, T H W, 4 C]
        about = self.level(frames.levels) + self.action(frames.labels)
        return self.enter(patches.to(self.enter.weight.dtype)), about

    def _left(self, x: Tensor, about: Tensor, frames: WanFrames) -> Tensor:
        shift, scale = (about[:, :, None] + self.table).unbind(2)
        latents, (high, wide) = frames.x.shape[1], (n // PATCH for n in frames.x.shape[3:])
        patches = self.leave(modulated(x, shift, scale)).unflatten(-1, (PATCH, PATCH, -1))  # [B, T H W, 2, 2, C]
        planes = patches.unflatten(1, (latents, high, wide)).permute(0, 1, 6, 2, 4, 3, 5)  # [B, T, C, H, 2, W, 2]
        return planes.flatten(5).flatten(3, 4)
