"""Cameras: rigid poses, intrinsics, rays, and conversions between conventions.

One convention everywhere: a camera is a 4x4 camera-to-world matrix with OpenCV axes (x right, y down, z forward);
the world has the same axes (y points down), lengths are metres. Intrinsics are 3x3 and normalised by the image size:
a point in front of the camera lands at u = fx x/z + cx, v = fy y/z + cy with u, v in [0, 1] across the image.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from worldstride.errors import InputError

Convention = Literal["opencv", "opengl", "unreal"]
"""opencv: x right, y down, z forward. opengl (also Blender, NeRF, Three.js): x right, y up, z backward.
unreal: x forward, y right, z up, left-handed, lengths in centimetres."""

_AXES: dict[str, list[list[float]]] = {
    "opencv": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "opengl": [[1, 0, 0], [0, -1, 0], [0, 0, -1]],
    "unreal": [[0, 0, 1], [1, 0, 0], [0, -1, 0]],
}
_METRES: dict[str, float] = {"opencv": 1.0, "opengl": 1.0, "unreal": 0.01}


def camera_from_pose(pose: Tensor) -> Tensor:
    """Camera-to-world [..., 4, 4] of a walking pose [..., 4] = (x, z, yaw, pitch), metres and radians.

    Yaw turns right from +z towards +x, pitch looks up; the eye stays in the plane y = 0.
    """
    x, z, yaw, pitch = pose.unbind(-1)
    sin_y, cos_y, sin_p, cos_p = yaw.sin(), yaw.cos(), pitch.sin(), pitch.cos()
    o, i = torch.zeros_like(x), torch.ones_like(x)
    rows = [cos_y, sin_y * sin_p, sin_y * cos_p, x, o, cos_p, -sin_p, o, -sin_y, cos_y * sin_p, cos_y * cos_p, z]
    return torch.stack([*rows, o, o, o, i], -1).unflatten(-1, (4, 4))


def pose_from_camera(camera: Tensor) -> Tensor:
    """Walking pose [..., 4] = (x, z, yaw, pitch) of a camera-to-world matrix [..., 4, 4], without roll and height."""
    forward = camera[..., :3, 2]
    yaw = torch.atan2(forward[..., 0], forward[..., 2])
    pitch = torch.asin((-forward[..., 1]).clamp(-1, 1))
    return torch.stack([camera[..., 0, 3], camera[..., 2, 3], yaw, pitch], -1)


def intrinsics_from_fov(horizontal: float, aspect: float = 1.0) -> Tensor:
    """Normalised intrinsics [3, 3] of a centred pinhole; `horizontal` in radians, `aspect` = width / height."""
    if not 0.0 < horizontal < math.pi:
        raise InputError(f"field of view must lie between 0 and pi radians, got {horizontal!r}")
    fx = 0.5 / math.tan(horizontal / 2)
    return torch.tensor([[fx, 0, 0.5], [0, fx * aspect, 0.5], [0, 0, 1]], dtype=torch.float32)


def invert(camera: Tensor) -> Tensor:
    """Inverse [..., 4, 4] of rigid transforms [..., 4, 4] (camera-to-world <-> world-to-camera)."""
    rotation = camera[..., :3, :3].mT
    top = torch.cat([rotation, -rotation @ camera[..., :3, 3:]], -1)
    bottom = torch.zeros_like(camera[..., 3:, :])
    bottom[..., 3] = 1
    return torch.cat([top, bottom], -2)


def relative(cameras: Tensor, reference: Tensor) -> Tensor:
    """Cameras [..., 4, 4] seen from `reference` [..., 4, 4]: reference^-1 @ cameras."""
    return invert(reference) @ cameras


def between(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Cameras [steps, 4, 4] on the way from start to end [4, 4], evenly spaced, the last one `end` itself."""
    return torch.stack([*(toward(start, end, (i + 1) / steps) for i in range(steps - 1)), end])


