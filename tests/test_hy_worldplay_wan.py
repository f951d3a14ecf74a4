"""HY-WorldPlay's WAN-5B network: equal to diffusers where that goes, what its keys know, and its published weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hy_golden import normal, relative
from wan_tiny import COLUMNS, ROWS, TINY, described, published, shapes
from worldstride.attention import attend
from worldstride.attention.streams import KeysValues, Places
from worldstride.camera import camera_from_pose
from worldstride.errors import CheckpointError, InputError
from worldstride.models.hy_worldplay import places, two_streams
from worldstride.models.hy_worldplay.wan import WanBlock, WanConfig, WanFrames, WanNetwork
from worldstride.models.hy_worldplay.wan_weights import build, sources

pytestmark = pytest.mark.usefixtures("no_gradients")

TOKENS, WORDS = ROWS * COLUMNS, 7
ADDED = ("action_embedder", "to_out_prope")
"""What diffusers' network does not have."""


@cache
def theirs() -> Any:
    """diffusers' network of the same size, with random weights."""
    diffusers = pytest.importorskip("diffusers")
    of = diffusers.WanTransformer3DModel(**{k: v for k, v in described().items() if k[0] != "_"})
    of.load_state_dict({k: v for k, v in published().items() if not any(name in k for name in ADDED)})
    return of.eval()


def network(without: tuple[str, ...] = (), **other: Any) -> WanNetwork:
    """The network with these weights; those whose names hold one of `without` are zero."""
    weights = {k: torch.zeros_like(v) if any(name in k for name in without) else v for k, v in published().items()}
    return build(TINY, weights, "the tiny file", **other)


def states() -> Tensor:
    return normal(1, WORDS, TINY.text, seed=50)


def cameras(batch: int, count: int, seed: int = 0) -> Tensor:
    return camera_from_pose(normal(batch, count, 4, seed=seed) * torch.tensor([1.0, 1.0, 1.0, 0.3]))


def placed(cameras: Tensor, first: int = 0) -> Places:
    """Places of latents of cameras [B, T, 4, 4], the first of rank `first`."""
    ranks = torch.arange(first, first + cameras.shape[1])
    matrices = places.projections(cameras, torch.tensor([[1.01, 0.0, 0.5], [0.0, 1.8, 0.5], [0.0, 0.0, 1.0]]))
    return Places(*places.rotary_table(ranks, ROWS, COLUMNS, TINY.rope, TINY.theta), *matrices)


def frames(count: int = 4, batch: int = 1, at: Places | None = None) -> WanFrames:
    """Every latent has its own level and label."""
    levels = torch.tensor([14.0, 960.0, 727.0, 333.0, 60.0, 500.0])[:count].expand(batch, -1)
    labels = torch.tensor([0, 9, 80, 1, 18, 4])[:count].expand(batch, -1)
    x = normal(batch, count, TINY.channels, 2 * ROWS, 2 * COLUMNS, seed=1)
    return WanFrames(x, levels, labels, placed(cameras(batch, count)) if at is None else at)


def part(whole: WanFrames, first: int, last: int) -> WanFrames:
    """Some of the latents at the places that they have."""
    tokens, at = slice(first * TOKENS, last * TOKENS), whole.at
    some = Places(at.cos[tokens], at.sin[tokens], at.project[:, first:last], at.unproject[:, first:last])
    return WanFrames(whole.x[:, first:last], whole.levels[:, first:last], whole.labels[:, first:last], some)


def velocity(of: WanNetwork, given: WanFrames, attend: Any = attend) -> Tensor:
    """Without a context."""
    return of.velocity(given, of.text(states()), [], None, attend)


# Against diffusers


@pytest.mark.parametrize("batch", [1, 2])
def test_without_what_was_added_it_is_diffusers_network(batch: int):
    given, of, other = frames(batch=batch), network(ADDED), theirs()
    x, text = given.x.transpose(1, 2), states().expand(batch, -1, -1)
    one = replace(given, levels=torch.full((batch, 4), 727.0))
    truth = other(x, torch.full((batch,), 727), text, return_dict=False)[0].transpose(1, 2)
    assert relative(velocity(of, one), truth) <= 1e-5
    by_token = given.levels.repeat_interleave(TOKENS, 1)
    truth = other(x, by_token, text, return_dict=False)[0].transpose(1, 2)
    assert relative(velocity(of, given), truth) <= 1e-5
    assert relative(velocity(of, one), truth) > 0.05


