"""Several sessions stepped together: each is what it is alone, and nothing is half done."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from joint_model import JointModel, joint_engine
from test_session import assert_same_state
from walking import FORWARD, MOVES, TURN, first_frames, levels_apart, same, walk
from worldstride import Acceleration, Action, Chunk, Engine, Session, step_together
from worldstride.acceleration import AttentionReuse
from worldstride.context import history
from worldstride.context.kept import KeptContext
from worldstride.context.policy import SpatialMemory, TemporalWindow
from worldstride.denoising import Denoising
from worldstride.denoising.policy import AdaptiveSteps, StepCache
from worldstride.errors import InputError
from worldstride.protocol import Narrows, Recalled
from worldstride.session import planned
from worldstride.stepping import grouped

SEEDS = (3, 5, 8)
BACK = Action(frozenset({"KeyS"}))


def worlds_of(engine: Engine, settings: Acceleration | None = None, seeds: Sequence[int] = SEEDS) -> list[Session]:
    sessions = [engine.new(seed=seed) for seed in seeds]
    for session in sessions:
        session.acceleration = settings or Acceleration()
    return sessions


def joint_worlds(engine: Engine, frames: int = 1, seeds: Sequence[int] = SEEDS) -> list[Session]:
    eye = torch.eye(4).expand(frames, 4, 4)
    return [engine.open(first_frames(frames), eye, seed=seed) for seed in seeds]


def ahead(session: Session, step: float = 0.05) -> Tensor:
    """Cameras of the courtyard's next chunk, on from the session's own."""
    return torch.from_numpy(session.camera) @ walk(4, step)


def batches(chunks: Sequence[Chunk]) -> list[int]:
    return [c.report.batch for c in chunks]


@pytest.mark.parametrize(
    "settings",
    [
        Acceleration(),
        Acceleration("kept", kept=KeptContext()),
        Acceleration("alone", kept=KeptContext(sees="itself", refresh=2)),
        Acceleration("attention", steps=5, solver="unipc", attention=AttentionReuse(3)),
        Acceleration("cache", cache=StepCache("known", 0.0, first=2, rule="extrapolate")),
        Acceleration("context", temporal=TemporalWindow(multiple=2), spatial=SpatialMemory(exploring=1)),
    ],
    ids=lambda s: s.name,
)
def test_stepping_together_equals_stepping_alone(attentive: Engine, settings: Acceleration):
    together, alone = worlds_of(attentive, settings), worlds_of(attentive, settings)
    made = []
    for step in (0.02, 0.1, -0.05):
        cameras = [ahead(session, step) for session in alone]
        made = step_together(together, cameras)
        assert all(n > 1 for n in batches(made)) or settings.temporal is not None
        for one, session, where in zip(made, alone, cameras, strict=True):
            own = session.step(cameras=where)
            assert levels_apart(one, own) <= 1
            assert one.report.context.rows == own.report.context.rows
            assert one.report.signals.pose == own.report.signals.pose
            assert (one.report.signals.dynamics or 0) == pytest.approx(own.report.signals.dynamics or 0, rel=1e-4)
            assert one.report.flops == own.report.flops
            assert one.report.context_bytes == own.report.context_bytes
            assert one.report.kept_bytes == own.report.kept_bytes
            assert [e.sigma for e in one.report.evaluations] == [e.sigma for e in own.report.evaluations]
            assert own.report.batch == 1
        assert all(a.frame == b.frame for a, b in zip(together, alone, strict=True))
    assert not np.array_equal(made[0].frames, made[1].frames)


@pytest.mark.parametrize("kind", ["joint", "guided"])
def test_models_of_another_structure_step_together(request: pytest.FixtureRequest, kind: str):
    engine: Engine = request.getfixturevalue(kind)
    together, alone = joint_worlds(engine), joint_worlds(engine)
    for move in MOVES[:2]:
        made = step_together(together, actions=[move] * 3)
        assert batches(made) == [3, 3, 3]
        assert all(levels_apart(one, s.step(move)) <= 1 for one, s in zip(made, alone, strict=True))
    assert not np.array_equal(made[0].frames, made[1].frames)


def test_limit_bounds_a_batch_and_order_stays(tiny_engine: Engine):
    seeds = (1, 2, 3, 4, 5)
    sessions, alone = worlds_of(tiny_engine, seeds=seeds), worlds_of(tiny_engine, seeds=seeds)
    made = step_together(sessions, actions=[FORWARD] * 5, limit=2)
    assert batches(made) == [2, 2, 2, 2, 1]
    assert all(levels_apart(one, s.step(FORWARD)) <= 1 for one, s in zip(made, alone, strict=True))
    assert batches(step_together(sessions)) == [5] * 5
    assert step_together([]) == []
    with pytest.raises(InputError, match="limit must be an integer of at least 1, got 0"):
        step_together(sessions, limit=0)


def test_a_batch_of_one_is_a_step(tiny_engine: Engine):
    (one,), other = worlds_of(tiny_engine, seeds=[3]), tiny_engine.new(seed=3)
    for move in MOVES:
        assert same(step_together([one], actions=[move])[0], other.step(move))
    assert_same_state(one, other)


def split(sessions: Sequence[Session], moves: Sequence[Action | None], limit: int | None = None) -> list[list[int]]:
    """Numbers of the sessions that would be made together."""
    pending = planned([s._ask(move, None, None, None, None) for s, move in zip(sessions, moves, strict=True)])
    return [[[p.session is s for s in sessions].index(True) for p in group] for group in grouped(pending, limit)]


def test_what_has_the_same_plan_is_made_together(tiny_engine: Engine, attentive: Engine):
    a, b, c, other = *worlds_of(tiny_engine), attentive.new(seed=3)
    assert split([a, b, c], [FORWARD] * 3) == [[0, 1, 2]]
    assert split([a, b, c], [FORWARD] * 3, limit=2) == [[0, 1], [2]]
    assert split([a, b, c], [FORWARD, TURN, FORWARD]) == [[0, 2], [1]]
    assert split([a, other, c], [FORWARD] * 3) == [[0, 2], [1]]
    b.acceleration = Acceleration("less", steps=4, solver="unipc")  # worlds of a batch may take other steps
    assert split([a, b, c], [FORWARD] * 3) == [[0, 1, 2]]
    a.acceleration = Acceleration("reuse", attention=AttentionReuse(2))
    assert split([a, b, c], [FORWARD] * 3) == [[0], [1, 2]]
    a.acceleration = Acceleration("shorter", window=2)
    assert split([a, b, c], [FORWARD] * 3) == [[0], [1, 2]]
    for one in (a, b):
        one.acceleration = Acceleration("kept", kept=KeptContext(sees="itself" if one is a else "all"))
    assert split([a, b, c], [FORWARD] * 3) == [[0], [1], [2]]
    a.acceleration = b.acceleration = "off"
    a.step(FORWARD)
    assert split([a, b, c], [FORWARD] * 3) == [[0], [1, 2]]


def test_a_model_that_cannot_part_worlds_makes_equal_plans_together(guided: Engine):
    a, b, c = joint_worlds(guided)
    b.acceleration = Acceleration("less", steps=2)
    assert split([a, b, c], [FORWARD] * 3) == [[0, 2], [1]]
    a.acceleration = Acceleration("other name", steps=2)
    assert split([a, b, c], [FORWARD] * 3) == [[0, 1], [2]]


def test_a_chunks_share_of_a_batch_goes_by_its_evaluations(tiny_engine: Engine):
    a, b = worlds_of(tiny_engine, seeds=[3, 5])
    b.acceleration = Acceleration("less", steps=2)
    one, other = (c.report.seconds for c in step_together([a, b], actions=[FORWARD] * 2))
    assert one["denoise"] == pytest.approx(4 * other["denoise"])
    assert all(one[stage] == other[stage] for stage in ("fetch", "context", "decode"))


def test_a_world_reports_its_share_of_what_was_evaluated_together(tiny_engine: Engine):
    a, b, c = worlds_of(tiny_engine, seeds=[3, 5, 7])
    b.acceleration = Acceleration("reuses", cache=StepCache("known", 0.0, first=1, last=1))
    c.acceleration = Acceleration("less", steps=2)
    for session in (a, b, c):
        session.step(FORWARD)
    reports = [chunk.report for chunk in step_together([a, b, c], actions=[FORWARD] * 3)]
    every = [e for report in reports for e in report.evaluations]
    assert [len([e for e in r.evaluations if e.computed]) for r in reports] == [8, 2, 2]
    assert all((e.seconds > 0) is e.computed for e in every)
    assert sum(e.seconds for e in every) <= sum(r.seconds["denoise"] for r in reports) * (1 + 1e-9)


def test_sessions_of_all_kinds_step_together(tiny_engine: Engine, guided: Engine):
    def all_kinds() -> list[Session]:
        few, plain, many = worlds_of(tiny_engine)
        few.acceleration, many.acceleration = "steps-2", "off"
        many.step(FORWARD)
        return [few, *joint_worlds(guided, seeds=[1]), plain, many, tiny_engine.new(seed=9)]

    moves = [FORWARD, TURN, FORWARD, BACK, FORWARD]
    made = step_together(all_kinds(), actions=moves)
    assert batches(made) == [3, 1, 3, 1, 3]
    assert [len(c.report.evaluations) for c in made] == [2, 3, 8, 8, 8]
    for one, session, move in zip(made, all_kinds(), moves, strict=True):
        assert levels_apart(one, session.step(move)) <= 1


def test_cameras_noise_and_recall_go_to_their_sessions(tiny_engine: Engine):
    sessions, alone = worlds_of(tiny_engine), worlds_of(tiny_engine)
    for session in (*sessions, *alone):
        for _ in range(2):
            session.step(cameras=ahead(session))
    cameras = [ahead(s, step) for s, step in zip(sessions, (0.02, 0.05, 0.1), strict=True)]
    size = (4, *tiny_engine.model.latent_shape)
    noise = [torch.randn(size, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    recall = [[0, 1], None, [3, 5]]
    made = step_together(sessions, cameras, noise=noise, recall=recall)
    assert batches(made) == [3, 3, 3]
    for i, session in enumerate(alone):
        assert np.array_equal(made[i].cameras, cameras[i].numpy())
        assert levels_apart(made[i], session.step(cameras=cameras[i], noise=noise[i], recall=recall[i])) <= 1
    assert [c.report.context.memory for c in (made[0], made[2])] == [(0, 1), (3, 5)]


def test_a_session_steps_once(tiny_engine: Engine):
    a, b, _ = worlds_of(tiny_engine)
    with pytest.raises(InputError, match="different sessions; fork a session to step it twice"):
        step_together([a, b, a])
    assert (a.frame, b.frame) == (4, 4)
    assert batches(step_together([a, a.fork()])) == [2, 2]


@pytest.mark.parametrize("what", ["cameras", "actions", "noise", "recall"])
def test_there_is_one_entry_for_each_session(tiny_engine: Engine, what: str):
    sessions = worlds_of(tiny_engine)
    with pytest.raises(InputError, match=r"one entry for each of 3 sessions, got \[.*2.*\]"):
        step_together(sessions, **{what: [None, None]})
    assert [s.frame for s in sessions] == [4, 4, 4]


def test_one_wrong_input_steps_nobody(tiny_engine: Engine):
    sessions = worlds_of(tiny_engine)
    before = [s.fork() for s in sessions]
    cameras = [ahead(s) for s in sessions]
    cameras[2][1, 0, 3] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        step_together(sessions, cameras)
    for a, b in zip(sessions, before, strict=True):
        assert_same_state(a, b)


@pytest.mark.parametrize(
    ("place", "error"),
    [("velocity", KeyboardInterrupt), ("encode_latents", RuntimeError), ("commit", RuntimeError),
     ("decode", KeyboardInterrupt)],
)  # fmt: skip
def test_an_interrupted_group_leaves_all_sessions_as_they_were(
    tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch, place: str, error: type[BaseException]
):
    sessions, undisturbed = (worlds_of(tiny_engine, Acceleration("kept", kept=KeptContext())) for _ in range(2))
    moves = [TURN, TURN, FORWARD]  # two groups; the second one fails
    for group in (sessions, undisturbed):
        step_together(group, actions=moves)
    target = tiny_engine.model.decoder if place == "decode" else tiny_engine.model
    plain, calls = getattr(target, place), []

    def failing(first: Tensor | Recalled, *args: object):
        calls.append(len(first.latents if isinstance(first, Recalled) else first))
        if calls[-1] == 1 and (place != "velocity" or len(calls) == 11):
            raise error("stop")
        return plain(first, *args)

    with monkeypatch.context() as patch:
        patch.setattr(target, place, failing)
        with pytest.raises(error, match="stop"):
            step_together(sessions, actions=moves)
    assert calls[0] == 2  # the first group was made
    assert calls[-1] == 1
    for a, b in zip(sessions, undisturbed, strict=True):
        assert_same_state(a, b)
        assert list(a._state.kept.records) == list(b._state.kept.records)
    pairs = zip(*(step_together(group, actions=moves) for group in (sessions, undisturbed)), strict=True)
    assert all(same(a, b) for a, b in pairs)


def test_an_interrupt_while_remembering_leaves_all_sessions_as_they_were(
    tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    sessions, made = worlds_of(tiny_engine), []

    class Interrupting(history.Remembered):
        def __init__(self, *args) -> None:
            made.append(args)
            if len(made) == 6:  # the second latent of the second session
                raise KeyboardInterrupt
            super().__init__(*args)

    with monkeypatch.context() as patch:
        patch.setattr(history, "Remembered", Interrupting)
        with pytest.raises(KeyboardInterrupt):
            step_together(sessions)
    assert [s.frame for s in sessions] == [4, 4, 4]


@pytest.fixture
def changes(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What every look of the test sees."""
    seen, look = list[float](), Denoising.change

    def spy(self: Denoising) -> Tensor:
        found = look(self)
        seen.extend(found.tolist())
        return found

    monkeypatch.setattr(Denoising, "change", spy)
    return seen


