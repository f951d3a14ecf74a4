"""HY-WorldPlay in sessions: the golden rollout, live control, saves, kept context, retrieval and policies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

import worldstride
from hy_golden import begin, engine, golden, model, relative, vae
from hy_variants import BACK, FORWARD, LEFT, RIGHT, latents, replayed
from walking import same
from worldstride import Acceleration, Action, Engine, Session
from worldstride.attention import Attend
from worldstride.context.kept import KeptContext, Sees
from worldstride.context.policy import PoseView, SpatialMemory, TemporalWindow
from worldstride.errors import ContractError, InputError
from worldstride.models.hy_worldplay.adapter import HYInputs, HYPrompt, HYWorldPlay
from worldstride.models.hy_worldplay.labels import labels
from worldstride.models.hy_worldplay.poses import parse_poses
from worldstride.models.hy_worldplay.retrieval import select
from worldstride.models.video_decoder import VideoDecoder
from worldstride.protocol import Conditions
from worldstride.session import step_together
from worldstride.testing import check_model
from worldstride.trajectory import Trajectory, parse_trajectory

WALK = (FORWARD, FORWARD, RIGHT, RIGHT, FORWARD, LEFT, LEFT, BACK)
"""Eight chunks: the last two have more behind them than the context holds."""


@pytest.fixture(scope="module")
def small() -> Engine:
    """Frames of 32 x 48 pixels."""
    return engine()


@pytest.fixture(scope="module")
def walked(small: Engine) -> Session:
    """A session after eight chunks at full compute; tests fork it."""
    session = begin(small)
    for move in WALK:
        session.step(move)
    return session


# The golden rollout, and the contract


class Blind(VideoDecoder):
    """Stands in for a VAE: its one picture is the golden case's first image, and it shows black frames."""

    def encode(self, frames: Tensor) -> Tensor:
        return golden().given("cond")[:, None, :4, 0]

    def decode(self, latents: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        count = 4 * latents.shape[1] - (0 if state else 3)
        return torch.zeros(1, count, *self.size, 3, dtype=torch.uint8), {"begun": torch.ones(1)}


def frame_cameras(of: HYWorldPlay, chunk: int) -> Tensor:
    """The golden cameras of a chunk's latents, held for all frames of each."""
    frames = of.chunk(chunk).latent_frames
    counts = [after - before for before, after in zip((-1, *frames), frames, strict=False)]
    return golden().cameras[4 * chunk : 4 * chunk + 4].repeat_interleave(torch.tensor(counts), 0)


def test_a_session_makes_the_golden_latents():
    of = HYWorldPlay(model().network, Blind(vae(), 64, 96), torch.float32)
    case, black = golden(), np.zeros((1, 64, 96, 3), np.uint8)
    session = engine(of).open(black, case.cameras[:1], case.prompt, points=case.given("points"))
    noise = case.given("noise")[0].transpose(0, 1)
    for c in range(10):
        report = session.step(cameras=frame_cameras(of, c), noise=noise[4 * c : 4 * c + 4]).report
        assert report.context.rows == case.tensors[f"chunk{c}/context"].tolist()
        assert (report.steps, report.solver) == (4, "euler")
    assert relative(latents(session), case.given("latents")[0].transpose(0, 1)) <= 1e-4
    led = [e.led for e in session.history.entries]
    assert led == [-1, *case.given("action")[0, 1:].tolist()]


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16], ids=str)
def test_the_model_keeps_the_contract(storage: torch.dtype):
    check_model(model(storage=storage), golden().prompt, chunks=(0, 1))
    check_model(model(storage=storage), {n: golden().prompt[n] for n in ("text", "vision")}, chunks=(0,))


class Deaf(HYWorldPlay):
    """Encodes one prompt whatever is asked for."""

    def encode_prompt(self, prompt: Mapping[str, Tensor], attend: Attend) -> HYPrompt:
        blank = {name: torch.ones_like(t) for name, t in prompt.items()}
        return super().encode_prompt(blank, attend)


