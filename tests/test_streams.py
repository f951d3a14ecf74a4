"""Attention in two streams: places written out, and the kernel that gives them, in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from torch import Tensor

from attending import error, normal
from worldstride.attention import ops, reference, streams
from worldstride.attention.streams import Places
from worldstride.camera import camera_from_pose
from worldstride.errors import InputError

HEADS, E = 2, 16
INTERPRETED = importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    for operator in (streams.place_queries, streams.place_keys, streams.place_back):
        operator.register_kernel("cpu", operator._init_fn)


def places_of(latents: int, each: int, batch: int = 1, seed: int = 0) -> Places:
    angle = normal(latents * each, E // 2, seed=seed)
    cameras = camera_from_pose(normal(batch, latents, 4, seed=seed + 1))
    return Places(angle.cos(), angle.sin(), torch.linalg.inv(cameras), cameras)


def tokens(count: int, seed: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """As a projection leaves them: heads beside each other in memory."""
    made = normal(batch, count, 3, HEADS, E, seed=seed, dtype=dtype)
    q, k, v = made.permute(2, 0, 3, 1, 4).unbind()
    return q, k, v


def test_streams_see_differences_of_places_only():
    at, where = places_of(2, 5, seed=1), places_of(3, 5, seed=4)
    (q, k, v), (_, past_k, past_v) = tokens(10, 1), tokens(15, 2)
    text = normal(1, HEADS, 4, E, seed=7), normal(1, HEADS, 4, E, seed=8)
    move = camera_from_pose(normal(4, seed=9))
    turned = torch.polar(torch.ones(E // 2), normal(E // 2, seed=10))

    def moved(p: Places, turns: bool) -> Places:
        angles = torch.complex(p.cos, p.sin) * (turned if turns else 1)
        cameras = move @ p.unproject
        return Places(angles.real, angles.imag, torch.linalg.inv(cameras), cameras)

    def attended(at: Places, where: Places, text: tuple[Tensor, Tensor]) -> Tensor:
        keys, values = streams.every_key(text, [(past_k, past_v)], where, (k, v), at)
        return streams.back(reference(streams.of_queries(q, at), keys, values), at).float()

    empty = tuple(t[:, :, :0] for t in text)
    plain = attended(at, where, empty)  # type: ignore[arg-type]
    assert error(attended(moved(at, True), moved(where, True), empty), plain) < 1e-5  # type: ignore[arg-type]
    # text has no place, so that with it only places of latents among themselves may move
    assert error(attended(moved(at, True), moved(where, True), text), attended(at, where, text)) > 1e-2
    assert error(attended(moved(at, True), where, empty), plain) > 1e-2  # type: ignore[arg-type]


def test_keys_are_context_then_text_then_own():
    at, where = places_of(2, 3), places_of(1, 3, seed=3)
    (_, k, v), (_, past_k, past_v) = tokens(6, 1), tokens(3, 2)
    text = normal(1, HEADS, 4, E, seed=7), normal(1, HEADS, 4, E, seed=8)
    keys, values = streams.every_key(text, [(past_k, past_v)], where, (k, v), at)
    assert keys.shape == values.shape == (2, HEADS, 13, E)
    for of, got in zip(text, (keys, values), strict=True):
        assert all(torch.equal(got[i, :, 3:7], of[0]) for i in (0, 1))
    assert torch.equal(keys[:1, :, :3], streams.turn(past_k, where.cos, where.sin))
    assert torch.equal(keys[1:, :, 7:], streams.carry(k, at.unproject))
    assert torch.equal(values[:1, :, [0, 1, 2, *range(7, 13)]], torch.cat([past_v, v], 2))
    alone = streams.every_key(text, (), None, (k, v), at)
    assert torch.equal(alone[0], keys[:, :, 3:])
    at, pieces = places_of(2, 3), [(k[:, :, :3], v[:, :, :3]), (k[:, :, 3:], v[:, :, 3:])]
    some = streams.every_key(text, pieces, at, (k[:, :, :0], v[:, :, :0]), at)
    whole = streams.every_key(text, [(k, v)], at, (k[:, :, :0], v[:, :, :0]), at)
    assert all(torch.equal(a, b) for a, b in zip(some, whole, strict=True))
    with pytest.raises(InputError, match="remembered latents need places"):
        streams.every_key(text, pieces, None, (k, v), at)


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter; on a GPU the kernels run compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("latents", "each", "batch"), [(1, 1, 1), (2, 35, 1), (3, 20, 2), (4, 8, 1)])
def test_the_kernel_gives_what_is_written_out(
    latents: int, each: int, batch: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    at, where = places_of(latents, each, batch), places_of(2, each, batch, seed=5)
    q, k, v = tokens(latents * each, 1, batch, dtype)
    _, past_k, past_v = tokens(2 * each, 2, batch, dtype)
    text = normal(1, HEADS, 5, E, seed=7, dtype=dtype), normal(1, HEADS, 5, E, seed=8, dtype=dtype)
    # attention kernels leave heads beside each other, too
    out = normal(2 * batch, latents * each, HEADS, E, seed=9, dtype=dtype).transpose(1, 2)

    def made() -> list[Tensor]:
        pieces = [(past_k[:, :, :each], past_v[:, :, :each]), (past_k[:, :, each:], past_v[:, :, each:])]
        every = streams.every_key(text, pieces, where, (k, v), at)
        first = streams.every_key(text, (), None, (k, v), at)
        return [streams.of_queries(q, at), *every, *first, streams.back(out, at)]

    expected = made()
    monkeypatch.setattr(ops, "usable", lambda how, x: "")
    bound = 1e-6 if dtype == torch.float32 else 1e-3
    assert all(error(a, b) < bound for a, b in zip(made(), expected, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_kernel_on_a_gpu(dtype: torch.dtype):
    at, where = (Places(*(t.cuda() for t in p)) for p in (places_of(4, 35), places_of(20, 35, seed=5)))
    q, k, v = (t.cuda() for t in tokens(140, 1, dtype=dtype))
    _, past_k, past_v = (t.cuda() for t in tokens(700, 2, dtype=dtype))
    text = tuple(normal(1, HEADS, 5, E, seed=s, dtype=dtype).cuda() for s in (7, 8))
    out = normal(2, 140, HEADS, E, seed=9, dtype=dtype).cuda().transpose(1, 2)

    def made(*given: Tensor) -> list[Tensor]:
        q, out = given
        pieces = [(past_k[:, :, rows], past_v[:, :, rows]) for rows in (slice(140), slice(140, None))]
        every = streams.every_key(text, pieces, where, (k, v), at)  # type: ignore[arg-type]
        return [streams.of_queries(q, at), *every, streams.back(out, at)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "usable", lambda how, x: "no")
        expected = made(q, out)
    bound = 1e-6 if dtype == torch.float32 else 1e-2
    for way in (made, torch.compile(made, fullgraph=True)):
        assert all(error(a, b) < bound for a, b in zip(way(q, out), expected, strict=True))
