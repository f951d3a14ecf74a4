"""Trajectories: what happens in every frame of a rollout, as actions or cameras; strings and files of them.

A string is a comma list of moves such as `w-12,w+right-8,wait-4`: names joined by `+`, then their latents.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from worldstride.atomic import atomic_write
from worldstride.camera import Convention, check_cameras, convert, invert
from worldstride.control import Action
from worldstride.errors import InputError, TrajectoryError

Extrinsic = Literal["world_to_camera", "camera_to_world"]
"""What the "extrinsic" matrices of a pose dictionary map."""

MAX_FRAMES = 1_000_000
"""Longest trajectory; a larger count is taken for a slip of the finger."""

_PIXELS = 4.0  # a normalised focal length above this sees less than 15 degrees: the numbers are pixels
_KEYS = {"w": "KeyW", "s": "KeyS", "a": "KeyA", "d": "KeyD"} | {
    name: f"Arrow{name.capitalize()}" for name in ("left", "right", "up", "down")
}
_IDLE = ("wait", "none")
_TOKEN = re.compile(r"[a-z]+|[0-9]+|\S")
_COUNT = re.compile(r"0*[0-9]{1,9}")


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Actions or cameras, one a frame. Raises `InputError` (naming the frame) on anything unusable."""

    actions: tuple[Action, ...] | None = None
    """One action a frame, or None for a trajectory of cameras."""
    cameras: Tensor | None = None
    """Camera-to-world matrices float32 [F, 4, 4], OpenCV axes, metres; or None beside actions."""
    intrinsics: Tensor | None = None
    """Normalised intrinsics float32 [F, 3, 3] beside `cameras`, or None; one [3, 3] holds for all frames."""

    def __post_init__(self) -> None:
        if (self.actions is None) == (self.cameras is None):
            raise InputError("a trajectory holds either actions or cameras; give exactly one of them")
        if self.actions is not None:
            object.__setattr__(self, "actions", tuple(self.actions))
            if bad := [i for i, action in enumerate(self.actions) if not isinstance(action, Action)]:
                raise InputError(f"actions[{bad[0]}] must be an Action, got {self.actions[bad[0]]!r}")
            if self.intrinsics is not None:
                raise InputError("intrinsics go with cameras; a trajectory of actions takes none")
        if self.cameras is not None:
            object.__setattr__(self, "cameras", check_cameras(self.cameras).detach().float())
            if self.intrinsics is not None:
                object.__setattr__(self, "intrinsics", _check_intrinsics(self.intrinsics, len(self.cameras)))
        if not 1 <= len(self) <= MAX_FRAMES:
            raise InputError(f"a trajectory has 1 to {MAX_FRAMES} frames, got {len(self)}")

    @classmethod
    def from_cameras(
        cls, cameras: Tensor, intrinsics: Tensor | None = None, convention: Convention = "opencv"
    ) -> Trajectory:
        """Trajectory of camera-to-world matrices [F, 4, 4] of any `convention`; intrinsics as above."""
        return cls(cameras=convert(check_cameras(cameras), convention), intrinsics=intrinsics)

    def chunks(self, frames: int, *, pad: bool = False) -> Iterator[Trajectory]:
        """Pieces of `frames` frames; `pad` fills up a short last one: idle actions, or the last camera."""
        if frames < 1:
            raise InputError(f"frames of a chunk must be at least 1, got {frames}")
        for start in range(0, len(self), frames):
            part = slice(start, start + frames)
            missing = max(0, start + frames - len(self)) if pad else 0
            if self.actions is not None:
                yield Trajectory(self.actions[part] + (Action(),) * missing)
                continue
            cameras, intrinsics = (
                None if t is None else torch.cat([t[part], t[-1:].expand(missing, -1, -1)])
                for t in (self.cameras, self.intrinsics)
            )
            yield Trajectory(cameras=cameras, intrinsics=intrinsics)

    def __len__(self) -> int:
        frames = self.cameras if self.actions is None else self.actions
        return 0 if frames is None else len(frames)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Trajectory):
            return NotImplemented
        pairs = [(self.cameras, other.cameras), (self.intrinsics, other.intrinsics)]
        same = (a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)
        return self.actions == other.actions and all(same)


