"""The causal video VAE of HY-WorldPlay: golden decode, streaming, the encoder against diffusers, and what it refuses.

Sizes are tiny. On a CPU the golden case's convolutions sum in the same order however many frames they are given, so
decoding it piece by piece is held to equal bits in float32. At some sizes they do not (4 channels to 32 at 2 x 3
pixels); such cases are held to 1e-12 in float64.
"""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from functools import cache

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from hy_golden import GOLDEN, normal, relative
from hy_variants import streamed
from worldstride.errors import InputError
from worldstride.models.hy_worldplay.vae import VAEConfig, VideoVAE
from worldstride.models.hy_worldplay.vae_layers import shuffle, unshuffle
from worldstride.models.video_codec import ChannelNorm, laid_out

pytestmark = pytest.mark.usefixtures("no_gradients")

UNEVEN = VAEConfig(latent_channels=4, block_out_channels=(8, 16, 16, 32, 32), layers_per_block=1)
"""Other widths than the golden case's: channels are repeated and averaged in groups of several sizes."""
SHALLOW = replace(UNEVEN, block_out_channels=(8, 8, 16), ffactor_spatial=4)
UNMATCHED = replace(UNEVEN, downsample_match_channel=False, upsample_match_channel=False)


@cache
def golden() -> tuple[VideoVAE, Tensor, Tensor]:
    with safe_open(str(GOLDEN), "pt") as file:
        vae = VideoVAE(VAEConfig.from_json(json.loads(file.metadata()["vae_config"])))
        prefix = "vae/weights/decoder."
        weights = {
            name.removeprefix(prefix): file.get_tensor(name) for name in list(file.keys()) if name.startswith(prefix)
        }
        vae.decoder.load_state_dict(weights)  # strict: the names are upstream's
        return vae.eval(), file.get_tensor("vae/z"), file.get_tensor("vae/frames")


@cache
def golden_at_once() -> tuple[Tensor, dict[str, Tensor]]:
    vae, z, _ = golden()
    return vae.decode(z, {})


@cache
def seeded(config: VAEConfig) -> VideoVAE:
    torch.manual_seed(0)
    vae = VideoVAE(config).eval()
    for p in vae.parameters():
        p.data.add_(torch.randn_like(p) * 0.05)  # gammas, too
    return vae


def test_decode_is_the_golden_one():
    _, _, truth = golden()
    frames, _ = golden_at_once()
    assert relative(frames, truth) <= 1e-4


@pytest.mark.parametrize("split", [(5,), (1, 4), (4, 1), (1, 1, 3), (2, 3), (1, 1, 1, 1, 1)], ids=str)
def test_decoding_in_pieces_equals_decoding_at_once(split: tuple[int, ...]):
    vae, z, _ = golden()
    whole, after = golden_at_once()
    frames, state = streamed(vae, z, split)
    assert torch.equal(frames, whole)
    assert state.keys() == after.keys()
    assert all(torch.equal(state[name], after[name]) for name in after)


@pytest.mark.parametrize("config", [UNEVEN, UNMATCHED], ids=["matched", "unmatched"])
def test_pieces_equal_at_once_with_other_widths_and_an_odd_size(config: VAEConfig):
    vae, z = deepcopy(seeded(config)).double(), normal(1, 4, 3, 1, 3)
    whole, after = vae.decode(z, {})
    assert whole.shape == (1, 3, 9, 16, 48)
    for split in ((1, 2), (2, 1), (1, 1, 1)):
        frames, state = streamed(vae, z, split)
        assert relative(frames, whole) <= 1e-12
        assert all(relative(state[name], after[name]) <= 1e-12 for name in after)


def test_the_past_counts():
    vae, z, _ = golden()
    _, state = vae.decode(z[:, :, :2], {})
    after, _ = vae.decode(z[:, :, 2:3], state)
    assert after.shape[2] == 4
    _, other = vae.decode(z[:, :, 1:3], {})
    assert relative(vae.decode(z[:, :, 2:3], other)[0], after) > 1e-3


def test_a_given_state_is_not_modified_and_can_be_continued_twice():
    vae, z, _ = golden()
    _, state = vae.decode(z[:, :, :2], {})
    before = {name: tensor.clone() for name, tensor in state.items()}
    first, new = vae.decode(z[:, :, 2:4], state)
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], before[name]) for name in before)
    for tensor in new.values():
        tensor.zero_()  # nothing that the caller holds is shared
    assert torch.equal(vae.decode(z[:, :, 2:4], state)[0], first)


