"""HY-WorldPlay's memory retrieval: against the golden rollout, a point by point reference, and worked numbers."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from hy_golden import GOLDEN
from worldstride.camera import invert
from worldstride.errors import InputError
from worldstride.models.hy_worldplay import retrieval
from worldstride.models.hy_worldplay.poses import motion, parse_poses
from worldstride.models.hy_worldplay.retrieval import (
    WAN,
    Found,
    Retrieval,
    ball_points,
    overlap,
    select,
    select_wide,
    visible,
)

IDENTITY = torch.eye(4, dtype=torch.float64)
POINTS = ball_points(50_000, 8.0, 0)
FEW = ball_points(1500, 8.0, 1)
FORWARD = {0.08: 0.97, 1.0: 0.68, 2.0: 0.44, 4.0: 0.14}
"""Score by distance walked straight on, of section 3."""


def golden(*names: str) -> list[Tensor]:
    with safe_open(GOLDEN, "pt") as file:
        return [file.get_tensor(name) for name in names]


def walk(text: str, coming: int = 4) -> Tensor:
    """Cameras of a pose string, the last repeated as coming ones."""
    cameras = parse_poses(text).cameras
    return torch.cat([cameras, cameras[-1:].expand(coming, 4, 4)])


def away(distance: float) -> Tensor:
    camera = IDENTITY.clone()
    camera[0, 3] = distance
    return camera


def turned(yaw: float, pitch: float, roll: float = 0.0, at: tuple[float, float, float] = (0, 0, 0)) -> Tensor:
    """Camera at a place with angles in degrees."""
    out = IDENTITY.clone()
    for a, b, angle in ((2, 0, yaw), (1, 2, pitch), (0, 1, roll)):
        turn = IDENTITY.clone()
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        turn[a, a] = turn[b, b] = cos
        turn[b, a], turn[a, b] = sin, -sin
        out = out @ turn
    out[:3, 3] = torch.tensor(at)
    return out


def slow_overlap(
    current: Tensor,
    old: Tensor,
    points: Tensor,
    *,
    inverse: bool = False,
    box: tuple[float, float] = (60.0, 35.0),
    union: bool = False,
    reach: float = 8.0,
    wrap: bool = True,
    heading: bool = True,
) -> float:
    """The specification's score of two cameras, one point after another; the settings are the mistakes to make."""

    def inside(p: list[float], eye: list[float], forward: list[float]) -> bool:
        x, y, z = (a - b for a, b in zip(p, eye, strict=True))
        yaw = math.degrees(math.atan2(forward[0], forward[2]))
        pitch = math.degrees(math.atan2(forward[1], math.hypot(forward[0], forward[2])))
        across = math.degrees(math.atan2(x, z)) - yaw
        along = math.degrees(math.atan2(y, math.hypot(x, z))) - pitch
        if wrap:
            across, along = ((angle + 180) % 360 - 180 for angle in (across, along))
        return abs(across) < box[0] / 2 and abs(along) < box[1] / 2

    pose = torch.linalg.inv(current.double()) @ old.double()
    if inverse:
        pose = torch.linalg.inv(pose)
    eye = pose[:3, 3].tolist()
    forward = (pose[:3, 2] if heading else pose[2, :3]).tolist()
    both = seen = 0
    for p in points.double().tolist():
        mine = inside(p, [0.0, 0.0, 0.0], [0.0, 0.0, 1.0])
        theirs = inside(p, eye, forward) and math.dist(p, eye) < reach
        both += mine and theirs
        seen += (mine or theirs) if union else mine
    return both / seen if seen else 0.0


def slow_grid(current: Tensor, old: Tensor, points: Tensor, **mistake: object) -> Tensor:
    rows = [[slow_overlap(c, h, points, **mistake) for h in old] for c in current]  # pyright: ignore[reportArgumentType]
    return torch.tensor(rows, dtype=torch.float64)


def some_cameras() -> tuple[Tensor, Tensor]:
    """Current and old cameras that see much of the same, in every way that the score can go wrong about."""
    current = torch.stack([turned(20, -10, 5, (0.5, 0.2, -1.0)), turned(-130, 15, 0, (2.0, -0.5, 0.3))])
    seen_from = [
        turned(15, 20, 10, (0.3, 0.1, 0.6)),
        turned(-12, 8, 0, (1.0, 0.0, -2.0)),
        turned(177, 4, 0, (0.5, 0.3, 6.5)),  # looks back at the current camera: azimuths round the circle
        turned(5, -25, 30, (-1.0, 0.4, -0.7)),
        turned(0, 0, 0, (0.0, 0.0, -5.5)),  # points beyond its reach
        turned(25, -6, 0, (-0.4, 0.0, 0.2)),
    ]
    return current, torch.cat([c @ torch.stack(seen_from) for c in current])


