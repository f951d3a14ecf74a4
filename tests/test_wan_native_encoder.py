"""umT5 in Wan's own file, as Matrix-Game-3.0 is published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_umt5 import PICKLED, held, native, umt5, write_converted, write_native
from worldstride.cli import main
from worldstride.errors import CheckpointError
from worldstride.models.hy_worldplay.prompts import load_prompt
from worldstride.models.hy_worldplay.wan_encoder import load_wan_encoder
from worldstride.models.wan.umt5 import sources

TEXTS = ("a lake", "", "ab" * 250)


@pytest.fixture
def skywork(tmp_path: Path) -> Path:
    return write_native(tmp_path / "Matrix-Game-3.0")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_states_are_those_of_the_layout_for_diffusers(skywork: Path, tmp_path: Path, dtype: torch.dtype):
    """Bit for bit: in float16, too, where transformers keeps a part of the weights in float32."""
    converted = write_converted(tmp_path / "converted")
    with load_wan_encoder(skywork, dtype=dtype) as one, load_wan_encoder(converted, dtype=dtype) as other:
        precisions = [{name: p.dtype for name, p in held(of).named_parameters()} for of in (one, other)]
        assert precisions[0] == precisions[1]
        for text in TEXTS:
            ours, theirs = (of.encode(text, "dark") for of in (one, other))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
            assert ours["text"].dtype == dtype


def test_every_weight_finds_its_place(skywork: Path):
    with load_wan_encoder(skywork, dtype=torch.float32) as encoder:
        made, expected = held(encoder), umt5()[0]
        assert made.shared is made.encoder.embed_tokens
        assert made.state_dict().keys() == expected.state_dict().keys()
        assert all(torch.equal(made.state_dict()[name], t) for name, t in expected.state_dict().items())
        ours, theirs = made.config, expected.config
        told = ("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "vocab_size", "relative_attention_num_buckets")
        same = (*told, "feed_forward_proj", "is_gated_act", "dense_act_fn", "relative_attention_max_distance")
        assert {name: getattr(ours, name) for name in same} == {name: getattr(theirs, name) for name in same}
        assert (ours.layer_norm_epsilon, ours.dropout_rate) == (1e-6, 0)


def test_the_published_file_has_242_tensors():
    assert len({name for source in sources(24).values() for name in source.names}) == 242


@pytest.mark.parametrize("given", [".", "base_distilled_model"])
def test_the_command_takes_the_folder_as_published(skywork: Path, tmp_path: Path, given: str):
    file = tmp_path / "prompt.safetensors"
    options = ["--path", str(skywork / given), "--text", "a lake", "-o", str(file), "--device", "cpu"]
    assert main(["prompt", "matrix_game3", *options]) == 0
    expected = load_wan_encoder(skywork).encode("a lake", "")
    assert all(torch.equal(states, expected[name]) for name, states in load_prompt(file).items())


def without(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor: object) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            without("blocks.1.norm2.weight"),
            r"no umT5 encoder of 2 blocks: 1 \(blocks\.1\.norm2\.weight\) missing, none unknown",
        ),
        (put("head.weight", torch.zeros(1)), r"of 2 blocks: none missing, 1 \(head\.weight\) unknown"),
        (without("token_embedding.weight"), r"no umT5 encoder of Wan: it has no tensor 'token_embedding\.weight'"),
        (put("token_embedding.weight", torch.zeros(3)), "no umT5 encoder of Wan: .* in the shapes of its tensors"),
        (
            put("blocks.1.attn.o.weight", torch.zeros(12, 9)),
            r"1 tensors do not fit the configuration; first blocks\.1\.attn\.o\.weight: \[12, 9\] where \[12, 8\]",
        ),
        (put("step", 3), r"enc-bf16\.pth: what is in it must name tensors, got int under 'step'"),
    ],
    ids=["missing", "unknown", "words", "flat", "shape", "number"],
)
def test_what_is_no_encoder_is_refused(tmp_path: Path, change: Callable[[dict[str, Tensor]], object], text: str):
    tensors = native()
    change(tensors)
    encoder = load_wan_encoder(write_native(tmp_path, tensors))  # nothing is read yet
    with pytest.raises(CheckpointError, match=text):
        encoder.open()


def test_nothing_in_the_file_is_run(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"must hold a table of tensors, got list"):
        load_wan_encoder(write_native(tmp_path, [torch.zeros(1)])).open()
    with pytest.raises(CheckpointError, match="cannot read weights alone from"):
        load_wan_encoder(write_native(tmp_path, {"run": print})).open()


def test_missing_files_are_named_with_where_they_come_from(skywork: Path):
    def refused(text: str) -> None:
        with pytest.raises(CheckpointError, match=text):
            load_wan_encoder(skywork)

    (skywork / "google" / "umt5-xxl" / "tokenizer_config.json").unlink()
    refused(r"lacks google/umt5-xxl/tokenizer_config\.json; it comes from Skywork/Matrix-Game-3\.0$")
    write_native(skywork)
    (skywork / PICKLED).unlink()
    refused(rf"lacks {PICKLED}; it comes from Skywork/Matrix-Game-3\.0$")
    umt5()[1].save_pretrained(skywork / "tokenizer")
    refused(rf"lacks text_encoder/config\.json, .*; it comes from Wan-AI/\S+, or else {PICKLED}; it comes from Skywork")
    torch.save(native(), skywork / PICKLED)
    assert load_wan_encoder(skywork).encode("a")["text"].shape[1] > 1  # what is complete is taken
    for file in (skywork / PICKLED, *skywork.glob("**/tokenizer_config.json")):
        file.unlink()
    refused(
        r"it needs text_encoder and tokenizer from Wan-AI/Wan2\.2-TI2V-5B-Diffusers, or "
        rf"{PICKLED} and google/umt5-xxl from Skywork/Matrix-Game-3\.0$"
    )
