"""Layers of Wan2.2's causal video VAE, whose parameters have the names of diffusers' checkpoint.

Beyond a clip's edges lie zeros. Resolution changes by nearest neighbours and strides; beside every stage what comes in
goes around it, spread over the finer grid or averaged on the coarser one. Activations are [B, C, T, H, W] and lie
channels last in memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldstride.models.video_codec import PAST, Carrying, ChannelNorm, Memory, group_means
from worldstride.models.video_passes import add_spread, fused, spread_into


class PastConv(Carrying, nn.Conv3d):
    """A convolution over three frames that sees two back and none ahead; frames and pixels of zeros lie beyond."""

    def __init__(self, channels: int, out: int, pixels: int = 3) -> None:
        """Over `pixels` rows and columns, 1 or 3."""
        super().__init__(channels, out, (PAST + 1, pixels, pixels), padding=(0, pixels // 2, pixels // 2))

    def forward(self, input: Tensor, memory: Memory | None = None) -> Tensor:
        """Frames [B, C, T, H, W] after those in memory -> [B, out, T, H, W]; memory keeps the last ones."""
        whole, own = self.room(input)
        own.copy_(input)
        return self.over(whole, memory)

    def room(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Carrying.room`: [B, C, 2 + T, H, W]"""
        batch, channels, count, height, width = x.shape
        size = (batch, channels, PAST + count, height, width)
        whole = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
        return whole, whole[:, :, PAST:]

    def over(self, whole: Tensor, memory: Memory | None) -> Tensor:
        """See `Carrying.over`."""
        own = whole[:, :, PAST:]
        whole[:, :, :PAST] = 0 if memory is None or memory.fresh else memory.past(self.name, own)
        if memory is not None:
            memory.kept[self.name] = whole[:, :, -PAST:].clone()
        return super().forward(whole)


class Residual(nn.Module):
    """x plus two convolutions, each after norm and SiLU; a 1x1x1 convolution takes x to another number of channels."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = ChannelNorm(channels), PastConv(channels, out)
        self.norm2, self.conv2 = ChannelNorm(out), PastConv(out, out)
        self.conv_shortcut = None if channels == out else nn.Conv3d(channels, out, 1)

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """x [B, C, T, H, W] -> [B, out, T, H, W]"""
        h = self.conv1.after(self.norm1, x, memory)
        h = self.conv2.after(self.norm2, h, memory)
        return h.add_(x if self.conv_shortcut is None else self.conv_shortcut(x))


class PixelAttention(nn.Module):
    """Attention of one head among a frame's pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, 2)
        self.to_qkv, self.proj = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W] -> the same shape"""
        h = self.norm(x).movedim(1, -1).flatten(2, 3)  # [B, T, H W, C]
        q, k, v = F.linear(h, self.to_qkv.weight.flatten(1), self.to_qkv.bias).chunk(3, -1)
        out = F.scaled_dot_product_attention(q, k, v)  # frames take the place of heads
        out = F.linear(out, self.proj.weight.flatten(1), self.proj.bias)
        return x + out.unflatten(2, x.shape[3:]).movedim(-1, 1)


class MidBlock(nn.Module):
    """Attention between two residual blocks, at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([PixelAttention(channels)])
        self.resnets = nn.ModuleList(Residual(channels, channels) for _ in range(2))

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """x [B, C, T, H, W] -> the same shape"""
        x = self.attentions[0](self.resnets[0](x, memory))
        return self.resnets[1](x, memory)


class Upsampler(nn.Module):
    """Twice the height and width and, with `temporal`, twice the frames, but for the one with which a clip begins."""

    eager = False
    """Whether a clip's first frame becomes two as well, of which the second is kept; else it goes on as it is."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(channels, channels, 3, padding=1))
        self.time_conv = PastConv(channels, 2 * channels, 1) if temporal else None

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """x [B, C, T, H, W] -> [B, C, T, 2 H, 2 W], or 2 T frames; less one with which a clip begins"""
        several = 1
        if self.time_conv is not None:
            if memory.fresh:
                x = self._begun(x, self.time_conv, memory)
            else:
                x, several = self.time_conv(x, memory), 2
        if fused(x):
            return _by_frame(self.resample[1], _finer(x, several))
        return _by_frame(self.resample, x if several == 1 else _interleaved(x))

    def _begun(self, x: Tensor, conv: PastConv, memory: Memory) -> Tensor:
        """Two frames of every one but a clip's first; one that goes on as it is is not seen by later ones."""
        if self.eager:
            return _interleaved(conv(x, memory))[:, :, 1:]
        if x.shape[2] > 1:
            return torch.cat([x[:, :, :1], _interleaved(conv(x[:, :, 1:], memory))], 2)
        memory.kept[conv.name] = torch.zeros_like(x).repeat(1, 1, PAST, 1, 1)
        return x


