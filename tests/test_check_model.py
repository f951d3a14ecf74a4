"""`check_model` passes sound models of both structures and names every planted mistake."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import mg3_golden
from joint_model import JointContext, JointDecoder, JointInputs, JointModel
from worldstride.attention import Attend
from worldstride.engine import Engine
from worldstride.errors import ContractError
from worldstride.models.courtyard.adapter import CourtyardContext, CourtyardInputs, CourtyardModel
from worldstride.models.courtyard.config import CourtyardConfig
from worldstride.models.courtyard.weights import random_network
from worldstride.models.matrix_game3.adapter import MatrixGame3, MG3Context
from worldstride.protocol import ChunkShape, Conditions, Context, Recalled
from worldstride.testing import check_model

Velocity = tuple[Tensor, Mapping[str, Tensor]]


def test_the_courtyard_model_keeps_the_contract(tiny_engine: Engine):
    check_model(tiny_engine.model)


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("guidance", [None, 3.0])
def test_the_joint_model_keeps_the_contract(storage: torch.dtype, guidance: float | None):
    check_model(JointModel(storage, guidance))


class OneLevel(CourtyardModel):
    """Takes the first world's noise level for all."""

    def velocity(self, x, sigma, inputs, context, attend) -> Velocity:
        level = float(sigma[0]) if isinstance(sigma, Tensor) else sigma
        return super().velocity(x, level, inputs, context, attend)


class NarrowsToTheFirst(CourtyardModel):
    def narrow(self, inputs, context, rows) -> tuple[CourtyardInputs, CourtyardContext]:
        return super().narrow(inputs, context, range(len(rows)))


@pytest.mark.parametrize(("wrong", "text"), [(OneLevel, "a noise level for each world"), (NarrowsToTheFirst, "narrow")])
def test_a_model_that_narrows_parts_worlds(tiny_config: CourtyardConfig, wrong: type[CourtyardModel], text: str):
    with pytest.raises(ContractError, match=text):
        check_model(wrong(random_network(tiny_config).eval(), torch.float32))


class FreezesNothing(MatrixGame3):
    """Goes on with what was left behind of other latents."""

    def frozen(self, context, captured) -> MG3Context:
        wrong = tuple(block._replace(keys=block.keys.roll(1, 2)) for block in captured["frozen"])
        return super().frozen(context, {"frozen": wrong})


def test_a_model_that_freezes_its_context_keeps_what_it_needs():
    plain, prompt = mg3_golden.model(), {"text": mg3_golden.case()["context"][None]}
    wrong = FreezesNothing(plain.network, plain.decoder, plain.storage, rounded=False)
    with torch.inference_mode(), pytest.raises(ContractError, match="against a context frozen at the same noise"):
        check_model(wrong, prompt, chunks=(1,))


def test_a_prompt_reaches_the_model():
    seen = []

    class Listening(JointModel):
        def prepare(self, conditions: Conditions) -> tuple[JointInputs, ...]:
            seen.append(conditions.prompt["text"])
            return super().prepare(conditions)

    text = torch.arange(6.0)
    check_model(Listening(), {"text": text})
    assert all(torch.equal(t, text) for t in seen)


class RemembersContext(JointModel):
    """Serves the context that it encoded last instead of the one that it gets."""

    last: JointContext

    def encode_context(self, *args, **kwargs) -> Context:
        self.last = super().encode_context(*args, **kwargs)
        return self.last

    def velocity(self, x, sigma, inputs, context, attend) -> Velocity:
        return super().velocity(x, sigma, inputs, self.last, attend)


class RemembersInputs(JointModel):
    """Keeps the cameras of the last `prepare`."""

    last: JointInputs

    def prepare(self, conditions: Conditions) -> tuple[JointInputs, ...]:
        (self.last,) = super().prepare(conditions)
        return (self.last,)

    def velocity(self, x, sigma, inputs, context, attend) -> Velocity:
        return super().velocity(x, sigma, self.last, context, attend)


class Counts(JointModel):
    calls = 0

    def velocity(self, x, sigma, inputs, context, attend) -> Velocity:
        self.calls += 1
        velocity, captured = super().velocity(x, sigma, inputs, context, attend)
        return velocity + 1e-3 * self.calls, captured


class CountsWorlds(JointModel):
    """Repeats itself as long as the same world calls."""

    world, worlds = torch.zeros(0), 0

    def prepare(self, conditions: Conditions) -> tuple[JointInputs, ...]:
        self.worlds += not torch.equal(self.world, conditions.cameras)
        self.world = conditions.cameras.clone()
        return tuple(replace(made, hint=made.hint + self.worlds) for made in super().prepare(conditions))


