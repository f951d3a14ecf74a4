"""Training on contexts that were encoded chunk by chunk: they are what a player's incremental context holds."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from worldstride.attention import attend
from worldstride.context.kept import encode_kept
from worldstride.models.courtyard.adapter import CourtyardModel
from worldstride.models.courtyard.config import CourtyardConfig
from worldstride.models.courtyard.weights import random_network
from worldstride.protocol import Recalled

CONFIG = CourtyardConfig(size=24, width=64, depth=3, heads=1, refine=6, memory=5, window=8)


def pool(training: SimpleNamespace, config: CourtyardConfig = CONFIG):
    return training.data.Pool("courtyard", 2, 1, config, torch.Generator().manual_seed(0), frames=60)


def drawn(training: SimpleNamespace, chunks: int = 12, targets: tuple[int, ...] = (2, 3, 7), batch: int = 2, **options):
    layout = training.sequence.Layout(CONFIG, chunks)
    settings = {"random_memory": 0.0, "own": 0.0, **options}
    return layout, training.sequence.draw_stretch(pool(training), layout, batch, targets, **settings)


def test_a_stretchs_contexts_are_what_a_player_keeps(training: SimpleNamespace):
    """World by world, chunk by chunk, through the session's own functions."""
    network = random_network(CONFIG)
    for layer in (*(block.o for block in network.blocks), *(block.down for block in network.blocks)):
        layer.weight.mul_(8)
    layout, stretch = drawn(training)
    clean = torch.randn(2, 44, CONFIG.tokens, CONFIG.values, generator=torch.Generator().manual_seed(1))
    made = training.sequence.encode_stretch(network, stretch, layout, clean, torch.zeros(2))
    model, cameras = CourtyardModel(network, torch.float32), stretch.batch.context_cameras
    ranks = torch.arange(-13, 0)
    kinds = (ranks < -8).long()
    for b in range(2):
        head = layout.whole * 4
        back = torch.arange(-head, 0)
        one = clean[b : b + 1], cameras[b : b + 1]
        whole = model.encode_latents(
            Recalled(one[0][:, :head], one[1][:, :head], back.clamp_min(-13), (back < -8).long()), None, attend
        )
        records = dict(enumerate(whole.unbind(1)))
        for i, seen in enumerate(stretch.seen[b].tolist()):
            absent = [j for j in seen if j not in records]
            kept = [[records[j][0]] if j in records else [None] for j in seen]
            context, fresh = encode_kept(
                model, Recalled(one[0][:, absent], one[1][:, seen], ranks, kinds), kept, "all", 4, attend
            )
            records.update(zip(absent, () if fresh is None else fresh.unbind(1), strict=True))
            if i not in stretch.targets:
                continue
            row = 3 * b + stretch.targets.index(i)
            for (keys, values), (k, v) in zip(made, context.keys_values, strict=True):
                assert torch.allclose(keys[row], k[0], atol=1e-4)
                assert torch.allclose(values[row], v[0], atol=1e-4)


def test_stretches_hold_what_was_known_before_each_chunk(training: SimpleNamespace):
    walks, layout = pool(training), training.sequence.Layout(CONFIG, 12)
    walks.patches[:] = torch.arange(60, dtype=torch.uint8)[:, None, None]  # a frame's picture tells its number
    assert (layout.whole, layout.steps, layout.aims) == (4, range(4, 12), [2, 3, 6, 7])
    for random_memory in (0.0, 1.0):
        made = training.sequence.draw_stretch(walks, layout, 8, (3, 6), random_memory, 0.0)
        numbers = made.batch.context[:, :, 0, 0].long()
        steps = numbers.diff(dim=1)
        inside = torch.arange(1, 44) % 16 != 0
        assert bool((steps[:, inside] == 1).all())
        assert bool((steps >= 1).all())
        assert bool((steps[:, ~inside] > 1).any())  # runs lie apart
        assert int(numbers.min()) >= 0
        assert torch.equal(made.batch.context_cameras, walks.cameras[made.batch.walks[:, None], numbers])
        for at, step in enumerate(layout.steps):
            memory, window = made.seen[:, at, :5], made.seen[:, at, 5:]
            assert torch.equal(window, torch.arange(4 * step - 8, 4 * step).expand(8, -1))
            assert bool((memory < 4 * step - 8).all())
            assert bool((memory.diff(dim=1) >= (0 if random_memory else 1)).all())
        ahead = torch.cat([numbers[:, [4 * layout.steps[i] - 1]] + torch.arange(1, 5) for i in (3, 6)], 1)
        assert torch.equal(made.batch.target_frames, ahead)
        assert torch.equal(made.batch.target[..., 0, 0].flatten(1).long(), ahead)
        assert torch.equal(made.batch.target_cameras.flatten(1, 2), walks.cameras[made.batch.walks[:, None], ahead])
        assert bool((made.batch.target_frames < 60).all())


def test_own_frames_stand_in_for_some_of_a_stretch(training: SimpleNamespace):
    walks, layout = pool(training), training.sequence.Layout(CONFIG, 12)
    walks.patches[:], walks.own = 1, torch.full_like(walks.patches, 2)
    context = training.sequence.draw_stretch(walks, layout, 64, (0,), 0.0, 0.5).batch.context[:, :, 0, 0]
    mixed = (context == 2).any(1)
    assert 16 < int(mixed.sum()) < 48
    assert 0.6 < float((context[mixed] == 2).float().mean()) < 0.9


@pytest.mark.parametrize(
    ("config", "chunks", "words"),
    [
        (replace(CONFIG, window=6), 12, "whole chunks and no sink, got 6 and 0"),
        (replace(CONFIG, sink=1), 12, "got 8 and 1"),
        (replace(CONFIG, window=16), 12, "longer than the window's 4 chunks, got 4"),
        (CONFIG, 4, "more than 5 chunks and whole runs of 4, got 4"),
        (CONFIG, 10, "whole runs of 4, got 10"),
    ],
)
def test_layouts_refuse_what_they_cannot_hold(
    training: SimpleNamespace, config: CourtyardConfig, chunks: int, words: str
):
    with pytest.raises(ValueError, match=words):
        training.sequence.Layout(config, chunks)


def test_walks_must_hold_a_stretch(training: SimpleNamespace):
    layout = training.sequence.Layout(CONFIG, 16)
    with pytest.raises(ValueError, match="walks of 60 frames are shorter than a stretch of 64"):
        training.sequence.draw_stretch(pool(training), layout, 2, (2,), 0.0, 0.0)
    whole = layout.frames(64, torch.rand, 3)
    assert torch.equal(whole, torch.arange(64).expand(3, -1))


def test_gradients_flow_through_what_was_kept(training: SimpleNamespace):
    """The last context depends on frames that only earlier chunks saw."""
    network = random_network(CONFIG)
    layout, stretch = drawn(training, targets=(7,), batch=1)
    clean = torch.zeros(1, 44, CONFIG.tokens, CONFIG.values, requires_grad=True)
    written: list[tuple[Tensor, Tensor]] = training.sequence.encode_stretch(
        network, stretch, layout, clean, torch.zeros(1)
    )
    written[-1][1].square().sum().backward()
    reached = clean.grad.abs().flatten(2).sum(2)[0] > 0
    assert bool(reached[stretch.seen[0, 7]].all())
    assert int(reached.sum()) > len(stretch.seen[0, 7])
