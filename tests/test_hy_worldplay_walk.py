"""Ways to play a HY-WorldPlay walk: upstream's structure, reused attention, compiled blocks, and what is measured."""

from __future__ import annotations

import gc
import json
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hy_golden
from hy_golden import engine, golden, model, network, normal
from hy_variants import latents
from worldstride import Acceleration, Engine
from worldstride.acceleration import AttentionReuse, resolve, save_settings
from worldstride.attention import Partial, attend, streams
from worldstride.bench import structure_hy_worldplay
from worldstride.bench.plan import Plan, read_plan, record
from worldstride.bench.structure_hunyuan_vae import UpstreamDecoder
from worldstride.bench.structure_hy_worldplay import UpstreamStructure, UpstreamWorldPlay
from worldstride.bench.walk import Way, out_and_back, walked, ways
from worldstride.commands.bench import Bench
from worldstride.commands.options import EngineOptions
from worldstride.context.policy import TemporalWindow
from worldstride.control import Action
from worldstride.errors import InputError
from worldstride.models.hy_worldplay.adapter import HYContext
from worldstride.models.hy_worldplay.loading import random_model
from worldstride.models.hy_worldplay.model import Frames, HYNetwork
from worldstride.models.hy_worldplay.places import projections, rotary_table
from worldstride.models.video_decoder import VideoDecoder
from worldstride.protocol import ChunkShape

ROOT = Path(__file__).parents[1]


def frames(first: int, level: float, raw: bool) -> Frames:
    """Four latents of the golden case, with `raw` at the cameras themselves."""
    case, rows = golden(), slice(first, first + 4)
    config = case.config
    latents, condition = (case.given(name).transpose(1, 2)[:, rows] for name in ("noise", "cond"))
    cos, sin = rotary_table(torch.arange(first, first + 4), *latents.shape[3:], config.rope, config.theta)
    of = case.cameras[None, rows], case.given("Ks")[:, rows]
    at = streams.Places(cos, sin, *(of if raw else projections(*of)))
    return Frames(latents, condition, torch.full((1, 4), level), case.given("action")[:, rows], at)


@torch.inference_mode()
def evaluated(of: HYNetwork, outer: list[Partial] | None = None, reused: tuple[Partial, ...] = ()) -> Tensor:
    text, raw = of.text(golden().states, attend), isinstance(of, UpstreamStructure)
    before, now = frames(0, 14.0, raw), frames(4, 500.0, raw)
    context = [(pair,) for pair in of.context(before, text, attend)]
    return of.velocity(now, text, context, before.at, attend, outer, reused)


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def test_upstreams_structure_is_the_same_mathematics():
    other = UpstreamStructure(network())
    assert far(evaluated(other), evaluated(network())) < 1e-5
    theirs, ours = (dict(of.named_parameters()) for of in (other, network()))
    assert all(theirs[name].data_ptr() == ours[name].data_ptr() for name in ours)


def test_a_session_in_upstreams_structure_makes_the_same_latents():
    ours = model()
    plain, other = (begun(engine(m)) for m in (ours, UpstreamWorldPlay(ours)))
    for action in out_and_back(7):  # the last context is not the whole past
        plain.step(action)
        other.step(action)
    made, theirs = (latents(s) for s in (plain, other))
    assert len(made) == 28
    assert far(theirs, made) < 1e-4


def test_half_precision_is_left_where_autocast_leaves_it(monkeypatch: pytest.MonkeyPatch):
    """Layer norms come in float32, and latents and frames are the same but for rounding."""
    size, seen = (hy_golden.HEIGHT, hy_golden.WIDTH), set[torch.dtype]()
    ours = random_model(golden().config, hy_golden.VAE, torch.device("cpu"), torch.bfloat16, *size)
    plain, other = (engine(m).sample(seed=3) for m in (ours, UpstreamWorldPlay(ours)))
    norm = structure_hy_worldplay._normed

    def watched(*of: Tensor) -> Tensor:
        made = norm(*of)
        seen.add(made.dtype)
        return made

    monkeypatch.setattr(structure_hy_worldplay, "_normed", watched)
    for action in out_and_back(2):
        frames = [torch.from_numpy(s.step(action).frames).float() for s in (plain, other)]
        assert (frames[0] - frames[1]).abs().mean() < 0.1 * frames[0].std()
    assert seen == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")
    made, theirs = (latents(s).float() for s in (plain, other))
    assert (theirs - made).square().mean() < 1e-3 * made.square().mean()


