"""The courtyard network: a pixel-space flow transformer with a context pass that writes keys and values.

Context frames attend to each other once and leave keys and values behind; every solver step runs only the chunk's
own tokens against them. The network predicts the clean image (Li & He, 2025, arXiv 2511.13720); the velocity
follows from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldstride import rope
from worldstride.attention import Attend, LayerAttend, Partial, SparseAttend, merge, of_layer
from worldstride.models.courtyard.config import CourtyardConfig
from worldstride.models.courtyard.geometry import FEATURES, Geometry, projective_channels

KeysValues = tuple[Tensor, Tensor]
"""One block's context: keys and values [B, heads, tokens, head_dim], positions already applied."""


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """`layer` in the precision of x: master weights may be wider."""
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


def norm(x: Tensor) -> Tensor:
    """Layer norm without parameters, in float32."""
    return F.layer_norm(x.float(), (x.shape[-1],)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Root-mean-square norm over the last dimension, in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight).to(x.dtype)


class Block(nn.Module):
    """Attention and MLP, both modulated by the noise level through one table shared by all blocks."""

    def __init__(self, config: CourtyardConfig) -> None:
        super().__init__()
        width = config.width
        self.heads, self.projective = config.heads, projective_channels(config)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.table = nn.Parameter(torch.zeros(6, width))
        self.q_scale, self.k_scale = (nn.Parameter(torch.ones(config.head_dim)) for _ in range(2))
        nn.init.zeros_(self.o.weight)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(
        self,
        x: Tensor,  # [B, N, width]
        modulation: Tensor,  # [B, 6, width]
        cos: Tensor,  # [B, 1, N, pairs]
        sin: Tensor,
        project: Tensor | None,  # [B, F, 4, 4]
        unproject: Tensor | None,
        context: KeysValues | Partial | None,  # [B / R, heads, Nc, head_dim]: R chunks may share one context
        attend: Attend,
        split: bool = False,
        last: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Partial | None]:
        """Return the tokens, this block's own keys and values [B, heads, N, head_dim], and attention to the context.

        The latter only where it is kept apart from the rest: with `split`, or given as `context` from such a call.
        With `last` nobody asks for the tokens, and they are returned as they came.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation + self.table.to(x.dtype))[:, :, None].unbind(1)
        h = norm(x) * (1 + scale1) + shift1
        q, k, v = (linear(h, m).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        q, k = rms_norm(q, self.q_scale), rms_norm(k, self.k_scale)
        q, k, v = self._place(q, k, v, cos, sin, project, unproject)
        if last:
            return x, k, v, None
        out, outer = self._attend(q, k, v, context, attend, split)  # [B, heads, N, head_dim]
        if project is not None:
            out = self._mapped(out, project)
        x = x + (1 + gate1) * linear(out.transpose(1, 2).flatten(2), self.o)
        h = norm(x) * (1 + scale2) + shift2
        x = x + (1 + gate2) * linear(F.gelu(linear(h, self.up), approximate="tanh"), self.down)
        return x, k, v, outer

    @staticmethod
    def _attend(
        q: Tensor, k: Tensor, v: Tensor, context: KeysValues | Partial | None, attend: Attend, split: bool
    ) -> tuple[Tensor, Partial | None]:
        if context is None:
            return attend.within(q, k, v) if isinstance(attend, LayerAttend) else attend(q, k, v), None
        if isinstance(context, Partial):
            return merge(context, attend(q, k, v, lse=True)).out, context
        share = q.shape[0] // context[0].shape[0]
        past_k, past_v = (t.repeat_interleave(share, 0) if share > 1 else t for t in context)
        if isinstance(attend, LayerAttend) and share == 1:
            if not split:
                return attend.chunk(q, (past_k, past_v), (k, v)), None
            outer = attend.joined(q, past_k, past_v, past_k.shape[2], lse=True)
            return merge(outer, attend.joined(q, k, v, 0, lse=True)).out, outer
        if split:
            outer = attend(q, past_k, past_v, lse=True)
            return merge(outer, attend(q, k, v, lse=True)).out, outer
        return attend(q, torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)), None

    def _place(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        project: Tensor | None,
        unproject: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if project is None or unproject is None:
            return rope.rotate(q, cos, sin), rope.rotate(k, cos, sin), v
        p = self.projective
        q = torch.cat([self._mapped(q[..., :p], project.mT), rope.rotate(q[..., p:], cos, sin)], -1)
        k = torch.cat([self._mapped(k[..., :p], unproject), rope.rotate(k[..., p:], cos, sin)], -1)
        return q, k, self._mapped(v, unproject)

    def _mapped(self, x: Tensor, matrix: Tensor) -> Tensor:
        """The first `projective` channels of x [B, heads, F n, e] by one 4x4 matrix [B, F, 4, 4] a frame."""
        p, frames = self.projective, matrix.shape[1]
        part = x[..., :p].unflatten(2, (frames, -1))  # [B, heads, F, n, p]
        # a compiler fuses sums, and matrix units are wasted on 4x4; on a CPU the product is faster
        mapped = (map_by_sums if x.is_cuda else map_by_products)(part, matrix).flatten(2, 3)
        return mapped if x.shape[-1] == p else torch.cat([mapped, x[..., p:]], -1)


def map_by_products(part: Tensor, matrix: Tensor) -> Tensor:
    """Every four channels of part [B, heads, F, n, p] by one 4x4 matrix [B, F, 4, 4] a frame, in part's precision."""
    return (part.flatten(3).unflatten(-1, (-1, 4)) @ matrix.to(part.dtype).mT[:, None]).view(part.shape)


