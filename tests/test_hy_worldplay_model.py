"""HY-WorldPlay's transformer: what its keys know, what it is invariant to, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hy_golden import golden, model, normal, relative
from worldstride.attention import attend, streams
from worldstride.attention.dense import Partial
from worldstride.attention.written import in_float32
from worldstride.camera import camera_from_pose
from worldstride.errors import InputError
from worldstride.models import layers
from worldstride.models.hy_worldplay import places, weights
from worldstride.models.hy_worldplay.adapter import HYContext, HYWorldPlay
from worldstride.models.hy_worldplay.placed import FIRST
from worldstride.models.video_decoder import VideoDecoder
from worldstride.protocol import Conditions, Costed, KeepsLatents, Recalled

pytestmark = pytest.mark.usefixtures("no_gradients")

Tensors = dict[str, Tensor]


# Places


def cameras(*shape: int, seed: int = 0) -> Tensor:
    return camera_from_pose(normal(*shape, 4, seed=seed) * torch.tensor([1.0, 1.0, 1.0, 0.3]))


def intrinsics() -> Tensor:
    return golden().given("Ks")[0, 0].float()


def test_turning_is_by_pairs_and_scores_know_only_how_far_apart_ranks_are():
    channels, ranks = (4, 6, 6), torch.tensor([0, 3, 20])
    cos, sin = places.rotary_table(ranks, 2, 3, channels, 256.0)
    assert cos.shape == sin.shape == (18, 8)
    x = normal(1, 1, 18, 16)
    turned = streams.turn(x, cos, sin)
    rank, row, column = 20.0, 1.0, 2.0  # of the last token
    angles = [
        p * 256 ** (-2 * i / n) for p, n in zip((rank, row, column), channels, strict=True) for i in range(n // 2)
    ]
    for i, angle in enumerate(angles):
        c, s = torch.tensor(angle).cos(), torch.tensor(angle).sin()
        pair = torch.stack([torch.stack([c, -s]), torch.stack([s, c])]) @ x[0, 0, -1, 2 * i : 2 * i + 2]
        torch.testing.assert_close(turned[0, 0, -1, 2 * i : 2 * i + 2], pair, atol=1e-5, rtol=0)
    assert torch.equal(turned[0, 0, 0], x[0, 0, 0])  # rank, row and column 0

    def scores(shift: int) -> Tensor:
        tables = (places.rotary_table(r, 2, 3, channels, 256.0) for r in (torch.tensor([1]) + shift, ranks + shift))
        q, k = (streams.turn(t, *table) for t, table in zip((normal(1, 1, 6, 16, seed=1), x), tables, strict=True))
        return q @ k.mT

    torch.testing.assert_close(scores(9), scores(0), atol=1e-4, rtol=0)
    assert relative(scores(9), normal(1, 1, 6, 16, seed=1) @ x.mT) > 0.1


def test_carrying_there_and_back_changes_nothing():
    project, unproject = places.projections(cameras(2, 3), intrinsics())
    torch.testing.assert_close(project @ unproject, torch.eye(4).expand(2, 3, 4, 4), atol=1e-5, rtol=0)
    x = normal(2, 4, 3 * 6, 16)
    carried = streams.carry(x, project)
    torch.testing.assert_close(streams.carry(carried, unproject), x, atol=1e-4, rtol=0)
    for token, latent in ((0, 0), (5, 0), (6, 1), (17, 2)):  # six tokens a latent, one after the other
        truth = x[1, 2, token].view(4, 4) @ project[1, latent].mT
        torch.testing.assert_close(carried[1, 2, token], truth.flatten(), atol=1e-5, rtol=1e-5)
    focal = torch.tensor([float(intrinsics()[0, 0]), float(intrinsics()[1, 1]), 1.0, 1.0])
    torch.testing.assert_close(project, focal.diag() @ torch.linalg.inv(cameras(2, 3)), atol=1e-5, rtol=1e-5)


def test_one_row_of_modulation_a_latent_equals_one_a_token():
    x, added = normal(2, 12, 8), normal(2, 12, 8, seed=1)  # 3 latents of 4 tokens
    shift, scale, gate = (normal(2, 3, 8, seed=i) for i in (2, 3, 4))
    modulated, gated = layers.modulated(x, shift, scale), layers.gated(x, added, gate)
    for b in range(2):
        for n in range(12):
            normed = (x[b, n] - x[b, n].mean()) / (x[b, n].var(correction=0) + 1e-6).sqrt()
            truth = normed * (1 + scale[b, n // 4]) + shift[b, n // 4]
            torch.testing.assert_close(modulated[b, n], truth, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(gated[b, n], x[b, n] + gate[b, n // 4] * added[b, n])


# Context and velocity, through the model


@pytest.fixture(scope="module")
def small() -> HYWorldPlay:
    """2 x 3 latent pixels."""
    return model()


def prompted(of: HYWorldPlay) -> Any:
    return of.encode_prompt({**golden().prompt, "image": normal(1, *of.latent_shape, seed=9)}, attend)


def recalled(of: HYWorldPlay, count: int = 6, batch: int = 1, seed: int = 0) -> Recalled:
    """The first latents of worlds; the chunk follows them."""
    latents = normal(batch, count, *of.latent_shape, seed=seed)
    led = (FIRST, *(9, 1, 2, 18, 9, 4)[: count - 1])
    kinds = torch.zeros(count, dtype=torch.long)
    return Recalled(latents, cameras(batch, count, seed=seed), torch.arange(-count, 0), kinds, led, prompt=prompted(of))


def velocity(
    of: HYWorldPlay, context: HYContext, where: Tensor, x: Tensor | None = None, sigma: float | Tensor = 0.7
) -> Tensor:
    conditions = Conditions(2, where, where, of.intrinsics, encoded=prompted(of), led=(9, 9, 1, 1))
    (inputs,) = of.prepare(conditions)
    noise = normal(len(where), 4, *of.latent_shape, seed=5)
    return of.velocity(noise if x is None else x, sigma, inputs, context, attend)[0]


def test_joined_latents_are_the_encoded_context(small: HYWorldPlay):
    assert isinstance(small, KeepsLatents)
    asked = recalled(small)
    whole = small.encode_context(asked, None, attend)
    kept = small.encode_latents(asked, None, attend)
    assert kept.shape[:2] == (1, 6)
    joined = small.join_context(kept.unbind(1), asked)
    assert joined.latents == whole.latents == 6
    assert joined.bytes == whole.bytes == 2 * 2 * 6 * 6 * 64 * 4  # keys and values of 2 blocks in float32
    for (ours,), (theirs,) in zip(joined.keys_values, whole.keys_values, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert joined.keys_values[0][0][0].untyped_storage().data_ptr() == kept.untyped_storage().data_ptr()
    where = cameras(1, 4, seed=7)
    assert torch.equal(velocity(small, joined, where), velocity(small, whole, where))


def test_latents_that_lie_apart_in_memory_are_joined_piece_by_piece(small: HYWorldPlay):
    asked = recalled(small)
    kept = small.encode_latents(asked, None, attend)
    apart = [kept[:, 0].clone(), kept[:, 1], kept[:, 2], kept[:, 4], kept[:, 5], kept[:, 3].clone()]
    order = [0, 1, 2, 4, 5, 3]
    joined = small.join_context(apart, asked)
    assert [k.shape[2] for k, _ in joined.keys_values[0]] == [6, 12, 12, 6]  # tokens
    copied = small.join_context(kept[:, order].unbind(1), asked)
    where = cameras(1, 4, seed=7)
    assert relative(velocity(small, joined, where), velocity(small, copied, where)) < 1e-6
    assert joined.bytes == copied.bytes


def test_what_is_kept_holds_no_place(small: HYWorldPlay):
    """The first block's keys and values know neither ranks nor cameras, so the window may move on."""
    asked = recalled(small)
    moved = replace(asked, cameras=cameras(1, 6, seed=3), positions=asked.positions - 4, whole=10)
    kept, other = (small.encode_latents(one, None, attend) for one in (asked, moved))
    assert torch.equal(kept[:, :, 0], other[:, :, 0])
    assert not torch.allclose(kept[:, :, 1], other[:, :, 1], atol=1e-4)
    joined, whole = small.join_context(kept.unbind(1), moved), small.encode_context(moved, None, attend)
    first, truth = (streams.of_keys(*c.keys_values[0][0], c.where) for c in (joined, whole))  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(first, truth, strict=True))
    before = small.join_context(kept.unbind(1), asked)
    assert not torch.allclose(first[0], streams.of_keys(*before.keys_values[0][0], before.where)[0], atol=1e-4)