def test_upstreams_decoder_makes_the_same_frames():
    """Chunk after chunk, whatever its layout; and the model's own decoder stays as it was."""
    ours = model().decoder
    before = [type(m) for m in ours.vae.modules()]
    theirs, states = UpstreamDecoder(ours), [dict[str, Tensor](), dict[str, Tensor]()]
    for i in range(3):
        z, frames = normal(1, 4, *golden_latent(ours), seed=i), list[Tensor]()
        for k, decoder in enumerate((ours, theirs)):
            made, states[k] = decoder.decode(z, states[k])
            frames.append(made)
        assert (frames[0].int() - frames[1].int()).abs().max() <= 1
        assert frames[0].float().std() > 1
    assert [type(m) for m in ours.vae.modules()] == before
    weights = dict(ours.vae.named_parameters())
    for name, parameter in theirs.vae.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert parameter.is_contiguous() or name.startswith("encoder.")


def golden_latent(decoder: VideoDecoder) -> tuple[int, int, int]:
    return decoder.vae.config.latent_channels, decoder.size[0] // 16, decoder.size[1] // 16  # type: ignore[attr-defined]


def test_attention_kept_from_an_evaluation_is_that_evaluations():
    plain, outer = evaluated(network()), list[Partial]()
    assert far(evaluated(network(), outer), plain) < 1e-5
    assert len(outer) == golden().config.depth
    assert far(evaluated(network(), None, tuple(outer)), plain) < 1e-5
    half = tuple(Partial(0.5 * p.out, p.lse) for p in outer)
    assert far(evaluated(network(), None, half), plain) > 1e-3


def test_compiled_blocks_give_the_same():
    compiled = UpstreamStructure(network())  # any network of its own over the same weights
    compiled.__class__ = HYNetwork
    compiled.compile_passes()
    assert far(evaluated(compiled), evaluated(network())) < 1e-5
    torch.compiler.reset()


def test_a_warmed_up_engine_compiles_nothing_more():
    made = model()
    made.network = UpstreamStructure(network())
    made.network.__class__ = HYNetwork
    made.compile_passes()
    played = engine(made)
    kept = resolve(ROOT / "benchmarks/levers/hy-incremental.toml")
    # contexts of 0, 4, ... 20 latents, twice more the same
    assert played.warm_up([Acceleration(), kept]) == 8 + 8
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    for settings in (Acceleration(), kept):
        session = played.sample(seed=4)
        session.acceleration = settings
        for action in out_and_back(9):
            session.step(action)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    torch.compiler.reset()


def test_reuse_is_reported_and_costs_less():
    session, plain = (begun(engine(model())) for _ in range(2))
    session.acceleration = Acceleration("reuse", attention=AttentionReuse(2))
    made, full = (s.step(Action({"KeyW"})).report for s in (session, plain))
    assert [e.attended for e in made.evaluations] == [True, False, True, False]
    assert made.flops["denoise"] <= full.flops["denoise"]
    made, full = (s.step(Action({"KeyW"})).report for s in (session, plain))
    assert made.flops["denoise"] < full.flops["denoise"]
    assert "attention" in made.levers


def test_the_context_is_let_go_of_before_frames_are_decoded():
    made = model()
    alive, contexts = list[bool](), list[Any]()
    encode, decode = made.encode_context, made.decoder.decode

    def encoding(*args: Any) -> HYContext:
        context = encode(*args)
        contexts.append(weakref.ref(context))
        return context

    def decoding(*args: Any) -> Any:
        gc.collect()
        alive.append(contexts[-1]() is not None)
        return decode(*args)

    made.encode_context, made.decoder.decode = encoding, decoding  # type: ignore[method-assign]
    session = begun(engine(made))
    for _ in range(3):
        session.step(Action({"KeyW"}))
    assert len(contexts) == 3
    assert alive == [False] * 3


def begun(of: Engine) -> Any:
    size = of.model.decoder.size  # type: ignore[attr-defined]
    return of.open(torch.zeros(1, *size, 3, dtype=torch.uint8), torch.eye(4)[None], golden().prompt)


def test_a_walk_goes_out_and_comes_back():
    ahead, right, back, left = (Action({key}) for key in ("KeyW", "ArrowRight", "KeyS", "ArrowLeft"))
    assert out_and_back(4) == [ahead, right, left, back]
    assert out_and_back(5) == [ahead, right, ahead, back, left]


