"""Worlds: sampling, tracing, co-visibility, walks and live walking, against what geometry demands."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from worldstride.camera import camera_from_pose, rays
from worldstride.errors import InputError
from worldstride.worlds import (
    FAR,
    Scene,
    ball_centres,
    covisible,
    directions,
    gate_edges,
    intrinsics,
    is_dynamic,
    moving_pixels,
    render,
    sample_corridor,
    sample_courtyard,
    sample_plain,
    sample_plain_walk,
    sample_walk,
    scene_from_seed,
    step_pose,
    trace,
)
from worldstride.worlds.space import free_rectangles, is_free, obstacles

FAMILIES = ("plain", "courtyard", "corridor")
SAMPLERS = {"plain": sample_plain, "courtyard": sample_courtyard, "corridor": sample_corridor}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensors(scene: Scene) -> dict[str, Tensor]:
    return dict(vars(scene))


def look(scene: Scene, x: float, z: float, yaw: float, pitch: float = 0.0) -> Tensor:
    return torch.tensor([[[x, z, yaw, pitch]]]).expand(len(scene), 1, 4)


def empty_court() -> Scene:
    """A plain court of half size 4 without things in it."""
    scene = scene_from_seed("plain", [0])
    wall = torch.tensor([[[4.0, -4, 4, 2], [-4, -4, 4, 2]]])
    room = torch.tensor([[[-4.0, 4, -4, 4]]])
    gone = {"pillar": scene.pillar * 0 + 1e3, "crate": scene.crate * 0 + 1e3}
    gone["pillar"][..., 2:] = 0
    gone["crate"][..., 2:] = 0
    return Scene(**{**tensors(scene), **gone, "wall_x": wall, "wall_z": wall, "rooms": room, "floor": room})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_world_depends_on_its_own_seed_only(family: str) -> None:
    together = scene_from_seed(family, [5, 6, 7])
    alone = scene_from_seed(family, [6])
    for name, value in tensors(alone).items():
        assert torch.equal(value, tensors(together[1:2])[name]), name
    assert not torch.equal(together.colours[0], together.colours[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_selecting_joining_and_lengths(family: str) -> None:
    scene = scene_from_seed(family, [1, 2, 3])
    again = Scene.cat([scene[2:3], scene[torch.tensor([0, 1])]])
    assert len(again) == 3 and len(scene[:2]) == 2 and scene.to("cpu").device.type == "cpu"
    for name, value in tensors(again).items():
        assert torch.equal(value, tensors(scene)[name][[2, 0, 1]]), name


def test_bad_requests_say_what_would_be_right() -> None:
    with pytest.raises(InputError, match="plain, courtyard, corridor"):
        scene_from_seed("castle", [0])
    with pytest.raises(InputError, match="at least one seed"):
        scene_from_seed("plain", [])
    scene = scene_from_seed("plain", [0])
    with pytest.raises(InputError, match=r"\[1, frames, 4\]"):
        render(scene, torch.zeros(2, 3, 4), torch.zeros(2, 3))
    with pytest.raises(InputError, match="families"):
        Scene.cat([scene, scene_from_seed("courtyard", [0])])
    with pytest.raises(InputError, match="pose must have shape"):
        step_pose(scene, torch.zeros(4), 0, 0, 0, 0, 0)


def test_plain_statistics() -> None:
    scene = sample_plain(4000, generator=generator())
    half = scene.rooms[:, 0, 1]
    assert float(half.min()) >= 3.4 and float(half.max()) <= 4.4 and abs(float(half.mean()) - 3.9) < 0.02
    assert float(scene.pillar[..., 2].min()) >= 0.16 and float(scene.pillar[..., 2].max()) <= 0.42
    assert float(scene.wall_x[..., 3].min()) >= 1.7 and float(scene.wall_x[..., 3].max()) <= 2.7
    assert torch.equal(scene.pillar[..., :2].abs() <= (half - 0.7)[:, None, None], torch.ones(4000, 4, 2) > 0)
    assert float(scene.colours.min()) >= 0 and float(scene.colours.max()) <= 1
    sides = torch.stack([(scene.painting[..., 0] == s).float().mean() for s in (2, 3, 6, 7)])
    assert torch.allclose(sides, torch.full((4,), 0.25), atol=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_tables_cover_every_surface(family: str) -> None:
    scene = SAMPLERS[family](3, generator=generator())
    ids = scene.surfaces
    assert scene.frequency.shape == (3, ids.painting, 2)
    assert scene.colours.shape == (3, 2 * ids.painting + 9 * (ids.end - ids.painting), 3)


def test_directions_agree_with_the_camera_module() -> None:
    pose = torch.tensor([0.3, -1.0, 0.7, 0.2])
    expected = rays(camera_from_pose(pose), intrinsics(), 8, 8)
    x, up, z = directions(pose, 8)
    assert torch.allclose(torch.stack([x, -up, z], -1), expected, atol=1e-5)


def test_distances_and_identities_of_walls_floor_and_sky() -> None:
    scene = empty_court()
    _, distance, surface = trace(scene, look(scene, 1.0, 0.5, math.pi / 2), torch.zeros(1, 1), 95, torch.zeros(2))
    middle = distance[0, 0, 47, 47]
    assert middle == pytest.approx(3.0, abs=1e-4)
    assert int(surface[0, 0, 47, 47]) in (scene.surfaces.wall_x + 1, *range(scene.surfaces.painting, 99))
    assert int(surface[0, 0, 0, 47]) == -1 and float(distance[0, 0, 0, 47]) == FAR
    _, up, _ = directions(torch.tensor([1.0, 0.5, math.pi / 2, 0.0]), 95)
    assert int(surface[0, 0, 94, 47]) == 0
    assert float(distance[0, 0, 94, 47]) == pytest.approx(float(-1 / up[94, 47]), rel=1e-4)


def test_distance_of_a_pillar_a_crate_a_panel_and_a_ball() -> None:
    scene = empty_court()
    time, zero = torch.zeros(1, 1), torch.zeros(2)

    def middle(changed: Scene) -> tuple[float, int]:
        _, d, s = trace(changed, look(changed, 0.0, -2.0, 0.0), time, 33, zero)
        return float(d[0, 0, 16, 16]), int(s[0, 0, 16, 16])

    pillar = scene.pillar.clone()
    pillar[0, 1] = torch.tensor([0.0, 1.0, 0.4, 2.0])
    seen = Scene(**{**tensors(scene), "pillar": pillar})
    assert middle(seen) == (pytest.approx(2.6, abs=1e-4), scene.surfaces.pillar + 1)
    crate = scene.crate.clone()
    crate[0, 0] = torch.tensor([0.0, 1.0, 0.3, 0.8, 0.5])
    seen = Scene(**{**tensors(scene), "crate": crate})
    assert middle(seen) == (pytest.approx(2.5, abs=1e-4), scene.surfaces.crate)

    full = scene_from_seed("courtyard", [0])
    panel, ball, gone = full.panel.clone(), full.ball.clone(), full.panel.clone()
    panel[0, 0] = torch.tensor([0.0, 0.0, 0.5, 0.04, 1.5, 0.05, 0.0])
    gone[..., 0] += 1e3
    ball[0, 0] = torch.tensor([0.0, -0.5, 0, 0, 0, 0, 0, 0, 1.0, 0, 0])
    far = {"pillar": full.pillar + 1e3, "crate": full.crate * 0}
    seen = Scene(**{**tensors(full), **far, "panel": panel, "ball": ball + torch.tensor([1e3] + [0.0] * 10)})
    assert middle(seen) == (pytest.approx(1.96, abs=1e-4), full.surfaces.panel)
    seen = Scene(**{**tensors(full), **far, "panel": gone, "ball": ball})
    assert middle(seen) == (pytest.approx(0.5, abs=1e-4), full.surfaces.ball)


@pytest.mark.parametrize("family", FAMILIES)
def test_render_shape_type_and_pieces(family: str) -> None:
    scene = SAMPLERS[family](2, generator=generator())
    pose = sample_walk(scene, 24, generator())
    time = torch.arange(24.0).expand(2, 24)
    frames = render(scene, pose, time, 32)
    assert frames.shape == (2, 24, 3, 32, 32) and frames.dtype == torch.uint8
    whole = render(scene, pose, time, 32, trace=lambda *a: trace(*a))
    assert (frames.int() - whole.int()).abs().max() <= 1
    assert float(frames.float().std()) > 20


@pytest.mark.parametrize("family", ["courtyard", "corridor"])
def test_no_ray_escapes_between_walls(family: str) -> None:
    """Below the horizon one must never see past a wall: every such ray ends on the worlds' own ground."""
    scene = SAMPLERS[family](16, generator=generator(3))
    pose = sample_walk(scene, 8, generator(1))
    _, distance, _ = trace(scene, pose, torch.zeros(16, 8), 48, torch.zeros(2))
    x, up, z = directions(pose, 48)
    at_x, at_z = pose[..., 0, None, None] + distance * x, pose[..., 1, None, None] + distance * z
    rect = scene.rooms[:, None, None, None]  # [B, 1, 1, 1, R, 4]
    inside = (at_x[..., None] > rect[..., 0] - 0.01) & (at_x[..., None] < rect[..., 1] + 0.01)
    inside &= (at_z[..., None] > rect[..., 2] - 0.01) & (at_z[..., None] < rect[..., 3] + 0.01)
    assert bool((inside.any(-1) | (up >= 0)).all())


