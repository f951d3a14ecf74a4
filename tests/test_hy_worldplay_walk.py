"""Ways to play a HY-WorldPlay walk: upstream's structure, reused attention, compiled blocks, and what is measured."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hy_golden import engine, golden, model, network
from worldstride import Acceleration, Engine
from worldstride.acceleration import AttentionReuse, resolve
from worldstride.attention import Partial, attend, streams
from worldstride.bench.structure_hy_worldplay import UpstreamStructure, UpstreamWorldPlay
from worldstride.bench.walk import out_and_back, walked, ways
from worldstride.commands.bench import Bench
from worldstride.commands.options import EngineOptions
from worldstride.control import Action
from worldstride.errors import InputError
from worldstride.models.hy_worldplay.adapter import HYContext
from worldstride.models.hy_worldplay.model import Frames, HYNetwork
from worldstride.models.hy_worldplay.places import projections, rotary_table

ROOT = Path(__file__).parents[1]


def frames(first: int, level: float) -> Frames:
    """Four latents of the golden case."""
    case, rows = golden(), slice(first, first + 4)
    config = case.config
    latents, condition = (case.given(name).transpose(1, 2)[:, rows] for name in ("noise", "cond"))
    cos, sin = rotary_table(torch.arange(first, first + 4), *latents.shape[3:], config.rope, config.theta)
    at = streams.Places(cos, sin, *projections(case.cameras[None, rows], case.given("Ks")[:, rows]))
    return Frames(latents, condition, torch.full((1, 4), level), case.given("action")[:, rows], at)


@torch.inference_mode()
def evaluated(of: HYNetwork, outer: list[Partial] | None = None, reused: tuple[Partial, ...] = ()) -> Tensor:
    text, before, now = of.text(golden().states, attend), frames(0, 14.0), frames(4, 500.0)
    context = of.context(before, text, attend)
    return of.velocity(now, text, context, before.at, attend, outer, reused)


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def test_upstreams_structure_is_the_same_mathematics():
    other = UpstreamStructure(network())
    assert far(evaluated(other), evaluated(network())) < 1e-5
    theirs, ours = (dict(of.named_parameters()) for of in (other, network()))
    assert all(theirs[name].data_ptr() == ours[name].data_ptr() for name in ours)


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
    assert out_and_back(5) == [Action({"KeyW"})] * 3 + [Action({"KeyS"})] * 2


def test_every_way_of_a_walk_is_a_row(tmp_path: Path):
    played = engine(model())
    names = ["upstream", "off", str(ROOT / "benchmarks/levers/hy-fast.toml")]
    chosen, stepped = ways(played, names), list[int]()
    assert [w.name for w in chosen] == ["upstream", "off", "hy-fast"]
    assert isinstance(chosen[0].engine.model, UpstreamWorldPlay)
    rows: list[Any] = [walked(w, 4, 1, advance=lambda: stepped.append(1)) for w in chosen]
    assert len(stepped) == 3 * 5
    for row in rows:
        assert [e["context_latents"] for e in row["each"]] == [0, 4, 8, 12]
        assert row["seconds"]["total"] == pytest.approx(sum(e["seconds"]["total"] for e in row["each"]))
        assert row["tflops"] > 0
        json.dumps(row)
    assert [row["evaluations_per_chunk"] for row in rows] == [4, 4, 2]
    assert [row["attended_per_chunk"] for row in rows] == [4, 4, 1]
    assert [row["encoded_latents"] for row in rows] == [6, 6, 3]
    with pytest.raises(InputError, match="at least 2 chunks and a warm-up of 0 or more, got 1 and 0"):
        walked(chosen[1], 1, 0)


def test_only_this_model_has_an_upstream(tiny_engine: Engine):
    with pytest.raises(InputError, match="upstream is known of autoregressive hy_worldplay alone, not of 'courtyard'"):
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


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks/levers").glob("hy-*.toml")), ids=lambda f: f.stem)
def test_settings_that_were_measured_can_be_read(file: Path):
    assert resolve(file).name == file.stem