class GlobalNoise(JointModel):
    def velocity(self, x, sigma, inputs, context, attend) -> Velocity:
        velocity, captured = super().velocity(x, sigma, inputs, context, attend)
        return velocity + 1e-3 * torch.randn_like(velocity), captured


class IgnoresContext(JointModel):
    def velocity(self, x, sigma, inputs, context, attend) -> Velocity:
        blank = replace(
            context, remembered=torch.zeros_like(context.remembered), cameras=torch.zeros_like(context.cameras)
        )
        return super().velocity(x, sigma, inputs, blank, attend)


class IgnoresContextCameras(JointModel):
    def velocity(self, x, sigma, inputs, context, attend) -> Velocity:
        blank = replace(context, cameras=torch.eye(4).expand(context.cameras.shape))
        return super().velocity(x, sigma, inputs, blank, attend)


class IgnoresConditions(JointModel):
    def prepare(self, conditions: Conditions) -> tuple[JointInputs, ...]:
        still = torch.eye(4).expand(conditions.cameras.shape)
        return super().prepare(replace(conditions, cameras=still, actions=()))


class ClampsNothing(JointModel):
    def clamp(self, x: Tensor, inputs: JointInputs) -> Tensor:
        return x


class ClampsTooMuch(JointModel):
    def clamp(self, x: Tensor, inputs: JointInputs) -> Tensor:
        out = super().clamp(x, inputs).clone()
        out[:, -1] = 0
        return out


class ClampsAgain(JointModel):
    def clamp(self, x: Tensor, inputs: JointInputs) -> Tensor:
        return super().clamp(x, inputs) * 0.5


class CommitsAll(JointModel):
    def commit(self, clean: Tensor, inputs: JointInputs) -> Tensor:
        return clean


class LiesAboutContext(JointModel):
    def velocity(self, x, sigma, inputs, context, attend) -> Velocity:
        return super().velocity(x, sigma, inputs, JointContext(**vars(context)), attend)

    def encode_context(self, recalled, previous, attend) -> Context:
        made = super().encode_context(recalled, previous, attend)

        class Lying(JointContext):
            latents = property(lambda self: self.remembered.shape[1] + 1)  # type: ignore[assignment]

        return Lying(**vars(made))


class WeighsNothing(JointModel):
    def encode_context(self, recalled, previous, attend) -> Context:
        made = super().encode_context(recalled, previous, attend)

        class Weightless(JointContext):
            bytes = 0  # type: ignore[assignment]

        return Weightless(**vars(made))


class ServesPrevious(JointModel):
    """Takes the last chunk's context for the new one but loses the cameras on the way."""

    def encode_context(self, recalled, previous, attend) -> Context:
        made = super().encode_context(recalled, previous, attend)
        return made if previous is None else replace(made, cameras=torch.zeros_like(made.cameras))


class WritesIntoContext(JointModel):
    def encode_context(self, recalled, previous, attend) -> Context:
        recalled.latents.clamp_(-0.5, 0.5)
        return super().encode_context(recalled, previous, attend)


class WritesIntoNoise(JointModel):
    def clamp(self, x: Tensor, inputs: JointInputs) -> Tensor:
        if inputs.clean is not None:
            x[:, : inputs.clean.shape[1]] = inputs.clean.to(x.dtype)
        return x


class WritesIntoConditions(JointModel):
    def prepare(self, conditions: Conditions) -> tuple[JointInputs, ...]:
        conditions.cameras[..., :3, 3] -= conditions.cameras[:, -1:, :3, 3].clone()
        return super().prepare(conditions)


class GivesNaN(JointModel):
    def velocity(self, x, sigma, inputs, context, attend) -> Velocity:
        velocity, captured = super().velocity(x, sigma, inputs, context, attend)
        return velocity / 0, captured


class CodecOf(JointModel):
    """The joint model with another decoder."""

    codec: type[JointDecoder]

    def __init__(self) -> None:
        super().__init__()
        self.decoder = self.codec(self.decoder._rgb)