def test_latents_see_the_past_as_if_encoded_with_it(small: HYWorldPlay):
    """Encoding new latents against kept ones is one pass in which the old do not see the new."""
    asked, seen = recalled(small), 13  # rows of text
    old, new = (asked.part(p, asked.latents[:, p]) for p in ([0, 1, 2], [3, 4, 5]))
    past = small.encode_latents(old, None, attend)
    context = small.join_context(past.unbind(1), old)
    both = torch.cat([past, small.encode_latents(new, context, attend)], 1)

    def causal(q: Tensor, k: Tensor, v: Tensor, **other: Any) -> Tensor:
        n = q.shape[2] // 2
        rows = [*range(n), *range(2 * n, 2 * n + seen)]  # text stands behind the context
        early = attend(q[:, :, :n], k[:, :, rows], v[:, :, rows])
        return torch.cat([early, attend(q[:, :, n:], k, v)], 2)

    assert relative(both, small.encode_latents(asked, None, causal)) <= 1e-5
    alone = small.encode_latents(new, None, attend)
    assert torch.equal(both[:, 3:, 0], alone[:, :, 0])  # what the first block writes saw nothing
    assert not torch.allclose(both[:, 3:, 1], alone[:, :, 1], atol=1e-3)


def test_moving_all_cameras_changes_nothing_between_latents():
    """In the second stream; text has no camera, so attention to it does tell where the world's origin is."""
    past, coming, motion = cameras(1, 6), cameras(1, 4, seed=7), cameras(seed=8)
    motion[:3, 3] = torch.tensor([2.0, -1.5, 0.7])
    q, k, v = (normal(1, 2, 6 * n, 16, seed=i) for i, n in enumerate((4, 6, 6)))

    def second(past: Tensor, coming: Tensor) -> Tensor:
        ranks = ((torch.arange(10)[6:], coming), (torch.arange(6), past))
        at, where = (
            streams.Places(
                *places.rotary_table(r, 2, 3, (4, 6, 6), 256.0), *places.projections(c, golden().given("Ks")[0, 0])
            )
            for r, c in ranks
        )
        return streams.back(attend(streams.of_queries(q, at), *streams.of_keys(k, v, where)), at)

    truth, moved = second(past, coming), second(motion @ past, motion @ coming)
    assert torch.equal(moved[..., :32], truth[..., :32])  # the first stream knows no cameras
    assert relative(moved[..., 32:], truth[..., 32:]) <= 1e-4
    for other in (second(past, motion @ coming), second(motion @ past, coming)):
        assert torch.equal(other[..., :32], truth[..., :32])
        assert relative(other[..., 32:], truth[..., 32:]) > 1e-2


