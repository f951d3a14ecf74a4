"""What the prompt becomes: language-model, glyph and image states as one sequence, and its keys and values.

Rows that a mask leaves out never enter; the sequence is image | glyphs | language (specification, sections 2.2, 2.7).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldstride.attention import Attend
from worldstride.errors import InputError
from worldstride.models.hy_worldplay.config import HYConfig
from worldstride.models.hy_worldplay.layers import Projection
from worldstride.models.layers import MLP, Embedder, gated, merged, modulated

KINDS = ("text", "text_mask", "glyphs", "glyphs_mask")
"""Names of the states that a text has; those of the negative prompt begin with "negative_"."""
NEGATIVE = "negative_"
"""What names of states of the negative prompt begin with, where the model is guided."""
STATES = (*KINDS, "vision", *(f"{NEGATIVE}{kind}" for kind in KINDS))
"""Names of all encoder states of a prompt."""
WORDS = ("text", "text_mask")
"""Names of those that the WAN-5B variant takes: a text's alone."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """Encoder states of one prompt, without the rows that masks leave out."""

    text: Tensor
    """Of the language model [1, L, text]."""
    glyphs: Tensor
    """Of ByT5 [1, G, glyphs]; only what stands in quotation marks is encoded, so G may be 0."""
    vision: Tensor
    """Of SigLIP, of the first image [1, V, vision]."""

    @classmethod
    def masked(cls, text: Tensor, text_mask: Tensor, glyphs: Tensor, glyph_mask: Tensor, vision: Tensor) -> Prompt:
        """From padded states [1, N, ...] and masks [1, N]."""
        for name, states, mask in (("text", text, text_mask), ("glyphs", glyphs, glyph_mask)):
            if states.shape[:2] != mask.shape or len(states) != 1:
                raise InputError(
                    f"{name} must be one prompt's states [1, N, channels] with a mask [1, N], got {list(states.shape)} "
                    f"and {list(mask.shape)}"
                )
        return cls(text[:, text_mask[0].bool()], glyphs[:, glyph_mask[0].bool()], vision)

    def check(self, config: HYConfig) -> None:
        """Raise `InputError` where states do not fit the network."""
        for name, states, channels in (
            ("text", self.text, config.text), ("glyphs", self.glyphs, config.glyphs),
            ("vision", self.vision, config.vision),
        ):  # fmt: skip
            if states.dim() != 3 or len(states) != 1 or states.shape[-1] != channels:
                raise InputError(f"{name} states must be [1, N, {channels}], got {list(states.shape)}")
        if not self.text.shape[1]:
            raise InputError("a prompt needs at least one token of text, got none")


class RefinerBlock(nn.Module):
    """Attention and MLP over the language model's states, gated by noise level and the states' mean."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.gates = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, about: Tensor, attend: Attend) -> Tensor:
        """x [1, L, width], about [1, width]."""
        first, second = self.gates(F.silu(about))[:, None].chunk(2, -1)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        x = x + first * self.out(merged(attend(q, k, v)))
        return x + second * self.down(F.silu(self.up(self.norm2(x))))


class Refiner(nn.Module):
    """Language-model states as tokens."""

    def __init__(self, config: HYConfig) -> None:
        super().__init__()
        width = config.width
        self.enter, self.level = nn.Linear(config.text, width), Embedder(width)
        self.mean1, self.mean2 = nn.Linear(config.text, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(RefinerBlock(width, config.heads, config.hidden) for _ in range(2))

    def forward(self, states: Tensor, level: Tensor, attend: Attend) -> Tensor:
        """States [1, L, text] at noise level [1] in thousandths -> [1, L, width]."""
        mean = states.float().mean(1).to(states.dtype)
        about = self.level(level) + self.mean2(F.silu(self.mean1(mean)))
        x = self.enter(states)
        for block in self.blocks:
            x = block(x, about, attend)
        return x


class TextBlock(nn.Module):
    """The text's half of a double-stream block."""

    def __init__(self, config: HYConfig) -> None:
        super().__init__()
        width = config.width
        self.modulation = nn.Linear(width, 6 * width)
        self.project, self.out = Projection(width, config.heads), nn.Linear(width, width)
        self.mlp = MLP(width, config.hidden)

    def begin(self, x: Tensor, level: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor, Tensor]]:
        """What modulates x [1, L, width] at an embedded level [1, width], and its queries, keys and values."""
        rows = self.modulation(F.silu(level))[:, None].chunk(6, -1)
        return rows, self.project(modulated(x, rows[0], rows[1]))

    def end(self, x: Tensor, out: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
        """x after attention's result [1, heads, L, head_dim] and the MLP."""
        x = gated(x, self.out(merged(out)), rows[2])
        return gated(x, self.mlp(modulated(x, rows[3], rows[4])), rows[5])


class TextEntry(nn.Module):
    """Encoder states as one sequence of tokens."""

    def __init__(self, config: HYConfig) -> None:
        super().__init__()
        width = config.width
        self.refiner = Refiner(config)
        self.glyphs = nn.Sequential(
            nn.LayerNorm(config.glyphs, eps=1e-5), nn.Linear(config.glyphs, 2048), nn.GELU(), nn.Linear(2048, 2048),
            nn.GELU(), nn.Linear(2048, width),
        )  # fmt: skip
        self.vision = nn.Sequential(
            nn.LayerNorm(config.vision, eps=1e-5), nn.Linear(config.vision, config.vision), nn.GELU(),
            nn.Linear(config.vision, width), nn.LayerNorm(width, eps=1e-5),
        )  # fmt: skip
        self.kind = nn.Parameter(torch.zeros(3, width))

    def forward(self, prompt: Prompt, level: Tensor, attend: Attend) -> Tensor:
        """Tokens [1, V + G + L, width] at noise level [1] in thousandths."""
        weight = self.kind
        text, glyphs, vision = (s.to(weight) for s in (prompt.text, prompt.glyphs, prompt.vision))
        return torch.cat(
            [
                self.vision(vision) + weight[2],
                self.glyphs(glyphs) + weight[1],
                self.refiner(text, level, attend) + weight[0],
            ],
            1,
        )