def test_every_way_of_a_walk_is_a_row(tmp_path: Path):
    played = engine(model())
    names = ["upstream", "off", str(ROOT / "benchmarks/levers/hy-incremental.toml")]
    chosen, stepped = ways(played, names), list[int]()
    assert [w.name for w in chosen] == ["upstream", "off", "hy-incremental"]
    assert isinstance(chosen[0].start().model, UpstreamWorldPlay)
    assert all(w.start() is played for w in chosen[1:])
    rows: list[Any] = [walked(w, 4, 1, advance=lambda: stepped.append(1)) for w in chosen]
    assert len(stepped) == 3 * 5
    for row in rows:
        assert [e["context_latents"] for e in row["each"]] == [0, 4, 8, 12]
        assert row["seconds"]["total"] == pytest.approx(sum(e["seconds"]["total"] for e in row["each"]))
        assert row["tflops"] > 0
        json.dumps(row)
        assert all(len(e["evaluation_seconds"]) == e["evaluations"] == 4 for e in row["each"])
        assert all(e["flops"] > 0 and e["context"] == e["denoising"] == "full compute" for e in row["each"])
    assert [row["encoded_latents"] for row in rows] == [6, 6, 3]
    with pytest.raises(InputError, match="at least 2 chunks and a warm-up of 0 or more, got 1 and 0"):
        walked(chosen[1], 1, 0)


@pytest.mark.parametrize("name", ["hy-balanced", "hy-fast"])
def test_settings_for_this_model_pull_all_their_levers(name: str):
    """Out and back: memory comes back, fewer evaluations where all was seen, and a bounded context."""
    (way,) = ways(engine(model()), [str(ROOT / f"benchmarks/levers/{name}.toml")])
    plan = Plan((1.0, 1.0, *(0.5,) * 6), "recorded")
    row: Any = walked(way, 8, 0, plan)
    longest, most = {"hy-balanced": (8, 4), "hy-fast": (4, 3)}[name]
    assert {e["evaluations"] for e in row["each"]} == {2, most}
    assert all(e["context_latents"] <= longest + 8 for e in row["each"])
    assert all(e["encoded_latents"] <= 8 for e in row["each"])
    fired = {lever for e in row["each"] for lever in e["levers"]}
    assert {"kept", "attention", "adaptive", "window"} <= fired
    assert ("sparsity" in fired) is (name == "hy-fast")
    assert "temporal" not in fired  # the plan stands in for it
    json.dumps(row)


def test_a_plan_is_recorded_written_and_replayed(tiny_engine: Engine, tmp_path: Path):
    temporal = Acceleration("changing", temporal=TemporalWindow())
    walk = out_and_back(8)
    plan = record(tiny_engine, temporal, walk)
    assert len(plan.shares) == 8
    assert plan.shares[0] == 1
    assert min(plan.shares) < 1
    session, shape = tiny_engine.sample(0), tiny_engine.model.chunk(5)
    session.acceleration = temporal
    reports = [session.step(action).report for action in walk]
    assert plan.shares[-1] == len(reports[-1].context.window) / shape.window
    file = tmp_path / "plan.json"
    command = Bench("plan", "courtyard", 8, accelerations=(str(tmp_path / "changing.toml"),), out=file)
    save_settings(temporal, tmp_path / "changing.toml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineOptions, "load", lambda self, name: tiny_engine)
        assert command.run("bench plan") == 0
    assert read_plan(file) == plan
    for text in ("[]", '{"format": "worldstride-plan"}', "{"):
        file.write_text(text)
        with pytest.raises(InputError, match="plan"):
            read_plan(file)


def test_a_plan_stands_in_for_a_temporal_window_alone():
    shape, plan = ChunkShape(4, 16, window=12), Plan((0.5, 0.0, 1.0), "recorded")
    some = Acceleration("some", temporal=TemporalWindow(multiple=4))
    settled = [plan.settle(some, k, shape) for k in range(3)]
    assert [s.window for s in settled] == [8, 4, 12]
    assert all(s.temporal is None for s in settled)
    assert plan.settle(replace(some, window=4), 2, shape).window == 4
    assert plan.settle(Acceleration("plain"), 7, shape) == Acceleration("plain")
    with pytest.raises(InputError, match="the plan is of 3 chunks, and chunk 3 is to be played"):
        plan.settle(some, 3, shape)
    with pytest.raises(InputError, match="have no temporal window"):
        record(engine(model()), Acceleration("plain"), [])
    with pytest.raises(InputError, match="share 1 of the plan"):
        Plan((1.0, 1.5), "recorded")
    with pytest.raises(InputError, match="a plan is recorded of one setting into --out, got 2"):
        Bench("plan", "courtyard", accelerations=("off", "fast")).run("bench plan")


def test_not_every_model_has_an_upstream(tiny_engine: Engine):
    with pytest.raises(InputError, match="'upstream' is known of HYWorldPlay, MatrixGame3 alone, not of 'courtyard'"):
        ways(tiny_engine, ["upstream"])


def test_the_command_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr(EngineOptions, "load", lambda self, name: engine(model()))
    out = tmp_path / "walk.json"
    assert Bench("walk", "hy_worldplay", 2, 1, ("upstream", "off"), out=out).run("bench walk") == 0
    result = json.loads(out.read_text())
    assert result["format"] == "worldstride-bench-walk"
    assert [row["name"] for row in result["rows"]] == ["upstream", "off"]
    assert result["parameter_bytes"] > 1e5
    assert "upstream" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["off", "hy-incremental"])