def test_things_move_with_time_and_plain_worlds_stand_still() -> None:
    plain, full = scene_from_seed("plain", [1]), scene_from_seed("courtyard", [1])
    time = torch.tensor([[0.0, 40.0]])
    pose = look(full, 0.0, 0.0, 0.3).expand(1, 2, 4)
    still = render(plain, pose, time, 48)
    assert torch.equal(still[:, 0], still[:, 1])
    assert not torch.equal(*render(full, pose, time, 48).unbind(1))
    assert not torch.allclose(*ball_centres(full.ball, time)[:, :, 0].unbind(1))
    assert not bool(is_dynamic(plain, torch.arange(-1, plain.surfaces.end)).any())
    assert int(is_dynamic(full, torch.arange(-1, full.surfaces.end)).sum()) == 4 + 1 + 2
    gates = torch.cat([full.gate_x, full.gate_z], 1)
    edges = gate_edges(gates, torch.arange(200.0)[None])
    slides = gates[0, :, 3] > 0
    assert bool((edges.std(1)[0, slides] > 0.05).all()) and float(edges.std(1)[0, ~slides].max()) < 1e-6


def test_courtyards_have_rooms_and_sliding_doors() -> None:
    scene = sample_courtyard(200, generator=generator())
    gates = torch.cat([scene.gate_x, scene.gate_z], 1)
    rooms, doors = (gates[..., 1] > gates[..., 0]).sum(1), gates[..., 3].sum(1)
    assert set(rooms.tolist()) == {2, 3, 4} and set(doors.tolist()) == {1.0, 2.0}
    assert bool((gates[..., 1] - gates[..., 0] < 1.5).all())
    things, radius = obstacles(scene)
    middle = (gates[..., 0] + gates[..., 1]) / 2
    half = scene.rooms[:, 0, 1:2]
    flat = torch.stack([half, -half, middle[:, 2:3], middle[:, 3:4]], 1)[..., 0]
    deep = torch.stack([middle[:, 0], middle[:, 1], half[:, 0], -half[:, 0]], 1)
    distance = (torch.stack([flat, deep], -1)[:, :, None] - things[:, None]).norm(dim=-1) - radius[:, None]
    assert float(distance.min()) > 0.7


