"""What may be spared of Matrix-Game-3.0's chunks: frozen context, merged and gated memory, reused outputs, blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hy_golden
import worldstride
from hy_variants import latents
from mg3_golden import CHUNKS, actions, begin, case, engine, model, noise
from worldstride import Acceleration, Action, Session
from worldstride.acceleration import FrozenContext
from worldstride.attention import Selection, SparseAttend, Sparsity
from worldstride.bench.walk import walked as whole_walk
from worldstride.bench.walk import ways
from worldstride.context.policy import SpatialMemory
from worldstride.denoising.policy import StepCache
from worldstride.errors import InputError
from worldstride.levers import levers
from worldstride.models import quantised
from worldstride.models.matrix_game3.adapter import FIRST, MG3Context, MG3Inputs
from worldstride.report import ChunkReport
from worldstride.session import step_together

LEVERS = Path(__file__).parents[1] / "benchmarks" / "levers"
FORWARD, BACK, STILL = Action({"KeyW"}), Action({"KeyS"}), Action()


@pytest.fixture(autouse=True)
def _no_gradients(no_gradients: None) -> None:
    """Direct calls of the network need none."""


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def played(settings: Acceleration, chunks: int = 3, of: Session | None = None) -> tuple[Session, list[ChunkReport]]:
    """The recorded actions and noise with some settings."""
    session = of or begin()
    session.acceleration = settings
    return session, [session.step(actions(*CHUNKS[k]), noise=noise(k)).report for k in range(chunks)]


def walked(settings: Acceleration, walk: list[Action]) -> tuple[Session, list[ChunkReport]]:
    session = begin()
    session.acceleration = settings
    return session, [session.step(action).report for action in walk]


def sparse(keep: float, **more: Any) -> Sparsity:
    rule = Selection("mass", keep)
    return Sparsity((2, 2, 2), denoise=rule, context=rule, dense_layers=0, obey=True, **more)


def test_what_new_latents_see_of_others_is_all_that_they_need():
    """Frozen at the very level and latents that it was captured at, the context gives the same velocity."""
    of, compared = model(), list[float]()
    plain = of.velocity

    def both(x: Tensor, sigma: float, inputs: MG3Inputs, context: MG3Context, attend: Any) -> Any:
        whole, captured = plain(x, sigma, inputs, of.capturing(context), attend)
        alone, nothing = plain(x, sigma, inputs, of.frozen(context, captured), attend)
        assert not nothing
        compared.append(far(alone, whole))
        return whole, {}

    session = begin(engine(of))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of, "velocity", both)
        played(Acceleration(), of=session)
    assert len(compared) == 9
    assert max(compared) < 1e-5


def test_a_context_that_is_frozen_for_one_evaluation_is_not():
    plain, frozen = (played(s)[0] for s in (Acceleration(), Acceleration(frozen=FrozenContext(1))))
    assert torch.equal(latents(frozen), latents(plain))


def test_a_frozen_context_is_computed_once_a_chunk():
    (plain, whole), (session, reports) = (
        played(s) for s in (Acceleration(), Acceleration(frozen=FrozenContext()))
    )  # fmt: skip
    for report in reports[1:]:
        assert [e.attended for e in report.evaluations] == [True, False, False]
        assert "frozen" in report.levers
    assert reports[2].flops["denoise"] < 0.75 * whole[2].flops["denoise"]
    assert "frozen" not in reports[0].levers  # nothing is remembered or gone on from yet
    assert reports[0].flops == whole[0].flops
    assert torch.equal(latents(session)[:FIRST], latents(plain)[:FIRST])
    assert 0 < far(latents(session)[FIRST:], latents(plain)[FIRST:]) < 0.5
    two = played(Acceleration(frozen=FrozenContext(2)))[1]
    assert [e.attended for e in two[2].evaluations] == [True, False, True]
    (lever,) = levers(Acceleration(frozen=FrozenContext()), session.engine.model.chunk(1), reports)
    assert (lever.name, lever.fired, lever.chunks) == ("frozen", 2, 3)
    with pytest.raises(InputError, match=r"frozen\.evaluations"):
        FrozenContext(0)


def test_nothing_is_captured_that_nobody_takes_over():
    """With the context computed every second time, the third evaluation's is the chunk's last."""
    of, asked = model(), list[tuple[bool, bool]]()
    plain = of.network.velocity

    def velocity(*given: Any) -> Tensor:
        left, frozen = given[7:]
        asked.append((left is not None, bool(frozen)))
        return plain(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of.network, "velocity", velocity)
        played(Acceleration(frozen=FrozenContext(2)), 2, begin(engine(of)))
        assert asked == [(False, False)] * 3 + [(True, False), (False, True), (False, False)]
        asked.clear()
        played(Acceleration(steps=1, frozen=FrozenContext()), 2, begin(engine(of)))
        assert asked == [(False, False)] * 2


def test_worlds_with_other_settings_are_made_apart_and_alike_ones_together():
    every = [
        Acceleration(frozen=FrozenContext(), merged=True, sparsity=sparse(0.5)), Acceleration(merged=True),
        Acceleration(frozen=FrozenContext(), merged=True, sparsity=sparse(0.5)), Acceleration(),
    ]  # fmt: skip
    first = begin()
    together, alone = ([first.fork() for _ in every] for _ in range(2))
    for one, other, settings in zip(together, alone, every, strict=True):
        one.acceleration = other.acceleration = settings
    for k in range(3):
        given = actions(*CHUNKS[k])
        made = step_together(together, actions=[given] * 4, noise=[noise(k)] * 4)
        for session in alone:
            session.step(given, noise=noise(k))
    assert [c.report.batch for c in made] == [2, 1, 2, 1]
    for one, other in zip(together, alone, strict=True):
        assert far(latents(one), latents(other)) < 1e-5


def test_a_save_goes_on_with_the_same_settings(tmp_path: Path):
    session, _ = played(Acceleration("some", frozen=FrozenContext(2), merged=True), 2)
    session.save(tmp_path / "a.world")
    opened = worldstride.open(tmp_path / "a.world", engine=session.engine)
    assert opened.acceleration == session.acceleration
    chunks = [s.step(actions(*CHUNKS[2]), noise=noise(2)) for s in (session, opened)]
    assert torch.equal(latents(opened), latents(session))
    assert chunks[0].report.levers == chunks[1].report.levers


def test_a_guided_model_freezes_nothing_and_counts_each_branch():
    of = model(guidance=5.0)
    prompt = {"text": case()["context"][None], "negative_text": case()["context"][None]}
    session = engine(of).open(torch.zeros(1, 64, 96, 3, dtype=torch.uint8), torch.eye(4)[None], prompt)
    session.acceleration = Acceleration(frozen=FrozenContext())
    reports = [session.step(FORWARD).report for _ in range(2)]
    assert all(e.attended for r in reports for e in r.evaluations)
    assert reports[1].flops["denoise"] == 3 * (of.joint_flops(19, 19) + of.joint_flops(14, 14))
    (lever,) = levers(session.acceleration, of.chunk(1), reports)
    assert "is guided" in lever.note


def test_slots_with_one_latent_are_merged_where_they_show_most():
    """Standing still all five slots hold the same latent; merged it keeps the camera of the best slot."""
    _, reports = walked(Acceleration("merged", merged=True), [STILL, STILL])
    assert reports[1].context.memory == (1,)
    assert reports[1].context.filled == 5
    assert len(reports[1].signals.similarity) == len(reports[1].context.slots) == 1
    assert reports[1].levers == ("merged",)
    assert reports[1].context_latents == 1
    (lever,) = levers(Acceleration("merged", merged=True), model().chunk(1), reports)
    assert str(lever) == "merged: fired in 1 of 2 chunks; 0.5 of 2.5 slots a chunk"
    left = walked(Acceleration(merged=False), [STILL, STILL])[1]
    assert not left[1].levers
    assert not levers(Acceleration(merged=False), model().chunk(1), left)  # nobody asked
    with pytest.raises(InputError, match=r"merged must be true or false, got 'yes'"):
        Acceleration(merged="yes")  # type: ignore[arg-type]


def test_a_merged_slot_keeps_its_own_reference():
    """Of slots 3, 9, 3, 9, 1 two stay of each but the sink; each is told relative to the latent that its slot asks."""
    of, asked = model(), list[Tensor]()
    prepared = of.network.prepared

    def seen(cameras: Tensor, *rest: Any) -> Any:
        asked.append(cameras)
        return prepared(cameras, *rest)

    session = begin(engine(of))
    played(Acceleration(), 1, session)
    session.acceleration = Acceleration(merged=True)
    other = session.fork()
    other.acceleration = Acceleration()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of.network, "prepared", seen)
        report = session.step(actions(*CHUNKS[1]), noise=noise(1), recall=[3, 9, 3, 9, 1]).report
        other.step(actions(*CHUNKS[1]), noise=noise(1), recall=[3, 9, 3, 9, 1])
    slots = list(report.context.slots)
    assert report.context.memory == tuple([3, 9, 3, 9, 1][i] for i in slots)
    assert len(slots) == 3
    assert torch.equal(asked[0][:, :3], asked[1][:, slots])
    assert torch.equal(asked[0][:, 3:], asked[1][:, 5:])


def test_nothing_is_merged_where_all_slots_differ():
    recall = [3, 5, 9, 2, 1]
    made = list[Tensor]()
    for merged in (None, True):
        session, _ = played(Acceleration(), 1)
        session.acceleration = Acceleration(merged=merged)
        session.step(actions(*CHUNKS[1]), noise=noise(1), recall=recall)
        made.append(latents(session))
    assert torch.equal(*made)


def test_memory_is_dropped_ahead_and_kept_on_the_way_back():
    """The gate has its own scale, on which a camera shows itself wholly; the latents that a chunk goes on from are as
    near as a window."""
    settings = Acceleration("gated", spatial=SpatialMemory(threshold=0.1, hysteresis=0.0))
    _, reports = walked(settings, [FORWARD, FORWARD, FORWARD, BACK, BACK, BACK])
    ahead, back = reports[2], reports[4]
    assert ahead.context.memory == ()
    assert "exploring, memory dropped" in ahead.context.reason
    assert "spatial" in ahead.levers
    assert ahead.context_latents == 0
    assert len(back.context.memory) == 5
    still = walked(settings, [STILL, STILL])[1][1]
    assert still.signals.pose is not None
    assert still.signals.pose.old == pytest.approx(1.0)
    assert still.signals.pose.added == pytest.approx(0.0)  # and so memory adds nothing to what the past shows
    (plain,) = walked(Acceleration(), [STILL, STILL])[1][1:]
    assert max(plain.signals.similarity) == pytest.approx(0.8)  # on the model's own scale


def test_outputs_are_reused_on_a_revisit():
    _, reports = walked(Acceleration("cached", cache=StepCache(threshold=0.7)), [STILL, STILL])
    assert [e.computed for e in reports[1].evaluations] == [True, False, True]
    both = Acceleration("both", cache=StepCache(threshold=0.7), frozen=FrozenContext())
    _, reports = walked(both, [STILL, STILL])
    assert [e.attended for e in reports[1].evaluations] == [True, False, False]
    assert set(reports[1].levers) == {"cache", "frozen"}


@pytest.mark.parametrize("more", [{}, {"frozen": FrozenContext()}], ids=str)
def test_keeping_every_block_changes_nothing(more: dict[str, Any]):
    plain, dense = played(Acceleration(**more)), played(Acceleration(sparsity=sparse(1.0), **more))
    assert far(latents(dense[0]), latents(plain[0])) < 1e-5
    assert dense[1][2].sparsity is not None
    assert dense[1][2].sparsity.calls["sparse"] > 0


def test_fewer_blocks_are_attended_to():
    settings = Acceleration("sparse", frozen=FrozenContext(), sparsity=sparse(0.25))
    _, reports = played(settings)
    found = reports[2].sparsity
    assert found is not None
    assert found.density["context"] < 0.4
    assert found.density["chunk"] < 0.75  # the chunk's own ten of 19 latents are all attended to
    assert {"frozen", "sparsity"} <= set(reports[2].levers)
    whole = played(Acceleration(frozen=FrozenContext()))[1]
    assert reports[2].flops["denoise"] < whole[2].flops["denoise"]


def test_blocks_end_where_segments_do():
    """Remembered, given and new latents: no block holds tokens of two of them."""
    attend = SparseAttend(lambda *_, **__: torch.zeros(0), sparse(0.5), (2, 3), (0, 3, 0, 4, 10))  # type: ignore[arg-type]
    for frames, ends in ((17, {18, 42, 102}), (7, {18, 42}), (14, {24, 84})):  # the last without memory, as guided
        assert ends <= set(attend.layout(frames, torch.device("cpu")).starts.tolist())


def test_settings_for_this_model_pull_all_their_levers(monkeypatch: pytest.MonkeyPatch):
    """Out and back: no memory ahead, merged slots, and an evaluation spared, on the way back."""
    pytest.importorskip("torchao", reason="one way has weights in 8 bits")
    monkeypatch.setattr(quantised, "LEAST", 32)  # the layers of this small network are narrow
    fast, light = ways(engine(), [str(LEVERS / "mg3-fast.toml"), str(LEVERS / "mg3-balanced.toml+int8")])
    row: Any = whole_walk(fast, 8, 0)
    fired = {lever for e in row["each"] for lever in e["levers"]}
    assert fired >= {"frozen", "merged", "spatial", "cache"}
    assert {e["evaluations"] for e in row["each"]} == {2, 3}
    assert min(e["context_latents"] for e in row["each"][1:]) == 0
    assert (light.name, light.start().source.quantised) == ("mg3-balanced, int8", "int8")
    assert type(light.start().model.network.blocks[0].mlp.up.weight.data).__name__ == "Int8Tensor"  # type: ignore[attr-defined]
    assert len(whole_walk(light, 2, 0)["each"]) == 2  # type: ignore[arg-type]
    played_in_8_bits = light.start()
    with pytest.raises(InputError, match="an original structure is rebuilt of whole weights, not of int8 ones"):
        ways(played_in_8_bits, ["upstream"])[0].start()
    with pytest.raises(InputError, match="are in 8 bits already"):
        ways(played_in_8_bits, ["off+int8"])[0].start()


def test_only_what_can_be_quantised_is():
    played = engine()
    played.model = hy_golden.model()
    with pytest.raises(InputError, match=r"'hy_worldplay' cannot be quantised; leave out \+int8 of 'off\+int8'"):
        ways(played, ["off+int8"])
