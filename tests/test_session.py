"""Sessions: resuming, forking and sharing an engine change nothing; failures leave a world as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import worldstride
from joint_model import TEXT, JointModel, joint_engine
from walking import FORWARD, MOVES, TURN, first_frames, same, walk
from worldstride import Acceleration, Action, Engine, Session, Trajectory
from worldstride.camera import intrinsics_from_fov
from worldstride.errors import InputError
from worldstride.noise import normal

Start = Callable[..., Session]


@pytest.fixture(params=["courtyard", "joint", "guided"])
def start(request: pytest.FixtureRequest, tiny_engine: Engine, joint: Engine, guided: Engine) -> Start:
    """Begins a session of one of the small engines."""

    def begin(noise_seed: int = 3) -> Session:
        if request.param == "courtyard":
            return tiny_engine.new(seed=7, noise_seed=noise_seed)
        engine = joint if request.param == "joint" else guided
        prompt = {"text": torch.arange(TEXT).float() / TEXT}
        return engine.open(first_frames(), torch.eye(4)[None], prompt, seed=7, noise_seed=noise_seed)

    return begin


def assert_same_state(a: Session, b: Session) -> None:
    assert (a.frame, a._state.chunk, len(a.history)) == (b.frame, b._state.chunk, len(b.history))
    assert np.array_equal(a.camera, b.camera)
    for x, y in zip(a.history.entries, b.history.entries, strict=True):
        assert (x.index, x.led) == (y.index, y.led)
        assert torch.equal(x.latent, y.latent)
        assert torch.equal(x.camera, y.camera)
    assert a._state.decoder.keys() == b._state.decoder.keys()
    assert all(torch.equal(v, b._state.decoder[k]) for k, v in a._state.decoder.items())


def test_a_replay_gives_the_same_bits(start: Start):
    a, b = start(), start()
    for move in MOVES:
        assert same(a.step(move), b.step(move))
    assert_same_state(a, b)


def test_frames_follow_the_chunk_shapes(start: Start):
    session = start()
    begun = session.frame
    for k in range(3):
        shape = session.engine.model.chunk(k)
        chunk = session.step(FORWARD)
        assert chunk.frames.dtype == np.uint8
        assert len(chunk.frames) == len(chunk.cameras) == chunk.report.frames == shape.frames
        assert (chunk.report.index, chunk.report.first_frame) == (k, begun)
        assert np.array_equal(session.camera, chunk.cameras[-1])
        begun += shape.frames
        assert session.frame == begun


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_save_goes_on_as_if_never_stopped(start: Start, after: int, tmp_path: Path):
    session = start()
    for move in MOVES[:after]:
        session.step(move)
    session.save(tmp_path / "a.world")
    opened = worldstride.open(tmp_path / "a.world", engine=session.engine)
    assert_same_state(session, opened)
    for move in MOVES[after:]:
        assert same(session.step(move), opened.step(move))
    assert_same_state(session, opened)


def test_the_full_model_resumes_and_forks_bit_for_bit(full_engine: Engine, tmp_path: Path):
    session = full_engine.new(seed=11)
    session.step(FORWARD)
    session.save(tmp_path / "a.world")
    fork, opened = session.fork(), worldstride.open(tmp_path / "a.world")
    assert opened.engine is not full_engine
    truth = [session.step(move) for move in (TURN, FORWARD)]
    assert all(same(t, fork.step(move)) for t, move in zip(truth, (TURN, FORWARD), strict=True))
    assert all(same(t, opened.step(move)) for t, move in zip(truth, (TURN, FORWARD), strict=True))


def test_a_fork_is_independent(start: Start):
    session, undisturbed = start(), start()
    session.step(FORWARD)
    undisturbed.step(FORWARD)
    fork = session.fork()
    assert_same_state(fork, session)
    fork.step(TURN)
    fork.acceleration = "steps-2"
    assert session.acceleration.name == "off"
    assert_same_state(session, undisturbed)
    assert same(session.step(FORWARD), undisturbed.step(FORWARD))


def test_a_fork_with_another_noise_seed_dreams_something_else(start: Start):
    session = start()
    session.step(FORWARD)
    fork = session.fork(noise_seed=99)
    again = session.fork(noise_seed=99)
    ours, theirs = session.step(FORWARD), fork.step(FORWARD)
    assert not np.array_equal(ours.frames, theirs.frames)
    assert np.array_equal(ours.cameras, theirs.cameras)
    assert same(theirs, again.step(FORWARD))


def test_sessions_share_an_engine_without_meeting(start: Start):
    alone = [[start(seed)] for seed in (1, 2)]
    chunks = [[session.step(move) for move in MOVES[:3]] for (session,) in alone]
    a, b = start(1), start(2)
    for i, move in enumerate(MOVES[:3]):
        assert same(a.step(move), chunks[0][i])
        assert same(b.step(move), chunks[1][i])
    assert not np.array_equal(chunks[0][-1].frames, chunks[1][-1].frames)


def test_acceleration_acts_on_the_next_chunk_and_off_restores(start: Start):
    session, plain = start(), start()
    assert same(session.step(FORWARD), plain.step(FORWARD))
    before = session.fork()
    session.acceleration = "steps-2"
    chunk = session.step(FORWARD)
    assert [len(chunk.report.evaluations), chunk.report.acceleration] == [2, "steps-2"]
    assert chunk.report.steps_reason == "2 steps asked for by 'steps-2'"
    assert not np.array_equal(chunk.frames, plain.fork().step(FORWARD).frames)
    before.acceleration = "steps-2"
    before.acceleration = "off"
    restored, full = before.step(FORWARD), plain.step(FORWARD)
    assert same(restored, full)
    assert restored.report.steps_reason == restored.report.context.reason == "full compute"


def test_settings_reduce_the_context_and_say_so(tiny_engine: Engine):
    session = tiny_engine.new(seed=7)
    for move in MOVES[:2]:
        session.step(move)
    session.acceleration = Acceleration("less", shift=3.0, window=2, memory=1)
    report = session.step(FORWARD).report
    assert (len(report.context.window), len(report.context.memory), report.context_latents) == (2, 1, 3)
    assert report.context.reason == "window 2 and memory 1 asked for"
    assert report.steps_reason == "shift 3 asked for by 'less'"


def test_context_and_chunk_ranks_never_meet(joint: Engine, monkeypatch: pytest.MonkeyPatch):
    ranks = []
    plain = JointModel.velocity

    def spy(self, x, sigma, inputs, context, attend):
        ranks.append((context.ranks.tolist(), inputs.ranks.tolist()))
        return plain(self, x, sigma, inputs, context, attend)

    monkeypatch.setattr(JointModel, "velocity", spy)
    session = joint.open(first_frames(), torch.eye(4)[None])
    session.step()
    session.step()
    assert ranks[0] == ([], list(range(-1, 14)))
    assert ranks[-1] == ([-9, -8, -7, -6, -5], list(range(-4, 10)))


def test_given_noise_is_honoured(start: Start):
    session = start()
    model, shape = session.engine.model, session.engine.model.chunk(0)
    size = (shape.clean + shape.new, *model.latent_shape)
    fork, other = session.fork(), session.fork()
    own = normal((1, *size), session._state.noise_seed, 0, 0)[0]
    plain = session.step(FORWARD)
    assert same(plain, fork.step(FORWARD, noise=own))
    assert not np.array_equal(plain.frames, other.step(FORWARD, noise=normal(size, 5)).frames)
    later = session.fork()
    size = (model.chunk(1).clean + model.chunk(1).new, *model.latent_shape)
    theirs = fork.step(FORWARD, noise=normal((1, *size), session._state.noise_seed, 1, 0)[0])
    assert same(session.step(FORWARD), theirs)
    if len(own) == len(normal(size, 0)):  # a chunk's noise is its own
        assert not np.array_equal(later.step(FORWARD, noise=own).frames, theirs.frames)


def test_noise_of_another_shape_is_refused(start: Start):
    session = start()
    shape = session.engine.model.chunk(0)
    with pytest.raises(InputError, match=r"noise of chunk 0 must have shape \["):
        session.step(noise=torch.zeros(shape.new + shape.clean + 1, *session.engine.model.latent_shape))
    assert same(session.step(FORWARD), start().step(FORWARD))


def test_one_action_a_frame_equals_a_held_one(start: Start):
    a, b = start(), start()
    frames = a.engine.model.chunk(0).frames
    assert same(a.step(FORWARD), b.step([FORWARD] * frames))
    mixed, held = a.fork(), a.fork()
    frames = a.engine.model.chunk(1).frames
    turned = mixed.step((FORWARD,) * (frames - 1) + (TURN,))
    straight = held.step(FORWARD)
    assert np.array_equal(turned.cameras[:-1], straight.cameras[:-1])
    assert not np.array_equal(turned.cameras[-1], straight.cameras[-1])


def test_neither_action_nor_cameras_stands_still(start: Start):
    session = start()
    before = session.camera
    assert np.allclose(session.step().cameras, before, atol=1e-6)


def test_cameras_in_place_of_actions(start: Start):
    session, fork = start(), start()
    moved = session.step(FORWARD)
    given = fork.step(cameras=moved.cameras)
    assert np.array_equal(given.cameras, moved.cameras)
    assert all(entry.led is None for entry in fork.history.entries)
    where = torch.from_numpy(session.camera) @ walk(session.engine.model.chunk(1).frames)
    chunk = session.step(cameras=where)
    assert np.array_equal(chunk.cameras, where.numpy())
    shape = session.engine.model.chunk(1)
    kept = torch.stack([e.camera for e in session.history.entries[-shape.new :]])
    assert torch.equal(kept, where[list(shape.latent_frames)])


def test_the_callers_arrays_stay_the_callers(start: Start):
    session, twin = start(), start()
    cameras = walk(session.engine.model.chunk(0).frames)
    a, b = session.step(cameras=cameras), twin.step(cameras=cameras.clone())
    cameras.zero_()
    a.cameras[:] = 0
    a.frames[:] = 0
    session.camera[:] = 0
    assert_same_state(session, twin)
    assert b.cameras.any()
    assert same(session.step(FORWARD), twin.step(FORWARD))


def _bad_cameras(kind: str, frames: int) -> Tensor:
    cameras = walk(frames)
    if kind == "nan":
        cameras[1, 0, 3] = float("nan")
    elif kind == "scaled":
        cameras[1, :3, :3] *= 1.2
    elif kind == "mirrored":
        cameras[1, :3, 0] *= -1
    elif kind == "short":
        cameras = cameras[:-1]
    elif kind == "flat":
        cameras = cameras[:, :3]
    return cameras


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("nan", r"cameras\[1\] holds NaN or infinity"),
        ("scaled", r"cameras\[1\] is no rigid"),
        ("mirrored", r"cameras\[1\] is no rigid"),
        ("short", r"chunk 0 has \d+ frames, got \d+ cameras"),
        ("flat", r"must have shape \[frames, 4, 4\]"),
    ],
)
def test_unusable_cameras_are_refused(start: Start, kind: str, text: str):
    session = start()
    with pytest.raises(InputError, match=text):
        session.step(cameras=_bad_cameras(kind, session.engine.model.chunk(0).frames))
    assert same(session.step(FORWARD), start().step(FORWARD))


def test_unusable_actions_are_refused(start: Start):
    session = start()
    frames = session.engine.model.chunk(0).frames
    with pytest.raises(InputError, match=f"{frames} frames need one action or {frames}"):
        session.step([FORWARD] * (frames + 1))
    with pytest.raises(InputError, match="actions must be one Action"):
        session.step(["KeyW"])  # type: ignore[list-item]
    with pytest.raises(InputError, match="an action or cameras, not both"):
        session.step(FORWARD, cameras=walk(frames))
    assert same(session.step(FORWARD), start().step(FORWARD))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["velocity", "encode_context", "commit", "decode"])
def test_an_interrupted_step_leaves_the_session_as_it_was(
    start: Start, monkeypatch: pytest.MonkeyPatch, place: str, error: type[BaseException]
):
    session = start()
    session.step(TURN)
    undisturbed = session.fork()
    target = session.engine.model.decoder if place == "decode" else session.engine.model
    plain, calls = getattr(target, place), []

    def failing(*args, **kwargs):
        calls.append(place)
        if place != "velocity" or len(calls) == 2:
            raise error("stop")
        return plain(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(target, place, failing)
        with pytest.raises(error, match="stop"):
            session.step(FORWARD)
    assert calls
    assert_same_state(session, undisturbed)
    assert same(session.step(FORWARD), undisturbed.step(FORWARD))


def test_an_interrupt_while_remembering_leaves_the_session_as_it_was(start: Start, monkeypatch: pytest.MonkeyPatch):
    from worldstride.context import history

    session = start()
    undisturbed = session.fork()
    made = []

    class Interrupting(history.Remembered):
        def __init__(self, *args) -> None:
            made.append(args)
            if len(made) == 3:
                raise KeyboardInterrupt
            super().__init__(*args)

    with monkeypatch.context() as patch:
        patch.setattr(history, "Remembered", Interrupting)
        with pytest.raises(KeyboardInterrupt):
            session.step(FORWARD)
    assert_same_state(session, undisturbed)
    assert same(session.step(FORWARD), undisturbed.step(FORWARD))


def test_the_report_is_json_and_adds_up(start: Start):
    session = start()
    for k in range(3):
        report = session.step(FORWARD).report
        values = json.loads(json.dumps(report.to_json(), allow_nan=False))
        shape = session.engine.model.chunk(k)
        assert values["frames"] == shape.frames
        assert values["index"] == k
        assert len(values["evaluations"]) == session.engine.model.sampler().steps
        assert [e["sigma"] for e in values["evaluations"]] == list(session.engine.model.sampler().sigmas[:-1])
        context = values["context"]
        assert values["context_latents"] == len(context["sink"]) + len(context["memory"]) + len(context["window"])
        assert (values["context_bytes"] > 0) == (values["context_latents"] > 0)
        assert len(values["signals"]["similarity"]) == len(context["memory"])
        assert all(0 <= s <= 1 for s in [*values["signals"]["similarity"], values["signals"]["newest"]])
        assert values["history_latents"] == len(session.history)
        assert values["history_bytes"] == session.history.bytes
        seconds = values["seconds"]
        total = seconds.pop("total")
        assert set(seconds) == {"control", "select", "fetch", "context", "denoise", "decode"}
        assert min(seconds.values()) >= 0
        assert sum(seconds.values()) <= total * (1 + 1e-9) + 1e-9
        assert sum(e["seconds"] for e in values["evaluations"]) <= seconds["denoise"]
        assert values["frames_per_second"] == pytest.approx(shape.frames / total)


def test_play_pads_the_last_chunk_by_standing_still(tiny_engine: Engine):
    session, by_hand = tiny_engine.new(seed=7), tiny_engine.new(seed=7)
    chunks = list(session.play(Trajectory(actions=(FORWARD,) * 6)))
    assert len(chunks) == 2
    assert same(chunks[0], by_hand.step(FORWARD))
    assert same(chunks[1], by_hand.step([FORWARD, FORWARD, Action(), Action()]))
    assert np.array_equal(chunks[1].cameras[1], chunks[1].cameras[3])


def test_play_along_cameras_with_their_intrinsics(joint: Engine, tmp_path: Path):
    session, plain = (joint.open(first_frames(), torch.eye(4)[None]) for _ in range(2))
    seen, prepare = [], joint.model.prepare

    def spy(conditions):
        seen.append(conditions.intrinsics)
        return prepare(conditions)

    cameras, own = walk(60), intrinsics_from_fov(0.7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint.model, "prepare", spy)
        chunks = list(session.play(Trajectory(cameras=cameras, intrinsics=own)))
        plain.step(cameras=cameras[:57])
        session.save(tmp_path / "a.world")
        worldstride.open(tmp_path / "a.world", engine=joint).step()
    assert [len(c.frames) for c in chunks] == [57, 40]
    assert np.array_equal(np.concatenate([c.cameras for c in chunks])[:60], cameras.numpy())
    assert np.array_equal(chunks[1].cameras[3:], np.broadcast_to(cameras[-1].numpy(), (37, 4, 4)))
    assert [torch.equal(k, own) for k in seen] == [True, True, False, True]
    assert torch.equal(seen[2], joint.model.intrinsics)


def test_changing_intrinsics_are_refused(joint: Engine):
    session = joint.open(first_frames(), torch.eye(4)[None])
    changing = torch.stack([intrinsics_from_fov(0.5 + 0.1 * i) for i in range(5)])
    with pytest.raises(InputError, match="intrinsics change from frame to frame"):
        next(session.play(Trajectory(cameras=walk(5), intrinsics=changing)))
    assert session._state.intrinsics is None


def test_open_takes_frames_of_the_models_size(tiny_engine: Engine, joint: Engine):
    cameras = walk(2)
    with pytest.raises(InputError, match=r"uint8 \[B, F, 24, 24, 3\], got uint8 \[1, 2, 16, 24, 3\]"):
        tiny_engine.open(first_frames(2), cameras)
    with pytest.raises(InputError, match="got float32"):
        tiny_engine.open(first_frames(2, 24, 24).astype(np.float32), cameras)
    with pytest.raises(InputError, match=r"uint8 \[B, F, 16, 24, 3\]"):
        joint.open(first_frames(2, 24, 24), cameras)


def test_open_takes_one_rigid_camera_a_frame(tiny_engine: Engine):
    frames = first_frames(2, 24, 24)
    with pytest.raises(InputError, match="as many cameras as frames and at least one, got 3 and 2"):
        tiny_engine.open(frames, walk(3))
    with pytest.raises(InputError, match="at least one, got 0 and 0"):
        tiny_engine.open(frames[:0], walk(2)[:0])
    for kind, text in (("nan", "NaN"), ("scaled", "rigid")):
        with pytest.raises(InputError, match=text):
            tiny_engine.open(frames, _bad_cameras(kind, 2))


def test_open_goes_on_from_the_given_frames(tiny_engine: Engine):
    frames, cameras = first_frames(3, 24, 24), walk(3)
    session = tiny_engine.open(frames, cameras, seed=1)
    assert session.frame == 3
    assert np.array_equal(session.camera, cameras[-1].numpy())
    kept = session.history.latents([0, 1, 2], torch.device("cpu"), tiny_engine.model.latent_shape)
    shown, _ = tiny_engine.model.decoder.decode(kept[None], {})
    assert np.array_equal(shown[0].numpy(), frames)
    assert session.step(FORWARD).report.context.window == (0, 1, 2)


def test_open_needs_what_the_first_chunk_goes_on_from():
    class Greedy(JointModel):
        def chunk(self, k: int):
            return super().chunk(k + 1)

    with pytest.raises(InputError, match="1 frames make 1 latents, but the first chunk of 'joint' goes on from 4"):
        joint_engine(Greedy()).open(first_frames(), torch.eye(4)[None])


def test_seeds_and_points_fix_a_world(tiny_engine: Engine):
    a, b = tiny_engine.new(seed=5), tiny_engine.new(seed=6)
    assert not torch.equal(a.history.entries[0].latent, b.history.entries[0].latent)
    assert not torch.equal(a._state.points, b._state.points)
    points = torch.rand(10, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(tiny_engine.new(seed=5, points=points)._state.points, points)
    with pytest.raises(InputError):
        tiny_engine.new(seed=5, family="moon")


@pytest.mark.parametrize("family", ["plain", "courtyard", "corridor"])
def test_every_family_walks(tiny_engine: Engine, family: str, tmp_path: Path):
    session = tiny_engine.new(seed=2, family=family)
    session.step(FORWARD)
    session.save(tmp_path / "a.world")
    assert same(session.step(FORWARD), worldstride.open(tmp_path / "a.world", engine=tiny_engine).step(FORWARD))


def test_warming_up_plays_until_the_context_is_full(tiny_engine: Engine):
    before = tiny_engine.new(seed=3).step().frames
    # 8 recent frames are given; 8 more are remembered after two chunks of 4
    assert tiny_engine.warm_up() == tiny_engine.warm_up(["off"]) < 12
    assert tiny_engine.warm_up(["off", "fast"], limit=3) == 6
    assert np.array_equal(tiny_engine.new(seed=3).step().frames, before)
    with pytest.raises(InputError, match="limit must be an integer of at least 1, got 0"):
        tiny_engine.warm_up(limit=0)
