"""Image quality against the truth, over whole frames or over masks of pixels.

Images are float [..., 3, H, W] in [0, 1]; masks are bool [..., H, W]. Every function returns one value a frame
[...], NaN where a mask selects less than `LEAST` of a frame, so that `mean` below leaves such frames out.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = 0.02
"""Smallest share of a frame that a mask must select for the frame to count."""
FLOOR = 1e-8
"""Least mean squared error, so that identical frames score 80 dB and not infinity."""


def _over(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over pixels [..., H, W], under a mask where one is given."""
    if mask is None:
        return values.mean((-1, -2))
    weight = mask.to(values.dtype)
    share = weight.mean((-1, -2))
    return torch.where(share < LEAST, torch.nan, (values * weight).mean((-1, -2)) / share.clamp_min(1e-9))


def psnr(image: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio in dB."""
    error = _over((image - truth).square().mean(-3), mask)
    return -10 * error.clamp_min(FLOOR).log10()


def distance(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Root-mean-square difference: the L2 norm, scaled so that frames and masks of all sizes compare."""
    return _over((a - b).square().mean(-3), mask).sqrt()


def energy_score(first: Tensor, second: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Energy score of two samples (Gneiting & Raftery, 2007, eq. 22): lower is better, and blurring does not pay.

    mean(|x1 - y|, |x2 - y|) - |x1 - x2| / 2 with the root-mean-square norm.
    """
    near = (distance(first, truth, mask) + distance(second, truth, mask)) / 2
    return near - distance(first, second, mask) / 2


def ssim(image: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Structural similarity (Wang et al., 2004): 11x11 Gaussian window of 1.5 pixels, mean of the colours."""
    lead, size = image.shape[:-3], image.shape[-2:]
    line = torch.exp(-((torch.arange(11, device=image.device, dtype=image.dtype) - 5) ** 2) / (2 * 1.5**2))
    kernel = torch.outer(line, line)[None, None] / line.sum() ** 2

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (5, 5, 5, 5), mode="reflect"), kernel)

    x, y = (t.reshape(-1, 1, *size) for t in (image, truth))
    mx, my = blur(x), blur(y)
    vx, vy, vxy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return _over(value.reshape(*lead, 3, *size).mean(-3), mask)


def gradient(image: Tensor, mask: Tensor | None = None, patch: tuple[int, int] | None = None) -> Tensor:
    """Mean absolute difference of neighbours, both directions: sharpness, to be divided by the truth's.

    With `patch` = (height, width), differences across patch borders are left out, so that seams do not pass for detail.
    """
    across, down = image.diff(dim=-1).abs().mean(-3), image.diff(dim=-2).abs().mean(-3)
    keep_x = _inner(image.shape[-1], patch[1] if patch else 0, image)
    keep_y = _inner(image.shape[-2], patch[0] if patch else 0, image)
    x_mask = keep_x.expand_as(across) if mask is None else mask[..., 1:] & mask[..., :-1] & keep_x
    y_mask = keep_y[:, None].expand_as(down) if mask is None else mask[..., 1:, :] & mask[..., :-1, :] & keep_y[:, None]
    return _over(across, x_mask) + _over(down, y_mask)


def seam(image: Tensor, patch: tuple[int, int]) -> Tensor:
    """Mean absolute difference across patch borders alone, both directions; to be divided by the truth's."""
    across, down = image.diff(dim=-1).abs().mean(-3), image.diff(dim=-2).abs().mean(-3)
    border_x, border_y = ~_inner(image.shape[-1], patch[1], image), ~_inner(image.shape[-2], patch[0], image)
    return across[..., border_x].mean((-1, -2)) + down[..., border_y, :].mean((-1, -2))


def _inner(size: int, side: int, like: Tensor) -> Tensor:
    """Which of the size - 1 differences stay inside a patch."""
    at = torch.arange(1, size, device=like.device)
    return at % side != 0 if side else torch.ones_like(at, dtype=torch.bool)


def mean(values: Tensor) -> float:
    """Mean of all frames that count; NaN if none does."""
    return float(values.nanmean()) if bool((~values.isnan()).any()) else math.nan


def interval(values: Tensor, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean, `widened`; the first dimension of values [worlds, ...] is resampled."""
    per_world = values.float().cpu().flatten(1).nanmean(1) if values.ndim > 1 else values.float().cpu()
    per_world = per_world[~per_world.isnan()]
    if not len(per_world):
        return math.nan, math.nan
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(per_world), (draws, len(per_world)), generator=generator)
    means = per_world[picks].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
    return widened(float(per_world.mean()), low, high, len(per_world))


_STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""0.975 quantiles of Student's t distribution with 1, 2, ... degrees of freedom."""
_NORMAL = 1.960


def widened(mean: float, low: float, high: float, count: int) -> tuple[float, float]:
    """Bootstrap ends for `count` draws as wide as so few deserve; NaN for a single one, which tells no spread.

    Resampling n values underestimates the spread of their mean by sqrt((n - 1) / n) and knows nothing of how uncertain
    that spread is itself; both are made good as for Student's interval.
    """
    if count < 2:
        return math.nan, math.nan
    known = count - 1
    quantile = _STUDENT[known - 1] if known <= len(_STUDENT) else _NORMAL + 2.5 / known
    factor = quantile / _NORMAL * math.sqrt(count / known)
    return mean - factor * (mean - low), mean + factor * (high - mean)
