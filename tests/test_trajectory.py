import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from worldstride.camera import camera_from_pose, convert, intrinsics_from_fov, invert
from worldstride.control import Action
from worldstride.errors import InputError, TrajectoryError
from worldstride.trajectory import (
    Trajectory,
    format_trajectory,
    load_trajectory,
    parse_trajectory,
    save_trajectory,
)

W, RIGHT, IDLE = Action(frozenset({"KeyW"})), Action(frozenset({"ArrowRight"})), Action()
K = intrinsics_from_fov(1.2, 16 / 9)
PIXELS = [[969.0, 0.0, 960.0], [0.0, 968.0, 540.0], [0.0, 0.0, 1.0]]
FROM_PIXELS = torch.tensor([[969 / 1920, 0, 0.5], [0, 968 / 1080, 0.5], [0, 0, 1]])


def walk(frames: int = 5) -> Tensor:
    """Cameras [F, 4, 4] of a walk that turns."""
    t = torch.linspace(0, 1, frames)
    return camera_from_pose(torch.stack([t, 2 * t, t.sin(), 0.1 * t], -1))


def dump(path: Path, data: object) -> Path:
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def test_parse_moves():
    assert parse_trajectory("w-2,right-1").actions == (W, W, RIGHT)
    both = Action(frozenset({"KeyW", "ArrowRight"}))
    assert parse_trajectory("  W + Right - 02 ,\twait-1, NONE-1\n").actions == (both, both, IDLE, IDLE)
    assert len(parse_trajectory("w-12,right-12,left-12,s-3")) == 39
    assert parse_trajectory("up-1,down-1,a-1,d-1,s-1,left-1").actions == tuple(
        Action(frozenset({k})) for k in ("ArrowUp", "ArrowDown", "KeyA", "KeyD", "KeyS", "ArrowLeft")
    )


@pytest.mark.parametrize(
    ("text", "position", "words"),
    [
        ("", 0, "found the end, expected a move"),
        ("   ", 3, "found the end"),
        ("w", 1, "found the end, expected '-'"),
        ("w-", 2, "found the end, expected a number"),
        ("w-12,", 5, "found the end, expected a move"),
        ("w-12,jump-3", 5, "found 'jump', expected a move (w, s,"),
        ("w-12 right-3", 5, "found 'right', expected ','"),
        ("w-0", 2, "found '0', expected a number of latents, at least 1"),
        ("w--3", 2, "found '-', expected a number"),
        ("w-1.5", 3, "found '.', expected ','"),
        ("w-99999999999999999999", 2, "expected a number of latents"),
        ("w-600000,w-600000", 11, "1000000 in all"),
        ("w+-3", 2, "found '-', expected a move"),
        ("w+wait-3", 2, "found 'wait', expected moves that can be joined"),
        ("wait+w-3", 5, "stand alone"),
        ("12", 0, "found '12', expected a move"),
        ("w-٣", 2, "found '٣'"),
        ("İ-3", 0, "found 'İ'"),
    ],
)
def test_errors_mark_the_place(text: str, position: int, words: str):
    with pytest.raises(TrajectoryError) as caught:
        parse_trajectory(text)
    first, line, mark = str(caught.value).split("\n")
    assert words in first
    assert f"character {position + 1}:" in first
    assert line == f"  {text}"
    assert mark == f"  {' ' * position}^"


def test_the_mark_of_a_long_text_stays_on_the_screen():
    with pytest.raises(TrajectoryError) as caught:
        parse_trajectory("w-1,\n" * 300 + "x-1")
    _, line, mark = str(caught.value).split("\n")
    assert len(line) < 90
    assert line[len(mark) - 1] == "x"


names = st.sampled_from(["w", "s", "a", "d", "left", "right", "up", "down"])
moves = st.tuples(st.sets(names, max_size=4), st.integers(1, 30))


