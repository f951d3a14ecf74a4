"""Shape of HY-WorldPlay's transformer: the 8B model on HunyuanVideo-1.5, at any size.

What configurations of every variant are checked for is here, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from worldstride.errors import InputError, did_you_mean, integer_from, number_in

_FIXED: dict[str, object] = {
    "patch_size": [1, 1, 1], "concat_condition": True, "mlp_act_type": "gelu_tanh", "mm_single_blocks_depth": 0,
    "qkv_bias": True, "qk_norm": True, "qk_norm_type": "rms", "guidance_embed": False, "use_meanflow": False,
    "text_projection": "single_refiner", "use_attention_mask": True, "text_states_dim_2": None,
    "text_pool_type": None, "glyph_byT5_v2": True, "vision_projection": "linear",
    "is_reshape_temporal_channels": False, "use_cond_type_embedding": True,
}  # fmt: skip
"""What every published configuration says alike; anything else would be another network."""
_READ = {
    "in_channels", "out_channels", "hidden_size", "heads_num", "mlp_width_ratio", "mm_double_blocks_depth",
    "rope_dim_list", "rope_theta", "text_states_dim", "vision_states_dim",
}  # fmt: skip
_IDLE = {"attn_mode", "attn_param", "ideal_resolution", "ideal_task"}
"""Entries that change nothing in the network."""


@dataclass(frozen=True)
class HYConfig:
    """Every number that fixes the network; the defaults are the published 8B model's."""

    channels: int = 32
    """Channels of a latent."""
    width: int = 2048
    """Channels of a token."""
    heads: int = 16
    depth: int = 54
    """Double-stream blocks."""
    hidden: int = 8192
    """Channels inside the MLPs."""
    rope: tuple[int, int, int] = (16, 56, 56)
    """Channels of a head that turn with latent, row and column; all of a head's together."""
    theta: float = 256.0
    """Base of the rotary frequencies."""
    text: int = 3584
    """Channels of the language model's states."""
    glyphs: int = 1472
    """Channels of ByT5's states."""
    vision: int = 1152
    """Channels of SigLIP's states."""

    def __post_init__(self) -> None:
        for name in ("channels", "width", "heads", "depth", "hidden", "text", "glyphs", "vision"):
            integer_from(name, getattr(self, name), 1)
        number_in("theta", self.theta, 0, math.inf, open_low=True)
        check_heads(self.width, self.heads)
        whole = isinstance(self.rope, tuple) and all(isinstance(n, int) and n >= 0 and n % 2 == 0 for n in self.rope)
        if not whole or len(self.rope) != 3 or sum(self.rope) != self.head_dim:
            raise InputError(
                f"rope must be three even numbers of channels that add up to {self.head_dim} a head, got {self.rope!r}"
            )

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.width // self.heads

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> HYConfig:
        """From the entries of a published `config.json`; `InputError` on what this network cannot be."""
        entries = known_entries(values, "HY-WorldPlay", _FIXED, _READ, _IDLE)
        channels = latent_channels(entries)
        width, ratio, rope = (entries[name] for name in ("hidden_size", "mlp_width_ratio", "rope_dim_list"))
        integer_from("hidden_size", width, 1)
        number_in("mlp_width_ratio", ratio, 0, math.inf, open_low=True)
        return cls(
            channels=channels, width=width, heads=entries["heads_num"], depth=entries["mm_double_blocks_depth"],
            hidden=int(width * ratio), rope=tuple(rope) if isinstance(rope, list) else rope,
            theta=entries["rope_theta"], text=entries["text_states_dim"], vision=entries["vision_states_dim"],
        )  # fmt: skip


def known_entries(
    values: Mapping[str, Any], network: str, fixed: Mapping[str, object], read: Set[str], idle: Set[str]
) -> dict[str, Any]:
    """Entries of a `config.json`, all of `read` among them; `InputError` on what `network` cannot be."""
    entries = {k: v for k, v in values.items() if not k.startswith("_")}
    known = sorted(fixed.keys() | read | idle)
    for name, value in entries.items():
        if name in fixed and value != fixed[name]:
            raise InputError(f"{name} must be {fixed[name]!r} for {network}, got {value!r}")
        if name not in known:
            raise InputError(f"unknown entry {name!r} in the configuration{did_you_mean(name, known)}")
    if missing := sorted(read - entries.keys()):
        raise InputError(f"the configuration lacks {', '.join(missing)}")
    return entries


def latent_channels(entries: Mapping[str, Any]) -> Any:
    """Channels of a latent, as an entry tells them; `InputError` where others come out than go in."""
    into, out = entries["in_channels"], entries["out_channels"]
    if into != out:
        raise InputError(f"in_channels and out_channels must be equal, got {into} and {out}")
    return into


def check_heads(width: int, heads: int) -> None:
    """Raise `InputError` unless heads share a width in parts that 4 divides."""
    if width % heads or width // heads % 4:
        raise InputError(f"heads must share the width in parts that 4 divides, got {width} for {heads} heads")