def between(changes: Sequence[float]) -> float:
    """A change that some worlds stay below, and others not, by more than rounding."""
    ordered = sorted(changes)
    middle = len(ordered) // 2
    assert ordered[middle] > ordered[middle - 1] * (1 + 1e-4)
    return (ordered[middle - 1] + ordered[middle]) / 2


LOOKING = AdaptiveSteps(4, threshold=1.0, score="added", change=0.0)


def looking(change: float, **levers: object) -> Acceleration:
    return Acceleration("looking", adaptive=AdaptiveSteps(**{**vars(LOOKING), "change": change}), **levers)


@pytest.mark.parametrize(
    "levers",
    [
        {},
        {"solver": "unipc", "attention": AttentionReuse(3)},
        {"kept": KeptContext(), "cache": StepCache("known", 0.0, first=2, rule="extrapolate")},
    ],
    ids=["euler", "unipc", "cache"],
)
def test_worlds_of_a_batch_go_on_with_different_steps(
    attentive: Engine, changes: list[float], levers: dict[str, object]
):
    seeds = (1, 2, 3, 4)
    for session in worlds_of(attentive, looking(0.0, **levers), seeds):
        assert session.step(FORWARD).report.steps == 8
    settings = looking(between(changes), **levers)
    few = [c < between(changes) for c in changes]
    together, alone = worlds_of(attentive, settings, seeds), worlds_of(attentive, settings, seeds)
    made = step_together(together, actions=[FORWARD] * 4)
    assert batches(made) == [4] * 4
    assert [c.report.steps for c in made] == [4 if f else 8 for f in few]
    for one, session in zip(made, alone, strict=True):
        own = session.step(FORWARD)
        assert levels_apart(one, own) <= 1
        assert one.report.steps_reason == own.report.steps_reason
        assert [(e.sigma, e.computed, e.attended) for e in one.report.evaluations] == [
            (e.sigma, e.computed, e.attended) for e in own.report.evaluations
        ]
        assert one.report.flops == own.report.flops
    pairs = zip(step_together(together), (session.step() for session in alone), strict=True)
    assert all(levels_apart(a, b) <= 1 for a, b in pairs)


