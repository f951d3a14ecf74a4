"""Which way of dense attention is fastest on a device: a few sizes, measured once.

Time depends on sizes smoothly, so ranges of them stand for what lies inside, one size measured in each.
"""

from __future__ import annotations

import datetime
import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor

from worldstride.attention.backends import Backend, Need
from worldstride.attention.dense import compute, reference
from worldstride.attention.versions import capability

ROWS, QUERIES, KEYS = (8,), (1024,), (2048, 16384)
"""Upper ends of ranges of batch times heads, queries and keys; the last range has none."""
MEASURED_ROWS, MEASURED_QUERIES, MEASURED_KEYS = (4, 24), (512, 4096), (1024, 8192, 32768)
"""What is measured in each range."""
RAGGED = (3, 200, 333)
"""Batch times heads, queries and keys of the check with every argument: no multiples of a kernel's tiles."""
WRONG = 2e-2
"""Relative error against float32 above which a backend is left out."""
TIE = 1.03
"""Backends within this ratio of the fastest count as being as fast."""
NEAR, ROUNDS = 1.3, 4
"""Backends within this ratio of the fastest are timed in turns, so many times."""
REPEATS, ENOUGH_MS = 10, 15.0
"""Runs that a time is the median of; fewer where they last long together."""
QUEUED = 5
"""Runs that are queued at once."""

Timer = Callable[[Callable[[], object]], float]
"""Milliseconds that a call takes."""


class Place(NamedTuple):
    """Sizes that share a choice: head dim and numbers of ranges."""

    head_dim: int
    rows: int
    queries: int
    keys: int
    bias: bool


class Size(NamedTuple):
    """Sizes that are measured by themselves."""

    head_dim: int
    rows: int
    """Batch times heads."""
    queries: int
    keys: int


class Timing(NamedTuple):
    """A backend at a place or size."""

    backend: str
    ms: float
    plans: bool
    """Whether a new key length costs it a plan there."""


@dataclass(frozen=True)
class Measurement:
    """Times of everything that was tried."""

    date: str
    """When, UTC, ISO 8601."""
    times: Mapping[Place, tuple[Timing, ...]] = field(default_factory=dict)
    """At each place what works, fastest first."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """What was left out, such as "cudnn, heads of 64, bias" -> why."""
    head_dims: tuple[int, ...] = ()
    """Channels of heads that were measured."""
    exact: Mapping[Size, tuple[Timing, ...]] = field(default_factory=dict)
    """Sizes that were measured by themselves; what works, fastest first."""


def place_of(head_dim: int, rows: int, queries: int, keys: int, bias: bool) -> Place:
    """The place of some sizes. With a bias one place stands for all."""
    if bias:
        return Place(head_dim, *_BIASED, True)
    return Place(head_dim, _range(rows, ROWS), _range(queries, QUERIES), _range(keys, KEYS), False)


_BIASED = (1, 1, 1)


def _range(size: int, ends: Sequence[int]) -> int:
    number = 0
    for end in ends:  # plain comparisons: a compiler that traces this leaves the size open within its range
        if size > end:
            number += 1
    return number


def measure(
    device: torch.device,
    dtype: torch.dtype,
    head_dims: Sequence[int],
    backends: Iterable[Backend],
    timer: Timer | None = None,
) -> Measurement:
    """Check and time backends on a device; `timer` defaults to CUDA events.

    A backend that raises, or is farther than `WRONG` from float32, is left out where it does; why is kept.
    """
    timer = timer or (lambda call: milliseconds(call, device))
    own, known = capability(device), list(backends)
    times, refused = dict[Place, tuple[Timing, ...]](), dict[str, str]()
    with torch.no_grad():
        for head_dim, bias in product(head_dims, (False, True)):
            trial = _Trial(device, dtype, head_dim, bias)
            able = list[Backend]()
            for backend in known:
                why = backend.why_not(Need(device.type, own, dtype, head_dim, bias))
                if why is None and backend.timed:
                    why = _caught(partial(trial.check_all, backend))
                if why is not None:
                    refused[trial.label(backend)] = why
                elif backend.timed:
                    able.append(backend)
            for place, sizes in _places(head_dim, bias):
                found, wrong = trial.times(able, sizes, timer)
                times[place] = _ranked(found)
                refused = {**wrong, **refused}
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the inputs are large
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Measurement(date, {place: found for place, found in times.items() if found}, refused, tuple(head_dims))


def measure_exactly(
    sizes: Iterable[Size],
    measured: Measurement,
    device: torch.device,
    dtype: torch.dtype,
    backends: Iterable[Backend],
    timer: Timer | None = None,
) -> dict[Size, tuple[Timing, ...]]:
    """Time backends at single sizes, without a bias; what was left out before, or is wrong there, is not in it.

    Time is no smooth function of the number of keys: cuDNN is some 10 % faster where 128 divides it (H200, cuDNN 9.19).
    """
    timer = timer or (lambda call: milliseconds(call, device))
    known, found = list(backends), dict[Size, tuple[Timing, ...]]()
    with torch.no_grad():
        for size in sizes:
            trial = _Trial(device, dtype, size.head_dim, bias=False)
            need = Need(device.type, capability(device), dtype, size.head_dim, bias=False)
            able = [b for b in known if b.timed and b.why_not(need) is None and trial.label(b) not in measured.refused]
            times, _ = trial.times(able, size[1:], timer)
            if times:
                found[size] = tuple(sorted(times, key=lambda t: t.ms))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def _places(head_dim: int, bias: bool) -> Iterator[tuple[Place, tuple[int, int, int]]]:
    """Places to measure, with batch times heads, queries and keys."""
    grid = product(*(range(len(m)) for m in (MEASURED_ROWS, MEASURED_QUERIES, MEASURED_KEYS)))
    for i, j, n in [_BIASED] if bias else grid:
        yield Place(head_dim, i, j, n, bias), (MEASURED_ROWS[i], MEASURED_QUERIES[j], MEASURED_KEYS[n])


def _ranked(timings: Sequence[Timing]) -> tuple[Timing, ...]:
    """Fastest first; of those as fast as the fastest, the one that stood first."""
    if not timings:
        return ()
    fast = TIE * min(t.ms for t in timings)
    return tuple(sorted(timings, key=lambda t: 0 if t.ms <= fast else t.ms))


def in_turns(calls: Mapping[str, Callable[[], object]], timer: Timer, near: float = NEAR) -> dict[str, float]:
    """Times of calls that have run before, by name; those within `near` of the fastest are taken in turns.

    The first to run finds a GPU cool and its clock high: one kernel was 11 % faster there than as the second (H200).
    """
    times = {name: [timer(call)] for name, call in calls.items()}
    fast = near * min(taken[0] for taken in times.values()) if times else 0.0
    order, shuffled = [name for name, taken in times.items() if taken[0] <= fast], random.Random(0)
    for _ in range(ROUNDS if len(order) > 1 else 0):
        shuffled.shuffle(order)
        for name in order:
            times[name].append(timer(calls[name]))
    return {name: statistics.median(taken[1:] or taken) for name, taken in times.items()}


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Median time of a call on a CUDA device, which has run before.

    Calls are queued several at a time behind one that is not timed: a model's attention finds the device busy, too, so
    that what Python needs to launch a kernel is hidden.
    """
    taken = list[float]()
    with torch.cuda.device(device):
        while len(taken) < REPEATS and sum(taken) < ENOUGH_MS:
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(QUEUED + 1)]
            call()
            marks[0].record()
            for mark in marks[1:]:
                call()
                mark.record()
            marks[-1].synchronize()
            taken += [a.elapsed_time(b) for a, b in pairwise(marks)]
    return statistics.median(taken)