def test_covisible_is_reflexive_and_blind_backwards() -> None:
    scene = sample_courtyard(3, generator=generator())
    pose = sample_walk(scene, 6, generator())
    time = torch.arange(6.0).expand(3, 6)
    itself = covisible(scene, pose, time, pose, time)
    assert itself.shape == (3, 6, 6, 48, 48) and itself.dtype == torch.bool
    assert float(itself.diagonal(0, 1, 2).float().mean()) > 0.999
    level = pose * torch.tensor([1.0, 1, 1, 0])
    away = level + torch.tensor([0, 0, math.pi, 0])
    assert not bool(covisible(scene, level, time, away, time).diagonal(0, 1, 2).any())


def test_walls_block_covisibility() -> None:
    scene = empty_court()
    blocked = Scene(**{**tensors(scene), "wall_x": torch.tensor([[[4.0, -4, 4, 2], [0, -4, 4, 5]]])})
    left, right, time = (
        look(scene, -2.0, 0.0, math.pi / 2),
        look(scene, 2.0, 0.0, math.pi / 2),
        torch.zeros(1, 1),
    )
    assert float(covisible(scene, right, time, left, time).float().mean()) > 0.5
    assert not bool(covisible(blocked, right, time, left, time).any())


def test_moving_things_are_seen_only_where_they_stay() -> None:
    scene = scene_from_seed("courtyard", [2])
    ball = scene.ball.clone()
    ball[0, 0] = torch.tensor([0.0, 1.0, 0.4, 0, 0.1, 0, 0, 0, 0.5, 0, 0])
    scene = Scene(**{**tensors(scene), "ball": ball, "pillar": scene.pillar + 1e3, "crate": scene.crate * 0})
    pose = look(scene, 0.0, -1.0, 0.0, -0.2)
    now, later = torch.zeros(1, 1), torch.full((1, 1), 3.0)
    moving = moving_pixels(scene, pose, now)[0, 0]
    same = covisible(scene, pose, now, pose, now)[0, 0, 0]
    other = covisible(scene, pose, now, pose, later)[0, 0, 0]
    assert 0.02 < float(moving.float().mean()) < 0.9
    assert bool(same[moving].all()) and not bool(other[moving].any())
    assert float(other[~moving].float().mean()) > 0.7


