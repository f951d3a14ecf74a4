"""HY-WorldPlay's bidirectional model: the contract, a plain loop from the specification, retrieval, loading, levers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import worldstride
from hy_golden import CPU, VAE, VAE_JSON, golden, network, normal, relative, vae
from hy_variants import FORWARD, RIGHT, latents, same_weights, write_vae
from worldstride import Acceleration, Action, Engine, Session
from worldstride.acceleration import AttentionReuse, resolve
from worldstride.attention import Attend, Selection, Sparsity, attend
from worldstride.attention.streams import Places
from worldstride.context.history import History
from worldstride.context.kept import KeptContext
from worldstride.context.policy import SpatialMemory
from worldstride.context.selection import Lookup
from worldstride.context.selection import select as select_context
from worldstride.engine import EngineSource
from worldstride.errors import ContractError, InputError
from worldstride.levers import levers
from worldstride.models.hy_worldplay import cost, given, places
from worldstride.models.hy_worldplay.config import HYConfig
from worldstride.models.hy_worldplay.joint import HYJoint, JointContext, JointInputs
from worldstride.models.hy_worldplay.labels import labels
from worldstride.models.hy_worldplay.loading import VARIANTS, random_model
from worldstride.models.hy_worldplay.model import Frames
from worldstride.models.hy_worldplay.poses import parse_poses
from worldstride.models.hy_worldplay.retrieval import ball_points, select_wide, visible
from worldstride.models.hy_worldplay.text import Prompt
from worldstride.models.registry import find
from worldstride.models.video_decoder import VideoDecoder
from worldstride.protocol import ChunkShape, Conditions, Context, Recalled
from worldstride.session import step_together
from worldstride.testing import check_model
from worldstride.trajectory import Trajectory, parse_trajectory

HEIGHT, WIDTH = 32, 32
GUIDANCE, STEPS = 6.0, 2
SOME = visible(ball_points(3000, 8.0, 0))
"""Few of the points that retrieval takes, for speed."""


class Blank(VideoDecoder):
    """Stands in for a VAE: it shows black frames, whatever the latents."""

    def decode(self, latents: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        count = 4 * latents.shape[1] - (0 if state else 3)
        return torch.zeros(len(latents), count, *self.size, 3, dtype=torch.uint8), {"begun": torch.ones(1)}


def model(
    kind: type[HYJoint] = HYJoint, guidance: float | None = GUIDANCE, storage: torch.dtype = torch.float32,
    decoder: type[VideoDecoder] = Blank,
) -> HYJoint:  # fmt: skip
    return kind(network(), decoder(vae(), HEIGHT, WIDTH), storage, STEPS, guidance)


def engine(of: HYJoint | None = None) -> Engine:
    source = EngineSource("hy_worldplay", None, "random", "golden")
    return Engine(of or model(), source, resolve("off"), find("hy_worldplay").controls)


def prompt() -> dict[str, Tensor]:
    """The golden prompt, and another one as the negative."""
    states = golden().prompt
    return {**states, "negative_text": -states["text"], "negative_text_mask": states["text_mask"]}


def picture() -> Tensor:
    return torch.randint(256, (1, HEIGHT, WIDTH, 3), generator=torch.Generator().manual_seed(1)).byte()


def begin(of: Engine, **states: Tensor) -> Session:
    session = of.open(picture(), torch.eye(4)[None], {**prompt(), **states}, points=SOME)
    session._state.noise_seed = 3
    return session


# The contract


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16], ids=str)
def test_the_model_keeps_the_contract(storage: torch.dtype):
    check_model(model(storage=storage), prompt(), chunks=(0, 1))


def test_frames_come_as_the_contract_says():
    check_model(model(decoder=VideoDecoder, guidance=None), golden().prompt, chunks=(0, 1))


class Unplaced(HYJoint):
    """Encodes remembered latents without their cameras."""

    def encode_context(self, recalled: Recalled, previous: Context | None, attend: Attend) -> JointContext:
        still = torch.eye(4).expand(recalled.cameras.shape)
        return super().encode_context(replace(recalled, cameras=still), previous, attend)


class Forgetful(HYJoint):
    """Looks at nothing that is remembered."""

    def velocity(self, x: Tensor, sigma: float, inputs: JointInputs, context: Context, attend: Attend) -> Any:
        return super().velocity(x, sigma, inputs, JointContext(None), attend)


@pytest.mark.parametrize(
    ("mistake", "text"),
    [(Unplaced, "the context's cameras are ignored"), (Forgetful, "the context is ignored")],
)
def test_a_planted_mistake_is_named(mistake: type[HYJoint], text: str):
    with pytest.raises(ContractError, match=text):
        check_model(model(mistake, guidance=None), golden().prompt, chunks=(1,))


# A plain loop


@torch.inference_mode()
def plain_loop(cameras: Tensor, noise: Tensor, image: Tensor) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Latents [T, C, h, w] and contexts of a whole rollout, from the specification (sections 3 and 4).

    The latents, their conditions, labels and cameras are whole tensors; every forward takes its rows of them.
    """
    of, states, case = network(), prompt(), golden()
    count, c = len(cameras), of.config
    glyphs = states["glyphs"], states["glyphs_mask"]
    branches = [
        Prompt.masked(states[f"{sign}text"], states["text_mask"], *(glyphs if not sign else none), states["vision"])
        for sign, none in (("", ()), ("negative_", (glyphs[0][:, :0], glyphs[1][:, :0])))
    ]
    x, condition = noise.clone()[None], torch.zeros(1, count, c.channels + 1, *noise.shape[2:])
    condition[:, 0, :-1], condition[:, 0, -1] = image, 1
    number = labels(cameras)[None]
    project, unproject = places.projections(cameras[None], case.given("Ks")[0, 0])
    sigmas = [5 * s / (1 + 4 * s) for s in (1.0, 0.5, 0.0)]
    chosen = list[tuple[int, ...]]()
    for begin in range(0, count, 16):
        context = select_wide(cameras, begin, SOME).context
        chosen.append(context)
        rows = [*context, *range(begin, begin + 16)]
        tables = places.rotary_table(torch.arange(len(rows)), *noise.shape[2:], c.rope, c.theta)
        at, old = Places(*tables, project[:, rows], unproject[:, rows]), len(context)
        for sigma, after in pairwise(sigmas):
            levels = torch.tensor([[14.0] * old + [1000 * sigma] * 16])
            frames = Frames(x[:, rows], condition[:, rows], levels, number[:, rows], at)
            wanted, other = (of.joint(frames, branch, 1000 * sigma, attend)[:, old:] for branch in branches)
            x[:, begin : begin + 16] += (after - sigma) * (other + GUIDANCE * (wanted - other))
    return x[0], chosen


