"""Matrix-Game-3.0's controls, cameras and retrieval, from the specification."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mg3_golden import actions, case
from worldstride import Action, camera
from worldstride.errors import InputError
from worldstride.models.matrix_game3 import retrieval
from worldstride.models.matrix_game3.controls import CONTROLS, PITCH_LIMIT, Walker, guessed, numbers, walked
from worldstride.models.matrix_game3.rays import RayTable, interpolated, recalled, stepwise, told
from worldstride.models.matrix_game3.steering import grouped

W, S, A, D = (Action({key}) for key in ("KeyW", "KeyS", "KeyA", "KeyD"))


def pose(x: float = 0, z: float = 0, yaw: float = 0, pitch: float = 0) -> Tensor:
    """Metres and degrees."""
    return torch.tensor([x, z, math.radians(yaw), math.radians(pitch)], dtype=torch.float64)


def after(start: Tensor, keys: Sequence[float], mouse: Sequence[float]) -> list[float]:
    """Metres and degrees one frame on."""
    x, z, yaw, pitch = walked(start, torch.tensor([*keys, 0.0, 0.0]), torch.tensor(mouse)).tolist()
    return [x, z, math.degrees(yaw), math.degrees(pitch)]


STILL = (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("keys", "mouse", "expected"),
    [
        ((1, 0, 0, 0), (0, 0), (0, 0.1235, 0, 0)),
        ((0, 1, 0, 0), (0, 0), (0, -0.1235, 0, 0)),
        ((0, 0, 1, 0), (0, 0), (-0.1235, 0, 0, 0)),
        ((0, 0, 0, 1), (0, 0), (0.1235, 0, 0, 0)),
        ((1, 0, 0, 1), (0, 0), (0.0873, 0.0873, 0, 0)),  # a diagonal: 8.73 units along each axis
        ((0, 1, 1, 0), (0, 0), (-0.0873, -0.0873, 0, 0)),
        ((1, 1, 0, 0), (0, 0), (0, 0, 0, 0)),
        (STILL, (0, 0.1), (0, 0, 1.5, 0)),
        (STILL, (0, -0.1), (0, 0, -1.5, 0)),
        (STILL, (0.1, 0), (0, 0, 0, -1.5)),  # the mouse down: the view, too
        (STILL, (0.019, -0.019), (0, 0, 0, 0)),  # below 0.02 nothing moves
        (STILL, (0.02, -0.02), (0, 0, -0.3, -0.3)),
        ((1, 0, 0, 0), (0, 2.0), (0.1235 * math.sin(math.radians(15)), 0.1235 * math.cos(math.radians(15)), 30, 0)),
    ],
)
def test_a_frame_moves_the_camera(keys: tuple[float, ...], mouse: tuple[float, ...], expected: tuple[float, ...]):
    assert after(pose(), keys, mouse) == pytest.approx(expected, abs=5e-5)


def test_steps_follow_the_mean_of_both_yaws():
    x, z, yaw, _ = after(pose(1, 2, yaw=80), (0, 0, 0, 1), (0, 1.0))
    way = math.radians(87.5)
    assert (x, z, yaw) == pytest.approx((1 + 0.1235 * math.cos(way), 2 - 0.1235 * math.sin(way), 95), abs=1e-5)


def test_actions_become_what_the_network_reads():
    both = Action({"KeyW", "KeyD", "ArrowLeft", "ArrowUp"}, (10, 20))
    keys, mouse = numbers([both, Action()], CONTROLS)
    assert keys.tolist() == [[1, 0, 0, 1, 0, 0], [0] * 6]
    assert mouse[0].tolist() == pytest.approx([-0.1 + 0.2, -0.1 + 0.1])
    assert mouse[1].tolist() == [0, 0]
    recorded = actions(0, 137)
    keys, mouse = numbers(recorded, CONTROLS)
    assert torch.equal(keys, case()["keyboard"])
    assert torch.allclose(mouse, case()["mouse"], atol=1e-6)


def test_an_action_moves_what_comes_after_its_frame():
    start, walker = torch.eye(4), Walker(CONTROLS)
    made = walker.cameras(start, [D, W, S], 1, W)
    assert made[:, :3, 3].tolist() == [
        pytest.approx(p, abs=1e-6) for p in ([0, 0, 0.1235], [0.1235, 0, 0.1235], [0.1235, 0, 0.247])
    ]
    assert torch.equal(walker.cameras(start, [W], 1), start[None])
    high = start.clone()
    high[1, 3] = -1.6
    assert float(walker.cameras(high, [W, W], 1)[1, 1, 3]) == pytest.approx(-1.6)


def test_the_view_never_tips_over():
    up = Walker(CONTROLS).cameras(torch.eye(4), [Action({"ArrowUp"})] * 100, 1)
    assert float(camera.pose_from_camera(up[-1])[3]) == pytest.approx(PITCH_LIMIT, abs=1e-3)
    assert camera.check_cameras(up) is up


@pytest.mark.parametrize("held", [W, S, A, D, Action({"KeyW", "KeyA"}), Action({"ArrowRight", "KeyS"}), Action()])
def test_actions_are_read_off_cameras(held: Action):
    path = Walker(CONTROLS).cameras(camera.camera_from_pose(pose(1, 1, 30, 5)).float(), [held] * 9, 1, held)
    keys, mouse = guessed(path, CONTROLS)
    expected = numbers([held] * 8, CONTROLS)
    assert torch.equal(keys, expected[0])
    assert torch.allclose(mouse, expected[1], atol=1e-3)


def test_moments_between_frames():
    """Places on the line, views turned evenly; at a frame that frame's camera."""
    a, b = (camera.camera_from_pose(pose(*at)) for at in ((0, 0, 0), (2, 4, 60)))
    path = torch.stack([a, b, b])
    made = interpolated(path, [0, 0.25, 0.5, 1, 1.5, 2])
    assert torch.equal(made[[0, 3, 5]], path)
    assert torch.allclose(made[4], b)
    for share, got in ((0.25, made[1]), (0.5, made[2])):
        assert torch.allclose(got, camera.camera_from_pose(pose(2 * share, 4 * share, 60 * share)), atol=1e-9)


