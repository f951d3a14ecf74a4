"""Retrieval for batches of walks, as a session does it for one."""

from __future__ import annotations

import torch
from torch import Tensor

from worldstride import camera, worlds
from worldstride.context import retrieval


class Retriever:
    """Chooses memory frames by cameras alone."""

    def __init__(self, device: torch.device) -> None:
        self._points = retrieval.frustum_points(torch.Generator().manual_seed(0)).to(device)
        self._intrinsics = camera.intrinsics_from_fov(worlds.FOV).to(device)

    def memory(self, coming: Tensor, past: Tensor, before: Tensor, count: int, window: int) -> Tensor:
        """Indices [N, count], in order of time, among past [N, n, 4, 4] frames earlier than before [N].

        `coming` [N, Q, 4, 4] are the first and last frames to be made. The `window` frames from `before` on are recent
        ones; what they show need not be remembered.
        """
        weights = retrieval.coverage(coming, past, self._points, self._intrinsics)
        valid = torch.arange(past.shape[1], device=past.device) < before[:, None]
        recent = before[:, None] + torch.arange(window, device=past.device)
        shown = weights.gather(1, recent[..., None].expand(-1, -1, weights.shape[-1]))
        return retrieval.greedy(retrieval.unseen(weights, shown), valid, count).sort(1).values

    def revisiting_start(self, cameras: Tensor, least: int, chunk: int, window: int, candidates: int = 24) -> Tensor:
        """For each walk [N, n, 4, 4], the start [N] among even ones whose view the past shows and the window does not.

        Cameras alone decide, so the choice knows nothing of what the model will make of it.
        """
        n = cameras.shape[1]
        starts = torch.linspace(least, n - chunk, candidates, device=cameras.device).long()
        ids, scores = torch.arange(n, device=starts.device), []
        for start in starts.tolist():
            ends = cameras[:, [start, start + chunk - 1]]
            weights = retrieval.coverage(ends, cameras, self._points, self._intrinsics)
            recent = weights[:, (ids < start) & (ids >= start - window)].amax(1)
            scores.append((weights[:, ids < start - window].amax(1) * (1 - recent)).mean(1))
        return starts[torch.stack(scores, 1).argmax(1)]
