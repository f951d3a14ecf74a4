"""Walks as a player with an incremental context meets them: frames are encoded once, seeing what was known then.

A frame's keys and values then hold what it saw when it was new, and never what came later. Training on such contexts
beside freshly encoded ones makes both work with one set of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from data import Batch, Pool, take
from torch import Tensor

from worldstride.attention import attend
from worldstride.models.courtyard.config import CourtyardConfig
from worldstride.models.courtyard.geometry import geometry, turn
from worldstride.models.courtyard.model import CourtyardNetwork, KeysValues


@dataclass(frozen=True)
class Layout:
    """Runs of a walk, in chunks: the first `whole` chunks are encoded together, every later one when it is new.

    Between runs the walk goes on unseen, where it is long enough, so that what is remembered can lie far back.
    """

    config: CourtyardConfig
    chunks: int = 16
    """Chunks of the stretch; the last is a target only."""
    run: int = 4
    """Chunks that follow each other; targets have a whole window of their own run before them."""

    def __post_init__(self) -> None:
        c = self.config
        if c.context != "together":
            raise ValueError(f"sequences are for contexts that are encoded together, not {c.context!r}")
        if c.window % c.chunk or c.sink:
            raise ValueError(f"sequences need a window of whole chunks and no sink, got {c.window} and {c.sink}")
        if self.run <= c.window // c.chunk:
            raise ValueError(f"a run must be longer than the window's {c.window // c.chunk} chunks, got {self.run}")
        if self.chunks <= self.whole + 1 or self.chunks % self.run:
            raise ValueError(
                f"a stretch needs more than {self.whole + 1} chunks and whole runs of {self.run}, got {self.chunks}"
            )

    @property
    def whole(self) -> int:
        """Chunks that are encoded together: as many as fill a context."""
        return (self.config.window + self.config.memory + self.config.chunk - 1) // self.config.chunk

    @property
    def steps(self) -> range:
        """Chunks that have a full context before them."""
        return range(self.whole, self.chunks)

    @property
    def aims(self) -> list[int]:
        """Which steps, by place, can be targets: those with a window of their own run."""
        return [i for i, s in enumerate(self.steps) if s % self.run >= self.config.window // self.config.chunk]

    def frames(self, known: int, uniform: Callable[..., Tensor], batch: int) -> Tensor:
        """Frames [B, chunks x chunk] of walks of `known` frames: runs in order, left out frames at random."""
        length, runs = self.run * self.config.chunk, self.chunks // self.run
        free = known - length * runs
        if free < 0:
            raise ValueError(f"walks of {known} frames are shorter than a stretch of {length * runs}")
        begin = (uniform(batch, runs).sort(1).values * (free + 1)).long().clamp_max(free)  # frames left out before each
        begin = begin + length * torch.arange(runs, device=begin.device)
        return (begin[..., None] + torch.arange(length, device=begin.device)).flatten(1)


@dataclass(frozen=True)
class Stretch:
    """Target chunks against contexts that were encoded chunk by chunk."""

    batch: Batch
    """Its context holds all frames of the stretch but the last chunk's, in order of time."""
    seen: Tensor
    """[B, S, memory + window] frames of the stretch that each of `Layout.steps` attends to."""
    targets: tuple[int, ...]
    """Which of the steps are targets, by place."""


@torch.no_grad()
def draw_stretch(
    pool: Pool, layout: Layout, batch: int, targets: Sequence[int], random_memory: float, own: float
) -> Stretch:
    """A batch of stretches; memory is retrieved for every chunk among the frames before its window."""
    config, device, g = layout.config, pool.device, pool.generator
    c = config.chunk

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, device=device, generator=g)

    rows = torch.randint(len(pool.patches), (batch,), device=device, generator=g)
    index = layout.frames(pool.frames, uniform, batch)  # [B, T]
    cameras = take(pool.cameras, rows, index)
    known = (layout.chunks - 1) * c
    context = take(pool.patches, rows, index[:, :known])
    if pool.own is not None and own:
        mine = (uniform(batch, 1) < own) & (uniform(batch, known) < 0.75)
        context = torch.where(mine[..., None, None], take(pool.own, rows, index[:, :known]), context)
    seen = []
    for step in layout.steps:
        before = torch.full((batch,), step * c - config.window, device=device)
        coming = cameras[:, [step * c, step * c + c - 1]]
        parts = [before[:, None] + torch.arange(config.window, device=device)]
        if config.memory:
            chosen = pool.retriever.memory(coming, cameras[:, : step * c], before, config.memory, config.window)
            anywhere = (uniform(batch, config.memory) * before[:, None]).long()
            parts.insert(0, torch.where(uniform(batch, 1) < random_memory, anywhere, chosen).sort(1).values)
        seen.append(torch.cat(parts, 1))
    wanted = [layout.steps[i] for i in targets]
    at = torch.tensor([[s * c + i for i in range(c)] for s in wanted], device=device)  # [R, C]
    ranks, zeros = torch.arange(known, device=device).expand(batch, -1), torch.zeros(batch, known, device=device)
    made = Batch(
        context, cameras[:, :known], ranks, zeros,
        take(pool.patches, rows, index[:, at.flatten()]).unflatten(1, (-1, c)), cameras[:, at],
        torch.arange(c, device=device).expand(batch, len(wanted), -1), rows, index[:, at.flatten()],
    )  # fmt: skip
    return Stretch(made, torch.stack(seen, 1), tuple(targets))


