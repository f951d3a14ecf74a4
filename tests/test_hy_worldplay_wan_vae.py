"""Wan2.2's VAE: equal to diffusers', and decoding in pieces equal to decoding at once."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hy_golden import normal, relative
from hy_variants import streamed
from wan_tiny import VAE, codec, codec_json
from worldstride.errors import InputError
from worldstride.models.video_codec import Memory, laid_out
from worldstride.models.video_decoder import VideoDecoder
from worldstride.models.wan.vae import WanVAE, WanVAEConfig
from worldstride.models.wan.vae_layers import PastConv, plus_spread

pytestmark = pytest.mark.usefixtures("no_gradients")

CONFIGS = {
    "like the published": replace(VAE, base_dim=2, num_res_blocks=2),
    "time first": replace(VAE, temperal_downsample=(True, True, False)),
    "time apart, equal widths": replace(VAE, dim_mult=(1, 1, 2, 2), temperal_downsample=(True, False, True)),
    "steep": replace(VAE, dim_mult=(1, 4, 4, 4)),
    "shallow": replace(VAE, dim_mult=(2, 4, 4), temperal_downsample=(True, True)),
}


@cache
def theirs(config: WanVAEConfig) -> Any:
    """diffusers' VAE with the same weights, by the same names."""
    diffusers = pytest.importorskip("diffusers")
    entries = {k: v for k, v in codec_json(config).items() if k[0] != "_" and k != "clip_output"}
    made = diffusers.AutoencoderKLWan(**entries)
    made.load_state_dict(codec(config).state_dict())
    return made.eval()


def latents(count: int, seed: int = 0, batch: int = 1) -> Tensor:
    return 0.5 * normal(batch, VAE.z_dim, count, 2, 3, seed=seed)