def test_a_session_is_the_plain_loop():
    cameras = parse_poses("w-15,right-30,w-6,left-28").cameras.float()
    noise, of = normal(80, 4, 2, 2, seed=5), engine()
    session = begin(of)
    reports = []
    for k in range(5):
        shape = of.model.chunk(k)
        counts = torch.tensor([b - a for a, b in pairwise((-1, *shape.latent_frames))])
        rows = slice(16 * k, 16 * k + 16)
        each = cameras[rows].repeat_interleave(counts, 0)
        reports.append(session.step(cameras=each, noise=noise[rows]).report)
    truth, chosen = plain_loop(cameras, noise, session._state.prompt["image"])
    assert [tuple(r.context.rows) for r in reports] == chosen
    assert len({len(c) for c in chosen}) > 3  # 0, 16, and several numbers of clips
    assert relative(latents(session), truth) <= 1e-5
    assert [e.led for e in session.history.entries] == [-1, *labels(cameras)[1:].tolist()]
    assert [r.steps for r in reports] == [STEPS] * 5


# Retrieval


@pytest.mark.parametrize("seed", range(3))
def test_the_context_is_the_union_of_the_queries(seed: int):
    generator, of = torch.Generator().manual_seed(seed), model()
    names = [["left", "right", "w", "s", "up", "down"][i] for i in torch.randint(6, (32,), generator=generator)]
    cameras = parse_poses(",".join(f"{name}-6" for name in names)).cameras.float()
    sizes = set[int]()
    for k in range(12):
        begin, shape, history = 16 * k, of.chunk(k), History(sink=4, clip=4)
        history.append(torch.zeros(begin, 1), cameras[:begin], (None,) * begin)
        counts = torch.tensor([b - a for a, b in pairwise((-1, *shape.latent_frames))])
        coming = cameras[begin : begin + 16].repeat_interleave(counts, 0)
        ((plan, signals),) = select_context([Lookup(history, shape, coming, SOME, of.intrinsics, rule=of)])
        truth = select_wide(cameras, begin, SOME)
        assert tuple(plan.rows) == truth.context
        assert len(signals.similarity) == len(plan.memory)
        for place, share in zip(plan.memory, signals.similarity, strict=True):
            assert share == 1 - truth.scores[place - place % 4]
        sizes.add(len(plan.memory))
    assert {0, 4} < sizes  # several queries named the same clip, and they named different ones


