"""Every preset goes on bit for bit where it was saved or forked; full compute is the plain loop."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import worldstride
from test_session import assert_same_state
from walking import FORWARD, MOVES, TURN, first_frames, levels_apart, same, select, walk
from worldstride import PRESETS, Acceleration, Action, Engine, Session
from worldstride.acceleration import AttentionReuse, resolve
from worldstride.attention import Partial, attend
from worldstride.context.kept import KeptContext
from worldstride.context.policy import SpatialMemory, TemporalWindow
from worldstride.denoising import DenoisePlan, denoise
from worldstride.denoising.policy import AdaptiveSteps, StepCache
from worldstride.engine import EngineSource
from worldstride.errors import InputError
from worldstride.levers import levers
from worldstride.models.courtyard.adapter import CourtyardContext, CourtyardModel
from worldstride.noise import normal
from worldstride.protocol import Conditions, Recalled

EVERYTHING = Acceleration(
    "everything", steps=7, shift=2.0, solver="unipc", warmup=1,
    temporal=TemporalWindow(scale=0.5, multiple=2), spatial=SpatialMemory(threshold=0.09, exploring=1),
    kept=KeptContext(sees="before", refresh=3), cache=StepCache("known", 0.9, first=2, rule="extrapolate"),
    adaptive=AdaptiveSteps(4, score="added", threshold=0.09, change=0.127), attention=AttentionReuse(2),
)  # fmt: skip
SETTINGS = {**PRESETS, "everything": EVERYTHING}
NAMES = pytest.mark.parametrize("name", SETTINGS)
THERE, BACK = (*MOVES, TURN, FORWARD), Action(frozenset({"KeyS"}))


def started(engine: Engine, settings: Acceleration | str, seed: int = 3) -> Session:
    session = engine.new(seed=seed)
    session.acceleration = settings
    return session


@NAMES
def test_a_saved_or_forked_world_goes_on_bit_for_bit(attentive: Engine, name: str, tmp_path: Path):
    session = started(attentive, SETTINGS[name])
    for move in THERE[:3]:
        session.step(move)
    session.save(tmp_path / "a.world")
    opened, forked = worldstride.open(tmp_path / "a.world", engine=attentive), session.fork()
    assert opened.acceleration == SETTINGS[name]
    for move in THERE[3:]:
        truth = session.step(move)
        for other in (opened, forked):
            chunk = other.step(move)
            assert same(truth, chunk)
            assert truth.report.signals == chunk.report.signals
            assert truth.report.context == chunk.report.context
            assert truth.report.steps_reason == chunk.report.steps_reason
            assert truth.report.encoded_latents == chunk.report.encoded_latents
            assert truth.report.kept_bytes == chunk.report.kept_bytes
    for other in (opened, forked):
        assert_same_state(session, other)
        assert session._state.policy == other._state.policy
        assert list(session._state.kept.records) == list(other._state.kept.records)
        assert session._state.kept.age == other._state.kept.age


def test_everything_at_once_fires_and_costs_less(attentive: Engine):
    sessions = started(attentive, EVERYTHING), started(attentive, "off")
    reports, plain = ([s.step(move).report for move in (*THERE, BACK, BACK)] for s in sessions)
    found = levers(EVERYTHING, attentive.model.chunk(1), reports)
    assert {lever.name for lever in found if lever.fired} == {
        "steps",
        "solver",
        "temporal",
        "spatial",
        "kept",
        "cache",
        "adaptive",
        "attention",
    }
    assert sum(r.flops["denoise"] for r in reports) < 0.6 * sum(r.flops["denoise"] for r in plain)
    assert sum(r.flops["context"] for r in reports) < sum(r.flops["context"] for r in plain)


@NAMES
def test_every_preset_is_repeatable_and_says_its_name(tiny_engine: Engine, name: str):
    a, b = (started(tiny_engine, SETTINGS[name]) for _ in range(2))
    for move in THERE[:3]:
        one = a.step(move)
        assert same(one, b.step(move))
        assert one.report.acceleration == name
    assert_same_state(a, b)


@NAMES
def test_every_preset_plays_models_of_another_structure(joint: Engine, guided: Engine, name: str, tmp_path: Path):
    for engine in (joint, guided):
        session = engine.open(first_frames(), torch.eye(4)[None], seed=3)
        session.acceleration = SETTINGS[name]
        session.step(FORWARD)
        session.save(tmp_path / "a.world")
        assert same(session.fork().step(TURN), worldstride.open(tmp_path / "a.world", engine=engine).step(TURN))


def no_noise(i: int) -> Tensor:
    raise AssertionError(f"step {i} asked for fresh noise")


def plain_loop(engine: Engine, session: Session, moves: Sequence[Action]) -> list[np.ndarray]:
    """Frames of full compute in the session's world, written out; the session gives world and cameras alone."""
    model, history, made = engine.model, session.history.fork(), []
    for k, move in enumerate(moves):
        shape = model.chunk(k)
        cameras = torch.from_numpy(session.step(move).cameras)
        plan, _ = select(history, shape, cameras, session._state.points, model.intrinsics)
        positions, kinds = plan.tables()
        latents = history.latents(plan.rows, model.device, model.latent_shape)[None]
        actions = [history.entries[i].led for i in plan.rows]
        where = history.cameras(plan.rows)[None]
        with torch.inference_mode():
            context = model.encode_context(Recalled(latents, where, positions, kinds, actions), None, attend)
            inputs = model.prepare(
                Conditions(k, cameras[None], cameras[None], model.intrinsics, positions=torch.arange(shape.new))
            )
            noise = normal((1, shape.new, *model.latent_shape), session._state.noise_seed, k, 0)
            clean, _ = denoise(model, noise, inputs, context, DenoisePlan(model.sampler()), attend, no_noise)
            committed = model.commit(clean, inputs[0])
            frames, _ = model.decoder.decode(committed, {})
        history.append(committed[0], cameras, (move,) * shape.new)
        made.append(frames[0].numpy())
    return made


