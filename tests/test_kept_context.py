"""Keys and values that are kept from chunk to chunk: what keeping changes, and what it must not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import worldstride
from conftest import TINY
from joint_model import JointModel
from walking import FORWARD, MOVES, TURN, first_frames, levels_apart, same
from worldstride import Acceleration, Action, Engine, Session
from worldstride.attention import attend
from worldstride.camera import camera_from_pose
from worldstride.context.history import History
from worldstride.context.kept import KeptContext, KeptLatents, Sees, encode_kept
from worldstride.context.selection import ContextPlan
from worldstride.engine import EngineSource
from worldstride.errors import InputError
from worldstride.levers import levers
from worldstride.models.courtyard.adapter import CourtyardContext, CourtyardModel
from worldstride.models.courtyard.config import CameraCode
from worldstride.models.courtyard.geometry import RANK_FREQUENCIES, projective_channels, turn, turn_in_place
from worldstride.models.courtyard.weights import random_network
from worldstride.protocol import KeepsLatents, Recalled

SEES = pytest.mark.parametrize("sees", ["itself", "before", "all"])
CODES = pytest.mark.parametrize("code", ["ray", "projective", "both"])
RANKS, KINDS = torch.arange(-6, 0), torch.tensor([2, 1, 1, 0, 0, 0])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scattered(*shape: int, seed: int = 0) -> Tensor:
    """Cameras [*shape, 4, 4] all over the place."""
    return camera_from_pose(normal(*shape, 4, seed=seed) * torch.tensor([1.0, 1.0, 1.0, 0.1]))


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, TINY.tokens, TINY.values, seed=seed).clamp(-1, 1)


def model_of(code: CameraCode) -> CourtyardModel:
    return CourtyardModel(random_network(replace(TINY, camera=code)).eval(), torch.float32)


def keeping(engine: Engine, settings: KeptContext | None, seed: int = 3) -> Session:
    session = engine.new(seed=seed)
    session.acceleration = Acceleration("kept", kept=settings)
    return session


def apart(a: CourtyardContext, b: CourtyardContext, which: int) -> float:
    """Greatest difference of the keys (0) or values (1) of two contexts."""
    pairs = zip(a.keys_values, b.keys_values, strict=True)
    return max(float((x[which] - y[which]).abs().max()) for x, y in pairs)


def test_keeping_what_sees_only_itself_is_exact(attentive: Engine):
    kept, anew = (keeping(attentive, KeptContext(i, "itself")) for i in (True, False))
    plain = keeping(attentive, None)
    for k, move in enumerate(MOVES):
        one, other = kept.step(move), anew.step(move)
        assert levels_apart(one, other) <= 1
        assert one.report.encoded_latents == 4
        assert other.report.encoded_latents == other.report.context_latents == one.report.context_latents
        assert one.report.kept_bytes == len(kept._state.kept.records) * one.report.context_bytes / (4 if k == 0 else 6)
        assert other.report.kept_bytes == 0
        assert levels_apart(one, plain.step(move)) > 5  # a latent that sees nothing else is another one


@pytest.mark.parametrize("sees", ["before", "all"])
def test_keeping_what_sees_others_is_approximate(attentive: Engine, sees: Sees):
    kept, anew = (keeping(attentive, KeptContext(i, sees)) for i in (True, False))
    assert levels_apart(kept.step(FORWARD), anew.step(FORWARD)) <= 1
    assert levels_apart(kept.step(TURN), anew.step(TURN)) > 5


def ranked(ranks: Tensor, kinds: Tensor) -> Recalled:
    """What the courtyard needs to know of latents that were kept."""
    return Recalled(torch.empty(0), torch.empty(0), ranks, kinds)


def test_encoding_everything_that_sees_all_is_the_plain_context(attentive: Engine):
    anew, plain = keeping(attentive, KeptContext(False)), keeping(attentive, None)
    assert all(levels_apart(anew.step(move), plain.step(move)) <= 1 for move in MOVES)


@CODES
def test_joined_latents_are_the_encoded_context(code: CameraCode):
    model, latents, where = model_of(code), pictures(2, 6), scattered(2, 6)
    assert isinstance(model, KeepsLatents)
    whole = model.encode_context(Recalled(latents, where, RANKS, KINDS), None, attend)
    records = model.encode_latents(Recalled(latents, where, RANKS, KINDS), None, attend)
    joined = model.join_context(records.unbind(1), ranked(RANKS, KINDS))
    assert (joined.latents, joined.bytes) == (whole.latents, whole.bytes) == (6, whole.bytes)
    assert max(apart(joined, whole, 0), apart(joined, whole, 1)) < 1e-5


@CODES
def test_what_is_kept_holds_neither_rank_nor_kind(code: CameraCode):
    """Attention sees differences of ranks alone, so that all may move together."""
    model, latents, where = model_of(code), pictures(1, 6), scattered(1, 6)
    records = model.encode_latents(Recalled(latents, where, RANKS, torch.zeros_like(RANKS)), None, attend)
    moved = model.encode_latents(Recalled(latents, where, RANKS - 5, torch.ones_like(RANKS)), None, attend)
    assert torch.allclose(records, moved, atol=1e-5)
    elsewhere = model.encode_context(Recalled(latents, where, RANKS - 5, torch.ones_like(RANKS)), None, attend)
    joined = model.join_context(records.unbind(1), ranked(RANKS - 5, torch.ones_like(RANKS)))
    assert max(apart(joined, elsewhere, 0), apart(joined, elsewhere, 1)) < 1e-5


def test_ranks_and_kinds_turn_keys_and_nothing_else():
    model = model_of("both")
    records = model.encode_latents(Recalled(pictures(1, 6), scattered(1, 6), RANKS, KINDS), None, attend).unbind(1)
    here = model.join_context(records, ranked(RANKS, KINDS))
    for ranks, kinds in ((RANKS - 1, KINDS), (RANKS, KINDS.flip(0))):
        there = model.join_context(records, ranked(ranks, kinds))
        assert apart(here, there, 0) > 0.1
        assert apart(here, there, 1) == 0


def test_turning_in_place_is_turning():
    keys, ranks, kinds = normal(2, 6, 3, TINY.head_dim), torch.arange(-6, 0), KINDS
    for dim, back in ((1, False), (1, True)):
        turned = keys.clone()
        turn_in_place(TINY, turned, ranks, kinds, dim, back)
        assert torch.allclose(turned, turn(TINY, keys, ranks, kinds, back), atol=1e-6)
        assert not torch.allclose(turned, keys)


def test_what_a_world_keeps_of_a_chunk_is_one_tensor_of_its_own(tiny_engine: Engine):
    """No view of a batch's, which would keep that alive; and not one for each latent."""
    sessions = [keeping(tiny_engine, KeptContext(), seed) for seed in (3, 5)]
    for _ in range(2):
        worldstride.step_together(sessions, actions=[FORWARD] * 2)
    for session in sessions:
        records = list(session._state.kept.records.values())
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in records}
        assert sum(storages.values()) == sum(t.nbytes for t in records)
        assert len(storages) < len(records)
    pointers = [{t.untyped_storage().data_ptr() for t in s._state.kept.records.values()} for s in sessions]
    assert not pointers[0] & pointers[1]


