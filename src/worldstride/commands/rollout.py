"""`worldstride rollout`."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Annotated

import numpy as np
import torch
from tqdm import tqdm
from tyro.conf import arg

from worldstride.atomic import temporary_beside
from worldstride.bench.environment import engine_facts, environment
from worldstride.bench.results import write_json
from worldstride.bench.rollout import RANDOM_WEIGHTS_NOTE
from worldstride.commands.beginning import Beginning, read_prompt
from worldstride.commands.options import EngineOptions, Family, ModelName, OptionalInt, OptionalPath, OptionalText
from worldstride.errors import InputError
from worldstride.levers import Lever, levers
from worldstride.models.registry import find
from worldstride.picture import read_picture
from worldstride.playing import Per
from worldstride.protocol import BeginsWithImage
from worldstride.report import ChunkReport
from worldstride.saving import open_session
from worldstride.session import Session
from worldstride.trajectory import Trajectory, counts_latents, load_trajectory
from worldstride.video import VideoWriter, check_video

_SMALL = 256  # pixels below which a frame is too small to be looked at


@dataclass(frozen=True)
class Rollout:
    """Walk through a world along a trajectory; write a video and a report. Ctrl-C keeps what is done so far."""

    model: ModelName
    """Name of the model, see `worldstride models`; also `--model NAME`."""
    trajectory: str
    """Moves such as "w-12,right-12", a .json or .npy file, or a folder with poses.npy."""
    output: Annotated[Path | None, arg(aliases=["-o"], metavar="PATH")] = None
    """Video to write (.mp4, .mkv, .mov)."""
    report: OptionalPath = None
    """Report to write; without it, the video's name with .json."""
    save: OptionalPath = None
    """Where to save the world at the end, to go on with --from."""
    source: Annotated[Path | None, arg(name="from", metavar="PATH")] = None
    """Saved world to go on from."""
    seed: OptionalInt = None
    """Seed of the world; 0 where none is given."""
    family: Annotated[Family | None, arg(metavar="{courtyard,plain,corridor}")] = None
    """Kind of the world; courtyard where none is given."""
    image: OptionalPath = None
    """First image, for a model that begins with one; resized and cut to the model's frame."""
    prompt: OptionalPath = None
    """Encoder states of a prompt (.safetensors), for a model that takes one."""
    per: Annotated[Per | None, arg(metavar="{frame,latent}")] = None
    """What an entry of the trajectory stands for; latents for moves and pose dictionaries, frames for other files."""
    noise_seed: OptionalInt = None
    """Seed of what is dreamt; the world's seed where none is given."""
    acceleration: OptionalText = None
    """Preset's name or .toml file of settings; full compute where none is given."""
    fps: OptionalInt = None
    """Frames per second of the video; without it those that the model was trained on."""
    scale: OptionalInt = None
    """Whole factor by which the video enlarges the frames; without it 4 for frames below 256 pixels, 1 for others."""
    engine: Annotated[EngineOptions, arg(name="")] = field(default_factory=EngineOptions)

    def run(self, command: str) -> int:
        """Play, write, and return 0, or 130 after Ctrl-C."""
        trajectory = load_trajectory(self.trajectory)
        report = self.report or (self.output.with_suffix(".json") if self.output else None)
        fps = find(self.model).frames_per_second if self.fps is None else self.fps
        self._check_files(report, fps)
        session = self._session()
        given = _shown(session, self.source is not None)
        reports: list[ChunkReport] = []
        facts = self._facts(session, command, fps)
        with _Interrupts() as interrupts:
            error: str | None = None
            try:
                last = self._play(session, trajectory, given, fps, reports, interrupts)
                if self.save is not None:
                    last.save(self.save)
            except BaseException as failure:
                error = f"{type(failure).__name__}: {failure}"
                raise
            finally:
                if report is not None:
                    did = [lever.to_json() for lever in _levers(session, reports)]
                    totals = _totals(reports)
                    done = {"interrupted": interrupts.asked, "error": error, "totals": totals, "levers": did}
                    write_json(report, {**facts, **done, "chunks": [r.to_json() for r in reports]})
        totals = _totals(reports)
        made = ", ".join(str(p) for p in (self.output, report, self.save) if p is not None)
        speed = f"{totals['frames']} frames in {totals['seconds']:.1f} s ({totals['frames_per_second']:.1f} frames/s)"
        print(f"{'interrupted after ' if interrupts.asked else ''}{speed}{' -> ' + made if made else ''}")
        for lever in _levers(session, reports):
            print(f"  {lever}")
        if facts["note"]:
            print(facts["note"])
        return 130 if interrupts.asked else 0

    @property
    def _per(self) -> Per:
        """What an entry of the trajectory stands for."""
        return self.per or ("latent" if counts_latents(self.trajectory) else "frame")

    def _check_files(self, report: Path | None, fps: int) -> None:
        """Refuse, before any work is done, files that cannot be written or that would overwrite one another."""
        if self.output is not None:
            check_video(self.output, fps, 1 if self.scale is None else self.scale)
        read = {"trajectory": Path(self.trajectory), "image": self.image, "prompt": self.prompt}
        taken = {} if self.source is None else {self.source.resolve(): "world to go on from"}
        for name, path in (("video", self.output), ("report", report), ("saved world", self.save)):
            if path is None:
                continue
            temporary_beside(path)  # refuses a missing folder
            for what, source in read.items():
                if source is not None and path.is_file() and path.resolve() == source.resolve():
                    raise InputError(f"the {name} would overwrite the {what} {path}; give it another name")
            if name == "saved world" and self.source is not None and path.resolve() == self.source.resolve():
                continue  # a world may go on in its own file
            other = taken.setdefault(path.resolve(), name)
            if other != name:
                raise InputError(f"the {other} and the {name} cannot both be {path}; give each a name of its own")

    def _session(self) -> Session:
        settings = self.acceleration or "off"
        if self.source is None:
            picture = None if self.image is None else read_picture(self.image)
            prompt = None if self.prompt is None else read_prompt(self.prompt)
            begin = Beginning(self.seed or 0, self.noise_seed, self.family, picture, prompt)
            return begin.session(self.engine.load(self.model, settings))
        if self.image is not None or self.prompt is not None:
            raise InputError("a saved world knows its image and prompt; leave out --image and --prompt beside --from")
        if self.seed is not None or self.family is not None:
            raise InputError("a saved world knows its seed and family; leave out --seed and --family beside --from")
        if self.engine.dtype is not None:
            raise InputError(f"a saved world goes on in its own precision; leave out --dtype {self.engine.dtype}")
        if self.engine.compile:
            raise InputError("a saved world goes on as it was made, compiled or not; leave out --compile")
        asked = self.engine.path is not None or self.engine.weights == "random"
        session = open_session(self.source, self.engine.device, self.engine.load(self.model) if asked else None)
        if session.engine.source.model != self.model:
            raise InputError(f"{self.source} is a world of {session.engine.source.model!r}, not of {self.model!r}")
        if self.noise_seed is not None:
            session = session.fork(self.noise_seed)
        if self.acceleration is not None:
            session.acceleration = settings
        return session

    def _facts(self, session: Session, command: str, fps: int) -> dict[str, object]:
        seed = self.seed or 0
        world: dict[str, object] = {"from": str(self.source), "noise_seed": self.noise_seed}
        if self.source is None:
            noise = seed if self.noise_seed is None else self.noise_seed
            world = {"family": self.family or "courtyard", "seed": seed, "noise_seed": noise}
            if isinstance(session.engine.model, BeginsWithImage):
                files = {"image": self.image, "prompt": self.prompt}
                named = {kind: "made up" if path is None else path.name for kind, path in files.items()}
                world = {**named, "seed": seed, "noise_seed": noise}
        return {
            "format": "worldstride-rollout",
            **environment(session.engine.device, command),
            "engine": engine_facts(session.engine),
            "note": RANDOM_WEIGHTS_NOTE if session.engine.source.weights == "random" else "",
            "world": world,
            "acceleration": session.acceleration.to_json(),
            "trajectory": self.trajectory,
            "per": self._per,
            "video": None if self.output is None else self.output.name,
            "fps": fps,
        }

    def _play(
        self, session: Session, trajectory: Trajectory, given: np.ndarray, fps: int, reports: list[ChunkReport],
        interrupts: _Interrupts,
    ) -> Session:  # fmt: skip
        """Fill `reports` and the video; returns the session as it was after the last finished chunk."""
        with contextlib.ExitStack() as stack:
            video = None
            if self.output is not None:
                size = (given.shape[1], given.shape[2])
                scale = (4 if min(size) < _SMALL else 1) if self.scale is None else self.scale
                video = stack.enter_context(VideoWriter(self.output, fps, size, scale=scale))
                video.write(given)
            per = self._per
            bar = stack.enter_context(tqdm(total=len(trajectory), unit=per, desc=self.model, mininterval=0.2))
            chunks, kept = session.play(trajectory, per), session if self.save is None else session.fork()
            while not interrupts.asked:
                try:
                    with interrupts.at_once():
                        chunk = next(chunks, None)
                except KeyboardInterrupt:
                    break
                if chunk is None:
                    break
                if video is not None:
                    video.write(chunk.frames)
                reports.append(chunk.report)
                if self.save is not None:
                    kept = session.fork()  # a step cut short may leave the session between two chunks
                bar.set_postfix_str(f"{chunk.report.frames_per_second:.1f} frames/s", refresh=False)
                made = chunk.report.frames
                if per == "latent":
                    made = session.engine.model.chunk(chunk.report.index).new
                bar.update(min(made, len(trajectory) - bar.n))
        return kept


