"""HY-WorldPlay's bidirectional model behind the model protocol (specification, sections 1 to 4).

It keeps nothing: text, remembered latents and new ones attend to each other in every evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from worldstride.attention import Attend
from worldstride.attention.streams import Places
from worldstride.models.hy_worldplay import cost, given
from worldstride.models.hy_worldplay.large import SINK, WINDOW, Large
from worldstride.models.hy_worldplay.model import Frames
from worldstride.models.hy_worldplay.retrieval import distances
from worldstride.models.hy_worldplay.text import NEGATIVE, Prompt
from worldstride.protocol import ChunkShape, Conditions, Context, Recalled

NEW, CLIP = 16, 4
"""Latents of a chunk, and of each of the clips that its four queries may bring back."""


@dataclass(frozen=True, eq=False)
class JointPrompt:
    """Encoder states of a prompt; the network reads them anew in every evaluation."""

    branches: tuple[Prompt, ...]
    """Of the guidance branches, the conditional one first."""
    image: Tensor | None
    """Latent of the first image [1, C, h, w]; None where none was given."""


@dataclass(frozen=True, eq=False)
class JointContext:
    """Remembered latents as the network takes them; None where there are none."""

    frames: Frames | None

    @property
    def latents(self) -> int:
        """Remembered latents in it."""
        return 0 if self.frames is None else self.frames.x.shape[1]

    @property
    def bytes(self) -> int:
        """Bytes of latents, their planes and places."""
        f = self.frames
        tensors = () if f is None else (f.x, f.condition, f.levels, f.labels, *f.at)
        return sum(t.numel() * t.element_size() for t in tensors)


@dataclass(frozen=True, eq=False)
class JointInputs:
    """What stays the same from step to step."""

    condition: Tensor
    """The first image and its mask [B, T, C + 1, h, w]."""
    labels: Tensor
    """[T]"""
    matrices: tuple[Tensor, Tensor]
    """Projections [B, T, 4, 4] and their inverses."""
    prompt: Prompt


class HYJoint(Large):
    """`WorldModel` of the bidirectional model: chunks of 16 latents, guided."""

    new = NEW

    def chunk(self, k: int) -> ChunkShape:
        """16 latents: 61 frames in the first chunk, 64 in others. The context is the first clip, the last 12 latents,
        and up to four clips in between: 16 latents after the first chunk, later 20 to 32."""
        frames, last = (61, tuple(range(0, 61, 4))) if k == 0 else (64, None)
        memory = NEW // self.retrieval.query * CLIP  # each query names a clip
        return ChunkShape(NEW, frames, window=WINDOW, memory=memory, sink=SINK, clip=CLIP, last_frames=last)

    def encode_prompt(self, prompt: Mapping[str, Tensor], attend: Attend) -> JointPrompt:
        """Encoder states "text" [1, L, ...], "glyphs" [1, G, ...] and "vision" [1, V, ...] without masked rows.

        "text_mask" and "glyphs_mask" may leave rows out. A guided model needs "negative_text" and the like, too; the
        image's states are the same. Raises `InputError` on what is missing or does not fit.
        """
        given.check_names(prompt)
        signs = ("",) if self.guidance is None else ("", NEGATIVE)
        branches = tuple(given.states(prompt, sign, self.config, self.device) for sign in signs)
        for branch in branches:
            branch.check(self.config)
        return JointPrompt(branches, prompt.get("image"))

    def recall(
        self, cameras: Tensor, coming: Tensor, points: Tensor, candidates: Sequence[int], count: int
    ) -> tuple[list[int], list[float]]:
        """For every four of the coming latents the clip that saw most of them; of equal ones the oldest.

        Several may name the same clip, or one that the window shows already: then fewer than `count` latents come
        back. A clip's share is the largest that any four saw. `InputError` on parts of clips.
        """
        clip, allowed = self.retrieval.clip, self.clips_of(candidates, count)
        if not allowed:
            return [], []
        named, nearest, end = set[int](), dict[int, float](), candidates[-1] + 1
        for i, asking in enumerate(coming.split(self.retrieval.query)):
            # the window that a query leaves out ends just before it: later ones may name what the chunk's window holds
            behind = min(end + i * self.retrieval.query, len(cameras))
            starts = range(candidates[0], behind - clip + 1, clip)
            away = distances(cameras, asking, starts, points, self.retrieval)
            named.add(min(starts, key=away.__getitem__))
            nearest |= {s: min(d, nearest.get(s, d)) for s, d in away.items()}
        fresh = sorted(s for s in named if s + clip <= end)
        best = sorted(sorted(fresh, key=nearest.__getitem__)[:allowed])
        return [s + i for s in best for i in range(clip)], [1 - nearest[s] for s in best for _ in range(clip)]

    def prepare(self, conditions: Conditions) -> tuple[JointInputs, ...]:
        """Places, labels and the first image of the coming latents."""
        c = conditions
        prompt, numbers = self.prompt_of(c.encoded, JointPrompt), self.numbered(c.led, c.cameras.shape[1])
        condition = self.conditioned(prompt.image, numbers, len(c.cameras))
        of = (condition, self.sent(numbers), self.matrices(c.cameras, c.intrinsics))
        return tuple(JointInputs(*of, branch) for branch in prompt.branches)

    def encode_context(self, recalled: Recalled, previous: Context | None, attend: Attend) -> JointContext:
        """The remembered latents with their places, at the level they are said to have; nothing is computed."""
        if not recalled.latents.shape[1]:
            return JointContext(None)
        return JointContext(self.remembered(recalled, self.prompt_of(recalled.prompt, JointPrompt).image))

    def velocity(
        self, x: Tensor, sigma: float, inputs: JointInputs, context: Context, attend: Attend
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """The network's own prediction for the new latents, the remembered ones standing before them."""
        if not isinstance(context, JointContext):
            raise TypeError(f"context must be a JointContext, got {type(context).__name__}")
        batch, count = x.shape[:2]
        at, levels = self.places_after(context.latents, inputs.matrices), self.levels(sigma, batch, count)
        frames = Frames(x, inputs.condition, levels, inputs.labels.expand(batch, count), at)
        if context.frames is not None:
            frames = _behind(context.frames, frames)
        made = self.network.joint(frames, inputs.prompt, 1000 * sigma, attend)
        return made[:, context.latents :].float(), {}

    def context_flops(self, encoded: int, seen: float) -> float:
        """None: remembered latents are part of every evaluation."""
        return 0.0

    def evaluation_flops(self, latents: int, context: float) -> float:
        """See `Costed.evaluation_flops`, the context's own tokens included; what is the text's is left out."""
        return cost.evaluation_flops(self.config, self._tokens, latents + context, 0)


def _behind(context: Frames, new: Frames) -> Frames:
    """New latents behind remembered ones."""
    x, condition, levels, labels = (
        torch.cat(pair, 1)
        for pair in (
            (context.x.to(new.x.dtype), new.x), (context.condition, new.condition), (context.levels, new.levels),
            (context.labels, new.labels),
        )
    )  # fmt: skip
    cos, sin = (torch.cat(pair) for pair in zip(context.at[:2], new.at[:2], strict=True))
    matrices = (torch.cat(pair, 1) for pair in zip(context.at[2:], new.at[2:], strict=True))
    return Frames(x, condition, levels, labels, Places(cos, sin, *matrices))
