"""Replay of a golden Matrix-Game-3.0 case of any size: a whole rollout from keyboard and mouse.

A case is an npz file. Inputs are `w/<published name>`, `keyboard` [F, 6], `mouse` [F, 2], `context` (text states
[L, text]), `image_latent` [1, C, 1, h, w] and, of every chunk k, `c<k>/noise`. What has to come out again are `poses`,
`extrinsics`, `timesteps`, `sigmas`, `c<k>/{retrieved,confidence,memory_latent_idx,plucker,latent_out}`,
`c<k>/s<j>/model_out` and `all_latents`; what a case leaves out is not compared. Weights tell most sizes; `config`, a
text of JSON with entries of `MG3Config`, tells the others. Without it they are those of the published width, or of the
smallest case.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldstride import camera
from worldstride.attention import attend
from worldstride.bench.comparison import Comparison
from worldstride.denoising.schedule import shifted_sigmas
from worldstride.denoising.solvers import UniPC
from worldstride.errors import InputError, WorldstrideError
from worldstride.models.matrix_game3 import rays, retrieval
from worldstride.models.matrix_game3.adapter import HIGHEST, NEW, PAST, SHIFT
from worldstride.models.matrix_game3.config import FRAMES
from worldstride.models.matrix_game3.controls import walked
from worldstride.models.matrix_game3.weights import build, config_of

_START = 57
"""Frames of a world's first chunk."""


class MatrixGame3Verifier:
    """Everything in float32 on the CPU; what is brought back has to be identical."""

    def replay(self, case: Path) -> Iterator[Comparison]:
        """See `Verifier.replay`."""
        try:
            with np.load(case, allow_pickle=False) as opened:
                arrays = {name: opened[name] for name in opened.files}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise InputError(f"cannot read the case {case}: {error}") from error
        if not {"keyboard", "mouse", "c0/noise"} <= arrays.keys():
            raise InputError(f"{case} is no Matrix-Game-3.0 case: it needs 'keyboard', 'mouse' and 'c0/noise'")
        try:
            with torch.inference_mode():
                yield from _Replay(case, arrays).all()
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            if isinstance(error, WorldstrideError):
                raise
            raise InputError(f"{case} is a broken Matrix-Game-3.0 case: {type(error).__name__} {error}") from error

    def record(self, case: Path) -> None:
        """See `Verifier.record`."""
        raise InputError("Matrix-Game-3.0 cases come from the original model; they are replayed here, not recorded")


