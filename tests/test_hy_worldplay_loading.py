"""HY-WorldPlay's weights: published layouts, what is missing or foreign, fingerprints and configurations."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import worldstride
from hy_golden import CPU, HEIGHT, VAE, VAE_JSON, WIDTH, golden, model, network, normal, relative, vae
from hy_variants import rewrite, same_weights, write_vae
from worldstride.attention import attend
from worldstride.attention.streams import Places
from worldstride.cli import main
from worldstride.errors import CheckpointError, InputError
from worldstride.models.hy_worldplay import places
from worldstride.models.hy_worldplay.adapter import HYWorldPlay
from worldstride.models.hy_worldplay.config import HYConfig
from worldstride.models.hy_worldplay.loading import VARIANTS, random_model
from worldstride.models.hy_worldplay.model import Frames, HYNetwork
from worldstride.models.hy_worldplay.weights import build, sources

VARIANT = next(iter(VARIANTS))
INDEX = "diffusion_pytorch_model.safetensors.index.json"


def write_sharded(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, some in parts.items():
        save_file({name: tensors[name] for name in some}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": {n: f for f, some in parts.items() for n in some}}))


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder as the model is published, with the golden weights and a tiny VAE."""
    folder = tmp_path / "HY-WorldPlay"
    (folder / VARIANT).mkdir(parents=True)
    save_file(dict(golden().published), folder / VARIANT / "model.safetensors")
    (folder / VARIANT / "config.json").write_text(golden().metadata["config"])
    write_vae(folder / "vae", vae(), {"_class_name": "AutoencoderKLConv3D", **VAE_JSON})
    return folder


def loaded(path: Path, **other: Any) -> tuple[HYWorldPlay, str]:
    engine = worldstride.load("tencent/HY-WorldPlay", path=path, device="cpu", **{"dtype": torch.float32, **other})
    assert isinstance(engine.model, HYWorldPlay)
    return engine.model, engine.source.fingerprint


@torch.no_grad()
def velocity(of: HYNetwork) -> Tensor:
    """Of four latents of 2 x 3 pixels, without a context."""
    c, case = of.config, golden()
    tables = places.rotary_table(torch.arange(4), 2, 3, c.rope, c.theta)
    at = Places(*tables, *places.projections(case.cameras[None, :4], case.given("Ks")[0, 0]))
    text = of.text(case.states, attend)
    condition, labels = normal(1, 4, c.channels + 1, 2, 3, seed=1), torch.tensor([[0, 9, 9, 1]])
    frames = Frames(normal(1, 4, c.channels, 2, 3), condition, torch.full((1, 4), 500.0), labels, at)
    return of.velocity(frames, text, [], None, attend)


def is_golden(of: HYNetwork) -> bool:
    """The same weights, and the same velocity but for rounding, which is another where memory is aligned otherwise."""
    return same_weights(of, network()) and relative(velocity(of), velocity(network())) <= 1e-5


def test_published_files_give_the_golden_network(published: Path):
    of, fingerprint = loaded(published)
    assert is_golden(of.network)
    assert of.latent_shape == (4, 30, 52)
    assert (of.dtype, of.storage) == (torch.float32, torch.float32)
    z = normal(1, 4, 2, 1, 2)
    with torch.no_grad():
        assert relative(of.decoder.vae.decode(z, {})[0], vae().decode(z, {})[0]) <= 1e-5
    by_name = worldstride.load("hy_worldplay", path=published, device="cpu", dtype=torch.float32)
    assert by_name.source.model == "hy_worldplay"
    assert by_name.source.fingerprint == fingerprint
    assert re.fullmatch("[0-9a-f]{64}", fingerprint)


def test_every_layout_gives_the_same_network(published: Path):
    folder = published / VARIANT
    (folder / "model.safetensors").rename(folder / "diffusion_pytorch_model.safetensors")
    assert is_golden(loaded(published)[0].network)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    write_sharded(folder, golden().published)
    assert is_golden(loaded(published)[0].network)


