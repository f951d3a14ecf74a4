"""Layouts, lists and tensors for the tests of block-sparse attention, and how far a result is off."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from worldstride.attention.layout import Layout, boxes, join, runs, serpentine
from worldstride.attention.selection import BlockList, Selection, listed

BOUND = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 1e-2}
"""How far attention may be off, as a share of its size."""
FAR = 2**29
"""A number of a block that is none: who reads what lies there, reads out of bounds."""


def error(got: Tensor, truth: Tensor) -> float:
    """How far a result is off, as a share of its size; not a number where it is not."""
    assert got.shape == truth.shape, (got.shape, truth.shape)
    return float((got.double() - truth.double()).norm() / truth.double().norm())


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layouts() -> dict[str, tuple[Layout, Layout]]:
    """Queries and keys: what a chunk and its context may look like, small."""
    chunk, tile = (2, 9, 11), (2, 8, 8)
    history = boxes((3, 9, 11), tile)
    text = runs(70).always()
    return {
        "chunk and history": (serpentine(chunk, tile), join([history, serpentine(chunk, tile).always(), text])),
        "ragged boxes": (boxes((1, 9, 5), (1, 8, 4)), join([boxes((3, 5, 7), (2, 4, 4)), runs(3)])),
        "full blocks": (runs(2 * 128), runs(3 * 128)),
        "nothing but what is kept": (serpentine(chunk, tile), join([serpentine(chunk, tile).always(), text])),
        "one block": (runs(7), runs(5)),
        "one token": (runs(1), runs(1)),
    }


def some_blocks(queries: Layout, keys: Layout, batch: int = 1, heads: int = 2, share: float = 0.5) -> BlockList:
    """Kept blocks and some others, at least one each, other ones for every head and block of queries."""
    rows = (batch, heads, queries.blocks)
    table = torch.rand(*rows, keys.blocks, generator=torch.Generator().manual_seed(keys.blocks)) < share
    table |= keys.kept.cpu()
    first = torch.randint(keys.blocks, rows, generator=torch.Generator().manual_seed(1))
    return listed(table.scatter(-1, first[..., None], True).to(keys.starts.device), keys)


def beyond(found: BlockList, fill: int = FAR) -> BlockList:
    """The same list with a number that is no block's wherever a row's entries mean nothing."""
    place = torch.arange(found.blocks.shape[-1], device=found.blocks.device)
    return BlockList(found.blocks.masked_fill(place >= found.counts[..., 1:], fill), found.counts)


def shuffled(found: BlockList, seed: int = 0) -> BlockList:
    """The same blocks in another order; full ones stay in front."""
    generator = torch.Generator().manual_seed(seed)
    blocks, counts = found.blocks.cpu().clone(), found.counts.cpu()
    for row in torch.cartesian_prod(*(torch.arange(n) for n in blocks.shape[:3])).tolist():
        of = blocks[tuple(row)]
        full, total = counts[tuple(row)].tolist()
        for first, last in ((0, full), (full, total)):
            of[first:last] = of[first:last][torch.randperm(last - first, generator=generator)]
    return BlockList(blocks.to(found.blocks.device), found.counts)


def rows(found: BlockList) -> dict[tuple[int, ...], list[int]]:
    """What is listed: for each batch, head and block of queries the numbers that mean something."""
    blocks, counts = found.blocks.cpu(), found.counts.cpu()
    places = torch.cartesian_prod(*(torch.arange(n) for n in blocks.shape[:3])).tolist()
    return {tuple(p): blocks[tuple(p)][: int(counts[(*p, 1)])].tolist() for p in places}


def rules() -> dict[str, Selection]:
    """Every score with every way to choose, and what can be added."""
    ways: dict[str, dict[str, Any]] = {
        "keep": {"keep": 0.3},
        "keep nothing": {"keep": 0.0},
        "keep all": {"keep": 1.0},
        "mass": {"mass": 0.8},
        "smooth": {"keep": 0.4, "smooth": True},
        "guard": {"keep": 0.3, "guard": 0.02},
        "neighbours": {"keep": 0.3, "neighbours": 1},
        "all of it": {"mass": 0.4, "smooth": True, "guard": 0.01, "neighbours": 1},
    }
    made = {}
    for score in ("mean", "cosine", "parts", "mass"):
        for name, way in ways.items():
            if score != "cosine" or "mass" not in way:
                made[f"{score}, {name}"] = Selection(score, **way)
    return made


def _filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*args: Any, **kwargs: Any) -> Tensor:
        x = make(*args, **kwargs)
        return x.fill_(torch.nan if x.is_floating_point() else FAR)

    return made


class _Poisoned:
    """Torch, but that new memory is filled."""

    def __getattr__(self, name: str) -> Any:
        of = getattr(torch, name)
        return _filled(of) if name in ("empty", "empty_like") else of


@contextmanager
def poison() -> Iterator[None]:
    """Within it, memory that preparation and kernels leave unwritten holds no numbers, and no block's number.

    Torch itself stays as it is: a compiler that first looks at it meanwhile would not know it again.
    """
    names = ["preparation", *(["kernels"] if importlib.util.find_spec("triton") else [])]
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(importlib.import_module(f"worldstride.attention.{name}"), "torch", _Poisoned())
        patch.setattr(torch.Tensor, "new_empty", _filled(torch.Tensor.new_empty))
        yield
