"""Matrix-Game-3.0 from files: the published layout, a repack for diffusers, native and pruned VAEs, random weights."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import worldstride
from hy_variants import same_weights
from mg3_golden import network, published
from worldstride.errors import CheckpointError, InputError
from worldstride.models.matrix_game3.adapter import MatrixGame3
from worldstride.models.matrix_game3.config import MG3Config
from worldstride.models.matrix_game3.loading import DECODERS, load_matrix_game3, pruned, random_matrix_game3
from worldstride.models.registry import find
from worldstride.models.wan import native
from worldstride.models.wan.vae import WanVAE, WanVAEConfig

CPU = torch.device("cpu")
TINY = WanVAEConfig(
    base_dim=4, decoder_base_dim=16, num_res_blocks=1, latents_mean=native.LATENTS_MEAN, latents_std=native.LATENTS_STD
)


def vae(share: float = 1.0, seed: int = 0) -> WanVAE:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return WanVAE(pruned(TINY, share), eager=True).requires_grad_(False).eval()


def natively(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the names of Wan's own file, written apart from the package's table."""
    rules = [
        (r"^quant_conv", "conv1"), (r"^post_quant_conv", "conv2"), (r"\.conv_in", ".conv1"),
        (r"\.norm_out", ".head.0"), (r"\.conv_out", ".head.2"), (r"\.mid_block\.resnets\.0", ".middle.0"),
        (r"\.mid_block\.attentions\.0", ".middle.1"), (r"\.mid_block\.resnets\.1", ".middle.2"),
        (r"\.down_blocks\.(\d)\.downsampler", r".downsamples.\1.downsamples.1"),
        (r"\.up_blocks\.(\d)\.upsampler", r".upsamples.\1.upsamples.2"),
        (r"\.down_blocks\.(\d)\.resnets\.(\d)", r".downsamples.\1.downsamples.\2"),
        (r"\.up_blocks\.(\d)\.resnets\.(\d)", r".upsamples.\1.upsamples.\2"), (r"\.conv_shortcut", ".shortcut"),
    ]  # fmt: skip
    parts = {".norm1.": ".residual.0.", ".conv1.": ".residual.2.", ".norm2.": ".residual.3.", ".conv2.": ".residual.6."}
    made = {}
    for name, tensor in tensors.items():
        new = name
        if "resnets" in name:
            for a, b in parts.items():
                new = new.replace(a, b)
        for pattern, into in rules:
            new = re.sub(pattern, into, new)
        made[new] = tensor
    return made