def test_nothing_to_choose_from_brings_nothing_back():
    assert model().recall(torch.eye(4).expand(12, 4, 4), torch.eye(4).expand(16, 4, 4), SOME, [], 0) == ([], [])


def test_a_straight_walk_brings_one_clip_back():
    reports = [begin_and_step(Acceleration())[k] for k in range(4)]
    assert [r.context_latents for r in reports] == [0, 16, 20, 20]


def begin_and_step(settings: Acceleration | str, chunks: int = 4, move: Action = FORWARD) -> list[Any]:
    session = begin(engine())
    session.acceleration = settings
    return [session.step(move).report for _ in range(chunks)]


@pytest.mark.parametrize(("window", "memory"), [(4, None), (8, 8), (12, 4), (11, None), (12, 0)])
def test_less_can_be_remembered(window: int, memory: int | None):
    reports = begin_and_step(Acceleration("less", window=window, memory=memory), move=RIGHT)
    most = 16 if memory is None else memory
    for report in reports[1:]:
        assert report.context.window == tuple(range(report.context.rows[-1] + 1 - window, report.context.rows[-1] + 1))
        assert len(report.context.memory) <= most
        assert len(report.context.memory) % 4 == 0
    assert bool(reports[-1].context.memory) == bool(most)


def test_clips_can_be_named():
    session = begin(engine())
    for _ in range(3):
        session.step(RIGHT)
    found = session.fork().step(RIGHT).report.context
    named = (4, 5, 6, 7, 24, 25, 26, 27)
    other = session.fork()
    report = other.step(RIGHT, recall=named).report
    assert (report.context.memory, report.context.window) == (named, found.window)
    again = session.fork()
    assert again.step(RIGHT, recall=found.memory).report.context.memory == found.memory
    with pytest.raises(InputError, match=r"recall must name at most 16 different places from 4 to 35, got \[0, 1"):
        session.step(RIGHT, recall=range(4))


def test_parts_of_clips_are_refused():
    with pytest.raises(InputError, match="clips of 4 latents; memory must be a multiple, got 6"):
        begin_and_step(Acceleration("part", memory=6))


# Levers, batches, saves


@pytest.mark.parametrize(
    ("lever", "note"),
    [
        ({"kept": KeptContext()}, "the model keeps no latents"),
        ({"attention": AttentionReuse(2)}, "no evaluation could reuse it"),
        ({"sparsity": Sparsity((1, 2, 2), denoise=Selection(keep=0.5))}, "the model attends to no blocks"),
    ],
)
def test_levers_that_need_a_cache_do_nothing_and_say_so(lever: dict[str, Any], note: str):
    plain, session, settings = begin(engine()), begin(engine()), Acceleration("asked", **lever)
    session.acceleration = settings
    reports = [session.step(FORWARD).report for _ in range(3)]
    for _ in range(3):
        plain.step(FORWARD)
    assert torch.equal(latents(session), latents(plain))
    assert [r.levers for r in reports] == [()] * 3
    (told,) = levers(settings, session.engine.model.chunk(2), reports)
    assert "fired in 0 of 3 chunks" in str(told)
    assert note in str(told)


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_memory_that_a_rule_left_out_is_no_lever_doing(threshold: float):
    reports = begin_and_step(Acceleration("gated", spatial=SpatialMemory("known", threshold, hysteresis=0.0)))
    cut = bool(threshold)
    assert [r.context_latents for r in reports] == [0, 16, *([16, 16] if cut else [20, 20])]
    assert [r.levers for r in reports[2:]] == [("spatial",) if cut else ()] * 2


