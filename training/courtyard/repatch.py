"""Weights for other patches: what a smaller patch needs is the middle of what a larger one knew."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from worldstride.models.courtyard.config import CourtyardConfig


def repatched(state: dict[str, Tensor], given: CourtyardConfig, wanted: CourtyardConfig) -> dict[str, Tensor]:
    """The state of a network with patches as in `given`, for patches as in `wanted`; other parts as they are.

    A token's ray goes through the middle of its patch, so pixels near the ray keep their weights. Where the patch
    shrinks, its outer pixels fall away and input weights grow by the ratio of areas, which about keeps the answer to an
    even colour. Where it grows, or refinement has other channels, nothing fits and the part is left out.
    """
    out = dict(state)
    if given.patch == wanted.patch:
        return out
    (height, width), (new_height, new_width) = given.patch, wanted.patch
    smaller = new_height <= height and new_width <= width
    top, left = (height - new_height) // 2, (width - new_width) // 2
    for name in ("clean_in.weight", "noisy_in.weight", "out.weight", "out.bias"):
        value = out.pop(name)
        if not smaller:
            continue
        of_inputs = name.endswith("in.weight")
        cells = value.mT if of_inputs else value  # [channels height width, ...]
        cells = cells.unflatten(0, (-1, height, width))
        cells = cells[:, top : top + new_height, left : left + new_width].flatten(0, 2)
        scale = math.prod(given.patch) / math.prod(wanted.patch)
        out[name] = (scale * cells.mT if of_inputs else cells).contiguous()
    place = out["place"].mT.reshape(1, -1, *given.grid)
    out["place"] = F.interpolate(place, wanted.grid, mode="bilinear").flatten(2)[0].mT.contiguous()
    return out