def test_the_state_holds_two_frames_a_convolution_and_nothing_more():
    _, state = golden_at_once()
    assert len(state) == 4 + 5 * 2 * 2 + 4 + 2  # mid, up, upsample, in and out
    for tensor in state.values():
        assert tensor.shape[:3:2] == (1, 2)
        assert tensor.untyped_storage().nbytes() == tensor.numel() * 4  # not a view of all activations


def test_a_batch_equals_its_worlds():
    vae = seeded(UNEVEN)
    worlds = [normal(1, 4, 3, 2, 3, seed=seed) for seed in range(2)]
    singles, states = zip(*(vae.decode(z[:, :, :2], {}) for z in worlds), strict=True)
    joint, _ = vae.decode(torch.cat([z[:, :, :2] for z in worlds]), {})
    assert relative(joint, torch.cat(singles)) <= 1e-5
    together = {name: torch.cat([state[name] for state in states]) for name in states[0]}
    after, state = vae.decode(torch.cat([z[:, :, 2:] for z in worlds]), together)
    alone = [vae.decode(z[:, :, 2:], own) for z, own in zip(worlds, states, strict=True)]
    assert relative(after, torch.cat([frames for frames, _ in alone])) <= 1e-5
    for i, (_, own) in enumerate(alone):
        assert all(relative(state[name][i : i + 1], own[name]) <= 1e-5 for name in own)
    images = torch.cat([normal(1, 3, 5, 16, 32, seed=seed) for seed in range(2)])
    assert relative(vae.encode(images), torch.cat([vae.encode(image[None]) for image in images])) <= 1e-5


RENAMED = (
    ("mid_block.attentions.0.to_", "mid.attn_1."),
    ("mid_block.attentions.0.", "mid.attn_1."),
    ("mid_block.resnets.0.", "mid.block_1."),
    ("mid_block.resnets.1.", "mid.block_2."),
    ("down_blocks.", "down."),
    ("up_blocks.", "up."),
    ("resnets.", "block."),
    ("downsamplers.0.", "downsample."),
    ("upsamplers.0.", "upsample."),
    ("conv_shortcut.", "nin_shortcut."),
)
"""Names in diffusers and upstream's."""


def into_diffusers(vae: VideoVAE):
    """diffusers' own VAE with the same configuration and weights."""
    from diffusers import AutoencoderKLHunyuanVideo15

    c = vae.config
    other = AutoencoderKLHunyuanVideo15(
        latent_channels=c.latent_channels,
        block_out_channels=c.block_out_channels,
        layers_per_block=c.layers_per_block,
        spatial_compression_ratio=c.ffactor_spatial,
        temporal_compression_ratio=c.ffactor_temporal,
        downsample_match_channel=c.downsample_match_channel,
        upsample_match_channel=c.upsample_match_channel,
    )
    weights, theirs = vae.state_dict(), dict[str, Tensor]()
    for name in other.state_dict():
        ours = name
        for old, new in RENAMED:
            ours = ours.replace(old, new)
        theirs[name] = weights.pop(ours)
    assert not weights
    other.load_state_dict(theirs)
    return other.eval()


