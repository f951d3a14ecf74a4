"""Interactive video world models, cheap enough to live in.

engine = worldstride.load("courtyard")
session = engine.new(seed=7)
chunk = session.step(Action(keys={"KeyW"}))   # chunk.frames: uint8 [F, H, W, 3]
"""

from worldstride._version import __version__
from worldstride.acceleration import PRESETS, Acceleration
from worldstride.control import Action, ControlSettings
from worldstride.engine import Engine, load
from worldstride.report import ChunkReport
from worldstride.saving import open_session as open
from worldstride.session import Session, step_together
from worldstride.state import Chunk
from worldstride.trajectory import Trajectory, load_trajectory, parse_trajectory

__all__ = [
    "PRESETS",
    "Acceleration",
    "Action",
    "Chunk",
    "ChunkReport",
    "ControlSettings",
    "Engine",
    "Session",
    "Trajectory",
    "__version__",
    "load",
    "load_trajectory",
    "open",
    "parse_trajectory",
    "step_together",
]