def clip(frames: int, config: WanVAEConfig = VAE) -> Tensor:
    return normal(1, 3, frames, 2 * config.space, 3 * config.space).clamp(-1, 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_decode_is_that_of_diffusers(name: str):
    config = CONFIGS[name]
    z, vae, other = latents(4), codec(config), theirs(config)
    truth = other.decode(z).sample
    made, _ = vae.decode(z, {})
    assert made.shape == (1, 3, 1 + 3 * config.time, 2 * config.space, 3 * config.space)
    assert truth.abs().lt(1).float().mean() > 0.5  # not all clamped
    assert relative(made.clamp(-1, 1), truth) <= 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_encode_is_that_of_diffusers(name: str):
    config = CONFIGS[name]
    for frames in (1, 1 + config.time, 1 + 3 * config.time):
        x = clip(frames, config)
        truth = theirs(config).encode(x).latent_dist
        mean, log_variance = codec(config).moments(x)
        assert relative(mean, truth.mean) <= 1e-5
        assert relative(log_variance, truth.logvar) <= 1e-5
        assert torch.equal(codec(config).encode(x), mean)


@pytest.mark.parametrize("split", [(1, 4), (4, 1), (2, 3), (1, 1, 3), (1, 1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("name", ["like the published", "time apart, equal widths"])
def test_decoding_in_pieces_equals_decoding_at_once(name: str, split: tuple[int, ...]):
    vae, z = codec(CONFIGS[name]), latents(5)
    whole, after = vae.decode(z, {})
    frames, state = streamed(vae, z, split)
    assert relative(frames, whole) <= 1e-5
    assert state.keys() == after.keys()
    assert all(relative(state[name], after[name]) <= 1e-5 for name in after)


def test_the_past_counts_and_a_given_state_is_not_modified():
    vae, z = codec(), latents(4)
    _, state = vae.decode(z[:, :, :2], {})
    before = {name: tensor.clone() for name, tensor in state.items()}
    after, new = vae.decode(z[:, :, 2:], state)
    assert all(torch.equal(state[name], before[name]) for name in before)
    _, other = vae.decode(latents(2, seed=9), {})
    assert relative(vae.decode(z[:, :, 2:], other)[0], after) > 1e-3
    for tensor in new.values():
        tensor.zero_()  # nothing that the caller holds is shared
    assert torch.equal(vae.decode(z[:, :, 2:], state)[0], after)


def test_the_state_holds_two_frames_a_convolution_and_nothing_more():
    vae = codec()
    for z in (latents(1), latents(4)):
        _, state = vae.decode(z, {})
        assert len(state) == 2 + 4 + 4 * 2 * 2 + 2  # in and out, middle, stages, two doublings of time
        for tensor in state.values():
            assert tensor.shape[:3:2] == (1, 2)
            assert tensor.untyped_storage().nbytes() == tensor.numel() * 4  # not a view of all activations


def test_a_batch_equals_its_worlds():
    vae, worlds = codec(), [latents(3, seed) for seed in range(2)]
    singles, states = zip(*(vae.decode(z[:, :, :2], {}) for z in worlds), strict=True)
    joint, _ = vae.decode(torch.cat([z[:, :, :2] for z in worlds]), {})
    assert relative(joint, torch.cat(singles)) <= 1e-5
    together = {name: torch.cat([state[name] for state in states]) for name in states[0]}
    after, _ = vae.decode(torch.cat([z[:, :, 2:] for z in worlds]), together)
    alone = [vae.decode(z[:, :, 2:], own)[0] for z, own in zip(worlds, states, strict=True)]
    assert relative(after, torch.cat(alone)) <= 1e-5


def test_convolutions_see_channels_last_memory_whatever_came_in(monkeypatch: pytest.MonkeyPatch):
    vae, z, plain, seen = deepcopy(codec()), latents(2), PastConv._conv_forward, list[bool]()
    assert laid_out(vae).decoder.conv_in.weight.stride(1) == 1

    def looked_at(self: PastConv, x: Tensor, *given: Any) -> Tensor:
        seen.append(x.is_contiguous(memory_format=torch.channels_last_3d))
        return plain(self, x, *given)

    monkeypatch.setattr(PastConv, "_conv_forward", looked_at)
    made, state = vae.decode(z, {})
    assert seen == [True] * len(state)
    assert relative(made, codec().decode(z, {})[0]) <= 1e-5
    assert relative(vae.decode(z, state)[0], codec().decode(z, state)[0]) <= 1e-5
    assert relative(vae.encode(clip(5)), codec().encode(clip(5))) <= 1e-5


@pytest.mark.parametrize(("several", "times"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2), (8, 2)])
def test_spreading_fills_frames_rows_and_columns_in_this_order(several: int, times: int):
    channels, count = 3, 2
    x = normal(1, channels * several, count, 2, 3)
    made = plus_spread(torch.zeros(1, channels, times * count, 4, 6), x, times, fresh=False)
    for c in range(channels):
        for i in range(times * 4):
            frame, row, column = i // 4, i % 4 // 2, i % 2
            source = x[:, c * several + i * several // (4 * times)]
            assert torch.equal(made[:, c, frame::times, row::2, column::2], source)
    first = plus_spread(torch.zeros(1, channels, times * count - times + 1, 4, 6), x, times, fresh=True)
    assert torch.equal(first, made[:, :, times - 1 :])


def test_latents_are_normalised_by_their_statistics():
    decoder = VideoDecoder(codec(), 32, 48)
    frames = torch.randint(256, (1, 1, 32, 48, 3), generator=torch.Generator().manual_seed(0)).byte()
    raw = codec().encode(frames.movedim(-1, 1).float() / 127.5 - 1)
    made = decoder.encode(frames)
    for c, (mean, deviation) in enumerate(zip(VAE.latents_mean, VAE.latents_std, strict=True)):
        assert relative(made[:, :, c], (raw[:, c] - mean) / deviation) <= 1e-5
    shown, _ = decoder.decode(made, {})
    truth = ((codec().decode(raw, {})[0].clamp(-1, 1) + 1) * 127.5).round().movedim(1, -1)
    assert int((shown - truth).abs().max()) <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_runs(dtype: torch.dtype):
    half, z = deepcopy(codec()).to(dtype), latents(3)
    out, state = streamed(half, z, (1, 2))  # latents in float32 are taken, too
    assert {out.dtype, *(tensor.dtype for tensor in state.values())} == {dtype}
    tolerance = 0.1 if dtype == torch.bfloat16 else 0.02
    assert relative(out, codec().decode(z, {})[0]) <= tolerance
    assert relative(half.encode(clip(5)), codec().encode(clip(5))) <= tolerance


def test_the_full_size_decodes_a_chunk_to_frames_of_704_x_1280():
    with torch.device("meta"):
        vae, z = WanVAE(WanVAEConfig()).bfloat16(), torch.empty(1, 48, 4, 44, 80, dtype=torch.bfloat16)
        frames, state = vae.decode(z, {})
        assert frames.shape == (1, 3, 13, 704, 1280)
        frames, state = vae.decode(z, state)
        assert frames.shape == (1, 3, 16, 704, 1280)
        assert vae.encode(frames[:, :, :1]).shape == (1, 48, 1, 44, 80)
    shapes = {name: tuple(p.shape) for name, p in vae.state_dict().items()}
    # anchors of the published file, and its size
    assert shapes["encoder.conv_in.weight"] == (160, 12, 3, 3, 3)
    assert shapes["decoder.conv_in.weight"] == (1024, 48, 3, 3, 3)
    assert shapes["quant_conv.weight"] == (96, 96, 1, 1, 1)
    assert len(shapes) == 196
    assert sum(p.numel() for p in vae.parameters()) == 704_688_668
    assert sum(tensor.nbytes for tensor in state.values()) < 3.1 * 2**30


def test_a_bad_configuration_is_named():
    good = codec_json()
    assert WanVAEConfig.from_json(good) == VAE
    assert WanVAEConfig.from_json({**good, "decoder_base_dim": None}) == replace(VAE, decoder_base_dim=4)
    for change, text in (
        ({"is_residual": False}, "is_residual must be True for Wan2.2's VAE, got False"),
        ({"z_dims": 4}, r"unknown VAE setting 'z_dims' \(did you mean 'z_dim'\?\)"),
        ({"z_dim": 0}, "z_dim must be an integer of at least 1, got 0"),
        ({"in_channels": 3}, "in_channels must be 3 colours of 2 x 2 pixels, 12, got 3"),
        ({"temperal_downsample": [True]}, r"true or false for 3 stages, got \(True,\)"),
        ({"latents_mean": [0.0]}, r"latents_mean must be 4 numbers, got 1: \(0.0,\)"),
        ({"latents_std": [1.0, 1.0, 0.0, 1.0]}, "latents_std must be above 0"),
        ({"dim_mult": [1, 2, 4, 3]}, "a decoder stage of 32 channels must follow .* got 24"),
        ({"dim_mult": [1, 2, 16, 16]}, "at most 4, got 128; dim_mult is"),
        ({"dim_mult": [1, 2, 2, 4]}, "an encoder stage of 16 channels must divide the 8 values"),
        ({"dim_mult": [1, 2, "4", 4]}, "every one of dim_mult must be an integer"),
        ({"dim_mult": 4}, "dim_mult must be a list, got 4"),
    ):
        with pytest.raises(InputError, match=text):
            WanVAEConfig.from_json({**good, **change})
    with pytest.raises(InputError, match="the VAE's configuration lacks latents_mean, latents_std"):
        WanVAEConfig.from_json({k: v for k, v in good.items() if not k.startswith("latents")})


def test_bad_inputs_are_named():
    vae, z = codec(), latents(1)
    _, state = vae.decode(z, {})
    for given, held, text in (
        (normal(1, 5, 1, 2, 3), {}, r"\[B, 4, T, h, w\], got torch.float32 \[1, 5, 1, 2, 3\]"),
        (z, {n: t for n, t in state.items() if n != "conv_in"}, "'conv_in' is missing"),
        (z, {**state, "a": z}, "'a' is unknown"),
        (latents(1, batch=2), state, r"state\['conv_in'\] must be .*\[2, 4, 2, 2, 3\] .* got .*\[1, 4, 2, 2, 3\]"),
        (z, {n: t.half() for n, t in state.items()}, "must be torch.float32 .* got torch.float16"),
    ):
        with pytest.raises(InputError, match=text):
            vae.decode(given, held)
    with pytest.raises(InputError, match=r"1, 5, 9, ... frames \(1 \+ 4 k\), got 4"):
        vae.encode(clip(4))
    with pytest.raises(InputError, match="multiples of 16 pixels high and wide, got 16 x 24"):
        vae.encode(normal(1, 3, 1, 16, 24))


def test_a_clips_first_frame_is_not_seen_by_those_that_doubling_makes():
    """The convolution over time that doubles frames begins with zeros behind the first one, as diffusers' does."""
    upsampler, x = deepcopy(codec().decoder.up_blocks[0].upsampler), normal(1, 32, 3, 2, 3)
    upsampler.time_conv.name = "upsampler.time_conv"
    made = upsampler(x, Memory({}))
    other = upsampler(torch.cat([-x[:, :, :1], x[:, :, 1:]], 2), Memory({}))
    assert made.shape[2] == 5
    assert torch.equal(made[:, :, 1:], other[:, :, 1:])
    assert not torch.equal(made[:, :, :1], other[:, :, :1])
