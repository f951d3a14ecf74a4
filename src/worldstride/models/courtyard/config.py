"""Shape of the courtyard model."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

from worldstride.errors import InputError

CameraCode = Literal["ray", "projective", "both"]
ContextView = Literal["together", "clips", "apart"]


@dataclass(frozen=True)
class CourtyardConfig:
    """Every number that fixes the network; stored beside the weights."""

    size: int = 96
    """Frame height and width in pixels."""
    patch_height: int = 12
    """Height of a patch in pixels; one token a patch."""
    patch_width: int = 8
    """Width of a patch in pixels."""
    width: int = 256
    """Channels of a token."""
    depth: int = 8
    """Transformer blocks."""
    heads: int = 4
    """Attention heads; width / heads channels each."""
    chunk: int = 4
    """Frames (= latents) generated together."""
    memory: int = 8
    """Retrieved single frames in the context."""
    window: int = 8
    """Most recent frames in the context."""
    sink: int = 0
    """First frames of the walk that always stay in the context."""
    camera: CameraCode = "both"
    """How the camera enters attention: rotary angles of the token's ray, projective attention on camera matrices, or
    both, in separate channels (measured best)."""
    context: ContextView = "together"
    """What context frames see in the context pass: all others; the recent ones those of their own chunk, older ones
    nothing else; or all nothing else, so that a frame's keys and values never change."""
    refine: int = 16
    """Channels of the convolutions after unpatchify that mend patch borders (3 of them hold the noisy image);
    0 leaves them out."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name in ("memory", "sink", "refine") else 1
            if field.name not in ("camera", "context") and (type(value) is not int or value < least):
                raise InputError(f"{field.name} must be an integer of at least {least}, got {value!r}")
        if self.camera not in get_args(CameraCode):
            raise InputError(f"camera must be one of {', '.join(get_args(CameraCode))}, got {self.camera!r}")
        if self.context not in get_args(ContextView):
            raise InputError(f"context must be one of {', '.join(get_args(ContextView))}, got {self.context!r}")
        for side in ("patch_height", "patch_width"):
            if self.size % getattr(self, side):
                raise InputError(f"size must be a multiple of {side}, got {self.size} and {getattr(self, side)}")
        if self.refine and self.refine < 6:
            raise InputError(f"refine must be 0 or at least 6 channels, got {self.refine}")
        if self.width % self.heads or self.width // self.heads != 64:
            raise InputError(f"width / heads must be 64, got width {self.width} and {self.heads} heads")

    def spans(self, older: int, recent: int) -> list[tuple[int, int]]:
        """How a context is encoded: spans of frames one after the other, and how many of a span see each other."""
        if self.context == "together":
            spans = [(older + recent, older + recent)]
        elif self.context == "apart":
            spans = [(older + recent, 1)]
        else:
            head = recent % self.chunk
            spans = [(older, 1), (head, head), (recent - head, self.chunk)]
        return [(frames, size) for frames, size in spans if frames]

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return self.patch_height, self.patch_width

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.size // self.patch_height, self.size // self.patch_width

    @property
    def tokens(self) -> int:
        """Tokens of a frame."""
        return math.prod(self.grid)

    @property
    def values(self) -> int:
        """Values of a patch: 3 colours x height x width."""
        return 3 * math.prod(self.patch)

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.width // self.heads
