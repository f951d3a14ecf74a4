"""HY-WorldPlay computed in the structure that upstream's code has: a baseline to measure against, never a way to play.

The same weights and the same mathematics, but (specification, sections 1 and 6, a to h): modulation for every token,
rotary tables built on the host in every forward and sent to the device again in every block, camera matrices for every
token, queries, keys and values projected apart, keys and values concatenated twice a block and step, both streams'
context stored, the last block of the context pass computed in full, autocast in half precision, which leaves layer
norms in float32 and rounds cameras, torch's default attention, and a decoder of that kind (`structure_hunyuan_vae`).
The specification does not tell where camera matrices are made, nor how tables are: here plainly, in every block, and
axis by axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from worldstride import camera
from worldstride.attention import Attend, Partial
from worldstride.attention.streams import KeysValues, Pieces, Places
from worldstride.bench.structure_hunyuan_vae import UpstreamDecoder
from worldstride.models.hy_worldplay.adapter import HYWorldPlay
from worldstride.models.hy_worldplay.model import Frames, HYNetwork, VideoBlock
from worldstride.models.layers import merged, rms_norm


class UpstreamStructure(HYNetwork):
    """A `HYNetwork` that shares another's weights; its contexts hold both streams' keys and values."""

    def __init__(self, network: HYNetwork) -> None:
        with torch.device("meta"):
            super().__init__(network.config)
        self.load_state_dict(network.state_dict(), assign=True)
        self.requires_grad_(False)

    def context(
        self, frames: Frames, text: Sequence[KeysValues], attend: Attend, past: Sequence[Pieces] = (),
        where: Places | None = None,
    ) -> Iterator[KeysValues]:  # fmt: skip
        """See `HYNetwork.context`; what is returned holds places and both streams."""
        x, about = self._entered(frames)
        tables = self._tables(frames, 0)
        tokens = about.repeat_interleave(x.shape[1] // about.shape[1], 1)
        for block, words in zip(self._blocks(), text, strict=True):
            with _autocast(x):
                x, own = _block(block, x, tokens, frames.at, tables, words, None)
            yield own

    def velocity(
        self, frames: Frames, text: Sequence[KeysValues], context: Sequence[Pieces], where: Places | None,
        attend: Attend, outer: list[Partial] | None = None, reused: Sequence[Partial] = (),
    ) -> Tensor:  # fmt: skip
        """See `HYNetwork.velocity`; nothing is captured, and nothing reused."""
        x, about = self._entered(frames)
        tables = self._tables(frames, 0 if where is None else where.latents)
        tokens = about.repeat_interleave(x.shape[1] // about.shape[1], 1)
        past = [pieces[0] for pieces in context] or [None] * len(self.video)
        for block, words, kept in zip(self._blocks(), text, past, strict=True):
            with _autocast(x):
                x, _ = _block(block, x, tokens, frames.at, tables, words, kept)
        return self._left(x, about, frames)

    def _tables(self, frames: Frames, first: int) -> tuple[Tensor, Tensor]:
        """Rotary tables [N, head_dim] of the whole window up to these latents, on the host, and theirs cut out."""
        count, height, width = first + frames.x.shape[1], *frames.x.shape[3:]
        grid = torch.meshgrid(*(torch.arange(float(n)) for n in (count, height, width)), indexing="ij")
        cosines, sines = list[Tensor](), list[Tensor]()
        for axis, channels in zip(grid, self.config.rope, strict=True):
            frequencies = self.config.theta ** (-torch.arange(0, channels, 2) / channels)
            angles = torch.outer(axis.flatten(), frequencies)
            cosines.append(angles.cos().repeat_interleave(2, 1))
            sines.append(angles.sin().repeat_interleave(2, 1))
        cut = slice(first * height * width, None)
        return torch.cat(cosines, 1)[cut], torch.cat(sines, 1)[cut]


def _block(
    block: VideoBlock, x: Tensor, vec: Tensor, at: Places, tables: tuple[Tensor, Tensor], text: KeysValues,
    context: KeysValues | None,
) -> tuple[Tensor, KeysValues]:  # fmt: skip
    """One block over tokens x [B, N, width], every token with an embedding of its own vec [B, N, width]."""
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(F.silu(vec)).chunk(6, -1)
    h = _normed(x, shift1, scale1)
    heads, (weights, biases) = block.project.heads, (block.project.qkv.weight.chunk(3), block.project.qkv.bias.chunk(3))
    q, k, v = (
        F.linear(h, w, b).unflatten(-1, (heads, -1)).transpose(1, 2) for w, b in zip(weights, biases, strict=True)
    )
    q, k = rms_norm(q, block.project.q_scale), rms_norm(k, block.project.k_scale)
    cos, sin = (table.to(x.device) for table in tables)  # pageable memory: the host waits
    project, unproject = _projections(at, x.shape[1] // at.latents)  # [B, N, 4, 4]
    queries = torch.cat([_turned(q, cos, sin), _mapped(q, project.mT)])
    keys = torch.cat([_turned(k, cos, sin), _mapped(k, unproject)])
    values = torch.cat([v, _mapped(v, unproject)])
    own, seen = (keys, values), (keys, values)
    if context is not None:
        seen = tuple(torch.cat([past, new], 2) for past, new in zip(context, own, strict=True))
    k_all, v_all = (
        torch.cat([words.expand(len(queries), -1, -1, -1), new], 2) for words, new in zip(text, seen, strict=True)
    )
    turned, carried = F.scaled_dot_product_attention(queries, k_all, v_all).chunk(2)
    first, second = block.out.weight.chunk(2, 1)
    out = F.linear(merged(turned), first, block.out.bias) + F.linear(merged(_mapped(carried, project)), second)
    x = x + gate1 * out
    return x + gate2 * block.mlp(_normed(x, shift2, scale2)), own


def _autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, x.dtype, enabled=x.dtype != torch.float32)


def _normed(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, heads, N, E] turned by tables [N, E], in float32."""
    wide = x.float()
    a, b = wide.unflatten(-1, (-1, 2)).unbind(-1)
    return (wide * cos + torch.stack([-b, a], -1).flatten(-2) * sin).to(x.dtype)