CONFIGS = {
    "matched": UNEVEN,
    "unmatched": UNMATCHED,
    "two layers": replace(UNEVEN, block_out_channels=(8, 16, 32, 32, 64), layers_per_block=2),
    "8 x 8 x 2": replace(UNEVEN, block_out_channels=(8, 8, 16, 16), ffactor_spatial=8, ffactor_temporal=2),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_encode_is_that_of_diffusers(config: VAEConfig):
    vae = seeded(config)
    other = into_diffusers(vae)
    for latents in (1, 2, 3):
        frames = normal(1, 3, 1 + config.ffactor_temporal * (latents - 1), 32, 48)
        truth = other.encode(frames).latent_dist
        mean, log_variance = vae.moments(frames)
        assert relative(mean, truth.mean) <= 1e-5
        assert relative(log_variance, truth.logvar) <= 1e-5
        assert torch.equal(vae.encode(frames), mean)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_decode_is_that_of_diffusers_where_attention_is_within_a_latent(config: VAEConfig):
    vae, z = seeded(config), normal(1, 4, 3, 2, 3)
    other = into_diffusers(vae)  # decodes at once, and its attention sees earlier latents
    assert relative(vae.decode(z[:, :, :1], {})[0], other.decode(z[:, :, :1]).sample) <= 1e-5
    blind = deepcopy(vae)
    for p in blind.decoder.mid.attn_1.proj_out.parameters():
        p.data.zero_()
    assert relative(blind.decode(z, {})[0], into_diffusers(blind).decode(z).sample) <= 1e-5


def test_encode_is_causal():
    vae, frames = deepcopy(seeded(UNEVEN)).double(), normal(1, 3, 9, 16, 32)
    mean = vae.encode(frames)
    assert mean.shape == (1, 4, 3, 1, 2)
    assert relative(vae.encode(frames[:, :, :1]), mean[:, :, :1]) <= 1e-12
    assert relative(vae.encode(frames[:, :, :5]), mean[:, :, :2]) <= 1e-12


def test_the_full_size_has_the_checkpoints_parameters():
    with torch.device("meta"):
        vae = VideoVAE(VAEConfig())
    counts = [sum(p.numel() for p in part.parameters()) for part in (vae.encoder, vae.decoder)]
    assert [round(count / 1e6) for count in counts] == [389, 871]
    shapes = {name: tuple(p.shape) for name, p in vae.state_dict().items()}
    assert shapes["decoder.up.0.block.0.conv1.conv.weight"] == (1024, 1024, 3, 3, 3)
    assert shapes["decoder.up.1.upsample.conv.conv.weight"] == (512 * 8, 1024, 3, 3, 3)
    assert shapes["encoder.down.1.downsample.conv.conv.weight"] == (512 // 4, 256, 3, 3, 3)
    assert shapes["encoder.mid.attn_1.q.weight"] == (1024, 1024, 1, 1, 1)
    assert shapes["encoder.conv_out.conv.weight"] == (64, 1024, 3, 3, 3)
    assert not any("nin_shortcut" in name for name in shapes)


def test_the_full_size_decodes_a_chunk_to_frames_of_480_x_832():
    with torch.device("meta"):
        vae, z = VideoVAE(VAEConfig()).half(), torch.empty(1, 32, 4, 30, 52, dtype=torch.float16)
        frames, state = vae.decode(z, {})
        assert frames.shape == (1, 3, 13, 480, 832)
        frames, _ = vae.decode(z, state)
        assert frames.shape == (1, 3, 16, 480, 832)
        assert vae.encode(frames[:, :, :1]).shape == (1, 32, 1, 30, 52)
    assert sum(tensor.nbytes for tensor in state.values()) == pytest.approx(2.57 * 2**30, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_runs(dtype: torch.dtype):
    vae, z, frames = seeded(UNEVEN), normal(1, 4, 3, 2, 3), normal(1, 3, 5, 16, 32)
    half = deepcopy(vae).to(dtype)
    out, state = streamed(half, z, (1, 2))  # latents in float32 are taken, too
    assert out.dtype == dtype
    assert {tensor.dtype for tensor in state.values()} == {dtype}
    tolerance = 0.1 if dtype == torch.bfloat16 else 0.02
    assert relative(out, vae.decode(z, {})[0]) <= tolerance
    assert relative(half.encode(frames.to(dtype)), vae.encode(frames)) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_norm_is_in_float32(dtype: torch.dtype):
    x, norm = (normal(2, 16, 2, 3, 4) * 3000).to(dtype), ChannelNorm(16).to(dtype)  # squares are beyond float16
    norm.gamma.copy_(normal(16, 1, 1, 1))
    truth = x.double() / x.double().norm(dim=1, keepdim=True) * 4 * norm.gamma.double()
    assert relative(norm(x), truth) <= 2 * torch.finfo(dtype).eps
    assert not norm(torch.zeros_like(x)).any()


def test_channels_last_gives_the_same():
    vae, z, frames = seeded(UNEVEN), normal(1, 4, 3, 2, 3), normal(1, 3, 5, 16, 32)
    last = laid_out(deepcopy(vae))
    assert last.decoder.mid.block_1.conv1.conv.weight.stride(1) == 1
    out, state = last.decode(z[:, :, :2].contiguous(memory_format=torch.channels_last_3d), {})
    truth, own = vae.decode(z[:, :, :2], {})
    assert relative(out, truth) <= 1e-5
    assert relative(last.decode(z[:, :, 2:], own)[0], vae.decode(z[:, :, 2:], state)[0]) <= 1e-5
    assert relative(last.encode(frames), vae.encode(frames)) <= 1e-5


def test_a_compiler_sees_one_graph_and_the_same_values():
    vae, z = seeded(SHALLOW), normal(1, 4, 2, 1, 2)
    whole, _ = vae.decode(z, {})
    compiled = deepcopy(vae)
    compiled.decoder.compile(backend="eager", fullgraph=True)
    frames, _ = streamed(compiled, z, (1, 1))  # the fresh pass must not be taken for the second
    assert relative(frames, whole) <= 1e-5


def test_gradients_flow():
    vae = seeded(UNEVEN)
    with torch.enable_grad():
        frames = normal(1, 3, 5, 16, 32).requires_grad_()
        out, _ = vae.decode(vae.encode(frames), {})
        (gradient,) = torch.autograd.grad(out.square().sum(), frames)
    assert gradient.abs().amax((0, 1, 3, 4)).min() > 0


def test_shuffling_goes_back():
    x = normal(2, 3, 4, 6, 8)
    assert torch.equal(shuffle(unshuffle(x, 2), 2), x)
    cells = unshuffle(x, 2)
    assert cells.shape == (2, 24, 2, 3, 4)
    rt, rh, rw, channel = 1, 0, 1, 2
    assert torch.equal(cells[:, ((rt * 2 + rh) * 2 + rw) * 3 + channel], x[:, channel, rt::2, rh::2, rw::2])


def test_configuration_from_json():
    config = VAEConfig.from_json(
        {"block_out_channels": [8, 16, 16, 32, 32], "latent_channels": 4, "shift_factor": None}
    )
    assert config == replace(UNEVEN, layers_per_block=2)
    assert VAEConfig.from_json({"sample_size": 256, "_class_name": "AutoencoderKLConv3D"}) == VAEConfig()


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"latent_chanels": 4}, r"'latent_chanels' \(did you mean 'latent_channels'\?\)"),
        ({"shift_factor": 0.5}, "shift_factor must be null .* got 0.5"),
        ({"latent_channels": 0}, "latent_channels must be an integer of at least 1, got 0"),
        ({"latent_channels": 768}, r"multiple of twice latent_channels \(768\), got \(128, 256"),
        ({"block_out_channels": "128"}, "at least 5 numbers of channels where ffactor_spatial is 16, got '128'"),
        ({"block_out_channels": [128, 256]}, r"at least 5 numbers of channels .* got \(128, 256\)"),
        ({"block_out_channels": [128, 256, 512, 1024, 64.5]}, "block_out_channels must be an integer .* got 64.5"),
        (
            {"block_out_channels": [8, 16, 128, 128, 128]},
            "128 channels next to 16 must be a multiple of 4 and divide 64",
        ),
        ({"ffactor_spatial": 12}, "ffactor_spatial must be a power of two, got 12"),
        ({"ffactor_temporal": 32}, "ffactor_temporal must be at most ffactor_spatial, 16, got 32"),
        ({"scaling_factor": -1.0}, "scaling_factor must be a number above 0 .* got -1.0"),
        ({"upsample_match_channel": 1}, "upsample_match_channel must be true or false, got 1"),
    ],
)
def test_a_bad_configuration_is_named(values: dict[str, object], text: str):
    with pytest.raises(InputError, match=text):
        VAEConfig.from_json(values)