def some_cameras(count: int, seed: int = 0) -> Tensor:
    of = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return camera.camera_from_pose(of * torch.tensor([1.0, 1.0, 1.0, 0.3]))


def test_a_window_is_told_in_steps_and_shares_of_its_longest():
    path = some_cameras(5)
    made = stepwise(path)
    assert torch.equal(made[0], torch.eye(4, dtype=torch.float64))
    assert float(made[:, :3, 3].norm(dim=-1).max()) == pytest.approx(1)
    longest = max(float((b[:3, 3] - a[:3, 3]).norm()) for a, b in pairwise(path))
    for i in range(1, 5):
        step = torch.linalg.inv(path[i - 1]) @ path[i]
        assert torch.allclose(made[i, :3, :3], step[:3, :3])
        assert torch.allclose(made[i, :3, 3] * longest, step[:3, 3])
    still = stepwise(path[:1].repeat(4, 1, 1))
    assert torch.allclose(still, torch.eye(4, dtype=torch.float64).expand(4, 4, 4), atol=1e-12)


def test_memory_is_told_as_its_reference_sees_it():
    remembered, references = some_cameras(3, 1), some_cameras(3, 2)
    remembered[2] = references[2]
    made = recalled(remembered, references)
    for i in range(2):
        seen = torch.linalg.inv(references[i]) @ remembered[i]
        assert torch.allclose(made[i, :3, 3], seen[:3, 3] / seen[:3, 3].norm())
        assert torch.allclose(made[i, :3, :3], seen[:3, :3])
    assert torch.allclose(made[2], torch.eye(4, dtype=torch.float64), atol=1e-12)


