"""Matrix-Game-3.0 in upstream's structure: the same mathematics, and all that upstream computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import hy_golden
import worldstride
from hy_variants import latents
from mg3_golden import CHUNKS, actions, begin, case, engine, expected, model, network, noise, published, vae
from worldstride import Action, Engine
from worldstride.attention import attend
from worldstride.bench.structure_matrix_game3 import UpstreamMatrixGame3, UpstreamStructure
from worldstride.bench.walk import walked, ways
from worldstride.errors import InputError
from worldstride.models.matrix_game3.adapter import MatrixGame3, MG3Context
from worldstride.models.matrix_game3.config import MG3Config
from worldstride.models.matrix_game3.loading import random_matrix_game3
from worldstride.models.matrix_game3.model import MG3Network
from worldstride.models.matrix_game3.weights import build
from worldstride.protocol import FreezesContext
from worldstride.testing import check_model

EACH = 2 * 3  # tokens of a latent
AHEAD = Action({"KeyW", "ArrowRight"})
WIDE = pytest.mark.parametrize("wide", [True, False], ids=["as it ships", "in the model's precision"])


@pytest.fixture(autouse=True)
def _no_gradients(no_gradients: None) -> None:
    """Direct calls of the network need none."""


def in_half_precision() -> MatrixGame3:
    """With random weights."""
    config = MG3Config(
        width=64, heads=4, depth=2, hidden=64, frequencies=32, text=16, rows=8, steered=(0,), action_width=32,
        action_heads=2, key_width=8, turned=4,
    )  # fmt: skip
    return random_matrix_game3(config, vae().config, torch.device("cpu"), torch.bfloat16, 64, 96)


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@WIDE
def test_a_session_in_upstreams_structure_makes_the_same_latents(wide: bool):
    plain, other = begin(), begin(engine(UpstreamMatrixGame3(model(), wide)))
    for k, frames in enumerate(CHUNKS):
        for session in (plain, other):
            session.step(actions(*frames), noise=noise(k))
    assert far(latents(other), latents(plain)) < 1e-5
    assert far(latents(other), expected()) < 1e-5


def test_velocities_are_the_same_in_both_branches(monkeypatch: pytest.MonkeyPatch):
    """Every evaluation of a guided session is asked of both: with memory, without any, with other texts."""
    ours = model(guidance=5.0)
    theirs, apart, contexts = UpstreamMatrixGame3(ours, True), list[float](), list[MG3Context]()
    prompt = {"text": case()["context"][None], "negative_text": -case()["context"][None, :4]}
    raw = theirs.encode_prompt(prompt, attend).branches
    velocity, encode = ours.velocity, ours.encode_context

    def both(x: Tensor, sigma: float, inputs: Any, context: Any, attend: Any) -> Any:
        made, more = velocity(x, sigma, inputs, context, attend)
        other, _ = theirs.velocity(x, sigma, replace(inputs, text=raw[inputs.branch]), contexts[-1], attend)
        apart.append(far(other, made))
        return made, more

    def encoding(*of: Any) -> MG3Context:
        contexts.append(theirs.encode_context(*of))
        return encode(*of)

    monkeypatch.setattr(ours, "velocity", both)
    monkeypatch.setattr(ours, "encode_context", encoding)
    session = engine(ours).open(torch.zeros(1, 64, 96, 3, dtype=torch.uint8), torch.eye(4)[None], prompt)
    session.step(AHEAD)
    session.step(AHEAD)
    assert len(apart) == 12
    assert max(apart) < 1e-5
    assert contexts[1].latents == 5
    assert contexts[1].bytes > contexts[0].bytes > 0


@WIDE
def test_weights_are_shared_but_for_those_in_float32(wide: bool):
    ours = in_half_precision().network
    theirs, own = dict(UpstreamStructure(ours, wide).named_parameters()), dict(ours.named_parameters())
    copied = {name.rsplit(".", 1)[0] for name in own if theirs[name].data_ptr() != own[name].data_ptr()}
    always = {"level.first", "level.second", "rows", "leave", "blocks.0.norm", "blocks.1.norm"}
    projections = {f"blocks.{i}.{name}" for i in (0, 1) for name in ("project.qkv", "out")}
    assert copied == (always | projections if wide else always)
    for name, weight in theirs.items():
        assert weight.dtype == (torch.float32 if name.rsplit(".", 1)[0] in copied else torch.bfloat16)
        assert torch.equal(weight, own[name].to(weight.dtype))
        assert own[name].dtype == torch.bfloat16
    one, other = (dict(of.named_parameters()) for of in (network(), UpstreamStructure(network(), wide)))
    assert all(other[name].data_ptr() == one[name].data_ptr() for name in one)


@WIDE
def test_in_half_precision_latents_are_the_same_but_for_rounding(wide: bool):
    ours = in_half_precision()
    plain, other = (engine(of).sample(seed=3) for of in (ours, UpstreamMatrixGame3(ours, wide)))
    for _ in range(2):
        frames = [torch.from_numpy(s.step(AHEAD).frames).float() for s in (plain, other)]
        assert (frames[0] - frames[1]).abs().mean() < 0.1 * frames[0].std()
    made, theirs = (latents(s).float() for s in (plain, other))
    assert (theirs - made).square().mean() < 1e-3 * made.square().mean()


def evaluated(of: UpstreamStructure, memory: int, window: int, height: int, width: int, device: str) -> Tensor:
    """Velocity of nothing at all, in a first chunk or a later one."""

    def none(*shape: int) -> Tensor:
        return torch.zeros(shape, device=device)

    latents, given, size = memory + window, 4 if memory else 1, (of.config.channels, height // 16, width // 16)
    frames = 4 * window if memory else 4 * window - 3
    told, table = (none(1, frames, 6), none(1, frames, 2)), of.ray_table(height, width)
    chunk = of.prepared(none(1, latents, 4, 4), none(latents), memory, *told, table)
    text = of.text(none(1, min(100, of.config.rows), of.config.text))
    remembered = none(1, memory, *size) if memory else None
    return of.velocity(none(1, window, *size), none(1, window), remembered, chunk, text, attend, given)


def watch(patch: pytest.MonkeyPatch, name: str, see: Callable[..., object]) -> None:
    """Have a function of torch tell what it is given."""
    plain = getattr(F, name)

    def watched(*of: Any) -> Tensor:
        see(*of)
        return plain(*of)

    patch.setattr(F, name, watched)


@WIDE
def test_products_are_of_upstreams_sizes_and_precisions(monkeypatch: pytest.MonkeyPatch, wide: bool):
    """Queries of 20 latents see keys of real ones, pixels only themselves; what upstream has in float32 is."""
    of, half = UpstreamStructure(in_half_precision().network, wide), torch.bfloat16
    attended, multiplied = list[tuple[Any, ...]](), list[tuple[Any, ...]]()
    watch(monkeypatch, "scaled_dot_product_attention", lambda q, k, v: attended.append((*q.shape, k.shape[2], q.dtype)))
    watch(monkeypatch, "linear", lambda x, w, b: multiplied.append((x.shape[-2], *w.shape, x.dtype, w.dtype)))
    assert evaluated(of, 5, 14, 64, 96, "cpu").shape == (1, 10, 48, 4, 6)
    own, text, over = (
        (1, 4, 20 * EACH, 16, 19 * EACH, half),
        (1, 4, 20 * EACH, 16, 8, half),
        (EACH, 2, 19, 16, 19, half),
    )
    assert attended == [own, text, over, over, own, text]
    assert all(given == kept for *_, given, kept in multiplied)
    exact = [m[:3] for m in multiplied if m[3] == torch.float32]
    time = [(20 * EACH, 64, 32), (20 * EACH, 64, 64), (20 * EACH, 384, 64)]
    assert exact == [*time, *[(20 * EACH, 64, 64)] * (8 * wide), (20 * EACH, 192, 64)]
    assert multiplied.count((20 * EACH, 64, 6144, half, half)) == 1  # rays


@pytest.mark.parametrize(("memory", "window", "tera"), [(0, 15, 292.6), (5, 14, 317.25)], ids=["first", "later"])
def test_full_size_costs_what_upstream_does(memory: int, window: int, tera: float):
    """Specification, section 6, "as shipped"."""
    with torch.device("meta"):
        of = UpstreamStructure(MG3Network(MG3Config()).bfloat16(), True)
    with FlopCounterMode(display=False) as counted:
        made = evaluated(of, memory, window, 704, 1280, "meta")
    assert made.shape == (1, 10 if memory else 14, 48, 44, 80)
    assert counted.get_total_flops() / 1e12 == pytest.approx(tera, abs=0.05)


def test_the_structure_keeps_the_contract():
    check_model(UpstreamMatrixGame3(model(), True), {"text": case()["context"][None]}, chunks=(0, 1))
    assert isinstance(model(), FreezesContext)
    assert not isinstance(UpstreamMatrixGame3(model(), wide=True), FreezesContext)


def test_worlds_are_stepped_together():
    of = engine(UpstreamMatrixGame3(model(), True))
    one, two = begin(of), begin(of)
    two._state.prompt, two._state.noise_seed = one._state.prompt, 5
    alone = [s.fork() for s in (one, two)]
    for _ in range(2):
        together = worldstride.step_together([one, two], actions=[AHEAD, AHEAD])
        assert [c.report.batch for c in together] == [2, 2]
        for session in alone:
            session.step(AHEAD)
    for made, apart in zip((one, two), alone, strict=True):
        assert far(latents(made), latents(apart)) < 1e-5


def test_what_does_not_fit_is_refused():
    ours = model()
    theirs = UpstreamMatrixGame3(ours, True).network
    with pytest.raises(InputError, match=r"text states must be \[1, L, 32\]"):
        theirs.text(torch.zeros(1, 3, 5))
    told = torch.zeros(1, 80, 6), torch.zeros(1, 80, 2)
    given = torch.eye(4).repeat(1, 21, 1, 1), torch.arange(21), 1, *told
    x, levels, memory = torch.zeros(1, 20, 48, 4, 6), torch.zeros(1, 20), torch.zeros(1, 1, 48, 4, 6)
    text, chunk = theirs.text(case()["context"][None]), theirs.prepared(*given, theirs.ray_table(64, 96))
    with pytest.raises(InputError, match="sequences hold at most 20 latents, got 21"):
        theirs.velocity(x, levels, memory, chunk, text, attend)
    other = ours.network.prepared(*given, ours.network.ray_table(64, 96))
    with pytest.raises(TypeError, match="needs what it prepared itself, got Prepared and RawText"):
        theirs.velocity(x, levels, memory, other, text, attend)


def test_a_walk_goes_both_ways():
    played = engine(model())
    chosen = ways(played, ["upstream", "upstream-bf16", "off"])
    started = [way.start() for way in chosen]
    assert all(isinstance(of.model, UpstreamMatrixGame3) for of in started[:2])
    assert started[2] is played
    assert started[0].source == played.source
    rows: list[Any] = [walked(way, 2, 0) for way in chosen]
    assert [row["name"] for row in rows] == ["upstream", "upstream-bf16", "off"]
    for row in rows:
        assert [(e["context_latents"], e["evaluations"]) for e in row["each"]] == [(0, 3), (5, 3)]
        assert row["tflops"] > 0
        json.dumps(row)


def test_ways_are_as_they_say():
    ours = in_half_precision()
    for way, kind in zip(
        ways(engine(ours), ["upstream", "upstream-bf16"]), (torch.float32, torch.bfloat16), strict=True
    ):
        blocks: Any = way.start().model.network.blocks  # type: ignore[attr-defined]
        assert {b.project.qkv.weight.dtype for b in blocks} == {kind}


def test_other_models_have_other_ways(tiny_engine: Engine):
    with pytest.raises(InputError, match=r"known of MatrixGame3 alone, not of 'hy_worldplay' .*, which has upstream$"):
        ways(hy_golden.engine(hy_golden.model()), ["upstream-bf16"])
    with pytest.raises(InputError, match=r"not of 'courtyard' .*, which has accelerations only"):
        ways(tiny_engine, ["upstream-bf16"])


def test_bfloat16_loses_little_more_than_upstreams_flow_of_precisions():
    """Upstream keeps the stream of tokens, embedded levels and the head in float32; here they are in bfloat16."""
    of = build(network().config, published(), "the golden case", torch.device("cpu"), torch.bfloat16)
    port = MatrixGame3(of, model().decoder, torch.float32, rounded=False)
    errors = list[float]()
    for one in (port, UpstreamMatrixGame3(port, wide=True)):
        session = begin(engine(one))
        for k in range(3):
            session.step(actions(*CHUNKS[k]), noise=noise(k))
        errors.append(float((latents(session) - expected()).norm() / expected().norm()))
    assert 0.004 < errors[1] < 0.008
    assert errors[0] < 1.5 * errors[1]
