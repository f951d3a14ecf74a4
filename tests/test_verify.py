"""Replay of golden cases."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from worldstride.bench.comparison import Comparison
from worldstride.bench.verify import VERIFIERS, find_verifier
from worldstride.cli import main
from worldstride.errors import InputError


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verify") / "case.safetensors"
    assert main(["verify", "courtyard", str(path), "--record"]) == 0
    return path


def perturbed(case: Path, target: Path, name: str, amount: float) -> Path:
    tensors = load_file(case)
    with safe_open(case, "pt") as opened:
        metadata = opened.metadata()
    tensors[name].flatten()[7] += amount * tensors[name].abs().max()
    save_file(tensors, target, metadata)
    return target


def test_a_recorded_case_comes_out_again(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "courtyard", str(case)]) == 0
    printed = capsys.readouterr().out
    names = ["context_keys_0", *(f"velocity_{i}" for i in range(4)), "latents"]
    assert all(name in printed for name in names)
    assert "NO" not in printed


@pytest.mark.parametrize("name", ["output.context_keys_0", "output.velocity_2", "output.latents"])
def test_a_perturbed_result_fails(case: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "courtyard", str(perturbed(case, tmp_path / "p.safetensors", name, 1e-3))]) == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.rstrip().endswith("NO")]
    assert [line.split()[0] for line in wrong] == [name.removeprefix("output.")]


def test_a_perturbed_input_fails(case: Path, tmp_path: Path) -> None:
    assert main(["verify", "courtyard", str(perturbed(case, tmp_path / "p.safetensors", "input.noise", 0.5))]) == 1


def test_an_error_within_tolerance_passes(case: Path, tmp_path: Path) -> None:
    assert main(["verify", "courtyard", str(perturbed(case, tmp_path / "p.safetensors", "output.latents", 2e-5))]) == 0


def test_broken_cases_say_what_is_wrong(case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "mars", str(case)]) == 2
    assert "unknown format 'mars' of golden files; known: courtyard" in capsys.readouterr().err
    assert main(["verify", "courtyard", str(tmp_path / "absent")]) == 2
    assert "cannot read the case" in capsys.readouterr().err
    (tmp_path / "text").write_text("no tensors")
    assert main(["verify", "courtyard", str(tmp_path / "text")]) == 2
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign")
    assert main(["verify", "courtyard", str(tmp_path / "foreign")]) == 2
    assert "is no courtyard case" in capsys.readouterr().err
    tensors = load_file(case)
    with safe_open(case, "pt") as opened:
        metadata = opened.metadata()
    del tensors["input.noise"]
    save_file(tensors, tmp_path / "short", metadata)
    with pytest.raises(InputError, match=r"broken courtyard case.*input\.noise"):
        list(find_verifier("courtyard").replay(tmp_path / "short"))


def test_comparisons_count_what_is_not_a_number_and_other_shapes_as_wrong() -> None:
    good = torch.ones(3)
    assert Comparison("x", good, good).fine
    assert not Comparison("x", good, torch.ones(4)).fine
    assert not Comparison("x", torch.tensor([1.0, float("nan"), 1.0]), good).fine
    assert not Comparison("x", good, torch.tensor([1.0, float("nan"), 1.0])).fine
    zero = torch.zeros(3)
    assert Comparison("x", zero, zero).fine
    assert Comparison("x", torch.zeros(0), torch.zeros(0)).fine


def test_every_verifier_has_a_name_that_is_found() -> None:
    assert all(find_verifier(name) is verifier for name, verifier in VERIFIERS.items())
