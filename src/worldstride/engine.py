"""An engine owns a model and its decoder on a device; it holds no rollout state, so any number of worlds share it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from worldstride import noise as noises
from worldstride import worlds
from worldstride.acceleration import Acceleration, resolve
from worldstride.attention import Dense, Layout, rates
from worldstride.attention.cost import Rates
from worldstride.beside import Beside
from worldstride.camera import camera_from_pose, check_cameras
from worldstride.context.history import History
from worldstride.context.retrieval import frustum_points
from worldstride.control import ControlSettings
from worldstride.errors import InputError, integer_from
from worldstride.models.quantised import Scheme
from worldstride.models.registry import find
from worldstride.navigation import FreeNavigator, SceneNavigator
from worldstride.protocol import (
    BeginsWithImage,
    Compilable,
    EncodesPrompt,
    Navigates,
    Navigator,
    Quantises,
    Recalls,
    WorldModel,
)
from worldstride.session import Session
from worldstride.state import SessionState

Weights = Literal["pretrained", "random"]


@dataclass(frozen=True)
class EngineSource:
    """Where an engine's weights came from, as a save records it."""

    model: str
    path: str | None
    weights: Weights
    fingerprint: str
    """SHA-256 of the weights, so that a save is never continued with others."""
    dtype: str = "float32"
    """Precision that the model computes in."""
    compiled: bool = False
    """Whether `torch.compile` was asked for, which changes last bits."""
    decoder: str | None = None
    """Decoder that was chosen; None is the model's usual one."""
    quantised: Scheme | None = None
    """How weights were put in 8 bits; None where they were not."""


