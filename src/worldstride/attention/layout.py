"""Tokens in blocks: which token belongs to which block, and in which order tokens are kept so that blocks are runs.

Block-sparse attention decides block by block, so a block should hold tokens that look alike: neighbours in time, height
and width. Keys and values are stored block after block without gaps. A block then is a run of rows, nothing is padded,
and dense attention reads the very same memory (it does not care about the order of keys).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from worldstride.errors import InputError, integer_from

BLOCK = 128
"""Most tokens of a block: the rows that one program of the kernels works on."""

Grid = tuple[int, int, int]
"""Latents, rows and columns of tokens."""


@dataclass(frozen=True, eq=False)
class Layout:
    """A partition of N tokens into M blocks of at most `BLOCK` tokens."""

    order: Tensor
    """For each place in block order the token's natural index, int64 [N]."""
    starts: Tensor
    """Where blocks begin in block order, int32 [M + 1]; the last entry is N."""
    kept: Tensor
    """Blocks that every query attends to (text, the current chunk), bool [M]."""
    places: Tensor
    """Block coordinates (time, height, width) on the grid of tiles, int32 [M, 3]; -1 where there is no grid."""
    free: int
    """Blocks that are not kept: known to the host, which never waits for a device to learn it."""
    even: bool = True
    """Whether all blocks but the last of a span are of one size: known to the host, likewise."""

    @property
    def tokens(self) -> int:
        """Number of tokens N."""
        return len(self.order)

    @property
    def blocks(self) -> int:
        """Number of blocks M."""
        return len(self.starts) - 1

    @property
    def sizes(self) -> Tensor:
        """Tokens of each block, int32 [M]."""
        return self.starts.diff()

    @property
    def owner(self) -> Tensor:
        """For each place in block order its block, int64 [N]."""
        numbers = torch.arange(self.blocks, device=self.starts.device)
        return torch.repeat_interleave(numbers, self.sizes, output_size=self.tokens)

    @property
    def inverse(self) -> Tensor:
        """For each natural index its place in block order, int64 [N]."""
        return torch.empty_like(self.order).scatter_(0, self.order, torch.arange(self.tokens, device=self.order.device))

    def to(self, device: torch.device | str) -> Layout:
        """The same on another device."""
        order, starts, kept, places = (t.to(device) for t in (self.order, self.starts, self.kept, self.places))
        return Layout(order, starts, kept, places, self.free, self.even)

    def always(self) -> Layout:
        """The same with every block kept."""
        return replace(self, kept=torch.ones_like(self.kept), free=0)