@pytest.fixture(scope="module")
def scored() -> tuple[Tensor, Tensor, Tensor]:
    current, old = some_cameras()
    return current, old, overlap(current, old, FEW)


def test_score_is_that_of_the_specification(scored: tuple[Tensor, Tensor, Tensor]):
    current, old, score = scored
    assert score.dtype == torch.float64 and score.shape == (2, 12)
    assert torch.equal(score, slow_grid(current, old, FEW))
    assert (score > 0.05).sum() >= 8  # something is at stake


@pytest.mark.parametrize(
    "mistake",
    [
        {"inverse": True},
        {"box": (89.4, 58.2)},
        {"union": True},
        {"reach": math.inf},
        {"wrap": False},
        {"heading": False},
    ],
    ids=lambda mistake: next(iter(mistake)),
)
def test_every_known_mistake_gives_another_score(scored: tuple[Tensor, Tensor, Tensor], mistake: dict[str, object]):
    current, old, score = scored
    assert (score - slow_grid(current, old, FEW, **mistake)).abs().max() > 0.03


@pytest.mark.parametrize("yaw", [0.0, 90.0, 179.0, -150.0])
@pytest.mark.parametrize("pitch", [0.0, 80.0, -89.0, 90.0])
def test_steep_views(yaw: float, pitch: float):
    """The current camera level, the old one anywhere up to the zenith, where the box goes over the top."""
    old = turned(yaw, pitch, 0, (0.1, 0.5 if pitch < 0 else -0.5, 3.0))
    assert float(overlap(IDENTITY[None], old[None], FEW)) == slow_overlap(IDENTITY, old, FEW)
    wide = Retrieval(field_of_view=(170.0, 160.0))
    expected = slow_overlap(IDENTITY, old, FEW, box=(170.0, 160.0))
    assert float(overlap(IDENTITY[None], old[None], FEW, wide)) == expected


def test_sample_values():
    """Section 3's numbers, each true to the chance of the points: a standard deviation of 0.007."""
    for expected, camera in [(0.85, turned(9, 0)), *((s, turned(0, 0, 0, (0, 0, d))) for d, s in FORWARD.items())]:
        for pair in ((camera, IDENTITY), (IDENTITY, camera)):
            found = sum(float(overlap(pair[0][None], pair[1][None], ball_points(50_000, 8.0, i))) for i in range(4)) / 4
            assert found == pytest.approx(expected, abs=0.025)


def test_points_fill_the_ball_evenly():
    radii = POINTS.double().norm(dim=1)
    assert POINTS.shape == (50_000, 3) and POINTS.dtype == torch.float32 and float(radii.max()) < 8.0001
    for share in (0.1, 0.5, 0.9):  # volume grows with the cube of the radius
        assert float((radii < 8 * share ** (1 / 3)).double().mean()) == pytest.approx(share, abs=0.01)
    assert POINTS.mean(0).abs().max() < 0.1
    assert len(visible(POINTS)) == pytest.approx(50_000 * math.sin(math.radians(17.5)) / 6, abs=150)


def test_points_depend_on_their_seed_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    generator = torch.Generator().manual_seed(3)
    first, second = ball_points(10, 8.0, generator), ball_points(10, 8.0, generator)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, ball_points(10, 8.0, 3)) and not torch.equal(first, second)


def test_points_out_of_view_change_nothing(scored: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch):
    current, old, score = scored
    kept = visible(FEW)
    assert torch.equal(visible(kept), kept)
    assert torch.equal(overlap(current, old, kept), score)
    monkeypatch.setattr(retrieval, "_CPU_BLOCK", 300)  # several passes, the last one smaller
    assert torch.equal(overlap(current, old, FEW), score)


def test_nothing_in_view_scores_zero():
    behind = torch.tensor([[0.0, 0.0, -3.0]])
    assert overlap(IDENTITY[None], IDENTITY[None], behind).tolist() == [[0.0]]
    found = select(IDENTITY.expand(44, 4, 4), 40, behind)
    assert found.clips == (4,) and set(found.scores.values()) == {1.0}
    assert overlap(IDENTITY[None], IDENTITY.expand(0, 4, 4), FEW).shape == (1, 0)