def parse_trajectory(text: str) -> Trajectory:
    """Actions of a string such as `w-12,w+right-8,wait-4`; a count is a number of latents (one action each).

    Names: w, s, a, d, left, right, up, down, joined by `+`; wait or none idles. Case and blanks are free.
    Raises `TrajectoryError` whose text marks the place.
    """
    lower = text.translate({code: code + 32 for code in range(ord("A"), ord("Z") + 1)})  # as long as text
    tokens = [(match.group(), match.start()) for match in _TOKEN.finditer(lower)]
    stream = iter([*tokens, ("", len(text))])
    moves = f"a move ({', '.join([*_KEYS, *_IDLE])})"
    actions: list[Action] = []
    while True:
        held: list[str] = []
        joiner, after = "+", 0
        while joiner == "+":
            name, at = next(stream)
            if name not in _KEYS and name not in _IDLE:
                raise _marked(text, at, name, moves)
            held.append(name)
            if len(held) > 1 and not set(held).isdisjoint(_IDLE):
                raise _marked(text, at, name, "moves that can be joined; wait and none stand alone")
            joiner, after = next(stream)
        if joiner != "-":
            raise _marked(text, after, joiner, "'-' and a number of latents, or '+' and another move")
        count, at = next(stream)
        if not _COUNT.fullmatch(count) or not 1 <= int(count) <= MAX_FRAMES - len(actions):
            raise _marked(text, at, count, f"a number of latents, at least 1 and {MAX_FRAMES} in all")
        actions += [Action(frozenset(_KEYS[name] for name in held if name in _KEYS))] * int(count)
        comma, at = next(stream)
        if comma == "":
            return Trajectory(tuple(actions))
        if comma != ",":
            raise _marked(text, at, comma, "',' and another move, or the end")


def _marked(text: str, at: int, found: str, wanted: str) -> TrajectoryError:
    first = max(0, at - 50)  # a long text is shown around the mark only
    line = re.sub(r"\s", " ", text[first : at + 30])
    found = repr(found[:20]) if found else "the end"
    what = f"trajectory, character {at + 1}: found {found}, expected {wanted}"
    return TrajectoryError(f"{what}\n  {line}\n  {' ' * (at - first)}^")


def format_trajectory(trajectory: Trajectory) -> str:
    """The shortest string that `parse_trajectory` reads back as `trajectory`.

    Raises `TrajectoryError` for cameras, mouse travel and keys that strings have no name for.
    """
    if trajectory.actions is None:
        raise TrajectoryError("a trajectory of cameras has no string form; use save_trajectory")
    names = {code: name for name, code in _KEYS.items()}
    moves, frame = [], 0
    for action, run in itertools.groupby(trajectory.actions):
        count = len(list(run))
        if (foreign := action.keys - set(names)) or action.mouse != (0.0, 0.0):
            what = f"the key {min(foreign)!r}" if foreign else f"mouse travel {action.mouse}"
            raise TrajectoryError(f"frame {frame} holds {what}, which strings cannot say; use save_trajectory")
        held = [name for name, code in _KEYS.items() if code in action.keys]
        moves.append(f"{'+'.join(held) or _IDLE[0]}-{count}")
        frame += count
    return ",".join(moves)


def save_trajectory(trajectory: Trajectory, path: str | Path) -> None:
    """Write `trajectory` to a JSON file that `load_trajectory` reads back exactly; atomic."""
    data: Any
    if trajectory.actions is not None:
        runs = ((action, len(list(run))) for action, run in itertools.groupby(trajectory.actions))
        data = [action.to_json() | {"frames": count} for action, count in runs]
    else:
        cameras, intrinsics = trajectory.cameras, trajectory.intrinsics
        data = {"convention": "opencv", "cameras": None if cameras is None else cameras.tolist()}
        if intrinsics is not None:
            data |= {"units": "normalised", "intrinsics": intrinsics.tolist()}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(data), encoding="utf-8")


