"""HY-WorldPlay's WAN-5B variant in sessions: the plain loop, the first image, retrieval, levers, cost and commands."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import worldstride
from hy_golden import normal, relative
from hy_variants import BACK, FORWARD, LEFT, RIGHT, latents, replayed
from walking import same
from wan_tiny import COLUMNS, HEIGHT, ROWS, TINY, WIDTH, begin, engine, model, picture, states
from worldstride import Acceleration, Action, Engine, Session
from worldstride.acceleration import AttentionReuse
from worldstride.attention import Partial, attend
from worldstride.attention.streams import Places
from worldstride.bench.walk import ways
from worldstride.commands.bench import Bench
from worldstride.commands.options import EngineOptions
from worldstride.context.kept import KeptContext
from worldstride.context.policy import PoseView, SpatialMemory, TemporalWindow
from worldstride.errors import ContractError, InputError
from worldstride.models.hy_worldplay import cost, places
from worldstride.models.hy_worldplay.adapter import HYContext
from worldstride.models.hy_worldplay.labels import labels
from worldstride.models.hy_worldplay.poses import intrinsics
from worldstride.models.hy_worldplay.retrieval import WAN, select
from worldstride.models.hy_worldplay.two_streams import whole
from worldstride.models.hy_worldplay.wan import WanConfig, WanFrames, WanNetwork
from worldstride.models.hy_worldplay.wan_adapter import WanInputs, WanPrompt, WanWorldPlay
from worldstride.protocol import Conditions
from worldstride.session import step_together
from worldstride.testing import check_model

pytestmark = pytest.mark.usefixtures("no_gradients")

WALK = (FORWARD, RIGHT, RIGHT, FORWARD, LEFT, LEFT, BACK)
"""Seven chunks: the last two have more behind them than the context holds."""
CONTEXTS = [0, 4, 8, 12, 16, 16, 16]


@pytest.fixture(scope="module")
def small() -> Engine:
    """Frames of 64 x 96 pixels."""
    return engine()


@pytest.fixture(scope="module")
def walked(small: Engine) -> Session:
    """A session after seven chunks at full compute; tests fork it."""
    return replayed(begin(small), "off", WALK)[0]


# The plain loop, and the contract


@cache
def noise() -> Tensor:
    """Of a whole walk [latents, C, h, w]."""
    return normal(4 * len(WALK), TINY.channels, 2 * ROWS, 2 * COLUMNS, seed=21)


def upstreams_loop(network: WanNetwork, image: Tensor, cameras: Tensor, points: Tensor) -> Tensor:
    """The rollout as the specification tells it (sections 1, 2.6, 3 and 4), with nothing of the adapter.

    `image` is the latent of the first image [C, h, w], `cameras` [N, 4, 4]; latents [N, C, h, w].
    """
    text = network.text(torch.cat([states(), torch.zeros(1, 512 - 7, TINY.text)], 1))
    actions, x = [0, *labels(cameras).tolist()[1:]], noise().clone()
    sigmas = [1.0, 0.96, 0.8888889, 0.7272728, 0.0]
    w2c, lens = torch.linalg.inv(cameras.double()), torch.eye(4, dtype=torch.float64)
    lens[0, 0], lens[1, 1] = intrinsics()[0, 0], intrinsics()[1, 1]
    project = (lens @ w2c).float()

    def of(rows: list[int], levels: list[float], first: int) -> WanFrames:
        tables = places.rotary_table(torch.arange(first, first + len(rows)), ROWS, COLUMNS, TINY.rope, TINY.theta)
        at = Places(*tables, project[None, rows], torch.linalg.inv(project[None, rows]))
        return WanFrames(x[None, rows], torch.tensor([levels]), torch.tensor([[actions[r] for r in rows]]), at)

    for c in range(len(x) // 4):
        rows, selected = list(range(4 * c, 4 * c + 4)), list(select(cameras, 4 * c, points, WAN).context)
        cached, where = [], None
        if c > 0:
            before = of(selected, [14.0] * len(selected), 0)
            cached, where = whole(network.context(before, text, attend)), before.at
        fresh = rows if c else rows[1:]
        if c == 0:
            x[0] = image
        for now, then in pairwise(sigmas):
            levels = [1000 * now] * 4 if c else [14.0] + [1000 * now] * 3
            v = network.velocity(of(rows, levels, len(selected)), text, cached, where, attend)[0]
            x[fresh] = x[fresh] + v[-len(fresh) :] * (then - now)
    return x


def test_a_session_makes_the_latents_of_the_plain_loop(small: Engine):
    session = begin(small)
    for c, move in enumerate(WALK):
        report = session.step(move, noise=noise()[4 * c : 4 * c + 4]).report
        assert (report.steps, report.solver, report.context_latents) == (4, "euler", CONTEXTS[c])
    image = small.model.decoder.encode(picture()[None])[0, 0]
    of, points = small.model, session._state.points
    assert isinstance(of, WanWorldPlay)
    truth = upstreams_loop(of.network, image, session.history.cameras(), points)
    made = latents(session)
    assert relative(made, truth) <= 1e-4
    assert torch.equal(made[0], image)
    other = upstreams_loop(of.network, image + 0.1, session.history.cameras(), points)
    assert relative(other[-4:], truth[-4:]) > 1e-3  # the comparison can see the image to the end


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16], ids=str)
def test_the_model_keeps_the_contract(storage: torch.dtype):
    check_model(model(storage), {"text": states()}, chunks=(0, 1))


class Deaf(WanWorldPlay):
    """Encodes one prompt whatever is asked for."""

    def encode_prompt(self, prompt: Any, attend: Any) -> WanPrompt:
        return super().encode_prompt({"text": states()}, attend)


class Unconditioned(WanWorldPlay):
    """Goes nowhere, whatever the cameras and labels."""

    def prepare(self, conditions: Conditions) -> tuple[WanInputs, ...]:
        still = torch.eye(4).expand(conditions.cameras.shape)
        return super().prepare(replace(conditions, cameras=still, led=(0,) * len(conditions.led)))


@pytest.mark.parametrize(
    ("mistake", "text"), [(Deaf, "the prompt is ignored"), (Unconditioned, "the chunk's conditions are ignored")]
)
def test_a_planted_mistake_is_named(mistake: type[WanWorldPlay], text: str):
    of = model()
    with pytest.raises(ContractError, match=text):
        check_model(mistake(of.network, of.decoder, torch.float32), {"text": states()}, chunks=(0,))


def test_the_schedule_is_the_published_one():
    spec = model().sampler()
    assert [1000 * s for s in spec.sigmas] == pytest.approx([1000, 960, 888.8889, 727.2728, 0], abs=1e-3)
    assert (spec.solver, spec.guidance) == ("euler", None)
    assert model().sampler(2, 1.0).sigmas == (1.0, 0.5, 0.0)
    with pytest.raises(InputError, match="steps must be an integer of at least 1, got 0"):
        model().sampler(0)


# The first image


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16], ids=str)
def test_the_worlds_first_latent_is_the_images_throughout(storage: torch.dtype):
    of = model(storage)
    image = of.decoder.encode(picture()[None])[0, 0]
    session = begin(engine(of))
    seen, plain = list[Tensor](), of.network.velocity

    def looking(frames: WanFrames, *given: Any) -> Tensor:
        seen.append(frames.x[0, 0].clone())
        assert frames.levels[0, 0] == 14
        assert (frames.levels[0, 1:] == frames.levels[0, 1]).all()
        assert frames.levels[0, 1] > 700
        return plain(frames, *given)

    of.network.velocity = looking  # type: ignore[method-assign]
    chunk = session.step(FORWARD)
    of.network.velocity = plain  # type: ignore[method-assign]
    assert len(seen) == 4
    assert all(torch.equal(x, image.to(storage)) for x in (*seen, latents(session)[0]))
    # what is shown first is the image, decoded
    shown, _ = of.decoder.decode(image.to(storage)[None, None], {})
    assert int(np.abs(chunk.frames[0].astype(int) - shown[0, 0].numpy()).max()) <= 1


def test_no_latent_is_given_later_or_without_an_image(small: Engine):
    of = small.model
    assert isinstance(of, WanWorldPlay)
    still = torch.eye(4).expand(2, 4, 4, 4)
    for prompt, led, given in (
        ({"text": states()}, (-1, 0, 0, 0), False),
        ({"text": states(), "image": normal(1, 4, 4, 6)}, (-1, 0, 0, 0), True),
        ({"text": states(), "image": normal(1, 4, 4, 6)}, (0, 0, 0, 0), False),
    ):
        encoded = of.encode_prompt(prompt, attend)
        (inputs,) = of.prepare(Conditions(0, still, still, of.intrinsics, encoded=encoded, led=led))
        x = normal(2, 4, 4, 4, 6)
        assert torch.equal(of.clamp(x, inputs), x) != given
        assert torch.equal(of.clamp(x, inputs)[:, 1:], x[:, 1:])
        velocity, _ = of.velocity(x, torch.tensor([0.9, 0.4]), inputs, HYContext((), None), attend)
        assert bool(velocity[:, 0].any()) != given
        assert bool(velocity[:, 1:].all())
        alone, _ = of.velocity(x[1:], 0.4, replace(inputs, matrices=_part(inputs)), HYContext((), None), attend)
        assert relative(velocity[1:], alone) <= 1e-5


def _part(inputs: WanInputs) -> tuple[Tensor, Tensor]:
    first, second = inputs.matrices
    return first[1:], second[1:]


def test_image_and_prompt_condition_the_world(small: Engine):
    eye = np.eye(4)[None]
    worlds = [
        small.open(picture(), eye, {"text": states()}, noise_seed=1),
        small.open(picture(2), eye, {"text": states()}, noise_seed=1),
        small.open(picture(), eye, {"text": states(5)}, noise_seed=1),
    ]
    chunks = [world.step(FORWARD) for world in worlds]
    assert chunks[0].frames.shape == (13, HEIGHT, WIDTH, 3)
    assert not np.array_equal(chunks[0].frames, chunks[1].frames)
    assert not np.array_equal(chunks[0].frames, chunks[2].frames)
    with pytest.raises(InputError, match="begins with one image, got 2 frames"):
        small.open(torch.cat([picture(), picture()]), eye.repeat(2, 0), {"text": states()})


# The prompt


def test_text_is_filled_up_with_zeros_to_512_rows(small: Engine):
    of = small.model
    assert isinstance(of, WanWorldPlay)
    short = of.encode_prompt({"text": states()}, attend)
    assert {t.shape for pair in short.text for t in pair} == {(1, 2, 512, 16)}
    padded = torch.cat([states(), normal(1, 5, TINY.text)], 1)
    mask = (torch.arange(12) < 7).long()[None]
    for same_prompt in (
        {"text": padded, "text_mask": mask},
        {"text": torch.cat([states(), torch.zeros(1, 505, TINY.text)], 1)},
    ):
        other = of.encode_prompt(same_prompt, attend)
        assert all(
            torch.equal(a, b) for x, y in zip(short.text, other.text, strict=True) for a, b in zip(x, y, strict=True)
        )
    whole = of.encode_prompt({"text": padded}, attend)
    assert not torch.equal(whole.text[0][0], short.text[0][0])


def test_prompts_that_do_not_fit_are_refused(small: Engine):
    for prompt, text in (
        ({}, r"needs encoder states named 'text', got \['image'\]"),
        ({"text": normal(1, 513, 12)}, r"text states must be \[1, L, 12\], L at most 512, got \[1, 513, 12\]"),
        ({"text": normal(1, 7, 11)}, r"got \[1, 7, 11\]"),
        ({"text": normal(2, 7, 12)}, r"got \[2, 7, 12\]"),
        ({"text": states(), "text_mask": torch.ones(1, 6)}, r"text_mask must be \[1, 7\] like the text, got \[1, 6\]"),
        ({"text": states(), "vision": states()}, "unknown prompt states 'vision'; known: text, text_mask, image"),
    ):
        with pytest.raises(InputError, match=text):
            small.open(picture(), torch.eye(4)[None], prompt).step(FORWARD)
    still = torch.eye(4).expand(1, 4, 4, 4)
    with pytest.raises(InputError, match="'hy_worldplay_wan' needs an encoded prompt; begin worlds with Engine"):
        small.model.prepare(Conditions(0, still, still, small.model.intrinsics, led=(0, 0, 0, 0)))
    of = model()
    with pytest.raises(InputError, match="multiples of 32 pixels high and wide, got 48 x 96"):
        WanWorldPlay(of.network, type(of.decoder)(of.decoder.vae, 48, 96))


# What a chunk remembers


def test_context_is_what_the_model_retrieves_and_the_first_clip_is_not_forced(small: Engine):
    session, firsts = begin(small), list[int]()
    for c, move in enumerate((*[FORWARD] * 4, *[Action({"KeyW", "ArrowRight"})] * 4)):
        report = session.step(move).report
        every = session.history.cameras()
        truth = select(every, 4 * c, session._state.points, WAN)
        assert tuple(report.context.rows) == truth.context
        assert report.context.sink == ()
        assert report.context_latents == min(4 * c, 16)
        if c >= 4:
            firsts.append(report.context.memory[0])
            assert len(report.context.memory) == 4
    assert firsts[0] == 0  # with 16 latents there is one clip to choose
    assert any(firsts)  # and later the first is no longer the best
    found = session.fork().step(LEFT).report.context.memory
    named = next(start for start in (0, 4, 8, 12, 16) if start != found[0])
    report = session.fork().step(LEFT, recall=range(named, named + 4)).report
    assert report.context.memory == tuple(range(named, named + 4))


def test_a_session_decodes_as_if_at_once(small: Engine):
    session = begin(small)
    shown = np.concatenate([session.step(move).frames for move in WALK[:3]])
    whole, _ = small.model.decoder.decode(latents(session)[None], {})
    assert whole.shape[1] == len(shown) == 45
    assert int(np.abs(whole[0].numpy().astype(int) - shown).max()) <= 1
    assert shown.std() > 1


def test_saves_and_forks_go_on_bit_for_bit(walked: Session, tmp_path: Path):
    session = walked.fork()
    session.save(tmp_path / "a.world")
    opened, fork = worldstride.open(tmp_path / "a.world", engine=session.engine), session.fork()
    truth = session.step(LEFT)
    assert same(truth, opened.step(LEFT))
    assert same(truth, fork.step(LEFT))


def test_sessions_step_together_as_they_would_alone(small: Engine):
    first = begin(small)
    for session in (first, replayed(begin(small), "off", WALK[:2])[0]):  # one whose first latent is given, one without
        forks, alone = ([session.fork(noise_seed=seed) for seed in (1, 2)] for _ in range(2))
        chunks = step_together(forks, actions=[FORWARD, FORWARD])
        assert [chunk.report.batch for chunk in chunks] == [2, 2]
        for one, other in zip(alone, forks, strict=True):
            one.step(FORWARD)
            assert relative(latents(other), latents(one)) <= 1e-5
        assert relative(latents(forks[0])[-3:], latents(forks[1])[-3:]) > 0.1


# Levers


@pytest.mark.parametrize("sees", ["all", "before", "itself"])
def test_kept_context_runs(small: Engine, walked: Session, sees: Any):
    session, reports = replayed(begin(small), Acceleration("kept", kept=KeptContext(sees=sees)), WALK)
    assert [r.encoded_latents for r in reports] == [0, *[4] * 6]
    assert all("kept" in r.levers for r in reports[2:])
    assert relative(latents(session), latents(walked)) > 1e-4  # what is kept saw another window


def test_keeping_what_sees_only_itself_is_exact(small: Engine):
    kept, whole = (
        replayed(begin(small), Acceleration("kept", kept=KeptContext(incremental, sees="itself")), WALK)
        for incremental in (True, False)
    )
    assert [r.encoded_latents for r in whole[1]] == CONTEXTS
    assert relative(latents(kept[0]), latents(whole[0])) <= 1e-5


def test_encoding_everything_anew_is_full_compute(small: Engine, walked: Session):
    session, reports = replayed(begin(small), Acceleration("kept", kept=KeptContext(refresh=1)), WALK)
    assert [r.encoded_latents for r in reports] == CONTEXTS
    assert relative(latents(session), latents(walked)) <= 1e-5


def test_attention_kept_from_an_evaluation_is_that_evaluations(small: Engine, walked: Session):
    of = small.model
    assert isinstance(of, WanWorldPlay)
    session = walked.fork()
    text = of.encode_prompt({"text": states()}, attend).text
    at = of.places_after(0, (torch.eye(4).expand(1, 8, 4, 4),) * 2)
    x = latents(session)[None, :8]
    frames = list[WanFrames]()
    for i, level in ((0, 14.0), (4, 500.0)):
        tokens, rows = slice(6 * i, 6 * i + 24), slice(i, i + 4)
        some = Places(at.cos[tokens], at.sin[tokens], at.project[:, rows], at.unproject[:, rows])
        frames.append(WanFrames(x[:, rows], torch.full((1, 4), level), torch.zeros(1, 4).long(), some))
    before, now = frames
    context, outer = whole(of.network.context(before, text, attend)), list[Partial]()
    plain = of.network.velocity(now, text, context, before.at, attend)
    assert relative(of.network.velocity(now, text, context, before.at, attend, outer), plain) <= 1e-5
    assert len(outer) == TINY.depth
    assert relative(of.network.velocity(now, text, context, before.at, attend, None, outer), plain) <= 1e-5
    half = [Partial(0.5 * p.out, p.lse) for p in outer]
    assert relative(of.network.velocity(now, text, context, before.at, attend, None, half), plain) > 1e-3


def test_reused_attention_is_reported_and_costs_less(small: Engine, walked: Session):
    session, reports = replayed(begin(small), Acceleration("reuse", attention=AttentionReuse(2)), WALK)
    assert all([e.attended for e in r.evaluations] == [True, False, True, False] for r in reports)
    plain = walked.fork().step(LEFT).report
    assert reports[-1].flops["denoise"] < plain.flops["denoise"]
    assert "attention" in reports[-1].levers
    assert bool(latents(session).isfinite().all())
    # without a context there is nothing to reuse, and the first chunk is as it was
    assert relative(latents(session)[:4], latents(walked)[:4]) <= 1e-5
    once, _ = replayed(begin(small), Acceleration("reuse", attention=AttentionReuse(1)), WALK)
    assert relative(latents(once), latents(walked)) <= 1e-5


def test_policies_and_presets_run(small: Engine, walked: Session):
    settings = Acceleration(
        "policies", temporal=TemporalWindow(scale=1e-6), spatial=SpatialMemory(threshold=1.0), pose=PoseView("ball")
    )
    last = replayed(begin(small), settings, WALK)[1][-1]
    assert 0 < len(last.context.window) < 12
    assert last.context.memory == ()
    json.dumps(last.to_json())
    for preset in ("exact", "balanced", "light-interaction"):
        session, reports = replayed(begin(small), preset, WALK)
        assert bool(latents(session).isfinite().all())
        assert torch.equal(latents(session), latents(walked)) == (preset == "exact")
        assert all(r.flops["denoise"] > 0 for r in reports)


def test_compiled_passes_give_the_same_and_nothing_is_compiled_later(monkeypatch: pytest.MonkeyPatch):
    of, plain = model(), engine()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # what is captured, not how fast
    of.compile_passes()
    played = engine(of)
    assert played.warm_up() == 7  # contexts of 0, 4, ... 16 latents, twice more the same
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    sessions = [begin(e) for e in (played, plain)]
    for move in WALK:
        for session in sessions:
            session.step(move)
    assert relative(latents(sessions[0]), latents(sessions[1])) <= 1e-4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    torch.compiler.reset()


# Cost and commands


def test_a_chunk_of_full_size_costs_what_the_specification_says():
    """Section 6: 704 x 1280, 16 latents of context; matrices 33, self-attention 46 TFLOP a step, 598 a chunk."""
    full, tokens = WanConfig(), 22 * 40
    step = cost.wan_evaluation_flops(full, tokens, 512, 4, 16)
    attention = 30 * 2 * 4 * full.width * 20 * tokens * 4 * tokens
    assert attention / 1e12 == pytest.approx(46, rel=0.01)
    assert (step - attention) / 1e12 == pytest.approx(33, rel=0.01)
    # upstream's context pass computes the last block, too, and every pass the text's keys and values anew
    context, text = cost.wan_evaluation_flops(full, tokens, 512, 16, 0), 30 * 512 * 2 * 2 * full.width**2
    assert (4 * step + context + 5 * text) / 1e12 == pytest.approx(598, rel=0.001)
    assert (context + text) / (4 * step + context + 5 * text) == pytest.approx(0.47, abs=0.005)
    assert (4 * step + cost.wan_context_flops(full, tokens, 512, 16, 16)) / 1e12 == pytest.approx(586, rel=0.001)


def test_costs_are_what_is_computed():
    from torch.utils.flop_counter import FlopCounterMode

    of = model()
    encoded = of.encode_prompt({"text": states(), "image": normal(1, 4, 4, 6)}, attend)
    cameras = torch.eye(4).expand(1, 4, 4, 4)
    (inputs,) = of.prepare(Conditions(1, cameras, cameras, of.intrinsics, encoded=encoded, led=(0, 0, 0, 0)))
    made = worldstride.protocol.Recalled(
        normal(1, 8, 4, 4, 6),
        torch.eye(4).expand(1, 8, 4, 4),
        torch.arange(-8, 0),
        torch.zeros(8).long(),
        prompt=encoded,
    )
    with FlopCounterMode(display=False) as counted:
        context = of.encode_context(made, None, naive)
    fixed = 2 * (256 * 32 + 32 * 32) * 8 * 2 + 2 * 32 * 6 * 32 * 8  # of levels and labels, a latent each
    assert counted.get_total_flops() - fixed == pytest.approx(of.context_flops(8, 8), rel=1e-4)
    with FlopCounterMode(display=False) as counted:
        of.velocity(normal(1, 4, 4, 4, 6), 0.5, inputs, context, naive)
    assert counted.get_total_flops() - fixed / 2 == pytest.approx(of.evaluation_flops(4, 8), rel=1e-4)


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def test_the_command_measures_a_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr(EngineOptions, "load", lambda self, name: engine())
    out = tmp_path / "walk.json"
    assert Bench("walk", "hy_worldplay_wan", 2, 1, ("off",), out=out).run("bench walk") == 0
    result = json.loads(out.read_text())
    assert [row["name"] for row in result["rows"]] == ["off"]
    assert result["rows"][0]["tflops"] > 0
    assert result["parameter_bytes"] > 1e5
    assert "off" in capsys.readouterr().out
    with pytest.raises(
        InputError, match="'upstream' is known of HYWorldPlay, MatrixGame3 alone, not of 'hy_worldplay_wan'"
    ):
        ways(engine(), ["upstream"])