@dataclass(frozen=True)
class _Trial:
    """Inputs of one precision, head dim and kind."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    bias: bool

    def label(self, backend: Backend) -> str:
        return f"{backend.name}, heads of {self.head_dim}" + (", bias" if self.bias else "")

    def inputs(self, sizes: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        rows, queries, keys = sizes
        generator = torch.Generator(self.device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32)

        q, k, v = (normal(1, rows, n, self.head_dim).to(self.dtype) for n in (queries, keys, keys))
        return q, k, v, normal(keys) if self.bias else None

    def check_all(self, backend: Backend) -> str | None:
        """Why a backend is wrong on small ragged inputs, in output or log-sum-exp; None where it is right."""
        q, k, v, bias = self.inputs(RAGGED)
        truth = reference(q, k, v, bias=bias, lse=True)
        for lse in (False, True) if backend.lse else (False,):
            out, total = compute(backend, q, k, v, bias, lse)
            why = _wrong("output", out, truth.out)
            if total is not None:
                why = why or _wrong("log-sum-exp", total, truth.lse)
            if why is not None:
                return why
        return None

    def times(
        self, backends: Sequence[Backend], sizes: tuple[int, int, int], timer: Timer
    ) -> tuple[list[Timing], dict[str, str]]:
        """Times at some sizes of the backends that are right there, and why the others are not."""
        plans, refused, shown = dict[str, bool](), dict[str, str](), " x ".join(map(str, sizes))
        try:
            q, k, v, bias = self.inputs(sizes)
            # a few queries of the first and the last head tell whether every key was read
            ends, last = slice(None, None, sizes[0] - 1), slice(-16, None)
            truth = reference(q[:, ends, last], k[:, ends], v[:, ends], bias=bias)
        except torch.OutOfMemoryError:  # a full device goes by the rule that measures nothing
            return [], {f"{shown}, heads of {self.head_dim}": "not enough memory to measure"}

        calls = {b.name: partial(compute, b, q, k, v, bias, False) for b in backends}

        def tried(backend: Backend) -> str | None:
            out, _ = calls[backend.name]()  # builds what has to be built, too
            plans[backend.name] = backend.needs_plan(q, k, v, bias if bias is None else bias[None, None, None])
            return _wrong("output", out[:, ends, last], truth)

        for backend in backends:
            why = _caught(partial(tried, backend))
            if why is not None:
                refused[self.label(backend)] = f"{why} ({shown})"
                del calls[backend.name]
        return [Timing(name, ms, plans[name]) for name, ms in in_turns(calls, timer).items()], refused


def _caught(check: Callable[[], str | None]) -> str | None:
    """What a check says, or what it raises."""
    try:
        return check()
    except Exception as error:  # whatever a kernel or its compiler raises, attention goes another way
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else 'no text'}"


def _wrong(what: str, got: Tensor, truth: Tensor) -> str | None:
    error = float((got.double() - truth).norm() / truth.norm())
    return None if error <= WRONG else f"its {what} is off by {error:.2g} of its size"  # so is what is no number