class _Interrupts:
    """Ctrl-C cuts a model step short at once; while a chunk is being written down it waits for the end of that.

    So the video and the report always hold the same chunks.
    """

    def __init__(self) -> None:
        self.asked = False
        self._at_once = False

    def __enter__(self) -> _Interrupts:
        if threading.current_thread() is threading.main_thread():  # only there Python takes signals
            self._before = signal.signal(signal.SIGINT, self._handle)
        else:
            self._before = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self._at_once:
            self._at_once = False
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """While in this block, Ctrl-C raises `KeyboardInterrupt`."""
        self._at_once = True
        try:
            if self.asked:  # it came just before
                raise KeyboardInterrupt
            yield
        finally:
            self._at_once = False


def _shown(session: Session, before: bool) -> np.ndarray:
    """The frames that a world begins with, as far as its history reaches: uint8 [F, H, W, 3].

    None where they were shown `before`, in a saved world's first video, and where nothing is shown yet.
    """
    model, history = session.engine.model, session.history
    if before or not len(history):
        return np.zeros((0, *session.engine.frame_size, 3), np.uint8)
    with torch.inference_mode():
        rows = list(range(max(0, len(history) - model.chunk(0).window), len(history)))
        latents = history.latents(rows, model.device, model.latent_shape)
        return model.decoder.decode(latents[None], {})[0][0].cpu().numpy()


def _levers(session: Session, reports: list[ChunkReport]) -> list[Lever]:
    shape = session.engine.model.chunk(reports[-1].index if reports else 0)
    return levers(session.acceleration, shape, reports)


def _totals(reports: list[ChunkReport]) -> dict[str, float]:
    seconds = sum(r.seconds["total"] for r in reports)
    frames = sum(r.frames for r in reports)
    return {
        "chunks": len(reports),
        "frames": frames,
        "evaluations": sum(e.computed for r in reports for e in r.evaluations),
        "seconds": seconds,
        "frames_per_second": frames / max(seconds, 1e-9) if frames else 0.0,
    }