@pytest.mark.parametrize(
    "settings", ["off", "exact", Acceleration("attention", attention=AttentionReuse(1)), Acceleration("late", warmup=9,
    steps=2)], ids=str,
)  # fmt: skip
def test_full_compute_is_the_plain_loop(attentive: Engine, settings: Acceleration | str):
    truth = plain_loop(attentive, attentive.new(seed=3), MOVES)
    session = started(attentive, settings)
    for move, frames in zip(MOVES, truth, strict=True):
        chunk = session.step(move)
        assert np.array_equal(chunk.frames, frames)
        assert [e.attended for e in chunk.report.evaluations] == [True] * 8


@pytest.mark.parametrize("name", [n for n in SETTINGS if n not in ("off", "exact")])
def test_first_chunks_are_made_at_full_compute(attentive: Engine, name: str):
    settings = Acceleration(**{**vars(SETTINGS[name]), "warmup": 2, "steps": 5})
    session, plain = started(attentive, settings), started(attentive, "off")
    for k, move in enumerate(MOVES[:3]):
        one, other = session.step(move), plain.step(move)
        assert same(one, other) is (k < 2)
        if k < 2:
            assert (one.report.steps, one.report.steps_reason) == (8, "full compute")
            assert one.report.encoded_latents == one.report.context_latents
            assert (one.report.kept_bytes, one.report.signals.pose) == (0, None)
    assert one.report.steps <= 5


@NAMES
def test_cameras_that_are_no_numbers_are_refused(tiny_engine: Engine, name: str):
    session, cameras = started(tiny_engine, SETTINGS[name]), walk(4)
    for move in MOVES[:2]:
        session.step(move)
    before = session.fork()
    cameras[1, 0, 3] = torch.nan
    with pytest.raises(InputError, match=r"cameras\[1\] holds NaN or infinity"):
        session.step(cameras=cameras)
    assert_same_state(session, before)
    assert session._state.policy == before._state.policy
    assert same(session.step(FORWARD), before.step(FORWARD))


class Watched(CourtyardModel):
    """Remembers the contexts that its evaluations saw, and what they gave."""

    def velocity(self, x: Tensor, sigma: float, inputs: Any, context: Any, attend: Any) -> Any:
        given = super().velocity(x, sigma, inputs, context, attend)
        self.seen.append((context, x, given[0]))
        return given


def watched(engine: Engine, evaluations: int | None) -> list[tuple[CourtyardContext, Tensor, Tensor]]:
    """What the evaluations of a world's second chunk saw."""
    assert isinstance(engine.model, CourtyardModel)
    model = Watched(engine.model.network, torch.float32)
    model.seen = []
    settings = Acceleration("attention", attention=None if evaluations is None else AttentionReuse(evaluations))
    session = Engine(model, EngineSource("courtyard", None, "random", "attentive"), resolve("off")).new(seed=3)
    session.step(FORWARD)
    session.acceleration = settings
    model.seen.clear()
    session.step(TURN)
    return model.seen


def test_the_first_attention_to_the_context_serves_later_evaluations(attentive: Engine):
    plain, reused = watched(attentive, None), watched(attentive, 8)
    assert len(plain) == len(reused) == 8
    first, later = reused[0][0], [context for context, _, _ in reused[1:]]
    assert not any(isinstance(pair, Partial) for pair in first.keys_values)
    assert all(isinstance(pair, Partial) for context in later for pair in context.keys_values)
    assert all(a is b for c in later[1:] for a, b in zip(c.keys_values, later[0].keys_values, strict=True))
    # the first evaluation is what it is without reuse; the next one sees the same x, and says something else
    (_, x, full), (_, same_x, part) = plain[0], reused[0]
    assert torch.equal(x, same_x)
    assert torch.allclose(full, part, atol=1e-4)
    assert torch.allclose(plain[1][1], reused[1][1], atol=1e-4)
    assert float((plain[1][2] - reused[1][2]).abs().max()) > 0.01


@pytest.mark.parametrize("evaluations", [2, 3, 7, 20])
def test_attention_to_the_context_is_computed_once_in_so_many(attentive: Engine, evaluations: int):
    session = started(attentive, Acceleration("attention", attention=AttentionReuse(evaluations)))
    made = session.step(FORWARD)
    assert [e.attended for e in made.report.evaluations] == [i % evaluations == 0 for i in range(8)]
    assert all(e.computed for e in made.report.evaluations)
    assert levels_apart(made, started(attentive, "off").step(FORWARD)) > 0
    contexts = [context for context, _, _ in watched(attentive, evaluations)]
    reuses = [isinstance(c.keys_values[0], Partial) for c in contexts]
    assert reuses == [i % evaluations != 0 for i in range(8)]


def test_presets_differ_and_fewer_steps_cost_less(tiny_engine: Engine):
    made = {name: started(tiny_engine, name).step(FORWARD) for name in ("off", "steps-4", "steps-2")}
    assert [c.report.steps for c in made.values()] == [8, 4, 2]
    assert all(not np.array_equal(a.frames, b.frames) for a, b in itertools.combinations(made.values(), 2))
    for name in ("balanced", "fast"):
        session = started(tiny_engine, name)
        reports = [session.step(move).report for move in THERE]
        assert all(r.solver == "unipc" and r.steps < 8 for r in reports)
        assert {r.acceleration for r in reports} == {name}