def test_bad_inputs_are_named():
    vae, z = seeded(UNEVEN), normal(1, 4, 1, 2, 3)
    with pytest.raises(InputError, match=r"\[B, 4, T, h, w\], got torch.float32 \[1, 5, 1, 2, 3\]"):
        vae.decode(normal(1, 5, 1, 2, 3), {})
    with pytest.raises(InputError, match=r"got torch.float32 \[4, 2, 3\]"):
        vae.decode(z[0, :, 0], {})
    with pytest.raises(InputError, match=r"got torch.int64 \[1, 4, 1, 2, 3\]"):
        vae.decode(z.long(), {})
    with pytest.raises(InputError, match=r"\[B, 3, F, H, W\], got torch.uint8 \[1, 3, 1, 16, 16\]"):
        vae.encode(torch.zeros(1, 3, 1, 16, 16, dtype=torch.uint8))
    with pytest.raises(InputError, match=r"1, 5, 9, ... frames \(1 \+ 4 k\), got 4"):
        vae.encode(normal(1, 3, 4, 16, 16))
    with pytest.raises(InputError, match="multiples of 16 pixels high and wide, got 16 x 24"):
        vae.encode(normal(1, 3, 1, 16, 24))


def test_a_foreign_state_is_named():
    vae, z = seeded(UNEVEN), normal(1, 4, 1, 2, 3)
    _, state = vae.decode(z, {})
    with pytest.raises(InputError, match="'conv_in' is missing"):
        vae.decode(z, {name: tensor for name, tensor in state.items() if name != "conv_in"})
    with pytest.raises(InputError, match="'a' is unknown"):
        vae.decode(z, {**state, "a": z})
    with pytest.raises(InputError, match=r"state\['conv_in'\] must be .*\[2, 4, 2, 2, 3\] .* got .*\[1, 4, 2, 2, 3\]"):
        vae.decode(normal(2, 4, 1, 2, 3), state)
    with pytest.raises(InputError, match=r"must be torch.float32 .* got torch.float16"):
        vae.decode(z, {name: tensor.half() for name, tensor in state.items()})
