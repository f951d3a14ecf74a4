"""The history bank: order, bounds, key frames, forks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from worldstride.camera import camera_from_pose
from worldstride.context.history import TURN_METRES, History, Remembered, Shown, camera_distance
from worldstride.control import Action
from worldstride.errors import InputError


def poses(*x: float, yaw: float = 0.0) -> Tensor:
    """Cameras [N, 4, 4] at places x along the world's first axis."""
    return camera_from_pose(torch.tensor([[at, 0.0, yaw, 0.0] for at in x]))


def fill(history: History, cameras: Tensor, chunk: int = 1) -> None:
    """Append latents whose value is their number in the world."""
    for part in cameras.split(chunk):
        numbers = torch.arange(history.total, history.total + len(part), dtype=torch.float32)
        history.append(numbers[:, None], part, (None,) * len(part))


def indices(history: History) -> list[int]:
    return [entry.index for entry in history.entries]


def test_entries_stay_in_order_and_are_found_by_place():
    history = History(limit=10, hot=2, sink=1)
    actions = (Action(frozenset({"KeyW"})), None)
    history.append(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), poses(0, 1), actions)
    history.append(torch.tensor([[5.0, 6.0]]), poses(2), (None,))
    assert indices(history) == [0, 1, 2]
    assert (len(history), history.total, history.bytes) == (3, 3, 24)
    assert [e.led for e in history.entries] == [*actions, None]
    assert torch.equal(history.latents([2, 0], torch.device("cpu"), (2,)), torch.tensor([[5.0, 6.0], [1.0, 2.0]]))
    assert torch.equal(history.cameras([2, 0]), poses(2, 0))
    assert torch.equal(history.cameras(), poses(0, 1, 2))
    assert torch.equal(history.cameras(slice(1, None)), poses(1, 2))


def test_an_empty_choice_has_the_latents_shape():
    history = History(limit=10, hot=2, sink=1)
    assert history.latents([], torch.device("cpu"), (3, 5)).shape == (0, 3, 5)
    assert history.cameras([]).shape == history.cameras().shape == (0, 4, 4)
    assert (len(history), history.total, history.bytes) == (0, 0, 0)


def test_the_bank_owns_what_it_remembers():
    history, latents, cameras = History(limit=10, hot=2, sink=1), torch.ones(2, 3), poses(0, 1)
    history.append(latents, cameras, (None, None))
    latents.zero_()
    cameras.zero_()
    assert torch.equal(history.latents([0, 1], torch.device("cpu"), (3,)), torch.ones(2, 3))
    assert torch.equal(history.cameras(), poses(0, 1))


def test_numbers_of_latents_cameras_and_actions_must_agree():
    with pytest.raises(ValueError, match="zip"):
        History().append(torch.ones(2, 1), poses(0, 1), (None,))