@pytest.mark.parametrize("preset", ["balanced", "fast", "light-interaction"])
def test_presets_run(preset: str):
    assert all(r.flops["denoise"] > 0 == r.flops["context"] for r in begin_and_step(preset, 3))


def test_worlds_step_together_and_go_on_from_a_save(tmp_path: Path):
    played = engine()
    session = begin(played)
    session.step(RIGHT)
    forks, alone = [[session.fork(noise_seed=seed) for seed in (1, 2)] for _ in range(2)]
    chunks = step_together(forks, actions=[RIGHT, RIGHT])
    assert [chunk.report.batch for chunk in chunks] == [2, 2]
    for one, other in zip(alone, forks, strict=True):
        one.step(RIGHT)
        assert relative(latents(other), latents(one)) <= 1e-5
    session.save(tmp_path / "a.world")
    on = worldstride.open(tmp_path / "a.world", engine=played)
    assert on.step(RIGHT).frames.shape == session.step(RIGHT).frames.shape == (64, HEIGHT, WIDTH, 3)
    assert torch.equal(latents(on), latents(session))


def test_compiled_blocks_stand_in():
    """Whoever compiles the blocks compiles this model's, too."""
    of, calls = model(guidance=None), list[str]()
    net = type(of.network)(of.config).eval()
    net.load_state_dict(of.network.state_dict())
    enter, leave = net.begin, net.end
    net.begin = lambda *given: calls.append("begin") or enter(*given)  # type: ignore[func-returns-value]
    net.end = lambda *given: calls.append("end") or leave(*given)  # type: ignore[func-returns-value]
    of.network = net
    begin(engine(of)).step(FORWARD)
    assert calls == ["begin", "end"] * net.config.depth * STEPS


def test_a_pose_string_is_played_latent_by_latent():
    poses = parse_poses("w-15,right-16")
    for trajectory in (parse_trajectory("w-15,right-16"), Trajectory(cameras=poses.cameras.float())):
        session = begin(engine())
        assert [len(chunk.frames) for chunk in session.play(trajectory, per="latent")] == [61, 64]
        assert torch.allclose(session.history.cameras(), poses.cameras.float(), atol=1e-5)


# What it is given


def test_the_negative_prompt_the_image_and_the_text_count():
    one = begin(engine())
    one.step(FORWARD)
    for name in ("negative_text", "text", "glyphs", "vision"):
        other = begin(engine(), **{name: normal(*prompt()[name.removeprefix("negative_")].shape)})
        other.step(FORWARD)
        assert relative(latents(other), latents(one)) > 1e-4
    dark = engine().open(picture() // 4, torch.eye(4)[None], prompt(), points=SOME, noise_seed=3)
    dark.step(FORWARD)
    assert relative(latents(dark), latents(one)) > 1e-4


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"negative_text": None}, "needs encoder states named 'negative_text' beside 'text', being guided"),
        ({"vision": None}, "needs encoder states named 'vision', got"),
        ({"txet": torch.zeros(1)}, "unknown prompt states 'txet' .did you mean 'text'"),
        ({"glyphs": torch.zeros(1, 2, 3), "glyphs_mask": torch.ones(1, 2)}, r"glyphs states must be \[1, N, "),
    ],
)
def test_prompts_that_do_not_fit_are_refused(change: Mapping[str, Tensor | None], text: str):
    states = {name: t for name, t in {**prompt(), **change}.items() if t is not None}
    with pytest.raises(InputError, match=text):
        model().encode_prompt(states, attend)


