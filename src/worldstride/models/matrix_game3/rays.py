"""Where a chunk's cameras are and look: relative poses, rays through pixels, and what tokens are told of them.

A token is told origin and unit direction of the ray through each of its pixels (specification, section 2.5; called
Pluecker there, though it holds origins and no moments). Both are linear in a camera's entries, so that a table of 9
rows a token, made once, stands in for the rays and for the widest product of the network (`RayTable`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from worldstride import camera
from worldstride.models.matrix_game3.config import PATCH, MG3Config


def stepwise(cameras: Tensor) -> Tensor:
    """Each of a window's cameras [..., T, 4, 4] as the one before it sees it; the first one stays where it is.

    Translations are in units of the longest: how far the window goes is not told. They stay zeros where nothing moves.
    """
    first = torch.eye(4, dtype=cameras.dtype, device=cameras.device).expand_as(cameras[..., :1, :, :])
    steps = torch.cat([first, camera.relative(cameras[..., 1:, :, :], cameras[..., :-1, :, :])], -3)
    longest = steps[..., :3, 3].norm(dim=-1).amax(-1, keepdim=True)[..., None]
    return _scaled(steps, longest)


def recalled(cameras: Tensor, references: Tensor) -> Tensor:
    """Remembered cameras [..., M, 4, 4] as each one's reference sees it; translations have length 1, or none."""
    seen = camera.relative(cameras, references)
    return _scaled(seen, seen[..., :3, 3].norm(dim=-1, keepdim=True))


def _scaled(cameras: Tensor, unit: Tensor) -> Tensor:
    made = cameras.clone()
    made[..., :3, 3] /= torch.where(unit > 0, unit, 1)
    return made


def local_rays(
    height: int, width: int, dtype: torch.dtype = torch.float64, device: torch.device | None = None
) -> Tensor:
    """Unit directions [height, width, 3] through pixel centres of a camera with 90 degrees on both axes."""
    intrinsics = torch.tensor([[0.5, 0, 0.5], [0, 0.5, 0.5], [0, 0, 1]], dtype=dtype)
    return camera.rays(torch.eye(4, dtype=dtype, device=device), intrinsics, height, width)


def told(cameras: Tensor, height: int, width: int, pixels: int = MG3Config.pixels) -> Tensor:
    """What tokens are told [..., tokens, 6144] of cameras [..., 4, 4] whose frames are height x width.

    The plain form: numbers come by origin and direction (6), row and column in a latent pixel (16, 16), and row and
    column of the latent pixel in the token (2, 2). Another number of `pixels` stands for the 16.
    """
    local = local_rays(height, width, cameras.dtype).to(cameras.device)
    directions = torch.einsum("...ij,hwj->...hwi", cameras[..., :3, :3], local)
    origins = cameras[..., None, None, :3, 3].expand_as(directions)
    return _by_token(torch.cat([origins, directions], -1), pixels)


def _by_token(rays: Tensor, pixels: int = MG3Config.pixels) -> Tensor:
    """[..., height, width, C] -> [..., tokens, C * 16 * 16 * 2 * 2]"""
    tiles = rays.unflatten(-2, (-1, PATCH, pixels)).unflatten(-5, (-1, PATCH, pixels))  # [..., h, 2, 16, w, 2, 16, C]
    order = (0, 3, 6, 2, 5, 1, 4)
    lead = tiles.ndim - len(order)
    tiles = tiles.permute(*range(lead), *(lead + i for i in order))  # [..., h, w, C, 16, 16, 2, 2]
    return tiles.flatten(-5).flatten(-3, -2)


class RayTable(NamedTuple):
    """Tokens of rays from a camera's entries, for one frame size and one weight."""

    origin: Tensor
    """[3, width]: a token is told as much of the camera's place, wherever it lies in the frame."""
    direction: Tensor
    """[9, tokens, width]: of each entry of the camera's rotation, row after row."""
    bias: Tensor
    """[width]"""
    size: tuple[int, int]
    """Height and width of frames, pixels."""

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, height: int, width: int) -> RayTable:
        """From the linear layer [out, 6144] and [out] that takes rays to tokens."""
        pixels = math.isqrt(weight.shape[1] // 6) // PATCH
        parts = weight.double().unflatten(1, (6, -1))  # [out, 6, 1024]
        local = local_rays(height, width, device=weight.device)
        rays = _by_token(local[..., None, :].movedim(-1, 0), pixels)  # [3, tokens, 1024]
        table = torch.einsum("oip,jnp->ijno", parts[:, 3:], rays).flatten(0, 1)
        return cls(parts[:, :3].sum(-1).T.to(weight), table.to(weight), bias, (height, width))

    def tokens(self, cameras: Tensor) -> Tensor:
        """[..., T, 4, 4] -> [..., T, tokens, width], in the table's precision."""
        turn, place = cameras[..., :3, :3].flatten(-2), cameras[..., :3, 3]
        seen = torch.tensordot(turn.to(self.direction), self.direction, 1)
        return seen + (place.to(self.origin) @ self.origin + self.bias)[..., None, :]


def interpolated(cameras: Tensor, at: Sequence[float]) -> Tensor:
    """Cameras [len(at), 4, 4] at moments between frames of cameras [F, 4, 4]: views turn evenly, eyes go straight."""
    made = list[Tensor]()
    for moment in at:
        before = min(max(math.floor(moment), 0), len(cameras) - 1)
        after, share = min(before + 1, len(cameras) - 1), moment - before
        made.append(camera.toward(cameras[before], cameras[after], share) if share > 0 else cameras[before])
    return torch.stack(made)
