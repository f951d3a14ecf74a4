"""Sessions to files and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldstride import worlds
from worldstride.acceleration import Acceleration
from worldstride.context.dynamics import Dynamics
from worldstride.context.history import History, Remembered, Shown
from worldstride.context.kept import KeptLatents
from worldstride.context.policy import PolicyState
from worldstride.control import Action, ControlSettings
from worldstride.engine import Engine, EngineSource, load
from worldstride.errors import SaveFileError, WorldstrideError
from worldstride.navigation import SceneNavigator
from worldstride.savefile import read_save, write_save
from worldstride.session import Session
from worldstride.state import SessionState


def save_session(
    engine: Engine, state: SessionState, controls: ControlSettings, acceleration: Acceleration, path: str | Path
) -> None:
    """Write everything that `open_session` needs, atomically."""
    entries = state.history.entries
    tensors = {
        "latents": torch.stack([e.latent.cpu() for e in entries])
        if entries
        else torch.empty(0, *engine.model.latent_shape),
        "cameras": state.history.cameras(),
        "frame_cameras": torch.cat([torch.empty(0, 4, 4), *(e.shown.cameras for e in entries)]),
        "camera": state.camera,
        "points": state.points,
        **{f"decoder.{k}": v.cpu() for k, v in state.decoder.items()},
        **{f"prompt.{k}": v.cpu() for k, v in state.prompt.items()},
    }
    if state.intrinsics is not None:
        tensors["intrinsics"] = state.intrinsics
    if state.kept.records:
        tensors["kept"] = torch.stack([t.cpu() for t in state.kept.records.values()])
    history, table = state.history, dict[Action, int]()
    for entry in entries:  # most actions are held for long
        for action in entry.shown.actions:
            table.setdefault(action, len(table))
    header = {
        "engine": asdict(engine.source),
        "controls": asdict(controls),
        "acceleration": acceleration.to_json(),
        "noise_seed": state.noise_seed,
        "chunk": state.chunk,
        "frame": state.frame,
        "world": state.world,
        "policy": asdict(state.policy),
        "kept": {"numbers": list(state.kept.records), "age": state.kept.age, "sees": state.kept.sees},
        "history": {"limit": history.limit, "hot": history.hot, "sink": history.sink, "clip": history.clip},
        "indices": [e.index for e in entries],
        "actions": [e.led.to_json() if isinstance(e.led, Action) else e.led for e in entries],
        "frames": [len(e.shown.cameras) for e in entries],
        "action_table": [action.to_json() for action in table],
        "frame_actions": [[table[action] for action in e.shown.actions] for e in entries],
    }
    write_save(path, header, tensors)


def open_session(path: str | Path, device: str | torch.device | None = None, engine: Engine | None = None) -> Session:
    """The session saved at `path`, ready to go on; on the same kind of device it goes on bit for bit.

    The engine is loaded as it was unless one is given (to share it); the controls are those of the save. Raises
    `SaveFileError` on foreign or damaged files and where model or weights differ from those of the save.
    """
    header, tensors = read_save(path)
    try:
        source = EngineSource(**header["engine"])
        controls = ControlSettings(**_tuples(header["controls"]))
        if engine is None:
            dtype = getattr(torch, source.dtype)
            of = (source.model, source.path, source.weights, device)
            how = (source.compiled, source.decoder, source.quantised)
            engine = load(*of, "off", dtype, *how)
            engine.controls = controls
        if engine.source.model != source.model:
            raise SaveFileError(f"{path} is a world of model {source.model!r}; the engine runs {engine.source.model!r}")
        if engine.source.fingerprint != source.fingerprint:
            raise SaveFileError(
                f"{path} was saved with other weights of {source.model!r} (SHA-256 {source.fingerprint[:12]}...) than "
                f"the loaded ones ({engine.source.fingerprint[:12]}...); load those to go on"
            )
        if engine.source.dtype != source.dtype:
            raise SaveFileError(
                f"{path} was made in {source.dtype}, the engine computes in {engine.source.dtype}; it would not go on "
                "bit for bit"
            )
        if engine.source.quantised != source.quantised:
            made, given = (of or "not quantised" for of in (source.quantised, engine.source.quantised))
            raise SaveFileError(f"{path} was made by a model whose weights are {made}, the engine's are {given}")
        if engine.source.compiled != source.compiled:
            made, given = ("compiled" if c else "not compiled" for c in (source.compiled, engine.source.compiled))
            raise SaveFileError(f"{path} was made by a model {made}, the engine's is {given}; give one that is {made}")
        state = _state(header, tensors, engine)
        found, expected = list(tensors["latents"].shape[1:]), list(engine.model.latent_shape)
        if found != expected:
            raise SaveFileError(
                f"{path} holds latents of shape {found}, but {source.model!r} as loaded has {expected}; give the "
                "engine that the session ran on"
            )
        acceleration = Acceleration.from_json(header["acceleration"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, WorldstrideError):
            raise
        raise SaveFileError(f"{path} is no complete session: {type(error).__name__} {error}") from error
    if state.world is None:
        navigator = engine.navigator(controls)
    else:
        family, seed = state.world
        navigator = SceneNavigator(controls, worlds.scene_from_seed(family, [seed]))
    return Session(engine, state, navigator, acceleration)


def _state(header: Mapping[str, Any], tensors: Mapping[str, Tensor], engine: Engine) -> SessionState:
    rows = zip(
        header["indices"], tensors["latents"], tensors["cameras"], header["actions"], _shown(header, tensors),
        strict=True,
    )  # fmt: skip
    bank = header["history"]
    hot = len(header["indices"]) - int(bank["hot"])
    entries = tuple(
        Remembered(
            int(index),
            latent if i < hot else latent.to(engine.device),
            pose,
            led if led is None or isinstance(led, int) else Action.from_json(led),
            shown,
        )
        for i, (index, latent, pose, led, shown) in enumerate(rows)
    )
    world = header["world"]
    return SessionState(
        noise_seed=int(header["noise_seed"]),
        points=tensors["points"],
        history=History(int(bank["limit"]), int(bank["hot"]), int(bank["sink"]), entries, int(bank.get("clip", 1))),
        camera=tensors["camera"],
        chunk=int(header["chunk"]),
        frame=int(header["frame"]),
        decoder={
            k.removeprefix("decoder."): v.to(engine.device) for k, v in tensors.items() if k.startswith("decoder.")
        },
        prompt={k.removeprefix("prompt."): v.to(engine.device) for k, v in tensors.items() if k.startswith("prompt.")},
        intrinsics=tensors.get("intrinsics"),
        world=None if world is None else (str(world[0]), int(world[1])),
        policy=_policy(header.get("policy")),
        kept=_kept(header.get("kept"), tensors, engine),
    )


def _shown(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[Shown]:
    """Of every latent."""
    if "frames" not in header:  # saved before frames were remembered
        return [Shown(pose[None]) for pose in tensors["cameras"]]
    table = [Action.from_json(action) for action in header["action_table"]]
    parts = tensors["frame_cameras"].split([int(n) for n in header["frames"]])
    known = header["frame_actions"]
    return [Shown(part, tuple(table[i] for i in rows)) for part, rows in zip(parts, known, strict=True)]


def _kept(values: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], engine: Engine) -> KeptLatents:
    if values is None:  # saved before anything was kept
        return KeptLatents()
    records = [t.clone() for t in tensors["kept"].to(engine.device)] if values["numbers"] else []
    numbers = map(int, values["numbers"])
    return KeptLatents(dict(zip(numbers, records, strict=True)), int(values["age"]), values["sees"])


def _policy(values: Mapping[str, Any] | None) -> PolicyState:
    if values is None:  # saved before there were policies
        return PolicyState()
    average, changes = values["dynamics"]["average"], values["dynamics"]["changes"]
    dynamics = Dynamics(None if average is None else float(average), tuple(float(c) for c in changes))
    flags = (bool(values.get(name, False)) for name in ("revisiting", "caching", "knowing"))
    return PolicyState(dynamics, *flags)


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
