"""Muon for the blocks' matrices, AdamW for everything else, behind one step."""

from __future__ import annotations

import torch
from torch import nn

from worldstride.models.courtyard.model import CourtyardNetwork
from worldstride.models.matrix_game3.model import MG3Network


class Optimizer:
    """Both optimisers with one learning-rate scale; gradients of AdamW's part are clipped to norm 1."""

    def __init__(self, network: CourtyardNetwork | MG3Network, matrix_rate: float, rate: float) -> None:
        matrices = [p for p in network.blocks.parameters() if p.dim() == 2 and min(p.shape) > 6]
        if not hasattr(torch.optim, "Muon"):  # torch before 2.9
            matrices = []
        mine = {id(p) for p in matrices}
        self.rest = [p for p in network.parameters() if id(p) not in mine]
        groups = [
            {"params": [p for p in self.rest if p.dim() >= 2], "weight_decay": 0.01},
            {"params": [p for p in self.rest if p.dim() < 2], "weight_decay": 0.0},
        ]
        fused = self.rest[0].is_cuda
        self.parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, rate, betas=(0.9, 0.98), fused=fused)]
        self.rates = [rate]
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, matrix_rate, weight_decay=0.0, momentum=0.95))
            self.rates.append(matrix_rate)

    def step(self, scale: float) -> float:
        """One update at `scale` of the full learning rates; returns the norm of AdamW's gradient."""
        norm = nn.utils.clip_grad_norm_(self.rest, 1.0)
        for part, rate in zip(self.parts, self.rates, strict=True):
            for group in part.param_groups:
                group["lr"] = rate * scale
            part.step()
            part.zero_grad(set_to_none=True)
        return norm

    def state(self) -> dict[str, torch.Tensor]:
        """Every moment as bfloat16 and every count as float32, under flat names."""
        flat = {}
        for i, part in enumerate(self.parts):
            for j, entries in part.state_dict()["state"].items():
                for name, value in entries.items():
                    value = torch.as_tensor(value)
                    flat[f"{i}.{j}.{name}"] = value.float() if value.dim() == 0 else value.bfloat16()
        return flat

    def load_state(self, flat: dict[str, torch.Tensor]) -> None:
        """Undo `state`."""
        for i, part in enumerate(self.parts):
            whole = part.state_dict()
            for name, value in flat.items():
                head, j, key = name.split(".", 2)
                if int(head) == i:
                    whole["state"].setdefault(int(j), {})[key] = value if value.dim() == 0 else value.float()
            part.load_state_dict(whole)


def rate_at(step: int, warmup: int, progress: float, decay: float) -> float:
    """Share of the full learning rates: rising over `warmup` steps, falling to 1 % over the last share `decay`."""
    return min(1.0, (step + 1) / warmup) * min(1.0, max(0.01, (1 - progress) / decay))


@torch.no_grad()
def average_into(averaged: nn.Module, network: nn.Module, step: int, most: float) -> None:
    """Move averaged weights toward a network's; their decay rises with steps to `most`."""
    weight = 1 - min(most, (step + 1) / (step + 11))
    torch._foreach_lerp_(list(averaged.parameters()), list(network.parameters()), weight)
