"""Replay of a golden HY-WorldPlay case of any size: a whole rollout of the transformer, its camera transform, the VAE.

A case is a safetensors file. Its metadata holds the JSON of `config`, `vae_config`, and of weights too large to store:
`omitted_weights` says how each is drawn, `shape:<name>` how large it is. Its tensors are `weights/<published name>`,
`in_out/...`, `text_kv/<block>/{k,v}`, `chunk<i>/{context,step<j>/velocity,layer0_context_k}`, `prope/...`, `vae/...`.
What a case leaves out is not compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from worldstride.attention import attend, streams
from worldstride.attention.streams import KeysValues, Places
from worldstride.bench.comparison import Comparison
from worldstride.denoising.schedule import shifted_sigmas
from worldstride.errors import InputError, WorldstrideError
from worldstride.models.hy_worldplay import places
from worldstride.models.hy_worldplay.config import HYConfig
from worldstride.models.hy_worldplay.labels import labels
from worldstride.models.hy_worldplay.large import SHIFT
from worldstride.models.hy_worldplay.model import Frames, HYNetwork
from worldstride.models.hy_worldplay.placed import NEW, STABLE
from worldstride.models.hy_worldplay.poses import parse_poses
from worldstride.models.hy_worldplay.retrieval import select
from worldstride.models.hy_worldplay.text import Prompt
from worldstride.models.hy_worldplay.vae import VAEConfig, VideoVAE
from worldstride.models.hy_worldplay.weights import build

BIDIRECTIONAL = 900.0
"""Noise level in thousandths of a case's bidirectional forward."""


class HYWorldPlayVerifier:
    """Everything in float32 on the CPU; choices of context have to be identical."""

    def replay(self, case: Path) -> Iterator[Comparison]:
        """See `Verifier.replay`."""
        try:
            with safe_open(case, "pt") as opened:
                metadata = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot read the case {case}: {error}") from error
        if "config" not in metadata or "in_out/noise" not in tensors:
            raise InputError(f"{case} is no HY-WorldPlay case: it needs metadata 'config' and tensors 'in_out/...'")
        try:
            with torch.inference_mode():
                yield from _Replay(case, metadata, tensors).all()
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            if isinstance(error, WorldstrideError):
                raise
            raise InputError(f"{case} is a broken HY-WorldPlay case: {type(error).__name__} {error}") from error

    def record(self, case: Path) -> None:
        """See `Verifier.record`."""
        raise InputError("HY-WorldPlay cases come from the original model; they are replayed here, not recorded")


