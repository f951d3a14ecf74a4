"""Layers of HunyuanVideo's causal VAE: convolutions that see no later frame, changes of resolution by pixel shuffling.

Activations are [B, C, T, H, W] and lie channels last in memory from the first convolution on, whatever came in: norms,
attention and shuffles work along channels. A frame here is one time step of whatever resolution in time a layer has.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldstride.models.video_codec import PAST, Carrying, ChannelNorm, Memory, group_means


class CausalConv(Carrying):
    """A 3x3x3 convolution that sees two frames back and none ahead; beyond edges lie replicated frames and pixels."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, out, PAST + 1)

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """x [B, C, T, H, W] after the frames in memory -> [B, out, T, H, W]; memory keeps the last frames.

        What the convolution reads is written once: copies of whole activations cost as much as norms do, and eager
        `F.pad` would undo channels last. A compiler makes one pass of the plain form, but five of this one.
        """
        if torch.compiler.is_compiling():
            frames = torch.cat([self._past(x, memory).expand(-1, -1, PAST, -1, -1), x], 2)
            return self._convolved(F.pad(frames, (1, 1, 1, 1, 0, 0), mode="replicate"), memory)
        whole, own = self.room(x)
        own.copy_(x)
        return self.over(whole, memory)

    def room(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Carrying.room`: [B, C, 2 + T, H + 2, W + 2]"""
        batch, channels, frames, height, width = x.shape
        size = (batch, channels, PAST + frames, height + 2, width + 2)
        whole = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
        return whole, whole[:, :, PAST:, 1:-1, 1:-1]

    def over(self, whole: Tensor, memory: Memory | None) -> Tensor:
        """See `Carrying.over`."""
        whole[:, :, :PAST, 1:-1, 1:-1] = self._past(whole[:, :, PAST:, 1:-1, 1:-1], memory)
        whole[:, :, :, 1:-1, 0] = whole[:, :, :, 1:-1, 1]
        whole[:, :, :, 1:-1, -1] = whole[:, :, :, 1:-1, -2]
        whole[:, :, :, 0] = whole[:, :, :, 1]
        whole[:, :, :, -1] = whole[:, :, :, -2]
        return self._convolved(whole, memory)

    def _past(self, x: Tensor, memory: Memory | None) -> Tensor:
        """The two frames before x, or one that stands for both."""
        return x[:, :, :1] if memory is None or memory.fresh else memory.past(self.name, x)

    def _convolved(self, padded: Tensor, memory: Memory | None) -> Tensor:
        """Of past frames and own ones, all with an edge around [B, C, 2 + T, H + 2, W + 2]."""
        if memory is not None:
            memory.kept[self.name] = padded[:, :, -PAST:, 1:-1, 1:-1].clone()
        return F.conv3d(padded, self.conv.weight, self.conv.bias)


class ResidualBlock(nn.Module):
    """x plus two convolutions, each after norm and SiLU; a 1x1x1 convolution takes x to another number of channels."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = ChannelNorm(channels), CausalConv(channels, out)
        self.norm2, self.conv2 = ChannelNorm(out), CausalConv(out, out)
        self.nin_shortcut = None if channels == out else nn.Conv3d(channels, out, 1)

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """x [B, C, T, H, W] -> [B, out, T, H, W]"""
        h = self.conv1.after(self.norm1, x, memory)
        h = self.conv2.after(self.norm2, h, memory)
        return h.add_(x if self.nin_shortcut is None else self.nin_shortcut(x))


class FrameAttention(nn.Module):
    """Attention of one head among a frame's pixels and, with `causal`, those of all earlier frames."""

    def __init__(self, channels: int, causal: bool) -> None:
        super().__init__()
        self.norm, self.causal = ChannelNorm(channels), causal
        self.q, self.k, self.v, self.proj_out = (nn.Conv3d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W] -> the same shape"""
        h = self.norm(x).movedim(1, -1).flatten(2, 3)  # [B, T, H W, C]
        q, k, v = (_pointwise(h, layer) for layer in (self.q, self.k, self.v))
        if self.causal and h.shape[1] > 1:
            seen = [(k[:, : t + 1].flatten(1, 2), v[:, : t + 1].flatten(1, 2)) for t in range(h.shape[1])]
            parts = [F.scaled_dot_product_attention(q[:, t], *pair) for t, pair in enumerate(seen)]
            out = torch.stack(parts, 1)
        else:
            out = F.scaled_dot_product_attention(q, k, v)  # frames take the place of heads
        return x + _pointwise(out, self.proj_out).unflatten(2, x.shape[3:]).movedim(-1, 1)


def _pointwise(x: Tensor, layer: nn.Conv3d) -> Tensor:
    """A 1x1x1 convolution of x [..., C], channels last."""
    return F.linear(x, layer.weight.flatten(1), layer.bias)


class Middle(nn.Module):
    """Attention between two residual blocks, at the lowest resolution."""

    def __init__(self, channels: int, causal: bool) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = FrameAttention(channels, causal)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """x [B, C, T, H, W] -> the same shape"""
        return self.block_2(self.attn_1(self.block_1(x, memory)), memory)


class Upsample(nn.Module):
    """Twice the height and width and, with `temporal`, twice the frames: of a clip's first frame only the first.

    Channels [rt, rh, rw, out] of a convolution, plus the input's channels repeated, become time and space.
    """

    def __init__(self, channels: int, out: int, temporal: bool) -> None:
        super().__init__()
        self.conv, self.temporal = CausalConv(channels, out * (8 if temporal else 4)), temporal

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """x [B, C, T, H, W] -> [B, out, T, 2 H, 2 W], or 2 T frames; less one with which a clip begins"""
        h = self.conv(x, memory)
        if not self.temporal or (memory is not None and not memory.fresh):
            return shuffle(_plus_repeated(h, x), 2 if self.temporal else 1)
        first = h[:, :, :1].unflatten(1, (4, 2, -1))[:, :, 0].flatten(1, 2)  # [B, rh rw out, 1, H, W]
        first = shuffle(_plus_repeated(first, x[:, :, :1]), 1)
        if x.shape[2] == 1:
            return first
        return torch.cat([first, shuffle(_plus_repeated(h[:, :, 1:], x[:, :, 1:]), 2)], 2)


def _plus_repeated(h: Tensor, x: Tensor) -> Tensor:
    """h [B, C n, T, H, W] plus every channel of x [B, C, T, H, W] n times in a row, added in place."""
    return h.unflatten(1, (x.shape[1], -1)).add_(x[:, :, None]).flatten(1, 2)


class Downsample(nn.Module):
    """Half the height and width and, with `temporal`, half the frames: a clip's first frame stays one by itself.

    Pixels become channels [rt, rh, rw, C] of a convolution's output, plus the means of groups of the input's own.
    """

    def __init__(self, channels: int, out: int, temporal: bool) -> None:
        super().__init__()
        self.conv, self.temporal, self.out = CausalConv(channels, out // (8 if temporal else 4)), temporal, out

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W] -> [B, out, T, H / 2, W / 2], or 1 + (T - 1) / 2 frames"""
        h = self.conv(x)
        if not self.temporal:
            return unshuffle(h, 1) + group_means(unshuffle(x, 1), self.out)
        first = unshuffle(h[:, :, :1], 1).repeat(1, 2, 1, 1, 1) + group_means(unshuffle(x[:, :, :1], 1), self.out)
        if x.shape[2] == 1:
            return first
        return torch.cat([first, unshuffle(h[:, :, 1:], 2) + group_means(unshuffle(x[:, :, 1:], 2), self.out)], 2)


def shuffle(x: Tensor, frames: int) -> Tensor:
    """x [B, (frames 2 2 C), T, H, W] -> [B, C, frames T, 2 H, 2 W]"""
    batch, _, time, height, width = x.shape
    cells = x.movedim(1, -1).unflatten(-1, (frames, 2, 2, -1)).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return cells.reshape(batch, frames * time, 2 * height, 2 * width, -1).movedim(-1, 1)


def unshuffle(x: Tensor, frames: int) -> Tensor:
    """x [B, C, frames T, 2 H, 2 W] -> [B, (frames 2 2 C), T, H, W]; undoes `shuffle`."""
    cells = x.movedim(1, -1).unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).unflatten(1, (-1, frames))
    return cells.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4).movedim(-1, 1)
