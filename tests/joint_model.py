"""A toy world model of the joint structure: one bidirectional sequence in every evaluation, no keys and values kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from worldstride import camera, rope
from worldstride.acceleration import resolve
from worldstride.attention import Attend
from worldstride.denoising import shifted_sigmas
from worldstride.engine import Engine, EngineSource
from worldstride.errors import InputError
from worldstride.protocol import ChunkShape, Conditions, Context, Recalled, SamplerSpec

CHANNELS, HEIGHT, WIDTH, CELL = 4, 2, 3, 8
"""Latents are [4, 2, 3], frames 16 x 24 pixels."""
DIM, HEADS, TEXT = 32, 2, 6
FREQUENCIES = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02)


@dataclass(frozen=True)
class JointContext:
    """The remembered latents themselves."""

    remembered: Tensor  # [B, N, C, h, w]
    cameras: Tensor
    ranks: Tensor

    @property
    def latents(self) -> int:
        return self.remembered.shape[1]

    @property
    def bytes(self) -> int:
        return self.remembered.numel() * self.remembered.element_size()


@dataclass(frozen=True)
class JointInputs:
    cameras: Tensor  # [B, T, 4, 4]
    ranks: Tensor  # [T]
    clean: Tensor | None
    hint: Tensor  # [1, 1, DIM]: text and keys


class JointDecoder:
    """Causal: a latent fades in over 4 frames from the latent before; the first of a world makes 5."""

    def __init__(self, rgb: Tensor) -> None:
        self._rgb = rgb  # [C, 3]

    def encode(self, frames: Tensor) -> Tensor:
        size = (CELL * HEIGHT, CELL * WIDTH, 3)
        if frames.dtype != torch.uint8 or frames.ndim != 5 or tuple(frames.shape[2:]) != size:
            raise InputError(f"frames must be uint8 [B, F, {size[0]}, {size[1]}, 3], got {list(frames.shape)}")
        kept = frames[:, ::4].float() / 127.5 - 1
        cells = F.avg_pool2d(kept.movedim(-1, -3).flatten(0, 1), CELL).unflatten(0, kept.shape[:2])
        return torch.einsum("btchw,dc->btdhw", cells, self._rgb)

    def decode(self, latents: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        latents = latents.float()
        fresh = "last" not in state
        before = torch.cat([latents[:, :1] if fresh else state["last"], latents[:, :-1]], 1)
        share = torch.arange(1, 5) / 4
        mixed = before[:, :, None].lerp(latents[:, :, None], share[:, None, None, None]).flatten(1, 2)
        if fresh:
            mixed = torch.cat([latents[:, :1], mixed], 1)
        colour = (torch.einsum("bfchw,cd->bfdhw", mixed, self._rgb).tanh() * 127.5 + 127.5).round().to(torch.uint8)
        frames = colour.repeat_interleave(CELL, -1).repeat_interleave(CELL, -2).movedim(-3, -1)
        return frames, {"last": latents[:, -1:].clone()}


class JointModel:
    """`WorldModel` whose context is plain latents; chunk 0 differs from the later ones."""

    name = "joint"
    latent_shape = (CHANNELS, HEIGHT, WIDTH)
    device = torch.device("cpu")

    def __init__(self, storage: torch.dtype = torch.bfloat16, guidance: float | None = None) -> None:
        self.storage, self.guidance = storage, guidance
        generator = torch.Generator().manual_seed(0)

        def weight(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=generator) / rows**0.5

        self.tokens_in, self.camera_in, self.level_in = weight(CHANNELS, DIM), weight(12, DIM), weight(1, DIM)
        self.text_in, self.keys_in, self.place = weight(TEXT, DIM), weight(1, DIM), weight(HEIGHT * WIDTH, DIM)
        self.qkv, self.back, self.out = weight(DIM, 3 * DIM), weight(DIM, DIM), weight(DIM, CHANNELS)
        self.decoder = JointDecoder(weight(CHANNELS, 3))
        self.intrinsics = camera.intrinsics_from_fov(1.2, WIDTH / HEIGHT)

    def chunk(self, k: int) -> ChunkShape:
        return ChunkShape(14, 57, clean=1) if k == 0 else ChunkShape(10, 40, clean=4, memory=4, sink=1)

    def sampler(self, steps: int | None = None, shift: float | None = None) -> SamplerSpec:
        sigmas = shifted_sigmas(3 if steps is None else steps, 5.0 if shift is None else shift)
        return SamplerSpec(sigmas, "unipc", self.storage, self.guidance)

    def prepare(self, conditions: Conditions) -> tuple[JointInputs, ...]:
        text = conditions.prompt.get("text", torch.ones(TEXT))
        keys = torch.tensor([[float(sum(len(a.keys) for a in conditions.actions))]])
        hint = (text @ self.text_in + keys @ self.keys_in)[:, None]
        c = conditions
        branch = JointInputs(c.cameras.clone(), c.positions, None if c.clean is None else c.clean.clone(), hint)
        if self.guidance is None:
            return (branch,)
        return branch, JointInputs(branch.cameras, branch.ranks, branch.clean, torch.zeros_like(hint))

    def encode_context(
        self,
        recalled: Recalled,
        previous: Context | None,
        attend: Attend,
    ) -> Context:
        return JointContext(recalled.latents.clone(), recalled.cameras.clone(), recalled.positions.clone())

    def velocity(
        self, x: Tensor, sigma: float, inputs: JointInputs, context: JointContext, attend: Attend
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        count, total = context.latents, context.latents + x.shape[1]
        head = 0 if inputs.clean is None else inputs.clean.shape[1]
        sequence = torch.cat([context.remembered.float(), x.float()], 1)
        cameras = torch.cat([context.cameras, inputs.cameras], 1)
        level = torch.tensor([0.0] * (count + head) + [sigma] * (x.shape[1] - head))[None, :, None]
        seen = camera.relative(cameras, inputs.cameras[:, -1:])[..., :3, :].flatten(2)
        each = seen @ self.camera_in + level @ self.level_in + inputs.hint  # [B, T, DIM]
        cells = sequence.flatten(3).transpose(2, 3) @ self.tokens_in  # [B, T, n, DIM]
        h = (cells + self.place + each[:, :, None]).flatten(1, 2)
        q, k, v = (h @ self.qkv).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        ranks = torch.cat([context.ranks, inputs.ranks]).float().repeat_interleave(HEIGHT * WIDTH)
        angle = rope.angles(ranks, FREQUENCIES)
        q, k = (rope.rotate(t, angle.cos(), angle.sin()) for t in (q, k))
        h = h + attend(q, k, v).transpose(1, 2).flatten(2) @ self.back
        made = h.tanh() @ self.out
        made = made.unflatten(1, (total, HEIGHT * WIDTH)).transpose(2, 3).unflatten(-1, (HEIGHT, WIDTH))
        return x.float() - made[:, count:], {}

    def clamp(self, x: Tensor, inputs: JointInputs) -> Tensor:
        if inputs.clean is None:
            return x
        return torch.cat([inputs.clean.to(x.dtype), x[:, inputs.clean.shape[1] :]], 1)

    def commit(self, clean: Tensor, inputs: JointInputs) -> Tensor:
        return clean[:, 0 if inputs.clean is None else inputs.clean.shape[1] :]


def joint_engine(model: JointModel | None = None, fingerprint: str = "joint") -> Engine:
    return Engine(model or JointModel(), EngineSource("joint", None, "random", fingerprint), resolve("off"))
