"""Wan2.2's causal video VAE, as TI2V-5B has it: 16 x 16 pixels of 4 frames are one latent pixel.

A world's first frame is a latent by itself. The decoder streams: every convolution's last input frames are a state
that the caller carries from call to call, and decoding latent by latent, chunk by chunk or at once is the same.
Parameters have the names of diffusers' `AutoencoderKLWan`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from torch import Tensor, nn

from worldstride.errors import InputError, did_you_mean, integer_from
from worldstride.models.video_codec import ChannelNorm, Codec, Memory, carried, check_clip, check_stream
from worldstride.models.wan.vae_layers import (
    Downsampler,
    MidBlock,
    PastConv,
    Residual,
    Upsampler,
    averaged,
    plus_spread,
)

_FIXED: dict[str, object] = {"is_residual": True, "attn_scales": []}
"""What the published configuration says, in diffusers' words; anything else would be another network."""
_IDLE = {"dropout", "clip_output", "scale_factor_spatial", "scale_factor_temporal"}
"""Entries that change nothing here, or follow from others."""


@dataclass(frozen=True)
class WanVAEConfig:
    """Every number that fixes the network, in diffusers' words and spelling. The defaults are the full size.

    Statistics of latents have no default but none: mean 0, deviation 1.
    """

    base_dim: int = 160
    """Channels of the encoder's finest stage."""
    decoder_base_dim: int = 256
    """Channels of the decoder's finest stage."""
    z_dim: int = 48
    """Channels of a latent."""
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    """Channels of the stages from the finest to the coarsest, in units of the finest's."""
    num_res_blocks: int = 2
    """Residual blocks of an encoder stage; a decoder stage has one more."""
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    """For every stage of the encoder but the last: does it halve the number of frames, too?"""
    in_channels: int = 12
    """Channels of a patch of a frame."""
    out_channels: int = 12
    """The same of a decoded one."""
    patch_size: int = 2
    """Rows and columns of a patch."""
    latents_mean: tuple[float, ...] = ()
    """Mean of every channel of latents; none is 0."""
    latents_std: tuple[float, ...] = ()
    """Deviation of every channel of latents; none is 1."""

    def __post_init__(self) -> None:
        for name in ("base_dim", "decoder_base_dim", "z_dim", "num_res_blocks", "patch_size"):
            integer_from(name, getattr(self, name), 1)
        for name in ("dim_mult", "temperal_downsample", "latents_mean", "latents_std"):
            if not isinstance(getattr(self, name), tuple):
                raise InputError(f"{name} must be a list, got {getattr(self, name)!r}")
        for width in self.dim_mult:
            integer_from("every one of dim_mult", width, 1)
        for name in ("in_channels", "out_channels"):
            if getattr(self, name) != 3 * self.patch_size**2:
                right = f"3 colours of {self.patch_size} x {self.patch_size} pixels, {3 * self.patch_size**2}"
                raise InputError(f"{name} must be {right}, got {getattr(self, name)!r}")
        times = self.temperal_downsample
        if len(times) != len(self.dim_mult) - 1 or not all(isinstance(t, bool) for t in times):
            raise InputError(
                f"temperal_downsample must be true or false for {len(self.dim_mult) - 1} stages, got {times!r}"
            )
        for name in ("latents_mean", "latents_std"):
            given = getattr(self, name)
            if len(given) not in (0, self.z_dim) or not all(isinstance(n, (int, float)) for n in given):
                raise InputError(f"{name} must be {self.z_dim} numbers, got {len(given)}: {given!r}")
        if not all(n > 0 for n in self.latents_std):
            raise InputError(f"latents_std must be above 0, got {self.latents_std!r}")
        self._check_shortcuts()

    def _check_shortcuts(self) -> None:
        """What goes around stages must fill finer cells, or be averaged, in equal parts."""
        for before, out, cells in self._changes(self.decoder_widths, self.temperal_downsample[::-1]):
            several = before // out
            if before % out or several & (several - 1) or several > cells:
                raise InputError(
                    f"a decoder stage of {out} channels must follow one of as many or of a power of two times that, "
                    f"at most {cells}, got {before}; dim_mult is {self.dim_mult}"
                )
        last = (*self.encoder_widths[-2:], 1)
        for before, out, cells in (*self._changes(self.encoder_widths, self.temperal_downsample), last):
            if before * cells % out:
                raise InputError(
                    f"an encoder stage of {out} channels must divide the {before * cells} values that it sees; "
                    f"dim_mult is {self.dim_mult}"
                )

    @staticmethod
    def _changes(widths: tuple[int, ...], times: tuple[bool, ...]) -> list[tuple[int, int, int]]:
        """Channels before and in every stage that changes resolution, and finer cells of a coarser one."""
        return [(a, b, 8 if time else 4) for a, b, time in zip(widths, widths[1:], times, strict=False)]

    @property
    def encoder_widths(self) -> tuple[int, ...]:
        """Channels before the encoder's stages, and of each."""
        return tuple(self.base_dim * n for n in (1, *self.dim_mult))

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels before the decoder's stages, and of each."""
        return tuple(self.decoder_base_dim * n for n in (self.dim_mult[-1], *self.dim_mult[::-1]))

    @property
    def space(self) -> int:
        """Pixels of a latent pixel's height and width."""
        return self.patch_size * 2 ** (len(self.dim_mult) - 1)

    @property
    def time(self) -> int:
        """Frames of a latent after the first."""
        return 2 ** sum(self.temperal_downsample)

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> WanVAEConfig:
        """From the entries of a diffusers `config.json`; `InputError` on what this network cannot be."""
        known = [field.name for field in fields(cls)]
        given = dict[str, object]()
        for name, value in values.items():
            if name in _FIXED and value != _FIXED[name]:
                raise InputError(f"{name} must be {_FIXED[name]!r} for Wan2.2's VAE, got {value!r}")
            if name in known:
                given[name] = tuple(value) if isinstance(value, list) else value
            elif name not in _FIXED.keys() | _IDLE and not name.startswith("_"):
                raise InputError(f"unknown VAE setting {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
        if missing := sorted(set(known) - {"decoder_base_dim"} - given.keys()):
            raise InputError(f"the VAE's configuration lacks {', '.join(missing)}")
        if given.get("decoder_base_dim") is None:
            given["decoder_base_dim"] = given["base_dim"]
        return cls(**given)  # type: ignore[arg-type]


class DownBlock(nn.Module):
    """Residual blocks, and half the resolution after them unless `temporal` is None."""

    def __init__(self, before: int, out: int, blocks: int, temporal: bool | None) -> None:
        super().__init__()
        self.out, self.times, self.space = out, 2 if temporal else 1, 1 if temporal is None else 2
        self.resnets = nn.ModuleList(Residual(before if i == 0 else out, out) for i in range(blocks))
        self.downsampler = None if temporal is None else Downsampler(out, temporal)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, before, T, H, W] -> [B, out, T', H', W']"""
        h = x
        for block in self.resnets:
            h = block(h)
        h = h if self.downsampler is None else self.downsampler(h)
        return h + averaged(x, self.out, self.times, self.space)


class UpBlock(nn.Module):
    """Residual blocks, and twice the resolution after them unless `temporal` is None."""

    def __init__(self, before: int, out: int, blocks: int, temporal: bool | None) -> None:
        super().__init__()
        self.times = 2 if temporal else 1
        self.resnets = nn.ModuleList(Residual(before if i == 0 else out, out) for i in range(blocks))
        self.upsampler = None if temporal is None else Upsampler(out, temporal)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """x [B, before, T, H, W] -> [B, out, T', H', W']"""
        h = x
        for block in self.resnets:
            h = block(h, memory)
        if self.upsampler is None:
            return h
        return plus_spread(self.upsampler(h, memory), x, self.times, memory.fresh)


class WanEncoder(nn.Module):
    """Patches of frames to the mean and log-variance of latents."""

    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        widths, blocks = config.encoder_widths, config.num_res_blocks
        self.conv_in, self.down_blocks = PastConv(config.in_channels, widths[0]), nn.ModuleList()
        for before, out, temporal in zip(widths, widths[1:], (*config.temperal_downsample, None), strict=False):
            self.down_blocks.append(DownBlock(before, out, blocks, temporal))
        self.mid_block, self.norm_out = MidBlock(widths[-1]), ChannelNorm(widths[-1])
        self.conv_out = PastConv(widths[-1], 2 * config.z_dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 12, F, H, W] -> [B, 2 C, T, h, w]: means, then log-variances"""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out.after(self.norm_out, self.mid_block(x))


class WanDecoder(nn.Module):
    """Latents to patches of frames."""

    def __init__(self, config: WanVAEConfig) -> None:
        super().__init__()
        widths, blocks = config.decoder_widths, config.num_res_blocks + 1
        self.conv_in, self.mid_block = PastConv(config.z_dim, widths[0]), MidBlock(widths[0])
        self.up_blocks = nn.ModuleList()
        for before, out, temporal in zip(widths, widths[1:], (*config.temperal_downsample[::-1], None), strict=False):
            self.up_blocks.append(UpBlock(before, out, blocks, temporal))
        self.norm_out, self.conv_out = ChannelNorm(widths[-1]), PastConv(widths[-1], config.out_channels)

    def forward(self, z: Tensor, memory: Memory) -> Tensor:
        """z [B, C, T, h, w] after the latents in memory -> [B, 12, F, H, W]"""
        x = self.mid_block(self.conv_in(z, memory), memory)
        for block in self.up_blocks:
            x = block(x, memory)
        return self.conv_out.after(self.norm_out, x, memory)


class WanVAE(Codec):
    """Frames in [-1, 1] to latents and back. Computes in the precision of its weights."""

    def __init__(self, config: WanVAEConfig, eager: bool = False) -> None:
        """`eager` decodes as Matrix-Game-3.0 does, see `Upsampler.eager`."""
        super().__init__()
        self.config = config
        self.encoder, self.decoder = WanEncoder(config), WanDecoder(config)
        for module in self.decoder.modules():
            if isinstance(module, Upsampler):
                module.eager = eager
        self.quant_conv = nn.Conv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.post_quant_conv = nn.Conv3d(config.z_dim, config.z_dim, 1)
        self._carried = carried(self.decoder)

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """See `video_decoder.VideoCodec.statistics`."""
        c = self.config
        return c.latents_mean or (0.0,) * c.z_dim, c.latents_std or (1.0,) * c.z_dim

    def decode(self, z: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents z [B, C, T, h, w] and the state after the ones before -> frames [B, 3, F, 16 h, 16 w], new state.

        The state of a fresh world is empty; its first latent is one frame, every other four. Frames are the decoder's
        own output, not clamped. Every tensor of the state has worlds as its first dimension.
        """
        check_stream(z, state, self.config.z_dim, self._carried)
        memory = Memory(state)
        patches = self.decoder(self.post_quant_conv(z.to(self.post_quant_conv.weight.dtype)), memory)
        side = self.config.patch_size
        cells = patches.unflatten(1, (3, side, side)).permute(0, 1, 4, 5, 3, 6, 2)  # [B, 3, F, H, row, W, column]
        return cells.flatten(5).flatten(3, 4), memory.kept

    def moments(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, each [B, C, 1 + k, H / 16, W / 16], of latents of frames [B, 3, 1 + 4 k, H, W]"""
        check_clip(frames, 3, self.config.space, self.config.time)
        side = self.config.patch_size
        cells = frames.to(self.quant_conv.weight.dtype).unflatten(4, (-1, side)).unflatten(3, (-1, side))
        patches = cells.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)  # [B, (3 column row), F, H, W]
        mean, log_variance = self.quant_conv(self.encoder(patches)).chunk(2, 1)
        return mean, log_variance.clamp(-30, 20)