class Moody(HYWorldPlay):
    """Encodes a prompt otherwise every time."""

    mood = 0

    def encode_prompt(self, prompt: Mapping[str, Tensor], attend: Attend) -> HYPrompt:
        self.mood += 1
        return super().encode_prompt({**prompt, "text": prompt["text"] + self.mood}, attend)


class Unconditioned(HYWorldPlay):
    """Goes nowhere, whatever the cameras and labels."""

    def prepare(self, conditions: Conditions) -> tuple[HYInputs, ...]:
        still = torch.eye(4).expand(conditions.cameras.shape)
        return super().prepare(replace(conditions, cameras=still, led=(0,) * len(conditions.led)))


@pytest.mark.parametrize(
    ("mistake", "text"),
    [
        (Deaf, "the prompt is ignored"),
        (Moody, "encoding the same prompt again gave other latents"),
        (Unconditioned, "the chunk's conditions are ignored"),
    ],
)
def test_a_planted_mistake_is_named(mistake: type[HYWorldPlay], text: str):
    of = mistake(model().network, model().decoder, torch.float32)
    with pytest.raises(ContractError, match=text):
        check_model(of, golden().prompt, chunks=(0,))


# Live control


def test_keys_steer_and_labels_say_where_to(small: Engine):
    session = begin(small)
    start, first = session.camera, session.step(FORWARD)
    assert first.frames.shape == (13, 32, 48, 3)
    assert np.array_equal(first.cameras[0], start)
    moved = np.linalg.norm(np.diff(first.cameras[:, :3, 3], axis=0), axis=1)
    assert moved == pytest.approx([0.02] * 12, rel=1e-3)  # 0.08 a latent, as in the training walks
    assert [e.led for e in session.history.entries] == [-1, 9, 9, 9]
    assert torch.equal(session.history.cameras(), torch.from_numpy(first.cameras[[0, 4, 8, 12]]))
    for move, label in ((RIGHT, 1), (LEFT, 2), (BACK, 18), (Action(), 0), (Action({"KeyW", "KeyD"}), 45)):
        chunk = session.step(move)
        assert chunk.frames.shape == (16, 32, 48, 3)
        assert [e.led for e in session.history.entries[-4:]] == [label] * 4
        assert torch.equal(session.history.cameras(slice(-4, None)), torch.from_numpy(chunk.cameras[[3, 7, 11, 15]]))
    assert session.frame == 13 + 5 * 16
    turned = np.degrees(np.arccos((np.trace(first.cameras[-1, :3, :3].T @ session.camera[:3, :3]) - 1) / 2))
    assert turned == pytest.approx(0, abs=0.1)  # 16 frames right, 16 left


def test_the_first_image_and_the_prompt_condition_the_world(small: Engine):
    given, picture = golden().prompt, np.zeros((1, 32, 48, 3), np.uint8)
    worlds = [
        small.open(picture, np.eye(4)[None], given, noise_seed=1),
        small.open(picture + 200, np.eye(4)[None], given, noise_seed=1),
        small.open(picture, np.eye(4)[None], {n: given[n] for n in ("text", "vision")}, noise_seed=1),
    ]
    chunks = [world.step(FORWARD) for world in worlds]
    assert not np.array_equal(chunks[0].frames, chunks[1].frames)
    assert not np.array_equal(chunks[0].frames, chunks[2].frames)
    with pytest.raises(InputError, match="begins with one image, got 2 frames"):
        small.open(np.concatenate([picture, picture]), np.eye(4)[None].repeat(2, 0), given)
    for prompt, text in (
        ({"text": given["text"]}, r"needs encoder states named 'vision', got \['image', 'text'\]"),
        ({**given, "Vision": given["vision"]}, r"unknown prompt states 'Vision' \(did you mean 'vision'\?\)"),
    ):
        with pytest.raises(InputError, match=text):
            small.open(picture, np.eye(4)[None], prompt).step(FORWARD)


