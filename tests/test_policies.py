"""Signals before a chunk, and the policies that shorten its context by them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import worldstride.worlds
from walking import FORWARD, TURN, same, select
from worldstride import Acceleration, Action, Engine, camera
from worldstride.bench import gate
from worldstride.bench.walks import FIRST_SEED, TRAJECTORIES, Trajectory, trajectory
from worldstride.camera import camera_from_pose, intrinsics_from_fov
from worldstride.cli import main
from worldstride.context import planning
from worldstride.context.dynamics import Dynamics, latent_change, window_length
from worldstride.context.gate import Gate, PoseScores
from worldstride.context.history import History
from worldstride.context.planning import Wanted, observe_change, plan_context, plan_contexts, pose_scores
from worldstride.context.policy import (
    PUBLISHED,
    PolicyState,
    PoseView,
    SpatialMemory,
    TemporalWindow,
)
from worldstride.context.retrieval import frustum_points
from worldstride.context.selection import Lookup
from worldstride.context.similarity import (
    View,
    added_share,
    ball_view,
    clip_similarity,
    frustum_view,
    similarity,
    visible,
)
from worldstride.errors import InputError
from worldstride.noise import stream
from worldstride.protocol import ChunkShape

K = intrinsics_from_fov(math.radians(80))
VIEWS = {"ball": ball_view(torch.Generator().manual_seed(0)), "frustum": frustum_view(far=8.0)}


def ahead(i: Tensor) -> Tensor:
    """Cameras 0.08 m apart, the published step of a walk."""
    return camera_from_pose(torch.stack([0 * i, 0.08 * i, 0 * i, 0 * i], -1))


def turning(i: Tensor) -> Tensor:
    """Cameras 3 degrees apart, the published step of a turn."""
    return camera_from_pose(torch.stack([0 * i, 0 * i, math.radians(3) * i, 0 * i], -1))


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_similarity_is_the_share_of_points_that_both_see(view: View):
    poses = torch.randn(7, 4, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 1.0, 1.0, 0.1])
    where = camera_from_pose(poses)
    found = similarity(visible(where[:2], where, view))
    assert found.shape == (2, 7)
    assert found[0, 0] == found[1, 1] == 1
    assert bool(view.contains(view.points).all())
    for q in range(2):
        for n in range(7):
            lifted = torch.cat([view.points, torch.ones(len(view.points), 1)], -1).double()
            local = (torch.linalg.inv(where[n].double()) @ where[q].double() @ lifted.T).T[:, :3]
            assert float(found[q, n]) == pytest.approx(float(view.contains(local).float().mean()), abs=2e-3)
    behind = camera_from_pose(torch.tensor([[0.0, 0.0, math.pi, 0.0]]))
    assert not bool(visible(camera_from_pose(torch.zeros(1, 4)), behind, view).any())


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_no_point_is_missed_where_cameras_are_ruled_out_by_the_corners_of_their_views(view: View):
    spread = torch.tensor([4.0, 4.0, 3.0, 0.5])
    where = camera_from_pose(torch.randn(2, 60, 4, generator=torch.Generator().manual_seed(1)) * spread)
    found = visible(where[:, :4], where, view)
    for world in range(2):
        relative = (camera.invert(where[world])[None] @ where[world, :4, None]).double()  # [4, 60, 4, 4]
        points = (relative[..., None, :3, :3] @ view.points.double()[..., None])[..., 0] + relative[..., None, :3, 3]
        assert (view.contains(points) != found[world]).float().mean() < 1e-5  # rounding at the very edge
    assert 0.1 < found.any(-1).float().mean() < 0.9  # there is something to miss, and something to rule out


@pytest.mark.parametrize(("walk", "back", "published"), [(turning, 4, 0.775), (turning, 8, 0.584), (ahead, 8, 0.775)])
def test_the_ball_gives_the_published_similarities(walk: Callable[[Tensor], Tensor], back: int, published: float):
    queries, clip = walk(torch.arange(20.0, 24)), walk(torch.tensor([20.0 - back, 22.0 - back]))
    assert float(similarity(visible(queries, clip, VIEWS["ball"])).mean()) == pytest.approx(published, abs=0.03)


def test_the_ball_is_bounded_by_angles_and_by_its_radius():
    view = ball_view(torch.Generator().manual_seed(3), radius=2.0)
    x, y, z = view.points.unbind(-1)
    assert float(torch.atan2(x, z).abs().max()) == pytest.approx(math.radians(30), abs=0.05)
    assert float(torch.atan2(y, (x * x + z * z).sqrt()).abs().max()) == pytest.approx(math.radians(17.5), abs=0.05)
    assert 1.8 < float(view.points.norm(dim=-1).max()) <= 2
    # uniform in the ball: the cube of the distance is uniform
    assert float((view.points.norm(dim=-1) / 2).pow(3).mean()) == pytest.approx(0.5, abs=0.03)
    assert 1200 < len(view.points) < 4000  # of 50 000: the view's share of all directions


def test_clips_are_averaged_and_a_cut_one_is_left_out():
    per_latent = torch.arange(10.0).expand(2, 10)
    assert clip_similarity(per_latent, 4).tolist() == [1.5, 5.5]
    assert clip_similarity(per_latent[:, :3], 4).tolist() == []


@pytest.mark.parametrize(
    ("old", "newest", "open_before", "published", "relative"),
    [
        (0.775, 0.877, False, True, False),  # walking straight on: the published gate takes it for a revisit
        (0.584, 0.775, False, False, False),  # turning over new ground
        (0.93, 0.77, False, True, True),  # coming back
        (0.66, 0.60, False, False, False),
        (0.66, 0.60, True, False, True),  # once open, it eases
        (None, 0.9, True, False, False),
    ],
)
def test_the_gate(old: float | None, newest: float, open_before: bool, published: bool, relative: bool):
    assert Gate(0.7).decide(old, newest, open_before) is published
    assert Gate(0.7, 0.05, 0.05).decide(old, newest, open_before) is relative


def test_dynamics_follow_the_equations():
    state = Dynamics()
    assert window_length(state, 8, 1.0) == 8
    for change in (2.0, 4.0, 1.0):
        state = state.observe(change, 0.25)
    assert state.average == pytest.approx(0.25 * 1 + 0.75 * (0.25 * 4 + 0.75 * 2))
    assert state.median == 2
    assert state.observe(9, 0.5, kept=2).changes == (1.0, 9)
    a, b = torch.zeros(4, 3), torch.full((4, 3), 2.0)
    assert float(latent_change(a, b)) == 4


@pytest.mark.parametrize(
    ("average", "scale", "length", "opposite"),
    [(1.0, 1.0, 4, 4), (3.0, 1.0, 2, 6), (0.0, 1.0, 8, 1), (100.0, 1.0, 1, 8), (1.0, 3.0, 6, 2), (1.0, 0.01, 1, 8)],
)
def test_the_window_shrinks_with_change_or_grows(average: float, scale: float, length: int, opposite: int):
    state = Dynamics(average, (1.0, 1.0, 1.0))
    assert window_length(state, 8, scale) == length
    assert window_length(state, 8, scale, opposite=True) == opposite


def test_a_still_world_keeps_its_window():
    still = Dynamics(0.0, (0.0, 0.0))
    assert (window_length(still, 8, 1.0), window_length(still, 8, 1.0, opposite=True)) == (8, 1)


SHAPE = ChunkShape(new=2, frames=2, window=4, memory=3, sink=1)
POINTS = frustum_points(stream(9))


def bank(where: Tensor, values: Tensor | None = None) -> History:
    history = History(limit=4096, hot=8, sink=4)
    latents = torch.zeros(len(where), 1) if values is None else values[:, None]
    history.append(latents, where, (None,) * len(where))
    return history


def test_what_memory_adds_is_what_the_window_does_not_show():
    points = torch.tensor([[[True, True, False, False], [False, False, True, False]]])  # one view, two cameras
    assert float(added_share(points, torch.tensor([[[True, False, False, True]]]))) == 0.5
    assert float(added_share(points[:, :0], points)) == 0
    assert float(added_share(points, points[:, :0])) == 0.75


def wanted(history: History, coming: Tensor, state: PolicyState | None = None, **levers: Any) -> Wanted:
    return Wanted(Lookup(history, SHAPE, coming, POINTS, K), state or PolicyState(), **levers)


@pytest.mark.parametrize("spatial", [SpatialMemory(), SpatialMemory("similarity", 0.5, margin=0.05)])
def test_exploring_drops_memory_and_coming_back_keeps_it(spatial: SpatialMemory):
    state = PolicyState()
    out, more = turning(torch.arange(0.0, 60, 3)), turning(torch.tensor([60.0, 63]))
    view = PoseView().look(K)
    plan, signals, state = plan_context(wanted(bank(out), more, state, spatial=spatial, view=view))
    assert plan.memory == ()
    assert len(plan.window) == 4
    assert plan.sink == (0,)
    assert plan.reason.startswith("exploring, memory dropped: old views show 0.")
    assert signals.pose is not None and signals.pose.old is not None
    assert signals.pose.old < signals.pose.newest
    assert (signals.metres, signals.degrees) == pytest.approx((0, 9), abs=0.01)
    assert not state.revisiting
    there = turning(torch.cat([torch.arange(0.0, 60, 3), torch.arange(57.0, 30, -3)]))
    coming = turning(torch.tensor([27.0, 24]))
    plan, signals, state = plan_context(wanted(bank(there), coming, state, spatial=spatial, view=view))
    assert len(plan.memory) == 3
    assert state.revisiting
    assert plan.reason == "full compute"


def test_change_shortens_the_window_and_the_state_moves_on():
    where, state = ahead(torch.arange(12.0)), PolicyState()
    for values in (torch.zeros(12), torch.cat([torch.zeros(10), torch.ones(2)])):
        state = observe_change(bank(where, values), SHAPE, 0.5, state)
    assert state.dynamics.changes == (0, 1)
    coming = ahead(torch.arange(12.0, 14))
    plan, signals, after = plan_context(wanted(bank(where), coming, state, temporal=TemporalWindow(0.5)))
    assert after is state
    assert (signals.change, signals.dynamics) == (1, 0.5)
    assert len(plan.window) == 2  # 4 x 0.5 / (0.5 + 0.5)
    assert plan.reason == "window 2 of 4: change 0.5, median 0.5"
    assert observe_change(bank(where[:3]), SHAPE, 0.5, PolicyState()) == PolicyState()  # too short for two chunks


def test_no_policy_is_the_plain_plan():
    where, state = turning(torch.arange(20.0)), PolicyState()
    coming = turning(torch.tensor([20.0, 21]))
    plan, signals, after = plan_context(wanted(bank(where), coming, state))
    assert (plan, signals) == select(bank(where), SHAPE, coming, POINTS, K)
    assert after is state
    levers: dict[str, Any] = {"temporal": TemporalWindow(), "spatial": SpatialMemory(), "view": VIEWS["frustum"]}
    empty, signals, _ = plan_context(wanted(History(), coming, state, **levers))
    assert empty.rows == []
    assert (signals.change, signals.pose) == (None, PoseScores())


def test_worlds_are_planned_together_as_they_are_alone():
    """Histories of several lengths, other policies, points and views in one call."""
    out = turning(torch.cat([torch.arange(0.0, 60, 3), torch.arange(57.0, 30, -3)]))
    other = Lookup(bank(out[:16]), SHAPE, ahead(torch.tensor([3.0, 4])), frustum_points(stream(9)), 1.1 * K, memory=1)
    changed = observe_change(bank(out, torch.arange(29.0)), SHAPE, 0.5, PolicyState())
    every = [
        wanted(bank(out[:16]), turning(torch.tensor([48.0, 51]))),
        Wanted(other, PolicyState(), view=VIEWS["ball"]),
        wanted(bank(out), turning(torch.tensor([27.0, 24])), spatial=SpatialMemory(), view=VIEWS["frustum"]),
        wanted(bank(out), turning(torch.tensor([99.0, 95])), spatial=SpatialMemory(), view=frustum_view(far=8.0)),
        wanted(bank(out), turning(torch.tensor([9.0, 5])), changed, temporal=TemporalWindow(0.5), view=VIEWS["ball"]),
        wanted(bank(out[:16]), turning(torch.tensor([27.0, 24])), view=VIEWS["frustum"]),
        wanted(bank(out[:1]), turning(torch.tensor([3.0, 6])), view=VIEWS["frustum"]),
        wanted(History(), turning(torch.tensor([3.0, 6])), spatial=SpatialMemory(), view=VIEWS["frustum"]),
    ]
    together = plan_contexts(every)
    for one, (plan, signals, state) in zip(every, together, strict=True):
        alone = plan_context(one)
        assert (plan, state) == (alone[0], alone[2])
        assert signals.pose == alone[1].pose
        assert signals.candidates == alone[1].candidates
        for name in ("similarity", "newest", "metres", "degrees"):
            assert getattr(signals, name) == pytest.approx(getattr(alone[1], name), abs=1e-6)
    assert len({plan.memory for plan, _, _ in together}) > 4
    history = bank(out)
    assert together[2][1].pose == pose_scores(history.cameras(), SHAPE, every[2].lookup.coming, VIEWS["frustum"])
    with pytest.raises(InputError, match="recall must name"):
        plan_contexts([every[0], replace(every[0], lookup=replace(every[0].lookup, recall=[0]))])


def test_many_worlds_are_scored_in_parts(monkeypatch: pytest.MonkeyPatch):
    every = [wanted(bank(turning(torch.arange(12.0) + i)), ahead(torch.tensor([1.0, 2])), view=VIEWS["frustum"]) for i
             in range(5)]  # fmt: skip
    whole = [signals.pose for _, signals, _ in plan_contexts(every)]
    monkeypatch.setattr(planning, "_AT_MOST", 2 * 12 * 1000 * 2)
    assert [signals.pose for _, signals, _ in plan_contexts(every)] == whole
    assert len(set(whole)) == 5


@pytest.mark.parametrize("change", [{"reach": 9.0}, {"near": 0.2}, {"angular": True}, {"points": torch.zeros(1, 3)}])
def test_views_are_equal_that_show_the_same(change: dict[str, Any]):
    view = VIEWS["frustum"]
    assert view.equals(frustum_view(far=8.0))
    assert not view.equals(replace(view, **change))


POLICIES = Acceleration(
    "policies", temporal=TemporalWindow(weight=0.7, opposite=True), spatial=SpatialMemory(threshold=0.4)
)


def test_sessions_under_policies_fork_and_resume_bit_for_bit(tiny_engine: Engine, tmp_path: Path):
    session = tiny_engine.new(seed=3)
    session.acceleration = POLICIES
    reports = [session.step(move).report for move in (FORWARD, TURN, TURN, FORWARD)]
    assert all(r.signals.pose is not None for r in reports)
    assert reports[-1].signals.dynamics is not None
    session.save(tmp_path / "a.world")
    resumed, forked = worldstride.open(tmp_path / "a.world", engine=tiny_engine), session.fork()
    assert resumed.acceleration == POLICIES
    for move in (FORWARD, TURN, Action(frozenset({"KeyS"}))):
        chunks = [one.step(move) for one in (session, resumed, forked)]
        assert same(chunks[0], chunks[1])
        assert same(chunks[0], chunks[2])
        assert chunks[0].report.signals == chunks[1].report.signals == chunks[2].report.signals
        assert chunks[0].report.context == chunks[1].report.context


def test_settings_go_through_json():
    assert Acceleration.from_json(POLICIES.to_json()) == POLICIES
    published = {"score": "similarity", "threshold": 0.7, "hysteresis": 0}
    assert Acceleration.from_json({"spatial": published}).spatial == PUBLISHED


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"spatial": {"treshold": 0.5}}, r"acceleration.spatial: unknown setting 'treshold' .did you mean 'threshold'"),
        ({"spatial": {"threshold": 1.5}}, "acceleration.spatial.threshold must be a number at least 0 and at most 1"),
        ({"spatial": {"margin": "wide"}}, "acceleration.spatial.margin must be a number"),
        ({"spatial": {"margin": 0.1}}, "spatial.margin goes with score 'similarity', not with 'added'"),
        ({"spatial": {"score": "old"}}, "spatial.score must be one of added, known, similarity, got 'old'"),
        ({"temporal": {"weight": 0}}, "acceleration.temporal.weight must be a number above 0 and at most 1, got 0"),
        ({"temporal": {"scale": math.nan}}, "acceleration.temporal.scale must be a number"),
        ({"temporal": 3}, "acceleration.temporal must be a table of settings, got int"),
    ],
)
def test_bad_policies_are_refused(values: dict[str, object], message: str):
    with pytest.raises(InputError, match=message):
        Acceleration.from_json(values)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ball_view(torch.Generator(), count=0),
        lambda: ball_view(torch.Generator(), width=180),
        lambda: frustum_view(columns=0),
        lambda: frustum_view(near=3, far=2),
    ],
)
def test_bad_views_are_refused(make: Callable[[], View]):
    with pytest.raises(InputError):
        make()


def chunk_signals(**values: float) -> gate.ChunkSignals:
    return gate.ChunkSignals("walk", 1, PoseScores(**values), 0.0)


def test_agreement_counts():
    truth, decided = [True, True, False, False], [True, False, True, False]
    assert gate.agreement(truth, decided) == {"precision": 0.5, "recall": 0.5}
    assert math.isnan(gate.agreement([False], [False])["precision"])
    assert gate.area_under_curve(truth, [0.9, 0.5, 0.5, 0.1]) == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert math.isnan(gate.area_under_curve([True], [1.0]))


def test_hysteresis_ends_with_its_trajectory():
    settings = SpatialMemory(threshold=0.5, hysteresis=0.2)
    chunks = [chunk_signals(added=a) for a in (0.4, 0.6, 0.4, 0.2, 0.4)]
    assert gate.decisions(chunks, settings) == [False, True, True, False, False]
    apart = [chunk_signals(added=0.6), dataclasses.replace(chunk_signals(added=0.4), world=2)]
    assert gate.decisions(apart, settings) == [True, False]


def test_going_back_is_a_revisit_and_what_cameras_add_tells_so():
    chunks = gate.observe(VIEWS["frustum"], ["out and back", "spin"], 2, 64, window=4)
    out = [c for c in chunks if c.trajectory == "out and back"]
    way = len(out) // 4
    assert all(c.truth < gate.NEEDED for c in out[: way // 2])
    assert all(c.truth > gate.NEEDED for c in out[-way // 2 :])
    truth = [c.truth >= gate.NEEDED for c in chunks]
    assert gate.area_under_curve(truth, [c.pose.added or 0.0 for c in chunks]) > 0.9
    with pytest.raises(InputError, match="at least 12 frames"):
        gate.observe(VIEWS["frustum"], ["walk"], 1, 11, window=4)


@pytest.mark.parametrize("kind", TRAJECTORIES)
def test_trajectories_have_the_frames_asked_for(kind: Trajectory):
    scene = worldstride.worlds.scene_from_seed("courtyard", [FIRST_SEED])
    poses = trajectory(scene, kind, 7, 31, FIRST_SEED)
    assert poses.shape == (1, 31, 4)
    assert bool(poses.isfinite().all())
    if kind == "out and back":
        assert torch.equal(poses[0, 7:19], poses[0, 19:].flip(0))
    if kind == "stand":
        assert torch.equal(poses, poses[:, :1].expand_as(poses))
    if kind == "random keys":
        assert torch.equal(poses, trajectory(scene, kind, 7, 31, FIRST_SEED))
        assert not torch.equal(poses, trajectory(scene, kind, 7, 31, FIRST_SEED + 1))


def test_the_gate_command_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "gate.json"
    arguments = ["gate", "courtyard", "--weights", "random", "--worlds", "1", "--frames", "24", "--out", str(out)]
    assert main(arguments) == 0
    result = json.loads(out.read_text())
    assert {r["gate"] for r in result["rows"]} == set(result["gates"])
    assert "published" in capsys.readouterr().out
    assert main(["gate", "courtyard", "--weights", "random", "--worlds", "0"]) == 2
    assert "--worlds must be at least 1" in capsys.readouterr().err
