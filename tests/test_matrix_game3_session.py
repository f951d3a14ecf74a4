"""Matrix-Game-3.0 in a live session: keys and mouse lead to the recorded latents, and the world stays whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import worldstride
from hy_variants import latents
from mg3_golden import CHUNKS, actions, begin, case, engine, expected, model, noise, published
from worldstride import Acceleration, Action, Session
from worldstride.denoising.solvers import UniPC
from worldstride.errors import InputError
from worldstride.models.matrix_game3 import rays, retrieval
from worldstride.models.matrix_game3.adapter import FIRST, MG3Context, MG3Inputs
from worldstride.models.matrix_game3.controls import CONTROLS
from worldstride.models.matrix_game3.weights import build
from worldstride.protocol import Conditions, Recalled
from worldstride.testing import check_model

FORWARD, TURN = Action({"KeyW"}), Action({"ArrowRight"})


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def played(session: Session, chunks: int = 3) -> list[Any]:
    """The recorded actions and noise, and what came of them."""
    return [session.step(actions(*CHUNKS[k]), noise=noise(k)) for k in range(chunks)]


def test_keys_and_mouse_lead_to_the_recorded_latents():
    session = begin()
    chunks = played(session)
    assert far(latents(session), expected()) < 1e-5
    assert [len(c.frames) for c in chunks] == [57, 40, 40]
    for k in (1, 2):
        assert list(chunks[k].report.context.memory) == case()[f"c{k}/memory_latent_idx"].tolist()
        similarity = chunks[k].report.signals.similarity
        assert similarity[:4] == pytest.approx(case()[f"c{k}/confidence"][:4].tolist(), abs=1e-6)
    assert chunks[2].report.context_latents == 5
    assert torch.equal(latents(session)[:1], case()["image_latent"][0].transpose(0, 1))


def test_a_save_in_between_changes_nothing(tmp_path: Path):
    session = begin()
    played(session, 2)
    session.save(tmp_path / "a.world")
    opened = worldstride.open(tmp_path / "a.world", engine=session.engine)
    chunks = [s.step(actions(*CHUNKS[2]), noise=noise(2)) for s in (session, opened)]
    assert np.array_equal(chunks[0].frames, chunks[1].frames)
    assert torch.equal(latents(opened), latents(session))
    assert far(latents(opened), expected()) < 1e-5
    assert opened.history.entries[20].shown.actions == session.history.entries[20].shown.actions
    assert len(opened.history.entries[20].shown.actions) == 4


def test_forks_go_on_alike():
    session = begin()
    played(session, 2)
    other = session.fork()
    made = [s.step(FORWARD, noise=noise(2)).frames for s in (session, other)]
    assert np.array_equal(*made)


def test_cameras_lead_to_the_same_latents_as_the_actions_behind_them():
    """What keyboard and mouse did is read off the cameras."""
    steered, led = begin(), begin()
    played(steered)
    paths = [torch.from_numpy(c.cameras) for c in played(begin())]
    for k, path in enumerate(paths):
        led.step(cameras=path, noise=noise(k))
    assert far(latents(led)[:FIRST], latents(steered)[:FIRST]) < 1e-4
    assert far(latents(led)[FIRST:25], latents(steered)[FIRST:25]) < 0.2  # the last frame's keys are not known


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16], ids=str)
def test_the_model_keeps_the_contract(storage: torch.dtype):
    check_model(model(storage), {"text": case()["context"][None]}, chunks=(0, 1))


def guided_prompt() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {"text": case()["context"][None], "negative_text": torch.randn(1, 4, 32, generator=generator)}


def test_a_guided_model_asks_twice_the_second_time_without_memory(monkeypatch: pytest.MonkeyPatch):
    """The second time with the negative prompt, without actions and memory."""
    of = model(guidance=5.0)
    seen = list[tuple[int, int]]()
    plain = of.velocity

    def velocity(x: Tensor, sigma: float, inputs: MG3Inputs, context: MG3Context, attend: Any) -> Any:
        seen.append((inputs.branch, 0 if context.prepared[inputs.branch].memory == 0 else context.latents))
        assert inputs.branch == 0 or (bool((inputs.keys == -1).all()) and bool((inputs.mouse == 1).all()))
        return plain(x, sigma, inputs, context, attend)

    monkeypatch.setattr(of, "velocity", velocity)
    session = engine(of).open(torch.zeros(1, 64, 96, 3, dtype=torch.uint8), torch.eye(4)[None], guided_prompt())
    session.step(FORWARD)
    session.step(TURN)
    assert seen == [(0, 0), (1, 0)] * 3 + [(0, 5), (1, 0)] * 3
    with pytest.raises(InputError, match="needs encoder states named 'negative_text'"):
        engine(of).open(
            torch.zeros(1, 64, 96, 3, dtype=torch.uint8), torch.eye(4)[None], {"text": case()["context"][None]}
        ).step()


def test_guided_latents_are_those_of_the_formula(monkeypatch: pytest.MonkeyPatch):
    """A model that guides itself, by v0 + 5 (v1 - v0), makes what the loop makes of one that does not."""
    guided, own = model(guidance=5.0), model(guidance=5.0)
    prepare, velocity, sampler, branches = own.prepare, own.velocity, own.sampler, list[MG3Inputs]()

    def prepared(conditions: Conditions) -> tuple[MG3Inputs, ...]:
        branches[:] = prepare(conditions)
        return tuple(branches)

    def led(x: Tensor, sigma: float, _: MG3Inputs, *rest: Any) -> tuple[Tensor, dict[str, Any]]:
        with_text, without = (velocity(x, sigma, inputs, *rest)[0] for inputs in branches)
        return without + 5 * (with_text - without), {}

    monkeypatch.setattr(own, "prepare", prepared)
    monkeypatch.setattr(own, "velocity", led)
    monkeypatch.setattr(own, "sampler", lambda *given: replace(sampler(*given), guidance=None))
    start = (torch.zeros(1, 64, 96, 3, dtype=torch.uint8), torch.eye(4)[None])
    told = {"text": case()["context"][None]}
    begun = [engine(of).open(*start, guided_prompt()) for of in (guided, own)] + [engine(model()).open(*start, told)]
    for session in begun:
        session.step(FORWARD)
        session.step(TURN)
    made, formula, plain = map(latents, begun)
    assert far(made, formula) < 1e-5
    assert far(made, plain) > 0.05


def test_the_schedule_of_fifty_steps():
    sigmas = model(guidance=5.0).sampler(50).sigmas
    assert [int(1000 * s) for s in sigmas[:4]] == [999, 995, 991, 987]
    assert sigmas[-2:] == pytest.approx((0.0925, 0), abs=5e-5)
    assert len(sigmas) == 51


def test_levels_are_rounded_as_on_a_gpu_if_asked_for(monkeypatch: pytest.MonkeyPatch):
    for rounded, levels in ((False, [999.0, 908.0, 713.0]), (True, [1000.0, 908.0, 712.0])):
        of, seen = model(rounded=rounded), list[float]()
        plain = of.network.velocity

        def velocity(x: Tensor, heights: Tensor, *rest: Any, plain: Any = plain, seen: list[float] = seen) -> Tensor:
            assert bool((heights[:, 0] == 0).all())
            seen.append(float(heights.max()))
            return plain(x, heights, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(of.network, "velocity", velocity)
            begin(engine(of)).step(FORWARD)
        assert seen == levels


def test_the_solver_is_its_closed_form():
    """Of three steps (specification, section 1)."""
    sigmas = model().sampler().sigmas
    assert sigmas == pytest.approx((0.9998, 0.90884, 0.71398, 0), abs=2e-5)
    generator = torch.Generator().manual_seed(0)
    x0, v0, v1, v2 = (torch.randn(1, 2, 3, generator=generator).double() for _ in range(4))
    solver, x = UniPC(sigmas), x0
    made = []
    for i, v in enumerate((v0, v1, v2)):
        x = solver.step(i, x, v, lambda i: x0)
        made.append(x)
    assert torch.allclose(made[0], x0 - 0.0909570 * v0, atol=1e-6)
    assert torch.allclose(made[1], x0 - 0.0367763 * v0 - 0.2490441 * v1, atol=1e-6)
    assert torch.allclose(made[2], x0 - 0.0367763 * v0 - 0.2490441 * v1 - 0.7139794 * v2, atol=1e-6)


def test_what_is_brought_back_can_be_named():
    session = begin()
    played(session, 1)
    report = session.step(FORWARD, recall=[3, 3, 9, 2, 1]).report
    assert report.context.memory == (3, 3, 9, 2, 1)
    with pytest.raises(InputError, match="recall must name 5"):
        session.step(FORWARD, recall=[1, 2])
    with pytest.raises(InputError, match="recall must name 5"):
        session.step(FORWARD, recall=[1, 2, 3, 4, 99])


def test_a_world_needs_its_words_and_one_image():
    of = engine()
    picture, eye = torch.zeros(1, 64, 96, 3, dtype=torch.uint8), torch.eye(4)
    with pytest.raises(InputError, match="needs encoder states named 'text'"):
        of.open(picture, eye[None]).step()
    with pytest.raises(InputError, match="unknown prompt states vision; known: image, negative_text"):
        of.open(picture, eye[None], {"text": case()["context"][None], "vision": eye}).step()
    with pytest.raises(InputError, match="begins with one image, got 2 frames"):
        of.open(picture.repeat(2, 1, 1, 1), eye.repeat(2, 1, 1), {"text": case()["context"][None]})
    with pytest.raises(InputError, match=r"text_mask must be \[1, 5\] like the text, got \[1, 4\]"):
        of.open(picture, eye[None], {"text": case()["context"][None], "text_mask": torch.ones(1, 4)}).step()
    with pytest.raises(InputError, match="needs to know the coming chunk"):
        none = torch.zeros(1, 0, *of.model.latent_shape)
        of.model.encode_context(Recalled(none, eye[None, :0], torch.zeros(0), torch.zeros(0)), None, of.attention)


def test_rows_that_are_masked_are_padding():
    of, text = model(), case()["context"][None]
    more = torch.cat([text, torch.ones(1, 2, 32)], 1)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    plain, masked = (
        of.encode_prompt(p, engine().attention) for p in ({"text": text}, {"text": more, "text_mask": mask})
    )
    for one, other in zip(plain.branches[0].pairs, masked.branches[0].pairs, strict=True):
        assert all(map(torch.equal, one, other))


def test_a_long_walk_goes_on():
    """Numbers of latents grow without bound; here they begin beyond any table that upstream has."""
    of = model()
    prepared = of.network.prepared
    seen = list[Tensor]()

    def shifted(cameras: Tensor, numbers: Tensor, *rest: Any) -> Any:
        seen.append(numbers)
        return prepared(cameras, numbers + 100_000, *rest)

    plain, moved = begin(engine(of)), begin(engine(model()))
    for k in range(2):
        plain.step(actions(*CHUNKS[k]), noise=noise(k))
    moved.engine.model.network = of.network  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of.network, "prepared", shifted)
        for k in range(2):
            moved.step(actions(*CHUNKS[k]), noise=noise(k))
    assert seen[1][-1] == 24
    assert far(latents(moved), latents(plain)) < 1e-3  # only differences of places count


def test_controls_are_the_models():
    session = begin()
    session.step([TURN] * 57)
    turned = torch.from_numpy(session.camera)[:3, :3]
    assert torch.rad2deg(torch.acos(((turned.trace() - 1) / 2).clamp(-1, 1))) == pytest.approx(84, abs=0.1)
    assert session.engine.controls == CONTROLS
    assert len(retrieval.frustum()) == 1000


@pytest.fixture(autouse=True)
def _no_gradients(no_gradients: None) -> None:
    """Direct calls of the network need none."""


def test_the_last_block_computes_what_is_read_alone():
    """New latents' velocity is the same whether or not that of given ones is asked for."""
    of, asked = model(), list[Tensor]()
    session = begin(engine(of))
    plain = of.network.velocity

    def both(x: Tensor, levels: Tensor, memory: Any, chunk: Any, text: Any, attend: Any, given: int, *_: Any) -> Tensor:
        part = plain(x, levels, memory, chunk, text, attend, given)
        whole = plain(x, levels, memory, chunk, text, attend, 0)[:, given:]
        asked.append((part - whole).abs().max() / part.abs().max())
        return part

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of.network, "velocity", both)
        session.step(FORWARD)
        session.step(TURN)
    assert len(asked) == 6
    assert float(torch.stack(asked).max()) < 1e-5