def test_a_missing_prompt_is_asked_for(small: Engine):
    picture = np.zeros((1, 32, 48, 3), np.uint8)
    session = small.open(picture, np.eye(4)[None])
    with pytest.raises(InputError, match=r"HY-WorldPlay needs encoder states named 'text', got \['image'\]"):
        session.step(FORWARD)
    assert (session.frame, len(session.history)) == (0, 0)
    with pytest.raises(InputError, match=r"frames must be uint8 \[B, F, 32, 48, 3\], got torch.uint8 \[1, 1, 16, 16"):
        small.open(picture[:, :16, :16], np.eye(4)[None], golden().prompt)
    with pytest.raises(InputError, match="procedural worlds render square frames; 'hy_worldplay' shows 32 x 48"):
        small.new(seed=1)


def test_a_session_decodes_as_if_at_once(small: Engine):
    session = begin(small)
    shown = np.concatenate([session.step(move).frames for move in WALK[:3]])
    whole, _ = small.model.decoder.decode(latents(session)[None], {})
    assert whole.shape[1] == len(shown) == 45
    assert int(np.abs(whole[0].numpy().astype(int) - shown).max()) <= 1
    assert shown.std() > 1


# Saves and forks


def assert_same_state(a: Session, b: Session) -> None:
    assert (a.frame, a._state.chunk, len(a.history)) == (b.frame, b._state.chunk, len(b.history))
    for x, y in zip(a.history.entries, b.history.entries, strict=True):
        assert (x.index, x.led, x.latent.dtype) == (y.index, y.led, y.latent.dtype)
        assert torch.equal(x.latent, y.latent)
        assert torch.equal(x.camera, y.camera)
    for one, other in ((a._state.decoder, b._state.decoder), (a._state.prompt, b._state.prompt)):
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("after", [0, 1, 2])
def test_saves_and_forks_go_on_bit_for_bit(after: int, storage: torch.dtype, tmp_path: Path):
    session = begin(engine(model(storage=storage)))
    for move in WALK[:after]:
        session.step(move)
    session.save(tmp_path / "a.world")
    opened, fork = worldstride.open(tmp_path / "a.world", engine=session.engine), session.fork()
    assert_same_state(session, opened)
    for move in WALK[after:4]:
        truth = session.step(move)
        assert same(truth, opened.step(move))
        assert same(truth, fork.step(move))
    assert_same_state(session, opened)
    assert_same_state(session, fork)


def test_a_long_walk_goes_on_from_a_save(walked: Session, tmp_path: Path):
    session = walked.fork()
    session.acceleration = Acceleration("kept", kept=KeptContext())
    session.step(LEFT)
    session.save(tmp_path / "a.world")
    opened = worldstride.open(tmp_path / "a.world", engine=session.engine)
    assert all(same(session.step(move), opened.step(move)) for move in (FORWARD, RIGHT))


def test_sessions_step_together_as_they_would_alone(walked: Session):
    forks = [walked.fork(noise_seed=seed) for seed in (1, 2)]
    alone = [walked.fork(noise_seed=seed) for seed in (1, 2)]
    chunks = step_together(forks, actions=[FORWARD, FORWARD])
    assert [chunk.report.batch for chunk in chunks] == [2, 2]
    for one, other in zip(alone, forks, strict=True):
        one.step(FORWARD)
        assert relative(latents(other), latents(one)) <= 1e-5
    assert relative(latents(forks[0])[-4:], latents(forks[1])[-4:]) > 0.1


# What a chunk remembers


def test_context_is_what_the_model_retrieves(small: Engine):
    session = begin(small)
    for c, move in enumerate(WALK):
        report = session.step(move).report
        every = session.history.cameras()
        truth = select(every, 4 * c, session._state.points)
        assert tuple(report.context.rows) == truth.context
    assert len(report.context.memory) == 4
    clip = report.context.memory[0]
    assert report.signals.similarity == pytest.approx([1 - truth.scores[clip]] * 4)
    assert 0 < report.signals.newest <= 1


