"""What training minimises, and weights that begin with other patches."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import torch

from worldstride.models.courtyard.config import CourtyardConfig
from worldstride.models.courtyard.model import patchify
from worldstride.models.courtyard.weights import random_network

SMALL = CourtyardConfig(size=24, width=64, depth=2, heads=1, refine=6, memory=3, window=2, sink=1)


def test_smaller_patches_begin_as_the_middle_of_larger_ones(training: SimpleNamespace):
    square, narrow = replace(SMALL, patch_width=12), replace(SMALL, patch_height=6)  # 12 x 12 and 6 x 8
    network = random_network(square)
    state = training.repatch.repatched(network.state_dict(), square, narrow)
    smaller = random_network(narrow)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in smaller.state_dict().items()}
    smaller.load_state_dict(state)
    for name in ("clean_in", "noisy_in"):
        cells = [getattr(net, name).weight.view(SMALL.width, 3, *net.config.patch) for net in (network, smaller)]
        torch.testing.assert_close(cells[1], 3 * cells[0][:, :, 3:9, 2:10])
        assert torch.equal(getattr(smaller, name).bias, getattr(network, name).bias)
    x = torch.randn(SMALL.width)
    whole, middle = network.out(x).view(-1, 12, 12), smaller.out(x).view(-1, 6, 8)
    torch.testing.assert_close(middle, whole[:, 3:9, 2:10])
    assert torch.equal(state["blocks.0.q.weight"], network.blocks[0].q.weight)
    larger = training.repatch.repatched(smaller.state_dict(), narrow, square)
    assert not {"clean_in.weight", "noisy_in.weight", "out.weight", "out.bias"} & larger.keys()
    assert larger["place"].shape == network.place.shape
    network.place.data = torch.arange(2.0).repeat_interleave(2)[:, None].expand(4, SMALL.width)  # a value a row
    place = training.repatch.repatched(network.state_dict(), square, replace(SMALL, patch_width=6))["place"]
    assert torch.equal(place[:, 0], torch.arange(2.0).repeat_interleave(4))


def test_noise_and_errors_are_what_they_say(training: SimpleNamespace):
    levels = torch.randint(0, 256, (2, 3, 4, 6, 288), dtype=torch.uint8)
    noise, amount = torch.randn(levels.shape), torch.rand(2, 3)
    noisy, clean = training.objective.noised(levels, noise, amount)
    wide = amount[..., None, None, None]
    torch.testing.assert_close(clean, levels / 127.5 - 1)
    torch.testing.assert_close(noisy, (1 - wide) * (levels / 127.5 - 1) + wide * noise)
    config = SMALL  # 2 rows and 3 columns of patches
    difference = torch.randn(2, 3, 4, 3, 24, 24)
    target = torch.randn(2, 3, 4, 6, 288)
    predicted = target + patchify(difference, config.patch)
    error, jump = training.objective.errors(config, predicted, target)
    torch.testing.assert_close(error, difference.square().mean((2, 3, 4, 5)))
    across = (difference[..., [8, 16]] - difference[..., [7, 15]]).square().mean((2, 3, 4, 5))
    down = (difference[..., 12, :] - difference[..., 11, :]).square().mean((2, 3, 4))
    torch.testing.assert_close(jump, (across + down) / 2, rtol=1e-4, atol=1e-5)
