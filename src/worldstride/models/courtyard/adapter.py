"""The courtyard network behind the model protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worldstride import camera
from worldstride.attention import Attend
from worldstride.control import Action
from worldstride.denoising.schedule import shifted_sigmas
from worldstride.errors import InputError
from worldstride.models.courtyard.codec import PatchCodec, from_levels, to_levels
from worldstride.models.courtyard.geometry import FIELD_OF_VIEW, Geometry, geometry
from worldstride.models.courtyard.model import CourtyardNetwork, KeysValues
from worldstride.protocol import ChunkShape, Conditions, Context, SamplerSpec

FULL_STEPS = 8
"""Solver steps at full compute."""
SHIFTS = {2: 5.0, 4: 4.0, 8: 3.0}
"""Schedule shifts by number of steps, chosen by measurement (energy score and revisits against what is new and looked
away at); every other number of steps runs unshifted."""


@dataclass(frozen=True, eq=False)
class CourtyardContext:
    """Keys and values of remembered frames, one pair a block."""

    keys_values: tuple[KeysValues, ...]
    latents: int

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
        """Compile blocks and refinement; every size of the context once, seconds each, when it is first met."""
        self.network.compile_passes()

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
        return SamplerSpec(shifted_sigmas(steps, SHIFTS.get(steps, 1.0) if shift is None else shift))

    def prepare(self, conditions: Conditions) -> tuple[CourtyardInputs, ...]:
        """Rotary tables and camera features of the coming frames; `InputError` on another camera's intrinsics."""
        given = conditions.intrinsics.to(self.intrinsics)
        if given.shape != (3, 3) or not torch.allclose(given, self.intrinsics, atol=1e-2):
            raise InputError(
                "the courtyard model knows one camera, with normalised intrinsics "
                f"{self.intrinsics.tolist()} (80 degrees across); got {given.tolist()}"
            )
        cameras = conditions.cameras.to(self.device)
        ranks = conditions.positions.to(self.device).expand(cameras.shape[:2])
        return (CourtyardInputs(geometry(self.config, cameras, ranks, torch.zeros_like(ranks))),)

    def encode_context(
        self,
        latents: Tensor,
        cameras: Tensor,
        actions: Sequence[Action | None],
        positions: Tensor,
        kinds: Tensor,
        previous: Context | None,
        attend: Attend,
    ) -> CourtyardContext:
        """One pass over all remembered frames; nothing of `previous` is kept."""
        if latents.shape[1] == 0:
            return CourtyardContext((), 0)
        cameras, lead = cameras.to(self.device), latents.shape[:2]
        where = geometry(
            self.config, cameras, positions.to(self.device).expand(lead), kinds.to(self.device).expand(lead)
        )
        clean = latents.to(self.device, self.dtype)
        level = torch.zeros(lead[0], device=self.device)
        written = self.network.context(clean, where, level, attend)
        return CourtyardContext(tuple(written), lead[1])

    def velocity(
        self, x: Tensor, sigma: float, inputs: CourtyardInputs, context: Context, attend: Attend
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """(x - predicted clean) / sigma; the prediction itself is captured as "clean"."""
        if not isinstance(context, CourtyardContext):
            raise TypeError(f"context must be a CourtyardContext, got {type(context).__name__}")
        past = context.keys_values or (None,) * self.config.depth
        level = torch.full((len(x),), sigma, device=self.device)
        clean = self.network.denoise(x.to(self.dtype), inputs.geometry, level, past, attend).to(torch.float32)
        return (x - clean) / sigma, {"clean": clean}

    def clamp(self, x: Tensor, inputs: CourtyardInputs) -> Tensor:
        """No latents are given; x as it is."""
        return x

    def commit(self, clean: Tensor, inputs: CourtyardInputs) -> Tensor:
        """Pixels have a range and 256 levels: what is remembered (float16) is what was shown."""
        return from_levels(to_levels(clean)).half()
