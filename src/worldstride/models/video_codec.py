"""What causal video VAEs share: the memory of a stream, checks of what comes in, and a norm over channels.

Activations are [B, C, T, H, W] and lie channels last in memory. A frame here is one time step of whatever resolution in
time a layer has.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldstride.errors import InputError
from worldstride.models.video_passes import fused, norm_silu_into

Laid = TypeVar("Laid", bound=nn.Module)
PAST = 2
"""Frames before a frame that a convolution sees."""


class Memory:
    """What a stream's convolutions remember: their last input frames [B, C, 2, H, W], by the convolution's name."""

    def __init__(self, given: Mapping[str, Tensor]) -> None:
        self.given = given
        self.kept: dict[str, Tensor] = {}
        self.fresh = not given
        """Nothing came before. A value of its own: `torch.compile` guards one, but not whether a dict is empty."""

    def past(self, name: str, x: Tensor) -> Tensor:
        """The convolution's frames [B, C, 2, H, W] before x [B, C, T, H, W]; `InputError` where they do not fit."""
        past, shape = self.given[name], (*x.shape[:2], PAST, *x.shape[3:])
        if past.shape != shape or past.dtype != x.dtype or past.device != x.device:
            raise InputError(
                f"state[{name!r}] must be {x.dtype} {list(shape)} on {x.device} to go on with these latents, "
                f"got {past.dtype} {list(past.shape)} on {past.device}"
            )
        return past


class Carrying(nn.Module):
    """A convolution that remembers frames in a `Memory`, by a name that `carried` gives it."""

    name = ""

    def after(self, norm: ChannelNorm, x: Tensor, memory: Memory | None = None) -> Tensor:
        """The layer over SiLU of the norm of x [B, C, T, H, W].

        Where kernels can, they write that to where the convolution reads it, see `norm_silu_into`.
        """
        if not fused(x, norm.gamma):
            return self(F.silu(norm(x), inplace=True), memory)
        whole, own = self.room(x)
        norm_silu_into(x, norm.gamma.flatten(), own)
        return self.over(whole, memory)

    @abstractmethod
    def room(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the convolution reads, still empty and channels last in memory, and the part of it that x fills."""

    @abstractmethod
    def over(self, whole: Tensor, memory: Memory | None) -> Tensor:
        """The convolution of what it reads, filled but for what lies before frames and beyond edges."""


def carried(decoder: nn.Module) -> list[str]:
    """Names of what a decoder remembers; every layer that does is told its own."""
    layers = {name: module for name, module in decoder.named_modules() if isinstance(module, Carrying)}
    for name, layer in layers.items():
        layer.name = name
    return list(layers)


def check_stream(z: Tensor, state: Mapping[str, Tensor], channels: int, names: Sequence[str]) -> None:
    """Refuse, by `InputError`, what is neither latents [B, channels, T, h, w] nor what decoding others left behind."""
    if z.ndim != 5 or z.shape[1] != channels or 0 in z.shape or not z.is_floating_point():
        raise InputError(f"latents must be floating-point [B, {channels}, T, h, w], got {z.dtype} {list(z.shape)}")
    if state and state.keys() != set(names):
        odd = sorted(state.keys() ^ set(names))
        raise InputError(
            f"state must be empty or what decode returned, one tensor for each of {len(names)} "
            f"convolutions; {odd[0]!r} is {'unknown' if odd[0] in state else 'missing'}"
        )


def check_clip(frames: Tensor, channels: int, space: int, time: int) -> None:
    """Refuse, by `InputError`, what is no clip [B, channels, 1 + time k, space h, space w]."""
    shape = list(frames.shape)
    if frames.ndim != 5 or shape[1] != channels or 0 in shape or not frames.is_floating_point():
        raise InputError(f"frames must be floating-point [B, {channels}, F, H, W], got {frames.dtype} {shape}")
    if (shape[2] - 1) % time:
        raise InputError(f"a clip must have 1, {1 + time}, {1 + 2 * time}, ... frames (1 + {time} k), got {shape[2]}")
    if shape[3] % space or shape[4] % space:
        raise InputError(f"frames must be multiples of {space} pixels high and wide, got {shape[3]} x {shape[4]}")


def laid_out(network: Laid) -> Laid:
    """The network, its convolutions' weights laid out in memory as activations lie: saves a GPU turning them around.

    `to(memory_format=...)` cannot, for the norms' weights have four dimensions.
    """
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            module.weight.data = module.weight.data.contiguous(memory_format=formats[module.weight.ndim])
    return network


class Codec(nn.Module):
    """A VAE that is played with."""

    @abstractmethod
    def moments(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, each [B, C, 1 + k, H / 16, W / 16], of latents of frames [B, 3, 1 + 4 k, H, W]"""

    def encode(self, frames: Tensor) -> Tensor:
        """Frames [B, 3, 1 + 4 k, H, W] in [-1, 1] -> means of latents [B, C, 1 + k, H / 16, W / 16]"""
        return self.moments(frames)[0]


class ChannelNorm(nn.Module):
    """Root-mean-square norm over channels, in float32."""

    def __init__(self, channels: int, dims: int = 3) -> None:
        """`dims`: dimensions of a published weight behind its channels."""
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, T, H, W] -> x / |x| sqrt(C) gamma, channels last in memory."""
        last = x.movedim(1, -1).contiguous()  # sums in the same order, however many frames there are
        return F.rms_norm(last, last.shape[-1:], self.gamma.flatten(), 1e-24).movedim(-1, 1)


def group_means(x: Tensor, out: int) -> Tensor:
    """Means of channels that lie side by side: x [B, out n, T, H, W] -> [B, out, T, H, W]"""
    return x.unflatten(1, (out, -1)).mean(2)
