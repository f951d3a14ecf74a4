"""HY-WorldPlay's transformer: text once a prompt, context once a chunk, and the chunk's own tokens in every step.

Context latents leave keys and values behind as they are before any place is given to them: rank and camera enter when
they are attended to, so that what is kept of a latent stays true when the window moves on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldstride.attention import Attend, streams
from worldstride.attention.streams import KeysValues, Places
from worldstride.models.hy_worldplay.cached import CachedNetwork, Rows
from worldstride.models.hy_worldplay.config import HYConfig
from worldstride.models.hy_worldplay.layers import Projection
from worldstride.models.hy_worldplay.text import Prompt, TextBlock, TextEntry
from worldstride.models.layers import MLP, Embedder, gated, modulated


@dataclass(frozen=True, eq=False)
class Frames:
    """Latents as the network takes them."""

    x: Tensor
    """Noisy or clean latents [B, T, channels, h, w]."""
    condition: Tensor
    """The first image's latent and its mask [B, T, channels + 1, h, w]; zeros but for the world's first latent."""
    levels: Tensor
    """Noise levels in thousandths [B, T]."""
    labels: Tensor
    """Action labels [B, T], 0 to 80."""
    at: Places


class VideoBlock(nn.Module):
    """The video's half of a double-stream block."""

    def __init__(self, config: HYConfig) -> None:
        super().__init__()
        width = config.width
        self.modulation = nn.Linear(width, 6 * width)
        self.project, self.out = Projection(width, config.heads), nn.Linear(2 * width, width)
        self.mlp = MLP(width, config.hidden)

    def begin(self, x: Tensor, level: Tensor) -> tuple[Rows, tuple[Tensor, Tensor, Tensor]]:
        """What modulates x [B, N, width] at embedded levels [B, T, width], and its queries, keys and values."""
        rows = self.modulation(F.silu(level)).chunk(6, -1)
        return rows, self.project(modulated(x, rows[0], rows[1]))

    def end(self, x: Tensor, both: Tensor, rows: Rows) -> Tensor:
        """x after attention's result of both streams [B, N, 2 width] and the MLP."""
        x = gated(x, self.out(both), rows[2])
        return gated(x, self.mlp(modulated(x, rows[3], rows[4])), rows[5])


class HYNetwork(CachedNetwork[Frames]):
    """Stateless: `text`, `context`, `velocity`, and `joint` for models that know no cache."""

    def __init__(self, config: HYConfig) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.enter, self.level, self.action = (
            nn.Linear(2 * config.channels + 1, width),
            Embedder(width),
            Embedder(width),
        )
        self.prompt = TextEntry(config)
        self.video = nn.ModuleList(VideoBlock(config) for _ in range(config.depth))
        self.words = nn.ModuleList(TextBlock(config) for _ in range(config.depth))
        self.final, self.leave = nn.Linear(width, 2 * width), nn.Linear(width, config.channels)
        self.begin = VideoBlock.begin
        self.end: Callable[..., Tensor] = VideoBlock.end
        """What computes a block before and after attention; compiled functions may stand in for them."""

    def compile_passes(self) -> None:
        """Have torch compile what stands before and after attention, for the two numbers of tokens first met and then
        for any: attention itself, whose keys grow, is never compiled anew."""
        self.begin, self.end = torch.compile(VideoBlock.begin), torch.compile(VideoBlock.end)

    def text(self, prompt: Prompt, attend: Attend) -> list[KeysValues]:
        """Keys and values [1, heads, L, head_dim] of a prompt, a pair a block; they hold for every chunk."""
        prompt.check(self.config)
        level = torch.zeros(1, device=self.enter.weight.device)
        x, about, written = self.prompt(prompt, level, attend), self.level(level), list[KeysValues]()
        for block in self._text_blocks():
            rows, (q, k, v) = block.begin(x, about)
            written.append((k.contiguous(), v.contiguous()))
            if len(written) < len(self.words):  # the last block's tokens go nowhere
                x = block.end(x, attend(q, k, v), rows)
        return written

    def joint(self, frames: Frames, prompt: Prompt, level: float, attend: Attend) -> Tensor:
        """Velocity where text and video attend to each other in every evaluation; the text is at noise level `level`.

        The text goes on from what it gathered in the first stream (specification, section 2.7).
        """
        prompt.check(self.config)
        x, about = self._entered(frames)
        now = torch.full((1,), level, device=x.device)
        y, meaning = self.prompt(prompt, now, attend).expand(len(x), -1, -1), self.level(now)
        for block, words in zip(self._blocks(), self._text_blocks(), strict=True):
            rows, (q, k, v) = self.begin(block, x, about)
            told, (text_q, text_k, text_v) = words.begin(y, meaning)
            keys, values = streams.of_keys(k, v, frames.at)
            keys, values = (torch.cat([_twice(t), s], 2) for t, s in ((text_k, keys), (text_v, values)))
            both = streams.back(attend(streams.of_queries(q, frames.at), keys, values), frames.at)
            y = words.end(y, attend(text_q, keys[: len(x)], values[: len(x)]), told)
            x = self.end(block, x, both, rows)
        return self._left(x, about, frames)

    def _blocks(self) -> Sequence[VideoBlock]:
        return cast("Sequence[VideoBlock]", self.video)

    def _text_blocks(self) -> Sequence[TextBlock]:
        return cast("Sequence[TextBlock]", self.words)

    def _entered(self, frames: Frames) -> tuple[Tensor, Tensor]:
        planes = torch.cat([frames.x, frames.condition], 2).to(self.enter.weight.dtype)
        x = self.enter(planes.flatten(3).mT.flatten(1, 2))
        return x, self.level(frames.levels) + self.action(frames.labels)

    def _modulating(self, about: Tensor) -> Tensor:
        return about

    def _seen(self, words: KeysValues) -> KeysValues:
        return words

    def _through(
        self, block: VideoBlock, x: Tensor, rows: Rows, both: Tensor, words: KeysValues, attend: Attend
    ) -> Tensor:
        return self.end(block, x, both, rows)

    def _left(self, x: Tensor, about: Tensor, frames: Frames) -> Tensor:
        shift, scale = self.final(F.silu(about)).chunk(2, -1)
        planes = self.leave(modulated(x, shift, scale)).unflatten(1, (frames.x.shape[1], -1)).mT
        return planes.unflatten(-1, frames.x.shape[3:])


def _twice(x: Tensor) -> Tensor:
    """What is alike in both streams."""
    return torch.cat([x, x])