def test_weights_are_loaded_in_the_precision_that_is_asked_for(published: Path):
    of, _ = loaded(published, dtype=torch.bfloat16)
    assert {p.dtype for p in of.network.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in of.decoder.vae.parameters()} == {torch.bfloat16}
    assert of.storage == torch.bfloat16
    assert relative(velocity(of.network), velocity(network())) < 0.1


@pytest.mark.parametrize("file", [f"{VARIANT}/model.safetensors", "vae/diffusion_pytorch_model.safetensors"])
def test_a_fingerprint_tells_one_weight_from_another(published: Path, file: str):
    _, before = loaded(published)
    assert loaded(published)[1] == before

    def nudge(tensors: dict[str, Tensor]) -> None:
        next(iter(tensors.values())).flatten()[0] += 1

    rewrite(published / file, nudge)
    assert loaded(published)[1] != before


# What is wrong, and where the right thing comes from


def refused(path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        loaded(path)


def test_what_is_missing_is_named_with_where_it_comes_from(published: Path):
    with pytest.raises(CheckpointError, match="does not ship with this package: give the folder of tencent/HY-World"):
        worldstride.load("hy_worldplay", device="cpu")
    refused(published / "nowhere", "nowhere is no folder; give that of tencent/HY-WorldPlay")
    refused(published / VARIANT / "model.safetensors", "is no folder")
    (published / "vae").rename(published / "codec")
    refused(published, "vae holds none of .*; it is the folder vae of tencent/HunyuanVideo-1.5")
    (published / "codec").rename(published / "vae")
    (published / VARIANT / "model.safetensors").unlink()
    refused(published, f"holds none of .*; it is the folder {VARIANT} of tencent/HY-WorldPlay")
    with pytest.raises(InputError, match="random weights come from no file; leave out the path"):
        worldstride.load("hy_worldplay", path=published, weights="random", device="cpu")


NAME = "double_blocks.1.img_attn_prope_proj.bias"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop(NAME), rf"no HY-WorldPlay transformer of 2 blocks: 1 \({NAME}\) missing, none unknown"),
        (lambda t: t.update(mystery=torch.zeros(2)), r"none missing, 1 \(mystery\) unknown"),
        (
            lambda t: [t.pop(name) for name in list(t) if name.startswith("double_blocks.1.")],
            r"34 \(double_blocks.1.img_attn_k.bias, .*, \.\.\.\) missing",
        ),
        (
            lambda t: t.update({"final_layer.linear.bias": torch.zeros(5)}),
            r"1 tensors do not fit the configuration; first final_layer.linear.bias: \[5\] where \[4\] is right",
        ),
        (
            lambda t: t.update({"double_blocks.0.img_attn_k.weight": torch.zeros(64, 63)}),
            r"first double_blocks.0.img_attn_q.weight: \[\[64, 64\], \[64, 63\], \[64, 64\]\]",
        ),
    ],
    ids=["missing", "foreign", "a block", "shape", "parts"],
)
def test_foreign_weights_are_named(published: Path, change: Callable[[dict[str, Tensor]], object], text: str):
    rewrite(published / VARIANT / "model.safetensors", change)
    refused(published, text)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop("decoder.conv_in.conv.bias"), r"1 \(decoder.conv_in.conv.bias\) missing, none unknown"),
        (lambda t: t.update(mystery=torch.zeros(2)), r"none missing, 1 \(mystery\) unknown"),
        (lambda t: t.update({"encoder.norm_out.gamma": torch.ones(3)}), r"first encoder.norm_out.gamma: \[3\]"),
    ],
    ids=["missing", "foreign", "shape"],
)
def test_foreign_weights_of_the_vae_are_named(
    published: Path, change: Callable[[dict[str, Tensor]], object], text: str
):
    rewrite(published / "vae" / "diffusion_pytorch_model.safetensors", change)
    refused(published, f"vae.*{text}")


