"""The processes of a run, one a GPU."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist
from torch import Tensor


class Group:
    """The processes of a run: gradients are averaged, decisions follow rank 0."""

    def __init__(self) -> None:
        self.born = time.perf_counter()
        self.many = "RANK" in os.environ
        self.cuda = torch.cuda.is_available()
        if self.many:
            dist.init_process_group("nccl" if self.cuda else "gloo")
        self.rank = dist.get_rank() if self.many else 0
        self.size = dist.get_world_size() if self.many else 1
        self.device = (
            torch.device("cuda", self.rank % max(1, torch.cuda.device_count())) if self.cuda else torch.device("cpu")
        )
        if self.cuda:
            torch.cuda.set_device(self.device)

    def log(self, *words: object) -> None:
        """Print on rank 0, with seconds since the start."""
        if self.rank == 0:
            print(f"[{time.perf_counter() - self.born:7.1f}]", *words, flush=True)

    def wait(self) -> None:
        """Wait for this process's GPU, where it has one."""
        if self.cuda:
            torch.cuda.synchronize()

    def average_gradients(self, parameters: list[Tensor]) -> None:
        """Mean over all processes, in one message."""
        if not self.many:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat, dist.ReduceOp.SUM)
        flat /= self.size
        parts = flat.split([g.numel() for g in grads])
        torch._foreach_copy_(grads, [f.view_as(g) for f, g in zip(parts, grads, strict=True)])

    def agree(self, value: float) -> float:
        """Rank 0's value, everywhere."""
        if not self.many:
            return value
        tensor = torch.tensor([value], device=self.device, dtype=torch.float64)
        dist.broadcast(tensor, 0)
        return float(tensor)

    def leave(self) -> None:
        """End the run's part of this process."""
        if self.many:
            dist.destroy_process_group()
