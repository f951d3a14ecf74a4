"""Held-out walks with what is known of every pixel: seen in the window, seen before, never seen, moving."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from data import FAMILIES, ContextKind, context_ranks, take
from retriever import Retriever
from torch import Tensor

from worldstride import camera, worlds
from worldstride.attention import attend
from worldstride.bench.walks import FIRST_SEED, pixel_classes
from worldstride.context import retrieval
from worldstride.denoising import DenoisePlan, denoise
from worldstride.models.courtyard.adapter import CourtyardModel
from worldstride.models.courtyard.codec import from_levels, to_levels
from worldstride.models.courtyard.config import CourtyardConfig
from worldstride.models.courtyard.model import patchify, unpatchify
from worldstride.protocol import Conditions, Recalled

Memory = Literal["pose", "none", "random", "oracle"]


@dataclass(frozen=True)
class Walks:
    """Rendered walks in held-out worlds."""

    scene: worlds.Scene
    pose: Tensor
    """[N, n, 4]"""
    cameras: Tensor
    """[N, n, 4, 4]"""
    patches: Tensor
    """[N, n, tokens, values] uint8"""

    @property
    def time(self) -> Tensor:
        """Time of every frame [N, n]."""
        return torch.arange(self.pose.shape[1], device=self.pose.device, dtype=torch.float32).expand(len(self.pose), -1)


def shoot(scene: worlds.Scene, pose: Tensor, config: CourtyardConfig, at_once: int = 256) -> Walks:
    """Render walks [N, n, 4] of a scene, a few frames at a time."""
    n = pose.shape[1]
    time = torch.arange(n, device=pose.device, dtype=torch.float32).expand(len(pose), -1)
    block = max(1, at_once // n)
    parts = [
        patchify(
            worlds.render(scene[i : i + block], pose[i : i + block], time[i : i + block], config.size), config.patch
        )
        for i in range(0, len(pose), block)
    ]
    return Walks(scene, pose, camera.camera_from_pose(pose), torch.cat(parts))


def sample(family: str, count: int, config: CourtyardConfig, device: torch.device, frames: int | None = None) -> Walks:
    """Walks of the family's own kind in `count` held-out worlds."""
    scene = worlds.scene_from_seed(family, range(FIRST_SEED, FIRST_SEED + count), device)
    walk = FAMILIES[family][1] if family in FAMILIES else worlds.sample_walk
    n = frames or (FAMILIES[family][2] if family in FAMILIES else 128)
    pose = walk(scene, n, torch.Generator(device).manual_seed(FIRST_SEED))
    return shoot(scene, pose, config)


@torch.no_grad()
def predict(
    model: CourtyardModel, context: Tensor, context_cameras: Tensor, kind: ContextKind, cameras: Tensor, seed: int,
    steps: int, shift: float | None = None, solver: Literal["euler", "unipc"] = "euler", at_once: int = 64,
) -> Tensor:  # fmt: skip
    """One chunk a walk: context patches uint8 [N, F, n, values] -> new patches uint8 [N, C, n, values].

    Noise is fixed by seed and walk, whatever else differs between two calls.
    """
    ranks, kinds = context_ranks(kind, context.device)
    out = []
    for i in range(0, len(context), at_once):
        part = slice(i, i + at_once)
        past = from_levels(context[part]).to(model.dtype)
        written = model.encode_context(Recalled(past, context_cameras[part], ranks, kinds), None, attend)
        lead = cameras[part].shape[:2]
        positions = torch.arange(lead[1], device=context.device)
        conditions = Conditions(0, cameras[part], cameras[part], model.intrinsics, positions=positions)
        inputs = model.prepare(conditions)
        generator = torch.Generator(context.device).manual_seed(1000 * seed + i)
        noise = torch.randn(*lead, *model.latent_shape, generator=generator, device=context.device)
        plan = DenoisePlan(replace(model.sampler(steps, shift), solver=solver))
        clean, _ = denoise(model, noise, inputs, written, plan, attend, _no_fresh_noise)
        out.append(to_levels(clean))
    return torch.cat(out)


def _no_fresh_noise(step: int) -> Tensor:
    raise RuntimeError(f"a sampler asked for fresh noise at step {step}")


def images(patches: Tensor, config: CourtyardConfig) -> Tensor:
    """Patches uint8 [..., n, values] -> images [..., 3, H, W] in [0, 1]."""
    return unpatchify(patches.float() / 255, config.grid, config.patch)


