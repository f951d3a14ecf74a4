"""The trainer's state in a few files of at most 16 MiB, and the weights that ship."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from worldstride.atomic import atomic_write
from worldstride.bench.results import write_json
from worldstride.models.courtyard.config import CourtyardConfig
from worldstride.models.courtyard.weights import FORMAT

SHARD = 15 * 2**20
"""Bytes of tensors in one file, with room for the header below 16 MiB."""


def save_state(folder: Path, tensors: dict[str, Tensor], facts: dict[str, object]) -> None:
    """Write tensors as shards `state-{step}-0.safetensors`, ... and facts, step among them, as `state.json`.

    `state.json` names its shards and is replaced last; only then the older shards go. So the folder holds one
    complete state at every moment, whenever the run is killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if used + size > SHARD and shards[-1]:
            shards.append({})
            used = 0
        shards[-1][name] = tensor.detach().cpu().contiguous()
        used += size
    stem, listed = f"state-{facts['step']}", folder / "state.json"
    if listed.exists() and f"{stem}-0.safetensors" in json.loads(listed.read_text()).get("files", []):
        stem += "-again"  # shards that state.json vouches for are never overwritten
    files = [f"{stem}-{i}.safetensors" for i in range(len(shards))]
    for name, shard in zip(files, shards, strict=True):
        with atomic_write(folder / name) as temporary:
            temporary.write_bytes(safetensors.torch.save(shard))
    write_json(listed, {**facts, "files": files})
    for path in folder.glob("state-*.safetensors"):
        if path.name not in files:
            path.unlink()


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Undo `save_state`."""
    facts = json.loads((folder / "state.json").read_text())
    tensors: dict[str, Tensor] = {}
    for name in facts["files"]:
        tensors |= safetensors.torch.load((folder / name).read_bytes())
    return tensors, facts


def save_weights(path: Path, network: nn.Module, config: CourtyardConfig, facts: dict[str, object]) -> None:
    """One safetensors file in half precision; the configuration and where it came from are in its metadata.

    `worldstride.models.courtyard.weights.read_network` reads it.
    """
    tensors = {k: v.detach().half().cpu().contiguous() for k, v in network.state_dict().items()}
    metadata = {"format": FORMAT, "config": json.dumps(asdict(config)), "training": json.dumps(facts)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(tensors, metadata))


def flat_state(network: nn.Module, average: nn.Module, moments: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything that a resumed run needs: float32 weights, half-precision average, bfloat16 moments."""
    state = {f"network.{k}": v for k, v in network.state_dict().items()}
    state |= {f"average.{k}": v.half() for k, v in average.state_dict().items()}
    return state | {f"moment.{k}": v for k, v in moments.items()}


def part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one part of `flat_state`, in float32."""
    return {k.removeprefix(f"{name}."): v.float() for k, v in tensors.items() if k.startswith(f"{name}.")}
