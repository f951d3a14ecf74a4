"""Controls: held keys and mouse travel of a frame, and the camera motion they ask for."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from worldstride.errors import InputError

_KEY_GROUPS: dict[str, tuple[str, ...]] = {
    "KeyA-KeyZ": tuple(f"Key{chr(c)}" for c in range(ord("A"), ord("Z") + 1)),
    "Digit0-Digit9": tuple(f"Digit{i}" for i in range(10)),
    "Numpad0-Numpad9": tuple(f"Numpad{i}" for i in range(10)),
    "F1-F12": tuple(f"F{i}" for i in range(1, 13)),
    "Arrow(Up|Down|Left|Right)": ("ArrowUp", "ArrowDown", "ArrowLeft", "ArrowRight"),
    "(Shift|Control|Alt|Meta)(Left|Right)": tuple(
        f"{key}{side}" for key in ("Shift", "Control", "Alt", "Meta") for side in ("Left", "Right")
    ),
    "Numpad(Add|Subtract|Multiply|Divide|Decimal|Enter)": tuple(
        f"Numpad{key}" for key in ("Add", "Subtract", "Multiply", "Divide", "Decimal", "Enter")
    ),
}
# fmt: off
_SINGLE_KEYS = (
    "Space", "Enter", "Tab", "Escape", "Backspace", "CapsLock", "NumLock", "ScrollLock", "Insert", "Delete",
    "Home", "End", "PageUp", "PageDown", "Backquote", "Minus", "Equal", "BracketLeft", "BracketRight",
    "Backslash", "IntlBackslash", "Semicolon", "Quote", "Comma", "Period", "Slash", "ContextMenu", "Pause",
    "PrintScreen",
)
# fmt: on

KNOWN_KEYS: frozenset[str] = frozenset(_SINGLE_KEYS).union(*_KEY_GROUPS.values())
"""Every accepted key: the W3C `KeyboardEvent.code` names of a standard keyboard."""

_KNOWN_TEXT = ", ".join([*_KEY_GROUPS, *_SINGLE_KEYS])


def _check_keys(keys: object, name: str) -> frozenset[str]:
    if isinstance(keys, str) or not isinstance(keys, Iterable):
        raise InputError(f"{name} must be a collection of key codes such as {{'KeyW'}}, got {keys!r}")
    codes = list(keys)
    for code in codes:
        if not isinstance(code, str) or code not in KNOWN_KEYS:
            hint = _suggestion(code)
            raise InputError(f"unknown key code {code!r} in {name}{hint}; known codes: {_KNOWN_TEXT}")
    return frozenset(codes)


def _suggestion(code: object) -> str:
    if not isinstance(code, str):
        return " (a code is a text)"
    word = code.capitalize()
    for guess in (f"Key{word}", f"Digit{word}", f"Arrow{word}", f"{word}Left", word):
        if guess in KNOWN_KEYS:
            return f" (did you mean {guess!r}?)"
    return ""


def _finite(value: object, name: str) -> float:
    if isinstance(value, bool | str) or not hasattr(value, "__float__"):
        raise InputError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)  # pyright: ignore[reportArgumentType]
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InputError(f"{name} must be a finite number, got {value!r}")
    return number


@dataclass(frozen=True)
class Action:
    """What a player does during one frame (or chunk). `InputError` on unknown keys or bad mouse values."""

    keys: Set[str] = frozenset()
    """Held keys as W3C `KeyboardEvent.code` names ("KeyW", "ArrowLeft"); any iterable of text is accepted."""
    mouse: tuple[float, float] = (0.0, 0.0)
    """Mouse travel in pixels: (dx to the right, dy downwards)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", _check_keys(self.keys, "keys"))
        mouse: object = self.mouse
        if not isinstance(mouse, Collection) or isinstance(mouse, str | Mapping) or len(mouse) != 2:
            raise InputError(f"mouse must be two numbers (dx, dy) in pixels, got {mouse!r}")
        dx, dy = mouse
        object.__setattr__(self, "mouse", (_finite(dx, "mouse dx"), _finite(dy, "mouse dy")))

    def to_json(self) -> dict[str, list[str] | list[float]]:
        """The action as JSON data: {"keys": sorted codes, "mouse": [dx, dy]}."""
        return {"keys": sorted(self.keys), "mouse": list(self.mouse)}

    @classmethod
    def from_json(cls, data: object) -> Action:
        """The action of `to_json`; both entries are optional. Raises `InputError` on anything else."""
        if not isinstance(data, Mapping):
            raise InputError(f'an action must be an object such as {{"keys": ["KeyW"]}}, got {data!r}')
        if foreign := set(data) - {"keys", "mouse"}:
            raise InputError(f"an action has the entries 'keys' and 'mouse', not {sorted(map(str, foreign))}")
        return cls(data.get("keys", frozenset()), data.get("mouse", (0.0, 0.0)))


