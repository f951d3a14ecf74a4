"""Matrix-Game-3.0's transformer: memory, past and new latents in one sequence, all of which attend to all.

What does not change from step to step is made once a chunk (`prepared`): rotary tables, what cameras do to every
block's tokens, what keyboard and mouse tell. The prompt's keys and values are made once a prompt (`text`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldstride.attention import Attend, of_layer
from worldstride.attention.streams import KeysValues
from worldstride.errors import InputError
from worldstride.models.compiled import compiled
from worldstride.models.layers import Embedder, modulated
from worldstride.models.matrix_game3.config import PATCH, SEEN, MG3Config
from worldstride.models.matrix_game3.layers import Block, Camera, Places, answered, looked, places
from worldstride.models.matrix_game3.rays import RayTable
from worldstride.models.matrix_game3.steering import UNTOLD_KEY, UNTOLD_MOUSE, Times, Told, grouped


@dataclass(frozen=True, eq=False)
class Text:
    """A prompt's keys and values."""

    pairs: tuple[KeysValues, ...]
    """[1, heads, L, head_dim], a pair a block."""
    bias: Tensor | None
    """Logarithm of how many rows each stands for [L]; None where each is one."""


class Frozen(NamedTuple):
    """What new latents see of all others in one block, as an evaluation left it behind."""

    keys: Tensor
    """[B, heads, N, head_dim], turned."""
    values: Tensor
    """[B, heads, N, head_dim]"""
    moving: KeysValues | None
    """Keys and values [B n, action heads, T, head_dim] of pixels over time, where the block is told actions."""


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

    def behind(self, latents: int, tokens: int) -> Prepared:
        """The same of the latents behind the first ones, which have so many tokens; the keyboard tells all of it."""
        return Prepared(
            0, Places(*(t[..., tokens:, :] for t in self.at)),
            tuple((scale[:, tokens:], shift[:, tokens:]) for scale, shift in self.seen),
            tuple(None if t is None else t._replace(mouse=t.mouse[:, latents:]) for t in self.told),
            Times(*(t[latents:] for t in self.times)),
        )  # fmt: skip


def shown(keys: Tensor, mouse: Tensor, memory: int, window: int) -> tuple[Tensor, Tensor]:
    """Keyboard [B, T, 12, 6] and mouse [B, T, 12, 2] as latents see them, of a window's frames [B, F, 6] and [B, F, 2].

    Of T latents the first `memory` are remembered ones, which are told nothing.
    """
    pressed, moved = (
        torch.cat([told.new_full((len(told), memory, SEEN, told.shape[2]), untold), grouped(told, window)], 1)
        for told, untold in ((keys, UNTOLD_KEY), (mouse, UNTOLD_MOUSE))
    )
    return pressed, moved


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
        self.look: Callable[..., tuple[Tensor, Tensor]] = Camera.forward
        """What computes a block around its attentions, and what cameras do to it; compiled functions may stand in for
        them."""

    def compile_passes(self) -> None:
        """Have torch compile what stands around attention, for any number of tokens after the first."""
        self.begin, self.ask, self.steer, self.press, self.end, self.look = map(
            compiled, (Block.begin, Block.ask, Block.steer, Block.press, Block.end, Camera.forward)
        )

    def text(self, states: Tensor) -> Text:
        """Keys and values of umT5's states [1, L, text], L at most `rows`.

        Rows of padding are attended to, too; they are all alike, so that one stands for them.
        """
        rows, count, bias = self.config.rows, self.text_rows(states), None
        if count < rows:
            states = F.pad(states, (0, 0, 0, 1))
            bias = torch.zeros(count + 1, device=states.device)
            bias[-1] = torch.tensor(float(rows - count)).log()
        words = self.prompt(states.to(self.enter.weight))
        return Text(tuple(block.words.of_text(words) for block in self._blocks()), bias)

    def text_rows(self, states: Tensor) -> int:
        """How many rows states have. `InputError` where they are no text of this network."""
        rows, count = self.config.rows, states.shape[1] if states.dim() == 3 else 0
        if len(states) != 1 or not 0 < count <= rows or states.shape[2] != self.config.text:
            raise InputError(
                f"text states must be [1, L, {self.config.text}], L from 1 to {rows}, got {list(states.shape)}"
            )
        return count

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
        see = shown(keys.to(weight), mouse.to(weight), memory, window)
        times = Times.of(self.config, [*range(memory), *range(window)], weight.device)
        steering = (block.steering for block in self._blocks())
        rows, columns = (n // self.config.side for n in table.size)
        seen = tuple(self.look(block.camera, p) for block in self._blocks())
        return Prepared(
            memory, places(self.config, numbers, rows, columns), seen,
            tuple(None if s is None else s.told(see[0], see[1], times) for s in steering), times,
        )  # fmt: skip

    def velocity(
        self, x: Tensor, levels: Tensor, memory: Tensor | None, chunk: Prepared, text: Text, attend: Attend,
        given: int = 0, left: list[Frozen] | None = None, frozen: Sequence[Frozen] = (),
    ) -> Tensor:  # fmt: skip
        """Velocity [B, T - given, C, h, w] of the window's latents x [B, T, C, h, w] but the first `given`.

        `levels` [B, T] are noise levels in thousandths, 0 of latents that are clean, and `memory` [B, M, C, h, w] the
        remembered ones. A list given as `left` is filled with what every block leaves behind of remembered and given
        latents; taken as `frozen` it stands in for them, and only the new latents are computed.
        """
        lead = chunk.memory
        if frozen:
            chunk = chunk.behind(lead + given, frozen[0].keys.shape[2])
            x, levels, lead, given = x[:, given:], levels[:, given:], 0, 0
        elif memory is not None:
            x, levels = torch.cat([memory.to(x.dtype), x], 1), F.pad(levels, (lead, 0))
        h, about = self._entered(x), self.level(levels)
        each = h.shape[1] // x.shape[1]
        rows = self.rows(F.silu(about)).unflatten(-1, (6, -1))  # [B, T, 6, width]
        first = (lead + given) * each
        for i, block in enumerate(self._blocks()):
            seen, told, past = chunk.seen[i], chunk.told[i], frozen[i] if frozen else None
            row, (q, k, v) = self.begin(block, h, rows, chunk.at)
            kept = None if left is None else (k[:, :, :first].clone(), v[:, :, :first].clone())
            if i + 1 == len(self.blocks) and told is None:  # nobody asks the others any more
                h, q, about = h[:, first:], q[:, :, first:], about[:, lead + given :]
                row, seen = tuple(r[:, lead + given :] for r in row), (seen[0][:, first:], seen[1][:, first:])
            how = of_layer(attend, i, "context" if past is None else "chunk")
            h, q = self.ask(block, h, looked(q, k, v, first, None if past is None else past[:2], how), row, seen)
            out, moving = answered(q, text.pairs[i], text.bias, attend), None
            if told is not None:
                h, (q, k, v) = self.steer(block, h, out, told, chunk.times)
                moving = None if left is None else (k[:, :, : lead + given].clone(), v[:, :, : lead + given].clone())
                if past is not None and past.moving is not None:
                    k, v = (torch.cat(pair, 2) for pair in zip(past.moving, (k, v), strict=True))
                h, q = self.press(block, h, attend(q, k, v), told, chunk.times)
                out = attend(q, told.keys, told.values)
            if left is not None and kept is not None:
                left.append(Frozen(*kept, moving))
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
