"""Procedural worlds with their own ground truth: sample a `Scene`, walk through it, render it, ask what was
seen.

scene = scene_from_seed("courtyard", [0, 1])
pose = sample_walk(scene, 64)                       # [2, 64, 4] = (x, z, yaw, pitch)
time = torch.arange(64.0).expand(2, 64)             # frames
frames = render(scene, pose, time)                  # [2, 64, 3, 96, 96] uint8
"""

from worldstride.worlds.corridor import sample_corridor
from worldstride.worlds.courtyard import sample_courtyard, sample_plain, scene_from_seed
from worldstride.worlds.covisibility import covisible, moving_pixels
from worldstride.worlds.render import EYE, FAR, FOV, TraceFunction, directions, intrinsics, render, trace
from worldstride.worlds.scene import (
    CELLS,
    Scene,
    SurfaceIds,
    ball_centres,
    gate_edges,
    is_dynamic,
    panel_angles,
)
from worldstride.worlds.walker import PITCH_LIMIT, REACH, step_pose
from worldstride.worlds.walks import sample_plain_walk, sample_walk

__all__ = [
    "CELLS",
    "EYE",
    "FAR",
    "FOV",
    "PITCH_LIMIT",
    "REACH",
    "Scene",
    "SurfaceIds",
    "TraceFunction",
    "ball_centres",
    "covisible",
    "directions",
    "gate_edges",
    "intrinsics",
    "is_dynamic",
    "moving_pixels",
    "panel_angles",
    "render",
    "sample_corridor",
    "sample_courtyard",
    "sample_plain",
    "sample_plain_walk",
    "sample_walk",
    "scene_from_seed",
    "step_pose",
    "trace",
]