class Downsampler(nn.Module):
    """Half the height and width and, with `temporal`, half the frames: a clip's first frame stays one by itself."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W] -> [B, C, T, H / 2, W / 2], or 1 + (T - 1) / 2 frames"""
        x = _by_frame(self.resample, x)
        if self.time_conv is None or x.shape[2] == 1:
            return x
        return torch.cat([x[:, :, :1], self.time_conv(x)], 2)


def _by_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer of pictures over every frame of x [B, C, T, H, W]."""
    return layer(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)


def _interleaved(h: Tensor) -> Tensor:
    """Frames whose channels are two frames' [B, 2 C, T, H, W] -> [B, C, 2 T, H, W]"""
    pairs = h.movedim(1, -1).unflatten(-1, (2, -1)).movedim(4, 2)  # [B, T, 2, H, W, C]
    return pairs.flatten(1, 2).movedim(-1, 1)


def _finer(h: Tensor, several: int) -> Tensor:
    """Frames whose channels are several frames' [B, several C, T, H, W] -> [B, C, several T, 2 H, 2 W]

    Frames are interleaved, and pixels repeated, in one pass by a kernel.
    """
    batch, channels, count, height, width = h.shape
    size = (batch, channels // several, several * count, 2 * height, 2 * width)
    finer = torch.empty(size, dtype=h.dtype, device=h.device, memory_format=torch.channels_last_3d)
    for i, part in enumerate(h.chunk(several, 1)):
        spread_into(finer[:, :, i::several], part)
    return finer


def plus_spread(h: Tensor, x: Tensor, times: int, fresh: bool) -> Tensor:
    """h [B, C, times T, 2 H, 2 W] plus x [B, C m, T, H, W] spread over the finer grid, added in place.

    A value of C has 4 times finer cells (frame, row, column); m values of x, a power of two, fill them in that order.
    Where `fresh` and `times` is 2, the clip's first frame is one, with what would fill its second.
    """
    if fused(x) and fused(h) and h.dtype == x.dtype:
        add_spread(h, x, times, times - 1 if fresh else 0)
        return h
    if not fresh or times == 1:
        _cells(h, times).add_(_sources(x, h.shape[1], times))
        return h
    _cells(h[:, :, :1], 1).add_(_sources(x[:, :, :1], h.shape[1], times)[:, :, -1:])
    if x.shape[2] > 1:
        _cells(h[:, :, 1:], times).add_(_sources(x[:, :, 1:], h.shape[1], times))
    return h


def _cells(h: Tensor, times: int) -> Tensor:
    """h [B, C, times T, 2 H, 2 W] as [B, T, times, H, 2, W, 2, C], the same memory."""
    return h.movedim(1, -1).unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).unflatten(1, (-1, times))


def _sources(x: Tensor, channels: int, times: int) -> Tensor:
    """x [B, channels m, T, H, W] as [B, T, m_t, H, m_h, W, m_w, channels], each m the number of its values, 1 or 2."""
    several = x.shape[1] // channels
    over_time = min(several, times)
    over_rows = min(several // over_time, 2)
    values = x.movedim(1, -1).unflatten(-1, (channels, over_time, over_rows, -1))  # [B, T, H, W, C, m_t, m_h, m_w]
    return values.permute(0, 1, 5, 2, 6, 3, 7, 4)


def averaged(x: Tensor, out: int, times: int, space: int) -> Tensor:
    """Means [B, out, T, H, W] of x [B, C, times T, space H, space W]: channels and cells in order, equal groups each.

    A frame of zeros lies before a clip whose first frame stays one by itself.
    """
    x = F.pad(x, (0, 0, 0, 0, x.shape[2] % times, 0))
    cells = x.unflatten(4, (-1, space)).unflatten(3, (-1, space)).unflatten(2, (-1, times))
    return group_means(cells.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4), out)  # [B, C times space space, T, H, W]