def boxes(grid: Grid, tile: Grid) -> Layout:
    """Blocks that are boxes of latents x rows x columns, as published (Light Interaction, appendix B).

    Where the grid is no multiple of the tile, blocks at the edge hold fewer tokens; none is padded.

    Args:
        grid: latents, rows and columns of tokens; natural order has columns innermost.
        tile: the box's size along each, at most 128 tokens together, such as (4, 8, 4) or (4, 4, 8).
    """
    index, runs, places = _numbered(grid, tile), list[Tensor](), list[Grid]()
    for place in product(*(range(-(-g // t)) for g, t in zip(grid, tile, strict=True))):
        window = tuple(slice(p * t, (p + 1) * t) for p, t in zip(place, tile, strict=True))
        runs.append(index[window].flatten())
        places.append(place)  # type: ignore[arg-type]
    sizes = torch.tensor([len(r) for r in runs])
    return _layout(torch.cat(runs), sizes, torch.tensor(places, dtype=torch.int32))


def serpentine(grid: Grid, tile: Grid) -> Layout:
    """Full blocks on any grid: tokens are strung up in strips of the tile's width that turn at the edge, then cut.

    A strip is `tile[0]` latents deep and `tile[2]` columns wide and runs along the rows; the next begins where it
    ends, in the other direction. Cut every prod(tile) tokens, blocks are boxes of about the tile's height wherever no
    edge is near, and bend around it otherwise. Only the last block has fewer tokens: on HY-WorldPlay's 30 x 52 grid
    boxes of (4, 8, 4) leave 6.3 % of a kernel's rows empty, these 0.5 %.
    """
    index, size = _numbered(grid, tile), tile[0] * tile[1] * tile[2]
    order = torch.cat([index[cell].flatten() for cell in _strung(grid, tile)])
    sizes = _cut(len(order), size)
    area = grid[1] * grid[2]
    where = torch.stack([order // area, order % area // grid[2], order % grid[2]], 1).float()  # [N, 3]
    centres = torch.stack([part.mean(0) for part in where.split(sizes.tolist())])
    return _layout(order, sizes, (centres / torch.tensor(tile)).floor().int())


Style = Literal["boxes", "serpentine"]
STYLES: Mapping[Style, Callable[[Grid, Grid], Layout]] = MappingProxyType({"boxes": boxes, "serpentine": serpentine})
"""Ways to put a grid of tokens in blocks, by name."""


def runs(tokens: int, size: int = BLOCK) -> Layout:
    """Blocks of consecutive tokens, for text and whatever else has no grid."""
    integer_from("tokens", tokens, 1)
    integer_from("size", size, 1)
    if size > BLOCK:
        raise InputError(f"a block has at most {BLOCK} tokens, got {size}")
    sizes = _cut(tokens, size)
    return _layout(torch.arange(tokens), sizes, torch.full((len(sizes), 3), -1, dtype=torch.int32))


def join(parts: Sequence[Layout]) -> Layout:
    """Several spans of tokens one after the other; no block reaches from one into the next.

    Block coordinates in time go on from one part with a grid to the next, so that neighbours are known across parts.
    """
    if not parts:
        raise InputError("join needs at least one layout")
    orders, starts, places, tokens, later = list[Tensor](), [torch.zeros(1, dtype=torch.int32)], list[Tensor](), 0, 0
    for part in parts:
        orders.append(part.order.cpu() + tokens)
        starts.append(part.starts[1:].cpu() + tokens)
        place = part.places.cpu().clone()
        gridded = place[:, 0] >= 0
        if bool(gridded.any()):
            place[gridded, 0] += later
            later = int(place[:, 0].max()) + 1
        places.append(place)
        tokens += part.tokens
    kept = torch.cat([p.kept.cpu() for p in parts])
    free, even = sum(p.free for p in parts), all(p.even for p in parts)
    joined = Layout(torch.cat(orders), torch.cat(starts), kept, torch.cat(places), free, even)
    return joined.to(parts[0].order.device)


def _cut(tokens: int, size: int) -> Tensor:
    """Sizes of blocks, all as large as asked for but the last, which has what is left."""
    sizes = torch.full((-(-tokens // size),), size)
    sizes[-1] = tokens - size * (len(sizes) - 1)
    return sizes


def _layout(order: Tensor, sizes: Tensor, places: Tensor) -> Layout:
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]).int()
    even = bool((sizes[:-1] == sizes[0]).all())
    return Layout(order, starts, torch.zeros(len(sizes), dtype=torch.bool), places, len(sizes), even)


def _numbered(grid: Grid, tile: Grid) -> Tensor:
    """Natural indices [T, H, W], once grid and tile are known to fit."""
    for name, value in (("grid", grid), ("tile", tile)):
        if (
            not isinstance(value, tuple)
            or len(value) != 3
            or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in value)
        ):
            raise InputError(f"{name} must be three positive integers (latents, rows, columns), got {value!r}")
    if tile[0] * tile[1] * tile[2] > BLOCK:
        raise InputError(f"a tile has at most {BLOCK} tokens, got {tile} with {tile[0] * tile[1] * tile[2]}")
    return torch.arange(grid[0] * grid[1] * grid[2]).view(grid)


def _strung(grid: Grid, tile: Grid) -> Iterator[tuple[slice, int, slice]]:
    """Cells of one row each in the order of the serpentine."""
    columns = [slice(at, at + tile[2]) for at in range(0, grid[2], tile[2])]
    down = True
    for group in range(0, grid[0], tile[0]):
        for column in columns:
            rows = range(grid[1]) if down else range(grid[1] - 1, -1, -1)
            for row in rows:
                yield slice(group, group + tile[0]), row, column
            down = not down
        columns.reverse()  # the next group of latents begins where this one ends