def test_compiled_blocks_give_the_same():
    of = model()
    of.network = build(of.config, published(), "the golden case")  # whose blocks are compiled
    of.compile_passes()
    session = begin(engine(of))
    played(session, 2)
    assert far(latents(session), expected()[:25]) < 1e-5
    torch.compiler.reset()


@pytest.mark.parametrize(("memory", "kept"), [(0, ()), (1, (1,)), (3, (6, 7, 1)), (5, (6, 7, 9, 10, 1))])
def test_memory_may_be_bounded(memory: int, kept: tuple[int, ...]):
    """The sink's slot is the last to go; a slot keeps the view that it is told relative to."""
    session = begin()
    played(session, 1)
    session.acceleration = Acceleration("bounded", memory=memory)
    seen = list[Tensor]()
    plain = rays.recalled
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rays, "recalled", lambda cameras, of: (seen.append(of), plain(cameras, of))[1])
        report = session.step(actions(*CHUNKS[1]), noise=noise(1)).report
    assert report.context.memory == kept
    assert report.context_latents == memory
    if memory:
        new = session.history.cameras(slice(-10, None))
        asked = [*[9, 7, 5, 3][: memory - 1], 1]
        assert torch.allclose(seen[0][0].float(), new[asked])


def test_worlds_are_stepped_together():
    of = engine()
    one, two = begin(of), begin(of)
    for session in (one, two):
        session._state.prompt = one._state.prompt
    two._state.noise_seed = 5
    alone = [s.fork() for s in (one, two)]
    for action in (FORWARD, TURN):
        together = worldstride.step_together([one, two], actions=[action, action])
        apart = [s.step(action) for s in alone]
        assert [c.report.batch for c in together] == [2, 2]
        for made, other in zip(together, apart, strict=True):
            assert np.abs(made.frames.astype(int) - other.frames).max() <= 1
    assert far(latents(one), latents(alone[0])) < 1e-5
    assert far(latents(two), latents(alone[1])) < 1e-5
    assert not torch.equal(latents(one)[1:], latents(two)[1:])
