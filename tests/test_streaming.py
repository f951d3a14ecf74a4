"""Chunks made ahead are the chunks of stepping, whatever happens between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hy_golden
import worldstride
from joint_model import TEXT
from test_session import assert_same_state
from walking import FORWARD, MOVES, TURN, first_frames, same, walk
from worldstride import Acceleration, Action, Chunk, Engine, Session, Trajectory, parse_trajectory
from worldstride.acceleration import AttentionReuse
from worldstride.beside import Arrival, Beside
from worldstride.context.kept import KeptContext
from worldstride.context.policy import SpatialMemory, TemporalWindow
from worldstride.denoising.policy import AdaptiveSteps, StepCache
from worldstride.errors import InputError
from worldstride.savefile import read_save

Start = Callable[[], Session]
WALK = (*MOVES, TURN, Action(frozenset({"KeyS"})))


@pytest.fixture(params=["courtyard", "joint", "guided", "hy_worldplay"])
def start(request: pytest.FixtureRequest, attentive: Engine, joint: Engine, guided: Engine) -> Start:
    """Begins a session of one of the small engines."""

    def begin() -> Session:
        if request.param == "courtyard":
            return attentive.new(seed=7)
        if request.param == "hy_worldplay":
            return hy_golden.begin(hy_golden.engine())
        engine = joint if request.param == "joint" else guided
        return engine.open(first_frames(), torch.eye(4)[None], {"text": torch.arange(TEXT).float() / TEXT}, seed=7)

    return begin


@pytest.fixture
def pair(attentive: Engine) -> tuple[Session, Session]:
    """Two sessions alike: one to be played ahead, one to be stepped."""
    return attentive.new(seed=3), attentive.new(seed=3)


def assert_same_chunk(a: Chunk, b: Chunk) -> None:
    assert same(a, b)
    one, other = (replace(c.report, seconds={}, evaluations=()) for c in (a, b))
    assert one == other
    assert a.report.seconds.keys() == b.report.seconds.keys()
    untimed = ([replace(e, seconds=0.0) for e in c.report.evaluations] for c in (a, b))
    assert next(untimed) == next(untimed)


def assert_same_save(a: Session, b: Session, path: Path) -> None:
    saved = list[tuple[dict[str, Any], dict[str, Tensor]]]()
    for session in (a, b):
        session.save(path)
        saved.append(read_save(path))
    (header, tensors), (other, others) = saved
    assert header == other
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def test_ahead_gives_the_bits_of_stepping(start: Start, tmp_path: Path):
    stepped, streamed = start(), start()
    chunks = streamed.stream(WALK[:4], ahead=True)
    for action, chunk in zip(WALK[:4], chunks, strict=True):
        assert_same_chunk(chunk, stepped.step(action))
        assert_same_state(streamed, stepped)
        assert_same_save(streamed, stepped, tmp_path / "a.world")
    assert_same_chunk(streamed.step(TURN), stepped.step(TURN))


@pytest.mark.parametrize(
    "settings",
    [
        Acceleration("kept", kept=KeptContext(), attention=AttentionReuse(2)),
        Acceleration("context", temporal=TemporalWindow(), spatial=SpatialMemory(exploring=1)),
        Acceleration("looking", adaptive=AdaptiveSteps(4, threshold=1.0, score="added", change=0.05)),
        Acceleration("cache", cache=StepCache("known", 0.0, first=2, rule="extrapolate")),
        Acceleration("late", steps=2, warmup=2),
    ],
    ids=lambda s: s.name,
)
def test_every_lever_works_ahead(pair: tuple[Session, Session], settings: Acceleration):
    streamed, stepped = pair
    streamed.acceleration = stepped.acceleration = settings
    for action, chunk in zip(WALK, streamed.stream(WALK, ahead=True), strict=True):
        assert_same_chunk(chunk, stepped.step(action))
        assert streamed._state.policy == stepped._state.policy
        assert list(streamed._state.kept.records) == list(stepped._state.kept.records)
    assert_same_state(streamed, stepped)


def test_without_ahead_a_stream_is_steps(pair: tuple[Session, Session]):
    streamed, stepped = pair
    for action, chunk in zip(WALK, streamed.stream(iter(WALK)), strict=True):
        assert_same_chunk(chunk, stepped.step(action))
    assert list(streamed.stream([])) == list(streamed.stream([], ahead=True)) == []
    with pytest.raises(InputError, match="one after the other, got Action; step takes one"):
        streamed.stream(FORWARD)  # type: ignore[arg-type]


def test_actions_of_all_kinds_go_ahead(pair: tuple[Session, Session]):
    streamed, stepped = pair
    kinds = [None, FORWARD, [TURN, FORWARD, TURN, FORWARD]]
    for action, chunk in zip(kinds, streamed.stream(kinds, ahead=True), strict=True):
        assert_same_chunk(chunk, stepped.step(action))


@pytest.mark.parametrize("per", ["frame", "latent"])
def test_trajectories_are_played_ahead(start: Start, per: Any):
    ways = [parse_trajectory("w-10,right-9"), Trajectory(cameras=walk(21))]
    for way in ways:
        a, b = start(), start()
        for chunk, other in zip(a.play(way, per, ahead=True), b.play(way, per), strict=True):
            assert_same_chunk(chunk, other)
        assert_same_state(a, b)


def test_the_next_chunk_is_begun_before_frames_are_waited_for(attentive: Engine, monkeypatch: pytest.MonkeyPatch):
    session, told = attentive.new(seed=3), list[str]()

    def tell(of: Any, name: str) -> None:
        plain = getattr(of, name)
        monkeypatch.setattr(of, name, lambda *given: (told.append(name), plain(*given))[1])

    tell(attentive.model, "commit")
    tell(attentive.model.decoder, "decode")
    tell(Arrival, "wait")

    def actions() -> Iterator[Action]:
        for move in WALK[:3]:
            told.append("ask")
            yield move

    for _ in session.stream(actions(), ahead=True):
        told.append("chunk")
    first, rest = ["ask", "commit"], ["decode", "ask", "commit", "wait", "chunk"]
    assert told == [*first, *rest, *rest, "decode", "wait", "chunk"]


def _faster(session: Session) -> None:
    session.acceleration = "steps-2"


def _stepped(session: Session) -> None:
    session.step(TURN)


def _corrected(session: Session) -> None:
    session.correct(first_frames(4, 24, 24))


def _streamed(session: Session) -> None:
    for count, _ in enumerate(session.stream(WALK, ahead=True)):
        if count:
            break


def _replaced(session: Session) -> None:
    session._state = session.engine.new(seed=8)._state


@pytest.mark.parametrize("change", [_faster, _stepped, _corrected, _streamed, _replaced])
@pytest.mark.parametrize("after", [0, 2])
def test_what_no_longer_follows_is_made_anew(
    pair: tuple[Session, Session], change: Callable[[Session], None], after: int
):
    streamed, stepped = pair
    chunks = zip(streamed.stream(WALK, ahead=True), stepped.stream(WALK), strict=True)
    for k, (chunk, other) in enumerate(chunks):
        assert_same_chunk(chunk, other)
        if k == after:
            for session in pair:
                change(session)
    assert_same_state(streamed, stepped)


def test_a_walk_goes_on_where_its_session_was_taken(pair: tuple[Session, Session]):
    streamed, stepped = pair
    cameras = Trajectory(cameras=walk(18))
    for k, (chunk, other) in enumerate(zip(streamed.play(cameras, ahead=True), stepped.play(cameras), strict=True)):
        assert_same_chunk(chunk, other)
        if k == 1:
            assert same(streamed.step(TURN), stepped.step(TURN))
    assert_same_state(streamed, stepped)


def test_forks_and_saves_between_chunks_are_those_of_stepping(pair: tuple[Session, Session], tmp_path: Path):
    streamed, stepped = pair
    for action, chunk in zip(WALK, streamed.stream(WALK, ahead=True), strict=True):
        assert same(chunk, stepped.step(action))
        streamed.save(tmp_path / "a.world")
        opened = worldstride.open(tmp_path / "a.world", engine=streamed.engine)
        truth = stepped.fork().step(TURN)
        assert same(streamed.fork().step(TURN), truth)
        assert same(opened.step(TURN), truth)
    assert_same_state(streamed, stepped)


def test_a_stream_that_is_left_leaves_the_chunk_given_last(pair: tuple[Session, Session]):
    streamed, stepped = pair
    chunks = streamed.stream(WALK, ahead=True)
    for move in WALK[:2]:
        assert same(next(chunks), stepped.step(move))
    chunks.close()  # type: ignore[attr-defined]
    assert_same_state(streamed, stepped)
    assert same(streamed.step(FORWARD), stepped.step(FORWARD))


def test_settings_follow_the_action_that_is_asked_for(pair: tuple[Session, Session]):
    streamed, stepped = pair
    ways = ["off", "steps-2", "off", "steps-4"]

    def actions() -> Iterator[Action]:
        for name, move in zip(ways, WALK, strict=False):
            streamed.acceleration = name
            yield move

    for name, move, chunk in zip(ways, WALK, streamed.stream(actions(), ahead=True), strict=False):
        stepped.acceleration = name
        assert_same_chunk(chunk, stepped.step(move))
        assert chunk.report.acceleration == name


@pytest.mark.parametrize("change", [_stepped, _corrected])
def test_actions_must_not_change_the_session_under_way(attentive: Engine, change: Callable[[Session], None]):
    session, by_hand = attentive.new(seed=3), attentive.new(seed=3)

    def actions() -> Iterator[Action]:
        yield from WALK[:2]
        change(session)
        yield FORWARD

    chunks = session.stream(actions(), ahead=True)
    assert same(next(chunks), by_hand.step(WALK[0]))
    with pytest.raises(InputError, match="stepped or corrected the session"):
        next(chunks)
    change(by_hand)
    assert_same_state(session, by_hand)


def _nan(session: Session) -> Iterator[Chunk]:
    way = Trajectory(cameras=walk(12))
    assert way.cameras is not None
    way.cameras[5, 0, 3] = torch.nan  # since it was checked
    return session.play(way, ahead=True)


def _wrong_number(session: Session) -> Iterator[Chunk]:
    return session.stream([FORWARD, [FORWARD] * 3, FORWARD], ahead=True)


def _raising(session: Session) -> Iterator[Chunk]:
    def actions() -> Iterator[Action]:
        yield FORWARD
        raise InputError("no gamepad")

    return session.stream(actions(), ahead=True)


@pytest.mark.parametrize(
    ("play", "text"),
    [(_nan, "holds NaN"), (_wrong_number, "4 frames need one action or 4"), (_raising, "no gamepad")],
)
def test_what_is_wrong_ahead_is_said_when_it_is_due(
    pair: tuple[Session, Session], play: Callable[[Session], Iterator[Chunk]], text: str
):
    streamed, _ = pair
    chunks = play(streamed)
    assert next(chunks).report.index == 0
    before = streamed.fork()
    with pytest.raises(InputError, match=text):
        next(chunks)
    assert_same_state(streamed, before)
    assert streamed.step(FORWARD).report.index == 1


def test_what_is_wrong_at_once_is_said_at_once(joint: Engine):
    session = joint.open(first_frames(), torch.eye(4)[None])
    with pytest.raises(InputError, match="per must be frame or latent"):
        next(session.play(parse_trajectory("w-4"), per="chunk", ahead=True))  # type: ignore[arg-type]
    assert session._state.chunk == 0


def failing(monkeypatch: pytest.MonkeyPatch, of: object, place: str, call: int, error: type[BaseException]) -> None:
    """One call of a function, counted from 0, raises."""
    plain, calls = getattr(of, place), []

    def instead(*given: Any) -> Any:
        calls.append(place)
        if len(calls) == call + 1:
            raise error("stop")
        return plain(*given)

    monkeypatch.setattr(of, place, instead)


@pytest.mark.parametrize("place", ["encode_context", "velocity", "commit"])
def test_what_fails_once_ahead_is_made_when_it_is_due(
    pair: tuple[Session, Session], monkeypatch: pytest.MonkeyPatch, place: str
):
    """As when memory runs out beside decoding: alone the chunk fits."""
    streamed, stepped = pair
    truth = [stepped.step(move) for move in WALK[:3]]
    call = 8 + 3 if place == "velocity" else 1
    failing(monkeypatch, streamed.engine.model, place, call, RuntimeError)
    for chunk, other in zip(streamed.stream(WALK[:3], ahead=True), truth, strict=True):
        assert_same_chunk(chunk, other)
    assert_same_state(streamed, stepped)


@pytest.mark.parametrize(
    ("place", "call", "error"),
    [
        ("encode_context", 2, KeyboardInterrupt), ("velocity", 2 * 8 + 3, KeyboardInterrupt),
        ("commit", 2, KeyboardInterrupt), ("decode", 1, RuntimeError), ("decode", 1, KeyboardInterrupt),
        ("wait", 1, RuntimeError), ("wait", 1, KeyboardInterrupt),
    ],
)  # fmt: skip
def test_an_interrupt_leaves_the_session_at_the_chunk_given_last(
    pair: tuple[Session, Session], monkeypatch: pytest.MonkeyPatch, place: str, call: int, error: type[BaseException]
):
    streamed, stepped = pair
    stepped.step(WALK[0])
    engine, targets = streamed.engine, {"decode": streamed.engine.model.decoder, "wait": Arrival}
    with monkeypatch.context() as patch:
        failing(patch, targets.get(place, engine.model), place, call, error)
        chunks = streamed.stream(WALK, ahead=True)
        next(chunks)
        with pytest.raises(error, match="stop"):
            next(chunks)
    assert_same_state(streamed, stepped)
    assert same(streamed.step(TURN), stepped.step(TURN))


def test_totals_add_up_to_the_time_that_passed(attentive: Engine):
    session, reports = attentive.new(seed=3), []
    begun = time.perf_counter()
    for chunk in session.stream(WALK, ahead=True):
        now = time.perf_counter()
        reports.append(chunk.report)
        time.sleep(0.02)
    passed = now - begun
    assert sum(r.seconds["total"] for r in reports) == pytest.approx(passed, abs=0.02)
    assert all(r.seconds["total"] > 0.02 for r in reports[1:])
    assert all(min(r.seconds.values()) >= 0 for r in reports)
    assert all(sum(e.seconds for e in r.evaluations) <= r.seconds["denoise"] for r in reports)


def test_on_a_cpu_all_happens_in_order():
    beside, frames = Beside.of(torch.device("cpu")), torch.arange(6)
    assert beside.now() is None
    with beside.after(None, [frames]):
        arrival = beside.send(frames + 1)
    assert arrival.wait().tolist() == [1, 2, 3, 4, 5, 6]
