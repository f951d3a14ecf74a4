"""Work beside the current stream of a GPU, which the host waits for only when it is due."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

Moment = torch.cuda.Event | None
"""A point in a stream's queue; None where there is one queue alone."""


class Beside:
    """A second queue of work. Without a stream there is none: all happens in order, as it always does on a CPU.

    Memory: what is made here belongs to this stream, and comes back to it when it is let go. Whoever reads it in
    another stream reads it after the host has waited for it, and everything queued here waits for what the other stream
    had been asked to do until then; so neither writes where the other still reads.
    """

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self._stream = stream

    @classmethod
    def of(cls, device: torch.device) -> Beside:
        """A queue of the device's own; on a CPU none. It goes first where both could run: somebody waits for it."""
        return cls(torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None)

    def now(self) -> Moment:
        """All that the current stream was asked to do so far."""
        return None if self._stream is None else _end_of(torch.cuda.current_stream(self._stream.device))

    @contextmanager
    def after(self, moment: Moment, reading: Iterable[Tensor] = ()) -> Iterator[None]:
        """Queue here what is done inside, behind `moment`; memory of what is read stays until that has happened.

        With None it waits for nothing but what was queued here before.
        """
        if self._stream is None:
            yield
            return
        if moment is not None:
            self._stream.wait_event(moment)
        for tensor in reading:
            if tensor.is_cuda:
                tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            yield

    def send(self, frames: Tensor) -> Arrival:
        """Frames on their way to the host; call it inside `after`, where they are made."""
        if not frames.is_cuda:
            return Arrival(frames, None)
        # through memory that the GPU writes by itself: other memory it reaches at a tenth of the speed
        there = torch.empty(frames.shape, dtype=frames.dtype, pin_memory=True)
        there.copy_(frames, non_blocking=True)
        return Arrival(there, _end_of(self._stream or torch.cuda.current_stream(frames.device)))


def _end_of(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(stream)
    return event


class Arrival:
    """Something on its way to the host."""

    def __init__(self, there: Tensor, moment: Moment) -> None:
        self._there, self._moment = there, moment

    def wait(self) -> np.ndarray:
        """It, once it is there; the caller's own."""
        if self._moment is None:
            return self._there.numpy()
        self._moment.synchronize()
        return self._there.clone().numpy()  # pinned memory is scarce, and a caller may keep every frame