def fetched(pairs: KeysValues, index: Tensor, config: CourtyardConfig, after: int = 0) -> KeysValues:
    """Keys and values [B S, heads, K n, e] of frames `index` [B, S, K] from those of all frames [B, T, heads, n, e].

    They get the ranks and kinds of a context: memory, then the window. `after` frames of the window are not among them.
    """
    count, (batch, known) = index.shape[2], pairs[0].shape[:2]
    ranks = torch.arange(-count - after, -after, device=index.device)
    flat = (index + known * torch.arange(batch, device=index.device)[:, None, None]).flatten()

    def of(t: Tensor) -> Tensor:
        return t.flatten(0, 1).index_select(0, flat).unflatten(0, (-1, count))  # [B S, K, heads, n, e]

    keys, values = turn(config, of(pairs[0]), ranks, (ranks < -config.window).long()), of(pairs[1])
    return keys.transpose(1, 2).flatten(2, 3), values.transpose(1, 2).flatten(2, 3)


Fetch = Callable[[KeysValues, Tensor, CourtyardConfig, int], KeysValues]


def encode_stretch(
    network: CourtyardNetwork, stretch: Stretch, layout: Layout, clean: Tensor, level: Tensor, fetch: Fetch = fetched
) -> list[KeysValues]:
    """Contexts of the targets, one pair [B R, heads, K n, e] a block, from frames clean [B, T, n, values].

    Block by block over all frames at once: a chunk's frames see each other, and of its context what those frames have
    become in the block before, which had seen only what was before them.
    """
    c, config, cameras = layout.config.chunk, layout.config, stretch.batch.context_cameras
    batch, known, n = clean.shape[:3]
    chunks, head = known // c, layout.whole * c
    zeros = torch.zeros(batch, known, device=clean.device)
    full = config.memory + config.window
    back = torch.arange(-head, 0, device=clean.device).expand(batch, -1)
    late = torch.arange(-c, 0, device=clean.device).repeat(chunks - layout.whole).expand(batch, -1)
    plain = geometry(config, cameras, zeros, zeros)
    first = geometry(config, cameras[:, :head], back.clamp_min(-full), (back < -config.window).long())
    newest = geometry(config, cameras[:, head:], late, zeros[:, head:]).part(0, known - head, c)
    x = network.tokens(clean, network.clean_in, plain)
    _, modulation = network.level(level, x.dtype)
    each = modulation.repeat_interleave(chunks, 0), modulation.repeat_interleave(chunks - layout.whole, 0)
    tables = [network.tables(g, x.dtype) for g in (plain.part(0, known, c), first, newest)]
    others = stretch.seen[:, 1:, :-c]  # what the chunk before each later step sees beside itself
    wanted, written = stretch.seen[:, list(stretch.targets)], list[KeysValues]()
    for i, block in enumerate(network.blocks):
        folded = x.unflatten(1, (chunks, -1)).flatten(0, 1)  # [B chunks, C n, width]
        _, k, v, _ = network.run(block, folded, each[0], *tables[0], None, attend, False, True)
        # [B chunks, heads, C n, e] -> [B, T, heads, n, e]
        k, v = (t.unflatten(2, (c, n)).transpose(1, 2).reshape(batch, known, -1, n, t.shape[-1]) for t in (k, v))
        written.append(fetch((k, v), wanted, config, 0))
        if i + 1 < len(network.blocks):
            past = fetch((k, v), others, config, c)
            begin = network.run(block, x[:, : head * n].contiguous(), modulation, *tables[1], None, attend)[0]
            rest = x[:, head * n :].unflatten(1, (chunks - layout.whole, -1)).flatten(0, 1)
            rest = network.run(block, rest, each[1], *tables[2], past, attend)[0]
            x = torch.cat([begin, rest.unflatten(0, (batch, -1)).flatten(1, 2)], 1)
    return written
