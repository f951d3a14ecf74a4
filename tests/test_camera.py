import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from worldstride import camera as cam
from worldstride.errors import InputError

CONVENTIONS = ("opencv", "opengl", "unreal")
angle = st.floats(-3.1, 3.1)
length = st.floats(-50, 50)


def rigid(a: float, b: float, c: float, x: float, y: float, z: float) -> Tensor:
    """Camera [4, 4] float64 of three rotations about x, y, z and an eye."""
    skew = torch.tensor([[0, -c, b], [c, 0, -a], [-b, a, 0]], dtype=torch.float64)
    out = torch.eye(4, dtype=torch.float64)
    out[:3, :3] = torch.linalg.matrix_exp(skew)
    out[:3, 3] = torch.tensor([x, y, z])
    return out


def project(point: Tensor, camera: Tensor, k: Tensor) -> tuple[float, float, float]:
    """(u, v, depth) of a world point [3]."""
    local = (cam.invert(camera) @ torch.cat([point, torch.ones(1, dtype=point.dtype)]))[:3]
    u, v, w = (k.to(local) @ local).tolist()
    return u / w, v / w, local[2].item()


@given(angle, angle, angle, length, length, length)
@settings(max_examples=25, deadline=None)
def test_conversions_round_trip_and_stay_rigid(a: float, b: float, c: float, x: float, y: float, z: float):
    camera = rigid(a, b, c, x, y, z)[None]
    for source in CONVENTIONS:
        for target in CONVENTIONS:
            there = cam.convert(camera, source, target)
            cam.check_cameras(there)
            torch.testing.assert_close(cam.convert(there, target, source), camera)


def test_opengl_camera_looks_along_minus_z():
    camera = torch.eye(4)
    camera[:3, 3] = torch.tensor([1.0, 2.0, 3.0])
    out = cam.convert(camera, "opengl")
    # In OpenGL's world the view goes along -z with y up; the same arrows with OpenCV's world axes:
    torch.testing.assert_close(out[:3, 2], torch.tensor([0.0, 0.0, 1.0]))  # forward: -z there, +z here
    torch.testing.assert_close(out[:3, 1], torch.tensor([0.0, 1.0, 0.0]))  # down: -y there, +y here
    torch.testing.assert_close(out[:3, 3], torch.tensor([1.0, -2.0, -3.0]))


def test_opengl_turn_to_the_left_stays_a_turn_to_the_left():
    # A right-handed rotation of +90 degrees about OpenGL's y (up) turns the view from -z to -x: to the left.
    camera = torch.eye(4)
    camera[:3, :3] = torch.tensor([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]])
    torch.testing.assert_close(-camera[:3, 2], torch.tensor([-1.0, 0, 0]))
    out = cam.convert(camera, "opengl")
    torch.testing.assert_close(cam.pose_from_camera(out)[2], torch.tensor(-math.pi / 2))


def test_unreal_axes_and_centimetres():
    camera = torch.eye(4)
    camera[:3, 3] = torch.tensor([300.0, 100.0, 50.0])  # 3 m forward, 1 m right, 0.5 m up
    out = cam.convert(camera, "unreal")
    torch.testing.assert_close(out[:3, :3], torch.eye(3))
    torch.testing.assert_close(out[:3, 3], torch.tensor([1.0, -0.5, 3.0]))
    torch.testing.assert_close(cam.convert(out, "opencv", "unreal"), camera)


def test_unreal_yaw_turns_right():
    yaw = math.radians(30)  # Unreal: forward = (cos, sin, 0), right = (-sin, cos, 0)
    camera = torch.eye(4)
    camera[:3, 0] = torch.tensor([math.cos(yaw), math.sin(yaw), 0])
    camera[:3, 1] = torch.tensor([-math.sin(yaw), math.cos(yaw), 0])
    torch.testing.assert_close(cam.pose_from_camera(cam.convert(camera, "unreal"))[2], torch.tensor(yaw))


def test_unknown_convention():
    with pytest.raises(InputError, match=r"blender.*opencv, opengl, unreal"):
        cam.convert(torch.eye(4), "blender")  # pyright: ignore


@given(length, length, angle, st.floats(-1.5, 1.5))
@settings(max_examples=25, deadline=None)
def test_pose_round_trip(x: float, z: float, yaw: float, pitch: float):
    pose = torch.tensor([x, z, yaw, pitch], dtype=torch.float64)
    camera = cam.camera_from_pose(pose)
    cam.check_cameras(camera[None])
    torch.testing.assert_close(cam.pose_from_camera(camera), pose, rtol=0, atol=1e-6)


def test_pose_turns_right_and_looks_up():
    right = cam.camera_from_pose(torch.tensor([0.0, 0.0, math.pi / 2, 0.0]))
    torch.testing.assert_close(right[:3, 2], torch.tensor([1.0, 0.0, 0.0]), atol=1e-6, rtol=0)
    up = cam.camera_from_pose(torch.tensor([0.0, 0.0, 0.0, 0.5]))
    assert up[1, 2] == pytest.approx(-math.sin(0.5))  # y points down