def test_clips_can_be_named(walked: Session):
    found = walked.fork().step(LEFT).report.context
    named = next(start for start in (4, 8, 12, 16) if start != found.memory[0])
    session, other = walked.fork(), walked.fork()
    report = session.step(LEFT, recall=range(named, named + 4)).report
    assert report.context.memory == tuple(range(named, named + 4))
    assert (report.context.sink, report.context.window) == (found.sink, found.window)
    assert all(0 <= s <= 1 for s in report.signals.similarity)
    other.step(LEFT)
    assert not torch.equal(latents(session), latents(other))
    with pytest.raises(
        InputError, match=r"recall must name at most 4 different places from 4 to 19, got \[0, 1, 2, 3\]"
    ):
        walked.fork().step(LEFT, recall=range(4))


@pytest.mark.parametrize(("window", "memory", "counts"), [(4, None, (4, 4, 4)), (8, 0, (4, 0, 8)), (12, 4, (4, 4, 12))])
def test_less_can_be_remembered(walked: Session, window: int, memory: int | None, counts: tuple[int, ...]):
    session = walked.fork()
    session.acceleration = Acceleration("less", window=window, memory=memory)
    report = session.step(FORWARD).report
    plan = report.context
    assert (len(plan.sink), len(plan.memory), len(plan.window)) == counts
    assert report.context_latents == sum(counts)
    assert plan.window == tuple(range(32 - window, 32))
    whole = walked.fork()
    whole.step(FORWARD)
    assert torch.equal(latents(session), latents(whole)) == (sum(counts) == 20)


@pytest.mark.parametrize("sees", ["all", "before", "itself"])
def test_kept_context_runs(small: Engine, walked: Session, sees: Sees):
    session, reports = replayed(begin(small), Acceleration("kept", kept=KeptContext(sees=sees)), WALK)
    assert [r.encoded_latents for r in reports[:5]] == [0, 4, 4, 4, 4]
    assert all(r.encoded_latents <= 8 for r in reports)
    assert all("kept" in r.levers for r in reports[2:])
    differ = relative(latents(session), latents(walked))
    assert differ > 1e-4  # what is kept saw another window


def test_keeping_what_sees_only_itself_is_exact(small: Engine):
    """The world's first latent is conditioned on the image and the others are not, so they are told apart."""
    kept, whole = (
        replayed(begin(small), Acceleration("kept", kept=KeptContext(incremental, sees="itself")), WALK)
        for incremental in (True, False)
    )
    assert [r.encoded_latents for r in kept[1]] == [0, *[4] * 7]
    assert [r.encoded_latents for r in whole[1]] == [0, 4, 8, 12, 16, 20, 20, 20]
    assert relative(latents(kept[0]), latents(whole[0])) <= 1e-5


@pytest.mark.parametrize("settings", [KeptContext(refresh=1), KeptContext(incremental=False)], ids=["refresh", "whole"])
def test_encoding_everything_anew_is_full_compute(small: Engine, walked: Session, settings: KeptContext):
    session, reports = replayed(begin(small), Acceleration("kept", kept=settings), WALK)
    assert [r.encoded_latents for r in reports] == [r.context_latents for r in reports] == [0, 4, 8, 12, 16, 20, 20, 20]
    assert relative(latents(session), latents(walked)) <= 1e-5


def test_policies_shorten_the_context(small: Engine):
    settings = Acceleration(
        "policies", temporal=TemporalWindow(scale=1e-6), spatial=SpatialMemory(threshold=1.0), pose=PoseView("ball")
    )
    _, reports = replayed(begin(small), settings, WALK)
    last = reports[-1]
    assert 0 < len(last.context.window) < 12
    assert last.context.memory == ()
    assert last.context.sink == (0, 1, 2, 3)
    assert {"temporal", "spatial"} <= set(last.levers)
    json.dumps(last.to_json())


@pytest.mark.parametrize("preset", ["exact", "steps-2", "balanced", "fast", "light-interaction"])
def test_presets_run(small: Engine, walked: Session, preset: str):
    session, reports = replayed(begin(small), preset, WALK)
    assert bool(latents(session).isfinite().all())
    assert torch.equal(latents(session), latents(walked)) == (preset == "exact")
    assert all(r.flops["denoise"] > 0 for r in reports)


