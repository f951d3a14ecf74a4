"""HY-WorldPlay's pose strings, pose files, intrinsics and action labels: against the golden rollout and by hand."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from hy_golden import GOLDEN
from worldstride.errors import InputError
from worldstride.models.hy_worldplay.labels import labels
from worldstride.models.hy_worldplay.poses import intrinsics, motion, parse_poses
from worldstride.trajectory import load_trajectory

IDENTITY = torch.eye(4, dtype=torch.float64)
MOVES = ["w", "s", "a", "d", "up", "down", "left", "right"]


def golden(name: str) -> Tensor:
    with safe_open(GOLDEN, "pt") as file:
        return file.get_tensor(name)


def test_golden_poses():
    with safe_open(GOLDEN, "pt") as file:
        poses = parse_poses(file.metadata()["pose"])
    seen = torch.linalg.inv(poses.cameras)
    assert poses.cameras.dtype == torch.float64 and poses.cameras.shape == (40, 4, 4)
    torch.testing.assert_close(seen[None], golden("in_out/viewmats"), rtol=0, atol=1e-14)
    torch.testing.assert_close(poses.intrinsics.expand(1, 40, 3, 3), golden("in_out/Ks"), rtol=0, atol=1e-15)


def test_golden_labels():
    cameras = torch.linalg.inv(golden("in_out/viewmats")[0])
    expected = golden("in_out/action")[0]
    assert torch.equal(labels(cameras), expected)
    assert torch.equal(labels(cameras.float()), expected)


def test_labels_go_on_where_they_stopped():
    cameras = parse_poses("w-5,right-3,a-4").cameras
    whole = labels(cameras)
    pieces = [labels(cameras[:4]), labels(cameras[4:7], cameras[3]), labels(cameras[7:], cameras[6])]
    assert torch.equal(torch.cat(pieces), whole) and whole.dtype == torch.int64
    assert int(labels(cameras[4:7])[0]) == 0
    assert labels(cameras[:0]).shape == (0,)


TRANSLATIONS = {"": 0, "w": 1, "s": 2, "d": 3, "a": 4, "w d": 5, "w a": 6, "s d": 7, "s a": 8}
ROTATIONS = {
    "": 0,
    "right": 1,
    "left": 2,
    "up": 3,
    "down": 4,
    "right up": 5,
    "right down": 6,
    "left up": 7,
    "left down": 8,
}


@pytest.mark.parametrize(("walk", "turn"), list(itertools.product(TRANSLATIONS, ROTATIONS)))
def test_label_of_all_81_motions(walk: str, turn: str):
    start = motion(["left", "up"]) @ motion(["a", "w"])  # any camera will do
    step = motion([*walk.split(), *turn.split()])
    found = labels(torch.stack([start, start @ step]))
    assert found.tolist() == [0, 9 * TRANSLATIONS[walk] + ROTATIONS[turn]]


def moved(x: float = 0.0, y: float = 0.0, z: float = 0.0, yaw: float = 0.0, pitch: float = 0.0) -> int:
    """Label of a motion in the camera's own axes; degrees."""
    out = IDENTITY.clone()
    out[:3, 3] = torch.tensor([x, y, z])
    cos, sin = math.cos(math.radians(yaw)), math.sin(math.radians(yaw))
    turn = torch.tensor([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]], dtype=torch.float64)
    cos, sin = math.cos(math.radians(pitch)), math.sin(math.radians(pitch))
    out[:3, :3] = turn @ torch.tensor([[1, 0, 0], [0, cos, -sin], [0, sin, cos]], dtype=torch.float64)
    return int(labels(out[None], IDENTITY)[0])


def test_thresholds_of_labels():
    assert [moved(z=1.01e-4), moved(z=0.99e-4), moved(z=-1.01e-4)] == [9, 0, 18]
    assert [moved(yaw=0.051), moved(yaw=0.049), moved(yaw=-0.051), moved(yaw=-0.049)] == [1, 0, 2, 0]
    assert [moved(pitch=0.051), moved(pitch=0.049), moved(pitch=-0.051), moved(pitch=-0.049)] == [3, 0, 4, 0]
    assert moved(y=1.0) == moved(y=-1.0) == 0  # up and down are at right angles to both axes

    def along(angle: float) -> int:
        return moved(x=math.sin(math.radians(angle)), z=math.cos(math.radians(angle))) // 9

    # degrees from straight on; right begins above 30, forward ends below 60
    assert [along(a) for a in (0, 29, 31, 59, 61, 90)] == [1, 1, 5, 5, 3, 3]
    assert [along(a) for a in (119, 121, 149, 151, 180)] == [3, 7, 7, 2, 2]
    assert [along(-a) for a in (29, 31, 59, 61, 90, 119, 121, 149, 151)] == [1, 6, 6, 4, 4, 4, 8, 8, 2]


def test_labels_of_wrong_cameras():
    with pytest.raises(InputError, match=r"cameras must have shape \[frames, 4, 4\], got \[4, 4\]"):
        labels(IDENTITY)
    with pytest.raises(InputError, match=r"before\[0\] is no rigid"):
        labels(IDENTITY[None], 2 * IDENTITY)