@CODES
def test_turning_back_undoes_turning(code: CameraCode):
    config, keys = replace(TINY, camera=code), normal(2, 6, 3, 4, 64)
    turned = turn(config, keys, RANKS, KINDS)
    assert torch.allclose(turn(config, turned, RANKS, KINDS, back=True), keys, atol=1e-5)
    still = (turned == keys).flatten(0, -2).all(0)
    assert int(still.sum()) == 64 - 2 * (len(RANK_FREQUENCIES) + 1)
    assert bool(still[: projective_channels(config)].all())
    assert torch.equal(turn(config, keys, torch.zeros(6), torch.zeros(6)), keys)


def encoded(
    model: CourtyardModel, latents: Tensor, sees: Sees, kept: Sequence[Tensor | None] = (None,) * 8
) -> list[Tensor]:
    """What there is of each of 8 latents of two chunks after encoding those of which nothing was `kept`."""
    absent = [i for i in range(8) if kept[i] is None]
    given = [[None if k is None else k[0]] for k in kept]
    context, made = encode_kept(
        model, Recalled(latents[:, absent], scattered(1, 8), torch.arange(-8, 0), torch.zeros(8, dtype=torch.long)),
        given, sees, 4, attend,
    )  # fmt: skip
    fresh = () if made is None else made.unbind(1)
    assert len(fresh) == len(absent)
    rest = iter(fresh)
    every = [next(rest) if k is None else k for k in kept]
    joined = model.join_context(every, ranked(torch.arange(-8, 0), torch.zeros(8, dtype=torch.long)))
    assert apart(context, joined, 0) == apart(context, joined, 1) == 0
    return every