def test_golden_contexts():
    """All ten chunks, on upstream's points, from upstream's cameras."""
    viewmats, points = golden("in_out/viewmats", "in_out/points")
    cameras = invert(viewmats[0])
    contexts = golden(*(f"chunk{i}/context" for i in range(10)))
    for i, context in enumerate(contexts):
        assert select(cameras, 4 * i, points).context == tuple(context.tolist())


def test_worked_example_on_other_points():
    cameras = parse_poses("w-12,right-12,left-12,s-3").cameras
    assert select(cameras, 32, POINTS).context == (*range(4), *range(12, 16), *range(20, 32))
    assert select(cameras, 36, POINTS).context == (*range(4), *range(8, 12), *range(24, 36))


def slow_select(cameras: Tensor, current: int, points: Tensor, wan: bool = False) -> tuple[list[int], dict[int, float]]:
    """Section 3's `select`, sentence by sentence, in plain numbers."""
    if current < (16 if wan else 21):
        return list(range(current)), {}
    distances = {}
    for start in range(0 if wan else 4, current - 12, 4):
        terms = []
        for q in range(current, current + 4):
            first, middle = (float(overlap(cameras[q : q + 1], cameras[h : h + 1], points)) for h in (start, start + 2))
            terms.append(((1 - first) + (1 - middle)) / 2)
        distances[start] = sum(terms) / 4
    memory = [] if wan else [0, 1, 2, 3]
    for start in sorted(distances, key=lambda start: (round(distances[start], 12), start)):
        if len(memory) < (4 if wan else 8):
            memory += range(start, start + 4)
    return sorted({*memory, *range(current - 12, current)}), distances


@pytest.mark.parametrize("wan", [False, True])
def test_select_on_a_random_walk(wan: bool):
    generator = torch.Generator().manual_seed(2)
    cameras, names = [IDENTITY], ["w", "s", "a", "d", "left", "right", "up", "down"]
    while len(cameras) < 60:
        held = [names[i] for i in torch.randint(8, (2,), generator=generator)]
        cameras += [cameras[-1] @ torch.linalg.matrix_power(motion(held), i) for i in range(1, 6)]
    path = torch.stack(cameras)
    for current in range(0, 56, 4):
        found = select(path, current, FEW, WAN if wan else Retrieval())
        context, distances = slow_select(path, current, FEW, wan)
        assert list(found.context) == context
        assert found.scores == pytest.approx(distances, abs=1e-12)
        assert list(found.clips) == ([min(distances, key=lambda h: (round(distances[h], 12), h))] if distances else [])


@pytest.mark.parametrize("current", [0, 4, 12, 19, 20])
def test_the_whole_past_fits(current: int):
    assert select(walk("w-40"), current, FEW) == Found(tuple(range(current)), (), {})


def test_first_retrieval():
    found = select(walk("w-40"), 24, FEW)
    assert len(found.context) == 20 and list(found.scores) == [4, 8]


def test_equal_clips_go_to_the_oldest():
    still = IDENTITY.expand(104, 4, 4)
    found = select(still, 100, FEW)
    assert found.clips == (4,) and set(found.scores.values()) == {0.0}
    assert len(found.scores) == len(range(4, 88, 4))
    lost = torch.cat([away(100.0).expand(100, 4, 4), still[:4]])  # nothing of now was ever seen
    assert select(lost, 100, FEW).clips == (4,)
    cameras = lost.clone()
    cameras[[40, 42, 72, 74]] = IDENTITY  # two clips that saw the same
    found = select(cameras, 100, FEW)
    assert found.clips == (40,) and found.scores[40] == found.scores[72] == 0.0
    assert found.context == (*range(4), *range(40, 44), *range(88, 100))


def test_two_samples_answer_for_a_clip():
    """The first and the third latent count, the second and the fourth do not; the first clip never competes."""
    cameras = torch.cat([away(100.0).expand(60, 4, 4), IDENTITY.expand(4, 4, 4)])
    cameras[[0, 2, 13, 15, 22]] = IDENTITY
    found = select(cameras, 60, FEW)
    assert found.clips == (20,) and found.scores[20] == 0.5 and found.scores[12] == 1.0


def test_wan_rules():
    still = IDENTITY.expand(64, 4, 4)
    for current in (12, 15):
        assert select(still, current, FEW, WAN) == Found(tuple(range(current)), (), {})
    assert select(still, 16, FEW, WAN) == Found(tuple(range(16)), (0,), {0: 0.0})
    cameras = torch.cat([away(100.0).expand(60, 4, 4), still[:4]])
    cameras[24:28] = IDENTITY
    found = select(cameras, 60, FEW, WAN)
    assert found.context == (*range(24, 28), *range(48, 60)) and next(iter(found.scores)) == 0
    for current in range(16, 60, 4):
        assert len(select(cameras, current, FEW, WAN).context) == 16


