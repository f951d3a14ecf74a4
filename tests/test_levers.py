"""What every lever did in a run and why not, and what a chunk costs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from conftest import TINY
from walking import FORWARD, MOVES, TURN, first_frames
from worldstride import Acceleration, ChunkReport, Engine
from worldstride.acceleration import PRESETS, AttentionReuse, FrozenContext
from worldstride.attention import Partial
from worldstride.attention.written import in_float32
from worldstride.camera import camera_from_pose
from worldstride.context.kept import KeptContext
from worldstride.context.policy import SpatialMemory, TemporalWindow
from worldstride.denoising.policy import AdaptiveSteps, StepCache
from worldstride.engine import EngineSource
from worldstride.levers import Lever, levers
from worldstride.models.courtyard.adapter import CourtyardModel
from worldstride.models.courtyard.config import CourtyardConfig
from worldstride.models.courtyard.weights import random_network
from worldstride.protocol import Conditions, Costed, Recalled


def played(engine: Engine, settings: Acceleration, chunks: int = 4) -> list[ChunkReport]:
    square = engine.frame_size == (24, 24)
    session = engine.new(seed=3) if square else engine.open(first_frames(), torch.eye(4)[None])
    session.acceleration = settings
    return [session.step(move).report for move in (MOVES * 2)[:chunks]]


def only(engine: Engine, settings: Acceleration, chunks: int = 4) -> Lever:
    """The one lever that settings ask for, over so many chunks."""
    (lever,) = levers(settings, engine.model.chunk(1), played(engine, settings, chunks))
    assert lever.chunks == chunks
    return lever


def asking(**given: Any) -> Acceleration:
    return Acceleration("asking", **given)


FIRING = [
    ("steps", asking(steps=4), 4, "4.0 evaluations a chunk"),
    ("solver", asking(solver="unipc"), 4, "in place of Euler"),
    ("window", asking(window=2), 4, "2.0 of 4 recent latents a chunk"),
    ("memory", asking(memory=1), 3, "0.8 of 2 retrieved latents a chunk"),  # nothing is old in the first chunk
    ("memory", asking(memory=0), 3, "0.0 of 2 retrieved latents a chunk"),
    ("temporal", asking(temporal=TemporalWindow(scale=1e-6)), 2, "2.5 of 4 recent latents a chunk"),
    ("spatial", asking(spatial=SpatialMemory(threshold=1.0)), 3, "0.0 of 2 retrieved latents a chunk"),
    ("spatial", asking(spatial=SpatialMemory(threshold=1.0, exploring=1)), 3, "0.8 of 2 retrieved latents a chunk"),
    ("kept", asking(kept=KeptContext()), 3, "4.0 of 5.5 context latents encoded"),
    ("cache", asking(cache=StepCache("known", 0.0)), 4, "6.0 outputs reused a chunk"),
    ("cache", asking(cache=StepCache("added", 0.0, first=3, last=2)), 3, "2.2 outputs reused a chunk"),
    ("adaptive", asking(adaptive=AdaptiveSteps(2, threshold=0.0)), 4, "2.0 evaluations a chunk"),
    ("adaptive", asking(adaptive=AdaptiveSteps(4, score="added", threshold=1.0, change=1e6)), 4, "4.0 evaluations"),
    ("attention", asking(attention=AttentionReuse(8)), 4, "7.0 evaluations a chunk reused attention to the context"),
    ("attention", asking(attention=AttentionReuse(3)), 4, "5.0 evaluations a chunk reused attention to the context"),
]


@pytest.mark.parametrize(("name", "settings", "fired", "note"), FIRING)
def test_a_lever_that_fires_says_what_it_saved(
    tiny_engine: Engine, name: str, settings: Acceleration, fired: int, note: str
):
    lever = only(tiny_engine, settings)
    assert (lever.name, lever.fired) == (name, fired)
    assert lever.note.startswith(note)


SCORE = r"score '{}' from \d\.\d\d to \d\.\d\d never "
IDLE = [
    ("window", asking(window=4), 2, "full compute is no more than was asked for"),
    ("memory", asking(memory=2), 2, "full compute is no more than was asked for"),
    ("memory", asking(memory=1), 1, "nothing was old enough to be retrieved"),
    ("temporal", asking(temporal=TemporalWindow()), 1, "no change known"),
    ("temporal", asking(temporal=TemporalWindow(scale=1e6)), 4, r"smoothed change \S+ to \S+ never asked for less"),
    ("spatial", asking(spatial=SpatialMemory(threshold=1.0)), 1, "nothing was old enough to be retrieved"),
    ("spatial", asking(spatial=SpatialMemory(threshold=0.0, hysteresis=0)), 3, SCORE.format("added") + "fell below 0"),
    ("spatial", asking(spatial=SpatialMemory("known", 0.5, None, 0.1)), 3, SCORE.format("known") + "fell below 0.4"),
    ("kept", asking(kept=KeptContext()), 1, "every context was encoded anew"),
    ("kept", asking(kept=KeptContext(refresh=1)), 3, "every context was encoded anew"),
    ("kept", asking(kept=KeptContext(refresh=1, anew=0.5)), 3, "every context was encoded anew: score 'added' from "
     r"\d\.\d\d to \d\.\d\d against 0\.5"),
    ("cache", asking(cache=StepCache("added", 1.0)), 3, SCORE.format("added") + "reached 1 with its margin"),
    ("cache", asking(cache=StepCache("similarity", 1.0)), 3, SCORE.format("similarity") + "reached 1 with its margin"),
    ("cache", asking(cache=StepCache("added", 0.5)), 1, "score 'added', unknown, never reached 0.5 with its margin"),
    ("cache", asking(cache=StepCache("known", 0.0, first=4, last=4)), 2, "8 steps leave none between the first and the "
     "last that are computed"),
    ("adaptive", asking(adaptive=AdaptiveSteps(score="added", threshold=1.0)), 3, SCORE.format("added") + "reached 1"),
    ("adaptive", asking(adaptive=AdaptiveSteps(8, threshold=0.0)), 2, "8 steps where known are no fewer "
     "than elsewhere"),
    ("spatial", asking(spatial=SpatialMemory(threshold=1.0, exploring=2)), 3, "2 latents while exploring are no fewer "
     "than 2"),
    ("adaptive", asking(adaptive=AdaptiveSteps(score="added")), 1, "score 'added', unknown, never reached 0.95"),
    ("attention", asking(attention=AttentionReuse(1)), 2, "every evaluation computes its own"),
    ("frozen", asking(frozen=FrozenContext()), 2, "no evaluation could reuse it: the model shares none, .*"),
    ("merged", asking(merged=True), 2, "the model fills no slots"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings", "chunks", "note"), IDLE)
def test_a_lever_that_does_not_fire_says_why(
    tiny_engine: Engine, name: str, settings: Acceleration, chunks: int, note: str
):
    lever = only(tiny_engine, settings, chunks)
    assert (lever.name, lever.fired) == (name, 0)
    assert re.fullmatch(note, lever.note), lever.note


@pytest.mark.parametrize(
    ("name", "settings", "note"),
    [
        (
            "attention",
            asking(attention=AttentionReuse(2)),
            "no evaluation could reuse it: the model shares none, is guided, or takes one evaluation a chunk",
        ),
        ("kept", asking(kept=KeptContext()), "every context was encoded anew: the model keeps no latents"),
        ("solver", asking(solver="euler"), "the model brings its own solver"),
    ],
)
def test_a_model_that_lacks_a_lever_is_said_to(joint: Engine, name: str, settings: Acceleration, note: str):
    assert only(joint, settings, 2) == Lever(name, 0, 2, note)


def test_as_many_steps_as_full_compute_save_nothing(tiny_engine: Engine):
    lever = only(tiny_engine, asking(steps=8), 2)
    assert (lever.fired, lever.note) == (0, "full compute is no more than was asked for")


def test_encoding_anew_on_purpose_is_not_blamed_on_the_model(tiny_engine: Engine):
    lever = only(tiny_engine, asking(kept=KeptContext(incremental=False)), 2)
    assert lever.fired == 0
    assert "model" not in lever.note


@pytest.mark.parametrize(
    "settings",
    [
        asking(window=2, temporal=TemporalWindow(scale=1e6)),
        asking(memory=1, spatial=SpatialMemory(threshold=0.0)),
        asking(steps=4, adaptive=AdaptiveSteps(3, score="added", threshold=1.0)),
    ],
    ids=["temporal", "spatial", "adaptive"],
)
def test_a_lever_is_not_given_what_a_plain_bound_saved(tiny_engine: Engine, settings: Acceleration):
    bound, policy = levers(settings, tiny_engine.model.chunk(1), played(tiny_engine, settings))
    assert bound.fired
    assert policy.fired == 0


def test_a_short_history_is_no_levers_doing(tiny_engine: Engine):
    session = tiny_engine.open(first_frames(1, 24, 24), torch.eye(4)[None])
    session.acceleration = asking(window=4)
    (lever,) = levers(session.acceleration, tiny_engine.model.chunk(1), [session.step().report])
    assert lever.fired == 0


def test_warm_up_chunks_do_not_count(tiny_engine: Engine):
    settings = asking(warmup=3, attention=AttentionReuse(8))
    reports = played(tiny_engine, settings, 4)
    for count, fired in ((2, 0), (3, 0), (4, 1)):
        (lever,) = levers(settings, tiny_engine.model.chunk(1), reports[:count])
        assert (lever.fired, lever.chunks) == (fired, count)
        warm = lever.note == "the first 3 chunks are made at full compute"
        assert warm == (fired == 0)


def test_without_chunks_nothing_fired(tiny_engine: Engine):
    shape = tiny_engine.model.chunk(1)
    assert levers(asking(steps=2, warmup=3), shape, []) == [Lever("steps", 0, 0, "no chunk was made")]


def test_every_lever_that_is_asked_for_is_told_of_in_order(tiny_engine: Engine):
    settings = asking(
        steps=4, solver="unipc", window=2, memory=1, temporal=TemporalWindow(), spatial=SpatialMemory(),
        kept=KeptContext(), cache=StepCache(), adaptive=AdaptiveSteps(), attention=AttentionReuse(),
    )  # fmt: skip
    found = levers(settings, tiny_engine.model.chunk(1), played(tiny_engine, settings, 2))
    names = ["steps", "solver", "window", "memory", "temporal", "spatial", "kept", "cache", "adaptive", "attention"]
    assert [lever.name for lever in found] == names
    for lever in found:
        assert str(lever) == f"{lever.name}: fired in {lever.fired} of 2 chunks; {lever.note}"
        assert json.loads(json.dumps(lever.to_json())) == {
            "name": lever.name, "fired": lever.fired, "chunks": 2, "note": lever.note,
        }  # fmt: skip


@pytest.mark.parametrize("name", ["off", "exact"])
def test_full_compute_has_no_levers(tiny_engine: Engine, name: str):
    assert levers(PRESETS[name], tiny_engine.model.chunk(1), played(tiny_engine, PRESETS[name], 2)) == []


def written_out(q: Tensor, k: Tensor, v: Tensor, *, lse: bool = False) -> Any:
    """Attention by matrix products, which the counter sees."""
    out, total = in_float32(q, k, v, None, lse)
    return out if total is None else Partial(out, total)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CONFIGS = [
    TINY,
    replace(TINY, refine=0),
    replace(TINY, camera="ray"),
    replace(TINY, camera="projective"),
    replace(TINY, size=48, depth=3, width=128, heads=2),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["tiny", "no refinement", "ray", "projective", "larger"])
def test_costs_are_those_of_the_passes(config: CourtyardConfig):
    model = CourtyardModel(random_network(config).eval(), torch.float32)
    assert isinstance(model, Costed)
    latents, where = normal(1, 6, *model.latent_shape).clamp(-1, 1), camera_from_pose(normal(1, 6, 4) * 0.1)
    ranks, kinds = torch.arange(-6, 0), torch.zeros(6, dtype=torch.long)

    def counted(work: Any, *arguments: Any) -> tuple[Any, float]:
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            return work(*arguments), counter.get_total_flops()

    context, cost = counted(model.encode_context, Recalled(latents, where, ranks, kinds), None, written_out)
    assert model.context_flops(6, 6) == pytest.approx(cost, rel=1e-3)
    two = Recalled(latents[:, :2], where[:, :2], ranks[:2], kinds[:2])
    kept, cost = counted(model.encode_latents, two, None, written_out)
    assert model.context_flops(2, 2) == pytest.approx(cost, rel=1e-3)
    past = model.join_context(kept.unbind(1), two)
    none = two.part([], two.latents[:, :0])
    rest = Recalled(latents[:, 2:], where[:, 2:], ranks[2:], kinds[2:])
    _, cost = counted(model.encode_latents, rest, past, written_out)
    assert model.context_flops(4, 6) == pytest.approx(cost, rel=1e-3)
    coming = where[:, :4]
    (inputs,) = model.prepare(Conditions(0, coming, coming, model.intrinsics, positions=torch.arange(4)))
    noise = normal(1, 4, *model.latent_shape)
    for seen, size in ((context, 6), (past, 2), (model.join_context([], none), 0)):
        _, cost = counted(model.velocity, noise, 0.5, inputs, seen, written_out)
        assert model.evaluation_flops(4, size) == pytest.approx(cost, rel=1e-3)
    assert model.context_flops(0, 6) == 0


class Counted(CourtyardModel):
    """Counts the operations of its passes."""

    def __init__(self) -> None:
        super().__init__(random_network(TINY).eval(), torch.float32)
        self.spent = {"context": 0.0, "denoise": 0.0}

    def _counted(self, stage: str, work: Any, *arguments: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            out = work(*arguments[:-1], written_out)
        self.spent[stage] += counter.get_total_flops()
        return out

    def encode_context(self, *arguments: Any) -> Any:
        return self._counted("context", super().encode_context, *arguments)

    def encode_latents(self, *arguments: Any) -> Any:
        return self._counted("context", super().encode_latents, *arguments)

    def velocity(self, *arguments: Any) -> Any:
        return self._counted("denoise", super().velocity, *arguments)


@pytest.mark.parametrize(
    "settings",
    [
        asking(),
        asking(kept=KeptContext()),
        asking(kept=KeptContext(sees="before")),
        asking(kept=KeptContext(sees="itself", refresh=2)),
        asking(attention=AttentionReuse(3), memory=1),
        asking(cache=StepCache("known", 0.0), window=3),
        asking(adaptive=AdaptiveSteps(4, score="added", threshold=1.0, change=1e6), solver="unipc"),
    ],
    ids=["off", "kept", "before", "itself", "attention", "cache", "adaptive"],
)
def test_reports_tell_what_was_spent(settings: Acceleration):
    model = Counted()
    session = Engine(model, EngineSource("courtyard", None, "random", "tiny"), settings).new(seed=3)
    for move in (FORWARD, TURN, FORWARD):
        model.spent = dict.fromkeys(model.spent, 0.0)
        flops = session.step(move).report.flops
        assert flops["denoise"] == pytest.approx(model.spent["denoise"], rel=1e-3)
        # latents that see only themselves have noise levels of their own, which are not counted and hardly cost
        alone = settings.kept is not None and settings.kept.sees == "itself"
        assert flops["context"] == pytest.approx(model.spent["context"], rel=0.05 if alone else 1e-3)


def total(reports: Sequence[ChunkReport], stage: str) -> float:
    return sum(r.flops[stage] for r in reports)


def test_what_is_saved_costs_less(tiny_engine: Engine):
    plain = played(tiny_engine, asking(), 3)
    assert all(r.flops.keys() == {"context", "denoise"} and min(r.flops.values()) > 0 for r in plain)
    reused = played(tiny_engine, asking(attention=AttentionReuse(8)), 3)
    assert total(reused, "denoise") < total(plain, "denoise")
    assert total(reused, "context") == total(plain, "context")
    sometimes = played(tiny_engine, asking(attention=AttentionReuse(2)), 3)
    assert total(reused, "denoise") < total(sometimes, "denoise") < total(plain, "denoise")
    kept = played(tiny_engine, asking(kept=KeptContext()), 3)
    itself = played(tiny_engine, asking(kept=KeptContext(sees="itself")), 3)
    assert total(itself, "context") < total(kept, "context") < total(plain, "context")
    assert total(kept, "denoise") == total(plain, "denoise")
    assert total(played(tiny_engine, asking(steps=4), 3), "denoise") == total(plain, "denoise") / 2
    assert played(tiny_engine, asking(cache=StepCache("known", 0.0)), 1)[0].flops["denoise"] == (
        plain[0].flops["denoise"] / 4
    )


def test_a_model_that_does_not_tell_costs_nothing_known(joint: Engine):
    assert [r.flops for r in played(joint, asking(), 2)] == [{}, {}]