@pytest.mark.parametrize(
    ("sees", "changed"), [("itself", [6]), ("before", [4, 5, 6, 7]), ("all", [0, 1, 2, 3, 4, 5, 6, 7])]
)
def test_what_latents_see(attentive: Engine, sees: Sees, changed: list[int]):
    """A change of latent 6, of the second chunk, reaches whoever sees it."""
    latents = pictures(1, 8)
    other = latents.clone()
    other[:, 6] = pictures(1, seed=9)
    pairs = zip(*(encoded(attentive.model, one, sees) for one in (latents, other)), strict=True)
    assert [i for i, (a, b) in enumerate(pairs) if float((a - b).abs().max()) > 1e-4] == changed


@pytest.mark.parametrize(("sees", "seen"), [("itself", False), ("before", True), ("all", True)])
def test_new_latents_see_kept_ones(attentive: Engine, sees: Sees, seen: bool):
    model, latents = attentive.model, pictures(1, 8)
    known = encoded(model, latents, sees)
    made = []
    for kept in (known[:4], [2 * k for k in known[:4]]):
        made.append(torch.stack(encoded(model, latents, sees, [*kept, None, None, None, None])[4:]))
    assert (float((made[0] - made[1]).abs().max()) > 1e-3) is seen
    if sees != "all":  # all that they see is there: they are what they were when the whole was encoded
        assert torch.allclose(made[0], torch.stack(known[4:]), atol=1e-5)


def test_latents_see_no_later_ones_that_are_kept(attentive: Engine):
    latents = pictures(1, 8)
    known = encoded(attentive.model, latents, "before")
    made = [
        encoded(attentive.model, latents, sees, [None] * 4 + [f * k for k in known[4:]])[:4]
        for sees in ("before", "all") for f in (1, 2)
    ]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(made[0], made[1], strict=True))
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(made[2], made[3], strict=True))


class Watched(CourtyardModel):
    """Remembers what it was asked to encode: ranks, and how many latents those could see besides each other."""

    def encode_latents(self, recalled, past, attend):
        self.calls.append((recalled.positions.tolist(), 0 if past is None else past.latents))
        return super().encode_latents(recalled, past, attend)


@pytest.fixture
def watched() -> Engine:
    model = Watched(random_network(TINY).eval(), torch.float32)
    model.calls = []
    return Engine(model, EngineSource("courtyard", None, "random", "tiny"), Acceleration())


@pytest.mark.parametrize(("sees", "past"), [("itself", 0), ("before", 2), ("all", 2)])
def test_only_what_is_new_is_encoded(watched: Engine, sees: Sees, past: int):
    session = keeping(watched, KeptContext(sees=sees))
    for move in (FORWARD, TURN):
        session.step(move)
    watched.model.calls.clear()
    chunk = session.step(FORWARD)
    assert (len(chunk.report.context.memory), chunk.report.encoded_latents) == (2, 4)
    assert watched.model.calls == [([-1], 0) if sees == "itself" else ([-4, -3, -2, -1], past)]


