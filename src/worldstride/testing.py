"""An executable contract for world models: `check_model(model)` raises `ContractError` at the first broken promise.

The checks use only the protocol, so they hold for models with cached keys and values and for models that join
everything in one sequence. They run in a few evaluations of the model; use a small one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from worldstride.attention import attend
from worldstride.camera import camera_from_pose
from worldstride.control import Action
from worldstride.denoising import DenoisePlan, denoise
from worldstride.errors import ContractError, InputError
from worldstride.protocol import (
    KINDS,
    BeginsWithImage,
    ChunkShape,
    Conditions,
    Context,
    Decoder,
    EncodesPrompt,
    FreezesContext,
    LabelsMotion,
    Led,
    Narrows,
    Recalled,
    WorldModel,
)

_STEPS = 2


@dataclass(frozen=True)
class _Case:
    """Everything that one chunk of the model needs, made from a seed."""

    shape: ChunkShape
    latents: Tensor  # [1, N, ...]
    cameras: Tensor  # [1, N, 4, 4]
    positions: Tensor
    kinds: Tensor
    led: tuple[Led, ...]
    conditions: Conditions
    noise: Tensor

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of the remembered latents in their world."""
        return tuple(range(self.latents.shape[1]))


def check_model(
    model: WorldModel, prompt: Mapping[str, Tensor] | None = None, chunks: tuple[int, ...] = (0, 1), seed: int = 0
) -> None:
    """Check shapes, determinism, statelessness, use of noise, context, cameras and prompt, clamping, committing and
    decoding.

    `prompt` holds encoded text states for models that need them; a first image is made for those that begin with one.
    `chunks` are the chunk numbers to try.
    """
    _check(isinstance(model, WorldModel), f"{type(model).__name__} lacks members of WorldModel: {_lacking(model)}")
    _check(isinstance(model.decoder, Decoder), "model.decoder must offer encode and decode")
    with torch.inference_mode():
        given = dict(prompt or {})
        if isinstance(model, BeginsWithImage):
            given |= model.image_prompt(_pictures(model, 1, torch.Generator().manual_seed(seed)))
        encoded = model.encode_prompt(given, attend) if isinstance(model, EncodesPrompt) else None
        for k in chunks:
            case, other = (_case(model, k, given, encoded, s) for s in (seed, seed + 1))
            _check_chunk(model, case, other)
    _check_decoder(model, chunks, seed)
    _check_encoder(model, seed)


def _check_chunk(model: WorldModel, case: _Case, other: _Case) -> None:
    first = _rollout(model, case)
    total = case.shape.clean + case.shape.new
    expected = (1, total, *model.latent_shape)
    _check(tuple(first.shape) == expected, f"a finished chunk has shape {list(first.shape)}, expected {list(expected)}")
    _check(bool(first.isfinite().all()), "a finished chunk holds NaN or infinity")
    _check(torch.equal(first, _rollout(model, case)), "the same inputs gave other latents: a chunk must be repeatable")

    _rollout(model, other)
    _check(
        torch.equal(first, _rollout(model, case)),
        "another world's chunk changed this one: no rollout state may stay on the model",
    )
    context, inputs = _context(model, case), model.prepare(case.conditions)
    _encode_between = _context(model, other)
    model.prepare(other.conditions)
    _check(
        torch.equal(first, _denoise(model, case, inputs, context, case.noise)),
        "encoding another world's context between two calls changed this one: contexts must not share memory or state",
    )
    _check(
        _far(first, _denoise(model, case, inputs, context, other.noise)),
        "other noise gave the same latents: the noise that is passed in must be honoured",
    )
    _check(
        not torch.equal(first, _rollout(model, replace(case, conditions=_steered(model, case, other)))),
        "other cameras and actions gave the same latents: the chunk's conditions are ignored",
    )
    _check_context(model, case, other, first, context, inputs)
    if isinstance(model, Narrows):
        _check_parting(model, model, case, other)
    if isinstance(model, FreezesContext):
        _check_freezing(model, model, case, context, inputs)
    if isinstance(model, EncodesPrompt):
        _check_prompt(model, model, case, first)
    _check_given(model, case, inputs, first)


