"""What keyboard and mouse do to Matrix-Game-3.0's camera, and what the network is told of them (specification, 2.5).

The network reads keys W, S, A and D, and a mouse that turns the view by 15 degrees a unit. An action is told at the
frame it is given at, and moves the camera from that frame to the next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from worldstride import camera
from worldstride.control import Action, ControlSettings, motion
from worldstride.models.matrix_game3.config import FRAMES, KEYS, MOUSE

STEP = 0.1235
"""Metres walked in a frame."""
TURN = 15.0
"""Degrees that a unit of the mouse turns or tilts the view by in a frame."""
USUAL = 0.1
"""What the mouse gives while the view turns, as the model was trained and is demonstrated."""
PITCH_LIMIT = 1.4
"""Radians that the view may be tilted by; upstream has no bound."""
STILL = 0.02
"""What the mouse gives below this moves nothing."""
_TURNED = math.radians(TURN * USUAL)
CONTROLS = ControlSettings(STEP, _TURNED, _TURNED, _TURNED / 10)
"""10 pixels of the mouse turn as far as a held key."""


def numbers(actions: Sequence[Action], settings: ControlSettings) -> tuple[Tensor, Tensor]:
    """Keyboard [F, 6], held keys W, S, A and D, and mouse [F, 2], down and to the right, of frames' actions."""
    s = settings
    groups = (s.forward_keys, s.backward_keys, s.left_keys, s.right_keys)
    keys = torch.zeros(len(actions), KEYS)
    mouse = torch.zeros(len(actions), MOUSE)
    for i, action in enumerate(actions):
        for j, group in enumerate(groups):
            keys[i, j] = float(not action.keys.isdisjoint(group))
        moved = motion(action, s)
        mouse[i] = torch.tensor([-moved.pitch, moved.turn]).rad2deg() / TURN
    return keys, mouse


def walked(pose: Tensor, keys: Tensor, mouse: Tensor, step: float = STEP) -> Tensor:
    """The pose [4] = (x, z, yaw, pitch) one frame on, metres and radians, yaw to the right and pitch up.

    The eye walks along the mean of the old and the new yaw, a diagonal as far as any other way.
    """
    x, z, yaw, pitch = pose.unbind()
    tilt, turn = torch.deg2rad(torch.where(mouse.abs() >= STILL, TURN * mouse, 0).to(pose)).unbind()
    forward, strafe = float(keys[0] - keys[1]), float(keys[3] - keys[2])
    far, way = step / max(1.0, math.hypot(forward, strafe)), yaw + turn / 2
    x = x + far * (forward * way.sin() + strafe * way.cos())
    z = z + far * (forward * way.cos() - strafe * way.sin())
    return torch.stack([x, z, yaw + turn, pitch - tilt])


class Walker:
    """`Navigator` of this model: walks in the plane that it starts in, and nothing stands in the way."""

    def __init__(self, settings: ControlSettings) -> None:
        self.settings = settings

    def cameras(
        self, start: Tensor, actions: Sequence[Action], first_frame: int, before: Action | None = None
    ) -> Tensor:
        """See `Navigator.cameras`. Frame i follows from the action of the frame before it; the last one's moves what
        comes after."""
        pose, height, made = camera.pose_from_camera(start.double()), start[1, 3], list[Tensor]()
        for keys, mouse in zip(*numbers([before or Action(), *actions[:-1]], self.settings), strict=True):
            pose = walked(pose, keys, mouse, self.settings.speed)
            pose[3] = pose[3].clamp(-PITCH_LIMIT, PITCH_LIMIT)
            matrix = camera.camera_from_pose(pose)
            matrix[1, 3] = height
            made.append(matrix)
        return torch.stack(made).float()


def guessed(cameras: Tensor, settings: ControlSettings) -> tuple[Tensor, Tensor]:
    """Keyboard [..., F, 6] and mouse [..., F, 2] that lead along cameras [..., F + 1, 4, 4], each to the next, as near
    as keys can."""
    pose = camera.pose_from_camera(cameras.double())
    yaw, (dx, dz, turn, tilt) = pose[..., :-1, 2], pose.diff(dim=-2).unbind(-1)
    turn = torch.remainder(turn + math.pi, 2 * math.pi) - math.pi
    mouse = torch.stack([-tilt, turn], -1).rad2deg() / TURN
    way = yaw + turn / 2
    forward, strafe = dx * way.sin() + dz * way.cos(), dx * way.cos() - dz * way.sin()
    pressed = torch.stack([forward, -forward, -strafe, strafe], -1) > settings.speed / 3
    return F.pad(pressed.float(), (0, KEYS - 4)), mouse.float()


def followed(latents: Tensor, frames: Tensor, settings: ControlSettings) -> tuple[Tensor, Tensor]:
    """Keyboard [B, F, 6] and mouse [B, F, 2] of a window's frames, of which nothing but cameras is known.

    Past latents [B, n, 4, 4] have one camera each, at their last frame, and eyes go straight between them; `frames`
    [B, F, 4, 4] are the new ones'.
    """
    still = latents[:, :1].expand(-1, FRAMES * min(1, latents.shape[1]), -1, -1)
    shares = [(i + 1) / FRAMES for i in range(FRAMES)]
    between = [camera.toward(latents[:, :-1], latents[:, 1:], share) for share in shares[:-1]]
    past = torch.stack([*between, latents[:, 1:]], 2).flatten(1, 2)
    keys, mouse = guessed(torch.cat([still, past, frames, frames[:, -1:]], 1), settings)
    if frames.shape[1] > 1:  # where the last frame leads is not known: on, as before
        keys[:, -1], mouse[:, -1] = keys[:, -2], mouse[:, -2]
    return keys, mouse
