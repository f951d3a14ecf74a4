"""The published block-sparse attention's structure, at its own settings, for comparison; not for use.

Light Interaction (arXiv 2605.31158, section 3.4 and appendix B) for HY-WorldPlay: at every call queries, keys and
values are cut into boxes that are padded with zeros, pooled, scored, sorted, and the output is put back, each by torch;
the kernel takes 128 x 128 tiles and a sorted list, and padded keys take part in the softmax. Written from the
description.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from worldstride.attention import ops
from worldstride.attention.layout import BLOCK, Grid


def tiled(x: Tensor, grid: Grid, tile: Grid) -> Tensor:
    """[B, H, N, E] in natural order -> [B, H, M, 128, E], boxes padded with zeros: two copies."""
    t, h, w = (-(-n // s) * s for n, s in zip(grid, tile, strict=True))
    video = x.unflatten(2, grid)
    video = F.pad(video, (0, 0, 0, w - grid[2], 0, h - grid[1], 0, t - grid[0]))
    cut = video.unflatten(2, (-1, tile[0])).unflatten(4, (-1, tile[1])).unflatten(6, (-1, tile[2]))
    # B H T t H h W w E -> B H T H W t h w E
    return cut.permute(0, 1, 2, 4, 6, 3, 5, 7, 8).flatten(5, 7).flatten(2, 4)


def untiled(x: Tensor, grid: Grid, tile: Grid) -> Tensor:
    """Undo `tiled`."""
    counts = [-(-n // s) for n, s in zip(grid, tile, strict=True)]
    cut = x.unflatten(3, tile).unflatten(2, counts)  # B H T H W t h w E
    video = cut.permute(0, 1, 2, 5, 3, 6, 4, 7, 8).flatten(6, 7).flatten(4, 5).flatten(2, 3)
    return video[:, :, : grid[0], : grid[1], : grid[2]].flatten(2, 4)


def attend(
    q: Tensor, history: tuple[Tensor, Tensor], current: tuple[Tensor, Tensor], grids: tuple[Grid, Grid, Grid],
    tile: Grid, keep: float,
) -> Tensor:  # fmt: skip
    """Attention [B, H, Nq, E] of a chunk to itself and to `keep` of the history's boxes; all in natural order."""
    channels = q.shape[3]
    q_blocks = tiled(q, grids[0], tile)
    keys, values = (
        torch.cat([tiled(old, grids[1], tile), tiled(new, grids[2], tile)], 2)
        for old, new in zip(history, current, strict=True)
    )
    old = math.prod(-(-n // s) for n, s in zip(grids[1], tile, strict=True))
    scores = torch.matmul(q_blocks.mean(3), keys.mean(3).mT) * channels**-0.5  # [B, H, Mq, Mk]
    scores[..., old:] += 1e6
    count = int(keep * old) + keys.shape[2] - old
    blocks = scores.topk(count, -1).indices.sort(-1).values.int()
    counts = torch.full((*blocks.shape[:3], 2), count, dtype=torch.int32, device=q.device)
    starts = [torch.arange(0, BLOCK * (n + 1), BLOCK, dtype=torch.int32, device=q.device) for n in
              (q_blocks.shape[2], keys.shape[2])]  # fmt: skip
    flat = (t.flatten(2, 3) for t in (q_blocks, keys, values))
    out, _ = ops.attend_listed(*flat, blocks.contiguous(), counts, *starts, None, None, "triton")
    return untiled(out.unflatten(2, (-1, BLOCK)), grids[0], tile)