@dataclass(frozen=True)
class Motion:
    """Motion of the camera during one frame, in its own axes."""

    forward: float
    """Metres along the viewing direction; negative goes back."""
    strafe: float
    """Metres to the right; negative goes left."""
    turn: float
    """Radians; positive turns right."""
    pitch: float
    """Radians; positive looks up."""


@dataclass(frozen=True)
class ControlSettings:
    """How keys and mouse become motion. `InputError` on negative or infinite rates and on unknown keys."""

    speed: float = 0.11
    """Metres walked in one frame. Match the model's training walks; larger steps leave its experience."""
    turn: float = 0.12
    """Radians turned in one frame while a turn key is held."""
    pitch: float = 0.06
    """Radians looked up or down in one frame while a pitch key is held."""
    mouse: float = 0.0025
    """Radians of turn and pitch per pixel of mouse travel. Raise it for a livelier mouse."""
    forward_keys: tuple[str, ...] = ("KeyW",)
    """Keys that walk forward."""
    backward_keys: tuple[str, ...] = ("KeyS",)
    """Keys that walk back."""
    left_keys: tuple[str, ...] = ("KeyA",)
    """Keys that step to the left."""
    right_keys: tuple[str, ...] = ("KeyD",)
    """Keys that step to the right."""
    turn_left_keys: tuple[str, ...] = ("ArrowLeft", "KeyQ")
    """Keys that turn left."""
    turn_right_keys: tuple[str, ...] = ("ArrowRight", "KeyE")
    """Keys that turn right."""
    look_up_keys: tuple[str, ...] = ("ArrowUp",)
    """Keys that look up."""
    look_down_keys: tuple[str, ...] = ("ArrowDown",)
    """Keys that look down."""

    def __post_init__(self) -> None:
        for name in ("speed", "turn", "pitch", "mouse"):
            if _finite(getattr(self, name), name) < 0:
                raise InputError(f"{name} must not be negative, got {getattr(self, name)!r}")
        for name in self.__dataclass_fields__:
            if name.endswith("_keys"):
                _check_keys(getattr(self, name), name)


def motion(action: Action, settings: ControlSettings) -> Motion:
    """Camera motion of one frame in metres and radians.

    Opposite keys cancel, diagonal steps are as long as straight ones, the mouse adds to the turn keys.
    """

    def axis(positive: tuple[str, ...], negative: tuple[str, ...]) -> int:
        return (not action.keys.isdisjoint(positive)) - (not action.keys.isdisjoint(negative))

    forward = axis(settings.forward_keys, settings.backward_keys)
    strafe = axis(settings.right_keys, settings.left_keys)
    step = settings.speed / max(1.0, math.hypot(forward, strafe))
    turn = axis(settings.turn_right_keys, settings.turn_left_keys) * settings.turn
    pitch = axis(settings.look_up_keys, settings.look_down_keys) * settings.pitch
    dx, dy = action.mouse
    return Motion(forward * step, strafe * step, turn + dx * settings.mouse, pitch - dy * settings.mouse)


def actions_per_frame(actions: Action | Sequence[Action], frames: int) -> tuple[Action, ...]:
    """One action for each of `frames` frames.

    A single action is held throughout and its mouse travel is spread evenly; a sequence must hold exactly
    `frames` actions, else `InputError`.
    """
    if frames < 1:
        raise InputError(f"frames must be at least 1, got {frames}")
    if isinstance(actions, Action):
        dx, dy = actions.mouse
        return (Action(actions.keys, (dx / frames, dy / frames)),) * frames
    if not isinstance(actions, Sequence) or not all(isinstance(a, Action) for a in actions):
        raise InputError(f"actions must be one Action or a sequence of {frames} Actions, got {actions!r}")
    if len(actions) != frames:
        raise InputError(f"{frames} frames need one action or {frames} of them, got {len(actions)}")
    return tuple(actions)