class HeldOut:
    """One chunk of each held-out walk, teacher-forced, with its pixels' classes.

    The chunk is anywhere in the walk, or with `revisiting` where the camera comes back to what it saw long ago.
    """

    def __init__(
        self,
        walks: Walks,
        config: CourtyardConfig,
        revisiting: bool = False,
    ) -> None:
        device, (count, n) = walks.pose.device, walks.pose.shape[:2]
        self.walks, self.config = walks, config
        self.rows, self.retriever = torch.arange(count, device=device), Retriever(device)
        least = config.window + config.memory
        generator = torch.Generator().manual_seed(FIRST_SEED)
        self.start = torch.randint(least, n - config.chunk + 1, (count,), generator=generator).to(device)
        if revisiting:
            self.start = self.retriever.revisiting_start(walks.cameras, least, config.chunk, config.window)
        self.frames = self.start[:, None] + torch.arange(config.chunk, device=device)
        self.cameras = take(walks.cameras, self.rows, self.frames)
        self.truth = images(take(walks.patches, self.rows, self.frames), config)
        mask = config.size // 2  # co-visibility is computed at half the resolution
        seen = torch.zeros(count, n, config.chunk, mask, mask, dtype=torch.bool, device=device)
        moving = []
        for i in range(0, count, 8):
            part = slice(i, i + 8)
            pose, time = (take(t, self.rows[part], self.frames[part]) for t in (walks.pose, walks.time))
            arguments = (walks.scene[part], pose, time)
            seen[part] = worlds.covisible(*arguments, walks.pose[part], walks.time[part], mask)
            moving.append(worlds.moving_pixels(*arguments, mask))
        self.moving, self._seen = torch.cat(moving), seen
        recent, older = self._recent_and_older(config.window)
        self.recent = (seen & recent[..., None, None, None]).any(1)
        self.before = (seen & older[..., None, None, None]).any(1)

    def _recent_and_older(self, window: int) -> tuple[Tensor, Tensor]:
        """Which frames are in a window of so many frames, and which before it: bool [N, n] each."""
        ids, start = torch.arange(self.walks.pose.shape[1], device=self.rows.device), self.start[:, None]
        return (ids < start) & (ids >= start - window), ids < start - window

    def masks(self) -> dict[str, Tensor]:
        """Pixel classes [N, C, H, W] of static surfaces, and of moving ones apart."""
        return pixel_classes(self.recent, self.before, self.moving)

    def frame_classes(self) -> dict[str, Tensor]:
        """Classes of whole frames [N, C]: revisit (under 60 % of pixels in the window, at least 90 % seen at all)."""
        recent, known = self.recent.float().mean((2, 3)), (self.recent | self.before).float().mean((2, 3))
        return {"revisit": (recent < 0.6) & (known >= 0.9), "recent": recent >= 0.9, "novel": known < 0.7}

    def memory(self, how: Memory, count: int, window: int) -> Tensor:
        """Memory frames [N, count] chosen by pose, at random, or by what each frame truly shows of the target.

        As in a session, all frames before the `window` recent ones may be chosen, for what those do not show.
        """
        if how == "none" or count == 0:
            return torch.empty(len(self.rows), 0, dtype=torch.long, device=self.rows.device)
        before = self.start - window
        if how == "random":
            pick = torch.rand(len(self.rows), count, generator=torch.Generator().manual_seed(3)).to(before.device)
            return (pick * before[:, None]).long().sort(1).values
        if how == "oracle":
            recent, older = self._recent_and_older(window)
            wanted = ~(self._seen & recent[..., None, None, None]).any(1, keepdim=True)  # the window shows the rest
            covers = (self._seen & older[..., None, None, None] & wanted).flatten(2)
            return retrieval.greedy(covers.float(), older, count).sort(1).values
        return self.retriever.memory(self.cameras[:, [0, -1]], self.walks.cameras, before, count, window)

    def recall(self, how: Memory) -> float:
        """Share of the revisited pixels that the chosen memory frames show, over all walks."""
        picks = self.memory(how, self.config.memory, self.config.window)
        shown = take(self._seen, self.rows, picks).any(1)  # [N, C, h, w]
        wanted = self.before & ~self.recent & ~self.moving
        return float((shown & wanted).sum() / wanted.sum().clamp_min(1))

    def run(
        self, model: CourtyardModel, how: Memory = "pose", steps: int = 8, seed: int = 1, shift: float | None = None,
        count: int | None = None, window: int | None = None, solver: Literal["euler", "unipc"] = "euler",
    ) -> Tensor:  # fmt: skip
        """Predicted images [N, C, 3, H, W] in [0, 1]."""
        window = self.config.window if window is None else window
        memory = self.memory(how, self.config.memory if count is None else count, window)
        recent = self.start[:, None] - window + torch.arange(window, device=memory.device)
        index = torch.cat([memory, recent], 1)
        kind = ContextKind(memory.shape[1], window)
        context, cameras = take(self.walks.patches, self.rows, index), take(self.walks.cameras, self.rows, index)
        return images(predict(model, context, cameras, kind, self.cameras, seed, steps, shift, solver), self.config)