def test_moves_of_a_string():
    poses = parse_poses("w-31")
    assert poses.cameras.shape == (32, 4, 4) and torch.equal(poses.cameras[0], IDENTITY)
    assert float(poses.cameras[31, 2, 3]) == pytest.approx(2.48)
    ends = {name: parse_poses(f"{name}-10").cameras[-1] for name in MOVES}
    places = {"w": (0, 0, 0.8), "s": (0, 0, -0.8), "a": (-0.8, 0, 0), "d": (0.8, 0, 0)}
    for name, end in ends.items():
        assert end[:3, 3].tolist() == pytest.approx(places.get(name, (0, 0, 0)))
    forward = {name: tuple(round(v, 6) for v in ends[name][:3, 2].tolist()) for name in MOVES[4:]}
    half, much = 0.5, round(math.sqrt(3) / 2, 6)  # 30 degrees; y points down
    assert forward == {
        "up": (0, -half, much),
        "down": (0, half, much),
        "left": (-half, 0, much),
        "right": (half, 0, much),
    }


def test_moves_follow_the_camera():
    end = parse_poses("right-30,w-10").cameras[-1]
    assert end[:3, 3].tolist() == pytest.approx([0.8, 0, 0])
    end = parse_poses("up-10,right-30").cameras[-1]  # about the camera's own upright, which leans
    assert end[:3, 2].tolist() == pytest.approx([1, 0, 0])
    assert end[:3, 1].tolist() == pytest.approx(parse_poses("up-10").cameras[-1][:3, 1].tolist())


def test_turn_comes_before_step():
    step = motion(["w", "right"])
    assert step[:3, 3].tolist() == pytest.approx(
        [0.08 * math.sin(math.radians(3)), 0, 0.08 * math.cos(math.radians(3))]
    )
    assert torch.equal(motion([]), IDENTITY) and torch.equal(motion(["w", "s", "up", "down"]), IDENTITY)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(MOVES), st.integers(1, 40)), min_size=1, max_size=5))
def test_strings_are_their_moves_one_by_one(moves: list[tuple[str, int]]):
    camera, path = IDENTITY, [IDENTITY]
    for name, count in moves:
        for _ in range(count):
            camera = camera @ motion([name])
            path.append(camera)
    poses = parse_poses(",".join(f"{name}-{count}" for name, count in moves))
    torch.testing.assert_close(poses.cameras, torch.stack(path), rtol=0, atol=1e-12)


def test_case_and_blanks_are_free():
    assert torch.equal(parse_poses(" W - 3 , Right-02").cameras, parse_poses("w-3,right-2").cameras)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("w-3,forward-2", "move 2: 'forward-2' is not a move .w, s, a, d, up, down, left, right.*number of latents"),
        ("rigth-3", "move 1: 'rigth-3'.*did you mean 'right'"),
        ("w+right-8", r"move 1: 'w\+right-8' is not a move"),
        ("w", "move 1: 'w' is not a move.*such as 'w-12'"),
        ("w-3,", "move 2: '' is not a move"),
        ("", "move 1: ''"),
        ("12-w", "move 1: '12-w'"),
        ("w-0", "move 1: 'w-0': the number of latents must be a whole number from 1 to 99999"),
        ("w--3", "'w--3': the number of latents"),
        ("w-1.5", "'w-1.5': the number of latents"),
        ("w-", "'w-': the number of latents"),
        ("s-3,w-99997", "move 2: 'w-99997': the number of latents must be a whole number from 1 to 99996"),
    ],
)
def test_wrong_strings_are_told(text: str, told: str):
    with pytest.raises(InputError, match=told):
        parse_poses(text)


def test_unknown_move():
    with pytest.raises(InputError, match="unknown move 'jump'; known: w, s"):
        motion(["w", "jump"])


def test_published_intrinsics():
    torch.testing.assert_close(intrinsics(), golden("in_out/Ks")[0, 0], rtol=0, atol=1e-15)
    found = intrinsics(969.697, 969.697, 960.0, 540.0)
    assert found[0, 0] == 969.697 / 1920 and found[1, 1] == 969.697 / 1080
    with pytest.raises(InputError, match=r"fx must be a positive number of pixels, got -1\.0"):
        intrinsics(fx=-1.0)


def test_published_pose_files_are_trajectories(tmp_path: Path):
    poses, pixels = parse_poses("w-3,up-2,right-5"), [[969.697, 0, 960.0], [0, 969.697, 540.0], [0, 0, 1]]
    file = tmp_path / "pose.json"
    entries = {str(i): {"extrinsic": camera.tolist(), "K": pixels} for i, camera in enumerate(poses.cameras)}
    file.write_text(json.dumps(dict(sorted(entries.items()))))  # "0", "1", "10", "2", ...
    found = load_trajectory(file)
    assert found.cameras is not None and found.intrinsics is not None
    torch.testing.assert_close(found.cameras, poses.cameras.float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.intrinsics, golden("in_out/Ks")[0, :1].float().expand(11, 3, 3), rtol=0, atol=1e-6)
