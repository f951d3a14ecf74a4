"""Weights of the courtyard model: one safetensors file that knows its own configuration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from worldstride.errors import CheckpointError, InputError
from worldstride.models.courtyard.adapter import CourtyardModel
from worldstride.models.courtyard.config import CourtyardConfig
from worldstride.models.courtyard.model import CourtyardNetwork
from worldstride.models.shards import check_fit

FORMAT = "worldstride-courtyard"
FILE = "weights.safetensors"


def shipped() -> Path:
    """Path of the weights inside the package; `CheckpointError` where the installation lacks them."""
    path = Path(str(resources.files("worldstride.models.courtyard") / FILE))
    if not path.is_file():
        raise CheckpointError(
            f"the installed package holds no {FILE} for the courtyard model; reinstall it or give a path"
        )
    return path


def load_courtyard(
    path: Path | None, weights: Literal["pretrained", "random"], device: torch.device, dtype: torch.dtype
) -> tuple[CourtyardModel, str]:
    """Model and fingerprint: the shipped weights, another file of the same format, or seeded random ones."""
    if weights == "random":
        if path is not None:
            raise InputError(f"random weights come from no file; leave out the path {str(path)!r}")
        drawn = random_network(CourtyardConfig())
        mark = fingerprint(drawn.config, drawn.state_dict())
        return CourtyardModel(drawn.to(device, dtype).eval(), dtype), mark
    file = shipped() if path is None else path / FILE if path.is_dir() else path
    network, mark = read_network(file)
    return CourtyardModel(network.to(device, dtype).eval(), dtype), mark


def read_network(file: Path) -> tuple[CourtyardNetwork, str]:
    """Network in float32 and `fingerprint` of a weights file; `CheckpointError` says what does not fit."""
    try:
        data = file.read_bytes()
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise CheckpointError(
                f"{file} holds no courtyard weights: format is {metadata.get('format')!r}, not {FORMAT!r}"
            )
        config = CourtyardConfig(**json.loads(metadata["config"]))
        tensors = load(data)
    except OSError as error:
        raise CheckpointError(f"cannot read weights from {file}: {error.strerror or error}") from error
    except (SafetensorError, KeyError, TypeError, InputError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file} is no valid courtyard weights file: {error}") from error
    with torch.device("meta"):  # no initial values: they would draw from the caller's random numbers
        network = CourtyardNetwork(config).requires_grad_(False)
    check_fit(network, tensors, file, "its configuration")
    network.load_state_dict({k: v.float() for k, v in tensors.items()}, assign=True)
    return network, fingerprint(config, tensors)


def fingerprint(config: CourtyardConfig, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of configuration and tensors; what else the file says of its origin does not count."""
    values = asdict(config)
    if config.context == CourtyardConfig.context:  # older than this field are weights and saves that name them
        del values["context"]
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def random_network(config: CourtyardConfig, seed: int = 0) -> CourtyardNetwork:
    """Seeded random weights without zeroed layers, so that every part of the network takes part."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every GPU as well
        network = CourtyardNetwork(config).requires_grad_(False)
        for parameter in network.parameters():
            if parameter.dim() >= 2 and not bool(parameter.any()):
                parameter.normal_(std=0.02)
    return network