def test_chunks_without_a_prompt_or_labels_are_refused():
    still, of = torch.eye(4).expand(1, 16, 4, 4), model()
    with pytest.raises(InputError, match=r"needs an encoded prompt; begin worlds with Engine\.open"):
        of.prepare(Conditions(0, still, still, of.intrinsics, led=(0,) * 16))
    encoded = of.encode_prompt(prompt(), attend)
    with pytest.raises(InputError, match=r"needs a label for each of 16 latents, got \(0, 0\)"):
        of.prepare(Conditions(0, still, still, of.intrinsics, led=(0, 0), encoded=encoded))


# What it costs


def test_a_published_evaluation_costs_petaflops():
    """Section 6 says 5.7 PFLOP at 32 latents of context, with upstream's modulation of every token and the text's."""
    config = HYConfig()
    ours = cost.evaluation_flops(config, 1560, 48, 0)
    modulation, told = 54 * 48 * 1560 * 12 * 2048**2, 930 / (48 * 1560)
    assert ours == pytest.approx(5.40e15, rel=0.005)
    assert ours + modulation + 2 * told * ours == pytest.approx(5.7e15, rel=0.03)


def test_reports_count_both_branches_and_the_context_in_every_evaluation():
    of = model()
    reports = begin_and_step(Acceleration(), 3)
    for report in reports:
        each = cost.evaluation_flops(of.config, 4, 16 + report.context_latents, 0)
        assert report.flops == {"context": 0.0, "denoise": 2 * STEPS * each}
    assert reports[0].context_bytes == 0 < reports[1].context_bytes


# Loading


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder as the model is published, with the golden weights and a tiny VAE."""
    folder = tmp_path / "bidirectional_model"
    folder.mkdir()
    save_file(dict(golden().published), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(golden().metadata["config"])
    write_vae(tmp_path / "vae", vae(), VAE_JSON)
    return folder


def test_the_published_folder_is_this_model(published: Path):
    of = worldstride.load("hy_worldplay", path=published, device="cpu", dtype=torch.float32).model
    assert isinstance(of, HYJoint)
    assert (of.steps, of.guidance, of.sampler().sigmas[1]) == (50, 6.0, pytest.approx(4.9 / 4.92))
    assert same_weights(of.network, network())
    assert of.chunk(0) == ChunkShape(
        16, 61, window=12, memory=16, sink=4, clip=4, last_frames=tuple(range(0, 61, 4))
    )  # fmt: skip


def test_every_variant_has_random_weights(monkeypatch: pytest.MonkeyPatch):
    for variant, (kind, steps, guidance) in VARIANTS.items():
        made = random_model(golden().config, VAE, CPU, torch.float32, HEIGHT, WIDTH, variant=variant)
        assert (type(made), made.steps, made.guidance) == (kind, steps, guidance)
        states = made.sample_prompt(torch.Generator().manual_seed(0))
        assert ("negative_text" in states) == (guidance is not None)
    sizes = golden().config, VAE
    monkeypatch.setattr("worldstride.models.hy_worldplay.loading.HYConfig", lambda: sizes[0])
    monkeypatch.setattr("worldstride.models.hy_worldplay.loading.VAEConfig", lambda: sizes[1])
    named = worldstride.load("hy_worldplay", "bidirectional_model", "random", "cpu", dtype=torch.float32)
    assert isinstance(named.model, HYJoint)
    with pytest.raises(InputError, match=r"leave out the path 'else', or name one of ar_dis.*, bidirectional_model"):
        worldstride.load("hy_worldplay", "else", "random", "cpu")


def test_planes_hold_the_image_at_the_first_latent_alone():
    image, weight = normal(1, 4, 2, 2), torch.zeros(1)
    made = given.planes(image, (0, -1, 3), 2, (4, 2, 2), weight)
    assert torch.equal(made[:, 1, :4], image.expand(2, -1, -1, -1))
    assert made[:, 1, 4].eq(1).all()
    assert not made[:, [0, 2]].any()
    assert not given.planes(None, (-1,), 1, (4, 2, 2), weight).any()