def _projections(at: Places, each: int) -> tuple[Tensor, Tensor]:
    """`places.projections` of cameras and intrinsics as `UpstreamWorldPlay.matrices` hands them on, for every token of
    latents with `each` tokens: both matrices are products of one by four that are built anew."""
    cameras, intrinsics = (m.repeat_interleave(each, 1) for m in at[2:])
    scale, unscale = (torch.zeros_like(cameras) for _ in range(2))
    for m, of in ((scale, intrinsics), (unscale, 1 / intrinsics)):
        m[..., 0, 0], m[..., 1, 1] = of[..., 0, 0], of[..., 1, 1]
        m[..., 2, 2] = m[..., 3, 3] = 1
    return scale @ camera.invert(cameras), cameras @ unscale


def _mapped(x: Tensor, matrices: Tensor) -> Tensor:
    """Every four channels of x [B, heads, N, E] by their token's matrix [B, N, 4, 4]."""
    return torch.einsum("bnij,bhnpj->bhnpi", matrices, x.unflatten(-1, (-1, 4))).flatten(-2)


class UpstreamWorldPlay(HYWorldPlay):
    """The model in upstream's structure."""

    def __init__(self, model: HYWorldPlay) -> None:
        decoder = UpstreamDecoder(model.decoder)
        network = UpstreamStructure(model.network)
        super().__init__(network, decoder, model.storage, model.steps, model.guidance)

    def matrices(self, cameras: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor]:
        """Cameras [B, T, 4, 4] and intrinsics [B, T, 3, 3] themselves: blocks make matrices of them."""
        given = cameras.float().to(self.device), intrinsics.float().to(self.device)
        return given[0], given[1].expand(*cameras.shape[:2], 3, 3)