def test_a_chunk_is_encoded_together_where_it_sees_what_is_before_it(watched: Engine):
    session = keeping(watched, KeptContext(sees="before", refresh=1))
    for move in MOVES[:3]:
        watched.model.calls.clear()
        assert len(session.step(move).report.context.window) == 4  # the whole chunk before
    assert any(set(ranks) >= {-4, -3, -2, -1} for ranks, _ in watched.model.calls)


def bank(count: int) -> History:
    history = History()
    history.append(torch.arange(float(count))[:, None], torch.eye(4).expand(count, 4, 4), (None,) * count)
    return history


def records(*numbers: int) -> dict[int, Tensor]:
    return {i: torch.full((1,), float(i)) for i in numbers}


def test_absent_is_what_nothing_is_kept_of():
    plan, history = ContextPlan((0,), (3, 5), (8, 9)), bank(10)
    assert KeptLatents().absent(KeptContext(), history, plan) == (0, 1, 2, 3, 4)
    kept = KeptLatents(records(0, 5, 7, 8), age=2)
    assert kept.absent(KeptContext(), history, plan) == (1, 4)
    assert kept.absent(KeptContext(refresh=3), history, plan) == (1, 4)
    assert kept.absent(KeptContext(refresh=2), history, plan) == (0, 1, 2, 3, 4)
    assert kept.absent(KeptContext(False), history, plan) == (0, 1, 2, 3, 4)
    for added, anew in ((None, False), (0.1, False), (0.2, True), (0.9, True)):
        assert kept.absent(KeptContext(anew=0.2), history, plan, added) == ((0, 1, 2, 3, 4) if anew else (1, 4))


def test_a_revisit_encodes_the_whole_context_anew(attentive: Engine):
    """Away and back: full compute where memory adds to the window, kept keys elsewhere."""
    session = keeping(attentive, KeptContext(anew=0.15))
    turns = [Action(mouse=(200.0, 0.0))] * 4 + [Action(mouse=(-200.0, 0.0))] * 4
    reports = [session.step(turn).report for turn in turns]
    late = [r for r in reports if r.signals.pose is not None and r.signals.pose.added is not None]
    revisits = [r.signals.pose.added >= 0.15 for r in late]
    assert len(set(revisits)) == 2
    for report, revisit in zip(late, revisits, strict=True):
        assert report.encoded_latents == (report.context_latents if revisit else 4)
        assert ("kept" in report.levers) is not revisit


def test_a_context_without_memory_is_no_revisit(attentive: Engine):
    session = attentive.new(seed=3)
    session.acceleration = Acceleration("no memory", memory=0, kept=KeptContext(anew=0.15))
    turns = [Action(mouse=(200.0, 0.0))] * 4 + [Action(mouse=(-200.0, 0.0))] * 4
    reports = [session.step(turn).report for turn in turns]
    assert any(r.signals.pose is not None and (r.signals.pose.added or 0) >= 0.15 for r in reports)
    assert all(r.encoded_latents == 4 for r in reports if r.context_latents > 4)


def test_latents_that_see_only_themselves_are_never_encoded_anew():
    with pytest.raises(InputError, match=r"kept\.anew changes nothing"):
        KeptContext(sees="itself", anew=0.1)


def test_latents_are_known_by_number_and_not_by_place():
    history = History(limit=40)
    history.append(torch.zeros(60, 1), torch.eye(4).expand(60, 4, 4), (None,) * 60)
    place = len(history) - 1
    assert history.entries[place].index == 59
    plan = ContextPlan((), (), (place,))
    assert KeptLatents(records(59)).absent(KeptContext(), history, plan) == ()
    assert KeptLatents(records(place)).absent(KeptContext(), history, plan) == (0,)