def test_what_was_added_counts():
    given, full = frames(), velocity(network(), frames())
    for name in ADDED:
        assert relative(velocity(network((name,)), given), full) > 0.02
    for change in ({"labels": given.labels + 1}, {"levels": given.levels + 30}, {"at": placed(cameras(1, 4, seed=3))}):
        assert relative(velocity(network(), replace(given, **change)), full) > 1e-3
    alone = network(("to_out_prope",))  # the first stream knows no cameras
    assert torch.equal(velocity(alone, replace(given, at=placed(cameras(1, 4, seed=3)))), velocity(alone, given))


def test_labels_are_embedded_as_levels_are():
    """An action embedder with the time embedder's weights makes a label what a level is."""
    weights = dict(published())
    for name in [n for n in weights if "action_embedder" in n]:
        weights[name] = weights[name.replace("action", "time")]
    given, of = frames(), build(TINY, weights, "the tiny file")
    swapped = replace(given, levels=given.labels.float(), labels=given.levels.long())
    assert relative(velocity(of, swapped), velocity(of, given)) <= 1e-5


# Context and velocity


def ordered(sizes: tuple[int, ...]) -> Callable[..., Tensor]:
    """Attention of a pass over several groups of latents in which each sees itself and those before."""
    every = sum(sizes) * TOKENS

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if k.shape[2] != every:
            assert k.shape[2] == WORDS
            return attend(q, k, v)
        made, seen = [], 0
        for size in sizes:
            seen += size * TOKENS
            made.append(attend(q[:, :, seen - size * TOKENS : seen], k[:, :, :seen], v[:, :, :seen]))
        return torch.cat(made, 2)

    return masked


def joined(*parts: list[KeysValues]) -> list[KeysValues]:
    return [(torch.cat([k for k, _ in of], 2), torch.cat([v for _, v in of], 2)) for of in zip(*parts, strict=True)]


def written(
    of: WanNetwork, given: WanFrames, text: Any, how: Any = attend, past: Any = (), where: Any = None
) -> list[KeysValues]:
    return list(of.context(given, text, how, [(pair,) for pair in past], where))


def against(of: WanNetwork, given: WanFrames, text: Any, context: Any, where: Any) -> Tensor:
    return of.velocity(given, text, [(pair,) for pair in context], where, attend)


@pytest.mark.parametrize("batch", [1, 2])
def test_context_then_velocity_is_one_pass_in_which_the_old_do_not_see_the_new(batch: int):
    of, whole = network(), frames(6, batch)
    old, new, text = part(whole, 0, 3), part(whole, 3, 6), of.text(states())
    context = written(of, old, text)
    made = against(of, new, text, context, old.at)
    truth = velocity(of, whole, ordered((3, 3)))
    assert relative(made, truth[:, 3:]) <= 1e-5
    assert relative(velocity(of, old), truth[:, :3]) <= 1e-5
    assert relative(velocity(of, new), made) > 0.01


def test_latents_see_the_past_as_if_encoded_with_it():
    of, whole = network(), frames(6)
    first, second, last = (part(whole, i, i + 2) for i in (0, 2, 4))
    text, where = of.text(states()), part(whole, 0, 4).at
    past = written(of, first, text)
    context = joined(past, written(of, second, text, attend, past, first.at))
    alone = joined(past, written(of, second, text))
    truth = written(of, part(whole, 0, 4), text, ordered((2, 2)))
    for ours, true in zip(context, truth, strict=True):
        assert all(relative(a, b) <= 1e-5 for a, b in zip(ours, true, strict=True))
    assert torch.equal(context[0][0], alone[0][0])  # what the first block writes saw nothing
    assert relative(context[1][0], alone[1][0]) > 1e-3
    made = against(of, last, text, context, where)
    assert relative(made, velocity(of, whole, ordered((2, 2, 2)))[:, 4:]) <= 1e-5


