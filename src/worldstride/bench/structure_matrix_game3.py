"""Matrix-Game-3.0 computed in the structure that upstream's code has: a baseline to measure against, not to play with.

The same weights and the same mathematics, but (specification, sections 2.1 to 2.6, 6 and 6.1): sequences padded to 20
latents, whose padding all products but the actions' pay for and no token attends to; noise levels, embedded from
float64, and their modulation for every token in float32, made again in every block; text embedded in every forward, its
512 rows' keys and values made in every block; rays of every pixel through their layer, the camera's tokens and every
block's scale and shift of them in every forward; rotary tables in complex128 laid out twice a block, for queries and
again for keys; queries, keys and values projected apart, in float32 where asked for; actions grouped, and the
keyboard's keys and values made, in every block; the last block and the head for all tokens; torch's default attention.

Kept as the port has them: retrieval, solver, noise, the decoder, its fused passes included, and the mouse's numbers,
which go through a layer of their own rather than joined with every token. The specification does not tell all.
Here rays are written out once a chunk, rotary angles come from tables along each axis, attention is in the model's
precision, as flash attention needs it, "action output bf16" (section 2.6) means that the stream is rounded there, and
padding comes out of it as zeros. Float32 copies of weights are made once, where autocast makes them in every forward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldstride.attention import Attend
from worldstride.errors import InputError
from worldstride.models.layers import gated, merged, modulated, rms_norm
from worldstride.models.matrix_game3 import rays
from worldstride.models.matrix_game3.adapter import MatrixGame3
from worldstride.models.matrix_game3.layers import Block, Places
from worldstride.models.matrix_game3.model import Frozen, MG3Network, Prepared, Text, shown
from worldstride.models.matrix_game3.rays import RayTable
from worldstride.models.matrix_game3.steering import Steering, Times

LATENTS = 20
"""What every sequence is padded to (specification, section 1)."""
Axes = tuple[Tensor, Tensor, Tensor]
"""Turns of latents, rows and columns: [n, heads, pairs] each, complex128."""


@dataclass(frozen=True, eq=False)
class RawText(Text):
    """A prompt as it came: `pairs` are empty."""

    states: Tensor
    """umT5's [1, L, text]."""


@dataclass(frozen=True, eq=False)
class RawChunk(Prepared):
    """What a chunk is told, as it came: `at`, `seen` and `told` are empty."""

    rays: Tensor
    """Origins and directions of tokens' pixels [B, N, 6144]."""
    axes: Axes
    keys: Tensor
    """Keyboard of the window's frames [B, F, 6]."""
    mouse: Tensor
    """[B, F, 2]"""

    @property
    def bytes(self) -> int:
        """Bytes of all of it."""
        tensors = (self.rays, *self.axes, self.keys, self.mouse, *self.times)
        return sum(t.numel() * t.element_size() for t in tensors)


