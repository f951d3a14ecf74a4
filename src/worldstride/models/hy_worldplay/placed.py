"""What all of HY-WorldPlay's models share: where latents are, how cameras moved, and what old clips show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from worldstride.attention.streams import Places
from worldstride.denoising.schedule import shifted_sigmas
from worldstride.errors import InputError, integer_from
from worldstride.models.hy_worldplay import poses
from worldstride.models.hy_worldplay.labels import labels
from worldstride.models.hy_worldplay.places import projections, rotary_table
from worldstride.models.hy_worldplay.retrieval import EIGHT_B, Retrieval, ball_points, distances, overlap, visible
from worldstride.models.video_decoder import VideoDecoder
from worldstride.protocol import Led, Recalled, SamplerSpec

NEW = 4
"""Latents of a chunk of the autoregressive models."""
FIRST = -1
"""Label of a world's first latent: nothing led to it, and the given image conditions it."""
STABLE = 14.0
"""Noise level in thousandths that context latents are said to have; none is added."""
RANKS = 64
"""Latents of the longest context with a chunk: so many ranks have rotary angles at hand. Text has no rank, so those of
latents count from the context's first one."""


Kind = TypeVar("Kind")


class Turning(Protocol):
    """What a network's configuration says of rotary angles."""

    @property
    def rope(self) -> tuple[int, int, int]:
        """Channels of a head that turn with latent, row and column."""
        ...

    @property
    def theta(self) -> float:
        """Base of their frequencies."""
        ...


