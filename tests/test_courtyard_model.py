"""The courtyard network: what its keys know, what it is invariant to, and its files."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import worldstride
from worldstride import rope, worlds
from worldstride.attention import attend, reference
from worldstride.attention.written import SAMPLED
from worldstride.camera import camera_from_pose, intrinsics_from_fov, rays
from worldstride.errors import InputError
from worldstride.models.courtyard import geometry as geometry_of
from worldstride.models.courtyard.adapter import CourtyardModel
from worldstride.models.courtyard.codec import PatchCodec
from worldstride.models.courtyard.config import CameraCode, ContextView, CourtyardConfig
from worldstride.models.courtyard.geometry import (
    FIELD_OF_VIEW,
    KIND_ANGLE,
    RANK_FREQUENCIES,
    geometry,
    projective_channels,
)
from worldstride.models.courtyard.model import (
    CourtyardNetwork,
    map_by_products,
    map_by_sums,
    parameter_count,
    patchify,
    unpatchify,
)
from worldstride.models.courtyard.weights import fingerprint, random_network, read_network
from worldstride.protocol import Conditions, Recalled

SMALL = CourtyardConfig(size=24, width=64, depth=2, heads=1, refine=6, memory=2, window=4)
CODES: tuple[CameraCode, ...] = ("ray", "projective", "both")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cameras(*shape: int, seed: int = 0) -> Tensor:
    return camera_from_pose(normal(*shape, 4, seed=seed) * torch.tensor([1.0, 1.0, 1.0, 0.1]))


def network(camera: CameraCode, **other: int) -> CourtyardNetwork:
    return random_network(replace(SMALL, camera=camera, **other)).eval()


def context_keys(net: CourtyardNetwork, where: Tensor, ranks: Tensor, block: int = 0) -> Tensor:
    """Keys [heads, F, n, head_dim] that a block writes for frames of fixed pictures."""
    config, count = net.config, where.shape[1]
    clean = normal(1, count, config.tokens, config.values, seed=5)
    made = net.context(clean, geometry(config, where, ranks[None], torch.zeros(1, count)), torch.zeros(1), attend)
    return made[block][0][0].unflatten(1, (count, -1))


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 63), (64, 130)])
def test_attention_equals_the_reference(queries: int, keys: int):
    q, k, v = normal(2, 3, queries, 16), normal(2, 3, keys, 16, seed=1), normal(2, 3, keys, 16, seed=2)
    truth = reference(q, k, v)
    assert truth.dtype == torch.float64
    assert torch.allclose(attend(q, k, v).double(), truth, atol=1e-5)
    half = attend(*(t.bfloat16() for t in (q, k, v)))
    assert torch.allclose(half.double(), truth, atol=3e-2)
    # a key that matches a query alone takes all of its weight
    sharp = reference(
        100 * k[:, :, :1], k[:, :, :1].repeat(1, 1, 2, 1) * torch.tensor([1.0, -1.0])[:, None], v[:, :, [0, 0]]
    )
    assert torch.allclose(sharp, v[:, :, :1].double(), atol=1e-6)


def test_large_scores_in_half_precision_keep_what_tells_them_apart():
    q, k, v = (normal(1, 2, n, 64, seed=i).bfloat16() for i, n in enumerate((300, 500, 500)))
    q[..., 0], k[..., 0] = 30, 20  # every score is near 75, where bfloat16 is as coarse as 0.5
    truth = reference(q, k, v)

    def error(out: Tensor) -> float:
        return float((out.double() - truth).norm() / truth.norm())

    naive = torch.matmul((torch.matmul(q, k.mT) / 8).softmax(-1), v)
    assert error(attend(q, k, v)) < 0.02 < 0.1 < error(naive)
    # keys among which the greatest score is sought may lie far below all others: nothing is lost then
    k[..., 0] = torch.where(torch.arange(500) % SAMPLED == 0, -40.0, 0.0)
    truth = reference(q, k, v)
    assert error(attend(q, k, v)) < 0.02


def test_projective_matrices_are_applied_alike_both_ways():
    part, matrix = normal(2, 3, 4, 5, 16), normal(2, 4, 4, 4, seed=1)  # 4 frames of 5 tokens
    truth = torch.einsum("bfij,bhfngj->bhfngi", matrix, part.unflatten(-1, (-1, 4))).flatten(4)
    for way in (map_by_products, map_by_sums):
        torch.testing.assert_close(way(part, matrix), truth)
        assert way(part.bfloat16(), matrix).dtype == torch.bfloat16


@pytest.mark.parametrize("code", CODES)
def test_a_frames_keys_know_no_other_camera(code: CameraCode):
    net, where, ranks = network(code), cameras(1, 5), torch.arange(-5, 0)
    moved = where.clone()
    moved[:, -1] = cameras(1, seed=9)
    before, after = context_keys(net, where, ranks), context_keys(net, moved, ranks)
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


@pytest.mark.parametrize("code", CODES)
def test_new_ranks_only_turn_the_time_pairs(code: CameraCode):
    net, where, ranks = network(code), cameras(1, 5), torch.arange(-5, 0)
    before, after = context_keys(net, where, ranks), context_keys(net, where, ranks + 7)
    first = projective_channels(net.config)
    pairs = (net.config.head_dim - first) // 2
    angle = torch.zeros(pairs)
    angle[-4:-1] = 7 * torch.tensor(RANK_FREQUENCIES)
    turned = rope.rotate(before[..., first:], angle.cos(), angle.sin())
    assert torch.equal(before[..., :first], after[..., :first])
    assert torch.allclose(turned, after[..., first:], atol=1e-5)
    fixed = [first + half * pairs + i for half in (0, 1) for i in range(pairs - 4)]
    assert torch.equal(before[..., fixed], after[..., fixed])
    assert not torch.allclose(before, after, atol=1e-3)


@pytest.mark.parametrize("code", CODES)
def test_keys_know_no_jump_where_the_circle_closes(code: CameraCode):
    net, ranks = network(code), torch.zeros(1)
    # the first token's ray crosses from just below to just above half a turn
    ray = rays(torch.eye(4), intrinsics_from_fov(FIELD_OF_VIEW), 2, 2)[0, 0]
    middle = math.pi - float(torch.atan2(ray[0], ray[2]))
    below, above = (camera_from_pose(torch.tensor([[[0.5, -1.0, middle + d, 0.0]]])) for d in (-1e-4, 1e-4))
    assert torch.allclose(context_keys(net, below, ranks), context_keys(net, above, ranks), atol=2e-2)


def test_kinds_turn_the_last_pair():
    where, ranks = cameras(1, 3), torch.zeros(1, 3)
    tables = geometry(SMALL, where, ranks, torch.tensor([[0, 1, 2]]))
    turned = torch.atan2(tables.sin, tables.cos).unflatten(2, (3, -1))[0, 0, :, :, -1]
    expected = torch.tensor([0.0, KIND_ANGLE, 2 * KIND_ANGLE])[:, None]
    assert torch.allclose(turned.cos(), expected.cos().expand_as(turned), atol=1e-5)
    assert torch.allclose(turned.sin(), expected.sin().expand_as(turned), atol=1e-5)


def predict(net: CourtyardNetwork, past: Tensor, coming: Tensor) -> Tensor:
    """Clean frames predicted for fixed noise and fixed context pictures."""
    config, (b, f), c = net.config, past.shape[:2], coming.shape[1]
    clean, noisy = normal(b, f, config.tokens, config.values), normal(b, c, config.tokens, config.values, seed=1)
    ranks = torch.arange(-f, c).expand(b, -1)
    kinds = torch.zeros_like(ranks)
    written = net.context(clean, geometry(config, past, ranks[:, :f], kinds[:, :f]), torch.zeros(b), attend)
    where = geometry(config, coming, ranks[:, f:], kinds[:, f:])
    return net.denoise(noisy, where, torch.full((b,), 0.5), written, attend)


def about_vertical(x: float, y: float, z: float, yaw: float) -> Tensor:
    motion = camera_from_pose(torch.tensor([x, z, yaw, 0.0]))
    motion[1, 3] = y
    return motion


@pytest.mark.parametrize(
    ("code", "motion"),
    [
        ("projective", about_vertical(1.5, -0.4, 2.0, 1.1)),
        ("projective", about_vertical(-3.0, 0.7, 0.5, -2.5)),
        ("ray", about_vertical(1.5, 0.0, -2.0, 0.0)),
        ("both", about_vertical(-0.8, 0.0, 2.5, 0.0)),
    ],
)
def test_moving_the_whole_world_changes_nothing(code: CameraCode, motion: Tensor):
    net, past, coming = network(code), cameras(1, 5), cameras(1, 4, seed=3)
    truth = predict(net, past, coming)
    assert torch.allclose(predict(net, motion @ past, motion @ coming), truth, atol=1e-4)
    # the camera does enter: moving the context or the chunk alone changes the prediction
    assert float((predict(net, motion @ past, coming) - truth).abs().max()) > 1e-3
    assert float((predict(net, past, motion @ coming) - truth).abs().max()) > 1e-3


@pytest.mark.parametrize("code", CODES)
def test_chunks_that_share_a_context_equal_separate_ones(code: CameraCode):
    net = network(code)
    config = net.config
    worlds, share, frames, new = 2, 3, 5, 4
    clean, past = normal(worlds, frames, config.tokens, config.values), cameras(worlds, frames)
    ranks, zeros = torch.arange(-frames, 0).expand(worlds, -1), torch.zeros(worlds, frames)
    written = net.context(clean, geometry(config, past, ranks, zeros), torch.zeros(worlds), attend)
    noisy = normal(worlds * share, new, config.tokens, config.values, seed=1)
    where, sigma = cameras(worlds * share, new, seed=2), torch.linspace(0.2, 0.9, worlds * share)
    order = torch.arange(new).expand(worlds * share, -1)
    together = net.denoise(noisy, geometry(config, where, order, order * 0), sigma, written, attend)
    for i in range(worlds * share):
        own = [(k[i // share, None], v[i // share, None]) for k, v in written]
        alone = slice(i, i + 1)
        tables = geometry(config, where[alone], order[alone], order[alone] * 0)
        apart = net.denoise(noisy[alone], tables, sigma[alone], own, attend)
        assert torch.allclose(together[alone], apart, atol=1e-5)


@pytest.mark.parametrize("code", CODES)
def test_worlds_of_a_batch_do_not_meet(code: CameraCode):
    net, past, coming = network(code), cameras(3, 5), cameras(3, 4, seed=3)
    other = past.clone()
    other[0] = cameras(5, seed=8)
    a, b = predict(net, past, coming), predict(net, other, coming)
    assert torch.allclose(a[1:], b[1:], atol=1e-6)
    assert not torch.allclose(a[0], b[0], atol=1e-4)


def test_an_empty_context_is_none(tiny_config: CourtyardConfig):
    model = CourtyardModel(random_network(tiny_config).eval(), torch.float32)
    empty = torch.empty(1, 0, *model.latent_shape)
    ranks = torch.zeros(0, dtype=torch.long)
    context = model.encode_context(Recalled(empty, torch.empty(1, 0, 4, 4), ranks, ranks), None, attend)
    assert (context.latents, context.bytes) == (0, 0)
    where = cameras(1, 4)
    (inputs,) = model.prepare(Conditions(0, where, where, model.intrinsics, positions=torch.arange(4)))
    x = normal(1, 4, *model.latent_shape)
    velocity, captured = model.velocity(x, 0.5, inputs, context, attend)
    assert torch.allclose(velocity, (x - captured["clean"]) / 0.5)
    with pytest.raises(TypeError, match="CourtyardContext, got object"):
        model.velocity(x, 0.5, inputs, object(), attend)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 5, 3, 36, 36), (1, 7, 12, 12)])
def test_patches_round_trip(shape: tuple[int, ...]):
    images = normal(*shape)
    patches = patchify(images, (12, 12))
    grid = shape[-1] // 12
    assert patches.shape == (*shape[:-3], grid**2, shape[-3] * 144)
    assert torch.equal(unpatchify(patches, (grid, grid), (12, 12)), images)


def test_patches_go_row_by_row():
    images = torch.zeros(1, 24, 24)
    images[0, :12, 12:] = 1
    images[0, 12:, :12] = 2
    assert patchify(images, (12, 12)).mean(-1).tolist() == [0, 1, 2, 0]


def test_the_codec_keeps_all_levels_of_a_pixel():
    codec = PatchCodec(SMALL, torch.device("cpu"))
    levels = np.resize(np.arange(256, dtype=np.uint8), 2 * 24 * 24 * 3).reshape(1, 2, 24, 24, 3)
    frames = torch.from_numpy(levels)
    latents = codec.encode(frames)
    assert (latents.dtype, latents.shape) == (torch.float16, (1, 2, SMALL.tokens, SMALL.values))
    shown, state = codec.decode(latents, {})
    assert torch.equal(shown, frames)
    assert state == {}


def test_what_is_remembered_is_what_was_shown(tiny_config: CourtyardConfig):
    model = CourtyardModel(random_network(tiny_config).eval(), torch.float32)
    (inputs,) = model.prepare(Conditions(0, cameras(1, 4), cameras(1, 4), model.intrinsics, positions=torch.arange(4)))
    kept = model.commit(normal(1, 4, *model.latent_shape), inputs)
    assert kept.dtype == torch.float16
    assert float(kept.abs().max()) <= 1
    shown, _ = model.decoder.decode(kept, {})
    assert torch.equal(model.decoder.encode(shown), kept)
    assert torch.equal(model.commit(kept.float(), inputs), kept)


@pytest.mark.parametrize(
    "frames", [torch.zeros(1, 2, 24, 25, 3), torch.zeros(1, 2, 24, 24, 4), torch.zeros(2, 24, 24, 3)]
)
def test_the_codec_names_the_size_that_it_takes(frames: Tensor):
    codec = PatchCodec(SMALL, torch.device("cpu"))
    with pytest.raises(InputError, match=r"frames must be uint8 \[B, F, 24, 24, 3\], got uint8"):
        codec.encode(frames.to(torch.uint8))
    with pytest.raises(InputError, match="got float32"):
        codec.encode(torch.zeros(1, 2, 24, 24, 3))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"size": 100}, "size must be a multiple of patch_height, got 100 and 12"),
        ({"refine": 5}, "refine must be 0 or at least 6"),
        ({"width": 100}, "width / heads must be 64, got width 100 and 4 heads"),
        ({"heads": 3}, "width / heads must be 64"),
        ({"heads": 0}, "heads must be an integer of at least 1, got 0"),
        ({"depth": 2.0}, "depth must be an integer of at least 1, got 2.0"),
        ({"window": 0}, "window must be an integer of at least 1"),
        ({"memory": -1}, "memory must be an integer of at least 0"),
        ({"camera": "fisheye"}, "camera must be one of ray, projective, both, got 'fisheye'"),
    ],
)
def test_unusable_configurations_are_refused(values: dict[str, object], text: str):
    with pytest.raises(InputError, match=text):
        CourtyardConfig(**values)  # type: ignore[arg-type]


def test_the_shipped_configuration_has_the_parameters_that_the_registry_tells():
    from worldstride.models.registry import find

    count = parameter_count(CourtyardNetwork(CourtyardConfig()))
    assert find("courtyard").parameters == f"{count / 1e6:.1f} M"


def test_random_weights_are_reproducible_and_leave_the_global_generator_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    a, b, other = random_network(SMALL), random_network(SMALL), random_network(SMALL, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert not torch.equal(a.blocks[0].q.weight, other.blocks[0].q.weight)
    assert all(bool(p.any()) for p in a.parameters() if p.dim() >= 2)
    assert not any(p.requires_grad for p in a.parameters())


def test_without_refinement_the_network_still_predicts():
    net = network("both", refine=0)
    assert net.refine is None
    assert predict(net, cameras(1, 5), cameras(1, 4)).shape == (1, 4, SMALL.tokens, SMALL.values)


def test_the_trainers_weights_load_as_they_were_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "training" / "courtyard"))
    import checkpoint

    saved = random_network(SMALL)
    path = tmp_path / "new" / "weights.safetensors"
    checkpoint.save_weights(path, saved, SMALL, {"step": 3})
    loaded, mark = read_network(path)
    assert loaded.config == SMALL
    assert len(mark) == 64
    for name, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.half().float())
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["training"]) == {"step": 3}
    sys.modules.pop("checkpoint")


def test_a_fingerprint_outlives_settings_that_came_later():
    """Saves name the weights that they were made with: these must stay those that they are."""
    tensors = {"a": torch.arange(3.0)}
    assert fingerprint(CourtyardConfig(), tensors).startswith("f48a69e07127")
    assert fingerprint(CourtyardConfig(context="apart"), tensors) != fingerprint(CourtyardConfig(), tensors)


def test_loading_leaves_the_callers_random_numbers_alone():
    before = torch.get_rng_state()
    worldstride.load("courtyard", dtype=torch.float32)
    worldstride.load("courtyard", weights="random", dtype=torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_cameras_intrinsics_are_refused():
    model = CourtyardModel(network("both"), torch.float32)
    wide = Conditions(0, torch.eye(4)[None, None], torch.eye(4)[None, None], torch.eye(3), positions=torch.zeros(1))
    with pytest.raises(InputError, match="knows one camera"):
        model.prepare(wide)


def test_geometry_and_worlds_share_camera_and_eye_height():
    assert (geometry_of.FIELD_OF_VIEW, geometry_of.EYE_HEIGHT) == (worlds.FOV, worlds.EYE)


@pytest.mark.parametrize(("view", "reached"), [("together", range(10)), ("clips", [6, 7, 8, 9]), ("apart", [8])])
def test_what_context_frames_see(view: ContextView, reached: Sequence[int]):
    """10 frames, the last 6 of them recent: 2 that are left of a chunk, and a chunk. Frame 8 changes."""
    config = replace(SMALL, context=view)
    model = CourtyardModel(random_network(config).eval(), torch.float32)
    latents = normal(1, 10, *model.latent_shape)
    other = latents.clone()
    other[:, 8] = 0
    ranks, cameras = torch.arange(-10, 0), torch.eye(4).expand(1, 10, 4, 4)
    kinds = (ranks < -6).long()
    made = [
        model.encode_context(Recalled(x, cameras, ranks, kinds), None, attend).keys_values for x in (latents, other)
    ]
    changed = sum(
        (a[1] - b[1]).abs().unflatten(2, (10, -1)).flatten(3).sum((0, 1, 3)) for a, b in zip(*made, strict=True)
    )
    assert (changed > 1e-6).nonzero().flatten().tolist() == list(reached)


def test_a_config_names_what_context_frames_may_see():
    assert replace(SMALL, context="clips").spans(5, 10) == [(5, 1), (2, 2), (8, 4)]
    assert replace(SMALL, context="clips").spans(0, 8) == [(8, 4)]
    assert SMALL.spans(5, 8) == [(13, 13)]
    assert SMALL.spans(0, 0) == []
    with pytest.raises(InputError, match="context must be one of together, clips, apart, got 'alone'"):
        replace(SMALL, context="alone")  # type: ignore[arg-type]


def test_what_sees_only_itself_ignores_what_else_is_kept():
    model = CourtyardModel(random_network(replace(SMALL, context="apart")).eval(), torch.float32)
    latents, ranks, cameras = normal(1, 6, *model.latent_shape), torch.arange(-6, 0), torch.eye(4).expand(1, 6, 4, 4)
    zeros = torch.zeros(6, dtype=torch.long)
    first = model.encode_latents(Recalled(latents[:, :2], cameras[:, :2], ranks[:2], zeros[:2]), None, attend)
    past = model.join_context(first.unbind(1), Recalled(latents[:, :0], cameras[:, :2], ranks[:2], zeros[:2]))
    after, alone = (
        model.encode_latents(Recalled(latents[:, 2:], cameras[:, 2:], ranks[2:], zeros[2:]), seen, attend)
        for seen in (past, None)
    )
    assert torch.equal(after, alone)