def test_keeping_is_exact_where_the_history_is_bounded(attentive: Engine):
    sessions = [keeping(attentive, KeptContext(i, "itself")) for i in (True, False)]
    for session in sessions:
        session._state.history = History(10, hot=6, sink=0, entries=session.history.entries)
    for move in (*MOVES, FORWARD, TURN):
        kept, anew = (session.step(move) for session in sessions)
        assert levels_apart(kept, anew) <= 1
    numbers = [e.index for e in sessions[0].history.entries]
    assert len(numbers) == 10 < numbers[-1] == 27
    assert set(numbers[:-4]) <= set(sessions[0]._state.kept.records)


def test_the_least_recently_used_are_let_go():
    settings = KeptContext(limit=5)
    kept = KeptLatents().used(settings, [0, 1, 2, 3], list(records(0, 1, 2, 3).values()), True)
    assert (list(kept.records), kept.age) == ([0, 1, 2, 3], 1)
    kept = kept.used(settings, [0, 4, 5], list(records(0, 4, 5).values()), False)
    assert (list(kept.records), kept.age) == ([2, 3, 0, 4, 5], 2)
    assert [int(t) for t in kept.records.values()] == [2, 3, 0, 4, 5]
    assert kept.bytes == 5 * 4
    kept = kept.used(replace(settings, limit=1), [6, 7], list(records(6, 7).values()), True)
    assert (list(kept.records), kept.age) == ([6, 7], 1)  # never fewer than the context itself
    assert kept.used(KeptContext(False), [8], list(records(8).values()), True) is kept


def test_what_is_let_go_leaves_no_memory_behind():
    """Latents of a chunk are pieces of one tensor, which any of them keeps alive."""
    settings, chunks = KeptContext(limit=6), [torch.full((4, 2), float(i)) for i in range(3)]
    kept = KeptLatents().used(settings, [0, 1, 2, 3], list(chunks[0]), True)
    assert kept.bytes == 4 * 2 * 4
    again = kept.used(settings, [2, 4, 5, 6, 7], [chunks[0][2], *chunks[1]], False)
    assert (list(again.records), again.bytes) == ([3, 2, 4, 5, 6, 7], 6 * 2 * 4)
    assert again.records[4].untyped_storage().data_ptr() == chunks[1].untyped_storage().data_ptr()
    assert [float(t[0]) for t in again.records.values()] == [0, 0, 1, 1, 1, 1]
    anew = again.used(settings, [4, 5, 6, 8], list(chunks[2]), True)  # encoded again: 7 is alone now
    assert (list(anew.records), anew.bytes) == ([3, 2, 7, 4, 5, 6, 8][-6:], 6 * 2 * 4)
    assert kept.bytes == 4 * 2 * 4  # a fork's are left alone


@pytest.mark.parametrize(
    ("refresh", "encoded"), [(None, [4, 4, 4, 4, 4]), (1, [4, 6, 6, 6, 6]), (2, [4, 4, 6, 4, 6]), (3, [4, 4, 4, 6, 4])]
)
def test_refresh_encodes_all_after_so_many_chunks(tiny_engine: Engine, refresh: int | None, encoded: list[int]):
    session = keeping(tiny_engine, KeptContext(sees="itself", refresh=refresh))
    assert [session.step(move).report.encoded_latents for move in (*MOVES, FORWARD)] == encoded


def test_limit_bounds_what_is_kept(tiny_engine: Engine):
    session, free = (keeping(tiny_engine, KeptContext(sees="itself", limit=n)) for n in (7, 256))
    for move in MOVES:
        bounded, all_of_it = session.step(move).report, free.step(move).report
    assert len(session._state.kept.records) == 7
    assert list(session._state.kept.records)[-6:] == [session.history.entries[i].index for i in bounded.context.rows]
    assert len(free._state.kept.records) == 16
    assert bounded.kept_bytes / 7 == all_of_it.kept_bytes / 16 > 0


