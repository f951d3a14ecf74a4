"""From actions to the cameras of a chunk's frames: freely, or inside a world with walls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from worldstride import camera, worlds
from worldstride.control import Action, ControlSettings, motion

PITCH_LIMIT = 1.4
"""Radians of pitch that a free camera may reach."""


class FreeNavigator:
    """Walks in the plane of the start camera's height; nothing stands in the way."""

    def __init__(self, settings: ControlSettings) -> None:
        self.settings = settings

    def cameras(
        self, start: Tensor, actions: Sequence[Action], first_frame: int, before: Action | None = None
    ) -> Tensor:
        """See `Navigator.cameras`. Yaw turns about the world's vertical, pitch about the camera's own right axis."""
        pose, height = camera.pose_from_camera(start), start[1, 3]
        out = []
        for action in actions:
            step = motion(action, self.settings)
            x, z, yaw, pitch = pose.unbind()
            yaw = yaw + step.turn
            pitch = (pitch + step.pitch).clamp(-PITCH_LIMIT, PITCH_LIMIT)
            x = x + step.forward * yaw.sin() + step.strafe * yaw.cos()
            z = z + step.forward * yaw.cos() - step.strafe * yaw.sin()
            pose = torch.stack([x, z, yaw, pitch])
            matrix = camera.camera_from_pose(pose)
            matrix[1, 3] = height
            out.append(matrix)
        return torch.stack(out)


class SceneNavigator:
    """Walks inside a procedural world and slides along its walls."""

    def __init__(self, settings: ControlSettings, scene: worlds.Scene) -> None:
        self.settings, self._scene = settings, scene.to(torch.device("cpu"))

    def cameras(
        self, start: Tensor, actions: Sequence[Action], first_frame: int, before: Action | None = None
    ) -> Tensor:
        """See `Navigator.cameras`; doors are where they are at each frame's time."""
        pose = camera.pose_from_camera(start)[None]
        out = []
        for i, action in enumerate(actions):
            step = motion(action, self.settings)
            time = torch.tensor([float(first_frame + i)])
            pose = worlds.step_pose(self._scene, pose, step.forward, step.strafe, step.turn, step.pitch, time)
            out.append(camera.camera_from_pose(pose[0]))
        return torch.stack(out)
