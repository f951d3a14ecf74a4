"""Chunks made ahead on a GPU: the same bits, whichever of the two streams is late, and nobody waits too soon."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hy_golden
import worldstride
from test_session import assert_same_state
from walking import FORWARD, MOVES, TURN, same
from worldstride import Acceleration, Action, Engine, Session
from worldstride.acceleration import resolve
from worldstride.beside import Arrival
from worldstride.context.kept import KeptContext
from worldstride.context.policy import TemporalWindow
from worldstride.engine import EngineSource
from worldstride.models.hy_worldplay.loading import random_model
from worldstride.models.registry import find

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
WALK = MOVES * 3
"""More latents than the newest that stay on the device."""
LONG = 400_000_000
"""Clock cycles: a fifth of a second or more."""


@pytest.fixture(scope="module")
def courtyard() -> Engine:
    return worldstride.load("courtyard", weights="random", device="cuda", dtype=torch.float32)


@pytest.fixture(scope="module")
def hy_worldplay() -> Engine:
    size, config = (hy_golden.HEIGHT, hy_golden.WIDTH), hy_golden.golden().config
    model = random_model(config, hy_golden.VAE, torch.device("cuda"), torch.float32, *size)
    source = EngineSource("hy_worldplay", None, "random", "tiny on a GPU")
    return Engine(model, source, resolve("off"), find("hy_worldplay").controls)


@pytest.fixture(params=["courtyard", "hy_worldplay"])
def start(request: pytest.FixtureRequest) -> Callable[[], Session]:
    engine: Engine = request.getfixturevalue(request.param)
    return lambda: hy_golden.begin(engine) if request.param == "hy_worldplay" else engine.new(seed=7)


def late(monkeypatch: pytest.MonkeyPatch, of: Any, name: str, beside: bool) -> None:
    """What a function asks the device for comes late, in the second stream alone or in the first."""
    plain = getattr(of, name)

    def instead(*given: Any) -> Any:
        here = beside == (torch.cuda.current_stream() != torch.cuda.default_stream())
        if here:
            torch.cuda._sleep(LONG)
        made = plain(*given)
        if here:
            torch.cuda._sleep(LONG // 4)  # and what comes after it
        return made

    monkeypatch.setattr(of, name, instead)


def littering(moves: tuple[Action, ...]) -> Iterator[Action]:
    """Actions, each asked for while a chunk is under way: memory that was let go too early is written over."""
    for move in moves:
        for size in (2**12, 2**16, 2**20, 2**22):
            for _ in range(8):
                torch.full((size,), torch.nan, device="cuda")
        yield move


@pytest.mark.parametrize(
    "settings",
    [Acceleration(), Acceleration("kept", kept=KeptContext()), Acceleration("window", temporal=TemporalWindow())],
    ids=lambda s: s.name,
)
def test_ahead_gives_the_bits_of_stepping(start: Callable[[], Session], settings: Acceleration):
    stepped, streamed = start(), start()
    stepped.acceleration = streamed.acceleration = settings
    for action, chunk in zip(WALK, streamed.stream(littering(WALK), ahead=True), strict=True):
        assert same(chunk, stepped.step(action))
        assert_same_state(streamed, stepped)
        where = [e.latent.device.type for e in streamed.history.entries]
        assert where == [e.latent.device.type for e in stepped.history.entries]
    assert "cpu" in where


@pytest.mark.parametrize("stalled", ["decoding", "latents"])
def test_a_stream_that_is_late_is_waited_for(
    start: Callable[[], Session], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stalled: str
):
    """Saved, forked, stepped and corrected between chunks."""
    stepped, streamed = start(), start()
    truth = [stepped.step(move) for move in WALK[:3]]
    forked, onward = stepped.fork(), stepped.fork()
    forked_truth, onward_truth = forked.step(TURN), [onward.step(TURN), onward.step(FORWARD)]
    beside, model = stalled == "decoding", streamed.engine.model
    late(monkeypatch, model.decoder if beside else model, "decode" if beside else "commit", beside)
    chunks = streamed.stream(littering((*WALK[:3], FORWARD)), ahead=True)
    for k, (chunk, other) in enumerate(zip(chunks, truth, strict=False)):
        assert same(chunk, other)
        if k == 2:
            break
    streamed.save(tmp_path / "a.world")
    opened = worldstride.open(tmp_path / "a.world", engine=streamed.engine)
    assert_same_state(opened, streamed)
    assert same(streamed.fork().step(TURN), forked_truth)
    assert same(opened.step(TURN), forked_truth)
    assert same(streamed.step(TURN), onward_truth[0])
    assert same(next(chunks), onward_truth[1])  # begun before the step, and made anew after it
    assert_same_state(streamed, onward)


def test_the_next_chunk_does_not_wait_for_frames(start: Callable[[], Session], monkeypatch: pytest.MonkeyPatch):
    session = start()
    for move in WALK:  # what is set up once is set up, and the host has latents to move
        session.step(move)
    list(session.stream(WALK[:2], ahead=True))
    plain, arrived = Arrival.wait, list[bool]()

    def wait(self: Arrival) -> Any:
        torch.cuda.current_stream().synchronize()  # the next chunk's latents are done
        arrived.append(self._moment is None or self._moment.query())
        return plain(self)

    monkeypatch.setattr(Arrival, "wait", wait)
    decode = session.engine.model.decoder.decode

    def stalled(*given: Any) -> Any:
        torch.cuda._sleep(10 * LONG)
        return decode(*given)

    monkeypatch.setattr(session.engine.model.decoder, "decode", stalled)
    seconds = [chunk.report.seconds for chunk in session.stream(WALK[:3], ahead=True)]
    assert arrived[:2] == [False, False]
    assert all(s["decode"] > 1 > s["denoise"] for s in seconds)


def test_a_stream_that_is_left_while_it_decodes_disturbs_nobody(
    start: Callable[[], Session], monkeypatch: pytest.MonkeyPatch
):
    streamed, stepped = start(), start()
    for session in (streamed, stepped):
        session.step(FORWARD)
    with monkeypatch.context() as patch:
        late(patch, streamed.engine.model.decoder, "decode", beside=True)

        def interrupted(self: Arrival) -> Any:
            raise KeyboardInterrupt

        patch.setattr(Arrival, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(streamed.stream(WALK, ahead=True))
    assert same(streamed.step(TURN), stepped.step(TURN))
    assert_same_state(streamed, stepped)


def test_a_save_of_a_streamed_world_goes_on(start: Callable[[], Session], tmp_path: Path):
    streamed, stepped = start(), start()
    for move, _ in zip(WALK, streamed.stream(WALK, ahead=True), strict=True):
        stepped.step(move)
    streamed.save(tmp_path / "a.world")
    opened = worldstride.open(tmp_path / "a.world", engine=streamed.engine)
    assert_same_state(opened, stepped)
    truth = stepped.step(TURN)
    assert same(opened.step(TURN), truth)
    assert same(streamed.step(TURN), truth)
