"""What rollouts score against the truth, and what they lose against full compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from worldstride.bench import metrics
from worldstride.bench.trials import pictures
from worldstride.bench.walks import CLASSES, HeldOutWorld

HALVES = ("first half", "second half")
GROUPS = ("all", *CLASSES, *HALVES)
"""What scores are split by: classes of pixels, and the walk's halves."""
MEANS = ("energy", "psnr", "psnr_full", "floor", "ssim", "visits")
"""Energy score (lower is better); PSNR in dB against the truth, against full compute with the same noise, and of two
noise seeds against each other; structural similarity; PSNR between two visits of one place."""
RATIOS = ("sharpness", "seam")
"""Detail and patch borders, the truth's = 1."""
Table = dict[str, dict[str, Tensor]]
"""Metric -> group -> one value a frame [C], NaN where the group is hardly there."""

_APART = 16  # frames that lie at least between two visits of one place
_NEAR = 0.03  # metres plus radians within which two cameras are at one place


def score(
    shown: np.ndarray, full: np.ndarray | None, world: HeldOutWorld, patch: tuple[int, int] | None,
    device: torch.device,
) -> Table:  # fmt: skip
    """Scores of one world's frames uint8 [2, C, H, W, 3] of two noise seeds.

    `full` holds the frames of full compute with the same noise. Sharpness is measured inside patches (height, width),
    seams across their borders; both are kept as pairs of sums, whose ratio is taken over all frames.
    """
    x = pictures(shown, device)
    count = x.shape[1]
    truth = world.truth[:count].to(device)
    masks: dict[str, Tensor | None] = {"all": None, **{c: m[:count].to(device) for c, m in world.masks.items()}}
    other = None if full is None else pictures(full, device)
    out: Table = {}

    def put(metric: str, group: str, values: Tensor) -> None:
        out.setdefault(metric, {})[group] = values.cpu()

    for group, mask in masks.items():
        put("energy", group, metrics.energy_score(x[0], x[1], truth, mask))
        put("psnr", group, sum((metrics.psnr(one, truth, mask) for one in x), start=torch.zeros(())) / len(x))
        put("floor", group, metrics.psnr(x[0], x[1], mask))
        put("ssim", group, metrics.ssim(x[0], truth, mask))
        if other is not None:
            pairs = zip(x, other, strict=True)
            put("psnr_full", group, sum((metrics.psnr(a, b, mask) for a, b in pairs), start=torch.zeros(())) / len(x))
        put("sharpness", group, metrics.gradient(x[0], mask, patch))
        put("sharpness_truth", group, metrics.gradient(truth, mask, patch))
    if patch is not None:
        put("seam", "all", metrics.seam(x[0], patch))
        put("seam_truth", "all", metrics.seam(truth, patch))
    put("visits", "all", _between_visits(x[0], world, masks["moving"]))
    for values in out.values():
        for half, part in zip(HALVES, values["all"].tensor_split(2), strict=True):
            values[half] = part
    return out


def earlier_visit(cameras: Tensor, given: int) -> list[int | None]:
    """For every frame from `given` on, the last dreamt one long before it that stood at the same place."""
    place = cameras[given:].float()
    moved = (place[:, None, :3, 3] - place[None, :, :3, 3]).norm(dim=-1)
    cosine = ((place[:, None, :3, :3] * place[None, :, :3, :3]).sum((-1, -2)) - 1) / 2
    near = moved + cosine.clamp(-1, 1).arccos() < _NEAR
    found: list[int | None] = []
    for i in range(len(place)):
        before = near[i, : max(0, i - _APART)].nonzero().flatten().tolist()
        found.append(before[-1] if before else None)
    return found


def _between_visits(shown: Tensor, world: HeldOutWorld, moving: Tensor | None) -> Tensor:
    values = torch.full((len(shown),), math.nan, device=shown.device)
    pairs = [(i, j) for i, j in enumerate(earlier_visit(world.cameras, world.given)[: len(shown)]) if j is not None]
    if pairs and moving is not None:
        late, early = (torch.tensor(p, device=shown.device) for p in zip(*pairs, strict=True))
        values[late] = metrics.psnr(shown[late], shown[early], ~(moving[late] | moving[early]))
    return values


def summarise(tables: Sequence[Table], reference: Sequence[Table] | None) -> dict[str, dict[str, dict[str, float]]]:
    """Metric -> group -> mean with its 95 % interval over worlds; `loss` and `softening` against a reference.

    `loss` is how much higher the energy score is, in percent; `softening` how much lower the sharpness, in percent;
    both with paired intervals: the same worlds are drawn for both sides.
    """
    out: dict[str, dict[str, dict[str, float]]] = {}
    for group in GROUPS:
        for metric in MEANS:
            if group in tables[0].get(metric, {}):
                values = _by_world(tables, metric, group)
                low, high = metrics.interval(values)
                out.setdefault(metric, {})[group] = {"mean": metrics.mean(values), "low": low, "high": high}
        for metric in RATIOS:
            if group in tables[0].get(metric, {}):
                pair = [_by_world(tables, name, group) for name in (metric, f"{metric}_truth")]
                out.setdefault(metric, {})[group] = _ratio(pair[0], pair[1], lambda r: r)
        if reference is not None:
            mine, full = (_by_world(t, "energy", group) for t in (tables, reference))
            out.setdefault("loss", {})[group] = _ratio(mine, full, lambda r: 100 * (r - 1))
            mine, full = (_by_world(t, "sharpness", group) for t in (tables, reference))
            out.setdefault("softening", {})[group] = _ratio(mine, full, lambda r: 100 * (1 - r))
    return out


def _by_world(tables: Sequence[Mapping[str, Mapping[str, Tensor]]], metric: str, group: str) -> Tensor:
    return torch.stack([table[metric][group].nanmean() for table in tables])


def _ratio(mine: Tensor, other: Tensor, change: Callable[[Tensor], Tensor], draws: int = 2000) -> dict[str, float]:
    """Ratio of two means over worlds [W] with its bootstrap interval, the same worlds drawn for both."""
    known = ~(mine.isnan() | other.isnan())
    mine, other = mine[known], other[known]
    if not len(mine):
        return dict.fromkeys(("mean", "low", "high"), math.nan)
    picks = torch.randint(len(mine), (draws, len(mine)), generator=torch.Generator().manual_seed(0))
    ratios = mine[picks].mean(1) / other[picks].mean(1).clamp_min(1e-9)
    ends = sorted(float(change(q)) for q in ratios.quantile(torch.tensor([0.025, 0.975])))
    whole = float(change(mine.mean() / other.mean().clamp_min(1e-9)))
    low, high = metrics.widened(whole, ends[0], ends[1], len(mine))
    return {"mean": whole, "low": low, "high": high}