def map_by_sums(part: Tensor, matrix: Tensor) -> Tensor:
    """The same, summed in the matrix's precision."""
    groups = part.unflatten(-1, (-1, 1, 4))
    return (matrix[:, None, :, None, None] * groups).sum(-1).to(part.dtype).flatten(-2)


class Refine(nn.Module):
    """Small convolutions on the unpatched image; they see across patch borders, which no token does."""

    def __init__(self, config: CourtyardConfig) -> None:
        super().__init__()
        self.patch, self.grid, channels = config.patch, config.grid, config.refine
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.last = nn.Conv2d(channels, 3, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, tokens: Tensor, noisy: Tensor) -> Tensor:
        """tokens [N, n, (channels - 3) pixels] and noisy patches [N, n, 3 pixels] -> clean patches, likewise."""
        x, z = (unpatchify(t, self.grid, self.patch) for t in (tokens, noisy))
        h = torch.cat([x, z], 1).contiguous(memory_format=torch.channels_last)
        h = F.gelu(_convolve(h, self.first), approximate="tanh")
        return patchify(x[:, :3] + _convolve(h, self.last), self.patch)


def _convolve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    bias = None if conv.bias is None else conv.bias.to(x.dtype)
    return F.conv2d(x, conv.weight.to(x.dtype), bias, padding=1)


