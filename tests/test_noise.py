"""Noise is a pure function of its key."""

from __future__ import annotations

import pytest
import torch

from worldstride.noise import normal, stream


def test_the_same_key_gives_the_same_noise():
    assert torch.equal(normal((2, 3), 7, 1, 0), normal((2, 3), 7, 1, 0))


@pytest.mark.parametrize(
    ("one", "other"),
    [((7, 1), (7, 1, 0)), ((7,), (7, 0, 0)), ((2**32, 5), (0, 1, 5)), ((5,), (5 + 2**32,)), ((3, -1), (3, 1))],
)
def test_different_keys_give_different_noise(one: tuple[int, ...], other: tuple[int, ...]):
    assert not torch.equal(stream(*one).get_state(), stream(*other).get_state())


def test_the_callers_random_numbers_are_left_alone():
    before = torch.get_rng_state()
    normal((4,), 1, 2, 3)
    assert torch.equal(torch.get_rng_state(), before)