class UpstreamStructure(MG3Network):
    """A `MG3Network` that shares another's weights, but for those that upstream computes with in float32."""

    def __init__(self, network: MG3Network, wide: bool) -> None:
        """Over a network; `wide` has projections of self-attention in float32, as the code that ships computes them."""
        with torch.device("meta"):
            super().__init__(network.config)
        self.load_state_dict(network.state_dict(), assign=True)
        self.requires_grad_(False)
        in_float: list[nn.Module] = [self.level, self.rows, self.leave]
        for block in self._blocks():
            in_float += [block.norm, block.project.qkv, block.out] if wide else [block.norm]
        for module in in_float:
            module.float()

    def text(self, states: Tensor) -> RawText:
        """See `MG3Network.text`; nothing is made of states yet."""
        self.text_rows(states)
        return RawText((), None, states.to(self.enter.weight))

    def ray_table(self, height: int, width: int) -> RayTable:
        """A table that knows frames' size alone."""
        none = self.enter.weight.new_empty(0)
        return RayTable(none, none, none, (height, width))

    def prepared(
        self, cameras: Tensor, numbers: Tensor, memory: int, keys: Tensor, mouse: Tensor, table: RayTable
    ) -> RawChunk:
        """See `MG3Network.prepared`; rays and angles are all that is made."""
        told = rays.told(cameras, *table.size).to(self.enter.weight.dtype).flatten(1, 2)
        rows, columns = (torch.arange(n // self.config.side, device=numbers.device) for n in table.size)
        times = Times.of(self.config, [*range(memory), *range(len(numbers) - memory)], numbers.device)
        none = Places(told.new_empty(0), told.new_empty(0))
        return RawChunk(memory, none, (), (), times, told, self._axes(numbers, rows, columns), keys, mouse)

    def velocity(
        self, x: Tensor, levels: Tensor, memory: Tensor | None, chunk: Prepared, text: Text, attend: Attend,
        given: int = 0, left: list[Frozen] | None = None, frozen: Sequence[Frozen] = (),
    ) -> Tensor:  # fmt: skip
        """See `MG3Network.velocity`; what was prepared must be of this network, `attend` is not asked, and nothing is
        left behind."""
        if not isinstance(chunk, RawChunk) or not isinstance(text, RawText):
            got = f"{type(chunk).__name__} and {type(text).__name__}"
            raise TypeError(f"upstream's structure needs what it prepared itself, got {got}")
        if memory is not None:
            x, levels = torch.cat([memory.to(x.dtype), x], 1), F.pad(levels, (chunk.memory, 0))
        latents = x.shape[1]
        if latents > LATENTS:
            raise InputError(f"upstream's sequences hold at most {LATENTS} latents, got {latents}")
        h = self._entered(x)
        each = h.shape[1] // latents
        padding = (LATENTS - latents) * each
        h = F.pad(h, (0, 0, 0, padding)).float()  # [B, N, width], N tokens of 20 latents
        about = self._embedded(F.pad(levels.repeat_interleave(each, 1), (0, padding)))  # [B, N, width]
        rows = self.rows(F.silu(about)).unflatten(-1, (6, -1))  # [B, N, 6, width]
        p = self.rays(F.pad(chunk.rays, (0, 0, 0, padding)))
        p = p + self.second(F.silu(self.first(p)))
        words = self.prompt(F.pad(text.states, (0, 0, 0, self.config.rows - text.states.shape[1])))
        for block in self._blocks():
            h = _block(block, h, rows, p, words, chunk)
        return self._left(h, about, x.shape[3:])[:, chunk.memory + given : latents]

    def _embedded(self, levels: Tensor) -> Tensor:
        """Of tokens' noise levels [B, N] -> [B, N, width], float32."""
        half = self.config.frequencies // 2
        steps = torch.arange(half, device=levels.device, dtype=torch.float64)
        wave = levels.double()[..., None] * torch.exp(-math.log(10_000) / half * steps)
        return self.level.second(F.silu(self.level.first(torch.cat([wave.cos(), wave.sin()], -1).float())))

    def _axes(self, *places: Tensor) -> Axes:
        """Of places along the three axes; every head has a base of its own (specification, section 2.3)."""
        config, device = self.config, places[0].device
        share = torch.linspace(-1, 1, config.heads, dtype=torch.float64, device=device)
        theta, made = config.theta * (1 + config.spread * share)[:, None], list[Tensor]()
        for at, pairs in zip(places, config.rope, strict=True):
            frequencies = theta ** (-torch.arange(pairs, dtype=torch.float64, device=device) / pairs)
            angles = at.double()[:, None, None] * frequencies
            made.append(torch.polar(torch.ones_like(angles), angles))
        return made[0], made[1], made[2]


def _block(block: Block, x: Tensor, level: Tensor, p: Tensor, words: Tensor, chunk: RawChunk) -> Tensor:
    """One block over tokens x [B, N, width], of which the first are real, with camera tokens p [B, N, width]."""
    real, project, dtype = chunk.rays.shape[1], block.project, p.dtype
    rows = (level + block.table).unbind(2)  # six times [B, N, width], float32
    q, k, v = _apart(project.qkv, 3, modulated(x, rows[0], rows[1]))
    q, k = rms_norm(q, project.q_scale), rms_norm(k, project.k_scale)
    q, k, v = _by_head((q, k, v), project.heads)
    q, k, v = _turned(q, chunk.axes).to(dtype), _turned(k, chunk.axes).to(dtype), v.to(dtype)
    out = F.scaled_dot_product_attention(q, k[:, :, :real], v[:, :, :real])
    x = gated(x, block.out(merged(out).to(block.out.weight.dtype)), rows[2])
    scale, shift = block.camera(p)
    x = block.norm((1 + scale) * x + shift)
    k, v = _apart(block.words.kv, 2, words)
    pair = _by_head((rms_norm(k, block.words.k_scale), v), project.heads)
    k, v = (t.expand(len(x), -1, -1, -1) for t in pair)  # [B, heads, 512, head_dim]
    x = x + block.told(merged(F.scaled_dot_product_attention(block.words(x.to(dtype)), k, v)))
    if block.steering is not None:
        x = F.pad(_steered(block.steering, x[:, :real].to(dtype), chunk), (0, 0, 0, x.shape[1] - real))
    return gated(x, block.mlp(modulated(x, rows[3], rows[4]).to(dtype)), rows[5])


def _steered(steering: Steering, x: Tensor, chunk: RawChunk) -> Tensor:
    """Real tokens x [B, T n, width] after the actions, each pixel's attentions by themselves."""
    batch, latents, times = len(x), len(chunk.times.cos), chunk.times
    told = steering.told(*shown(chunk.keys.to(x), chunk.mouse.to(x), chunk.memory, latents - chunk.memory), times)
    x = steering.moved_by(x, F.scaled_dot_product_attention(*steering.moving(x, told, times)))
    q = steering.asking(x, told, times).unflatten(2, (-1, latents)).transpose(1, 2)  # [B, n, heads, T, head_dim]
    keys, values = (t.repeat_interleave(q.shape[1], 0) for t in (told.keys, told.values))
    out = F.scaled_dot_product_attention(q.flatten(0, 1), keys, values)  # [B n, heads, T, head_dim]
    return steering.pressed_by(x, out.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3), told)


def _apart(layer: nn.Linear, count: int, x: Tensor) -> list[Tensor]:
    """What layers that are one here make of x, each by itself, in the precision of their weights."""
    x, weights = x.to(layer.weight.dtype), layer.weight.chunk(count)
    return [F.linear(x, w, b) for w, b in zip(weights, layer.bias.chunk(count), strict=True)]


def _by_head(tokens: Sequence[Tensor], heads: int) -> list[Tensor]:
    """Each of tokens [B, N, width] as [B, heads, N, head_dim]."""
    return [t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in tokens]


def _turned(x: Tensor, axes: Axes) -> Tensor:
    """x [B, heads, N, head_dim] in float32, real tokens turned; their table is laid out anew."""
    time, row, column = axes
    grid = (len(time), len(row), len(column), -1, -1)
    parts = (time[:, None, None], row[None, :, None], column[None, None])
    table = torch.cat([part.expand(grid) for part in parts], -1).flatten(0, 2)  # [real, heads, head_dim / 2] complex128
    h = x.transpose(1, 2).float()  # [B, N, heads, head_dim]
    pairs = torch.view_as_complex(h[:, : len(table)].unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * table.to(torch.complex64)).flatten(-2)
    return torch.cat([turned, h[:, len(table) :]], 1).transpose(1, 2)


class UpstreamMatrixGame3(MatrixGame3):
    """The model in upstream's structure, which has the context in every evaluation: nothing can be frozen."""

    capturing = None  # type: ignore[assignment]

    def __init__(self, model: MatrixGame3, wide: bool) -> None:
        """Over a model's weights.

        Args:
            model: what to rebuild.
            wide: whether projections of self-attention are in float32, as autocast leaves them in the code that ships
                (specification, section 2.6); otherwise they are in the model's precision.
        """
        network = UpstreamStructure(model.network, wide)
        super().__init__(network, model.decoder, model.storage, model.steps, model.guidance, model.rounded, model.shift)
