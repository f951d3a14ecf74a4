"""Times of stretches of work on a device, read once at the end."""

from __future__ import annotations

import time

import torch

Moment = float | torch.cuda.Event


class Stopwatch:
    """Marks points in time. On a GPU they are events in its queue, so that marking does not wait for the work."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._stretches: list[tuple[Moment, Moment]] = []
        self._from = self._now()

    def _now(self) -> Moment:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self) -> None:
        """Begin a stretch here; what happened since the last mark belongs to none."""
        self._from = self._now()

    def mark(self) -> None:
        """End one stretch and begin the next."""
        now = self._now()
        self._stretches.append((self._from, now))
        self._from = now

    def seconds(self) -> list[float]:
        """Length of every stretch; on a GPU this waits for the last one to end."""
        return [_between(a, b) for a, b in self._stretches]


def _between(start: Moment, end: Moment) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    raise TypeError("a stretch begins and ends on one clock")