def test_context_and_cameras_count(small: HYWorldPlay):
    asked, where = recalled(small), cameras(1, 4, seed=7)
    truth = velocity(small, small.encode_context(asked, None, attend), where)
    others = (
        replace(asked, cameras=cameras(1, 6, seed=3)), replace(asked, latents=-asked.latents),
        replace(asked, led=(FIRST, 9, 9, 9, 9, 9)), replace(asked, led=(0, *asked.led[1:])),
        replace(asked, positions=asked.positions.flip(0)), replace(asked, intrinsics=torch.eye(3)),
    )  # fmt: skip
    for other in others:
        assert relative(velocity(small, small.encode_context(other, None, attend), where), truth) > 1e-3
    assert relative(velocity(small, small.encode_context(asked, None, attend), cameras(1, 4)), truth) > 1e-3


def test_worlds_of_a_batch_equal_each_alone(small: HYWorldPlay):
    both, where = recalled(small, batch=2), cameras(2, 4, seed=7)
    sigma, x = torch.tensor([0.9, 0.4]), normal(2, 4, *small.latent_shape, seed=6)
    context = small.encode_context(both, None, attend)
    together = velocity(small, context, where, x, sigma)
    kept = small.encode_latents(both, None, attend)
    past = small.encode_latents(both, context, attend)
    for i, level in enumerate(sigma.tolist()):
        one = replace(both, latents=both.latents[i, None], cameras=both.cameras[i, None])
        alone = small.encode_context(one, None, attend)
        assert relative(together[i, None], velocity(small, alone, where[i, None], x[i, None], level)) <= 1e-5
        assert relative(kept[i, None], small.encode_latents(one, None, attend)) <= 1e-5
        assert relative(past[i, None], small.encode_latents(one, alone, attend)) <= 1e-5
    assert relative(together[:1], together[1:]) > 0.1


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-5), (torch.bfloat16, 0.1)], ids=str)
def test_other_precisions_are_near(small: HYWorldPlay, dtype: torch.dtype, most: float):
    other = weights.build(golden().config, golden().published, "the golden case", dtype=dtype)
    where, results = cameras(1, 4, seed=7), list[Tensor]()
    for of in (small, HYWorldPlay(other, VideoDecoder(small.decoder.vae, 32, 48), torch.float32)):
        context = of.encode_context(recalled(of), None, attend)
        assert context.keys_values[0][0][0].dtype == of.dtype
        results.append(velocity(of, context, where))
    assert other.enter.weight.dtype == dtype
    assert results[1].dtype == torch.float32
    assert 0 < relative(results[1], results[0]) <= most