def test_wide_is_the_union_of_its_queries():
    generator = torch.Generator().manual_seed(4)
    turns = [["left", "right", "w", "up", "down"][i] for i in torch.randint(5, (24,), generator=generator)]
    cameras = parse_poses(",".join(f"{name}-5" for name in turns)).cameras
    several = 0
    for current in range(0, 97, 16):
        parts = [select(cameras, current + k, FEW) for k in (0, 4, 8, 12)]
        found = select_wide(cameras, current, FEW)
        chunk = range(current, current + 16)
        assert found.context == tuple(sorted({i for part in parts for i in part.context} - set(chunk)))
        assert set(found.clips) == {clip for part in parts for clip in part.clips}
        for clip, score in found.scores.items():
            assert score == min(part.scores[clip] for part in parts if clip in part.scores)
        assert len(found.context) <= 32 and (current < 32 or len(found.context) >= 16)
        several = max(several, len(found.clips))
    assert several > 1


def test_wide_on_a_straight_walk():
    cameras = parse_poses("w-79").cameras
    assert [len(select_wide(cameras, current, POINTS).context) for current in (0, 16, 48, 64)] == [0, 16, 20, 20]


def test_other_numbers():
    settings = Retrieval(memory=14, window=6, clip=2, stride=2, query=2, since=9)
    cameras = torch.cat([away(100.0).expand(30, 4, 4), IDENTITY.expand(2, 4, 4)])
    cameras[[10, 16, 17]] = IDENTITY
    found = select(cameras, 30, FEW, settings)
    assert found.clips == (16, 10, 2)  # two were near, the third is the oldest of the rest
    assert found.context == (0, 1, 2, 3, 10, 11, 16, 17, *range(24, 30))
    early = select(walk("w-20"), 14, FEW, Retrieval(since=12))
    assert early == Found((0, 1, 2, 3, *range(2 + 2, 14)), (), {})  # no clip lies before the window


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"memory": 11}, "memory must be an integer of at least 12, got 11"),
        ({"clip": 0}, "clip must be an integer of at least 1, got 0"),
        ({"window": 3}, "window must be an integer of at least 4, got 3"),
        ({"reach": 0.0}, "reach must be a number above 0"),
        ({"field_of_view": (60.0, 180.0)}, "field_of_view must be two angles between 0 and 180 degrees, got"),
    ],
)
def test_settings_that_cannot_be(change: dict[str, int], text: str):
    with pytest.raises(InputError, match=text):
        Retrieval(**change)


def test_wrong_inputs_are_named():
    cameras = walk("w-40")
    with pytest.raises(InputError, match=r"cameras must hold 44 latents and the 4 that follow.*at least 48 in all.*45"):
        select(cameras, 44, FEW)
    with pytest.raises(InputError, match="current must be an integer of at least 0, got -4"):
        select(cameras, -4, FEW)
    with pytest.raises(InputError, match=r"cameras must be camera-to-world matrices .*got shape \[1, 45, 4, 4\]"):
        select(cameras[None], 40, FEW)
    with pytest.raises(InputError, match=r"points must have shape \[points, 3\], got \[1500, 2\]"):
        select(cameras, 40, FEW[:, :2])
    with pytest.raises(InputError, match="chunk must be a multiple of the 4 latents of a query, got 6"):
        select_wide(cameras, 16, FEW, chunk=6)
    with pytest.raises(InputError, match="seed must be an integer of at least 0, got -1"):
        ball_points(5, 8.0, -1)
    with pytest.raises(InputError, match="count must be an integer of at least 1, got 0"):
        ball_points(0, 8.0, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_gpu_is_waited_for_once():
    cameras = parse_poses("w-12,right-12,left-12,up-20,s-20").cameras
    expected = [select(cameras, current, POINTS) for current in (20, 40, 60)]
    there, points = cameras.cuda(), POINTS.cuda()
    wide = select_wide(there, 48, points)
    assert wide == select_wide(cameras, 48, POINTS)
    for given in (points, visible(points)):
        assert [select(there, current, given) for current in (20, 40, 60)] == expected
    old = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as waits:
            select(there, 60, points)
    finally:
        torch.cuda.set_sync_debug_mode(old)
    assert len([w for w in waits if "synchronizing CUDA" in str(w.message)]) == 1
