"""The trainer's state in a few files of at most 16 MiB, and the weights that ship."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from worldstride.models.courtyard.config import CourtyardConfig

SHARD = 15 * 2**20
"""Bytes of tensors in one file, with room for the header below 16 MiB."""


def save_state(folder: Path, tensors: dict[str, Tensor], facts: dict[str, object]) -> None:
    """Write tensors as shards `state-0.safetensors`, ... and facts as `state.json` (last: it vouches for the rest)."""
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
    for i, shard in enumerate(shards):
        save_file(shard, folder / f"state-{i}.safetensors")
    (folder / "state.json").write_text(json.dumps({**facts, "shards": len(shards)}, indent=1))


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Undo `save_state`."""
    facts = json.loads((folder / "state.json").read_text())
    tensors: dict[str, Tensor] = {}
    for i in range(int(facts["shards"])):
        tensors |= load_file(folder / f"state-{i}.safetensors")
    return tensors, facts


def save_weights(path: Path, network: nn.Module, config: CourtyardConfig, facts: dict[str, object]) -> None:
    """One safetensors file in half precision; the configuration and where it came from are in its metadata."""
    tensors = {k: v.detach().half().cpu().contiguous() for k, v in network.state_dict().items()}
    metadata = {"format": "worldstride-courtyard", "config": json.dumps(asdict(config)), "training": json.dumps(facts)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)


def load_weights(path: Path) -> tuple[CourtyardConfig, dict[str, Tensor]]:
    """Configuration and float32 tensors of a weights file."""
    with safe_open(path, "pt") as file:
        config = CourtyardConfig(**json.loads(file.metadata()["config"]))
    return config, {k: v.float() for k, v in load_file(path).items()}


def flat_state(network: nn.Module, average: nn.Module, moments: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything that a resumed run needs: float32 weights, half-precision average, bfloat16 moments."""
    state = {f"network.{k}": v for k, v in network.state_dict().items()}
    state |= {f"average.{k}": v.half() for k, v in average.state_dict().items()}
    return state | {f"moment.{k}": v for k, v in moments.items()}


def part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one part of `flat_state`, in float32."""
    return {k.removeprefix(f"{name}."): v.float() for k, v in tensors.items() if k.startswith(f"{name}.")}


def size(tensors: dict[str, Tensor]) -> int:
    """Bytes of all tensors."""
    return sum(t.numel() * torch.tensor([], dtype=t.dtype).element_size() for t in tensors.values())
