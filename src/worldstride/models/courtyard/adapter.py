"""The courtyard network behind the model protocol."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from worldstride import camera
from worldstride.attention import Attend, Partial
from worldstride.denoising.schedule import shifted_sigmas
from worldstride.errors import InputError, integer_from
from worldstride.models.courtyard import cost
from worldstride.models.courtyard.codec import PatchCodec, from_levels, to_levels
from worldstride.models.courtyard.geometry import FIELD_OF_VIEW, Geometry, geometry, turn_in_place
from worldstride.models.courtyard.model import CourtyardNetwork, KeysValues
from worldstride.protocol import ChunkShape, Conditions, Context, Recalled, SamplerSpec
from worldstride.rows import on_device

FULL_STEPS = 8
"""Solver steps at full compute."""


def best_shift(steps: int) -> float:
    """Shift of the noise schedule for a number of steps: 6 - log2(steps), at least 1.

    2, 4 and 8 steps measured best with 5, 4 and 3 (energy score and revisits against what is new and looked away at);
    the others lie on the line through them.
    """
    return max(1.0, 6.0 - math.log2(steps))


@dataclass(frozen=True, eq=False)
class CourtyardContext:
    """Keys and values of remembered frames, one pair a block."""

    keys_values: tuple[KeysValues | Partial, ...]
    """Or, for reuse, attention to them."""
    latents: int
    apart: bool = False
    """Whether evaluations keep attention to the context apart, and capture it."""

    @property
    def bytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(t.numel() * t.element_size() for pair in self.keys_values for t in pair)


@dataclass(frozen=True, eq=False)
class CourtyardInputs:
    """What stays the same from step to step."""

    geometry: Geometry


class CourtyardModel:
    """`WorldModel` of the shipped world."""

    name = "courtyard"

    def __init__(self, network: CourtyardNetwork, dtype: torch.dtype) -> None:
        self.network, self.config, self.dtype = network, network.config, dtype
        self.device = network.place.device
        self.decoder = PatchCodec(network.config, self.device)
        self.intrinsics = camera.intrinsics_from_fov(FIELD_OF_VIEW)

    def compile_passes(self) -> None:
        """Compile blocks and refinement when they are first met; on a CPU every size of the context once, seconds each.

        A GPU is given batches of many sizes, since worlds that take different steps part: there sizes stay open.
        """
        self.network.compile_passes(None if self.device.type == "cuda" else False)

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of a frame's tokens."""
        return self.config.grid

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Patches of a frame and values of a patch."""
        return (self.config.tokens, self.config.values)

    def chunk(self, k: int) -> ChunkShape:
        """Every chunk is alike; one latent is one frame."""
        c = self.config
        return ChunkShape(new=c.chunk, frames=c.chunk, window=c.window, memory=c.memory, sink=c.sink)

    def sampler(self, steps: int | None = None, shift: float | None = None) -> SamplerSpec:
        """Euler on a shifted schedule; the shift that measured best for the number of steps unless one is given."""
        steps = FULL_STEPS if steps is None else steps
        integer_from("steps", steps, 1)
        return SamplerSpec(shifted_sigmas(steps, best_shift(steps) if shift is None else shift))

    def prepare(self, conditions: Conditions) -> tuple[CourtyardInputs, ...]:
        """Rotary tables and camera features of the coming frames; `InputError` on another camera's intrinsics."""
        given = conditions.intrinsics.to(self.intrinsics)
        if given.shape != (3, 3) or not torch.allclose(given, self.intrinsics, atol=1e-2):
            raise InputError(
                "the courtyard model knows one camera, with normalised intrinsics "
                f"{self.intrinsics.tolist()} (80 degrees across); got {given.tolist()}"
            )
        cameras = self._here(conditions.cameras)
        ranks = self._here(conditions.positions).expand(cameras.shape[:2])
        return (CourtyardInputs(geometry(self.config, cameras, ranks, torch.zeros_like(ranks))),)

    def encode_context(
        self,
        recalled: Recalled,
        previous: Context | None,
        attend: Attend,
    ) -> CourtyardContext:
        """One pass over all remembered frames; nothing of `previous` is kept."""
        count = recalled.latents.shape[1]
        return CourtyardContext(tuple(self._written(recalled, None, attend)) if count else (), count)

    def encode_latents(
        self,
        recalled: Recalled,
        past: Context | None,
        attend: Attend,
    ) -> Tensor:
        """Keys and values [B, N, depth, 2, heads, tokens, head_dim] of frames that see each other and `past`."""
        written = self._written(recalled, None if past is None else _own(past), attend)
        lead, n, first = recalled.latents.shape[:2], self.config.tokens, written[0][0]
        made = first.new_empty(*lead, len(written), 2, first.shape[1], n, first.shape[3])
        for d, pair in enumerate(written):
            for i, part in enumerate(pair):
                made[:, :, d, i] = part.unflatten(2, (-1, n)).movedim(2, 1)  # [B, N, heads, n, e]
        ranks, roles = self._here(recalled.positions), self._here(recalled.kinds)
        turn_in_place(self.config, made[:, :, :, 0], ranks, roles, 1, back=True)
        return made

    def join_context(self, kept: Sequence[Tensor], recalled: Recalled) -> CourtyardContext:
        """Context of frames whose keys and values [B, depth, 2, heads, tokens, head_dim] were kept."""
        if not kept:
            return CourtyardContext((), 0)
        b, depth, two, heads, n, e = kept[0].shape
        # a block's keys and values lie in one piece: every evaluation reads them
        every = kept[0].new_empty(depth, two, b, heads, len(kept), n, e)
        for i, record in enumerate(kept):
            every[:, :, :, :, i] = record.movedim(0, 2)
        turn_in_place(self.config, every[:, 0], self._here(recalled.positions), self._here(recalled.kinds), 3)
        return CourtyardContext(tuple((k, v) for k, v in every.flatten(4, 5)), len(kept))

    def _here(self, x: Tensor) -> Tensor:
        """x on the model's device, without waiting for what a GPU has to do before."""
        return x.to(self.device, non_blocking=True)

    def _written(self, recalled: Recalled, past: CourtyardContext | None, attend: Attend) -> list[KeysValues]:
        lead, kinds = recalled.latents.shape[:2], recalled.kinds
        ranks, roles = (self._here(t).expand(lead) for t in (recalled.positions, kinds))
        where = geometry(self.config, self._here(recalled.cameras), ranks, roles)
        level = torch.zeros(lead[0], device=self.device)
        seen = None
        if past is not None and self.config.context == "together":
            seen = [p for p in past.keys_values if not isinstance(p, Partial)] or None
        clean, recent = recalled.latents.to(self.device, self.dtype), int((kinds == 0).sum())
        spans = self.config.spans(lead[1] - recent, recent)
        return self.network.context(clean, where, level, attend, spans, seen)

    def velocity(
        self, x: Tensor, sigma: float | Tensor, inputs: CourtyardInputs, context: Context, attend: Attend
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """(x - predicted clean) / sigma; the prediction itself is captured as "clean". sigma is a number or [B]."""
        held = _own(context)
        past = held.keys_values or (None,) * self.config.depth
        if isinstance(sigma, Tensor):
            level, sigma = sigma, sigma.view(-1, 1, 1, 1)
        else:
            level = torch.full((len(x),), sigma, device=self.device)
        outer = list[Partial]() if held.apart and held.keys_values else None
        clean = self.network.denoise(x.to(self.dtype), inputs.geometry, level, past, attend, outer).to(torch.float32)
        return (x - clean) / sigma, {"clean": clean, "outer": outer}

    def apart(self, context: Context) -> CourtyardContext:
        """The same context; evaluations then keep their attention to it apart, and capture it as "outer"."""
        return replace(_own(context), apart=True)

    def reuse(self, context: Context, captured: Mapping[str, Any]) -> CourtyardContext:
        """A context whose attention is what an earlier evaluation captured; without any, the context itself."""
        outer = captured.get("outer")
        return replace(_own(context), apart=False, **({"keys_values": tuple(outer)} if outer else {}))

    def narrow(
        self, inputs: CourtyardInputs, context: Context, rows: Sequence[int]
    ) -> tuple[CourtyardInputs, CourtyardContext]:
        """Inputs and context of some worlds of a batch."""
        held, at, g = _own(context), on_device(rows, self.device), inputs.geometry

        def of(t: Tensor) -> Tensor:
            return t.index_select(0, at)

        tables = (None if t is None else of(t) for t in (g.features, g.cos, g.sin, g.project, g.unproject))
        pairs = tuple(
            Partial(of(p.out), of(p.lse)) if isinstance(p, Partial) else (of(p[0]), of(p[1])) for p in held.keys_values
        )
        return CourtyardInputs(Geometry(*tables)), replace(held, keys_values=pairs)  # type: ignore[arg-type]

    def context_flops(self, encoded: int, seen: float) -> float:
        """See `Costed.context_flops`."""
        return cost.context_flops(self.config, encoded, seen)

    def evaluation_flops(self, latents: int, context: float) -> float:
        """See `Costed.evaluation_flops`."""
        return cost.evaluation_flops(self.config, latents, context)

    def clamp(self, x: Tensor, inputs: CourtyardInputs) -> Tensor:
        """No latents are given; x as it is."""
        return x

    def commit(self, clean: Tensor, inputs: CourtyardInputs) -> Tensor:
        """Pixels have a range and 256 levels: what is remembered (float16) is what was shown."""
        return from_levels(to_levels(clean)).half()


def _own(context: Context) -> CourtyardContext:
    if not isinstance(context, CourtyardContext):
        raise TypeError(f"context must be a CourtyardContext, got {type(context).__name__}")
    return context