def _check_context(
    model: WorldModel, case: _Case, other: _Case, first: Tensor, context: Context, inputs: tuple[object, ...]
) -> None:
    count = case.latents.shape[1]
    if not count:
        return
    _check(context.latents == count, f"context.latents is {context.latents}, but {count} latents were encoded")
    _check(context.bytes > 0, f"context.bytes must be positive, got {context.bytes}")
    swapped = _Case(**{**vars(case), "latents": other.latents})
    changed = _denoise(model, case, inputs, _context(model, swapped), case.noise)
    _check(not torch.equal(first, changed), "other context latents gave the same chunk: the context is ignored")
    moved = _Case(**{**vars(case), "cameras": other.cameras})
    changed = _denoise(model, case, inputs, _context(model, moved), case.noise)
    _check(
        not torch.equal(first, changed), "other context cameras gave the same chunk: the context's cameras are ignored"
    )
    with _untouched(case.latents, case.cameras):
        again = model.encode_context(_recalled(model, case), context, attend)
    _check(
        torch.equal(first, _denoise(model, case, inputs, again, case.noise)),
        "encoding the same context with `previous` given changed the chunk",
    )


def _check_parting(model: WorldModel, parts: Narrows, case: _Case, other: _Case) -> None:
    """Two worlds of a batch at noise levels of their own, and one of them alone, are what they are by themselves."""
    levels, both = (0.9, 0.4), _joined(case, other)
    context, inputs = _context(model, both), model.prepare(both.conditions)[0]
    sigma = torch.tensor(levels, device=model.device)
    together, _ = parts.velocity(both.noise, sigma, inputs, context, attend)
    for i, (one, level) in enumerate(zip((case, other), levels, strict=True)):
        alone, _ = model.velocity(one.noise, level, model.prepare(one.conditions)[0], _context(model, one), attend)
        narrowed = model.velocity(one.noise, level, *parts.narrow(inputs, context, [i]), attend)[0]
        bound = 0.05 * float(alone.float().abs().max())  # sums of a batch round otherwise
        _check(
            float((together[i : i + 1] - alone).abs().max()) <= bound,
            "a model that narrows must take a noise level for each world of a batch: a world came out otherwise",
        )
        _check(float((narrowed - alone).abs().max()) <= bound, f"narrow to world {i} of a batch gave another world")


def _check_freezing(
    model: WorldModel, freezes: FreezesContext, case: _Case, context: Context, inputs: tuple[object, ...]
) -> None:
    """What an evaluation leaves behind says all of the context that the same evaluation needs."""
    x, level = model.clamp(case.noise, inputs[0]), 0.9
    whole, _ = model.velocity(x, level, inputs[0], context, attend)
    same, captured = model.velocity(x, level, inputs[0], freezes.capturing(context), attend)
    _check(torch.equal(whole, same), "an evaluation that captures came out otherwise")
    alone, _ = model.velocity(x, level, inputs[0], freezes.frozen(context, captured), attend)
    bound = 0.05 * float(whole.float().abs().max())  # sums of fewer tokens may round otherwise
    _check(
        alone.shape == whole.shape and float((alone - whole).abs().max()) <= bound,
        "against a context frozen at the same noise and latents the velocity came out otherwise",
    )


def _check_prompt(model: WorldModel, encodes: EncodesPrompt, case: _Case, first: Tensor) -> None:
    """What a prompt is encoded as depends on it and on nothing else."""
    prompt = case.conditions.prompt
    other = {name: -t if t.is_floating_point() else t for name, t in prompt.items()}
    with _untouched(*prompt.values()):
        results = [
            _rollout(model, replace(case, conditions=replace(case.conditions, prompt=of, encoded=made)))
            for of, made in ((of, encodes.encode_prompt(of, attend)) for of in (other, prompt))
        ]
    _check(not torch.equal(first, results[0]), "another prompt gave the same latents: the prompt is ignored")
    _check(torch.equal(first, results[1]), "encoding the same prompt again gave other latents")