def test_broken_indices_are_named(published: Path):
    folder = published / VARIANT
    write_sharded(folder, golden().published)  # comes before the one file
    second = folder / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    second.unlink()
    refused(published, "names 1 files that are not there: model-00002-of-00002.safetensors")
    second.write_bytes(whole[:1000])
    refused(published, "cannot read weights from .*model-00002-of-00002")
    save_file({min(golden().published): torch.zeros(64)}, second)
    refused(published, "tensor '.*' is in model-00001-of-00002.safetensors and in model-00002-of-00002.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}}))
    refused(published, "is no index of weights: it has no table 'weight_map'")
    for text in ("{broken", "\udcff".encode("utf-8", "surrogateescape").decode("latin-1"), ""):
        (folder / INDEX).write_text(text)
        refused(published, f"cannot read .*{INDEX}")


def test_broken_configurations_are_named(published: Path):
    config, codec = published / VARIANT / "config.json", published / "vae" / "config.json"
    good = config.read_text()
    for text, message in (
        ("[1]", "must hold a JSON object, got list"),
        ("{", "cannot read .*config.json"),
        (json.dumps({**json.loads(good), "heads_num": 3}), r"HY-WorldPlay: heads must share the width .* for 3 heads"),
        (json.dumps({**json.loads(good), "mm_double_blocks_depth": 3}), r"of 3 blocks: 34 \(double_blocks.2"),
    ):
        config.write_text(text)
        refused(published, message)
    config.unlink()
    refused(published, "no HY-WorldPlay transformer of 54 blocks")  # none is published, and then it is the 8B model
    config.write_text(good)
    codec.write_text(json.dumps({**VAE_JSON, "latent_chanels": 4}))
    refused(published, "unknown VAE setting 'latent_chanels'")
    codec.write_text(json.dumps({**VAE_JSON, "latent_channels": 2}))
    refused(published, "tensors do not fit the configuration")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"hidden_siz": 64}, r"unknown entry 'hidden_siz' in the configuration \(did you mean 'hidden_size'\?\)"),
        ({"patch_size": [1, 2, 2]}, r"patch_size must be \[1, 1, 1\] for HY-WorldPlay, got \[1, 2, 2\]"),
        ({"out_channels": 8}, "in_channels and out_channels must be equal, got 4 and 8"),
        ({"heads_num": 3}, "heads must share the width in parts that 4 divides, got 64 for 3 heads"),
        ({"heads_num": 0}, "heads must be an integer of at least 1, got 0"),
        ({"rope_dim_list": [4, 6, 8]}, r"rope must be three even numbers .* add up to 16 a head, got \(4, 6, 8\)"),
        ({"rope_dim_list": [5, 5, 6]}, r"rope must be three even numbers .*, got \(5, 5, 6\)"),
        ({"rope_dim_list": [8, 8]}, r"rope must be three even numbers .*, got \(8, 8\)"),
        ({"rope_dim_list": 16}, "rope must be three even numbers .*, got 16"),
        ({"mm_double_blocks_depth": 0}, "depth must be an integer of at least 1, got 0"),
        ({"mlp_width_ratio": "4"}, "mlp_width_ratio must be a number above 0 .*, got '4'"),
        ({"rope_theta": "high"}, "theta must be a number above 0 .*, got 'high'"),
        ({"hidden_size": "64"}, "hidden_size must be an integer of at least 1, got '64'"),
    ],
)
def test_configurations_of_other_networks_are_refused(values: dict[str, Any], text: str):
    with pytest.raises(InputError, match=text):
        HYConfig.from_json({**json.loads(golden().metadata["config"]), **values})


def test_a_configuration_says_everything():
    given = json.loads(golden().metadata["config"])
    config = HYConfig.from_json({"_class_name": "HYWorldPlay", **given})
    assert (config.channels, config.width, config.heads, config.depth, config.hidden) == (4, 64, 4, 2, 256)
    assert (config.rope, config.theta, config.text, config.vision) == ((4, 6, 6), 256.0, 24, 20)
    with pytest.raises(InputError, match="the configuration lacks rope_theta, text_states_dim"):
        HYConfig.from_json({k: v for k, v in given.items() if k not in ("rope_theta", "text_states_dim")})


# Full size


def linear(name: str, out: int, given: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, given), f"{name}.bias": (out,)}


def norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def full_size() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published 8B models' tensors."""
    h = 2048
    shapes = {"img_in.proj.weight": (h, 65, 1, 1, 1), "img_in.proj.bias": (h,), "cond_type_embedding.weight": (3, h)}
    for name in ("time_in", "action_in", "txt_in.t_embedder"):
        shapes |= linear(f"{name}.mlp.0", h, 256) | linear(f"{name}.mlp.2", h, h)
    shapes |= norm("byt5_in.layernorm", 1472) | linear("byt5_in.fc1", h, 1472)
    shapes |= linear("byt5_in.fc2", h, h) | linear("byt5_in.fc3", h, h)
    shapes |= norm("vision_in.proj.0", 1152) | linear("vision_in.proj.1", 1152, 1152)
    shapes |= linear("vision_in.proj.3", h, 1152) | norm("vision_in.proj.4", h)
    shapes |= linear("txt_in.input_embedder", h, 3584)
    shapes |= linear("txt_in.c_embedder.linear_1", h, 3584) | linear("txt_in.c_embedder.linear_2", h, h)
    for j in range(2):
        of = f"txt_in.individual_token_refiner.blocks.{j}"
        shapes |= norm(f"{of}.norm1", h) | norm(f"{of}.norm2", h) | linear(f"{of}.self_attn_qkv", 6144, h)
        shapes |= linear(f"{of}.self_attn_proj", h, h) | linear(f"{of}.adaLN_modulation.1", 4096, h)
        shapes |= linear(f"{of}.mlp.fc1", 8192, h) | linear(f"{of}.mlp.fc2", h, 8192)
    for i in range(54):
        for of in (f"double_blocks.{i}.img_", f"double_blocks.{i}.txt_"):
            shapes |= linear(f"{of}mod.linear", 12288, h)
            for part in ("q", "k", "v", "proj"):
                shapes |= linear(f"{of}attn_{part}", h, h)
            shapes |= {f"{of}attn_q_norm.weight": (128,), f"{of}attn_k_norm.weight": (128,)}
            shapes |= linear(f"{of}mlp.fc1", 8192, h) | linear(f"{of}mlp.fc2", h, 8192)
        shapes |= linear(f"double_blocks.{i}.img_attn_prope_proj", h, h)
    return shapes | linear("final_layer.linear", 32, h) | linear("final_layer.adaLN_modulation.1", 4096, h)


def test_the_full_size_is_made_of_every_published_tensor():
    shapes = full_size()
    named = [name for source in sources(HYConfig()).values() for name in source.names]
    assert sorted(named) == sorted(shapes)  # each once
    tensors = {name: torch.empty(shape, device="meta", dtype=torch.bfloat16) for name, shape in shapes.items()}
    assert sum(t.numel() for t in tensors.values()) == 8_557_933_856
    net = build(HYConfig(), tensors, "the published file", torch.device("meta"))
    # the biases of two streams' projections become one in each of 54 blocks
    assert sum(p.numel() for p in net.parameters()) == 8_557_933_856 - 54 * 2048


def test_random_weights_are_seeded():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one, same, other = (
        random_model(golden().config, VAE, CPU, torch.float32, HEIGHT, WIDTH, seed) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    for part in (lambda m: m.network, lambda m: m.decoder.vae):
        assert same_weights(part(one), part(same))
        assert not same_weights(part(one), part(other))
    assert bool(velocity(one.network).isfinite().all())
    assert one.latent_shape == model().latent_shape


def test_the_list_of_models_tells_where_it_may_be_used(capsys: pytest.CaptureFixture[str]):
    assert main(["models"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for text in ("hy_worldplay", "8.6 B", "Community License", "EU, the UK and South Korea", "HunyuanVideo-1.5"):
        assert text in printed


def test_a_path_may_name_another_model(published: Path):
    (published / VARIANT).rename(published / "ar_model")
    refused(published, f"it is the folder {VARIANT} of tencent/HY-WorldPlay")
    model = worldstride.load("hy_worldplay", published / "ar_model", device="cpu", dtype=torch.float32).model
    assert isinstance(model, HYWorldPlay)
    assert (model.steps, model.guidance) == (50, 6.0)
    assert (model.sampler().steps, model.sampler().guidance) == (50, 6.0)