def test_a_model_that_cannot_narrow_gives_all_what_one_needs(guided: Engine, changes: list[float]):
    assert not isinstance(guided.model, Narrows)
    seeds = (1, 2, 3, 4)
    few = AdaptiveSteps(2, threshold=1.0, score="added", change=0.0)
    for change in (0.0, None):
        sessions = joint_worlds(guided, seeds=seeds)
        for session in sessions:
            adaptive = AdaptiveSteps(**{**vars(few), "change": between(changes) if change is None else change})
            session.acceleration = Acceleration("looking", adaptive=adaptive)
        if change is not None:
            for session in sessions:
                session.step(FORWARD)
            assert len(changes) == 4
    made = step_together(sessions, actions=[FORWARD] * 4)
    assert [c.report.steps for c in made] == [3] * 4
    own = [f"change {change:.3f}" for change in changes[-4:]]
    assert all(said in c.report.steps_reason for said, c in zip(own, made, strict=True))
    assert len(set(own)) > 1
    sessions = joint_worlds(guided, seeds=seeds)
    for one, session in zip(made, sessions, strict=True):
        assert levels_apart(one, session.step(FORWARD)) <= 1


def test_each_world_looks_with_its_own_settings(tiny_engine: Engine):
    def two() -> list[Session]:
        sessions = worlds_of(tiny_engine, seeds=[3, 5])
        for session, change in zip(sessions, (0.0, 1e6), strict=True):
            session.acceleration = looking(change)
        return sessions

    alone = [session.step(FORWARD).report.steps for session in two()]
    assert alone == [8, 4]
    assert [c.report.steps for c in step_together(two(), actions=[FORWARD] * 2)] == alone