@given(angle, angle, angle, length, length, length)
@settings(max_examples=25, deadline=None)
def test_inverse_and_relative(a: float, b: float, c: float, x: float, y: float, z: float):
    camera, other = rigid(a, b, c, x, y, z), rigid(c, a, b, z, x, y)
    torch.testing.assert_close(cam.invert(camera), torch.linalg.inv(camera))
    torch.testing.assert_close(camera @ cam.relative(other, camera), other)


@given(angle, angle, angle, length, length, length, st.floats(0.4, 2.5), st.floats(0.5, 2.5))
@settings(max_examples=25, deadline=None)
def test_rays_hit_the_pixels_they_come_from(
    a: float, b: float, c: float, x: float, y: float, z: float, fov: float, aspect: float
):
    camera, k = rigid(a, b, c, x, y, z), cam.intrinsics_from_fov(fov, aspect)
    height, width = 3, 5
    directions = cam.rays(camera, k, height, width)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(height, width, dtype=torch.float64))
    for i in range(height):
        for j in range(width):
            u, v, depth = project(camera[:3, 3] + 4 * directions[i, j], camera, k)
            assert (u, v) == (pytest.approx((j + 0.5) / width), pytest.approx((i + 0.5) / height))
            assert depth > 0


def test_rays_of_a_batch_equal_rays_one_by_one():
    cameras = torch.stack([rigid(0.1 * i, 0.2, 0, 0, i, 0) for i in range(3)])
    shared, each = (
        cam.intrinsics_from_fov(1.0),
        torch.stack([cam.intrinsics_from_fov(0.5 + i) for i in range(3)]),
    )
    for k in (shared, each):
        batch = cam.rays(cameras, k, 2, 3)
        single = [cam.rays(cameras[i], k if k.ndim == 2 else k[i], 2, 3) for i in range(3)]
        torch.testing.assert_close(batch, torch.stack(single))


def test_field_of_view_is_where_the_edge_of_the_image_is():
    k = cam.intrinsics_from_fov(math.pi / 2, 2.0)
    edge = torch.tensor([1.0, 0.5, 1.0])  # 45 degrees to the right; half as far down in a picture twice as wide
    torch.testing.assert_close(k @ edge, torch.tensor([1.0, 1.0, 1.0]))


@pytest.mark.parametrize("fov", [0.0, -1.0, math.pi, math.nan, math.inf])
def test_impossible_field_of_view(fov: float):
    with pytest.raises(InputError, match="field of view"):
        cam.intrinsics_from_fov(fov)


def test_check_cameras_names_the_frame_and_the_cause():
    good = torch.eye(4).repeat(4, 1, 1)
    assert cam.check_cameras(good) is good
    with pytest.raises(InputError, match=r"poses must have shape \[frames, 4, 4\], got \[4, 4\]"):
        cam.check_cameras(torch.eye(4), "poses")
    for value in (math.nan, math.inf):
        bad = good.clone()
        bad[2, 0, 3] = value
        with pytest.raises(InputError, match=r"poses\[2\] holds NaN or infinity"):
            cam.check_cameras(bad, "poses")
    scaled, mirrored, projective = good.clone(), good.clone(), good.clone()
    scaled[1, :3, :3] *= 1.1
    mirrored[3, 0, 0] = -1
    projective[0, 3, 2] = 1
    for bad, frame in ((scaled, 1), (mirrored, 3), (projective, 0)):
        with pytest.raises(InputError, match=rf"cameras\[{frame}\] is no rigid"):
            cam.check_cameras(bad)


def test_between_two_cameras_lie_even_steps():
    start = cam.camera_from_pose(torch.tensor([1.0, 2.0, 0.3, 0.1]))
    end = cam.camera_from_pose(torch.tensor([4.0, 6.0, 1.5, -0.2]))
    path = cam.between(start, end, 4)
    assert torch.equal(path[-1], end)
    cam.check_cameras(path)
    whole = torch.cat([start[None], path])
    assert torch.allclose(whole[:, :3, 3].diff(dim=0), (end - start)[:3, 3].expand(4, 3) / 4, atol=1e-5)
    turns = whole[:-1, :3, :3].mT @ whole[1:, :3, :3]  # the same turn about the same axis, four times
    assert torch.allclose(turns, turns[:1].expand_as(turns), atol=1e-5)
    assert not torch.allclose(turns[0], torch.eye(3), atol=1e-2)
    same = cam.between(start, start, 3)
    assert torch.allclose(same, start.expand(3, 4, 4), atol=1e-6)
    back = cam.camera_from_pose(torch.tensor([0.0, 0.0, math.pi, 0.0]))
    cam.check_cameras(cam.between(torch.eye(4), back, 5))
    half = cam.between(torch.eye(4), back, 2)[0, :3, 2]
    assert abs(float(half[2])) < 1e-5  # half way round it looks to the side, or up or down