def _joined(case: _Case, other: _Case) -> _Case:
    """Both worlds as one batch."""

    def pair(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b])

    one, two = case.conditions, other.conditions
    clean = None if one.clean is None or two.clean is None else pair(one.clean, two.clean)
    conditions = replace(
        one, cameras=pair(one.cameras, two.cameras), frame_cameras=pair(one.frame_cameras, two.frame_cameras),
        clean=clean,
    )  # fmt: skip
    return replace(
        case, latents=pair(case.latents, other.latents), cameras=pair(case.cameras, other.cameras),
        conditions=conditions, noise=pair(case.noise, other.noise),
    )  # fmt: skip


def _check_given(model: WorldModel, case: _Case, inputs: tuple[object, ...], first: Tensor) -> None:
    clean, head = case.conditions.clean, case.shape.clean
    with _untouched(case.noise):
        once = model.clamp(case.noise, inputs[0])
    _check(torch.equal(once, model.clamp(once, inputs[0])), "clamp must be idempotent")
    image = int(isinstance(model, BeginsWithImage) and case.conditions.index == 0)  # a world's first latent may be its
    _check(torch.equal(once[:, head + image :], case.noise[:, head + image :]), "clamp must leave new latents alone")
    if clean is not None:
        same = torch.allclose(once[:, :head].float(), clean.float(), atol=1e-2, rtol=1e-2)
        _check(same, "clamp must put the given latents at the head of the chunk")
    kept = model.commit(first, inputs[0])
    expected = (1, case.shape.new, *model.latent_shape)
    _check(tuple(kept.shape) == expected, f"commit gave shape {list(kept.shape)}, expected {list(expected)}")