def test_a_look_goes_with_a_cache_that_reuses_the_second_evaluation(tiny_engine: Engine):
    session = tiny_engine.new(seed=3)
    session.acceleration = looking(0.05, cache=StepCache("known", threshold=0.0))
    assert session.step(FORWARD).report.steps in (4, 8)


def test_worlds_with_other_decode_states_step_together():
    engine = joint_engine()
    begun = [*joint_worlds(engine, frames=1, seeds=[1]), *joint_worlds(engine, frames=5, seeds=[2])]
    alone = [session.fork().step(FORWARD) for session in begun]
    made = step_together(begun, actions=[FORWARD] * 2)
    assert [c.frames.shape for c in made] == [c.frames.shape for c in alone]


def test_past_actions_are_each_worlds_own():
    seen = []

    class Heeding(JointModel):
        def encode_context(self, recalled, *rest):
            seen.append({key for a in recalled.led if a is not None for key in a.keys})
            return super().encode_context(recalled, *rest)

    sessions = joint_worlds(joint_engine(Heeding()), seeds=[1, 2])
    for session, move in zip(sessions, (FORWARD, BACK), strict=True):
        session.step(move)
    seen.clear()
    step_together(sessions, [walk(40)] * 2)
    assert {"KeyW", "KeyS"} <= set().union(*seen)


