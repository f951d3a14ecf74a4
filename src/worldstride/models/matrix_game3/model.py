"""Matrix-Game-3.0's transformer: memory, past and new latents in one sequence, all of which attend to all.

What does not change from step to step is made once a chunk (`prepared`): rotary tables, what cameras do to every
block's tokens, what keyboard and mouse tell. The prompt's keys and values are made once a prompt (`text`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldstride.attention import Attend
from worldstride.attention.streams import KeysValues
from worldstride.errors import InputError
from worldstride.models.layers import Embedder, modulated
from worldstride.models.matrix_game3.config import KEYS, MOUSE, PATCH, MG3Config
from worldstride.models.matrix_game3.layers import Block, Places, answered, places
from worldstride.models.matrix_game3.rays import RayTable
from worldstride.models.matrix_game3.steering import UNTOLD_KEY, UNTOLD_MOUSE, Times, Told, grouped


@dataclass(frozen=True, eq=False)
class Text:
    """A prompt's keys and values."""

    pairs: tuple[KeysValues, ...]
    """[1, heads, L, head_dim], a pair a block."""
    bias: Tensor | None
    """Logarithm of how many rows each stands for [L]; None where each is one."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """What every step of a chunk reads."""

    memory: int
    """Remembered latents before the window."""
    at: Places
    seen: tuple[tuple[Tensor, Tensor], ...]
    """What cameras do to the tokens of every block: scale and shift [B, N, width]."""
    told: tuple[Told | None, ...]
    """What blocks are told of actions."""
    times: Times

    @property
    def bytes(self) -> int:
        """Bytes of all of it."""
        told = (t for block in self.told if block is not None for t in block)
        tensors = (*self.at, *(t for pair in self.seen for t in pair), *told, *self.times)
        return sum(t.numel() * t.element_size() for t in tensors)


class MG3Network(nn.Module):
    """Stateless: `text`, `prepared`, `velocity`."""

    def __init__(self, config: MG3Config) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.enter = nn.Linear(config.channels * PATCH**2, width)
        self.leave = nn.Linear(width, config.channels * PATCH**2)
        self.level, self.rows = Embedder(width, config.frequencies), nn.Linear(width, 6 * width)
        self.prompt = nn.Sequential(nn.Linear(config.text, width), nn.GELU("tanh"), nn.Linear(width, width))
        self.rays, self.first, self.second = (
            nn.Linear(config.camera, width), nn.Linear(width, width), nn.Linear(width, width),
        )  # fmt: skip
        self.blocks = nn.ModuleList(Block(config, i in config.steered) for i in range(config.depth))
        self.table = nn.Parameter(torch.zeros(1, 2, width))
        self.begin, self.ask, self.steer = Block.begin, Block.ask, Block.steer
        self.press: Callable[..., tuple[Tensor, Tensor]] = Block.press
        self.end: Callable[..., Tensor] = Block.end
        """What computes a block around its attentions; compiled functions may stand in for them."""

    def compile_passes(self) -> None:
        """Have torch compile what stands around attention, for the two numbers of tokens that chunks have."""
        self.begin, self.ask = torch.compile(Block.begin), torch.compile(Block.ask)
        self.steer, self.press = torch.compile(Block.steer), torch.compile(Block.press)
        self.end = torch.compile(Block.end)

    def text(self, states: Tensor) -> Text:
        """Keys and values of umT5's states [1, L, text], L at most `rows`.

        Rows of padding are attended to, too; they are all alike, so that one stands for them.
        """
        rows, count = self.config.rows, states.shape[1] if states.dim() == 3 else 0
        if len(states) != 1 or not 0 < count <= rows or states.shape[2] != self.config.text:
            raise InputError(
                f"text states must be [1, L, {self.config.text}], L from 1 to {rows}, got {list(states.shape)}"
            )
        bias = None
        if count < rows:
            states = F.pad(states, (0, 0, 0, 1))
            bias = torch.zeros(count + 1, device=states.device)
            bias[-1] = torch.tensor(float(rows - count)).log()
        words = self.prompt(states.to(self.enter.weight))
        return Text(tuple(block.words.of_text(words) for block in self._blocks()), bias)

    def ray_table(self, height: int, width: int) -> RayTable:
        """What the network makes of cameras for frames of this size; made once."""
        return RayTable.of(self.rays.weight, self.rays.bias, height, width)

    def prepared(
        self, cameras: Tensor, numbers: Tensor, memory: int, keys: Tensor, mouse: Tensor, table: RayTable
    ) -> Prepared:
        """What every step reads of a chunk of T latents, of which the first `memory` are remembered ones.

        Args:
            cameras: `rays.recalled` and `rays.stepwise` ones [B, T, 4, 4].
            numbers: places in time [T], remembered latents' own; [B, T] where worlds have different ones.
            keys: keyboard of the window's frames [B, F, 6].
            mouse: likewise [B, F, 2].
            table: of `ray_table`.
        """
        weight, latents = self.enter.weight, cameras.shape[1]
        p = table.tokens(cameras).to(weight.dtype).flatten(1, 2)  # [B, N, width]
        p = p + self.second(F.silu(self.first(p)))
        window = latents - memory
        see = [grouped(of.to(weight), window) for of in (keys, mouse)]
        if memory:
            untold = ((KEYS, UNTOLD_KEY), (MOUSE, UNTOLD_MOUSE))
            before = (
                s.new_full((len(s), memory, s.shape[2], n), value) for s, (n, value) in zip(see, untold, strict=True)
            )
            see = [torch.cat(pair, 1) for pair in zip(before, see, strict=True)]
        times = Times.of(self.config, [*range(memory), *range(window)], weight.device)
        steering = (block.steering for block in self._blocks())
        rows, columns = (n // self.config.side for n in table.size)
        return Prepared(
            memory, places(self.config, numbers, rows, columns), tuple(block.camera(p) for block in self._blocks()),
            tuple(None if s is None else s.told(see[0], see[1], times) for s in steering), times,
        )  # fmt: skip

    def velocity(
        self, x: Tensor, levels: Tensor, memory: Tensor | None, chunk: Prepared, text: Text, attend: Attend,
        given: int = 0,
    ) -> Tensor:  # fmt: skip
        """Velocity [B, T - given, C, h, w] of the window's latents x [B, T, C, h, w] but the first `given`.

        `levels` [B, T] are noise levels in thousandths, 0 of latents that are clean, and `memory` [B, M, C, h, w] the
        remembered ones.
        """
        lead = chunk.memory
        if memory is not None:
            x, levels = torch.cat([memory.to(x.dtype), x], 1), F.pad(levels, (lead, 0))
        h, about = self._entered(x), self.level(levels)
        each = h.shape[1] // x.shape[1]
        rows = self.rows(F.silu(about)).unflatten(-1, (6, -1))  # [B, T, 6, width]
        first = (lead + given) * each
        for i, block in enumerate(self._blocks()):
            seen, told = chunk.seen[i], chunk.told[i]
            row, (q, k, v) = self.begin(block, h, rows, chunk.at)
            if i + 1 == len(self.blocks) and told is None:  # nobody asks the others any more
                h, q, about = h[:, first:], q[:, :, first:], about[:, lead + given :]
                row, seen = tuple(r[:, lead + given :] for r in row), (seen[0][:, first:], seen[1][:, first:])
            h, q = self.ask(block, h, attend(q, k, v), row, seen)
            out = answered(q, text.pairs[i], text.bias, attend)
            if told is not None:
                h, (q, k, v) = self.steer(block, h, out, told, chunk.times)
                h, q = self.press(block, h, attend(q, k, v), told, chunk.times)
                out = attend(q, told.keys, told.values)
            h = self.end(block, h, out, row, told)
        latents = levels.shape[1] - lead - given
        return self._left(h[:, -latents * each :], about[:, -latents:], x.shape[3:])

    def _blocks(self) -> Sequence[Block]:
        return cast("Sequence[Block]", self.blocks)

    def _entered(self, x: Tensor) -> Tensor:
        patches = x.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH))  # [B, T, C, H, 2, W, 2]
        patches = patches.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)  # [B, T H W, 4 C]
        return self.enter(patches.to(self.enter.weight.dtype))

    def _left(self, h: Tensor, about: Tensor, size: Sequence[int]) -> Tensor:
        shift, scale = (about[:, :, None] + self.table).unbind(2)
        high, wide = (n // PATCH for n in size)
        patches = self.leave(modulated(h, shift, scale)).unflatten(-1, (PATCH, PATCH, -1))  # [B, T H W, 2, 2, C]
        planes = patches.unflatten(1, (-1, high, wide)).permute(0, 1, 6, 2, 4, 3, 5)  # [B, T, C, H, 2, W, 2]
        return planes.flatten(5).flatten(3, 4)