def test_what_is_kept_holds_no_place():
    """The first block's keys and values know neither ranks nor cameras, so the window may move on."""
    of, given = network(), frames()
    text = of.text(states())
    kept, moved = (written(of, f, text) for f in (given, replace(given, at=placed(cameras(1, 4, seed=3), 5))))
    assert len(kept) == TINY.depth
    assert all(t.shape == (1, 2, 4 * TOKENS, 16) for pair in kept for t in pair)
    pieces = two_streams.whole(of.context(given, text, attend))
    assert all(t.is_contiguous() for ((k, v),) in pieces for t in (k, v))  # not views of all that was projected
    assert torch.equal(pieces[1][0][0], kept[1][0])
    assert all(torch.equal(a, b) for a, b in zip(kept[0], moved[0], strict=True))
    assert relative(moved[1][0], kept[1][0]) > 1e-3


def test_the_last_block_of_a_context_attends_to_nothing():
    of, calls = network(), list[int]()

    def counted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(k.shape[2])
        return attend(q, k, v)

    text = of.text(states())
    written(of, frames(), text, counted)
    assert calls == [4 * TOKENS, WORDS] * (TINY.depth - 1)


def test_ranks_count_by_their_differences_and_cameras_by_theirs():
    of, first, then = network(), cameras(1, 3), cameras(1, 3, seed=7)
    text, motion = of.text(states()), cameras(1, 1, seed=8)
    motion[..., :3, 3] = torch.tensor([2.0, -1.5, 0.7])

    def made(first: Tensor, then: Tensor, rank: int = 0, gap: int = 3) -> Tensor:
        old, new = frames(3, at=placed(first, rank)), frames(3, at=placed(then, rank + gap))
        return against(of, new, text, written(of, old, text), old.at)

    truth = made(first, then)
    assert relative(made(motion @ first, motion @ then), truth) <= 1e-4  # text has no part in the second stream
    assert relative(made(first, then, rank=9), truth) <= 1e-4
    for other in (made(motion @ first, then), made(first, motion @ then), made(first, then, gap=5)):
        assert relative(other, truth) > 1e-3


def test_one_row_of_modulation_a_latent_equals_one_a_token():
    block, given = network().get_submodule("blocks.1"), normal(2, 4 * TOKENS, 32)
    assert isinstance(block, WanBlock)
    results, level = list[tuple[Tensor, ...]](), normal(2, 4, 6, 32, seed=1)
    for each in (level, level.repeat_interleave(TOKENS, 1)):
        rows, qkv = block.begin(given, each)
        x, q = block.ask(given, normal(2, 4 * TOKENS, 64, seed=2), rows)
        results.append((*qkv, x, q, block.end(x, normal(2, 2, 4 * TOKENS, 16, seed=3), rows)))
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, atol=1e-6, rtol=1e-6)


def test_worlds_of_a_batch_equal_each_alone():
    of, both = network(), frames(batch=2)
    both = replace(both, levels=both.levels * torch.tensor([[1.0], [0.4]]))
    together = velocity(of, both)
    for i in range(2):
        at = both.at._replace(project=both.at.project[i, None], unproject=both.at.unproject[i, None])
        alone = WanFrames(both.x[i, None], both.levels[i, None], both.labels[i, None], at)
        assert relative(together[i, None], velocity(of, alone)) <= 1e-5
    assert relative(together[:1], together[1:]) > 0.1


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-5), (torch.bfloat16, 0.1)], ids=str)
def test_other_precisions_are_near(dtype: torch.dtype, most: float):
    of = network(dtype=dtype)
    assert {p.dtype for p in of.parameters()} == {dtype}
    whole, text = frames(6), of.text(states())
    old, new = part(whole, 0, 3), part(whole, 3, 6)
    context = written(of, old, text)
    assert {t.dtype for pair in (*text, *context) for t in pair} == {dtype}
    made = against(of, new, text, context, old.at)
    assert made.dtype == dtype
    assert 0 < relative(made, velocity(network(), whole, ordered((3, 3)))[:, 3:]) <= most


def test_compiled_functions_stand_in_for_what_is_around_attention(monkeypatch: pytest.MonkeyPatch):
    of, calls = network(), list[str]()

    def compiled(work: Callable[..., Any]) -> Callable[..., Any]:
        def called(*given: Any) -> Any:
            calls.append(work.__name__)
            return work(*given)

        return called

    truth = velocity(of, frames())
    monkeypatch.setattr(torch, "compile", compiled)
    of.compile_passes()
    assert torch.equal(velocity(of, frames()), truth)
    assert calls == ["begin", "ask", "end"] * TINY.depth


# Weights and configurations