class _Replay:
    """One case."""

    def __init__(self, case: Path, arrays: Mapping[str, Any]) -> None:
        told = json.loads(str(arrays["config"])) if "config" in arrays else {}
        self.arrays = {k: torch.from_numpy(v) for k, v in arrays.items() if k != "config"}
        weights = {k.removeprefix("w/"): v for k, v in self.arrays.items() if k.startswith("w/")}
        self.network = build(config_of(weights, told), weights, str(case))
        self.keys, self.mouse = (self.arrays[name].float() for name in ("keyboard", "mouse"))
        self.image = self.finished = self.arrays["image_latent"].transpose(1, 2)
        self.text = self.network.text(self.arrays["context"][None])
        self.table = self.network.ray_table(*(self.network.config.pixels * n for n in self.image.shape[3:]))

    def all(self) -> Iterator[Comparison]:
        """Everything that the case holds."""
        chunks = len(list(takewhile(lambda k: f"c{k}/noise" in self.arrays, count())))
        steps = len([name for name in self.arrays if re.fullmatch(r"c0/s\d+/model_out", name)])
        if not steps:
            raise KeyError("c0/s0/model_out")  # they tell how many steps there are
        sigmas = shifted_sigmas(steps, SHIFT, HIGHEST)
        levels = [float(int(1000 * sigma)) for sigma in sigmas[:-1]]
        yield from self._expected("sigmas", torch.tensor(sigmas))
        yield from self._expected("timesteps", torch.tensor(levels), 0.0)
        cameras = self._cameras(_START + NEW * FRAMES * (chunks - 1))
        yield from self._poses(cameras)
        latents = self.image[:, :0]
        for k in range(chunks):
            yield from self._chunk(k, cameras, latents, sigmas)
            new = self.finished if k == 0 else self.finished[:, -NEW:]
            latents = torch.cat([latents, new], 1)
        yield from self._expected("all_latents", latents.transpose(1, 2))

    def _chunk(self, k: int, cameras: Tensor, latents: Tensor, sigmas: Sequence[float]) -> Iterator[Comparison]:
        """One chunk after `latents` [1, N, C, h, w]; it is `finished` then."""
        size, end = self.image.shape[3:], _START + NEW * FRAMES * k
        if k == 0:
            start, clean, at, numbers, memory = 0, self.image, cameras[0:end:FRAMES], list[int](), None
        else:
            start, clean = end - FRAMES * (PAST + NEW), latents[:, -PAST:]
            at = cameras[start + FRAMES - 1 : end : FRAMES]
            numbers, found = self._retrieved(k, cameras, start, at[PAST:])
            memory = latents[:, numbers]
            yield from found
        references = at[[PAST + i for i in retrieval.ASKING]]
        seen = [rays.recalled(cameras[[FRAMES * i for i in numbers]], references)] if numbers else []
        told, first = torch.cat([*seen, rays.stepwise(at)]), latents.shape[1] - PAST if k else 0
        yield from self._rays(k, told, size)
        frames = slice(start, end)
        ready = self.network.prepared(
            told[None].float(), torch.tensor([*numbers, *range(first, first + len(at))]), len(numbers),
            self.keys[None, frames], self.mouse[None, frames], self.table,
        )  # fmt: skip
        x, solver, given = self.arrays[f"c{k}/noise"].transpose(1, 2).clone(), UniPC(tuple(sigmas)), clean.shape[1]
        for i, sigma in enumerate(sigmas[:-1]):
            x[:, :given], levels = clean, torch.full(x.shape[:2], float(int(1000 * sigma)))
            levels[:, :given] = 0
            velocity = self.network.velocity(x, levels, memory, ready, self.text, attend)
            yield from self._expected(f"c{k}/s{i}/model_out", velocity.transpose(1, 2))
            x = solver.step(i, x, velocity, _no_noise)
        x[:, :given] = clean
        yield from self._expected(f"c{k}/latent_out", x.transpose(1, 2))
        self.finished = x

    def _cameras(self, frames: int) -> Tensor:
        """Cameras [F, 4, 4] that keyboard and mouse lead along."""
        pose, made = torch.zeros(4, dtype=torch.float64), list[Tensor]()
        for keys, mouse in zip(self.keys[:frames], self.mouse[:frames], strict=True):
            made.append(camera.camera_from_pose(pose))
            pose = walked(pose, keys, mouse)
        return torch.stack(made)

    def _poses(self, cameras: Tensor) -> Iterator[Comparison]:
        if (listed := self.arrays.get("extrinsics")) is not None:
            world = torch.tensor([[0, 0, 1], [1, 0, 0], [0, -1, 0]], dtype=torch.float64)
            expected = listed.clone()
            expected[:, :3] = world.T @ expected[:, :3]  # upstream's axes: ahead, to the right, up
            yield Comparison("extrinsics", cameras[: len(expected)], expected[: len(cameras)])
        if (listed := self.arrays.get("poses")) is not None:
            where = torch.stack([camera.pose_from_camera(c) for c in cameras])
            x, z, yaw, pitch = where.T
            got = torch.stack([100 * z, 100 * x, torch.zeros_like(x), -pitch.rad2deg(), yaw.rad2deg()], -1)
            yield Comparison("poses", got, listed[: len(got)].double())

    def _retrieved(
        self, k: int, cameras: Tensor, start: int, coming: Tensor
    ) -> tuple[list[int], list[Comparison]]:  # fmt: skip
        """Latents that chunk k brings back, and what is compared of that."""
        frames, grid = cameras[1:start], retrieval.frustum()
        owners = [(f - 1) // FRAMES + 1 for f in range(1, start)]
        chosen, _ = retrieval.filled(frames, owners, coming, grid)
        shares = retrieval.shares(coming[list(retrieval.ASKING)], frames, grid)
        compared = [
            *self._expected(f"c{k}/retrieved", 1 + shares.argmax(1), 0.0),
            *self._expected(f"c{k}/confidence", shares.amax(1), 1e-6),
            *self._expected(f"c{k}/memory_latent_idx", torch.tensor(chosen), 0.0),
        ]
        return chosen, compared

    def _rays(self, k: int, cameras: Tensor, size: torch.Size) -> Iterator[Comparison]:
        """What tokens are told, as planes of latent pixels [1, 1536, T, h, w]."""
        pixels = self.network.config.pixels
        told = rays.told(cameras, pixels * size[0], pixels * size[1])
        planes = told.unflatten(1, (size[0] // 2, size[1] // 2)).unflatten(-1, (-1, 2, 2))  # [T, H, W, 1536, 2, 2]
        planes = planes.permute(3, 0, 1, 4, 2, 5).flatten(4).flatten(2, 3)
        yield from self._expected(f"c{k}/plucker", planes[None])

    def _expected(self, name: str, got: Tensor, tolerance: float | None = None) -> Iterator[Comparison]:
        if name in self.arrays:
            of = (name, got.double(), self.arrays[name].double())
            yield Comparison(*of) if tolerance is None else Comparison(*of, tolerance)


def _no_noise(step: int) -> Tensor:
    raise ValueError(f"UniPC asked for noise in step {step}")