@pytest.fixture
def begun(attentive: Engine) -> Session:
    session = attentive.new(seed=3)
    session.step(FORWARD)
    return session


def test_a_world_goes_on_from_corrected_frames(begun: Session):
    plain, truth = begun.fork(), first_frames(4, 24, 24)
    before = begun.history.entries
    begun.correct(truth)
    entries = begun.history.entries
    assert entries[:-4] == before[:-4]
    assert [(e.index, e.led) for e in entries] == [(e.index, e.led) for e in before]
    assert all(torch.equal(a.camera, b.camera) for a, b in zip(entries, before, strict=True))
    shown, _ = begun.engine.model.decoder.decode(torch.stack([e.latent for e in entries[-4:]])[None], {})
    assert np.array_equal(shown[0].numpy(), truth)
    assert (begun.frame, begun._state.chunk) == (plain.frame, plain._state.chunk)
    assert np.array_equal(begun.camera, plain.camera)
    assert plain.history.entries == before  # forks keep what they have
    assert levels_apart(begun.step(FORWARD), plain.step(FORWARD)) > 5


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
def test_correcting_by_what_was_shown_changes_nothing(attentive: Engine, kind: Callable[[np.ndarray], object]):
    session, plain = (attentive.new(seed=3) for _ in range(2))
    for move in MOVES:
        chunk = session.step(move)
        assert same(chunk, plain.step(move))
        session.correct(kind(chunk.frames))
    assert_same_state(session, plain)


