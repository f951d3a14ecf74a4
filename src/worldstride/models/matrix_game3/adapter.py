"""Matrix-Game-3.0 behind the model protocol (specification, sections 1 to 4).

Memory, the past four latents and the new ones are one sequence in every evaluation. What does not change from step to
step is made once a chunk, as the context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from worldstride.attention import Attend
from worldstride.control import ControlSettings
from worldstride.denoising.schedule import shifted_sigmas
from worldstride.errors import InputError, integer_from
from worldstride.models.matrix_game3 import cost, rays, retrieval
from worldstride.models.matrix_game3.config import FRAMES
from worldstride.models.matrix_game3.controls import CONTROLS, Walker, followed, numbers
from worldstride.models.matrix_game3.model import Frozen, MG3Network, Prepared, Text
from worldstride.models.matrix_game3.steering import UNTOLD_KEY, UNTOLD_MOUSE
from worldstride.models.quantised import Scheme, quantised
from worldstride.models.video_decoder import VideoDecoder
from worldstride.models.wan.layers import seen_rows
from worldstride.protocol import ChunkShape, Conditions, Context, Recalled, SamplerSpec

FIRST, NEW, PAST, MEMORY = 15, 10, 4, 5
"""Latents of a world's first chunk, the image's among them; new ones of later chunks, past ones that these go on from,
and slots of memory."""
SHIFT, HIGHEST = 5.0, 0.999
"""Of the noise schedule: its shift, and where it begins before that."""
GUIDANCE = 5.0
"""Of the model that is not distilled."""
NEGATIVE = "negative_"
"""What names of the negative prompt's states begin with."""
NAMES = ("text", "text_mask")


@dataclass(frozen=True, eq=False)
class MG3Prompt:
    """What a prompt becomes once for all chunks."""

    branches: tuple[Text, ...]
    """Of the guidance branches, the conditional one first."""
    image: Tensor | None
    """Latent of the first image [1, C, h, w]; None where none was given."""


@dataclass(frozen=True, eq=False)
class MG3Inputs:
    """What a chunk is conditioned on, in one guidance branch."""

    cameras: Tensor
    """Of the window's latents [B, T, 4, 4], float64."""
    first: int
    """Number of the window's first latent in its world."""
    keys: Tensor
    """Keyboard of the window's frames [B, F, 6]."""
    mouse: Tensor
    """[B, F, 2]"""
    clean: Tensor | None
    """Latents that the window begins with [B, n, C, h, w]."""
    text: Text
    branch: int = 0
    """1 is the negative prompt's, which is told no actions and shown no memory."""

    @property
    def given(self) -> int:
        """Latents that the window begins with."""
        return 0 if self.clean is None else self.clean.shape[1]


@dataclass(frozen=True, eq=False)
class MG3Context:
    """Remembered latents, and what every step of the chunk reads."""

    memory: Tensor | None
    """[B, M, C, h, w]; None where there are none."""
    prepared: tuple[Prepared, ...]
    """For each guidance branch."""
    captures: bool = False
    """Whether evaluations leave behind what new latents see of all others."""
    frozen: tuple[Frozen, ...] = ()
    """What one left behind, of every block; then new latents alone are computed."""

    @property
    def latents(self) -> int:
        """Remembered latents in it."""
        return 0 if self.memory is None else self.memory.shape[1]

    @property
    def bytes(self) -> int:
        """Bytes of all of it."""
        own = 0 if self.memory is None else self.memory.numel() * self.memory.element_size()
        frozen = (t for block in self.frozen for t in (block.keys, block.values, *(block.moving or ())))
        return own + sum(p.bytes for p in self.prepared) + sum(t.numel() * t.element_size() for t in frozen)


