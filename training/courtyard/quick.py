"""A short evaluation during training: teacher-forced chunks of held-out worlds, with and without memory."""

from __future__ import annotations

import torch
from heldout import HeldOut, sample

from worldstride.bench import metrics
from worldstride.models.courtyard.adapter import CourtyardModel
from worldstride.models.courtyard.config import CourtyardConfig
from worldstride.models.courtyard.model import CourtyardNetwork


class Quick:
    """Held-out sets of both families, made once."""

    def __init__(self, config: CourtyardConfig, device: torch.device, worlds: int, smoke: bool = False) -> None:
        self._sets = {}
        for family, count in (("plain", worlds), ("courtyard", max(4, worlds // 4))):
            frames = 24 if smoke else None
            self._sets[family] = HeldOut(sample(family, count, config, device, frames), config)

    @torch.no_grad()
    def score(self, network: CourtyardNetwork) -> dict[str, float]:
        """PSNR at 4 steps by class of frames (plain) and of pixels (courtyard), the seam and the sharpness."""
        dtype = torch.bfloat16 if network.place.is_cuda else torch.float32
        model, out = CourtyardModel(network, dtype), {}
        patch = network.config.patch
        for family, held in self._sets.items():
            for how in ("pose", "none"):
                image = held.run(model, how, steps=4)
                if family == "plain":
                    values = metrics.psnr(image, held.truth)
                    for name, mask in held.frame_classes().items():
                        out[f"plain_{name}_{how}"] = metrics.mean(values[mask])
                else:
                    for name, mask in held.masks().items():
                        out[f"court_{name}_{how}"] = metrics.mean(metrics.psnr(image, held.truth, mask))
                if how == "pose":
                    inner = (
                        metrics.gradient(image, patch=patch).mean() / metrics.gradient(held.truth, patch=patch).mean()
                    )
                    out[f"{family}_sharp"] = float(inner)
                    out[f"{family}_seam"] = float(
                        metrics.seam(image, patch).mean() / metrics.seam(held.truth, patch).mean()
                    )
        return out