class CourtyardNetwork(nn.Module):
    """Stateless: two passes, `context` and `denoise`."""

    def __init__(self, config: CourtyardConfig) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.clean_in, self.noisy_in = nn.Linear(config.values, width), nn.Linear(config.values, width)
        self.camera_in = nn.Linear(FEATURES, width)
        self.place = nn.Parameter(torch.randn(config.tokens, width) * 0.02)
        self.level1, self.level2 = nn.Linear(32, width), nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final, self.final_level = nn.Parameter(torch.zeros(2, width)), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, (config.refine - 3 if config.refine else 3) * math.prod(config.patch))
        self.refine = Refine(config) if config.refine else None
        self.run: Callable[..., tuple[Tensor, Tensor, Tensor, Partial | None]] = Block.forward
        """What runs a block; a compiled `Block.forward` may stand in for it."""
        for layer in (self.level2, self.final_level, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def compile_passes(self, dynamic: bool | None = False) -> None:
        """Have torch compile blocks and refinement when they first run, once for every size of the tensors.

        With `dynamic` None sizes that were seen to change are left open from then on.
        """
        limits = torch._dynamo.config
        limits.recompile_limit = max(64, limits.recompile_limit)  # contexts have many sizes; 8 would be too few
        self.run = torch.compile(Block.forward, dynamic=dynamic)
        if self.refine is not None:
            self.refine.compile(dynamic=dynamic)

    def context(
        self,
        clean: Tensor,
        geometry: Geometry,
        sigma: Tensor,
        attend: Attend,
        spans: Sequence[tuple[int, int]] | None = None,
        past: Sequence[KeysValues | None] | None = None,
    ) -> list[KeysValues]:
        """Keys and values of context frames clean [B, F, n, values] that hold noise of level sigma [B].

        `spans` says which frames see each other (see `CourtyardConfig.spans`); None lets all of them. Where it is given
        they see `past`, too: another pass's keys and values, one pair a block.
        """
        parts, first = list[list[KeysValues]](), 0
        for frames, size in spans or [(clean.shape[1],) * 2]:
            some = clean[:, first : first + frames].unflatten(1, (-1, size)).flatten(0, 1)
            groups = frames // size
            where = geometry.part(first, frames, size)
            pairs = self._written(some, where, sigma.repeat_interleave(groups), attend, past)
            parts.append([(_ungrouped(k, groups), _ungrouped(v, groups)) for k, v in pairs])
            first += frames
        if len(parts) == 1:
            return parts[0]
        return [
            (torch.cat([k for k, _ in pairs], 2), torch.cat([v for _, v in pairs], 2))
            for pairs in zip(*parts, strict=True)
        ]

    def _written(
        self, clean: Tensor, geometry: Geometry, sigma: Tensor, attend: Attend, past: Sequence[KeysValues | None] | None
    ) -> list[KeysValues]:
        x = self.tokens(clean, self.clean_in, geometry)
        _, modulation = self.level(sigma, x.dtype)
        tables, written = self.tables(geometry, x.dtype), list[KeysValues]()
        for i, (block, seen) in enumerate(zip(self.blocks, past or (None,) * len(self.blocks), strict=True)):
            last = i + 1 == len(self.blocks)  # its tokens go nowhere
            run, how = self.how(attend, i, "context")
            x, k, v, _ = run(block, x, modulation, *tables, seen, how, False, last)
            written.append((k, v))
        return written

    def denoise(
        self,
        noisy: Tensor,
        geometry: Geometry,
        sigma: Tensor,
        context: Sequence[KeysValues | Partial | None],
        attend: Attend,
        outer: list[Partial] | None = None,
    ) -> Tensor:
        """Clean patches [B, F, n, values] predicted from noisy ones of level sigma [B] against the context.

        A list given as `outer` is filled with every block's attention to the context, for use as a later evaluation's
        context.
        """
        x = self.tokens(noisy, self.noisy_in, geometry)
        level, modulation = self.level(sigma, x.dtype)
        tables = self.tables(geometry, x.dtype)
        for i, (block, past) in enumerate(zip(self.blocks, context, strict=True)):
            run, how = self.how(attend, i, "chunk")
            x, _, _, part = run(block, x, modulation, *tables, past, how, outer is not None)
            if outer is not None and part is not None:
                outer.append(part)
        scale, shift = (linear(level, self.final_level).unflatten(-1, (2, -1)) + self.final)[:, :, None].unbind(1)
        x = linear(norm(x) * (1 + scale).to(x.dtype) + shift.to(x.dtype), self.out)
        frames, tokens = noisy.shape[1:3]
        x = x.unflatten(1, (frames, tokens)).flatten(0, 1)  # [B F, n, channels pixels]
        if self.refine is not None:
            x = self.refine(x, noisy.flatten(0, 1))
        return x.unflatten(0, (-1, frames))

    def how(self, attend: Attend, layer: int, kind: Literal["context", "chunk"]) -> tuple[Callable[..., Any], Attend]:
        """What runs a block, and how its tokens attend. Sparse attention keeps blocks between calls: not compiled."""
        if isinstance(attend, SparseAttend) and self.run is not Block.forward:
            attend.remark("the model's blocks ran uncompiled")
        return Block.forward if isinstance(attend, SparseAttend) else self.run, of_layer(attend, layer, kind)

    def tokens(self, patches: Tensor, layer: nn.Linear, geometry: Geometry) -> Tensor:
        """Tokens [B, F n, width] of patches [B, F, n, values] through the layer for clean or for noisy ones."""
        camera = linear(geometry.features.to(patches.dtype), self.camera_in)
        return (linear(patches, layer) + camera + self.place.to(patches.dtype)).flatten(1, 2)  # [B, F n, width]

    def level(self, sigma: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Embedding [B, width] of noise levels [B] in float32, and what it modulates blocks by [B, 6, width]."""
        wave = sigma.float()[:, None] * torch.exp(torch.linspace(0, 5.5, 16, device=sigma.device))
        level = F.silu(linear(torch.cat([wave.sin(), wave.cos()], -1), self.level1))  # [B, width], float32
        return level, linear(level, self.level2).unflatten(-1, (6, -1)).to(dtype)

    @staticmethod
    def tables(g: Geometry, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Where tokens are, as blocks take it."""
        return g.cos.to(dtype), g.sin.to(dtype), g.project, g.unproject


def _ungrouped(x: Tensor, groups: int) -> Tensor:
    """[B groups, heads, N, e] -> [B, heads, groups N, e]"""
    return x.unflatten(0, (-1, groups)).transpose(1, 2).flatten(2, 3)


def patchify(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Images [..., C, H, W] -> patches [..., n, C height width], row by row; patch = (height, width)."""
    lead = images.shape[:-3]
    channels, height, width = images.shape[-3:]
    cells = images.reshape(-1, channels, height // patch[0], patch[0], width // patch[1], patch[1])
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(*lead, -1, channels * math.prod(patch))


def unpatchify(patches: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Patches [..., rows columns, C height width] -> images [..., C, H, W]; undoes `patchify`."""
    lead, channels = patches.shape[:-2], patches.shape[-1] // math.prod(patch)
    cells = patches.reshape(-1, *grid, channels, *patch)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(*lead, channels, grid[0] * patch[0], grid[1] * patch[1])


def parameter_count(network: nn.Module) -> int:
    """Number of parameters."""
    return sum(math.prod(p.shape) for p in network.parameters())