class Engine:
    """Made by `load`. `new` starts a session in a procedural world, `open` from given frames."""

    def __init__(
        self, model: WorldModel, source: EngineSource, acceleration: Acceleration,
        controls: ControlSettings | None = None, attention: Dense | None = None,
    ) -> None:  # fmt: skip
        self.model, self.source, self.acceleration = model, source, acceleration
        self.controls, self._attention = controls or ControlSettings(), attention
        self._rates: dict[int, Rates | None] = {}
        self._beside: Beside | None = None
        self.layouts: dict[object, Layout] = {}
        """Layouts of blocks that sessions have used: functions of sizes alone."""

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.device

    @property
    def attention(self) -> Dense:
        """How tokens attend. A GPU's choices are read, or measured in a few seconds, when they are first asked for."""
        if self._attention is None:
            self._attention = Dense.measured(self.device, getattr(torch, self.source.dtype))
        return self._attention

    def rates(self, channels: int) -> Rates | None:
        """What attention costs on a GPU, for heads of so many channels; None where no sparse kernel runs."""
        if channels not in self._rates:
            kind = getattr(torch, self.source.dtype)
            self._rates[channels] = rates.measured(self.attention, self.device, kind, channels)
        return self._rates[channels]

    @property
    def beside(self) -> Beside:
        """Where a GPU decodes chunks made ahead; one for all sessions, since each stream keeps memory of its own."""
        if self._beside is None:
            self._beside = Beside.of(self.device)
        return self._beside

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width of the model's frames in pixels, read off one decoded latent."""
        model = self.model
        with torch.inference_mode():
            frames, _ = model.decoder.decode(torch.zeros(1, 1, *model.latent_shape, device=model.device), {})
        return frames.shape[2], frames.shape[3]

    @property
    def wait(self) -> Callable[[], None]:
        """Waits for the device, so that clocks are read at the right moment; does nothing on a CPU."""
        device = self.device
        return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)

    def new(
        self, seed: int, noise_seed: int | None = None, family: str = "courtyard", points: Tensor | None = None
    ) -> Session:
        """A session in the procedural world `seed` of a family ("plain", "courtyard", "corridor").

        The renderer gives the first frames, the walls and the doors; the model dreams everything after. `noise_seed`
        defaults to `seed`. `points` [P, 3] replaces the sample points of retrieval that the seed would fix.
        """
        given = self.model.chunk(0).window
        scene = worlds.scene_from_seed(family, [seed])
        pose = worlds.sample_walk(scene, 64, noises.stream(seed, _WALK))[:, :given]
        time = torch.arange(given, dtype=torch.float32)[None]
        height, width = self.frame_size
        if height != width:
            raise InputError(f"procedural worlds render square frames; {self.model.name!r} shows {height} x {width}")
        frames = worlds.render(scene, pose, time, height)[0].movedim(1, -1)
        cameras = camera_from_pose(pose)[0]
        session = self._begin(frames, cameras, seed, noise_seed, {}, points, SceneNavigator(self.controls, scene))
        session._state.world = (family, seed)
        return session

    def open(
        self,
        frames: np.ndarray | Tensor,
        cameras: np.ndarray | Tensor,
        prompt: Mapping[str, Tensor] | None = None,
        seed: int = 0,
        noise_seed: int | None = None,
        points: Tensor | None = None,
    ) -> Session:
        """A session that goes on from frames uint8 [F, H, W, 3] with camera-to-world matrices [F, 4, 4].

        `prompt` holds encoded text states for models that take text. Raises `InputError` on a wrong frame size,
        on cameras that are not rigid, or when their numbers differ.
        """
        pictures = torch.as_tensor(np.ascontiguousarray(frames) if isinstance(frames, np.ndarray) else frames)
        poses = torch.as_tensor(cameras, dtype=torch.float32).cpu()
        check_cameras(poses)
        if len(pictures) != len(poses) or not len(poses):
            raise InputError(
                f"open needs as many cameras as frames and at least one, got {len(poses)} and {len(pictures)}"
            )
        return self._begin(pictures, poses, seed, noise_seed, dict(prompt or {}), points, self.navigator(self.controls))

    def navigator(self, settings: ControlSettings) -> Navigator:
        """What moves the camera outside procedural worlds, as the model has it."""
        return self.model.navigator(settings) if isinstance(self.model, Navigates) else FreeNavigator(settings)

    def sample(
        self, seed: int = 0, noise_seed: int | None = None, frames: Tensor | None = None,
        prompt: Mapping[str, Tensor] | None = None,
    ) -> Session:  # fmt: skip
        """A session in a made-up world: a procedural one, or from a grey image with made-up prompt states.

        Image `frames` uint8 [1, H, W, 3] and `prompt` states that are given are taken in their place. For warming up
        and for measuring speed; what a model makes of it says nothing.
        """
        model = self.model
        if not isinstance(model, BeginsWithImage):
            return self.new(seed, noise_seed)
        if frames is None:
            frames = torch.full((1, *self.frame_size, 3), 127, dtype=torch.uint8)
        if prompt is None and isinstance(model, EncodesPrompt):
            prompt = model.sample_prompt(noises.stream(seed, _PROMPT))
        return self.open(frames, torch.eye(4)[None], prompt, seed, noise_seed)

    def warm_up(self, accelerations: Sequence[Acceleration | str | Path] = ("off",), limit: int = 64) -> int:
        """Play a made-up world in each way until its context is as long as it gets; the chunks that took.

        What is compiled or measured when it is first met has then been met. Sizes that only some walks meet (an old
        clip that comes back, a context encoded anew) may still cost a backend a plan. `limit` bounds a world's chunks.
        """
        integer_from("limit", limit, 1)
        played = 0
        for settings in accelerations:
            session, sizes = self.sample(), list[tuple[int, int]]()
            session.acceleration = settings
            # a few of one size: what is kept from chunk to chunk has then come round
            while len(sizes) < limit and (len(sizes) < _SETTLED or len({*sizes[-_SETTLED:]}) > 1):
                report = session.step().report
                sizes.append((report.context_latents, report.encoded_latents))
            played += len(sizes)
        self.wait()
        return played

    def _begin(
        self, frames: Tensor, cameras: Tensor, seed: int, noise_seed: int | None, prompt: dict[str, Tensor],
        points: Tensor | None, navigator: Navigator,
    ) -> Session:  # fmt: skip
        for name, number in (("seed", seed), ("noise_seed", noise_seed)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
                raise InputError(f"{name} must be an integer, got {number!r}")
        model, shape = self.model, self.model.chunk(0)
        by_rule = isinstance(model, Recalls)
        if points is not None:
            points = _check_points(points, in_front=not by_rule)
        else:
            drawn = noises.stream(seed, _POINTS)
            points = model.sample_points(drawn) if isinstance(model, Recalls) else frustum_points(drawn)
        noise_seed = seed if noise_seed is None else noise_seed
        history = History(hot=max(32, shape.window + shape.clean + 1), sink=max(4, shape.sink), clip=shape.clip)
        if isinstance(model, BeginsWithImage):
            with torch.inference_mode():
                prompt = {**prompt, **model.image_prompt(frames[None])}
            state = SessionState(noise_seed, points, history, cameras[-1].clone(), prompt=prompt)
            return Session(self, state, navigator, self.acceleration)
        with torch.inference_mode():
            latents = model.decoder.encode(frames[None])[0]
        if len(latents) < shape.clean:
            raise InputError(
                f"{len(frames)} frames make {len(latents)} latents, but the first chunk of {self.model.name!r} goes on "
                f"from {shape.clean}; give more frames"
            )
        per_latent = [min(len(frames), -(-(i + 1) * len(frames) // len(latents))) - 1 for i in range(len(latents))]
        shown, decoder = latents[: len(latents) - shape.clean], dict[str, Tensor]()
        if len(shown):
            # a streaming decoder goes on from what was shown; what the first chunk re-imposes is still to come
            with torch.inference_mode():
                _, decoder = self.model.decoder.decode(shown[None], {})
        history.append(latents, cameras[per_latent], (None,) * len(latents))
        state = SessionState(
            noise_seed, points, history, cameras[-1].clone(), frame=len(frames), decoder=decoder, prompt=prompt
        )
        return Session(self, state, navigator, self.acceleration)


_POINTS, _WALK, _PROMPT = -1, -2, -3
"""Streams of a session's seed; those of noise are numbered by chunk, from 0."""
_SETTLED = 3
"""Chunks of one size after which a world is taken to have grown up."""


def _check_points(points: Tensor, in_front: bool) -> Tensor:
    points = torch.as_tensor(points).float().cpu()
    if points.ndim != 2 or points.shape[1] != 3 or not len(points):
        raise InputError(f"points must have shape [P, 3]{' (u, v, depth)' * in_front}, got {list(points.shape)}")
    if not bool(points.isfinite().all()) or (in_front and not bool((points[:, 2] > 0).all())):
        raise InputError(f"points must be finite{', with depths in metres above 0' * in_front}")
    return points


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, or a CUDA GPU where there is one, else the CPU; `InputError` on one that is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"unknown device {device!r}; use 'cpu', 'cuda' or 'cuda:1'") from error
    if chosen.type not in ("cpu", "cuda"):
        raise InputError(f"device {str(device)!r} is not supported; use 'cpu', 'cuda' or 'cuda:1'")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {str(device)!r} was asked for, but this torch ({torch.__version__}) sees no CUDA GPU")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {str(device)!r} was asked for, but there are {torch.cuda.device_count()} GPUs, from 0"
        )
    return chosen


def pick_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively, float32 elsewhere."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return torch.bfloat16 if device.type == "cpu" and native is not None and native() else torch.float32


def _check_compiler(device: torch.device) -> None:
    """Refuse to compile without the compiler that torch would call: C++ for a CPU, C for Triton's launchers."""
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    names = [os.environ.get("CXX") or usual] if device.type == "cpu" else [os.environ.get("CC") or "gcc", "clang"]
    if not any(map(shutil.which, names)):
        raise InputError(f"compile=True needs a compiler for {device.type}, and {' or '.join(names)} is not found")


def load(
    name: str,
    path: str | Path | None = None,
    weights: Weights = "pretrained",
    device: str | torch.device | None = None,
    acceleration: Acceleration | str | Path = "off",
    dtype: torch.dtype | None = None,
    compile: bool = False,
    decoder: str | None = None,
    quantise: Scheme | None = None,
) -> Engine:
    """Load a world model.

    `name` is one of `worldstride models`; `path` points at a checkpoint where the model does not ship; weights
    "random" are seeded and measure speed, never quality. `device` defaults to a GPU where there is one, `dtype` to
    what the device multiplies natively. `compile` has `torch.compile` make the model faster: the first chunks then take
    long, and a compiler is needed (on a CPU `CXX` or g++). `decoder` chooses among those of `worldstride models`, where
    a model has several. `quantise` puts weights in 8 bits, "float8" or "int8", which takes less memory and changes
    results (`models.quantised`). Raises `InputError` on unknown names, `CheckpointError` on bad files.
    """
    if weights not in get_args(Weights):
        raise InputError(f"weights must be 'pretrained' or 'random', got {weights!r}")
    place, settings = pick_device(device), resolve(acceleration)
    entry = find(name)
    kind = dtype or pick_dtype(place)
    if compile:
        _check_compiler(place)
    if decoder is not None and decoder not in entry.decoders:
        known = ", ".join(entry.decoders) or "none to choose among"
        raise InputError(f"unknown decoder {decoder!r} of {entry.name!r}; known: {known}")
    more = {"decoder": decoder} if entry.decoders else {}
    model, fingerprint = entry.load(None if path is None else Path(path), weights, place, kind, **more)
    if quantise is not None:
        if not isinstance(model, Quantises):
            raise InputError(f"{entry.name!r} cannot be quantised; load it with quantise=None")
        model = model.quantised(quantise)
    if compile:
        if not isinstance(model, Compilable):
            raise InputError(f"{entry.name!r} cannot be compiled; load it with compile=False")
        model.compile_passes()
    file = None if path is None else str(Path(path).resolve())  # a save may be opened from another folder
    precision = str(kind).removeprefix("torch.")
    of = (entry.name, file, cast(Weights, weights), fingerprint)
    source = EngineSource(*of, precision, compile, decoder, quantise)
    return Engine(model, source, settings, entry.controls)
