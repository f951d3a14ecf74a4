"""The house plan: which module may import which, and what an import must not do."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import worldstride

ROOT = Path(worldstride.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
PROJECT = Path(__file__).parents[1]

PRIMITIVES = {"attention", "camera", "errors", "parallel", "precision", "rope", "rows"}
POLICIES = PRIMITIVES | {"control", "noise", "protocol"}
ALLOWED: dict[str, set[str]] = {
    "_version": set(),
    "errors": set(),
    "noise": set(),
    "acceleration": {"atomic", "attention", "context", "denoising", "errors"},
    "atomic": {"errors"},
    "beside": set(),
    "control": {"errors"},
    "picture": {"errors"},
    "savefile": {"atomic", "errors"},
    "video": {"atomic", "errors"},
    "attention": PRIMITIVES | {"_version", "atomic"},
    **dict.fromkeys(("camera", "parallel", "precision", "rope", "rows"), PRIMITIVES),
    "worlds": {"camera", "errors"},
    "trajectory": {"atomic", "camera", "control", "errors"},
    "navigation": {"camera", "control", "protocol", "worlds"},
    "playing": {"camera", "control", "errors", "protocol", "trajectory"},
    "protocol": {"attention", "camera", "control", "errors"},
    "models": PRIMITIVES | {"control", "picture", "protocol", "savefile", "denoising.schedule"},
    "context": POLICIES,
    "denoising": POLICIES | {"context.gate"},
    "report": {"attention", "context", "denoising"},
    "levers": {"acceleration", "context", "protocol", "report"},
}
"""What the inside may import besides itself; what is not listed stands further out."""
TIES = {"engine", "made", "saving", "session", "state", "stepping", "streaming", "testing", "wishes"}
"""They tie the inside together; they may import all of it and each other."""
OUTER = {"bench", "cli", "commands", "env", "integrations", "serve"}
"""They use the package; nothing further in may know of them."""


def name_of(file: Path) -> str:
    """Dotted name below the package; the package itself is empty."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


MODULES = {name_of(file) for file in FILES}


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules of the package that a module imports anywhere, also inside functions, by their names below it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            base = node.module or ""
            inner = [f"{base}.{alias.name}" for alias in node.names]
            # `from worldstride import camera` means a module, `from worldstride.camera import rays` what is in it
            names = [name if name.removeprefix("worldstride.") in MODULES else base for name in inner]
        else:
            continue
        for name in names:
            if name == "worldstride":
                yield ""
            elif name.startswith("worldstride."):
                yield name.removeprefix("worldstride.")


def known(name: str) -> set[str]:
    """A module's name and those of the packages that it lies in."""
    parts = name.split(".")
    return {".".join(parts[: i + 1]) for i in range(len(parts))}


def test_every_module_has_its_place():
    rooms = {name.split(".")[0] for name in MODULES} - {""}
    assert rooms <= set(ALLOWED) | TIES | OUTER, "add the new module to the plan above"


@pytest.mark.parametrize("file", FILES, ids=lambda file: name_of(file) or "worldstride")
def test_imports_point_one_way(file: Path):
    name = name_of(file)
    room = name.split(".")[0]
    found = set(imports(ast.parse(file.read_text(encoding="utf-8"))))
    if room in ALLOWED:
        wrong = {i for i in found if i.split(".")[0] != room and not known(i) & ALLOWED[room]}
    elif room in TIES or not room:
        wrong = {i for i in found if i.split(".")[0] not in set(ALLOWED) | TIES}
    else:
        wrong = {i for i in found if i.split(".")[0] == "cli" and room != "cli"}
    assert not wrong, f"{name} must not import {sorted(wrong)}"


def test_the_rule_sees_imports_of_every_form():
    text = """
from worldstride import camera, __version__
from worldstride.models.courtyard import model as m
def late():
    import worldstride.session
    from worldstride.denoising.schedule import shifted_sigmas
import torch
"""
    expected = {"camera", "", "models.courtyard.model", "session", "denoising.schedule"}
    assert set(imports(ast.parse(text))) == expected


PROBE = """
import json, logging, os, sys, warnings
import numpy, safetensors.torch, torch
import PIL.Image

def look():
    loggers = [logging.getLogger(), *(logging.getLogger(n) for n in logging.root.manager.loggerDict)]
    return {
        "environment": dict(os.environ),
        "handlers": sum(len(logger.handlers) for logger in loggers),
        "levels": [logging.root.level, logging.root.disabled],
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "cudnn": [torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32],
        "grad": torch.is_grad_enabled(),
        "random": torch.get_rng_state().sum().item(),
        "numpy": int(numpy.random.get_state()[1].sum()),
        "filters": len(warnings.filters),
        "hook": sys.excepthook is sys.__excepthook__,
        "path": list(sys.path),
        "compiler of kernels": "triton" in sys.modules,
    }

before = look()
import worldstride
changed = {k: [v, look()[k]] for k, v in before.items() if look()[k] != v}
json.dump(changed, sys.stderr)
"""


def test_importing_changes_nothing_and_says_nothing():
    # this process has imported the package already, so its environment is no clean start
    clean = {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run([sys.executable, "-c", PROBE], env=clean, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert json.loads(done.stderr) == {}


@pytest.mark.parametrize("file", FILES, ids=lambda file: name_of(file) or "worldstride")
def test_files_are_short_and_say_what_they_are(file: Path):
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 600
    assert file.stem not in {"utils", "util", "helpers", "helper", "misc", "common"}
    tree = ast.parse(text)
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)], "raise an error instead"
    assert ast.get_docstring(tree), "every module says what it is"


def test_the_version_has_one_source():
    project = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^dynamic = \[.*"version".*\]$', project, re.MULTILINE)
    (path,) = re.findall(r'^\[tool\.hatch\.version\]\npath = "(.+)"$', project, re.MULTILINE)
    (version,) = re.findall(r'^__version__ = "(.+)"$', (PROJECT / path).read_text(encoding="utf-8"), re.MULTILINE)
    assert worldstride.__version__ == version