def test_what_does_not_fit_the_network_is_named(small: HYWorldPlay):
    given = golden().prompt
    for prompt, text in (
        ({}, "needs encoder states named 'text', got none"),
        ({**given, "text": given["text"][..., :5]}, r"text states must be \[1, N, 24\], got \[1, \d, 5\]"),
        ({**given, "glyphs": given["vision"]}, r"glyphs must be one prompt's states"),
        ({**given, "vision": given["text"]}, r"vision states must be \[1, N, 20\], got \[1, 9, 24\]"),
        ({**given, "text_mask": given["text_mask"] * 0}, "at least one token of text"),
        ({**given, "text": torch.cat([given["text"]] * 2)}, "text must be one prompt's states"),
    ):
        with pytest.raises(InputError, match=text):
            small.encode_prompt(prompt, attend)
    with pytest.raises(InputError, match=r"needs an encoded prompt; begin worlds with Engine.open"):
        small.encode_context(replace(recalled(small), prompt=None), None, attend)
    with pytest.raises(InputError, match="a context must have at most 60 latents, got 61"):
        small.encode_context(replace(recalled(small), whole=61), None, attend)
    with pytest.raises(TypeError, match="context must be an HYContext, got object"):
        velocity(small, object(), cameras(1, 4))  # type: ignore[arg-type]


# Costs


def written_out(q: Tensor, k: Tensor, v: Tensor, *, lse: bool = False) -> Any:
    """Attention by matrix products, which the counter sees."""
    out, total = in_float32(q, k, v, None, lse)
    return out if total is None else Partial(out, total)


@pytest.mark.parametrize("size", [(32, 48), (64, 96)], ids=str)
def test_costs_are_those_of_the_passes(size: tuple[int, int]):
    of, c, tokens = model(*size), golden().config, size[0] * size[1] // 256
    assert isinstance(of, Costed)

    def counted(work: Callable[[], Any]) -> tuple[Any, float]:
        with FlopCounterMode(display=False) as counter:
            return work(), counter.get_total_flops()

    def left_out(latents: int, blocks: int) -> float:
        """Attention to 13 rows of text in both streams, and what is computed once a latent."""
        once = 2 * c.width * (2 * 256 + 2 * c.width + c.depth * 6 * c.width)
        return latents * (tokens * blocks * 8 * c.width * 13 + once)

    asked = recalled(of)
    (two, four) = (asked.part(p, asked.latents[:, p]) for p in ([0, 1], [2, 3, 4, 5]))
    kept, cost = counted(lambda: of.encode_latents(two, None, written_out))
    assert of.context_flops(2, 2) == pytest.approx(cost - left_out(2, 1), rel=0.01)
    past = of.join_context(kept.unbind(1), two)
    _, cost = counted(lambda: of.encode_latents(four, past, written_out))
    assert of.context_flops(4, 6) == pytest.approx(cost - left_out(4, 1), rel=0.01)
    whole, cost = counted(lambda: of.encode_context(asked, None, written_out))
    assert of.context_flops(6, 6) == pytest.approx(cost - left_out(6, 1), rel=0.01)
    where = cameras(1, 4)
    (inputs,) = of.prepare(Conditions(2, where, where, of.intrinsics, encoded=asked.prompt, led=(9,) * 4))
    x = normal(1, 4, *of.latent_shape)
    for context, count in ((of.join_context([], asked), 0), (past, 2), (whole, 6)):
        _, cost = counted(lambda context=context: of.velocity(x, 0.5, inputs, context, written_out))
        final = 4 * 2 * c.width * 2 * c.width
        assert of.evaluation_flops(4, count) == pytest.approx(cost - left_out(4, 2) - final, rel=0.01)
    assert of.context_flops(0, 6) == 0
