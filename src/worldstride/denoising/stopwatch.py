"""Times of stretches of work on a device, read once at the end."""

from __future__ import annotations

import time
from itertools import pairwise

import torch


class Stopwatch:
    """Marks points in time. On a GPU they are events in its queue, so that marking does not wait for the work."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._times: list[float] = []
        self._events: list[torch.cuda.Event] = []
        self.mark()

    def mark(self) -> None:
        """End one stretch and begin the next."""
        if not self._cuda:
            self._times.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    def seconds(self) -> list[float]:
        """Length of every stretch; on a GPU this waits for the last one to end."""
        if self._events:
            self._events[-1].synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in pairwise(self._events)]
        return [b - a for a, b in pairwise(self._times)]
