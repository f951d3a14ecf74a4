"""Block-sparse attention in whole sessions: what worlds show, what chunks report, what levers say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import worldstride
from walking import FORWARD, MOVES, TURN, first_frames, levels_apart, same
from worldstride import Acceleration, Chunk, Engine, Session, step_together
from worldstride.attention import Selection, Sparsity
from worldstride.attention.cost import Rates
from worldstride.levers import levers


def sparsely(keep: float, dense_layers: int = 0, **given: Any) -> Acceleration:
    """Blocks of 4 x 4 tokens of one latent, as fit the courtyard."""
    how = Sparsity((1, 4, 4), "boxes", Selection("mass", keep), dense_layers=dense_layers, **given)
    return Acceleration("sparse", sparsity=how)


@pytest.fixture(scope="module")
def shipped() -> Engine:
    return worldstride.load("courtyard", device="cpu")


@pytest.fixture(scope="module")
def begun(shipped: Engine) -> Session:
    """A world of which one chunk was made. For forks."""
    session = shipped.new(seed=3)
    session.step(FORWARD)
    return session


@pytest.fixture(scope="module")
def full(begun: Session) -> Chunk:
    """The next chunk at full compute."""
    return begun.fork().step(TURN)


@pytest.fixture(scope="module")
def quarter(begun: Session) -> Chunk:
    """The same with a quarter of the context."""
    session = begun.fork()
    session.acceleration = sparsely(0.25, 1, context=Selection("mass", 0.5))
    return session.step(TURN)


def grey_levels(a: Chunk, b: Chunk) -> float:
    return float(np.abs(a.frames.astype(int) - b.frames).mean())


def test_keeping_everything_shows_what_full_compute_shows(begun: Session, full: Chunk):
    session = begun.fork()
    session.acceleration = sparsely(1.0)
    made = session.step(TURN)
    assert grey_levels(made, full) < 3
    report = made.report.sparsity
    assert report is not None
    assert (report.calls, report.density) == ({"sparse": 8 * 8}, {"chunk": pytest.approx(1.0)})
    assert made.report.flops == pytest.approx(full.report.flops)


def test_full_compute_says_nothing_of_sparsity(begun: Session, full: Chunk):
    assert full.report.sparsity is None
    assert full.report.to_json()["sparsity"] is None
    assert "sparsity" not in full.report.levers
    shape = begun.engine.model.chunk(1)
    assert "sparsity" not in [lever.name for lever in levers(Acceleration(), shape, [full.report])]


def test_a_quarter_of_the_context_is_reported_and_costs_less(begun: Session, full: Chunk, quarter: Chunk):
    report, shape = quarter.report, begun.engine.model.chunk(1)
    assert report.sparsity is not None
    seen = report.context_latents
    assert seen >= 8
    # whole blocks of a latent's 96 tokens; the first of 8 layers is dense
    blocks, new = 6 * seen, 6 * shape.new
    expected = (1 + 7 * (int(0.25 * blocks) + new) / (blocks + new)) / 8
    assert report.sparsity.density["chunk"] == pytest.approx(expected)
    # the last layer's context attends to nothing: nobody asks for its tokens
    assert report.sparsity.density["context"] == pytest.approx((1 + 6 * int(0.5 * blocks) / blocks) / 7)
    assert report.sparsity.calls == {"dense": 8 + 1, "sparse": 7 * 8 + 6}
    assert report.sparsity.implementation == "gather"
    assert "sparsity" in report.levers
    for stage in ("context", "denoise"):
        assert report.flops[stage] < 0.95 * full.report.flops[stage]
    assert 0 < grey_levels(quarter, full) < 40
    (lever,) = levers(sparsely(0.25), shape, [report])
    assert (lever.name, lever.fired) == ("sparsity", 1)
    density = report.sparsity.density
    assert lever.note == f"mean density {density['chunk']:.3f} (chunk), {density['context']:.3f} (context)"
    plain = json.loads(json.dumps(report.to_json()))
    assert plain["sparsity"] == asdict(report.sparsity)


def test_flops_fall_with_the_density_of_the_chunk(begun: Session, full: Chunk):
    made = list[float]()
    for keep in (0.0, 0.5):
        session = begun.fork()
        session.acceleration = replace(sparsely(keep), steps=2)
        report = session.step(TURN).report
        assert report.flops["context"] == full.report.flops["context"]
        made.append(report.flops["denoise"])
    assert made[0] < made[1] < full.report.flops["denoise"] / 4


def test_a_fork_makes_the_same_bits(begun: Session, quarter: Chunk):
    session = begun.fork()
    session.acceleration = sparsely(0.25, 1, context=Selection("mass", 0.5))
    assert same(session.step(TURN), quarter)


# smaller worlds

BOTH: dict[str, Any] = {"denoise": Selection("mean", 0.3), "context": Selection("cosine", 0.5)}
SMALL = Acceleration("small", sparsity=Sparsity((1, 2, 2), "serpentine", **BOTH, dense_layers=0))


def played(engine: Engine, settings: Acceleration, seed: int = 3) -> Session:
    session = engine.new(seed=seed)
    session.acceleration = settings
    return session


def walked(session: Session, moves: Sequence[Any] = MOVES) -> list[Chunk]:
    return [session.step(move) for move in moves]


def test_a_walk_again_makes_the_same_bits(attentive: Engine):
    first, again = walked(played(attentive, SMALL)), walked(played(attentive, SMALL))
    plain = walked(played(attentive, Acceleration()))
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert [c.report.sparsity for c in first] == [c.report.sparsity for c in again]
    assert not any(same(a, b) for a, b in zip(first, plain, strict=True))


def test_a_save_keeps_its_sparsity(attentive: Engine, tmp_path: Path):
    session = played(attentive, SMALL)
    walked(session, MOVES[:2])
    session.save(tmp_path / "a.world")
    opened = worldstride.open(tmp_path / "a.world", engine=attentive)
    assert opened.acceleration == SMALL
    one, other = session.step(TURN), opened.step(TURN)
    assert same(one, other)
    assert one.report.sparsity == other.report.sparsity is not None


def test_first_chunks_are_dense_where_that_is_asked_for(attentive: Engine):
    session, plain = played(attentive, replace(SMALL, warmup=2)), played(attentive, Acceleration())
    made = list(zip(walked(session), walked(plain), strict=True))
    assert [same(a, b) for a, b in made[:3]] == [True, True, False]
    assert [a.report.sparsity is None for a, _ in made] == [True, True, False, False]


def test_sparse_and_plain_worlds_are_made_apart(attentive: Engine):
    settings = (SMALL, Acceleration(), sparsely(0.0))
    together, alone = ([played(attentive, s) for s in settings] for _ in range(2))
    for move in MOVES[:3]:
        made = step_together(together, actions=[move] * 3)
        for chunk, session in zip(made, alone, strict=True):
            own = session.step(move)
            assert same(chunk, own)
            assert chunk.report.batch == 1
            assert chunk.report.sparsity == own.report.sparsity
    assert [c.report.sparsity is None for c in made] == [False, True, False]


def test_sparse_worlds_of_one_setting_are_made_together(attentive: Engine):
    together, alone = ([played(attentive, SMALL, seed) for seed in (3, 5)] for _ in range(2))
    for move in MOVES[:3]:
        made = step_together(together, actions=[move] * 2)
        for chunk, session in zip(made, alone, strict=True):
            own = session.step(move)
            assert levels_apart(chunk, own) <= 1
            assert (chunk.report.batch, own.report.batch) == (2, 1)
            assert chunk.report.sparsity is not None
            assert own.report.sparsity is not None
            assert chunk.report.sparsity.density == pytest.approx(own.report.sparsity.density)
            assert chunk.report.flops == pytest.approx(own.report.flops)


def test_an_engine_keeps_the_layouts_of_its_worlds(attentive: Engine):
    engine = Engine(attentive.model, attentive.source, Acceleration())
    walked(played(engine, Acceleration()))
    assert engine.layouts == {}
    walked(played(engine, SMALL))
    made = dict(engine.layouts)
    assert made
    walked(played(engine, SMALL, seed=5))
    assert engine.layouts.keys() == made.keys()
    assert all(engine.layouts[key] is made[key] for key in made)


def test_a_lever_without_gain_says_what_was_predicted(attentive: Engine, monkeypatch: pytest.MonkeyPatch):
    engine = Engine(attentive.model, attentive.source, Acceleration())
    slow = Rates(1, 1e3, 1e6, 0.0, 0.0, 1e3)
    monkeypatch.setattr(engine, "rates", lambda channels: slow)
    made, plain = walked(played(engine, SMALL)), walked(played(engine, Acceleration()))
    assert all(levels_apart(a, b) <= 1 for a, b in zip(made, plain, strict=True))
    assert all(c.report.sparsity is not None and set(c.report.sparsity.calls) == {"dense"} for c in made)
    assert not any("sparsity" in c.report.levers for c in made)
    assert made[2].report.flops == plain[2].report.flops
    (lever,) = levers(SMALL, engine.model.chunk(1), [c.report for c in made])
    assert (lever.fired, lever.note[:27]) == (0, "every attention was dense: ")


def test_a_lever_that_was_asked_of_no_layer_says_so(attentive: Engine):
    settings = Acceleration("dense", sparsity=Sparsity((1, 2, 2), "serpentine", **BOTH, dense_layers=99))
    made, plain = walked(played(attentive, settings)), walked(played(attentive, Acceleration()))
    assert all(levels_apart(a, b) <= 1 for a, b in zip(made, plain, strict=True))
    (lever,) = levers(settings, attentive.model.chunk(1), [c.report for c in made])
    assert lever.fired == 0
    assert "all layers are dense_layers" in lever.note


def test_a_model_without_blocks_attends_densely_and_the_lever_says_so(joint: Engine):
    session, plain = (joint.open(first_frames(), torch.eye(4)[None]) for _ in range(2))
    session.acceleration = SMALL
    made = session.step(FORWARD)
    assert same(made, plain.step(FORWARD))
    assert made.report.sparsity is None
    (lever,) = levers(SMALL, joint.model.chunk(1), [made.report])
    assert (lever.fired, lever.note) == (0, "the model attends to no blocks")