class MatrixGame3:
    """`WorldModel` of the 5B models: distilled to a few steps, or guided."""

    name = "matrix_game3"

    def __init__(
        self, network: MG3Network, decoder: VideoDecoder, storage: torch.dtype = torch.bfloat16, steps: int = 3,
        guidance: float | None = None, rounded: bool = True, shift: float = SHIFT,
    ) -> None:  # fmt: skip
        """A model that makes frames of the decoder's size.

        Args:
            network: the transformer.
            decoder: the VAE at a frame size that tokens (32 pixels) divide; `InputError` on another one.
            storage: precision of latents between steps (bfloat16 upstream).
            steps: solver steps at full compute.
            guidance: scale of classifier-free guidance of models that are not distilled; prompts then need negative
                states, too.
            rounded: whether noise levels are rounded to bfloat16, as upstream's are on a GPU (1000, 908, 712).
            shift: of the noise schedule.
        """
        token, pixels = network.config.side, network.config.pixels
        if any(n % token for n in decoder.size):
            size = " x ".join(map(str, decoder.size))
            raise InputError(f"frames must be multiples of {token} pixels high and wide, got {size}")
        self.network, self.config, self.decoder, self.storage = network, network.config, decoder, storage
        self.steps, self.guidance, self.rounded, self.shift = steps, guidance, rounded, shift
        self.device, self.dtype = network.enter.weight.device, network.enter.weight.dtype
        self.token_grid = (decoder.size[0] // token, decoder.size[1] // token)
        self.latent_shape = (self.config.channels, decoder.size[0] // pixels, decoder.size[1] // pixels)
        self.intrinsics = torch.tensor([[0.5, 0, 0.5], [0, 0.5, 0.5], [0, 0, 1]])
        self._table, self._grid = network.ray_table(*decoder.size), retrieval.frustum()
        self._tokens = self.token_grid[0] * self.token_grid[1]

    def compile_passes(self) -> None:
        """Compile what stands around attention in the blocks; the decoder is not compiled."""
        self.network.compile_passes()

    def quantised(self, scheme: Scheme) -> MatrixGame3:
        """See `Quantises.quantised`: the transformer's blocks."""
        made = copy(self)
        made.network = quantised(self.network, scheme)
        return made

    def chunk(self, k: int) -> ChunkShape:
        """57 frames of 15 latents, the image's first; then 40 of 10, which go on from 4 and see 5 remembered ones."""
        if k == 0:
            return ChunkShape(FIRST, 57, last_frames=tuple(range(0, 57, FRAMES)))
        return ChunkShape(NEW, NEW * FRAMES, clean=PAST, memory=MEMORY)

    def sampler(self, steps: int | None = None, shift: float | None = None) -> SamplerSpec:
        """UniPC on a shifted schedule."""
        steps = self.steps if steps is None else steps
        integer_from("steps", steps, 1)
        sigmas = shifted_sigmas(steps, self.shift if shift is None else shift, HIGHEST)
        return SamplerSpec(sigmas, "unipc", self.storage, self.guidance)

    def navigator(self, settings: ControlSettings) -> Walker:
        """See `Navigates.navigator`."""
        return Walker(settings)

    def image_prompt(self, frames: Tensor) -> Mapping[str, Tensor]:
        """The latent of the one frame of uint8 [1, 1, H, W, 3]."""
        if frames.shape[1] != 1:
            raise InputError(f"Matrix-Game-3.0 begins with one image, got {frames.shape[1]} frames")
        return {"image": self.decoder.encode(frames)[:, 0]}

    def encode_prompt(self, prompt: Mapping[str, Tensor], attend: Attend) -> MG3Prompt:
        """Text keys and values from umT5's states "text" [1, L, 4096]; "text_mask" [1, L] may leave rows out.

        A guided model needs "negative_text", too. Raises `InputError` on what is missing or does not fit.
        """
        known = {"image", *NAMES, *(NEGATIVE + name for name in NAMES)}
        if foreign := sorted(prompt.keys() - known):
            raise InputError(f"unknown prompt states {', '.join(foreign)}; known: {', '.join(sorted(known))}")
        signs = ("",) if self.guidance is None else ("", NEGATIVE)
        branches = list[Text]()
        for sign in signs:
            if f"{sign}text" not in prompt:
                named = sorted(prompt) or "none"
                raise InputError(f"Matrix-Game-3.0 needs encoder states named '{sign}text', got {named}")
            text = seen_rows(prompt[f"{sign}text"], prompt.get(f"{sign}text_mask"), f"{sign}text_mask")
            branches.append(self.network.text(text.to(self.device)))
        return MG3Prompt(tuple(branches), prompt.get("image"))

    def sample_prompt(self, generator: torch.Generator) -> Mapping[str, Tensor]:
        """States of 100 rows of text; of a guided model as many of the negative prompt."""
        signs = ("",) if self.guidance is None else ("", NEGATIVE)
        rows = min(100, self.config.rows)
        return {f"{sign}text": torch.randn(1, rows, self.config.text, generator=generator) for sign in signs}

    def fill(self, frames: Tensor, places: Sequence[int], coming: Tensor, count: int) -> tuple[list[int], list[float]]:
        """See `FillsSlots.fill`. A world's first frame, which is a latent by itself, is never brought back."""
        own = [i for i, place in enumerate(places) if place > 0]
        chosen, alike = retrieval.filled(frames[own], [places[i] for i in own], coming, self._grid)
        kept = self.slots(count)
        return [chosen[i] for i in kept], [alike[i] for i in kept]

    def slots(self, count: int) -> list[int]:
        """See `FillsSlots.slots`: the sink's, which is the last, goes last."""
        return [*range(count - 1), MEMORY - 1][:count]

    def shown(self, cameras: Tensor, coming: Tensor, points: Tensor) -> list[float]:
        """See `FillsSlots.shown`."""
        asking = coming[list(retrieval.ASKING)] if len(coming) == NEW else coming
        return retrieval.shares(asking, cameras, self._grid).mean(0).tolist()

    def prepare(self, conditions: Conditions) -> tuple[MG3Inputs, ...]:
        """Cameras, actions and the clean latents of the window, for each guidance branch."""
        c, encoded = conditions, conditions.encoded
        if not isinstance(encoded, MG3Prompt):
            raise InputError(
                f"{self.name!r} needs an encoded prompt; begin worlds with Engine.open(frames, cameras, prompt=...)"
            )
        clean = c.clean
        if c.index == 0 and encoded.image is not None:
            clean = encoded.image[:, None].expand(len(c.cameras), -1, -1, -1, -1)
        first = 0 if c.index == 0 else FIRST + NEW * (c.index - 1) - PAST
        keys, mouse = (t.to(self.device, non_blocking=True) for t in self._acted(c))
        made = MG3Inputs(c.cameras.double(), first, keys, mouse, clean, encoded.branches[0])
        if self.guidance is None:
            return (made,)
        untold = (torch.full_like(keys, UNTOLD_KEY), torch.full_like(mouse, UNTOLD_MOUSE))
        return made, replace(made, keys=untold[0], mouse=untold[1], text=encoded.branches[1], branch=1)

    def encode_context(self, recalled: Recalled, previous: Context | None, attend: Attend) -> MG3Context:
        """What all steps of the coming chunk read, whose inputs have to be known. `InputError` where they are not."""
        if not recalled.inputs:
            raise InputError(f"{self.name!r} needs to know the coming chunk: Recalled.inputs must be what prepare made")
        count = recalled.latents.shape[1]
        slots = recalled.slots or self.slots(count)
        if count and len(recalled.numbers) != count:
            raise InputError(
                f"{self.name!r} needs a number for each of {count} remembered latents, got {recalled.numbers}"
            )
        made = list[Prepared]()
        for inputs in recalled.inputs:
            seen, latents = [rays.stepwise(inputs.cameras)], inputs.cameras.shape[1]
            numbers = [*range(inputs.first, inputs.first + latents)]
            remembered = count if inputs.branch == 0 else 0
            if remembered:
                asking = [inputs.cameras[:, inputs.given + retrieval.ASKING[slot]] for slot in slots]
                seen.insert(0, rays.recalled(recalled.cameras.double(), torch.stack(asking, 1)))
                numbers[:0] = recalled.numbers
            cameras = torch.cat(seen, 1).float().to(self.device, non_blocking=True)
            places = torch.tensor(numbers).to(self.device, non_blocking=True)
            of = (cameras, places, remembered, inputs.keys, inputs.mouse, self._table)
            made.append(self.network.prepared(*of))
        return MG3Context(recalled.latents.to(self.device) if count else None, tuple(made))

    def velocity(
        self, x: Tensor, sigma: float, inputs: MG3Inputs, context: Context, attend: Attend
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """The network's own prediction for the new latents; given ones go nowhere."""
        context = _checked(context)
        batch, given = len(x), inputs.given
        level = float(int(1000 * sigma))
        if self.rounded:
            level = float(torch.tensor(level).bfloat16())
        levels = torch.zeros(batch, x.shape[1], device=self.device)
        levels[:, given:] = level
        memory = context.memory if inputs.branch == 0 else None
        chunk = context.prepared[inputs.branch]
        left = list[Frozen]() if context.captures else None
        of = (x, levels, memory, chunk, inputs.text, attend, given, left, context.frozen)
        made = self.network.velocity(*of).float()
        whole = torch.cat([torch.zeros_like(x[:, :given], dtype=made.dtype), made], 1)
        return whole, {} if left is None else {"frozen": tuple(left)}

    def capturing(self, context: Context) -> MG3Context:
        """See `FreezesContext.capturing`."""
        return replace(_checked(context), captures=True, frozen=())

    def frozen(self, context: Context, captured: Mapping[str, Any]) -> MG3Context:
        """See `FreezesContext.frozen`."""
        return replace(_checked(context), captures=False, frozen=captured["frozen"])

    def clamp(self, x: Tensor, inputs: MG3Inputs) -> Tensor:
        """x with the given latents re-imposed."""
        if inputs.clean is None:
            return x
        return torch.cat([inputs.clean.to(x), x[:, inputs.given :]], 1)

    def commit(self, clean: Tensor, inputs: MG3Inputs) -> Tensor:
        """The new latents; of a world's first chunk all, the image's among them."""
        return clean if inputs.first == 0 else clean[:, inputs.given :]

    def context_flops(self, encoded: int, seen: float) -> float:
        """Of what is made once a chunk for the window and for remembered latents."""
        return cost.chunk_flops(self.config, self._tokens, encoded + NEW + PAST)

    def evaluation_flops(self, latents: int, context: float) -> float:
        """See `Costed.evaluation_flops`."""
        return self.joint_flops(latents + context, latents + context)

    def joint_flops(self, latents: float, seen: float, density: float = 1.0) -> float:
        """See `FreezesContext.joint_flops`."""
        return cost.evaluation_flops(self.config, self._tokens, latents, seen, density)

    def _acted(self, c: Conditions) -> tuple[Tensor, Tensor]:
        """Keyboard [B, F, 6] and mouse [B, F, 2] of the window's frames: as given, else guessed from cameras."""
        count = FRAMES * (0 if c.clean is None else c.clean.shape[1])
        if len(c.past_actions) == count and c.actions:
            told = numbers([*c.past_actions, *c.actions], CONTROLS)
            return told[0][None].expand(len(c.cameras), -1, -1), told[1][None].expand(len(c.cameras), -1, -1)
        return followed(c.cameras[:, : count // FRAMES], c.frame_cameras, CONTROLS)


def _checked(context: Context) -> MG3Context:
    if not isinstance(context, MG3Context):
        raise TypeError(f"context must be an MG3Context, got {type(context).__name__}")
    return context
