"""The causal video VAE of HunyuanVideo-1.5, as HY-WorldPlay uses it: 16 x 16 pixels of 4 frames are one latent pixel.

A world's first frame is a latent by itself. The decoder streams: every convolution's last input frames are a state
that the caller carries from call to call, and decoding latent by latent, chunk by chunk or at once is the same.
Parameters have the names of the original checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from torch import Tensor, nn

from worldstride.errors import InputError, did_you_mean, integer_from, number_in
from worldstride.models.hy_worldplay.vae_layers import CausalConv, Downsample, Middle, ResidualBlock, Upsample
from worldstride.models.video_codec import ChannelNorm, Codec, Memory, carried, check_clip, check_stream, group_means

_IGNORED = ("sample_size", "sample_tsize", "shift_factor")
"""Keys of a checkpoint's configuration that say nothing about the network, like all that begin with an underscore."""

Stage = tuple[int, int, bool | None]
"""A stage's channels; those of what it hands on; does it change the number of frames, too? None: no size at all."""


@dataclass(frozen=True)
class VAEConfig:
    """Every number that fixes the network. The defaults are the full size."""

    in_channels: int = 3
    """Channels of a frame given to the encoder."""
    out_channels: int = 3
    """Channels of a decoded frame."""
    latent_channels: int = 32
    """Channels of a latent."""
    block_out_channels: tuple[int, ...] = (128, 256, 512, 1024, 1024)
    """Channels of the stages from the finest resolution to the coarsest."""
    layers_per_block: int = 2
    """Residual blocks of an encoder stage; a decoder stage has one more."""
    ffactor_spatial: int = 16
    """Pixels of a latent pixel's height and width."""
    ffactor_temporal: int = 4
    """Frames of a latent after the first."""
    scaling_factor: float = 1.03682
    """What the world model's latents are divided by before they are decoded; `VideoVAE` does not apply it."""
    downsample_match_channel: bool = True
    """Downsampling already has the next stage's channels; otherwise its first residual block changes them."""
    upsample_match_channel: bool = True
    """The same for upsampling."""

    def __post_init__(self) -> None:
        for name in ("in_channels", "out_channels", "latent_channels", "layers_per_block"):
            integer_from(name, getattr(self, name), 1)
        for name in ("downsample_match_channel", "upsample_match_channel"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be true or false, got {getattr(self, name)!r}")
        number_in("scaling_factor", self.scaling_factor, 0, float("inf"), open_low=True)
        for name in ("ffactor_spatial", "ffactor_temporal"):
            value = getattr(self, name)
            integer_from(name, value, 1)
            if value & (value - 1):
                raise InputError(f"{name} must be a power of two, got {value}")
        if self.ffactor_temporal > self.ffactor_spatial:
            raise InputError(
                f"ffactor_temporal must be at most ffactor_spatial, {self.ffactor_spatial}, got {self.ffactor_temporal}"
            )
        self._check_channels()

    def _check_channels(self) -> None:
        widths = self.block_out_channels
        if not isinstance(widths, tuple) or len(widths) <= self.halvings:
            raise InputError(
                f"block_out_channels must be at least {self.halvings + 1} numbers of channels where ffactor_spatial is "
                f"{self.ffactor_spatial}, got {widths!r}"
            )
        for width in widths:
            integer_from("every one of block_out_channels", width, 1)
        if widths[-1] % (2 * self.latent_channels):
            raise InputError(
                f"the last of block_out_channels must be a multiple of twice latent_channels ({self.latent_channels}), "
                f"got {widths}"
            )
        for fine, coarse, temporal in (*self.encoder_stages, *((b, a, t) for a, b, t in self.decoder_stages)):
            times = 8 if temporal else 4  # values of a coarser pixel; 4 of the first frame's
            if temporal is not None and (coarse % times or 4 * fine % coarse):
                raise InputError(
                    f"block_out_channels must fit pixel shuffling: {coarse} channels next to {fine} must be a multiple "
                    f"of {times} and divide {4 * fine}, got {widths}"
                )

    @property
    def halvings(self) -> int:
        """Stages of the encoder that halve height and width."""
        return self.ffactor_spatial.bit_length() - 1

    @property
    def time_halvings(self) -> int:
        """Stages of the encoder that halve time, too."""
        return self.ffactor_temporal.bit_length() - 1

    @property
    def encoder_stages(self) -> list[Stage]:
        """The encoder's stages, which halve, time in the last of them."""
        times = range(self.halvings - self.time_halvings, self.halvings)
        return self._stages(self.block_out_channels, self.downsample_match_channel, times)

    @property
    def decoder_stages(self) -> list[Stage]:
        """The decoder's stages, which double, time in the first of them."""
        return self._stages(self.block_out_channels[::-1], self.upsample_match_channel, range(self.time_halvings))

    def _stages(self, widths: tuple[int, ...], match: bool, times: range) -> list[Stage]:
        changing = range(self.halvings)
        return [
            (width, widths[i + 1] if match and i in changing else width, i in times if i in changing else None)
            for i, width in enumerate(widths)
        ]

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> VAEConfig:
        """The configuration in a checkpoint's JSON; raises `InputError` where it names what this network has not."""
        known = [field.name for field in fields(cls)]
        if (shift := values.get("shift_factor")) is not None:
            raise InputError(f"shift_factor must be null or absent: latents of this VAE are not shifted, got {shift!r}")
        for name in values:
            if name not in (*known, *_IGNORED) and not name.startswith("_"):
                raise InputError(f"unknown VAE setting {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
        given: dict[str, object] = {name: values[name] for name in known if name in values}
        if isinstance(widths := given.get("block_out_channels"), list):
            given["block_out_channels"] = tuple(widths)
        return cls(**given)  # type: ignore[arg-type]


class EncoderStage(nn.Module):
    """Residual blocks, and half the resolution after them unless `temporal` is None."""

    def __init__(self, before: int, channels: int, out: int, blocks: int, temporal: bool | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(before if i == 0 else channels, channels) for i in range(blocks))
        self.downsample = None if temporal is None else Downsample(channels, out, temporal)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, before, T, H, W] -> [B, out, T', H', W']"""
        for block in self.block:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class DecoderStage(nn.Module):
    """Residual blocks, and twice the resolution after them unless `temporal` is None."""

    def __init__(self, before: int, channels: int, out: int, blocks: int, temporal: bool | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(before if i == 0 else channels, channels) for i in range(blocks))
        self.upsample = None if temporal is None else Upsample(channels, out, temporal)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """x [B, before, T, H, W] -> [B, out, T', H', W']"""
        for block in self.block:
            x = block(x, memory)
        return x if self.upsample is None else self.upsample(x, memory)


class Encoder(nn.Module):
    """Frames to the mean and log-variance of latents."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        width, last = config.block_out_channels[0], config.block_out_channels[-1]
        self.conv_in, self.down = CausalConv(config.in_channels, width), nn.ModuleList()
        for channels, out, temporal in config.encoder_stages:
            self.down.append(EncoderStage(width, channels, out, config.layers_per_block, temporal))
            width = out
        self.mid, self.norm_out = Middle(last, causal=True), ChannelNorm(last)
        self.conv_out = CausalConv(last, 2 * config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, F, H, W] -> [B, 2 C, T, h, w]: means, then log-variances"""
        x = self.conv_in(x)
        for stage in self.down:
            x = stage(x)
        x = self.mid(x)
        h = self.conv_out.after(self.norm_out, x)
        return h.add_(group_means(x, h.shape[1]))


class Decoder(nn.Module):
    """Latents to frames."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        width, last = config.block_out_channels[-1], config.block_out_channels[0]
        self.conv_in, self.mid = CausalConv(config.latent_channels, width), Middle(width, causal=False)
        self.up = nn.ModuleList()
        for channels, out, temporal in config.decoder_stages:
            self.up.append(DecoderStage(width, channels, out, config.layers_per_block + 1, temporal))
            width = out
        self.norm_out, self.conv_out = ChannelNorm(last), CausalConv(last, config.out_channels)

    def forward(self, z: Tensor, memory: Memory) -> Tensor:
        """z [B, C, T, h, w] after the latents in memory -> [B, 3, F, H, W]"""
        x = self.conv_in(z, memory)
        x = x.unflatten(1, (z.shape[1], -1)).add_(z[:, :, None]).flatten(1, 2)
        x = self.mid(x, memory)
        for stage in self.up:
            x = stage(x, memory)
        return self.conv_out.after(self.norm_out, x, memory)


class VideoVAE(Codec):
    """Frames in [-1, 1] to latents and back. Computes in the precision of its weights."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self._carried = carried(self.decoder)

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """See `video_decoder.VideoCodec.statistics`: this VAE's latents are scaled, not shifted."""
        channels = self.config.latent_channels
        return (0.0,) * channels, (1 / self.config.scaling_factor,) * channels

    def decode(self, z: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents z [B, C, T, h, w] and the state after the ones before -> frames [B, 3, F, 16 h, 16 w], new state.

        The state of a fresh world is empty; its first latent is one frame, every other four. Frames are the decoder's
        own output, not clamped. Every tensor of the state has worlds as its first dimension.
        """
        check_stream(z, state, self.config.latent_channels, self._carried)
        memory = Memory(state)
        frames = self.decoder(z.to(self.decoder.conv_in.conv.weight.dtype), memory)
        return frames, memory.kept

    def moments(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, each [B, C, 1 + k, H / 16, W / 16], of latents of frames [B, 3, 1 + 4 k, H, W]"""
        c = self.config
        check_clip(frames, c.in_channels, c.ffactor_spatial, c.ffactor_temporal)
        mean, log_variance = self.encoder(frames.to(self.encoder.conv_in.conv.weight.dtype)).chunk(2, 1)
        return mean, log_variance.clamp(-30, 20)