class Placed:
    """`LabelsMotion`, `Recalls` and `BeginsWithImage` of models whose tokens have ranks and cameras."""

    name = "hy_worldplay"
    retrieval: Retrieval = EIGHT_B
    new = NEW
    """Latents of a chunk."""
    shift: float
    """Of the noise schedule."""

    def __init__(
        self, config: Turning, decoder: VideoDecoder, weight: Tensor, token_grid: tuple[int, int],
        storage: torch.dtype, steps: int, guidance: float | None = None,
    ) -> None:  # fmt: skip
        """Tables of places for tokens on a grid of rows and columns, where the network's `weight` is; and the precision
        of latents between steps, solver steps at full compute, and the scale of guidance."""
        self.decoder, self.storage, self.steps, self.guidance = decoder, storage, steps, guidance
        self.device, self.dtype = weight.device, weight.dtype
        self.intrinsics = poses.intrinsics().float()
        self._tokens = token_grid[0] * token_grid[1]
        ranks = torch.arange(RANKS, device=self.device)
        table = rotary_table(ranks, *token_grid, config.rope, config.theta)
        self._tables = tuple(t.unflatten(0, (RANKS, -1)) for t in table)  # [rank, n, head_dim / 2]

    def sampler(self, steps: int | None = None, shift: float | None = None) -> SamplerSpec:
        """Euler on the model's shifted schedule."""
        steps = self.steps if steps is None else steps
        integer_from("steps", steps, 1)
        sigmas = shifted_sigmas(steps, self.shift if shift is None else shift)
        return SamplerSpec(sigmas, storage=self.storage, guidance=self.guidance)

    def image_prompt(self, frames: Tensor) -> Mapping[str, Tensor]:
        """The latent of the one frame of uint8 [1, 1, H, W, 3]."""
        if frames.shape[1] != 1:
            raise InputError(f"HY-WorldPlay begins with one image, got {frames.shape[1]} frames")
        return {"image": self.decoder.encode(frames)[:, 0]}

    def sample_points(self, generator: torch.Generator) -> Tensor:
        """Points in the view of a camera; 50 000 are drawn in a ball, and one in twenty is seen."""
        rule = self.retrieval
        return visible(ball_points(rule.points, rule.radius, generator), rule)

    def recall(
        self, cameras: Tensor, coming: Tensor, points: Tensor, candidates: Sequence[int], count: int
    ) -> tuple[list[int], list[float]]:
        """The clips that saw most of what is coming; of equal ones the oldest. `InputError` on parts of clips."""
        clip, allowed = self.retrieval.clip, self.clips_of(candidates, count)
        if not allowed:
            return [], []
        starts = [i for i in candidates[::clip] if i + clip - 1 <= candidates[-1]]
        away = distances(cameras, coming, starts, points, self.retrieval)
        best = sorted(sorted(starts, key=away.__getitem__)[:allowed])
        return [s + i for s in best for i in range(clip)], [1 - away[s] for s in best for _ in range(clip)]

    def clips_of(self, candidates: Sequence[int], count: int) -> int:
        """Whole clips in `count` latents; `InputError` on parts of clips, unless there are no more candidates."""
        clip = self.retrieval.clip
        if count % clip and count < len(candidates):
            raise InputError(
                f"HY-WorldPlay brings back clips of {clip} latents; memory must be a multiple, got {count}"
            )
        return count // clip

    def shown(self, cameras: Tensor, coming: Tensor, points: Tensor) -> list[float]:
        """See `Recalls.shown`."""
        return overlap(coming, cameras, points, self.retrieval).mean(0).tolist()

    def label(self, cameras: Tensor, before: Tensor | None) -> tuple[int, ...]:
        """Action labels 0 to 80; `FIRST` for a world's first latent."""
        made = labels(cameras, before).tolist()
        return tuple(made if before is not None else [FIRST, *made[1:]])

    def places_of(self, recalled: Recalled) -> Places:
        """Places of remembered latents; their ranks count from the first of the whole context."""
        whole = len(recalled.positions) if recalled.whole is None else recalled.whole
        if whole + self.new > RANKS:
            raise InputError(f"a context must have at most {RANKS - self.new} latents, got {whole}")
        at = (recalled.positions + whole).to(self.device, non_blocking=True)
        cos, sin = (table.index_select(0, at).flatten(0, 1) for table in self._tables)
        intrinsics = self.intrinsics if recalled.intrinsics is None else recalled.intrinsics
        return Places(cos, sin, *self.matrices(recalled.cameras, intrinsics))

    def matrices(self, cameras: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor]:
        """Projections [B, T, 4, 4] and their inverses of cameras [B, T, 4, 4] and intrinsics, on the device."""
        return projections(cameras.to(self.device, non_blocking=True), intrinsics.to(self.device))

    def places_after(self, context: int, matrices: tuple[Tensor, Tensor]) -> Places:
        """Places of new latents with projections [B, T, 4, 4] and their inverses behind a context of so many."""
        count = matrices[0].shape[1]
        cos, sin = (t[context : context + count].flatten(0, 1) for t in self._tables)
        return Places(cos, sin, *matrices)

    def numbered(self, led: Sequence[Led], count: int) -> tuple[int, ...]:
        """Labels of `count` latents, `FIRST` among them; `InputError` where there are not as many."""
        if len(led) != count:
            raise InputError(f"HY-WorldPlay needs a label for each of {count} latents, got {tuple(led)}")
        return tuple(n if isinstance(n, int) else 0 for n in led)

    def sent(self, numbers: Sequence[int]) -> Tensor:
        """Labels [T] on the device; of a world's first latent 0."""
        return torch.tensor([max(n, 0) for n in numbers]).to(self.device, non_blocking=True)

    def prompt_of(self, encoded: object, kind: type[Kind]) -> Kind:
        """A world's encoded prompt; `InputError` where it began without one."""
        if not isinstance(encoded, kind):
            raise InputError(
                f"{self.name!r} needs an encoded prompt; begin worlds with Engine.open(frames, cameras, prompt=...)"
            )
        return encoded

    def commit(self, clean: Tensor, inputs: Any) -> Tensor:
        """What was denoised is what is remembered."""
        return clean

    def levels(self, sigma: float | Tensor, batch: int, count: int) -> Tensor:
        """Noise levels in thousandths [B, T]; `sigma` is a number or [B]."""
        if isinstance(sigma, Tensor):
            return 1000 * sigma.float().reshape(-1, 1).expand(batch, count)
        # a number is filled in on the device: a copy would wait for what is under way there
        return torch.full((batch, count), 1000 * sigma, device=self.device)
