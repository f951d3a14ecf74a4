from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; Triton looks when it is first imported

import worldstride
from joint_model import JointModel, joint_engine
from worldstride.acceleration import resolve
from worldstride.engine import Engine, EngineSource
from worldstride.models.courtyard.adapter import CourtyardModel
from worldstride.models.courtyard.config import CourtyardConfig
from worldstride.models.courtyard.weights import random_network

TINY = CourtyardConfig(size=24, width=64, depth=2, heads=1, refine=6, memory=2, window=4)


@pytest.fixture
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def tiny_config() -> CourtyardConfig:
    return TINY


@pytest.fixture(scope="session")
def tiny_engine() -> Engine:
    """A courtyard model of 24 x 24 pixels with random weights."""
    model = CourtyardModel(random_network(TINY).eval(), torch.float32)
    return Engine(model, EngineSource("courtyard", None, "random", "tiny"), resolve("off"))


@pytest.fixture(scope="session")
def attentive() -> Engine:
    """The same model, but attention and output count for much more: a wrong context is seen in the picture."""
    network = random_network(TINY)
    for layer in (*(block.o for block in network.blocks), network.out):
        layer.weight.mul_(10)
    model = CourtyardModel(network.eval(), torch.float32)
    return Engine(model, EngineSource("courtyard", None, "random", "attentive"), resolve("off"))


@pytest.fixture(scope="session")
def full_engine() -> Engine:
    """The shipped configuration with random weights."""
    return worldstride.load("courtyard", weights="random", device="cpu")


@pytest.fixture(scope="session")
def joint() -> Engine:
    return joint_engine()


@pytest.fixture(scope="session")
def guided() -> Engine:
    """The joint model with two guidance branches and float32 storage."""
    return joint_engine(JointModel(torch.float32, guidance=3.0))


@pytest.fixture(scope="module")
def training() -> Iterator[SimpleNamespace]:
    """The trainer's modules, as its scripts see each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "training" / "courtyard"))
        names = ("checkpoint", "data", "group", "objective", "optimizer", "repatch", "retriever", "sequence", "train")
        names += ("joint_consecutive", "joint_courtyard", "joint_data", "joint_evaluate", "joint_train", "joint_watch")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
