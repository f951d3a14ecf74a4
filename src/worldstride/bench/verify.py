"""Replay of golden files: what was recorded once must come out again.

A verifier knows one format of case. `VERIFIERS` names them all; a model adds its own beside these.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from worldstride import noise as noises
from worldstride.atomic import atomic_write
from worldstride.attention import Attend, attend
from worldstride.bench.comparison import Comparison, Verifier
from worldstride.bench.verify_hy_worldplay import HYWorldPlayVerifier
from worldstride.bench.verify_matrix_game3 import MatrixGame3Verifier
from worldstride.camera import camera_from_pose
from worldstride.denoising import DenoisePlan, denoise
from worldstride.errors import InputError
from worldstride.models.courtyard.adapter import CourtyardInputs, CourtyardModel
from worldstride.models.courtyard.config import CourtyardConfig
from worldstride.models.courtyard.weights import random_network
from worldstride.protocol import Conditions, Context, Recalled


class CourtyardVerifier:
    """One chunk of a small courtyard network with seeded random weights, in float32 on the CPU."""

    FORMAT = "worldstride-golden-courtyard"
    CONFIG = CourtyardConfig(size=48, width=128, heads=2, depth=3, memory=3, window=4)
    STEPS = 4

    def replay(self, case: Path) -> Iterator[Comparison]:
        """See `Verifier.replay`."""
        header, tensors = self._read(case)
        try:
            config, steps = CourtyardConfig(**header["config"]), int(header["steps"])
            inputs = {name: tensors[f"input.{name}"] for name in _INPUTS}
            got = _courtyard_chunk(config, int(header["weights_seed"]), steps, float(header["shift"]), inputs)
            expected = {name: tensors[f"output.{name}"] for name in got}
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{case} is a broken courtyard case: {type(error).__name__} {error}") from error
        for name, value in got.items():
            yield Comparison(name, value, expected[name])

    def record(self, case: Path) -> None:
        """See `Verifier.record`."""
        config, seed = self.CONFIG, 11
        count, total = config.memory + config.window, config.memory + config.window + config.chunk
        turn = torch.linspace(0, 2.4, total)
        poses = torch.stack([0.1 * turn.sin(), 0.08 * turn, turn, 0.1 * turn.cos()], -1)
        cameras = camera_from_pose(poses)
        kinds = torch.tensor([1] * config.memory + [0] * config.window)
        size = (config.tokens, config.values)
        inputs = {
            "context_latents": noises.normal((1, count, *size), seed, 0).clamp(-1, 1),
            "context_cameras": cameras[None, :count].contiguous(),
            "context_ranks": torch.arange(-count, 0),
            "context_kinds": kinds,
            "chunk_cameras": cameras[None, count:].contiguous(),
            "noise": noises.normal((1, config.chunk, *size), seed, 1),
        }
        shift = 2.0
        outputs = _courtyard_chunk(config, seed, self.STEPS, shift, inputs)
        header = {"config": asdict(config), "weights_seed": seed, "steps": self.STEPS, "shift": shift}
        tensors = {f"input.{k}": v for k, v in inputs.items()} | {f"output.{k}": v for k, v in outputs.items()}
        with atomic_write(case) as temporary:
            metadata = {"format": self.FORMAT, "version": "1", "case": json.dumps(header)}
            temporary.write_bytes(save(tensors, metadata))

    def _read(self, case: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        try:
            with safe_open(case, "pt") as opened:
                metadata = opened.metadata() or {}
                found = metadata.get("format")
                if found != self.FORMAT or metadata.get("version") != "1":
                    wanted = f"expected {self.FORMAT!r}, version 1"
                    raise InputError(f"{case} is no courtyard case: its format is {found!r}, {wanted}")
                return json.loads(metadata["case"]), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise InputError(f"cannot read the case {case}: {error}") from error


VERIFIERS: dict[str, Verifier] = {
    "courtyard": CourtyardVerifier(), "hy_worldplay": HYWorldPlayVerifier(), "matrix_game3": MatrixGame3Verifier(),
}  # fmt: skip
"""Every format that `worldstride verify` knows."""


def find_verifier(name: str) -> Verifier:
    """The verifier of a format; `InputError` lists the known ones."""
    if name not in VERIFIERS:
        raise InputError(f"unknown format {name!r} of golden files; known: {', '.join(VERIFIERS)}")
    return VERIFIERS[name]


_INPUTS = ("context_latents", "context_cameras", "context_ranks", "context_kinds", "chunk_cameras", "noise")


class _Recorded(CourtyardModel):
    """Keeps every velocity that a denoising loop asks for."""

    velocities: list[Tensor]

    def velocity(
        self, x: Tensor, sigma: float | Tensor, inputs: CourtyardInputs, context: Context, attend: Attend
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        velocity, captured = super().velocity(x, sigma, inputs, context, attend)
        self.velocities.append(velocity)
        return velocity, captured


@torch.inference_mode()
def _courtyard_chunk(
    config: CourtyardConfig, seed: int, steps: int, shift: float, inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    model = _Recorded(random_network(config, seed).eval(), torch.float32)
    model.velocities = []
    latents, cameras, ranks, kinds = (inputs[f"context_{name}"] for name in ("latents", "cameras", "ranks", "kinds"))
    context = model.encode_context(Recalled(latents, cameras, ranks, kinds), None, attend)
    cameras, noise = inputs["chunk_cameras"], inputs["noise"]
    positions = torch.arange(cameras.shape[1])
    prepared = model.prepare(Conditions(0, cameras, cameras, model.intrinsics, positions=positions))
    latents, _ = denoise(
        model, noise, prepared, context, DenoisePlan(model.sampler(steps, shift)), attend, lambda _: noise
    )
    keys, values = context.keys_values[0]
    outputs = {"context_keys_0": keys, "context_values_0": values}
    outputs |= {f"velocity_{i}": v for i, v in enumerate(model.velocities)}
    return {k: v.clone(memory_format=torch.contiguous_format) for k, v in {**outputs, "latents": latents}.items()}