def load_trajectory(source: str | Path, *, extrinsic: Extrinsic = "camera_to_world") -> Trajectory:
    """Trajectory of a file, a folder or a string (see `parse_trajectory`); a `Path` is never a string.

    - `.json`, actions: `[{"keys": ["KeyW"], "mouse": [dx, dy], "frames": 12}, ...]`, every entry optional.
    - `.json`, cameras: `{"cameras": [4x4 camera-to-world, ...], "convention": "opencv" | "opengl" | "unreal",
      "intrinsics": ..., "units": "normalised" | "pixels"}`; only "cameras" is required.
    - `.json`, pose dictionary: `{"0": {"extrinsic": 4x4, "K": 3x3 in pixels}, "1": ...}` with OpenCV axes;
      optional "width" and "height" (default 2 cx and 2 cy). `extrinsic` says what the matrices map, an entry
      "extrinsic_type" in the file overrides it. HY-WorldPlay's own pose files are camera_to_world.
    - a folder with `poses.npy` [F, 4, 4] (camera-to-world, OpenCV) and optionally `intrinsics.npy`; or a
      `.npy` file of poses alone.

    Intrinsics are [3, 3], [F, 3, 3], or fx, fy, cx, cy as [4] or [F, 4]; without "units" they are pixels
    where fx > 4, and are then divided by 2 cx and 2 cy. Raises `TrajectoryError` saying what is wrong where.
    """
    if extrinsic not in get_args(Extrinsic):
        raise InputError(f"extrinsic must be one of {', '.join(get_args(Extrinsic))}, got {extrinsic!r}")
    if isinstance(source, str) and not _names_file(source):
        return parse_trajectory(source)
    path = Path(source)
    if not path.exists():
        raise TrajectoryError(f"no file {path}; give a .json or .npy file, a folder with poses.npy, or moves")
    try:
        if path.is_dir():
            beside = path / "intrinsics.npy"
            intrinsics = _load_array(beside) if beside.exists() else None
            return _from_arrays(_load_array(path / "poses.npy"), intrinsics)
        if path.suffix.lower() == ".npy":
            return _from_arrays(_load_array(path))
        if path.suffix.lower() == ".json":
            return _from_json(json.loads(path.read_text(encoding="utf-8")), extrinsic)
    except (OSError, ValueError, RecursionError) as error:  # ValueError: ours, or of JSON and text decoding
        raise TrajectoryError(f"cannot read the trajectory {path}: {error}") from error
    raise TrajectoryError(f"{path} cannot be read: a trajectory is a .json or .npy file or a folder with poses.npy")


def counts_latents(source: str | Path) -> bool:
    """Whether entries of what `load_trajectory` reads stand for latents, where a model's latents are several frames.

    Those of moves and of pose dictionaries do; those of other files stand for frames.
    """
    if isinstance(source, str) and not _names_file(source):
        return True
    path = Path(source)
    if path.suffix.lower() != ".json" or not path.is_file():
        return False
    data = json.loads(path.read_text(encoding="utf-8"))
    return isinstance(data, Mapping) and "cameras" not in data and "0" in data


def _names_file(source: str) -> bool:
    if source.lower().endswith((".json", ".npy")) or "/" in source or "\\" in source:
        return True
    try:
        return (Path(source) / "poses.npy").is_file()
    except OSError:  # moves can be longer than a file name may be
        return False


def _load_array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"{path.name} is no plain .npy array ({error})") from None
    return _numbers(array, path.name)