@pytest.mark.parametrize("family", FAMILIES)
def test_walks_keep_clear_of_walls_and_things(family: str) -> None:
    scene = SAMPLERS[family](64, generator=generator(1))
    pose = sample_walk(scene, 256, generator(2))
    assert pose.shape == (64, 256, 4) and bool(pose.isfinite().all())
    time = torch.arange(256.0).expand(64, 256)
    assert bool(is_free(pose[..., :2], free_rectangles(scene, 0.1, time), 0.1).all())
    assert float(pose[..., 3].abs().max()) <= math.radians(20)
    if family == "plain":  # a plain court may hold a pillar so near a wall that a walk is squeezed into its rim
        return
    centre, radius = obstacles(scene)
    gap = (pose[:, :, None, :2] - centre[:, None]).norm(dim=-1) - radius[:, None]
    assert float(gap.min()) > 0.1
    step = (pose[:, 1:, :2] - pose[:, :-1, :2]).norm(dim=-1)
    assert float(step.mean()) < 0.1 and float(step.max()) < 0.4 and float((step > 0.16).float().mean()) < 0.02
    assert float((pose[:, 1:, 2] - pose[:, :-1, 2]).abs().max()) < 0.15


def test_journeys_visit_rooms_and_come_back() -> None:
    scene = sample_courtyard(64, generator=generator(1))
    pose = sample_walk(scene, 256, generator(2))
    court = scene.rooms[:, None, 0]
    outside = (pose[..., 0].abs() > court[..., 1]) | (pose[..., 1].abs() > court[..., 1])  # [B, n]
    assert 0.5 < float(outside.any(1).float().mean()) < 0.9
    crossings = (outside[:, 1:] != outside[:, :-1]).sum(1)
    assert float(crossings.float().mean()) > 1.2


def test_plain_walk_kinds() -> None:
    scene = sample_plain(32, generator=generator())
    spin = sample_plain_walk(scene, 64, generator(), kind=0.95)
    turn = spin[:, 1:, 2] - spin[:, :-1, 2]
    assert bool((turn.abs() > 0.079).all()) and bool((turn.abs() < 0.181).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_no_keys_lead_through_walls(family: str) -> None:
    scene = SAMPLERS[family](32, generator=generator(4))
    pose = sample_walk(scene, 1, generator(5))[:, 0]
    g = generator(6)
    for t in range(60):
        keys = torch.rand(4, 32, generator=g) * 2 - 1
        after = step_pose(scene, pose, keys[0].abs(), keys[1] * 0.5, keys[2] * 0.5, keys[3] * 0.3, float(t))
        assert bool(is_free(after[:, None, :2], free_rectangles(scene, 0.2)).all())
        # A step from one room to another passes through an open doorway.
        passage = free_rectangles(scene, 0.0, torch.full((32, 1), float(t)))
        between = torch.stack([pose[:, :2] + (after[:, :2] - pose[:, :2]) * s / 8 for s in range(9)], 1)
        open_ = is_free(between, passage.expand(-1, 9, -1, -1), 0.02)
        assert family != "courtyard" or float(open_.float().mean()) > 0.97
        assert float(after[:, 3].abs().max()) <= math.radians(20) + 1e-6
        pose = after


def test_a_door_can_be_passed_when_open_and_not_when_shut() -> None:
    scene = scene_from_seed("courtyard", list(range(12)))
    gate = torch.cat([scene.gate_x, scene.gate_z], 1)
    slides = gate[..., 3] > 0
    side = slides.float().argmax(1)
    one = torch.arange(12)
    middle = gate[one, side, :2].mean(-1)
    outward = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])[side]
    start = outward * (scene.rooms[:, 0, 1:2] - 0.6) + outward.flip(-1).abs() * middle[:, None]
    yaw = torch.atan2(outward[:, 0], outward[:, 1])
    speed, phase = gate[one, side, 4], gate[one, side, 5]
    for target, passes in ((-math.pi / 2, True), (math.pi / 2, False)):
        time = (target - phase) % (2 * math.pi) / speed
        pose = torch.cat([start, yaw[:, None], torch.zeros(12, 1)], 1)
        for _ in range(6):
            pose = step_pose(scene, pose, 0.3, 0.0, 0.0, 0.0, time)
        depth = (pose[:, :2] * outward).sum(1) - scene.rooms[:, 0, 1]
        assert bool((depth > 0.5).all()) if passes else bool((depth < 0.0).all())


def test_walking_slides_along_walls() -> None:
    scene = empty_court()
    pose = torch.tensor([[3.7, 0.0, math.pi / 4, 0.0]])
    after = step_pose(scene, pose, 0.4, 0.0, 0.0, 0.0, 0.0)
    assert float(after[0, 0]) == pytest.approx(3.75, abs=1e-4)
    assert float(after[0, 1]) == pytest.approx(0.4 * math.cos(math.pi / 4), abs=1e-4)