def test_the_full_size_is_made_of_every_published_tensor():
    full = WanConfig()
    assert (full.head_dim, full.rope) == (128, (44, 42, 42))
    named = [name for source in sources(full).values() for name in source.names]
    assert sorted(named) == sorted(shapes(full))  # each once
    tensors = {name: torch.empty(s, device="meta", dtype=torch.bfloat16) for name, s in shapes(full).items()}
    assert sum(t.numel() for t in tensors.values()) == 5_293_225_152
    of = build(full, tensors, "the published file", torch.device("meta"))
    # the biases of two streams' projections become one in each of 30 blocks
    assert sum(p.numel() for p in of.parameters()) == 5_293_225_152 - 30 * 3072


def test_names_and_configuration_are_those_of_diffusers():
    written = json.loads(theirs().to_json_string())
    assert {k: v for k, v in written.items() if k[0] != "_"} == {k: v for k, v in described().items() if k[0] != "_"}
    known = {name: tuple(t.shape) for name, t in theirs().state_dict().items()}
    ours = shapes(TINY)
    assert known.items() <= ours.items()
    assert all(any(name in extra for name in ADDED) for extra in ours.keys() - known.keys())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"proj_out.bias": None}, r"^odd\.pt is no HY-WorldPlay WAN transformer of 3 blocks: 1 \(proj_out\.bias\) mi"),
        ({"blocks.3.norm2.bias": 32}, r"none missing, 1 \(blocks\.3\.norm2\.bias\) unknown"),
        ({"blocks.0.norm2.bias": 31}, r"1 tensors do not fit .*; first blocks\.0\.norm2\.bias: \[31\] where \[32\] is"),
        ({"blocks.1.attn2.to_v.bias": 31}, r"first blocks\.1\.attn2\.to_k\.bias: \[63\] where \[64\] is right"),
        ({"blocks.2.attn1.to_out_prope.0.bias": 31}, r"first blocks\.2\.attn1\.to_out\.0\.bias: \[\[32\], \[31\]\]"),
    ],
)
def test_weights_that_do_not_fit_are_named(change: dict[str, int | None], text: str):
    tensors = dict(published())
    for name, size in change.items():
        tensors.pop(name, None)
        if size is not None:
            tensors[name] = torch.zeros(size)
    with pytest.raises(CheckpointError, match=text):
        build(TINY, tensors, "odd.pt")


def test_a_plain_wan_has_no_second_stream():
    with pytest.raises(CheckpointError, match=r"6 \(blocks\.0\.attn1\.to_out_prope.*missing, none unknown"):
        build(TINY, {k: v for k, v in published().items() if ADDED[1] not in k}, "Wan2.2")


def test_configurations_are_read():
    assert WanConfig.from_json(described()) == TINY
    published = {"num_attention_heads": 24, "attention_head_dim": 128, "in_channels": 48, "out_channels": 48}
    sizes = {"num_layers": 30, "ffn_dim": 14336, "text_dim": 4096}
    assert WanConfig.from_json({**described(), **published, **sizes}) == WanConfig()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"patch_size": [1, 1, 1]}, r"patch_size must be \[1, 2, 2\] for HY-WorldPlay's WAN-5B, got \[1, 1, 1\]"),
        ({"image_dim": 1280}, "image_dim must be None"),
        ({"ffn_dims": 48}, "unknown entry 'ffn_dims' in the configuration.*ffn_dim"),
        ({"ffn_dim": None}, "ffn_dim must be"),
        ({"out_channels": 5}, "in_channels and out_channels must be equal, got 4 and 5"),
        ({"attention_head_dim": 6}, "parts that 4 divides, got 12 for 2 heads"),
    ],
)
def test_other_configurations_are_refused(change: dict[str, Any], text: str):
    with pytest.raises(InputError, match=text):
        WanConfig.from_json({**described(), **change})
    with pytest.raises(InputError, match="the configuration lacks num_layers, text_dim"):
        WanConfig.from_json({k: v for k, v in described().items() if k not in ("num_layers", "text_dim")})


def test_what_does_not_fit_the_network_is_named():
    of = network()
    for odd in (states()[..., :5], states()[0], states().expand(2, -1, -1), states()[:, :0]):
        with pytest.raises(InputError, match=r"text states must be \[1, L, 12\], L at least 1, got \["):
            of.text(odd)
    with pytest.raises(InputError, match=r"even numbers of rows and columns, got \[3, 6\]"):
        velocity(of, replace(frames(), x=frames().x[..., :3, :]))