def test_the_table_gives_what_the_rays_give():
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(*n, generator=generator, dtype=torch.float64) for n in ((8, 6144), (8,)))
    table, path = RayTable.of(weight, bias, 64, 96), stepwise(some_cameras(4))
    expected = told(path, 64, 96) @ weight.T + bias
    assert table.direction.shape == (9, 6, 8)
    assert torch.allclose(table.tokens(path), expected, atol=1e-9)


def test_latents_see_their_own_frames_and_those_before():
    frames = torch.arange(57.0)[None, :, None]
    first = grouped(frames, 15)[0, :, :, 0]
    assert first[0].tolist() == [0] * 12
    assert first[1].tolist() == [0] * 8 + [0, 1, 2, 3]
    assert first[14].tolist() == list(range(44, 56))
    later = grouped(frames[:, :56], 14)[0, :, :, 0]
    assert later[0].tolist() == [0] * 8 + [0, 1, 2, 3]
    assert later[13].tolist() == list(range(44, 56))
    with pytest.raises(
        InputError, match=r"actions of 14 latents must be of 53 \(a world's first\) or 56 frames, got 55"
    ):
        grouped(frames[:, :55], 14)


def plain_share(asking: Tensor, frame: Tensor) -> float:
    """The specification's formula, point by point."""
    inside = 0
    for z in torch.linspace(0.1, 30, 10, dtype=torch.float64).tolist():
        for gx in torch.linspace(-1, 1, 10, dtype=torch.float64).tolist():
            for gy in torch.linspace(-1, 1, 10, dtype=torch.float64).tolist():
                world = asking[:3, :3] @ torch.tensor([gx * z, gy * z, z], dtype=torch.float64) + asking[:3, 3]
                x, y, depth = (frame[:3, :3].T @ (world - frame[:3, 3])).tolist()
                u, v = x * 640 / max(depth, 1e-6) + 640, y * 360 / max(depth, 1e-6) + 360
                inside += 0.1 < depth < 30 and 0 <= u <= 1280 and 0 <= v <= 720
    return inside / 1000


def test_shares_are_the_formulas():
    asking, frames = some_cameras(2, 3), some_cameras(6, 4)
    made = retrieval.shares(asking, frames, retrieval.frustum())
    for q in range(2):
        for f in range(6):
            assert float(made[q, f]) == pytest.approx(plain_share(asking[q], frames[f]), abs=2e-3)


def test_a_camera_shows_itself_by_four_fifths():
    """Points on the near and the far plane are not in view."""
    eye = torch.eye(4)[None]
    assert float(retrieval.shares(eye, eye, retrieval.frustum())) == pytest.approx(0.8)


def test_frames_that_look_elsewhere_are_left_out_and_nothing_else():
    asking, frames = some_cameras(5, 5), some_cameras(200, 6)
    frames[:, :3, 3] *= 20
    grid, met = retrieval.frustum(), retrieval._may_meet(asking, frames)
    made = retrieval.shares(asking, frames, grid)
    assert 0.02 < float(met.float().mean()) < 0.9
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "_may_meet", lambda a, f: torch.ones(len(a), len(f), dtype=torch.bool))
        assert torch.equal(retrieval.shares(asking, frames, grid), made)


def test_slots_are_filled_by_their_views_and_the_last_holds_the_sink():
    """Of frames that show as much the earliest; the same latent may come twice."""
    grid, ahead = retrieval.frustum(), torch.eye(4)
    frames = torch.stack([ahead] * 8 + [camera.camera_from_pose(pose(yaw=180)).float()] * 4)
    latents = [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    still = torch.stack([ahead] * 10)
    chosen, alike = retrieval.filled(frames, latents, still, grid)
    assert chosen == [1] * 5
    assert alike == pytest.approx([0.8] * 5)
    turned = still.clone()
    turned[list(retrieval.ASKING[2:])] = frames[-1]
    chosen, alike = retrieval.filled(frames, latents, turned, grid)
    assert chosen == [1, 1, 3, 3, 1]
    assert alike[4] == 0
    assert alike[3] > 0.79
