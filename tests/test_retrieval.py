"""Field-of-view retrieval and the plan of a chunk's context."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from walking import select
from worldstride.camera import camera_from_pose, intrinsics_from_fov
from worldstride.context.history import History
from worldstride.context.retrieval import (
    FAR,
    HALF_NEAR,
    HALF_WEIGHT,
    KEPT,
    NEAR,
    coverage,
    frustum_points,
    greedy,
    similarity,
    unseen,
)
from worldstride.context.selection import ContextPlan
from worldstride.errors import InputError
from worldstride.noise import stream
from worldstride.protocol import KINDS, ChunkShape

K = intrinsics_from_fov(math.radians(80))


def cameras(*pose: tuple[float, float, float]) -> Tensor:
    """Cameras [N, 4, 4] of (x, z, yaw)."""
    return camera_from_pose(torch.tensor([[x, z, yaw, 0.0] for x, z, yaw in pose]))


def random_cameras(count: int, seed: int) -> Tensor:
    pose = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return camera_from_pose(pose * torch.tensor([2.0, 2.0, 2.0, 0.2]))


def slow_coverage(queries: Tensor, memory: Tensor, points: Tensor, k: Tensor) -> Tensor:
    """`coverage` of one world, point by point, in float64: [N, Q P]."""
    rows = []
    for eye in memory.double():
        row = []
        for query in queries.double():
            for u, v, depth in points.double().tolist():
                x, y = (u - float(k[0, 2])) / float(k[0, 0]) * depth, (v - float(k[1, 2])) / float(k[1, 1]) * depth
                world = query @ torch.tensor([x, y, depth, 1.0], dtype=torch.float64)
                x, y, z, _ = (torch.linalg.inv(eye) @ world).tolist()
                seen = z > 0.15
                if seen:
                    across, along = float(k[0, 0]) * x / z + 0.5, float(k[1, 1]) * y / z + 0.5
                    seen = 0 < across < 1 and 0 < along < 1
                near = 1 / (1 + float((eye[:3, 3] - query[:3, 3]).square().sum()) / HALF_NEAR**2)
                row.append(near / (1 + (x * x + y * y + z * z) / HALF_WEIGHT**2) if seen else 0.0)
        rows.append(row)
    return torch.tensor(rows)


def slow_greedy(weights: Tensor, valid: list[bool], count: int) -> list[int]:
    """`greedy` of one world, frame by frame: weights [N, S]."""
    left, picks = [1.0] * weights.shape[1], []
    table = weights.tolist()
    for _ in range(count):
        best, chosen = -math.inf, -1
        for i, row in enumerate(table):
            gain = sum(w * part for w, part in zip(row, left, strict=True)) / len(row) + 0.15 * sum(row) / len(row)
            gain -= 0 if valid[i] else 1e3
            if i not in picks and gain > best:
                best, chosen = gain, i
        picks.append(chosen)
        left = [part * (1 - (1 - KEPT) * w) for part, w in zip(left, table[chosen], strict=True)]
    return picks


def test_points_lie_in_the_frustum_and_follow_their_seed():
    points = frustum_points(stream(3))
    assert points.shape == (72, 3)
    assert torch.equal(points, frustum_points(stream(3)))
    assert not torch.equal(points, frustum_points(stream(4)))
    assert bool(((points[:, :2] >= 0) & (points[:, :2] <= 1)).all())
    assert bool(((points[:, 2] >= NEAR) & (points[:, 2] <= FAR)).all())
    # strata: every ninth of the width, quarter of the depth's logarithm and half of the height has its share
    cells = torch.stack(
        [
            points[:, 0] * 9,
            (points[:, 2] / NEAR).log() / math.log(FAR / NEAR) * 4,
            points[:, 1] * 2,
        ],
        -1,
    )
    assert len(cells.long().unique(dim=0)) == 72


def test_an_identical_camera_sees_every_point():
    here, points = cameras((1.0, 2.0, 0.5)), frustum_points(stream(0))
    weights = coverage(here[None], here[None], points, K)[0, 0]
    xy = (points[:, :2] - 0.5) / K.diagonal()[:2] * points[:, 2:]
    distance = torch.cat([xy, points[:, 2:]], -1).square().sum(-1)
    assert torch.allclose(weights, 1 / (1 + distance / HALF_WEIGHT**2), atol=1e-5)


def test_facing_away_sees_nothing():
    points = frustum_points(stream(0))
    weights = coverage(cameras((0, 0, 0))[None], cameras((0, 0, math.pi), (0, 20, 0))[None], points, K)
    assert not weights.any()
    assert not similarity(weights).any()


def test_a_nearer_view_weighs_more():
    points = frustum_points(stream(0))
    weights = coverage(cameras((0, 0, 0))[None], cameras((0, 0, 0), (0, -2, 0), (0, -6, 0))[None], points, K)
    near, back, far = similarity(weights)[0].tolist()
    assert 1 > near > back > far > 0


@given(st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_coverage_and_greedy_equal_slow_loops(seed: int):
    queries, memory = random_cameras(2, seed), random_cameras(9, seed + 1)
    points = frustum_points(stream(seed), 3, 2, 2)
    weights = coverage(queries[None], memory[None], points, K)
    assert torch.allclose(weights[0].double(), slow_coverage(queries, memory, points, K).double(), atol=2e-5)
    valid = torch.rand(1, 9, generator=torch.Generator().manual_seed(seed)) < 0.6
    picks, good = greedy(weights, valid, 9)[0].tolist(), int(valid.sum())
    assert picks[:good] == slow_greedy(weights[0], valid[0].tolist(), good)
    assert sorted(picks) == list(range(9))  # nothing is said of the order of those that are not valid


def test_worlds_of_a_batch_do_not_meet():
    points = frustum_points(stream(1))
    queries, memory = random_cameras(4, 1).view(2, 2, 4, 4), random_cameras(10, 2).view(2, 5, 4, 4)
    together = coverage(queries, memory, points, K)
    apart = torch.cat([coverage(queries[i : i + 1], memory[i : i + 1], points, K) for i in range(2)])
    assert torch.allclose(together, apart, atol=1e-6)
    valid = torch.ones(2, 5, dtype=torch.bool)
    picks = [greedy(apart[i : i + 1], valid[:1], 3)[0].tolist() for i in range(2)]
    assert greedy(together, valid, 3).tolist() == picks


def test_what_the_window_shows_need_not_be_remembered():
    weights = torch.tensor([[[0.9, 0.9, 0.0, 0.0], [0.0, 0.0, 0.5, 0.4]]])
    window = torch.tensor([[[1.0, 0.8, 0.0, 0.0], [0.2, 0.9, 0.0, 0.0]]])
    left = unseen(weights, window)
    assert torch.allclose(left, torch.tensor([[[0.0, 0.09, 0.0, 0.0], [0.0, 0.0, 0.5, 0.4]]]))
    valid = torch.ones(1, 2, dtype=torch.bool)
    assert (greedy(weights, valid, 1).item(), greedy(left, valid, 1).item()) == (0, 1)
    assert torch.equal(unseen(weights, window[:, :0]), weights)


def test_greedy_picks_complementary_views():
    # two frames see the left half well, one sees the right half less well: coverage takes one of each side
    left, right = [0.9] * 10 + [0.0] * 10, [0.0] * 10 + [0.5] * 10
    weights = torch.tensor([[left, [0.89] * 10 + [0.0] * 10, right]])
    valid = torch.ones(1, 3, dtype=torch.bool)
    assert greedy(weights, valid, 2)[0].tolist() == [0, 2]
    assert greedy(weights, valid, 3)[0].tolist() == [0, 2, 1]


def test_invalid_frames_come_last():
    weights = torch.tensor([[[0.9, 0.9], [0.1, 0.1], [0.8, 0.8], [0.0, 0.0]]])
    valid = torch.tensor([[False, True, False, True]])
    assert greedy(weights, valid, 2)[0].tolist() == [1, 3]
    assert sorted(greedy(weights, valid, 4)[0].tolist()[2:]) == [0, 2]


def test_greedy_of_none_and_of_too_many():
    weights, valid = torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    assert greedy(weights, valid, 0).shape == (2, 0)
    with pytest.raises(ValueError, match="cannot choose 4 of 3 frames"):
        greedy(weights, valid, 4)


def bank(count: int) -> History:
    """Latents that turn round and round in one place."""
    history = History(limit=4096, hot=8, sink=4)
    history.append(torch.zeros(count, 1), cameras(*[(0, 0, 0.4 * i) for i in range(count)]), (None,) * count)
    return history


SHAPE = ChunkShape(new=2, frames=2, window=4, memory=3, sink=1)
POINTS = frustum_points(stream(9))


def plan(count: int, shape: ChunkShape = SHAPE, **less: int) -> ContextPlan:
    return select(bank(count), shape, cameras((0, 0, 0), (0, 0, 0.1)), POINTS, K, **less)[0]


@pytest.mark.parametrize("clean", [0, 2])
@pytest.mark.parametrize("count", range(2, 24))
def test_plans_add_up(count: int, clean: int):
    shape = ChunkShape(new=2, frames=2, clean=clean, window=4, memory=3, sink=1)
    made, signals = select(bank(count), shape, cameras((0, 0, 0), (0, 0, 0.1)), POINTS, K)
    kept = count - clean
    assert made.window == tuple(range(max(0, kept - 4), kept))
    assert made.sink == ((0,) if kept > 4 else ())
    assert signals.candidates == max(0, kept - 5)
    assert len(made.memory) == min(3, signals.candidates) == len(signals.similarity)
    assert made.rows == sorted(set(made.rows))
    assert set(made.memory) <= set(range(1, max(1, kept - 4)))
    positions, kinds = made.tables(clean)
    assert positions.tolist() == list(range(-len(made.rows) - clean, -clean))
    names = ["sink"] * len(made.sink) + ["memory"] * len(made.memory) + ["recent"] * len(made.window)
    assert [KINDS[i] for i in kinds.tolist()] == names
    assert made.reason == "full compute"


def test_memory_is_what_the_coming_views_show():
    # places 0 to 19 look at 0.4 i radians; those that look ahead of 0.0 .. 0.1 are 0, 1, 15, 16 (6.0 and 6.4 of 6.28)
    made, signals = select(bank(24), SHAPE, cameras((0, 0, 0), (0, 0, 0.1)), POINTS, K)
    assert set(made.memory) <= {1, 2, 14, 15, 16, 17}
    assert all(s > 0.2 for s in signals.similarity)
    away, other = select(bank(24), SHAPE, cameras((0, 0, math.pi), (0, 0, math.pi)), POINTS, K)
    assert set(away.memory) <= {6, 7, 8, 9, 10}
    assert other.similarity != signals.similarity


def test_memory_serves_the_first_and_the_last_of_the_coming_views():
    turning = cameras((0, 0, 2.6), (0, 0, 3.5), (0, 0, 4.6))  # the window looks along 0.1 to 1.3
    made, _ = select(bank(20), ChunkShape(new=3, frames=3, window=4, memory=2), turning, POINTS, K)
    looks = [(0.4 * i) % math.tau for i in made.memory]
    assert min(abs(look - 2.6) for look in looks) < 0.5
    assert min(abs(look - 4.6) for look in looks) < 0.5


def test_newest_is_the_similarity_to_the_last_latent_before_the_chunk():
    look = cameras((0, 0, 0.4 * 9), (0, 0, 0.4 * 9))
    _, signals = select(bank(10), SHAPE, look, POINTS, K)
    own = coverage(look[None], look[None, :1], POINTS, K)
    assert signals.newest == pytest.approx(float(similarity(own)), abs=1e-5)
    _, behind = select(bank(10), SHAPE, cameras((0, 0, 0.4 * 9 + math.pi), (0, 0, 0.4 * 9 + math.pi)), POINTS, K)
    assert behind.newest == 0


def test_settings_only_ever_reduce():
    assert (len(plan(20, window=2).window), len(plan(20, memory=1).memory)) == (2, 1)
    assert plan(20, memory=0).memory == ()
    assert select(bank(20), SHAPE, cameras((0, 0, 0)), POINTS, K, memory=0, reason="why")[0].reason == "why"
    assert plan(20, window=99, memory=99).rows == plan(20).rows
    # a shorter window leaves more to retrieve from
    assert set(plan(20, window=1).memory) <= set(range(1, 19))


@pytest.mark.parametrize(("count", "less", "text"), [(20, {"memory": 0}, "at most 0 may"), (4, {}, "0 latents lie")])
def test_recall_of_nothing_is_refused(count: int, less: dict[str, int], text: str):
    look = cameras((0, 0, 0))
    with pytest.raises(InputError, match=rf"recall names \[1\], but this chunk brings nothing back.*{text}"):
        select(bank(count), SHAPE, look, POINTS, K, recall=[1], **less)
    assert select(bank(count), SHAPE, look, POINTS, K, recall=[], **less)[0].memory == ()


def test_an_empty_bank_gives_an_empty_plan():
    made, signals = select(History(), SHAPE, cameras((0, 0, 0)), POINTS, K)
    assert (made.rows, signals.similarity, signals.newest, signals.candidates) == ([], (), 0.0, 0)
    assert made.tables()[0].shape == (0,)


def test_points_decide_and_can_be_given():
    # points in the left strip of the view alone: frames that look to the left cover them best
    left = POINTS * torch.tensor([0.1, 1.0, 1.0])
    right = left + torch.tensor([0.9, 0.0, 0.0])
    look, one = cameras((0, 0, 2.0), (0, 0, 2.0)), ChunkShape(new=1, frames=1, window=4, memory=1)
    chosen = [select(bank(16), one, look, points, K)[0].memory[0] for points in (left, right)]
    assert chosen[0] < 5 <= chosen[1]