def test_points_and_seeds_fix_a_world(small: Engine):
    chunks = [begin(small, seed).step(FORWARD) for seed in (3, 3, 4)]
    assert same(chunks[0], chunks[1])
    assert not same(chunks[0], chunks[2])
    points = cast(Tensor, begin(small)._state.points)
    assert points.shape[1] == 3
    assert 2000 < len(points) < 3000  # of 50 000, those that a camera sees
    with pytest.raises(InputError, match=r"points must have shape \[P, 3\], got \[5, 2\]"):
        small.open(np.zeros((1, 32, 48, 3), np.uint8), np.eye(4)[None], golden().prompt, points=torch.zeros(5, 2))


def test_a_pose_string_is_played_latent_by_latent():
    text = "w-4,right-3,left-1,s-3"
    poses = parse_poses(text)
    for trajectory in (parse_trajectory(text), Trajectory(cameras=poses.cameras.float())):
        session = begin(engine())
        frames = [chunk.cameras for chunk in session.play(trajectory, per="latent")]
        assert [len(f) for f in frames] == [13, 16, 16]
        cameras = torch.stack([e.camera for e in session.history.entries])
        assert torch.allclose(cameras, poses.cameras.float(), atol=1e-5)
        assert [e.led for e in session.history.entries] == [-1, *labels(poses.cameras)[1:].tolist()]
    with pytest.raises(InputError, match="per must be frame or latent, got 'chunk'"):
        next(begin(engine()).play(parse_trajectory("w-4"), per="chunk"))  # type: ignore[arg-type]


def guided(scale: float, **negative: Tensor) -> Session:
    made = HYWorldPlay(model().network, model().decoder, torch.float32, 2, scale)
    session = begin(engine(made))
    session._state.prompt.update(negative)
    return session


def test_guidance_goes_away_from_the_negative_prompt():
    case = golden()
    same_text = {f"negative_{name}": t for name, t in case.prompt.items() if name != "vision"}
    other = {**same_text, "negative_text": -case.prompt["text"]}
    plain = begin(engine(HYWorldPlay(model().network, model().decoder, torch.float32, 2)))
    worlds = [plain, guided(6.0, **same_text), guided(1.0, **other), guided(6.0, **other)]
    moves = [Action({"KeyW"})] * 2
    made = []
    for session in worlds:
        reports = [session.step(move).report for move in moves]
        made.append((latents(session), reports[-1]))
    (truth, cost), *rest = made
    # what is the same on both sides, and a scale of one, guide nowhere
    assert [relative(latents, truth) < 1e-4 for latents, _ in rest] == [True, True, False]
    for _, report in rest:
        assert report.context_bytes == 2 * cost.context_bytes
        assert report.flops["context"] == 2 * cost.flops["context"]
        assert report.flops["denoise"] == 2 * cost.flops["denoise"]
    kept = guided(6.0, **other)
    kept.acceleration = Acceleration("kept", kept=KeptContext(refresh=1))
    for move in moves:
        kept.step(move)
    assert relative(latents(kept), made[-1][0]) < 1e-4
    with pytest.raises(InputError, match="states named 'negative_text' beside 'text', being guided, got"):
        guided(6.0).step()


def test_parts_of_clips_and_chunks_without_labels_are_refused(small: Engine):
    session = begin(small)
    for _ in range(6):
        session.step(FORWARD)
    session.acceleration = Acceleration("part", memory=3)
    with pytest.raises(InputError, match="clips of 4 latents; memory must be a multiple, got 3"):
        session.step(FORWARD)
    still = torch.eye(4).expand(1, 4, 4, 4)
    encoded = small.model.encode_prompt(golden().prompt, small.attention)  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"needs a label for each of 4 latents, got \(\)"):
        small.model.prepare(Conditions(5, still, still, small.model.intrinsics, encoded=encoded))