def _check_decoder(model: WorldModel, chunks: tuple[int, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pieces = [
        torch.randn(1, model.chunk(k).new, *model.latent_shape, generator=generator).clamp(-1, 1).to(model.device)
        for k in chunks
    ]
    with torch.inference_mode():
        state: Mapping[str, Tensor] = {}
        frames = []
        for k, piece in zip(chunks, pieces, strict=True):
            with _untouched(piece, *state.values()):
                part, state = model.decoder.decode(piece, state)
            model.decoder.decode(-piece, {})  # another world in between
            expected = model.chunk(k).frames
            _check(
                part.dtype == torch.uint8 and part.ndim == 5,
                f"decode must give uint8 [B, F, H, W, 3], got {part.dtype}",
            )
            _check(
                part.shape[1] == expected, f"chunk {k} decodes to {part.shape[1]} frames, chunk({k}) says {expected}"
            )
            frames.append(part)
        whole, _ = model.decoder.decode(torch.cat(pieces, 1), {})
        again, _ = model.decoder.decode(pieces[0], {})
    _check(
        torch.equal(again, frames[0]), "a fresh decode after others differs: no decode state may stay on the decoder"
    )
    streamed = torch.cat(frames, 1)
    close = streamed.shape == whole.shape and int((streamed.int() - whole.int()).abs().max()) <= 1
    _check(close, "decoding chunk by chunk differs from decoding at once by more than one level")


def _check_encoder(model: WorldModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        one, two = (_pictures(model, model.chunk(0).frames, generator) for _ in range(2))
        height, width = one.shape[2:4]
        with _untouched(one):
            first = model.decoder.encode(one)
        model.decoder.encode(two)
        _check(
            tuple(first.shape[2:]) == tuple(model.latent_shape) and first.shape[1] >= 1,
            f"encode gave shape {list(first.shape)}, expected [1, T, {', '.join(map(str, model.latent_shape))}]",
        )
        _check(torch.equal(first, model.decoder.encode(one)), "encoding the same frames again gave other latents")
        try:
            model.decoder.encode(one[:, :, 1:])
        except InputError:
            return
    raise ContractError(f"encode must raise InputError on frames of {height - 1} x {width}, one row short")


def _pictures(model: WorldModel, count: int, generator: torch.Generator) -> Tensor:
    """Random frames uint8 [1, count, H, W, 3] of the model's size."""
    probe, _ = model.decoder.decode(torch.zeros(1, 1, *model.latent_shape, device=model.device), {})
    return torch.randint(256, (1, count, *probe.shape[2:4], 3), generator=generator).byte()


def _recalled(model: WorldModel, case: _Case) -> Recalled:
    """What the context is made of."""
    made = case.conditions.encoded
    return Recalled(
        case.latents, case.cameras, case.positions, case.kinds, case.led, prompt=made, numbers=case.numbers,
        inputs=model.prepare(case.conditions),
    )  # fmt: skip


def _led(model: WorldModel, cameras: Tensor, before: Tensor | None) -> tuple[Led, ...] | None:
    """Labels of latents with cameras [1, T, 4, 4] that follow those before [1, N, 4, 4]; None without labels."""
    if not isinstance(model, LabelsMotion):
        return None
    return model.label(cameras[0], before[0, -1] if before is not None and before.shape[1] else None)


def _case(model: WorldModel, k: int, prompt: dict[str, Tensor], encoded: Any, seed: int) -> _Case:
    shape = model.chunk(k)
    generator = torch.Generator().manual_seed(1000 * seed + k)
    count = shape.sink + shape.memory + shape.window
    kinds = [KINDS.index("sink")] * shape.sink + [KINDS.index("memory")] * shape.memory + [0] * shape.window

    def latents(n: int) -> Tensor:
        return torch.randn(1, n, *model.latent_shape, generator=generator).clamp(-1, 1).to(model.device)

    def cameras(n: int) -> Tensor:
        pose = torch.randn(1, n, 4, generator=generator) * torch.tensor([1.0, 1.0, 1.0, 0.1])
        return camera_from_pose(pose)

    total = shape.clean + shape.new
    conditions = Conditions(
        k, cameras(total), cameras(shape.frames), model.intrinsics, (Action(),) * shape.frames,
        torch.arange(-shape.clean, shape.new), latents(shape.clean) if shape.clean else None, prompt, encoded,
    )  # fmt: skip
    positions, remembered, past = torch.arange(-count, 0) - shape.clean, latents(count), cameras(count)
    # labels, or some latents that were steered by actions and some that were not
    led = _led(model, past, None) or tuple(Action({"KeyW"}) if i % 2 else None for i in range(count))
    conditions = replace(conditions, led=_led(model, conditions.cameras[:, shape.clean :], past) or ())
    return _Case(shape, remembered, past, positions, torch.tensor(kinds), led, conditions, latents(total))


def _steered(model: WorldModel, case: _Case, other: _Case) -> Conditions:
    """The case's chunk, steered elsewhere."""
    head = case.shape.clean
    cameras, actions = other.conditions.cameras.clone(), (Action(frozenset({"KeyW"})),) * case.shape.frames
    cameras[:, :head] = case.conditions.cameras[:, :head]
    return replace(
        case.conditions, cameras=cameras, frame_cameras=other.conditions.frame_cameras, actions=actions,
        led=_led(model, cameras[:, head:], case.cameras) or (),
    )  # fmt: skip


def _context(model: WorldModel, case: _Case) -> Context:
    with _untouched(case.latents, case.cameras):
        return model.encode_context(_recalled(model, case), None, attend)


def _denoise(model: WorldModel, case: _Case, inputs: tuple[object, ...], context: Context, noise: Tensor) -> Tensor:
    sampler = model.sampler()
    if sampler.steps > _STEPS and sampler.guidance is None and sampler.solver == "euler":
        sampler = model.sampler(_STEPS)
    with _untouched(noise):
        return denoise(model, noise, inputs, context, DenoisePlan(sampler), attend, lambda _: noise)[0]


def _rollout(model: WorldModel, case: _Case) -> Tensor:
    given = case.conditions
    with _untouched(given.cameras, given.frame_cameras, *([] if given.clean is None else [given.clean])):
        context = _context(model, case)
        return _denoise(model, case, model.prepare(given), context, case.noise)


@contextmanager
def _untouched(*tensors: Tensor) -> Iterator[None]:
    before = [t.clone() for t in tensors]
    yield
    _check(all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True)), "the model wrote into its inputs")


def _far(a: Tensor, b: Tensor) -> bool:
    """Whether a and b differ by more than what rounding in float32 carries from one to the other."""
    return float((a.float() - b.float()).abs().max()) > 1e-4 * float(a.float().abs().max())


def _check(holds: bool, text: str) -> None:
    if not holds:
        raise ContractError(text)


def _lacking(model: object) -> str:
    names = [n for n in vars(WorldModel) if not n.startswith("_") and not hasattr(model, n)]
    return ", ".join(sorted(names)) or "none"
