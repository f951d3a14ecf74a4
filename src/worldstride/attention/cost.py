"""When sparse attention pays: predicted milliseconds of each way to attend, from rates measured on the device.

A kernel's programs take blocks of queries (tiles) in turns of as many as the device has multiprocessors. So its time is
the number of turns, times what a tile costs beside its blocks and what every listed block costs.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Literal

from worldstride.errors import number_in

Way = Literal["dense", "sparse", "hybrid"]


@dataclass(frozen=True)
class Rates:
    """What attention costs on one device, for one precision and number of channels."""

    units: int
    """Multiprocessors: tiles that are worked on at once."""
    dense: float
    """Dense attention, TFLOP/s."""
    block: float
    """Microseconds that a tile takes for each listed block of keys."""
    tile: float
    """Microseconds that a tile takes beside that."""
    choosing: float
    """Microseconds of one selection, with the preparation of its queries."""
    merging: float
    """Gigabytes a second at which two partial results are merged."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            spare = name in ("tile", "choosing")
            number_in(f"rates.{name}", value, 0, 1e12, open_low=not spare)


@dataclass(frozen=True)
class Shape:
    """One attention: what is known before it runs."""

    batch: int
    heads: int
    channels: int
    queries: int
    keys: int
    kept: int
    """Keys that every query attends to."""
    q_blocks: int
    blocks: int
    """Blocks of keys."""
    kept_blocks: int
    listed: float
    """Blocks of keys listed for a block of queries, kept ones included; an estimate where the rule goes by mass."""

    @property
    def density(self) -> float:
        """Share of all pairs of a query and a key that is attended to, with blocks of average size."""
        each = (self.keys - self.kept) / max(self.blocks - self.kept_blocks, 1)
        return min(1.0, (self.kept + max(self.listed - self.kept_blocks, 0) * each) / self.keys)


@dataclass(frozen=True)
class Decision:
    """How to attend, and what was predicted of each way."""

    way: Way
    density: float
    milliseconds: dict[str, float]
    """Predicted for each way that is possible."""
    reason: str


MARGIN = 0.97
"""Sparse ways must be predicted to take less than this share of dense attention's time: predictions err."""


FULL = 0.97
"""Density from which on there is nothing to save."""


def decide(shape: Shape, rates: Rates | None, lack: str = "", margin: float = MARGIN, obey: bool = False) -> Decision:
    """The way that is predicted to be fastest; dense unless another is so by a margin.

    Args:
        shape: the attention.
        rates: the device's; None where there are none, and then what was asked for is done.
        lack: why there is no sparse kernel; empty where there is one, or none is needed.
        margin: see `MARGIN`.
        obey: be sparse whatever is predicted, if there is anything to leave out.
    """
    if shape.kept >= shape.keys:
        return Decision("dense", 1.0, {}, "every key is kept")
    if obey:
        return Decision("sparse", shape.density, {}, "asked to obey")
    if lack:
        return Decision("dense", 1.0, {}, f"no sparse kernel: {lack}")
    if rates is None:
        return Decision("sparse", shape.density, {}, "no rates were measured on this device: as asked")
    times = {"dense": dense_ms(shape, shape.keys, rates)}
    if shape.density >= FULL:
        return Decision("dense", 1.0, times, f"a density of {shape.density:.2f} saves nothing")
    times["sparse"] = sparse_ms(shape, shape.listed, rates) + rates.choosing / 1e3
    if shape.kept:
        pairs = shape.batch * shape.heads * shape.queries
        merge = 3 * pairs * shape.channels * 2 / rates.merging / 1e6
        rest = sparse_ms(shape, shape.listed - shape.kept_blocks, rates)
        times["hybrid"] = dense_ms(shape, shape.kept, rates) + rest + rates.choosing / 1e3 + merge
    best: Way = min(times, key=times.__getitem__)  # type: ignore[assignment]
    if best == "dense" or times[best] > margin * times["dense"]:
        other = min((way for way in times if way != "dense"), key=times.__getitem__)
        slower = times[other] / times["dense"]
        return Decision("dense", 1.0, times, f"{other} was predicted to take {slower:.2f} of dense attention's time")
    return Decision(best, shape.density, times, f"predicted {times['dense'] / times[best]:.2f} times as fast as dense")


def dense_ms(shape: Shape, keys: int, rates: Rates) -> float:
    """Predicted milliseconds of dense attention to some keys."""
    flops = 4 * shape.batch * shape.heads * shape.queries * keys * shape.channels
    return flops / rates.dense / 1e9


def sparse_ms(shape: Shape, listed: float, rates: Rates) -> float:
    """Predicted milliseconds of the sparse kernel."""
    turns = math.ceil(shape.batch * shape.heads * shape.q_blocks / rates.units)
    return turns * (rates.tile + max(listed, 0) * rates.block) / 1e3


def fit(times: tuple[float, float], listed: tuple[int, int], turns: int) -> tuple[float, float]:
    """(block, tile) in microseconds from two measured times in milliseconds with so many listed blocks a tile."""
    block = max((times[1] - times[0]) * 1e3 / (turns * (listed[1] - listed[0])), 1e-6)
    return block, max(times[0] * 1e3 / turns - listed[0] * block, 0.0)
