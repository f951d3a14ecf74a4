"""Passes of video VAEs in one kernel: against torch's operators, in Triton's interpreter on a CPU and on a GPU."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor

from attending import error, normal
from hy_golden import relative
from hy_variants import streamed
from wan_tiny import codec
from worldstride.attention import ops
from worldstride.bench.structure_hunyuan_vae import UpstreamDecoder
from worldstride.models import video_codec, video_passes
from worldstride.models.drawing import drawn
from worldstride.models.hy_worldplay.vae import VAEConfig, VideoVAE
from worldstride.models.hy_worldplay.vae_layers import CausalConv
from worldstride.models.video_codec import PAST, Carrying, ChannelNorm, Memory, laid_out
from worldstride.models.video_decoder import VideoDecoder
from worldstride.models.wan.vae import WanVAE, WanVAEConfig
from worldstride.models.wan.vae_layers import PastConv, Upsampler, plus_spread

pytestmark = pytest.mark.usefixtures("no_gradients")

INTERPRETED = importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    for operator in (video_passes.norm_silu_into, video_passes.add_spread, video_passes.spread_into):
        operator.register_kernel("cpu", operator._init_fn)
INTERPRETER = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter; on a GPU kernels run compiled")
GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
)  # fmt: skip
ON = [pytest.param("cpu", marks=INTERPRETER), pytest.param("cuda", marks=GPU)]
BOUND = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
HY = VAEConfig(latent_channels=4, block_out_channels=(8, 16, 16, 32, 32), layers_per_block=1)


@pytest.fixture
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Says whether kernels can run, wherever tensors lie. Convolutions are in float32 to the last bit meanwhile."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return lambda yes: monkeypatch.setattr(ops, "usable", lambda how, x: "" if yes else "no")


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


def sizes(device: str) -> list[tuple[int, ...]]:
    """Of activations: in the interpreter small ones, some of them larger than a program's part."""
    if device == "cpu":
        return [(1, 4, 1, 1, 2), (2, 12, 3, 5, 7), (1, 64, 1, 9, 11), (2, 4, 3, 19, 23)]
    return [(1, c, 3, 45, 77) for c in (64, 128, 256, 512, 1024)] + [(2, 12, 1, 5, 7), (1, 96, 4, 9, 11)]


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("device", ON)
def test_norm_and_activation_are_written_to_a_part_of_a_buffer(device: str, dtype: torch.dtype):
    for n, size in enumerate(sizes(device)):
        x = last(normal(*size, seed=n, dtype=dtype).to(device))
        norm = ChannelNorm(size[1]).to(device, dtype)
        norm.gamma.copy_(1 + 0.3 * normal(size[1], 1, 1, 1, seed=9))
        wide = x.double() / x.double().norm(dim=1, keepdim=True) * size[1] ** 0.5 * norm.gamma.double()
        truth = wide * wide.sigmoid()
        x[0, :, 0, 0, 0] = 0  # zeros stay zeros
        truth[0, :, 0, 0, 0] = 0
        for edge in (0, 1):
            whole = (size[0], size[1], PAST + size[2], size[3] + 2 * edge, size[4] + 2 * edge)
            buffer = last(torch.full(whole, 7, dtype=dtype, device=device))
            rows, columns = (slice(edge, edge + extent) for extent in size[3:])
            own = buffer[:, :, PAST:, rows, columns]
            assert video_passes.fused(x) == (device == "cuda")
            video_passes.norm_silu_into(x, norm.gamma.flatten(), own)
            assert relative(own, truth) <= torch.finfo(dtype).eps + 2e-6
            assert error(own, truth) <= BOUND[dtype] / 2
            own.fill_(7)
            assert bool((buffer == 7).all())  # and nothing else


@pytest.mark.parametrize("kind", [PastConv, CausalConv], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("device", ON)
def test_a_convolution_after_norm_and_activation_is_what_it_was(
    device: str, kind: Callable[[int, int], Carrying], by_kernels: Callable[[bool], None]
):
    for size in sizes(device)[-2:]:
        torch.manual_seed(0)
        conv, norm = laid_out(kind(size[1], 8)).to(device), ChannelNorm(size[1]).to(device)
        conv.name = "conv"
        x = last(normal(*size).to(device))
        results = list[list[Tensor]]()
        for yes in (False, True):
            by_kernels(yes)
            memory = Memory({})
            made = [conv.after(norm, x), conv.after(norm, x, memory)]
            following = Memory(memory.kept)
            made.append(conv.after(norm, x.flip(2), following))
            results.append([*made, memory.kept["conv"], following.kept["conv"]])
        plain, kernels = results
        assert all(relative(a, b) <= 1e-5 for a, b in zip(kernels, plain, strict=True))
        assert all(a.stride() == b.stride() for a, b in zip(kernels, plain, strict=True))


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize(("several", "times"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2), (8, 2)])
@pytest.mark.parametrize("device", ON)
def test_what_is_spread_is_added_to_the_bit(
    device: str, several: int, times: int, dtype: torch.dtype, by_kernels: Callable[[bool], None]
):
    for batch, channels, count, height, width in sizes(device):
        x = last(normal(batch, channels * several, count, height, width, dtype=dtype).to(device))
        for fresh in (False, True):
            frames = times * count - (times - 1 if fresh else 0)
            h = last(normal(batch, channels, frames, 2 * height, 2 * width, seed=1, dtype=dtype).to(device))
            by_kernels(False)
            plain = plus_spread(h.clone(), x, times, fresh)
            by_kernels(True)
            made = h.clone()
            assert plus_spread(made, x, times, fresh) is made
            if device == "cpu" and dtype == torch.bfloat16:  # the interpreter cuts bits off instead of rounding
                assert relative(made, plain) <= torch.finfo(dtype).eps
            else:
                assert torch.equal(made, plain)
            assert not torch.equal(made, h)