@pytest.fixture(scope="module")
def skywork(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as Skywork/Matrix-Game-3.0 is published, but small."""
    root = tmp_path_factory.mktemp("files") / "Matrix-Game-3.0"
    for variant in ("base_distilled_model", "base_model"):
        (root / variant).mkdir(parents=True)
        save_file(
            {k: v.contiguous() for k, v in published().items()}, root / variant / "diffusion_pytorch_model.safetensors"
        )
        config = {"num_heads": 4, "text_len": 8, "dim": 64, "sigma_theta": 0.8, "model_type": "ti2v"}
        (root / variant / "config.json").write_text(json.dumps(config))
    torch.save(natively(vae().state_dict()), root / "Wan2.2_VAE.pth")
    for name, (share, file) in DECODERS.items():
        if file:
            student = vae(share, seed=7).state_dict()
            student |= {"dynamic_feature_projection_heads.0.weight": torch.zeros(2)}
            torch.save({"gen_model" if name == "half" else "state_dict": student}, root / file)
    return root


def loaded(path: Path | None, decoder: str | None = None) -> MatrixGame3:
    return load_matrix_game3(path, "pretrained", CPU, torch.float32, decoder)[0]


def test_published_files_are_read(skywork: Path):
    model = loaded(skywork, "full")
    assert same_weights(model.network, network())
    assert same_weights(model.decoder.vae, vae())
    assert (model.steps, model.guidance, model.rounded) == (3, None, False)
    assert model.decoder.size == (704, 1280)
    assert model.latent_shape == (48, 44, 80)
    assert model.config.heads == 4
    guided = loaded(skywork / "base_model", "full")
    assert (guided.steps, guided.guidance) == (50, 5.0)
    assert guided.sampler().steps == 50
    assert load_matrix_game3(skywork, "pretrained", CPU, torch.bfloat16, "full")[0].rounded


@pytest.mark.parametrize(("decoder", "channels"), [("quarter", 4), ("half", 8), (None, 4)])
def test_a_pruned_decoder_takes_the_full_ones_place(skywork: Path, decoder: str | None, channels: int):
    """The encoder stays the full one's; without a choice it is the one that upstream takes."""
    made, student = loaded(skywork, decoder).decoder.vae, vae(channels / 16, seed=7)
    assert isinstance(made, WanVAE)
    assert made.config.decoder_base_dim == channels
    assert same_weights(made.decoder, student.decoder)
    assert same_weights(made.post_quant_conv, student.post_quant_conv)
    assert same_weights(made.encoder, vae().encoder)


def test_without_pruned_files_the_full_decoder_is_taken(skywork: Path, tmp_path: Path):
    for name in ("base_distilled_model", "Wan2.2_VAE.pth"):
        (tmp_path / name).symlink_to(skywork / name)
    assert same_weights(loaded(tmp_path).decoder.vae, vae())
    with pytest.raises(CheckpointError, match=r"MG-LightVAE.pth is missing; it holds the decoder 'half'"):
        loaded(tmp_path, "half")


def repacked(root: Path, dtype: torch.dtype = torch.float32, light: float | None = None) -> Path:
    """A folder as FastVideo repacks the model, its transformer in two files."""
    (root / "transformer").mkdir(parents=True)
    tensors = {f"model.{name}": t.to(dtype).contiguous() for name, t in published().items()}
    placed = {name: f"diffusion_pytorch_model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(placed.values()):
        save_file({name: t for name, t in tensors.items() if placed[name] == file}, root / "transformer" / file)
    index = {"metadata": {}, "weight_map": placed}
    (root / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    parts = (
        [("vae", vae(), 16)] if light is None else [("vae", vae(), 16), ("light_vae", vae(light, 7), int(16 * light))]
    )
    for name, made, channels in parts:
        (root / name).mkdir()
        save_file({k: v.contiguous() for k, v in made.state_dict().items()}, root / name / "model.safetensors")
        config = {
            "is_residual": True, "base_dim": 4, "decoder_base_dim": channels, "z_dim": 48, "dim_mult": [1, 2, 4, 4],
            "num_res_blocks": 1, "temperal_downsample": [False, True, True], "in_channels": 12, "out_channels": 12,
            "patch_size": 2, "latents_mean": list(native.LATENTS_MEAN), "latents_std": list(native.LATENTS_STD),
        }  # fmt: skip
        (root / name / "config.json").write_text(json.dumps(config))
    return root


@pytest.mark.parametrize(
    ("folder", "steps"),
    [
        ("Matrix-Game-3.0-Base-Distilled-Diffusers", 3), ("Matrix-Game-3.0-Base-Diffusers", 50),
        ("models--FastVideo--Matrix-Game-3.0-Base-Diffusers/snapshots/0f3a", 50),
    ],
    ids=["distilled", "plain", "cached"],
)  # fmt: skip
def test_a_repack_for_diffusers_is_read(tmp_path: Path, folder: str, steps: int):
    model = loaded(repacked(tmp_path / folder))
    assert same_weights(model.network, network())
    assert same_weights(model.decoder.vae, vae())
    assert (model.steps, model.guidance) == (steps, None if steps == 3 else 5.0)


def test_a_repack_that_does_not_tell_what_it_holds_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"does not tell whether its model is distilled: name it, or a folder"):
        loaded(repacked(tmp_path / "world"))


@pytest.mark.parametrize(("light", "name", "other"), [(0.25, "quarter", "half"), (0.5, "half", "quarter")])
def test_a_repack_brings_one_pruned_decoder(tmp_path: Path, light: float, name: str, other: str):
    root = repacked(tmp_path / "Matrix-Game-3.0-Base-Distilled-Diffusers", light=light)
    for made in (loaded(root), loaded(root, name)):
        assert same_weights(made.decoder.vae.decoder, vae(light, 7).decoder)
        assert same_weights(made.decoder.vae.post_quant_conv, vae(light, 7).post_quant_conv)
        assert same_weights(made.decoder.vae.encoder, vae().encoder)
    assert same_weights(loaded(root, "full").decoder.vae, vae())
    with pytest.raises(CheckpointError, match=rf"MG-LightVAE\w*\.pth is missing; it holds the decoder '{other}'"):
        loaded(root, other)


def test_weights_in_half_precision_are_read(tmp_path: Path):
    model = loaded(repacked(tmp_path / "Matrix-Game-3.0-Base-Distilled-Diffusers", torch.bfloat16))
    assert {p.dtype for p in model.network.parameters()} == {torch.float32}
    pairs = zip(model.network.state_dict().values(), network().state_dict().values(), strict=True)
    assert all(torch.equal(a, b.bfloat16().float()) for a, b in pairs)


def test_names_of_wans_own_file_become_diffusers():
    config = replace(TINY, num_res_blocks=2)
    plain = WanVAE(config).state_dict()
    made = native.converted(natively_of_two(plain), "a file")
    assert list(made) == list(plain)
    assert native.config_of(made, "a file") == config
    with pytest.raises(CheckpointError, match=r"a file: 'conv_out' is the second|is the second tensor that stands for"):
        native.converted({"encoder.head.2.bias": torch.zeros(1), "encoder.conv_out.bias": torch.zeros(1)}, "a file")
    with pytest.raises(CheckpointError, match=r"a file is no VAE of Wan2\.2"):
        native.config_of({}, "a file")


def natively_of_two(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the published file, whose stages have two residual blocks on the way down and three on the way up."""
    made = {}
    for name, tensor in natively(tensors).items():
        down = re.sub(r"downsamples\.1\.(resample|time_conv)", r"downsamples.2.\1", name)
        made[re.sub(r"upsamples\.2\.(resample|time_conv)", r"upsamples.3.\1", down)] = tensor
    return made


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda root: (root / "Wan2.2_VAE.pth").unlink(), r"there is neither .*Wan2\.2_VAE\.pth, of Skywork"),
        (
            lambda root: (root / "base_distilled_model").rename(root / "other"),
            "it is the folder base_distilled_model of",
        ),
        (lambda root: (root / "base_distilled_model/config.json").write_text('{"num_heads": 5}'), "heads must share"),
        (lambda root: (root / "MG-LightVAE_v2.pth").write_bytes(b"no pickle"), "cannot read weights alone"),
    ],
    ids=["vae", "transformer", "heads", "pickle"],
)
def test_errors_name_what_is_wrong(skywork: Path, tmp_path: Path, change: Callable[[Path], Any], text: str):
    shutil.copytree(skywork, tmp_path / "copy")
    change(tmp_path / "copy")
    with pytest.raises(CheckpointError, match=text):
        loaded(tmp_path / "copy")


def test_errors_say_where_files_come_from(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"ship with this package: give the folder of Skywork/Matrix-Game-3\.0"):
        loaded(None)
    with pytest.raises(CheckpointError, match="is no folder; give that of Skywork"):
        loaded(tmp_path / "absent")
    with pytest.raises(InputError, match="unknown decoder 'tiny'; known: quarter, half, full"):
        loaded(tmp_path, "tiny")
    with pytest.raises(InputError, match="random weights come from no file"):
        load_matrix_game3(tmp_path, "random", CPU, torch.float32)


def test_fingerprints_tell_files_and_decoders_apart(skywork: Path):
    made = [load_matrix_game3(skywork, "pretrained", CPU, torch.float32, d)[1] for d in ("full", "half", "full")]
    assert made[0] == made[2] != made[1]


def test_random_weights_play():
    config = MG3Config(
        width=64, heads=4, depth=2, hidden=64, frequencies=32, text=16, rows=8, steered=(0,), action_width=32,
        action_heads=2, key_width=8, turned=4,
    )  # fmt: skip
    model = random_matrix_game3(config, pruned(TINY, 0.25), CPU, torch.bfloat16, 64, 96)
    assert model.rounded
    assert model.network.enter.weight.dtype == torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    assert model.sample_prompt(generator)["text"].shape == (1, 8, 16)


def test_engines_are_told_their_decoder():
    entry = find("Skywork/Matrix-Game-3.0")
    assert entry.name == "matrix_game3"
    assert entry.decoders == ("quarter", "half", "full")
    with pytest.raises(InputError, match="unknown decoder 'half' of 'courtyard'; known: none to choose among"):
        worldstride.load("courtyard", decoder="half")
    with pytest.raises(InputError, match="unknown decoder 'tiny' of 'matrix_game3'; known: quarter, half, full"):
        worldstride.load("matrix_game3", decoder="tiny")


def test_the_first_latent_is_decoded_like_any_other():
    """Every upsampling in time makes two frames of each, and drops a world's very first one."""
    eager, plain = vae(), WanVAE(TINY).requires_grad_(False).eval()
    plain.load_state_dict(eager.state_dict())
    z = torch.randn(1, 48, 4, 2, 3, generator=torch.Generator().manual_seed(1))
    made, other = (of.decode(z, {})[0] for of in (eager, plain))
    assert made.shape == other.shape == (1, 3, 13, 32, 48)
    assert not torch.allclose(made[:, :, :1], other[:, :, :1], atol=1e-3)
    state, parts = dict[str, Tensor](), list[Tensor]()
    for part in z.split((1, 2, 1), 2):
        frames, state = eager.decode(part, state)
        parts.append(frames)
    assert torch.allclose(torch.cat(parts, 2), made, atol=1e-5)
    assert [p.shape[2] for p in parts] == [1, 8, 4]
