from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from worldstride.errors import InputError, SaveFileError
from worldstride.savefile import FORMAT, read_save, write_save

HEADER = {"model": "courtyard", "frames": 12, "seed": 7, "nested": {"list": [1, 2.5, None, "ü"]}}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 6, generator=generator)
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    return {
        "float32": base,
        "bfloat16": base.bfloat16(),
        "float16": base.half(),
        "uint8": torch.arange(256, dtype=torch.uint8),
        "int64": torch.tensor([-(2**63), 2**63 - 1]),
        "bool": base > 0,
        "zero_dim": torch.tensor(3.5, dtype=torch.bfloat16),
        "zero_dim_bool": torch.tensor(True),
        "empty": torch.empty(0, 3),
        "odd": odd,
        "transposed": base.T,
        "strided": base[::2, 1::2],
        "expanded": base[:1].expand(5, 6),
        "shared": base[1],
        "same": base,
        "gradient": torch.nn.Parameter(base.clone()),
    }


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "a.world"
    write_save(path, HEADER, tensors())
    return path


def test_every_bit_comes_back(saved: Path):
    header, back = read_save(saved)
    assert header == HEADER
    assert set(back) == set(tensors())
    for name, tensor in tensors().items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(back[name]) == bits(tensor), name


def test_what_is_read_is_independent_of_the_file(saved: Path):
    before = saved.read_bytes()
    _, back = read_save(saved)
    back["same"].fill_(9)
    assert bits(back["float32"]) == bits(tensors()["float32"])
    assert saved.read_bytes() == before
    saved.unlink()
    back["float32"] += 1


def test_writing_is_repeatable_and_atomic(saved: Path):
    before = saved.read_bytes()
    write_save(saved, HEADER, tensors())
    assert read_save(saved)[0] == HEADER
    with pytest.raises(InputError):
        write_save(saved, {"x": object()}, {})
    assert len(saved.read_bytes()) == len(before)
    assert list(saved.parent.iterdir()) == [saved]


def test_no_tensors(tmp_path: Path):
    write_save(tmp_path / "a", {}, {})
    assert read_save(tmp_path / "a") == ({}, {})


def test_a_flip_anywhere_is_found(saved: Path):
    whole = saved.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(8), *range(8, length, 3), *range(length, len(whole), 5), len(whole) - 1]
    for place in places:
        for mask in (0x01, 0x80):
            damaged = bytearray(whole)
            damaged[place] ^= mask
            saved.write_bytes(damaged)
            with pytest.raises(SaveFileError):
                read_save(saved)
                pytest.fail(f"byte {place} of {len(whole)} flipped by {mask:#x} went unnoticed")


def test_a_cut_anywhere_is_found(saved: Path):
    whole = saved.read_bytes()
    for size in [0, 1, 7, 8, 9, *range(10, len(whole), 97), len(whole) - 1]:
        saved.write_bytes(whole[:size])
        with pytest.raises(SaveFileError):
            read_save(saved)
    saved.write_bytes(whole + b"\0")
    with pytest.raises(SaveFileError):
        read_save(saved)


def test_a_tensor_renamed_retyped_or_swapped_is_found(saved: Path):
    whole = saved.read_bytes()
    for old, new in ((b'"same"', b'"sama"'), (b'"I64"', b'"F64"'), (b"courtyard", b"courtyarn")):
        assert old in whole
        saved.write_bytes(whole.replace(old, new, 1))
        with pytest.raises(SaveFileError, match="damaged"):
            read_save(saved)


def test_foreign_files(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(SaveFileError, match="cannot read"):
        read_save(path)
    with pytest.raises(SaveFileError, match="cannot read"):
        read_save(tmp_path)
    path.write_text("a text that is no safetensors file at all")
    with pytest.raises(SaveFileError, match=f"no saved session.*{FORMAT}"):
        read_save(path)
    safetensors.torch.save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(SaveFileError, match="no saved session"):
        read_save(path)
    safetensors.torch.save_file({"a": torch.zeros(2)}, path, {"format": "pt"})
    with pytest.raises(SaveFileError, match="format is 'pt'"):
        read_save(path)


def test_other_version(tmp_path: Path):
    path = tmp_path / "a"
    safetensors.torch.save_file({}, path, {"format": FORMAT, "version": "2", "anything": "else"})
    with pytest.raises(SaveFileError, match="version '2'; this release reads version 1"):
        read_save(path)
    safetensors.torch.save_file({}, path, {"format": FORMAT, "version": "1"})
    with pytest.raises(SaveFileError, match="metadata"):
        read_save(path)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("__metadata__", torch.zeros(1), "named"),
        ("a", torch.zeros(2, 2).to_sparse(), "dense"),
        ("a", torch.empty(2, device="meta"), "meta"),
        ("a", [1, 2], "list"),
    ],
)
def test_what_cannot_be_saved(tmp_path: Path, name: str, tensor: Tensor, words: str):
    with pytest.raises(InputError, match=words):
        write_save(tmp_path / "a", {}, {name: tensor})
    assert list(tmp_path.iterdir()) == []
