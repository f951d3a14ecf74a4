"""The golden HY-WorldPlay case: it comes out again, and whatever differs from it is noticed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from hy_golden import GOLDEN, golden
from worldstride.bench import verify_hy_worldplay as verify
from worldstride.bench.verify_hy_worldplay import HYWorldPlayVerifier
from worldstride.camera import invert
from worldstride.cli import main
from worldstride.errors import CheckpointError, InputError
from worldstride.models.hy_worldplay import places
from worldstride.models.hy_worldplay.model import Frames

Tensors = dict[str, Tensor]


def test_the_golden_case_comes_out_again(capsys: pytest.CaptureFixture[str]):
    assert main(["verify", "hy_worldplay", str(GOLDEN)]) == 0
    printed = capsys.readouterr().out
    assert "66 of 66 tensors within tolerance" in printed
    for name in ("latents", "bidirectional forward", "vae/frames", "prope/po", "text_kv/1/v", "chunk9/step3/velocity"):
        assert f"\n{name} " in printed


def first_wrong(case: Path) -> str:
    """Name of the first tensor out of tolerance; empty where all are fine."""
    return next((c.tensor for c in HYWorldPlayVerifier().replay(case) if not c.fine), "")


def changed(folder: Path, change: Callable[[Tensors], None]) -> Path:
    """The golden case with other contents."""
    tensors = {name: tensor.clone() for name, tensor in golden().tensors.items()}
    change(tensors)
    save_file(tensors, folder / "case.safetensors", dict(golden().metadata))
    return folder / "case.safetensors"


def swap_halves(tensors: Tensors) -> None:
    for part in ("weight", "bias"):
        shift, scale = tensors[f"weights/final_layer.adaLN_modulation.1.{part}"].chunk(2)
        tensors[f"weights/final_layer.adaLN_modulation.1.{part}"] = torch.cat([scale, shift])


def swap(a: str, b: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"weights/{a}"], tensors[f"weights/{b}"] = tensors[f"weights/{b}"], tensors[f"weights/{a}"]

    return change


def keep_masked_rows(tensors: Tensors) -> None:
    tensors["in_out/text_mask"].fill_(1)


IMAGE, TEXT = "double_blocks.0.img_", "double_blocks.1.txt_"


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (swap_halves, "chunk0/step0/velocity"),
        (swap(f"{IMAGE}attn_proj.weight", f"{IMAGE}attn_prope_proj.weight"), "chunk0/step0/velocity"),
        (swap(f"{IMAGE}attn_q_norm.weight", f"{IMAGE}attn_k_norm.weight"), "chunk0/step0/velocity"),
        (swap(f"{IMAGE}attn_v.weight", f"{IMAGE}attn_k.weight"), "chunk0/step0/velocity"),
        (swap("time_in.mlp.0.weight", "action_in.mlp.0.weight"), "text_kv/0/k"),
        (swap(f"{TEXT}attn_v.bias", f"{TEXT}attn_k.bias"), "text_kv/1/k"),
        (keep_masked_rows, "text_kv/0/k"),
    ],
    ids=["final layer", "streams", "norms", "keys and values", "level and label", "text", "masked rows"],
)
def test_weights_in_another_place_are_noticed(change: Callable[[Tensors], None], wrong: str, tmp_path: Path):
    assert first_wrong(changed(tmp_path, change)) == wrong


def frames_with(**other: Callable[[Frames], Any]) -> Callable[..., Frames]:
    """A constructor of `Frames` with some of its fields changed."""

    def make(*given: Any) -> Frames:
        frames = Frames(*given)
        return replace(frames, **{name: change(frames) for name, change in other.items()})

    return make


@pytest.mark.parametrize(
    ("where", "name", "mistake", "wrong"),
    [
        (verify, "Frames", frames_with(labels=lambda f: f.labels * 0), "chunk0/step0/velocity"),
        (verify, "Frames", frames_with(condition=lambda f: f.condition * 0), "chunk0/step0/velocity"),
        (verify, "Frames", frames_with(levels=lambda f: f.levels / 1000), "chunk0/step0/velocity"),
        (verify, "STABLE", 0.0, "chunk1/layer0_context_k"),
        (verify, "SHIFT", 7.0, "chunk0/step1/velocity"),
        (verify, "BIDIRECTIONAL", 899.0, "bidirectional forward"),
    ],
    ids=["labels", "condition", "thousandths", "level of the context", "schedule", "level of the text"],
)
def test_other_inputs_are_noticed(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, mistake: Any, wrong: str):
    monkeypatch.setattr(where, name, mistake)
    assert first_wrong(GOLDEN) == wrong


def test_other_places_are_noticed(monkeypatch: pytest.MonkeyPatch):
    table, matrices = places.rotary_table, places.projections
    with monkeypatch.context() as patch:  # all latents a rank later: nothing but the text stays behind
        patch.setattr(places, "rotary_table", lambda ranks, *size: table(ranks + 1, *size))
        assert first_wrong(GOLDEN) == "chunk0/step0/velocity"
    with monkeypatch.context() as patch:  # as if the principal point stood in P
        principal = torch.tensor([[0, 0, 0.5, 0], [0, 0, 0.5, 0], [0, 0, 0, 0], [0, 0, 0, 0]])

        def with_point(cameras: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor]:
            project, _ = matrices(cameras, intrinsics)
            project = project + principal @ invert(cameras)
            return project, torch.linalg.inv(project)

        patch.setattr(places, "projections", with_point)
        assert first_wrong(GOLDEN) == "prope/pq"


def test_broken_cases_say_what_is_wrong(tmp_path: Path):
    def without(name: str) -> Path:
        return changed(tmp_path, lambda tensors: tensors.__delitem__(name))

    verifier = HYWorldPlayVerifier()
    with pytest.raises(InputError, match=r"broken HY-WorldPlay case: KeyError 'points'"):
        list(verifier.replay(without("in_out/points")))
    with pytest.raises(InputError, match=r"is no HY-WorldPlay case: it needs metadata 'config'"):
        list(verifier.replay(without("in_out/noise")))
    with pytest.raises(CheckpointError, match=r"1 \(img_in.proj.weight\) missing, none unknown"):
        list(verifier.replay(without("weights/img_in.proj.weight")))
    with pytest.raises(InputError, match="cannot read the case"):
        list(verifier.replay(tmp_path / "absent"))
    with pytest.raises(InputError, match="they are replayed here, not recorded"):
        verifier.record(tmp_path / "case")