def _numbers(value: object, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """`value` as float64, of `shape` where one is given."""
    try:
        array = np.asarray(value)
    except ValueError:
        raise InputError(f"{name} has rows of different lengths") from None
    if array.dtype.kind not in "iuf" or (shape is not None and array.shape != shape):
        wanted = "" if shape is None else f" of shape {list(shape)}"
        raise InputError(f"{name} must be numbers{wanted}, got {array.dtype} of shape {list(array.shape)}")
    return array.astype(np.float64)


def _from_arrays(
    cameras: np.ndarray,
    intrinsics: np.ndarray | None = None,
    convention: str = "opencv",
    units: object = None,
) -> Trajectory:
    poses = check_cameras(torch.from_numpy(cameras))  # first, so that the number of frames is right
    matrices = None if intrinsics is None else _normalised(intrinsics, len(poses), units)
    return Trajectory.from_cameras(poses, matrices, cast(Convention, convention))


def _from_json(data: Any, extrinsic: Extrinsic) -> Trajectory:
    if isinstance(data, list):
        return _from_actions(data)
    if isinstance(data, Mapping) and "cameras" in data:
        if not isinstance(data["cameras"], list) or not data["cameras"]:
            raise InputError('"cameras" must be a list of 4x4 matrices')
        cameras = [_numbers(m, f"cameras[{i}]", (4, 4)) for i, m in enumerate(data["cameras"])]
        convention = str(data.get("convention", "opencv"))
        values = None if data.get("intrinsics") is None else _numbers(data["intrinsics"], "intrinsics")
        return _from_arrays(np.stack(cameras), values, convention, data.get("units"))
    if isinstance(data, Mapping) and "0" in data:
        return _from_pose_dictionary(data, data.get("extrinsic_type", extrinsic))
    raise InputError('expected a list of actions, an object with "cameras", or poses under "0", "1", ...')


def _from_actions(entries: list[Any]) -> Trajectory:
    actions: list[Action] = []
    for i, entry in enumerate(entries):
        count = entry.get("frames", 1) if isinstance(entry, Mapping) else 1
        room = MAX_FRAMES - len(actions)
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= room:
            raise InputError(f"entry {i}: frames must be a whole number from 1 to {room}, got {count!r}")
        bare = {k: v for k, v in entry.items() if k != "frames"} if isinstance(entry, Mapping) else entry
        try:
            actions += [Action.from_json(bare)] * count
        except InputError as error:
            raise InputError(f"entry {i}: {error}") from None
    return Trajectory(tuple(actions))


def _from_pose_dictionary(data: Mapping[str, Any], extrinsic: str) -> Trajectory:
    if extrinsic not in get_args(Extrinsic):
        raise InputError(f'"extrinsic_type" must be one of {get_args(Extrinsic)}, got {extrinsic!r}')
    frames = sum(key.isdecimal() for key in data)
    matrices, intrinsics = [], []
    for i in range(frames):
        entry = data.get(str(i))
        if not isinstance(entry, Mapping) or not {"extrinsic", "K"} <= set(entry):
            raise InputError(f'frame {i} of {frames}: expected an entry "{i}" with "extrinsic" and "K"')
        matrices.append(_numbers(entry["extrinsic"], f"frame {i}: extrinsic", (4, 4)))
        k = _numbers(entry["K"], f"frame {i}: K", (3, 3))
        for axis, side in enumerate(("width", "height")):
            length = entry.get(side, data.get(side, 2 * k[axis, 2]))
            if not isinstance(length, int | float) or not length > 0:
                raise InputError(f"frame {i}: {side} (or 2 c{'xy'[axis]}) must be positive, got {length!r}")
            k[axis] /= length
        intrinsics.append(k)
    cameras = check_cameras(torch.from_numpy(np.stack(matrices)), "extrinsic")
    if extrinsic == "world_to_camera":
        cameras = invert(cameras)
    return Trajectory.from_cameras(cameras, torch.from_numpy(np.stack(intrinsics)))


def _normalised(values: np.ndarray, frames: int, units: object) -> Tensor:
    """Intrinsics [3, 3], [F, 3, 3], [4] or [F, 4] as normalised matrices float64 [F, 3, 3]."""
    if units not in (None, "normalised", "pixels"):
        raise InputError(f'units must be "normalised" or "pixels", got {units!r}')
    known = ((4,), (frames, 4), (3, 3), (frames, 3, 3))
    if values.shape not in known:
        raise InputError(f"intrinsics must have one of the shapes {known}, got {values.shape}")
    if values.shape[-1] == 4:
        four, values = values, np.zeros((*values.shape[:-1], 3, 3))
        values[..., [0, 1, 0, 1], [0, 1, 2, 2]] = four
        values[..., 2, 2] = 1
    values = np.broadcast_to(values, (frames, 3, 3)).copy()
    if not np.isfinite(values).all():
        raise InputError(f"intrinsics[{np.argwhere(~np.isfinite(values))[0, 0]}] holds NaN or infinity")
    pixels = values[:, 0, 0] > _PIXELS if units is None else np.full(frames, units == "pixels")
    size = 2 * values[pixels, :2, 2:]
    if not (size > 0).all():
        raise InputError("intrinsics in pixels need cx > 0 and cy > 0, half the image's width and height")
    values[pixels, :2] /= size
    return torch.from_numpy(values)


def _check_intrinsics(intrinsics: Tensor, frames: int) -> Tensor:
    """Normalised pinhole matrices as float32 [F, 3, 3]."""
    if tuple(intrinsics.shape) not in ((3, 3), (frames, 3, 3)):
        raise InputError(f"intrinsics must be [3, 3] or [{frames}, 3, 3], got shape {list(intrinsics.shape)}")
    k = intrinsics.detach().float().expand(frames, 3, 3).clone()
    rest = torch.stack([k[:, 0, 1], k[:, 1, 0], k[:, 2, 0], k[:, 2, 1], k[:, 2, 2] - 1], -1)
    fine = k.isfinite().all(-1).all(-1) & (k[:, 0, 0] > 0) & (k[:, 1, 1] > 0) & (rest.abs() < 1e-4).all(-1)
    fine &= (k[:, :2, 2].abs() < _PIXELS).all(-1)
    if not bool(fine.all()):
        bad = int((~fine).nonzero()[0])
        raise InputError(
            f"intrinsics[{bad}] is no normalised pinhole [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] with "
            f"fx, fy > 0 and cx, cy about 0.5: got {k[bad].tolist()}; divide pixels by width and height"
        )
    return k