@pytest.mark.parametrize("temporal", [False, True])
@pytest.mark.parametrize("device", ON)
def test_finer_pictures_are_those_of_nearest_neighbours(
    device: str, temporal: bool, by_kernels: Callable[[bool], None]
):
    for size in sizes(device)[-2:]:
        torch.manual_seed(0)
        layer, x = laid_out(Upsampler(size[1], temporal)).to(device), last(normal(*size).to(device))
        results = list[list[Tensor]]()
        for yes in (False, True):
            by_kernels(yes)
            memory = Memory({})
            made = [layer(x, memory)]
            following = Memory(memory.kept)
            following.fresh = False
            results.append([*made, layer(x, following), *following.kept.values()])
        assert all(relative(a, b) <= 1e-5 for a, b in zip(*results, strict=True))


def wan(device: str, eager: bool) -> WanVAE:
    if device == "cpu":
        return deepcopy(codec())
    config = WanVAEConfig(base_dim=16, decoder_base_dim=64, z_dim=16)
    return laid_out(drawn(lambda: WanVAE(config, eager), torch.device(device), torch.float32, 0))


def hunyuan(device: str) -> VideoVAE:
    config = HY if device == "cpu" else VAEConfig(block_out_channels=(64, 128, 128, 256, 256), layers_per_block=1)
    return laid_out(drawn(lambda: VideoVAE(config), torch.device(device), torch.float32, 0))


VAES: dict[str, Callable[[str], WanVAE | VideoVAE]] = {
    "wan": lambda device: wan(device, False),
    "wan, eager": lambda device: wan(device, True),
    "hunyuan": hunyuan,
}


@pytest.mark.parametrize("name", VAES)
@pytest.mark.parametrize("device", ON)
def test_decoding_and_encoding_by_kernels(device: str, name: str, by_kernels: Callable[[bool], None]):
    vae = VAES[name](device)
    size = (2, 3) if device == "cpu" else (6, 10)
    channels = vae.config.z_dim if isinstance(vae, WanVAE) else vae.config.latent_channels
    z = 0.5 * normal(1, channels, 4, *size).to(device)
    clip = normal(1, 3, 5, 16 * size[0], 16 * size[1]).to(device)
    bound = 1e-5 if device == "cpu" else 1e-4  # convolutions differ with the number of frames
    by_kernels(False)
    plain, after = vae.decode(z, {})
    means = vae.encode(clip)
    by_kernels(True)
    whole, state = vae.decode(z, {})
    assert relative(whole, plain) <= bound
    assert all(relative(state[name], after[name]) <= bound for name in after)
    assert relative(vae.encode(clip), means) <= bound
    for split in ((1, 3), (2, 2)) if device == "cpu" else ((1, 3), (2, 2), (1, 1, 1, 1)):
        frames, own = streamed(vae, z, split)
        assert relative(frames, whole) <= bound
        assert all(relative(own[name], state[name]) <= bound for name in state)


def test_the_baseline_keeps_torchs_own_operators(by_kernels: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch):
    by_kernels(True)
    monkeypatch.setattr(video_codec, "norm_silu_into", lambda *given: pytest.fail("a kernel was asked for"))
    made, _ = UpstreamDecoder(VideoDecoder(hunyuan("cpu"), 32, 48)).decode(normal(1, 2, 4, 2, 3), {})
    assert made.shape == (1, 5, 32, 48, 3)


@pytest.mark.parametrize("device", ON)
def test_operators_do_what_their_fakes_and_schemas_say(device: str):
    x, gamma = last(normal(1, 4, 2, 3, 5).to(device)), torch.ones(4, device=device)
    fine = last(torch.zeros(1, 4, 2, 6, 10, device=device))
    for operator, given in (
        (torch.ops.worldstride.norm_silu_into, (x, gamma, torch.zeros_like(x))),
        (torch.ops.worldstride.add_spread, (fine[:, :, 1:], x, 1, 1)),
        (torch.ops.worldstride.spread_into, (fine, x)),
    ):
        torch.library.opcheck(operator.default, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("device", ON)
def test_what_kernels_do_not_take_is_written_out(device: str, by_kernels: Callable[[bool], None]):
    by_kernels(True)
    x = last(normal(1, 4, 2, 3, 5).to(device))
    weight = torch.nn.Parameter(torch.ones(4, device=device))
    assert video_passes.fused(x, weight)
    assert not video_passes.fused(x.double())
    assert not video_passes.fused(x.contiguous())
    assert not video_passes.fused(x[:, :, :0])
    with torch.enable_grad():
        assert video_passes.fused(x)
        assert not video_passes.fused(x, weight)
    by_kernels(False)
    assert not video_passes.fused(x)