class KeepsDecodeState(CodecOf):
    class codec(JointDecoder):  # noqa: N801
        carried: Mapping[str, Tensor] = {}

        def decode(self, latents: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            frames, self.carried = super().decode(latents, self.carried)
            return frames, {}


class KeepsDecodeStateOfOneWorld(CodecOf):
    """Starts anew for a fresh world, so that only two worlds in turn disturb each other."""

    class codec(JointDecoder):  # noqa: N801
        carried: Mapping[str, Tensor] = {}

        def decode(self, latents: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            frames, self.carried = super().decode(latents, self.carried if state else {})
            return frames, {"begun": torch.ones(1)}


class DecodesShort(CodecOf):
    class codec(JointDecoder):  # noqa: N801
        def decode(self, latents: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            frames, state = super().decode(latents, state)
            return frames[:, 1:], state


class DecodesFloats(CodecOf):
    class codec(JointDecoder):  # noqa: N801
        def decode(self, latents: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            frames, state = super().decode(latents, state)
            return frames.float(), state


class DecodesAnew(CodecOf):
    """Forgets the latent before at every chunk."""

    class codec(JointDecoder):  # noqa: N801
        def decode(self, latents: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            begun = {"last": latents[:, :1].float()} if state else {}
            return super().decode(latents, begun)


class WritesIntoLatents(CodecOf):
    class codec(JointDecoder):  # noqa: N801
        def decode(self, latents: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            return super().decode(latents.mul_(0.5), state)


class WritesIntoState(CodecOf):
    class codec(JointDecoder):  # noqa: N801
        def decode(self, latents: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            frames, after = super().decode(latents, state)
            for kept in state.values():
                kept.zero_()
            return frames, after


@pytest.mark.parametrize(
    ("mistake", "text"),
    [
        (RemembersContext, "encoding another world's context between two calls changed this one"),
        (RemembersInputs, "between two calls changed this one"),
        (Counts, "a chunk must be repeatable"),
        (GlobalNoise, "a chunk must be repeatable"),
        (CountsWorlds, "no rollout state may stay on the model"),
        (IgnoresContext, "the context is ignored"),
        (IgnoresContextCameras, "the context's cameras are ignored"),
        (IgnoresConditions, "the chunk's conditions are ignored"),
        (ClampsNothing, "clamp must put the given latents at the head"),
        (ClampsTooMuch, "clamp must leave new latents alone"),
        (ClampsAgain, "clamp must be idempotent"),
        (CommitsAll, r"commit gave shape \[1, 15, 4, 2, 3\], expected \[1, 14, 4, 2, 3\]"),
        (LiesAboutContext, "context.latents is 6, but 5 latents were encoded"),
        (WeighsNothing, "context.bytes must be positive"),
        (ServesPrevious, "with `previous` given changed the chunk"),
        (WritesIntoContext, "wrote into its inputs"),
        (WritesIntoNoise, "wrote into its inputs"),
        (WritesIntoConditions, "wrote into its inputs"),
        (WritesIntoLatents, "wrote into its inputs"),
        (WritesIntoState, "wrote into its inputs"),
        (GivesNaN, "NaN or infinity"),
        (KeepsDecodeState, "decode"),
        (KeepsDecodeStateOfOneWorld, "decoding chunk by chunk differs"),
        (DecodesShort, r"chunk 0 decodes to 56 frames, chunk\(0\) says 57"),
        (DecodesFloats, "decode must give uint8"),
        (DecodesAnew, "decoding chunk by chunk differs"),
    ],
)
def test_a_planted_mistake_is_named(mistake: type[JointModel], text: str):
    with pytest.raises(ContractError, match=text):
        check_model(mistake())


class OneNoise(CourtyardModel):
    """Draws its own noise at the first level, where the given noise should stand."""

    def velocity(self, x: Tensor, sigma: float, inputs: CourtyardInputs, context: Context, attend: Attend) -> Velocity:
        own = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        _, captured = super().velocity(own, sigma, inputs, context, attend)
        return (x - captured["clean"]) / sigma, captured


class Forgetful(CourtyardModel):
    def encode_context(
        self,
        recalled: Recalled,
        previous: Context | None,
        attend: Attend,
    ) -> CourtyardContext:
        blank = replace(recalled, latents=torch.zeros_like(recalled.latents))
        return super().encode_context(blank, previous, attend)


@pytest.mark.parametrize(
    ("mistake", "text"), [(OneNoise, "the noise that is passed in must be honoured"), (Forgetful, "context is ignored")]
)
def test_a_planted_mistake_in_a_model_with_cached_keys(
    mistake: type[CourtyardModel], text: str, tiny_config: CourtyardConfig
):
    with pytest.raises(ContractError, match=text):
        check_model(mistake(random_network(tiny_config).eval(), torch.float32))


def test_missing_members_are_listed():
    class Half:
        name = "half"

        def chunk(self, k: int) -> ChunkShape:
            return ChunkShape(1, 1)

    with pytest.raises(ContractError, match=r"Half lacks members of WorldModel: .*clamp.*commit.*velocity"):
        check_model(Half())  # type: ignore[arg-type]


def test_a_missing_decode_is_named():
    class Blind(JointModel):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = object()  # type: ignore[assignment]

    with pytest.raises(ContractError, match="encode and decode"):
        check_model(Blind())