def test_a_models_own_encoding_is_what_a_correction_puts_in(joint: Engine):
    session, truth = joint_worlds(joint, seeds=[1])[0], first_frames(40)
    session.step(FORWARD)
    session.step(FORWARD)
    plain = session.fork()
    session.correct(truth)
    encoded = joint.model.decoder.encode(torch.as_tensor(truth)[None])[0]
    assert torch.equal(torch.stack([e.latent for e in session.history.entries[-10:]]), encoded)
    assert session.history.entries[:-10] == plain.history.entries[:-10]
    assert levels_apart(session.step(FORWARD), plain.step(FORWARD)) > 5


@pytest.mark.parametrize(
    ("frames", "text"),
    [
        (first_frames(3, 24, 24), "chunk 0 has 4 frames, got 3"),
        (first_frames(5, 24, 24), "chunk 0 has 4 frames, got 5"),
        (first_frames(4, 24, 20), r"uint8 \[B, F, 24, 24, 3\]"),
        (first_frames(4, 24, 24).astype(np.float32), "got float32"),
    ],
    ids=["few", "many", "narrow", "float"],
)
def test_frames_that_do_not_fit_correct_nothing(begun: Session, frames: np.ndarray, text: str):
    before = begun.fork()
    with pytest.raises(InputError, match=text):
        begun.correct(frames)
    assert_same_state(begun, before)


def test_there_is_nothing_to_correct_before_the_first_chunk(tiny_engine: Engine):
    with pytest.raises(InputError, match="no chunk to correct yet; step first"):
        tiny_engine.new(seed=3).correct(first_frames(4, 24, 24))


def test_recall_brings_back_what_it_names(attentive: Engine):
    session = attentive.new(seed=3)
    for move in MOVES:
        session.step(move)
    by_pose, again, others, turned = (session.fork() for _ in range(4))
    plain = by_pose.step(FORWARD)
    found = plain.report.context.memory
    assert len(found) == 2
    assert same(plain, again.step(FORWARD, recall=list(found)))
    away = [i for i in range(plain.report.signals.candidates) if i not in found][:2]
    other = others.step(FORWARD, recall=away)
    assert other.report.context.memory == tuple(away)
    assert other.report.context.window == plain.report.context.window
    assert len(other.report.signals.similarity) == 2
    assert levels_apart(other, plain) > 0
    assert same(other, turned.step(FORWARD, recall=away[::-1]))  # in order of time, however they are named


@pytest.mark.parametrize(
    "recall", [[], [0], [0, 1, 2], [1, 1], [0, 12], [-1, 0], [0, 99]],
    ids=["none", "few", "many", "twice", "window", "below", "above"],
)  # fmt: skip
def test_places_that_cannot_be_recalled_are_refused(tiny_engine: Engine, recall: list[int]):
    session = tiny_engine.new(seed=3)
    for move in MOVES[:3]:
        session.step(move)
    before = session.fork()
    with pytest.raises(InputError, match="recall must name 2 different places from 0 to 11, got "):
        session.step(FORWARD, recall=recall)
    assert_same_state(session, before)


def test_recall_names_as_many_as_settings_leave(tiny_engine: Engine):
    session = tiny_engine.new(seed=3)
    for move in MOVES[:3]:
        session.step(move)
    session.acceleration = Acceleration("less", memory=1)
    with pytest.raises(InputError, match="recall must name 1 different places"):
        session.step(FORWARD, recall=[0, 1])
    assert session.step(FORWARD, recall=[5]).report.context.memory == (5,)
