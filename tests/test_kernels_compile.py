"""The machine code of the kernels for a Hopper GPU, compiled without one: matrix units, no spills, a real overlap."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import worldstride
from worldstride.attention import versions

SHARED, REGISTERS = 232_448, 65_536
"""Bytes of shared memory and registers that a block may take on a Hopper GPU."""

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64" or bool(versions.unusable("gluon", (9, 0))),
    reason="machine code is read for the Triton that the kernels were measured with, on Linux on x86-64",
)


def compiled(what: str, cache: Path) -> list[dict[str, Any]]:
    """Records of a kernel's variants, see `compiling`, once all of them are seen to fit into a block."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    path = os.pathsep.join((str(Path(worldstride.__file__).parents[1]), environment.get("PYTHONPATH", "")))
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compiling.py")), what],
        env={**environment, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout)
    for of in found:
        assert of["shared"] <= SHARED, of
        assert of["registers"][0] * 32 * of["warps"] <= REGISTERS, of
    return found


def check_attention(of: dict[str, Any]) -> None:
    """On a Hopper GPU's own matrix units, tiles brought by the copy engine, everything in registers."""
    counts = of["counts"]
    assert counts["HGMMA"] > 0, of
    assert counts["HMMA"] == 0, of
    assert counts["UTMALDG"] > 0, of
    assert counts["STL"] == counts["LDL"] == 0, of
    assert of["stack"] == [0], of


def test_the_plain_kernel_uses_matrix_units_and_spills_nothing(tmp_path: Path):
    found = compiled("forward", tmp_path)
    assert len(found) == 4
    for of in found:
        check_attention(of)


def test_in_the_warp_specialised_kernel_a_softmax_runs_beside_the_values_of_the_block_before(tmp_path: Path):
    """Its exponentials stand between the wait for scores and the wait for values, in every loop over blocks."""
    found = compiled("warp_specialised", tmp_path)
    assert len(found) == 4
    for of in found:
        check_attention(of)
        assert of["counts"]["USETMAXREG"] > 0, of  # the loading warp gives its registers away
        assert len(of["loops"]) == 4, of  # full and ragged blocks of two groups of warps
        for loop in of["loops"]:
            assert list(loop) == ["beside the values"], of
            assert loop["beside the values"] >= 64 * 128 / 128, of  # queries times keys, by threads


def test_preparation_compiles_and_spills_nothing(tmp_path: Path):
    found = compiled("prepare", tmp_path)
    assert len(found) == 2
    for of in found:
        assert of["counts"]["STL"] == of["counts"]["LDL"] == 0, of
        assert of["stack"] == [0], of


def test_selection_compiles_and_scores_on_matrix_units(tmp_path: Path):
    found = compiled("select", tmp_path)
    assert [of["kernel"] for of in found] == ["score", "choose"] * 2
    for of in found:
        products = of["counts"]["HGMMA"] + of["counts"]["HMMA"]
        assert (products > 0) == (of["kernel"] == "score"), of


def test_placing_streams_compiles_and_spills_nothing(tmp_path: Path):
    found = compiled("streams", tmp_path)
    assert len(found) == 6
    for of in found:
        assert of["counts"]["STL"] == of["counts"]["LDL"] == 0, of
        assert of["stack"] == [0], of