class _Replay:
    """One case."""

    def __init__(self, case: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
        self.metadata, self.tensors = metadata, tensors
        config = HYConfig.from_json(json.loads(metadata["config"]))
        self.network: HYNetwork = build(config, weights_of(metadata, tensors), str(case))
        given = {k.removeprefix("in_out/"): v for k, v in tensors.items() if k.startswith("in_out/")}
        self.given = given
        self.cameras = torch.linalg.inv(given["viewmats"].double()).float()
        self.intrinsics, self.condition = given["Ks"].float(), given["cond"].transpose(1, 2)
        self.noise = given["noise"].transpose(1, 2)
        self.prompt = Prompt.masked(*(given[name] for name in ("text", "text_mask", "byt5", "byt5_mask", "vis")))

    def all(self) -> Iterator[Comparison]:
        """Everything that the case holds."""
        if "pose" in self.metadata:
            path = parse_poses(self.metadata["pose"])
            yield Comparison("cameras of the pose string", path.cameras.float(), self.cameras[0])
        yield Comparison("action labels", labels(self.cameras[0]), self.given["action"][0], 0.0)
        yield from self._camera_transform()
        text = self.network.text(self.prompt, attend)
        for i, pair in enumerate(text):
            for name, got in zip("kv", pair, strict=True):
                if (expected := self.tensors.get(f"text_kv/{i}/{name}")) is not None:
                    yield Comparison(f"text_kv/{i}/{name}", got, expected)
        yield from self._rollout(text)
        if "bi" in self.given:
            frames = self._frames(self.noise, range(NEW), range(NEW), BIDIRECTIONAL)
            got = self.network.joint(frames, self.prompt, BIDIRECTIONAL, attend)
            yield Comparison("bidirectional forward", got.transpose(1, 2), self.given["bi"])
        yield from self._vae()

    def _rollout(self, text: Sequence[KeysValues]) -> Iterator[Comparison]:
        latents, tensors, path = self.noise.clone(), self.tensors, self.cameras[0]
        steps = len([name for name in tensors if re.fullmatch(r"chunk0/step\d+/velocity", name)])
        if not steps:
            raise KeyError("chunk0/step0/velocity")  # they tell how many steps there are
        sigmas = shifted_sigmas(steps, SHIFT)
        for c in range(latents.shape[1] // NEW):
            rows = range(NEW * c, NEW * c + NEW)
            chosen = select(path[: rows.stop], rows.start, self.given["points"]).context
            if (listed := tensors.get(f"chunk{c}/context")) is not None:
                yield Comparison(f"chunk{c}/context", torch.tensor(chosen, dtype=listed.dtype), listed, 0.0)
            kept, where, count = list[KeysValues](), None, len(chosen)
            if chosen:
                frames = self._frames(latents, chosen, range(count), STABLE)
                kept, where = list(self.network.context(frames, text, attend)), frames.at
                if (keys := tensors.get(f"chunk{c}/layer0_context_k")) is not None:
                    yield Comparison(f"chunk{c}/layer0_context_k", streams.of_keys(*kept[0], where)[0], keys)
            for i, (sigma, after) in enumerate(pairwise(sigmas)):
                frames = self._frames(latents, rows, range(count, count + NEW), 1000 * sigma)
                velocity = self.network.velocity(frames, text, [(pair,) for pair in kept], where, attend)
                if (expected := tensors.get(f"chunk{c}/step{i}/velocity")) is not None:
                    yield Comparison(f"chunk{c}/step{i}/velocity", velocity.transpose(1, 2), expected)
                latents[:, rows] += velocity * (after - sigma)
        yield Comparison("latents", latents.transpose(1, 2), self.given["latents"])

    def _frames(self, latents: Tensor, rows: Sequence[int], ranks: Sequence[int], level: float) -> Frames:
        some, config = list(rows), self.network.config
        height, width = latents.shape[3:]
        cos, sin = places.rotary_table(torch.tensor(list(ranks)), height, width, config.rope, config.theta)
        at = Places(cos, sin, *places.projections(self.cameras[:, some], self.intrinsics[:, some]))
        levels = torch.full((1, len(some)), level)
        return Frames(latents[:, some], self.condition[:, some], levels, self.given["action"][:, some], at)

    def _camera_transform(self) -> Iterator[Comparison]:
        tensors = self.tensors
        if "prope/q" not in tensors:
            return
        q = tensors["prope/q"]
        project, unproject = places.projections(self.cameras[:, :NEW], self.intrinsics[:, :NEW])
        for name, matrices in (("pq", project.mT), ("pk", unproject), ("pv", unproject), ("po", project)):
            yield Comparison(f"prope/{name}", streams.carry(q, matrices), tensors[f"prope/{name}"])

    def _vae(self) -> Iterator[Comparison]:
        tensors = self.tensors
        if "vae/z" not in tensors:
            return
        vae = VideoVAE(VAEConfig.from_json(json.loads(self.metadata["vae_config"])))
        weights = {k.removeprefix("vae/weights/"): v for k, v in tensors.items() if k.startswith("vae/weights/")}
        decoder = {k.removeprefix("decoder."): v for k, v in weights.items() if k.startswith("decoder.")}
        vae.decoder.load_state_dict(decoder)
        state, frames = dict[str, Tensor](), list[Tensor]()
        for latent in tensors["vae/z"].split(1, 2):  # as a live world decodes
            part, state = vae.decode(latent, state)
            frames.append(part)
        yield Comparison("vae/frames", torch.cat(frames, 2), tensors["vae/frames"])


def weights_of(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The transformer's weights by their published names, those included that a case does not store."""
    stored = {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}
    return stored | {name: _drawn(metadata, name) for name in json.loads(metadata.get("omitted_weights", "{}"))}


def _drawn(metadata: Mapping[str, str], name: str) -> Tensor:
    """A weight that a case does not store: normal values over the root of the inputs, from the seed that it names."""
    recipe, shape = json.loads(metadata["omitted_weights"])[name], json.loads(metadata[f"shape:{name}"])
    found = re.search(r"RandomState\((\d+)\)", recipe)
    if found is None:
        raise InputError(f"the recipe of the omitted weight {name!r} names no RandomState(seed): {recipe!r}")
    values: Any = np.random.RandomState(int(found[1])).standard_normal(shape).astype(np.float32)
    return torch.from_numpy((values / np.sqrt(shape[1])).astype(np.float32))