@pytest.mark.parametrize("chunk", [1, 3])
def test_beyond_the_limit_key_frames_stay(chunk: int):
    # steps of a centimetre, but a new place every tenth latent
    x = [10.0 * (i // 10) + 0.01 * (i % 10) for i in range(60)]
    history = History(limit=14, hot=4, sink=2)
    fill(history, poses(*x), chunk)
    kept = indices(history)
    assert len(kept) == 14
    assert history.total == 60
    assert kept == sorted(kept)
    assert kept[:2] == [0, 1]
    assert kept[-4:] == [56, 57, 58, 59]
    assert {x[i] // 10 for i in kept} == {0, 1, 2, 3, 4, 5}
    # what is found by place is what the index says
    assert history.latents(list(range(14)), torch.device("cpu"), (1,))[:, 0].tolist() == kept


@pytest.mark.parametrize("sink", [0, 1, 3])
def test_the_first_and_the_newest_always_stay(sink: int):
    history = History(limit=sink + 5, hot=3, sink=sink)
    fill(history, poses(*[0.0] * 40))
    kept = indices(history)
    assert len(kept) == sink + 5
    assert kept[: max(1, sink)] == list(range(max(1, sink)))
    assert kept[-3:] == [37, 38, 39]


def test_the_least_telling_latent_goes_first():
    history = History(limit=6, hot=2, sink=1)
    fill(history, poses(0, 5, 10, 10.1, 15, 20))
    assert indices(history) == [0, 1, 2, 3, 4, 5]
    fill(history, poses(25))
    # of latents 1 to 4, number 3 has the shortest way to both neighbours (0.1 + 4.9, number 2: 5 + 0.1)
    assert indices(history) == [0, 1, 2, 4, 5, 6]


def test_where_latents_come_back_in_clips_a_whole_clip_goes():
    # clips of 4: places 0 (the sink), 10, 11, 30, 40, 50, 60; the nearest to its neighbours is the one at 11
    history = History(limit=24, hot=8, sink=4, clip=4)
    at = [10.0 * p + 0.1 * i for p in (0, 1, 1.1, 3, 4, 5) for i in range(4)]
    fill(history, poses(*at), 4)
    assert indices(history) == list(range(24))
    fill(history, poses(*(60 + 0.1 * i for i in range(4))), 4)
    gone = [4, 5, 6, 7] if indices(history)[4] == 8 else [8, 9, 10, 11]
    assert indices(history) == [i for i in range(28) if i not in gone]
    assert gone == [4, 5, 6, 7]  # 10 to both neighbours 0 and 11 is less than 1 and 19 of the other
    assert (history.fork().clip, history.replaced(torch.zeros(4, 1)).clip) == (4, 4)
    with pytest.raises(InputError, match=r"at least hot \+ sink \+ 8 = 20, got 19"):
        History(limit=19, hot=8, sink=4, clip=4)


def test_turning_on_the_spot_is_telling_too():
    yaw = torch.tensor([0.0, 2.0, -2.0, 0.0, 0.0, 0.0, 0.0])
    turning = camera_from_pose(torch.stack([torch.zeros(7), torch.zeros(7), yaw, torch.zeros(7)], -1))
    history = History(limit=6, hot=2, sink=1)
    fill(history, turning)
    assert indices(history) == [0, 1, 2, 3, 5, 6]


def test_forks_are_independent():
    history = History(limit=8, hot=2, sink=1)
    fill(history, poses(*range(5)))
    fork = history.fork()
    assert fork.entries == history.entries
    fill(fork, poses(9, 10, 11, 12, 13))
    assert (len(history), history.total) == (5, 5)
    assert (len(fork), fork.total, fork.limit, fork.hot, fork.sink) == (8, 10, 8, 2, 1)
    fill(history, poses(6))
    assert indices(history) == [0, 1, 2, 3, 4, 5]


def test_a_limit_below_its_parts_is_refused():
    with pytest.raises(InputError, match=r"at least hot \+ sink \+ 2 = 8, got 7"):
        History(limit=7, hot=4, sink=2)


def test_camera_distance_adds_metres_and_radians():
    start = camera_from_pose(torch.tensor([1.0, 2.0, 0.3, 0.1]))
    assert float(camera_distance(start, start)) == pytest.approx(0.0, abs=1e-3)
    ahead = camera_from_pose(torch.tensor([4.0, 6.0, 0.3, 0.1]))
    assert float(camera_distance(start, ahead)) == pytest.approx(5.0, abs=1e-3)
    flat, turned = poses(0.0), poses(0.0, yaw=0.8)
    assert float(camera_distance(flat, turned)) == pytest.approx(TURN_METRES * 0.8, abs=1e-4)
    assert float(camera_distance(flat, poses(2.0, yaw=math.pi))) == pytest.approx(2 + math.pi, abs=1e-3)
    pair = torch.stack([start, ahead])
    assert torch.equal(camera_distance(pair, pair.flip(0)), camera_distance(pair.flip(0), pair))


def test_older_latents_may_stay_on_the_device_until_they_are_settled(monkeypatch: pytest.MonkeyPatch):
    """A host stands in for the device: what would be moved is what is asked for on the host."""
    moved = list[float]()
    monkeypatch.setattr(Tensor, "device", property(lambda self: torch.device("cuda" if float(self) >= 3 else "cpu")))
    monkeypatch.setattr(Tensor, "cpu", lambda self: (moved.append(float(self)), self)[1])
    history = History(limit=20, hot=2, sink=1)
    where = torch.eye(4).expand(8, 4, 4)
    entries = [torch.tensor(float(n)) for n in range(8)]
    for entry in entries:
        history._entries.append(Remembered(history._total, entry, where[0], None, Shown(where[:1])))
    history.settle()
    assert moved == [5, 4, 3]  # 0 to 2 are there, 6 and 7 are the newest