@given(st.lists(moves, min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_string_round_trip(parts: list[tuple[set[str], int]]):
    text = ",".join(f"{'+'.join(sorted(keys)) or 'none'}-{count}" for keys, count in parts)
    trajectory = parse_trajectory(text)
    assert parse_trajectory(format_trajectory(trajectory)) == trajectory


@given(st.text(alphabet="wsadleftrigh upon+-,0123x", max_size=20))
@settings(max_examples=60, deadline=None)
def test_any_text_parses_or_says_why(text: str):
    try:
        assert len(parse_trajectory(text)) >= 1
    except TrajectoryError as error:
        assert "^" in str(error)


def test_format_is_short_and_refuses_what_it_cannot_say():
    assert format_trajectory(parse_trajectory("w-2,w-3,right+w-1,none-4")) == "w-5,w+right-1,wait-4"
    for action in (Action(frozenset({"ShiftLeft"})), Action(frozenset(), (1, 0))):
        with pytest.raises(TrajectoryError, match="frame 1 holds"):
            format_trajectory(Trajectory((W, action)))
    with pytest.raises(TrajectoryError, match="cameras"):
        format_trajectory(Trajectory(cameras=walk()))


def test_chunks():
    trajectory = parse_trajectory("w-3,right-2")
    assert [c.actions for c in trajectory.chunks(2)] == [(W, W), (W, RIGHT), (RIGHT,)]
    assert [c.actions for c in trajectory.chunks(2, pad=True)][-1] == (RIGHT, IDLE)
    cameras = Trajectory.from_cameras(walk(5), K)
    parts = list(cameras.chunks(2, pad=True))
    assert [len(p) for p in parts] == [2, 2, 2]
    joined = torch.cat([p.cameras for p in parts])  # pyright: ignore
    torch.testing.assert_close(joined, torch.cat([walk(5), walk(5)[-1:]]))
    assert parts[-1].intrinsics.shape == (2, 3, 3)  # pyright: ignore
    with pytest.raises(InputError, match="at least 1"):
        next(trajectory.chunks(0))


def test_a_trajectory_is_checked():
    with pytest.raises(InputError, match="exactly one"):
        Trajectory()
    with pytest.raises(InputError, match="exactly one"):
        Trajectory((W,), walk())
    with pytest.raises(InputError, match="1 to"):
        Trajectory(())
    with pytest.raises(InputError, match=r"actions\[1\]"):
        Trajectory((W, "KeyW"))  # pyright: ignore
    with pytest.raises(InputError, match="intrinsics"):
        Trajectory((W,), intrinsics=K)
    with pytest.raises(InputError, match=r"intrinsics\[0\].*pixels"):
        Trajectory(cameras=walk(), intrinsics=torch.tensor(PIXELS))
    with pytest.raises(InputError, match="intrinsics must be"):
        Trajectory(cameras=walk(5), intrinsics=K.expand(4, 3, 3))


@pytest.mark.parametrize("convention", ["opencv", "opengl", "unreal"])
def test_json_cameras_of_each_convention(tmp_path: Path, convention: str):
    theirs = convert(walk(), "opencv", convention)  # pyright: ignore
    data = {"cameras": theirs.tolist(), "convention": convention, "intrinsics": PIXELS}
    loaded = load_trajectory(dump(tmp_path / "a.json", data))
    torch.testing.assert_close(loaded.cameras, walk())
    torch.testing.assert_close(loaded.intrinsics, FROM_PIXELS.expand(5, 3, 3))


def test_json_actions(tmp_path: Path):
    data = [{"keys": ["KeyW"], "frames": 2}, {"mouse": [3, -1]}, {"keys": ["KeyW", "ArrowRight"]}]
    path = dump(tmp_path / "a.json", data)
    wanted = (W, W, Action(frozenset(), (3, -1)), Action(frozenset({"KeyW", "ArrowRight"})))
    assert load_trajectory(path).actions == load_trajectory(str(path)).actions == wanted


def test_pose_dictionary(tmp_path: Path):
    def poses(cameras: Tensor) -> dict[str, object]:
        return {str(i): {"extrinsic": m.tolist(), "K": PIXELS} for i, m in enumerate(cameras)}

    path = dump(tmp_path / "a.json", poses(walk(12)))
    loaded = load_trajectory(path)
    torch.testing.assert_close(loaded.cameras, walk(12))
    torch.testing.assert_close(loaded.intrinsics, FROM_PIXELS.expand(12, 3, 3))
    dump(path, poses(invert(walk(12))))
    torch.testing.assert_close(load_trajectory(path, extrinsic="world_to_camera").cameras, walk(12))
    dump(path, {**poses(invert(walk(12))), "extrinsic_type": "world_to_camera", "width": 1000, "height": 500})
    loaded = load_trajectory(path)
    torch.testing.assert_close(loaded.cameras, walk(12))
    assert loaded.intrinsics[0, 0, 0] == pytest.approx(0.969)  # pyright: ignore
    assert loaded.intrinsics[3, 1, 2] == pytest.approx(1.08)  # pyright: ignore


@pytest.mark.parametrize("shape", ["[3, 3]", "[F, 3, 3]", "[4]", "[F, 4]"])
@pytest.mark.parametrize("pixels", [True, False])
def test_numpy_folder(tmp_path: Path, shape: str, pixels: bool):
    matrix = np.array(PIXELS) if pixels else FROM_PIXELS.numpy()
    values = matrix if "3" in shape else matrix[[0, 1, 0, 1], [0, 1, 2, 2]]
    values = np.broadcast_to(values, (5, *values.shape)) if "F" in shape else values
    np.save(tmp_path / "poses.npy", walk().numpy())
    np.save(tmp_path / "intrinsics.npy", values)
    loaded = load_trajectory(str(tmp_path))
    torch.testing.assert_close(loaded.cameras, walk())
    torch.testing.assert_close(loaded.intrinsics, FROM_PIXELS.expand(5, 3, 3))
    alone = load_trajectory(tmp_path / "poses.npy")
    assert alone.intrinsics is None
    assert len(alone) == 5


def test_save_and_load(tmp_path: Path):
    actions = Trajectory((W, W, Action(frozenset({"ShiftLeft"}), (0.1, -7)), IDLE))
    tele = Trajectory.from_cameras(walk(), intrinsics_from_fov(0.05))  # fx above 4, yet not pixels
    for trajectory in (actions, Trajectory.from_cameras(walk()), tele):
        save_trajectory(trajectory, tmp_path / "a.json")
        assert load_trajectory(tmp_path / "a.json") == trajectory
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_strings_and_missing_files(tmp_path: Path):
    assert load_trajectory("w-1").actions == (W,)
    assert len(load_trajectory("w-1," * 5000 + "w-1")) == 5001
    for source in ("walk.json", str(tmp_path / "walk"), tmp_path / "w-1"):
        with pytest.raises(TrajectoryError, match="no file"):
            load_trajectory(source)
    (tmp_path / "a.txt").write_text("w-1")
    with pytest.raises(TrajectoryError, match=r"\.json or \.npy"):
        load_trajectory(tmp_path / "a.txt")
    with pytest.raises(TrajectoryError, match=r"poses\.npy"):
        load_trajectory(tmp_path)
    with pytest.raises(InputError, match="world_to_camera"):
        load_trajectory("w-1", extrinsic="c2w")  # pyright: ignore


EYE = torch.eye(4).tolist()
NAN = [[math.nan, 0, 0, 0], *EYE[1:]]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "expected a list of actions"),
        (3, "expected a list of actions"),
        ([], "1 to"),
        ([{"keys": ["KeyW"]}, {"keys": ["w"]}], "entry 1: unknown key code 'w'"),
        ([{"keys": ["KeyW"], "frames": 0}], "entry 0: frames"),
        ([{"frames": 10**12}], "entry 0: frames"),
        ([{"frames": 2.5}], "entry 0: frames"),
        ([["KeyW"]], "entry 0: an action"),
        ({"cameras": []}, "cameras"),
        ({"cameras": [EYE, NAN]}, r"cameras\[1\] holds NaN"),
        ({"cameras": [EYE, EYE[:3]]}, r"cameras\[1\] must be numbers of shape \[4, 4\]"),
        ({"cameras": [EYE, [[1, 2], [3]]]}, r"cameras\[1\] has rows"),
        ({"cameras": [EYE, [["x"] * 4] * 4]}, r"cameras\[1\] must be numbers"),
        ({"cameras": [EYE, [[2, 0, 0, 0], *EYE[1:]]]}, r"cameras\[1\] is no rigid"),
        ({"cameras": [EYE], "convention": "maya"}, "maya.*opencv"),
        ({"cameras": [EYE], "convention": []}, "convention"),
        ({"cameras": [EYE], "intrinsics": [1, 2, 3]}, "shapes"),
        ({"cameras": [EYE], "intrinsics": [1, math.nan, 0.5, 0.5]}, r"intrinsics\[0\] holds NaN"),
        ({"cameras": [EYE], "intrinsics": [0, 1, 0.5, 0.5]}, r"intrinsics\[0\] is no normalised"),
        ({"cameras": [EYE], "intrinsics": [900, 900, 0, 0]}, "cx > 0"),
        ({"cameras": [EYE], "intrinsics": [1, 1, 0.5, 0.5], "units": "mm"}, "units"),
        ({"0": {"extrinsic": EYE, "K": PIXELS}, "2": {"extrinsic": EYE, "K": PIXELS}}, "frame 1 of 2"),
        ({"0": {"extrinsic": EYE}}, "frame 0"),
        (
            {"0": {"extrinsic": EYE, "K": PIXELS}, "1": {"extrinsic": NAN, "K": PIXELS}},
            r"extrinsic\[1\] holds NaN",
        ),
        ({"0": {"extrinsic": EYE, "K": [[1]]}}, "frame 0: K"),
        ({"0": {"extrinsic": EYE, "K": PIXELS, "width": 0}}, "frame 0: width"),
        ({"0": {"extrinsic": EYE, "K": PIXELS}, "extrinsic_type": "w2c"}, "extrinsic_type"),
    ],
)
def test_bad_json(tmp_path: Path, data: object, words: str):
    with pytest.raises(TrajectoryError, match=words):
        load_trajectory(dump(tmp_path / "a.json", data))


@pytest.mark.parametrize("raw", [b"", b"[1,", b"\xff\xfe", b"[" * 100000])
def test_files_that_are_no_json(tmp_path: Path, raw: bytes):
    (tmp_path / "a.json").write_bytes(raw)
    with pytest.raises(TrajectoryError, match=r"a\.json"):
        load_trajectory(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.eye(4), "shape"),
        (np.zeros((2, 3, 4)), "shape"),
        (np.array([EYE, NAN]), r"cameras\[1\] holds NaN"),
        (np.array([{"a": 1}]), "plain"),
        (np.array([["a"]]), "numbers"),
        (np.zeros((0, 4, 4)), "1 to"),
    ],
)
def test_bad_arrays(tmp_path: Path, array: np.ndarray, words: str):
    np.save(tmp_path / "poses.npy", array, allow_pickle=True)
    for source in (tmp_path, tmp_path / "poses.npy"):
        with pytest.raises(TrajectoryError, match=words):
            load_trajectory(source)
    (tmp_path / "poses.npy").write_bytes(b"")
    with pytest.raises(TrajectoryError, match=r"poses\.npy"):
        load_trajectory(tmp_path)