def test_a_model_that_keeps_no_latents_plays_all_the_same(joint: Engine):
    sessions = [joint.open(first_frames(), torch.eye(4)[None]) for _ in range(2)]
    sessions[0].acceleration = settings = Acceleration("kept", kept=KeptContext())
    assert not isinstance(joint.model, KeepsLatents)
    reports = []
    for move in MOVES[:2]:
        one, plain = (session.step(move) for session in sessions)
        assert same(one, plain)
        reports.append(one.report)
    assert reports[1].encoded_latents == reports[1].context_latents == 5
    (lever,) = levers(settings, JointModel().chunk(1), reports)
    assert (lever.name, lever.fired) == ("kept", 0)
    assert lever.note == "every context was encoded anew: the model keeps no latents"


def test_forks_share_what_is_kept_and_leave_each_other_alone(tiny_engine: Engine):
    session, undisturbed = (keeping(tiny_engine, KeptContext()) for _ in range(2))
    for one in (session, undisturbed):
        one.step(FORWARD)
    fork = session.fork()
    numbers = list(session._state.kept.records)
    before = {i: t.clone() for i, t in session._state.kept.records.items()}
    assert all(fork._state.kept.records[i] is session._state.kept.records[i] for i in numbers)
    fork.step(TURN)
    fork.step(FORWARD)
    assert list(session._state.kept.records) == numbers
    assert all(torch.equal(t, before[i]) for i, t in session._state.kept.records.items())
    assert same(session.step(TURN), undisturbed.step(TURN))
    assert list(session._state.kept.records) == list(undisturbed._state.kept.records)


def test_a_save_holds_what_is_kept(tiny_engine: Engine, tmp_path: Path):
    session = keeping(tiny_engine, KeptContext(sees="itself", refresh=3, limit=7))
    for move in MOVES[:3]:
        session.step(move)
    session.save(tmp_path / "a.world")
    opened = worldstride.open(tmp_path / "a.world", engine=tiny_engine)
    kept, same_kept = session._state.kept, opened._state.kept
    assert (list(kept.records), kept.age) == (list(same_kept.records), same_kept.age)
    assert all(torch.equal(t, same_kept.records[i]) for i, t in kept.records.items())
    assert [opened.step(move).report.encoded_latents for move in MOVES] == [6, 4, 4, 6]


def test_corrected_latents_are_encoded_as_they_are_now(attentive: Engine):
    kept, anew, wrong = (keeping(attentive, KeptContext(i, "itself")) for i in (True, False, True))
    truth = first_frames(4, 24, 24)
    for move in MOVES[:3]:
        one, other, uncorrected = (session.step(move) for session in (kept, anew, wrong))
        assert levels_apart(one, other) <= 1
        for session in (kept, anew):
            session.correct(truth)
    assert levels_apart(one, uncorrected) > 5


def test_the_lever_can_be_pulled_at_any_chunk(attentive: Engine):
    session, anew = keeping(attentive, None), keeping(attentive, None)
    for move in MOVES[:2]:
        session.step(move)
        anew.step(move)
    session.acceleration = Acceleration("kept", kept=KeptContext(sees="itself"))
    anew.acceleration = Acceleration("anew", kept=KeptContext(False, "itself"))
    first = session.step(FORWARD)
    assert first.report.encoded_latents == 6
    assert levels_apart(first, anew.step(FORWARD)) <= 1
    later = session.step(TURN)
    assert later.report.encoded_latents < 6
    assert levels_apart(later, anew.step(TURN)) <= 1
    session.acceleration = "off"
    assert session.step(FORWARD).report.encoded_latents == 6


@SEES
def test_keeping_is_repeatable(tiny_engine: Engine, sees: Sees):
    a, b = (keeping(tiny_engine, KeptContext(sees=sees)) for _ in range(2))
    assert all(same(a.step(move), b.step(move)) for move in MOVES[:3])