def test_a_walk_ahead_is_the_same_walk(name: str):
    (way,) = ways(engine(model()), [name if name == "off" else str(ROOT / f"benchmarks/levers/{name}.toml")])
    stepped: list[int] = []
    begun = time.perf_counter()
    ahead: Any = walked(way, 4, 0, advance=lambda: stepped.append(1), ahead=True)
    passed = time.perf_counter() - begun
    plain: Any = walked(way, 4, 1)
    assert len(stepped) == 4
    assert (ahead["ahead"], plain["ahead"]) == (True, False)
    assert 0.5 * passed < ahead["seconds"]["total"] <= ahead["wall_seconds"] <= passed
    assert plain["seconds"]["total"] <= plain["wall_seconds"]
    timed = ("seconds", "evaluation_seconds")
    for one, other in zip(ahead["each"], plain["each"], strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}
    json.dumps(ahead)


def test_a_walk_ahead_replays_a_plan(tiny_engine: Engine):
    way = Way("changing", lambda: tiny_engine, Acceleration("changing", temporal=TemporalWindow()))
    plan = Plan((1.0, 1.0, 0.0, 1.0, 0.25, 1.0), "recorded")
    rows: list[Any] = [walked(way, 6, 0, plan, ahead=ahead) for ahead in (False, True)]
    plain, ahead = ([e["context_latents"] for e in row["each"]] for row in rows)
    assert plain == ahead
    assert max(plain[2], plain[4]) < min(plain[3], plain[5])


def test_the_command_plays_walks_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr(EngineOptions, "load", lambda self, name: engine(model()))
    out = tmp_path / "walk.json"
    assert Bench("walk", "hy_worldplay", 2, 0, ("upstream", "off"), ahead=("off",), out=out).run("bench walk") == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["name"], row["ahead"]) for row in rows] == [("upstream", False), ("off", False), ("off, ahead", True)]
    assert "totals are wall time" in capsys.readouterr().out
    with pytest.raises(InputError, match="--ahead is for a walk; bench rollout steps chunk by chunk"):
        Bench("rollout", "hy_worldplay", ahead=("off",)).run("bench rollout")


def test_what_stops_a_run_leaves_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(EngineOptions, "load", lambda self, name: engine(model()))
    out, play = tmp_path / "walk.json", walked

    def stopping(way: Way, *rest: Any, **more: Any) -> dict[str, object]:
        if way.name == "hy-known":
            raise KeyboardInterrupt
        return play(way, *rest, **more)

    monkeypatch.setattr("worldstride.commands.bench.walked", stopping)
    names = ("off", str(ROOT / "benchmarks/levers/hy-known.toml"))
    with pytest.raises(KeyboardInterrupt):
        Bench("walk", "hy_worldplay", 2, 0, names, out=out).run("bench walk")
    assert [row["name"] for row in json.loads(out.read_text())["rows"]] == ["off"]


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks/levers").glob("*.toml")), ids=lambda f: f.stem)
def test_settings_that_were_measured_can_be_read(file: Path):
    assert resolve(file).name == file.stem
