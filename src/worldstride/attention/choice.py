"""Dense attention by the fastest way that was measured on the device."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from worldstride.attention import choices
from worldstride.attention.backends import BACKENDS, Backend, Need, need_of, unmeasured
from worldstride.attention.dense import Attending, check, compute
from worldstride.attention.measuring import (
    KEYS,
    MEASURED_KEYS,
    MEASURED_QUERIES,
    MEASURED_ROWS,
    Measurement,
    Place,
    Size,
    Timer,
    Timing,
    measure,
    measure_exactly,
    place_of,
)
from worldstride.attention.partial import Partial, merge
from worldstride.attention.versions import capability
from worldstride.errors import InputError, integer_from

KEY_BUCKET = 2048
"""Keys of which backends with plans are given whole multiples, unless their exact number was announced."""
SPLIT_FROM = 2 * KEY_BUCKET
"""Keys below which attention is never computed in two parts: one part's overhead would eat what the other saves."""
WORTH = 1.1
"""A backend without plans within this ratio of one with plans is as good as that in two parts."""


class Dense(Attending):
    """An `Attend` that picks the fastest measured backend for the sizes it is given.

    Nothing changes it, and `torch.compile` can trace it: a choice depends on sizes only. Where nothing was measured (on
    a CPU, for other precisions, head dims or devices) it is `dense.attend`.

    Some backends (cuDNN) build a plan for each new number of keys, some 40 ms of work on the host, which a context that
    grows would pay for in every chunk. They are given whole multiples of `KEY_BUCKET` keys; the rest goes to a backend
    without plans, and both parts are merged by log-sum-exp. Below `SPLIT_FROM` keys, or where that is as fast, all of
    them go to a backend without plans. Numbers of keys that come again and again can be announced (`plan`) and get
    plans of their own; sizes can be measured by themselves (`tuned`).
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        measured: Measurement | None = None,
        key_lengths: Iterable[int] = (),
        *,
        backends: Mapping[str, Backend] = BACKENDS,
        origin: str = "",
        file: Path | None = None,
    ) -> None:
        """`measured` None goes by a static rule; `origin` says where choices are kept, or why there are none.

        `file` is where what is measured later is kept, too.
        """
        self.device, self.dtype, self.measurement, self.backends, self.origin = (
            device,
            dtype,
            measured,
            backends,
            origin,
        )
        self.key_lengths, self.file = _lengths(key_lengths), file
        self._learn()

    @classmethod
    def measured(
        cls,
        device: torch.device,
        dtype: torch.dtype,
        head_dims: Sequence[int] = (64, 128),
        cache: str | Path | None = None,
        *,
        backends: Mapping[str, Backend] = BACKENDS,
        timer: Timer | None = None,
    ) -> Dense:
        """Choices for a CUDA device: from a file, or measured in a few seconds and written there.

        Args:
            device: where attention is computed. On a CPU nothing is measured, unless a timer is given.
            dtype: precision of queries, keys and values.
            head_dims: channels of heads to measure.
            cache: the file; None takes one in the user's cache folder (`choices.default_file`). A file that is absent,
                damaged, or of another device or other versions is written anew; one that cannot be written is no error.
            backends: what there is to choose from.
            timer: takes a call's milliseconds; None takes CUDA events.
        """
        if device.type != "cuda" and timer is None:
            return cls(device, dtype, backends=backends, origin="where nothing is measured")
        if torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return cls(device, dtype, backends=backends, origin="as nothing is measured inside a graph")
        file = choices.default_file(device, dtype) if cache is None else Path(cache)
        found, origin = choices.load(file, device, dtype, head_dims, backends), _in(file)
        if found is None:
            found = measure(device, dtype, head_dims, backends.values(), timer)
            origin = _kept(file, found, device, dtype)
        return cls(device, dtype, found, backends=backends, origin=origin, file=file)

    def plan(self, key_lengths: Iterable[int]) -> Dense:
        """The same, with more numbers of keys that come again and again and are worth a plan each.

        Raises `InputError` on numbers that are no integers from 1.
        """
        other = copy.copy(self)
        other.key_lengths = _lengths([*self.key_lengths, *key_lengths])
        return other

    def tuned(self, sizes: Iterable[Size], timer: Timer | None = None) -> Dense:
        """The same, with sizes that come again and again measured by themselves, for attention without a bias.

        What was measured is kept in the file and not measured again. Nothing is where there are no choices at all.

        Args:
            sizes: what the device is measured at; numbers of keys with plans get one each.
            timer: takes a call's milliseconds; None takes CUDA events.
        """
        if self.measurement is None:
            return self
        new = [size for size in dict.fromkeys(sizes) if size not in self.measurement.exact]
        for size in new:
            for name, value in size._asdict().items():
                integer_from(f"{name} of a size", value, 1)
        if not new:
            return self
        found = measure_exactly(new, self.measurement, self.device, self.dtype, self.backends.values(), timer)
        other = copy.copy(self)
        other.measurement = replace(self.measurement, exact={**self.measurement.exact, **found})
        other._learn()
        if self.file is not None:
            other.origin = _kept(self.file, other.measurement, self.device, self.dtype)
        return other

    def _learn(self) -> None:
        """Look up of times by what was measured."""
        self._times = {} if self.measurement is None else dict(self.measurement.times)
        self._exact = () if self.measurement is None else tuple(self.measurement.exact.items())

    def attended(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, lse: bool) -> Tensor | Partial:
        """See `dense.attend`."""
        check(q, k, v, bias)
        out, total = self._computed(q, k, v, bias, lse)
        return out if total is None else Partial(out, total)

    def _computed(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        keys = k.shape[2]
        known = self._known(q, keys, bias, lse)
        if known is not None:
            return compute(self.backends[known.backend], q, k, v, bias, lse)
        best = self._fastest(q, keys, bias, lse)
        if best is None:
            return compute(unmeasured(need_of(q, bias), lse), q, k, v, bias, lse)
        cut = keys // KEY_BUCKET * KEY_BUCKET
        if not best.plans or keys == cut or self._announced(keys):
            return compute(self.backends[best.backend], q, k, v, bias, lse)
        free = self._fastest(q, keys, bias, lse, plans=False)
        first, rest = self._fastest(q, keys, bias, True), self._fastest(q, keys - cut, bias, True, plans=False)
        enough = free is not None and (keys < SPLIT_FROM or (first is not None and free.ms <= WORTH * first.ms))
        if enough or first is None or rest is None:
            return compute(self.backends[(free or best).backend], q, k, v, bias, lse)
        whole = merge(self._part(first, q, k, v, bias, slice(cut)), self._part(rest, q, k, v, bias, slice(cut, None)))
        return whole.out, whole.lse if lse else None

    def _part(self, timing: Timing, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, some: slice) -> Partial:
        """Attention to some of the keys."""
        own = None if bias is None else bias[..., some]
        out, lse = compute(self.backends[timing.backend], q, k[:, :, some], v[:, :, some], own, True)
        if lse is None:
            raise TypeError(f"backend {timing.backend!r} gave no log-sum-exp, but says that it can")
        return Partial(out, lse)

    def _fastest(self, q: Tensor, keys: int, bias: Tensor | None, lse: bool, plans: bool = True) -> Timing | None:
        """The fastest backend that gives what is asked for, with `plans` False of those without; None if unmeasured."""
        if q.device.type != self.device.type or q.dtype != self.dtype:
            return None
        place = place_of(q.shape[3], q.shape[0] * q.shape[1], q.shape[2], keys, bias is not None)
        for timing in self._times.get(place, ()):
            if (self.backends[timing.backend].lse or not lse) and (plans or not timing.plans):
                return timing
        return None

    def _known(self, q: Tensor, keys: int, bias: Tensor | None, lse: bool) -> Timing | None:
        """The fastest backend where just these sizes were measured."""
        if bias is not None or q.device.type != self.device.type or q.dtype != self.dtype:
            return None
        for size, timings in self._exact:  # comparisons leave sizes open to a compiler
            if keys == size.keys and q.shape[2] == size.queries and q.shape[0] * q.shape[1] == size.rows:
                for timing in timings:
                    if q.shape[3] == size.head_dim and (self.backends[timing.backend].lse or not lse):
                        return timing
        return None

    def _announced(self, keys: int) -> bool:
        return any(keys == length for length in self.key_lengths)  # comparisons leave `keys` open to a compiler

    def describe(self) -> list[str]:
        """What is chosen for many heads and queries, by which times, and what is left out; a line each."""
        if self.measurement is None:
            need = Need(self.device.type, capability(self.device), self.dtype, 64, False)
            ways = [unmeasured(need, lse).name for lse in (False, True)]
            rule = f"the rule for {self.dtype} on {self.device.type}{self.origin and ', '}{self.origin}"
            return [f"{ways[0]}, with log-sum-exp {ways[1]}: {rule}"]
        kinds = sorted({(place.bias, place.head_dim) for place in self._times})
        lines = [_line(self._times, head_dim, bias) for bias, head_dim in kinds]
        for (head_dim, rows, queries, keys), found in self._exact:
            lines.append(f"{rows} heads of {head_dim}, {queries} queries, {keys} keys: {_ranking(found)}")
        left = [f"left out: {what}: {why}" for what, why in self.measurement.refused.items()]
        return [*lines, f"measured {self.measurement.date}, {self.origin or 'not kept'}", *left]


def _line(times: Mapping[Place, Sequence[Timing]], head_dim: int, bias: bool) -> str:
    rows, queries, words = MEASURED_ROWS[-1], MEASURED_QUERIES[-1], list[str]()
    for size, end in zip(MEASURED_KEYS, (*KEYS, None), strict=True):
        found = times.get(place_of(head_dim, rows, queries, size, bias), ())
        if found and not (bias and words):  # with a bias one place stands for all
            reach = "with a bias" if bias else "beyond" if end is None else f"to {end} keys"
            words.append(_ranking(found, reach))
    return f"{rows} heads of {head_dim}, {queries} queries: {', '.join(words)}"


def _ranking(found: Sequence[Timing], reach: str = "") -> str:
    others = "".join(f", {t.backend} {t.ms:.3g}" for t in found[1:])
    return f"{found[0].backend} {reach}{reach and ' '}({found[0].ms:.3g} ms{others})"


def _in(file: Path) -> str:
    return f"kept in {file}"


def _kept(file: Path, measured: Measurement, device: torch.device, dtype: torch.dtype) -> str:
    """Keep choices in a file, and say where, or why not."""
    try:
        choices.store(file, measured, device, dtype)
    except (OSError, InputError) as error:
        return f"not kept: {error}"
    return _in(file)


def _lengths(key_lengths: Iterable[int]) -> tuple[int, ...]:
    lengths = dict.fromkeys(key_lengths)
    for length in lengths:
        integer_from("a number of keys", length, 1)
    return tuple(lengths)
