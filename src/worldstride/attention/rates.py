"""What attention costs on a device, measured once and kept in a file beside the choices of dense attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from worldstride.attention import choices
from worldstride.attention.cost import Rates, fit
from worldstride.attention.dense import Attend
from worldstride.attention.layout import runs
from worldstride.attention.measuring import in_turns, milliseconds
from worldstride.attention.partial import Partial, merge
from worldstride.attention.preparation import KeyCache, prepare_queries
from worldstride.attention.selection import BlockList, Selection, select
from worldstride.attention.sparse import attend_blocks, implementation
from worldstride.errors import InputError

FORMAT = "worldstride attention rates 1"
HEADS, QUERIES, KEYS = 24, 4096, 16384
"""Measured sizes: enough tiles for several turns of any GPU."""
LISTED = (32, 128)
"""Blocks of keys listed for each block of queries in the two measurements that a line is laid through."""


def measured(
    dense: Attend, device: torch.device, dtype: torch.dtype, channels: int, cache: str | Path | None = None
) -> Rates | None:
    """Rates of a CUDA device: from a file, or measured in a second and written there; None without a sparse kernel.

    Args:
        dense: what attends densely there.
        device: where attention is computed.
        dtype: precision of queries, keys and values.
        channels: channels of a head.
        cache: the file; None takes one in the user's cache folder. One that is absent, damaged, or of another device
            or other versions is written anew; one that cannot be written is no error.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    if implementation(torch.empty(1, 1, 1, channels, device=device, dtype=dtype)) == "gather":
        return None
    file = choices.default_file(device, dtype) if cache is None else Path(cache)
    file = file.with_name(f"rates-{channels}-{file.name}")
    header = {"format": FORMAT, **choices.made_with(device), "dtype": str(dtype), "channels": channels}
    found = _load(file, header)
    if found is None:
        found = measure(dense, device, dtype, channels)
        with suppress(OSError, InputError):  # measured again the next time
            choices.write(file, {**header, "rates": asdict(found)})
    return found


@torch.no_grad()
def measure(dense: Attend, device: torch.device, dtype: torch.dtype, channels: int) -> Rates:
    """Time dense attention, the sparse kernel at two densities, a selection and a merge."""
    draw = torch.Generator(device).manual_seed(0)

    def normal(tokens: int) -> torch.Tensor:
        return torch.randn(1, HEADS, tokens, channels, device=device, generator=draw).to(dtype)

    q, k, v = normal(QUERIES), normal(KEYS), normal(KEYS)
    queries, keys = runs(QUERIES).to(device), runs(KEYS).to(device)
    cache = KeyCache([keys], 1, HEADS, channels, dtype, joined=keys)
    cache.write(0, k, v)
    rule = Selection("mean", keep=0.25)
    units = torch.cuda.get_device_properties(device).multi_processor_count
    turns = math.ceil(HEADS * queries.blocks / units)

    def listing(count: int) -> BlockList:
        order = torch.rand(1, HEADS, queries.blocks, keys.blocks, device=device, generator=draw).argsort(-1).int()
        order[..., :count] = order[..., :count].sort(-1).values
        counts = torch.full((1, HEADS, queries.blocks, 2), count, dtype=torch.int32, device=device)
        return BlockList(order, counts)

    def choosing() -> BlockList:
        return select(prepare_queries(q, queries).summary, cache.summary, queries, keys, rule)

    part = Partial(q, torch.zeros(q.shape[:3], device=device))
    few, many = (listing(count) for count in LISTED)
    calls: dict[str, Callable[[], object]] = {
        "dense": lambda: dense(q, k, v),
        "few": lambda: attend_blocks(q, cache.k, cache.v, few, queries, keys),
        "many": lambda: attend_blocks(q, cache.k, cache.v, many, queries, keys),
        "merging": lambda: merge(part, part),
    }
    for call in (*calls.values(), choosing):
        call()  # compiles kernels, builds plans
    graph = torch.cuda.CUDAGraph()  # launching from Python would be most of what is measured
    with torch.cuda.graph(graph):
        choosing()
    calls["choosing"] = graph.replay
    times = in_turns(calls, lambda call: milliseconds(call, device), near=math.inf)
    block, tile = fit((times["few"], times["many"]), LISTED, turns)
    flops = 4 * HEADS * QUERIES * KEYS * channels
    merged = 3 * q.numel() * q.element_size()
    return Rates(
        units, flops / times["dense"] / 1e9, block, tile, 1e3 * times["choosing"], merged / times["merging"] / 1e6
    )


def _load(file: Path, header: dict[str, object]) -> Rates | None:
    try:
        return Rates(**choices.read(file, header)["rates"])
    except choices.UNREADABLE:
        return None