def toward(start: Tensor, end: Tensor, share: float) -> Tensor:
    """Cameras [..., 4, 4] after a share of the way from start to end [..., 4, 4].

    The eye moves straight, the view turns about one axis; by half a turn any axis would do, and one is taken.
    """
    turn = (start[..., :3, :3].mT @ end[..., :3, :3]).double()
    one = torch.eye(3, dtype=turn.dtype, device=turn.device)
    parts = (turn[..., i, j] - turn[..., j, i] for i, j in ((2, 1), (0, 2), (1, 0)))
    axis = torch.stack(list(parts), -1) / 2
    length = axis.norm(dim=-1, keepdim=True)
    trace = turn.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    angle = torch.atan2(length, (trace - 1) / 2)
    # half a turn: the axis is what stays where it is
    still = turn + one
    longest = still.diagonal(dim1=-2, dim2=-1).argmax(-1, keepdim=True)[..., None].expand(*turn.shape[:-1], 1)
    axis = torch.where((length < 1e-9) & (angle > 1), still.gather(-1, longest)[..., 0], axis)
    x, y, z = (axis / axis.norm(dim=-1, keepdim=True).clamp_min(1e-30)).unbind(-1)
    o, part = torch.zeros_like(x), (angle * share)[..., None]
    cross = torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).unflatten(-1, (3, 3))
    spin = one + part.sin() * cross + (1 - part.cos()) * (cross @ cross)  # Rodrigues' formula
    made = start.clone()
    made[..., :3, :3] = start[..., :3, :3] @ spin.to(start)
    made[..., :3, 3] = torch.lerp(start[..., :3, 3], end[..., :3, 3], share)
    return made


def rays(cameras: Tensor, intrinsics: Tensor, height: int, width: int) -> Tensor:
    """Unit ray directions in the world [..., height, width, 3] through cell centres of an image grid."""
    v = (torch.arange(height, device=cameras.device, dtype=cameras.dtype) + 0.5) / height
    u = (torch.arange(width, device=cameras.device, dtype=cameras.dtype) + 0.5) / width
    k = intrinsics.to(cameras)
    x = ((u - k[..., None, 0, 2]) / k[..., None, 0, 0])[..., None, :].expand(*k.shape[:-2], height, width)
    y = ((v - k[..., None, 1, 2]) / k[..., None, 1, 1])[..., :, None].expand(*k.shape[:-2], height, width)
    local = torch.stack([x, y, torch.ones_like(x)], -1)  # [..., h, w, 3]
    local = local / local.norm(dim=-1, keepdim=True)
    return torch.einsum("...ij,...hwj->...hwi", cameras[..., :3, :3], local)


def convert(cameras: Tensor, source: Convention, target: Convention = "opencv") -> Tensor:
    """Camera-to-world matrices [..., 4, 4] of one convention in another; both world and camera axes change."""
    for name in (source, target):
        if name not in _AXES:
            raise InputError(f"unknown camera convention {name!r}; known: {', '.join(_AXES)}")
    to_cv = torch.tensor(_AXES[source], dtype=cameras.dtype, device=cameras.device).mT  # rows: OpenCV axes
    from_cv = torch.tensor(_AXES[target], dtype=cameras.dtype, device=cameras.device)
    change = from_cv @ to_cv
    out = cameras.clone()
    out[..., :3, :3] = change @ cameras[..., :3, :3] @ change.mT
    scale = _METRES[source] / _METRES[target]
    out[..., :3, 3] = (change @ cameras[..., :3, 3:])[..., 0] * scale
    return out


def check_cameras(cameras: Tensor, name: str = "cameras") -> Tensor:
    """Return `cameras` [F, 4, 4] if they are finite rigid transforms; raise `InputError` naming the first bad frame."""
    if cameras.ndim != 3 or cameras.shape[-2:] != (4, 4):
        raise InputError(f"{name} must have shape [frames, 4, 4], got {list(cameras.shape)}")
    finite = cameras.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        bad = int((~finite).nonzero()[0])
        raise InputError(f"{name}[{bad}] holds NaN or infinity; every entry of a camera must be finite")
    rotation = cameras[:, :3, :3].double()
    error = (rotation.mT @ rotation - torch.eye(3, dtype=torch.float64, device=cameras.device)).abs().amax((1, 2))
    last = torch.tensor([0, 0, 0, 1], dtype=cameras.dtype, device=cameras.device)
    rigid = (error < 1e-3) & (rotation.det() > 0) & (cameras[:, 3] == last).all(1)
    if not bool(rigid.all()):
        bad = int((~rigid).nonzero()[0])
        raise InputError(
            f"{name}[{bad}] is no rigid camera-to-world matrix: the rotation's error is {float(error[bad]):.2g} "
            "(at most 1e-3), its determinant must be +1 and the last row 0 0 0 1"
        )
    return cameras
