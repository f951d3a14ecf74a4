"""The search for settings within a quality budget, and its command."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from conftest import TINY
from joint_model import JointModel, joint_engine
from worldstride import Acceleration, Engine
from worldstride.acceleration import resolve
from worldstride.bench import calibrate as search
from worldstride.bench.calibrate import COUNTED, Calibration, Seen, calibrate, notches, score_quantiles
from worldstride.bench.compare import held_out
from worldstride.bench.trials import Party
from worldstride.bench.walks import CLASSES, HeldOutWorld
from worldstride.cli import main
from worldstride.denoising.stopwatch import Stopwatch
from worldstride.engine import EngineSource
from worldstride.errors import InputError
from worldstride.models.courtyard.adapter import CourtyardModel
from worldstride.models.courtyard.weights import random_network

FULL = Acceleration("full compute")


@pytest.fixture(scope="module")
def small(tiny_engine: Engine) -> tuple[HeldOutWorld, ...]:
    return held_out(tiny_engine, "plain", 2, 2, ("out and back",))


@pytest.fixture(autouse=True)
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times count what was marked and not seconds: speed then follows from the number of evaluations."""
    ticks = itertools.count()
    monkeypatch.setattr(Stopwatch, "_now", lambda _: float(next(ticks)))


def seen(name: str, speedup: float, *losses: float, ends: dict[str, float] | None = None) -> Seen:
    """Settings as measured, by the upper ends of the losses of the classes that count."""
    high = dict(zip(COUNTED, losses, strict=False)) if ends is None else ends
    loss = {c: {"mean": v - 1, "low": v - 2, "high": v} for c, v in high.items()}
    return Seen(Acceleration(name), {"loss": loss}, {}, speedup)  # type: ignore[arg-type]


ZERO = seen("full compute", 1.0, 0, 0, 0)


def test_the_worst_class_counts():
    assert seen("a", 2, 1.0, 3.0, -2.0).worst == 3
    assert seen("a", 2, math.nan, -3.0, -2.0).worst == -2  # a class that is hardly there says nothing
    assert math.isnan(seen("a", 2, math.nan, math.nan, math.nan).worst)
    assert seen("a", 2, ends={"all": 9.0, "moving": 9.0, "novel": 1.0}).worst == 1
    assert math.isnan(seen("a", 2, ends={}).worst)
    lonely = seen("a", 2, 1.0, 2.0, 3.0)
    lonely.quality["loss"]["novel"]["high"] = math.nan  # in one world alone, where it lost something
    assert math.isnan(lonely.worst)
    assert {*COUNTED} < {*CLASSES}


def test_chosen_is_the_fastest_within_the_budget():
    some = (ZERO, seen("slow", 1.5, 1, 1, 1), seen("fast", 2.5, 1.9, 2.0, -5), seen("bold", 4, 2.1, 0, 0))
    chosen = Calibration(some, 2.0).chosen
    assert chosen is some[2]
    assert Calibration(some, 1.5).chosen is some[1]
    assert Calibration(some, 3.0).chosen is some[3]
    assert Calibration(some, 0.5).chosen is None
    assert Calibration(some[:1], 100.0).chosen is None  # full compute itself is no answer
    assert Calibration((ZERO, seen("slower", 0.9, 0, 0, 0), seen("as fast", 1.0, 0, 0, 0)), 2.0).chosen is None
    assert Calibration((ZERO, seen("unknown", 2, *[math.nan] * 3)), 2.0).chosen is None


def test_closest_loses_least_of_what_is_faster():
    some = (ZERO, seen("slower", 0.9, -9, -9, -9), seen("unknown", 3, *[math.nan] * 3), seen("a", 2, 5, 1, 1),
            seen("b", 1.1, 4, 4, 4))  # fmt: skip
    assert Calibration(some, 2.0).closest is some[4]
    assert Calibration(some[:4], 2.0).closest is some[3]
    assert Calibration(some[:3], 2.0).closest is None


def test_rows_are_those_of_a_comparison():
    one = seen("fast", 2.5, 1, 2, 3).to_json()
    assert (one["name"], one["speedup"], one["worst"]) == ("fast", {"core": 2.5}, 3)
    assert Acceleration.from_json(one["acceleration"]) == Acceleration("fast")


LEVERS = ["steps", "adaptive", "spatial", "temporal", "attention", "kept"]


def names_of(engine: Engine, worlds: Sequence[HeldOutWorld] = ()) -> list[str]:
    return list(notches(engine, worlds))


def courtyard(**config: int) -> Engine:
    model = CourtyardModel(random_network(replace(TINY, **config)).eval(), torch.float32)
    return Engine(model, EngineSource("courtyard", None, "random", "tiny"), resolve("off"))


def test_levers_that_a_model_lacks_are_left_out(tiny_engine: Engine, joint: Engine):
    assert names_of(tiny_engine) == LEVERS
    assert names_of(courtyard(memory=0)) == [n for n in LEVERS if n != "spatial"]
    assert names_of(courtyard(window=1)) == [n for n in LEVERS if n != "temporal"]
    assert names_of(joint) == ["spatial"]  # a solver of its own, three steps, no window, no keys and values

    class Guided(CourtyardModel):
        def sampler(self, steps: int | None = None, shift: float | None = None):
            return replace(super().sampler(3 if steps is None else steps, shift), guidance=2.0)

    guided = Guided(random_network(TINY).eval(), torch.float32)
    assert names_of(Engine(guided, tiny_engine.source, resolve("off"))) == [
        n for n in LEVERS if n not in ("steps", "adaptive")
    ]


def test_notches_go_from_cautious_to_bold(tiny_engine: Engine, small: tuple[HeldOutWorld, ...]):
    made = {name: [step(FULL) for step in steps] for name, steps in notches(tiny_engine, small).items()}
    assert [a.steps for a in made["steps"]] == [6, 5, 4, 3, 2]
    assert [a.adaptive and a.adaptive.few for a in made["adaptive"]] == [7, 7, 6]
    assert [a.adaptive and a.adaptive.few for a in (s(replace(FULL, steps=4)) for s in notches(tiny_engine, small)[
        "adaptive"])] == [3, 3, 2]  # fmt: skip
    assert [a.spatial and a.spatial.exploring for a in made["spatial"]] == [1, 1, 0, 0]
    assert [a.temporal and a.temporal.scale for a in made["temporal"]] == [2.0, 1.0, 0.5]
    assert [a.attention and a.attention.evaluations for a in made["attention"]] == [2, 4]
    assert [a.kept and a.kept.refresh for a in made["kept"]] == [2, 4, None]
    for name, every in made.items():
        for one in every:  # each lever changes what is its own
            own = {"shift": None, "solver": None, "steps": None} if name == "steps" else {name: None}
            assert replace(one, **own) == FULL
            assert Acceleration.from_json(one.to_json()) == one


def test_thresholds_are_quantiles_of_what_the_walks_show(tiny_engine: Engine, small: tuple[HeldOutWorld, ...]):
    known, added = score_quantiles(tiny_engine, small)
    for of in (known, added):
        values = [of(share) for share in (0.0, 0.3, 0.5, 0.75, 1.0)]
        assert values == sorted(values)
        assert 0 <= values[0] <= values[-1] <= 1
    assert known(0.5) > added(0.5)
    nothing, _ = score_quantiles(tiny_engine, ())
    assert nothing(0.5) == 0


def believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements made up: every lever's notch has a price in percent and makes the model faster."""

    def measure(_: object, a: Acceleration) -> Seen:
        speed, loss = 8 / (a.steps or 8), 8.0 - (a.steps or 8)
        if a.attention is not None:
            speed, loss = speed * {2: 1.5, 4: 1.6}[a.attention.evaluations], loss + a.attention.evaluations / 2
        if a.kept is not None:
            speed *= 0.9
        if a.spatial is not None or a.adaptive is not None:
            loss = math.nan
        return replace(seen(a.name, speed, loss, -1, -1), settings=a)

    monkeypatch.setattr(search._Bench, "measure", measure)


@pytest.mark.parametrize(
    ("budget", "speedup", "name"),
    [
        (0.5, None, None),
        (1.0, 1.5, "attention 2"),
        (3.0, 2.0, "6 steps, attention 2"),
        (6.0, 4.0, "3 steps, attention 2"),
        (9.0, 6.4, "2 steps, attention 4"),
    ],
)
def test_the_search_takes_the_fastest_notch_that_meets_the_budget(
    tiny_engine: Engine,
    small: tuple[HeldOutWorld, ...],
    monkeypatch: pytest.MonkeyPatch,
    budget: float,
    speedup: float | None,
    name: str | None,
):
    believed(monkeypatch)
    told: list[Seen] = []
    found = calibrate(tiny_engine, small, 1, budget, trials=100, advance=told.append)
    assert found.seen == tuple(told)
    assert found.seen[0].settings == FULL
    assert len({replace(s.settings, name="off") for s in found.seen}) == len(found.seen) < 100  # nothing twice
    if speedup is None:
        assert found.chosen is None
        assert found.closest is not None
        assert found.closest.settings.name == "attention 2"
    else:
        assert found.chosen is not None
        assert found.chosen.settings.name == name
        assert found.chosen.speedup == pytest.approx(speedup)


def test_equal_settings_are_measured_once(
    tiny_engine: Engine, small: tuple[HeldOutWorld, ...], monkeypatch: pytest.MonkeyPatch
):
    fewer = [lambda a, n=n: replace(a, steps=n) for n in (6, 6)]
    monkeypatch.setattr(search, "notches", lambda *_: {"steps": fewer, "the same": fewer})
    believed(monkeypatch)
    assert [s.settings.steps for s in calibrate(tiny_engine, small, 1, 9.0).seen] == [None, 6]


def test_a_notch_that_changes_nothing_does_not_end_its_lever(
    tiny_engine: Engine, small: tuple[HeldOutWorld, ...], monkeypatch: pytest.MonkeyPatch
):
    fewer = [lambda a, n=n: replace(a, steps=n) for n in (6, 6, 4)]  # quantiles may well be equal
    monkeypatch.setattr(search, "notches", lambda *_: {"steps": fewer})
    believed(monkeypatch)
    assert [s.settings.steps for s in calibrate(tiny_engine, small, 1, 9.0).seen] == [None, 6, 4]


@pytest.mark.parametrize("trials", [2, 3, 10])
def test_trials_bound_the_search(
    tiny_engine: Engine, small: tuple[HeldOutWorld, ...], monkeypatch: pytest.MonkeyPatch, trials: int
):
    believed(monkeypatch)
    assert len(calibrate(tiny_engine, small, 1, 9.0, trials=trials).seen) == trials


def test_settings_are_measured_against_full_compute(tiny_engine: Engine, small: tuple[HeldOutWorld, ...]):
    found = calibrate(tiny_engine, small, 2, 1000.0, trials=4)
    first, steps = found.seen[0], found.seen[1]
    assert (first.worst, first.speedup) == (0, 1)
    assert steps.settings.name == "6 steps"
    assert steps.worst != 0
    assert 1 < steps.speedup < 8 / 6  # ticks of the context and of the latents' way count too
    assert first.speed["chunks"] == 2 * 2 * 2  # worlds, chunks, noise seeds
    assert first.speed["evaluations_per_chunk"] == 8
    assert found.chosen is max(found.seen[1:], key=lambda s: s.speedup)


def test_the_first_step_of_all_is_not_held_against_full_compute(
    tiny_engine: Engine, small: tuple[HeldOutWorld, ...], monkeypatch: pytest.MonkeyPatch
):
    ticks = itertools.chain(range(20), itertools.count(1_000_000))  # something takes long within the first chunk
    monkeypatch.setattr(Stopwatch, "_now", lambda _: float(next(ticks)))
    assert calibrate(tiny_engine, small, 2, 1000.0, trials=2).seen[1].speedup < 8 / 6


@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupt_ends_the_search_with_what_was_seen(
    tiny_engine: Engine, small: tuple[HeldOutWorld, ...], after: int
):
    told: list[Seen] = []

    def advance(one: Seen) -> None:
        told.append(one)
        if len(told) == after:
            raise KeyboardInterrupt

    found = calibrate(tiny_engine, small, 1, 1000.0, advance=advance)
    assert found.seen == tuple(told)
    assert len(told) == after
    assert (found.chosen is None) == (after == 1)


def test_an_interrupt_before_anything_was_seen_is_passed_on(
    tiny_engine: Engine, small: tuple[HeldOutWorld, ...], monkeypatch: pytest.MonkeyPatch
):
    def interrupted(_: Party) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Party, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny_engine, small, 1, 2.0)


@pytest.mark.parametrize("budget", [0, -1.0, math.nan, math.inf, 1001, True, "2"])
def test_budgets_are_numbers_above_zero(tiny_engine: Engine, budget: Any):
    with pytest.raises(InputError, match="budget must be a number above 0 and at most 1000, got"):
        calibrate(tiny_engine, (), 1, budget)


@pytest.mark.parametrize("trials", [1, 0, -3])
def test_a_search_needs_two_trials(tiny_engine: Engine, trials: int):
    with pytest.raises(InputError, match=f"at least 2 trials, full compute and one more, got {trials}"):
        calibrate(tiny_engine, (), 1, 2.0, trials=trials)


def test_a_search_needs_two_worlds_and_every_class_in_two_of_them(
    tiny_engine: Engine, small: tuple[HeldOutWorld, ...], monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(InputError, match="at least 2 worlds to tell a loss from chance, got 1"):
        calibrate(tiny_engine, small[:1], 1, 2.0)
    with_class = [w.masks["novel"].flatten(1).any(1).any() for w in small]
    assert all(with_class)
    lonely = replace(small[1], masks={**small[1].masks, "novel": torch.zeros_like(small[1].masks["novel"])})
    with pytest.raises(InputError, match="only one of the worlds has novel pixels"):
        calibrate(tiny_engine, (small[0], lonely), 2, 2.0)
    nowhere = tuple(replace(w, masks={**w.masks, "novel": lonely.masks["novel"]}) for w in small)
    found = calibrate(tiny_engine, nowhere, 2, 2.0, trials=2)
    assert len(found.seen) == 2
    assert "novel" in found.absent
    assert "novel" not in calibrate(tiny_engine, small, 2, 2.0, trials=2).absent


ARGUMENTS = ["--weights", "random", "--family", "plain", "--worlds", "2", "--chunks", "2"]


@pytest.fixture
def tiny_model(tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command plays a small model, whatever it is asked for."""
    monkeypatch.setattr("worldstride.commands.options.load", lambda *_: tiny_engine)


def run(out: Path, *arguments: str) -> int:
    return main(["calibrate", "courtyard", *ARGUMENTS, "--out", str(out), *arguments])


def figure(path: Path) -> ElementTree.Element:
    return ElementTree.fromstring(path.read_text(encoding="utf-8"))


def circles(path: Path) -> int:
    return sum(e.tag.endswith("circle") for e in figure(path).iter())


def test_a_budget_that_is_met_gives_a_preset(
    tiny_engine: Engine, tiny_model: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "mine.toml"
    assert run(out, "--budget", "1000", "--trials", "3") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.json", "mine.svg", "mine.toml"]
    result = json.loads((tmp_path / "mine.json").read_text())
    settings = resolve(out)
    assert settings.name == "mine"
    (chosen,) = (row for row in result["rows"] if row["name"] == result["chosen"])
    assert replace(settings, name=chosen["name"]) == Acceleration.from_json(chosen["acceleration"])
    assert [row["name"] for row in result["rows"]][:2] == ["full compute", "6 steps"]
    assert len(result["rows"]) == 3
    assert result["format"] == "worldstride-calibrate"
    assert (result["budget"], result["chunks"], result["mode"], result["family"]) == (1000, 2, "forced", "plain")
    assert result["worlds"] == [1_010_000, 1_010_001]
    assert "nothing about quality" in result["note"]
    assert {"versions", "hardware", "date", "engine", "seconds", "walks", "command"} <= result.keys()
    comment = [line for line in out.read_text().splitlines() if line.startswith("# ")]
    assert comment[0].startswith(f"# {chosen['name']}: {chosen['speedup']['core']:.2f}x the speed of full compute")
    assert "budget 1000 %, 2 plain worlds x 2 chunks, forced" in comment[1]
    assert circles(tmp_path / "mine.svg") == 3
    printed = capsys.readouterr().out
    assert f"preset: {out} ({chosen['name']})" in printed
    assert all(any(line.startswith(row["name"]) for line in printed.splitlines()) for row in result["rows"])
    assert printed.count("  <") == 1
    session = tiny_engine.new(seed=3)
    session.acceleration = out
    assert session.step().report.acceleration == "mine"


def test_a_budget_that_nothing_meets_says_what_was_best(
    tiny_model: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    plain = search.summarise

    def lossy(tables: Sequence[Any], reference: Sequence[Any] | None) -> Any:
        made = plain(tables, reference)
        for ends in made["loss"].values():
            ends.update({end: abs(v) for end, v in ends.items()})  # random weights may well be better by chance
        return made

    monkeypatch.setattr(search, "summarise", lossy)
    out = tmp_path / "mine.toml"
    assert run(out, "--budget", "1e-6", "--trials", "3") == 1
    captured = capsys.readouterr()
    result = json.loads((tmp_path / "mine.json").read_text())
    best = min((r for r in result["rows"][1:] if r["speedup"]["core"] > 1), key=lambda r: r["worst"])
    assert f"a budget of 1e-06 % is not reachable; best seen is '{best['name']}': +" in captured.err
    assert f"% at {best['speedup']['core']:.2f}x" in captured.err
    assert "  <" not in captured.out
    assert result["chosen"] is None
    assert not out.exists()
    assert circles(tmp_path / "mine.svg") == 3


def test_an_interrupted_command_writes_what_it_found(
    tiny_model: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    measured, measure = [], search._Bench.measure

    def interrupted(self: object, settings: Acceleration) -> Seen:
        measured.append(settings)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measure(self, settings)  # type: ignore[arg-type]

    monkeypatch.setattr(search._Bench, "measure", interrupted)
    assert run(tmp_path / "mine.toml") == 130
    assert "interrupted before any settings met the budget" in capsys.readouterr().err
    assert [r["name"] for r in json.loads((tmp_path / "mine.json").read_text())["rows"]] == ["full compute"]
    assert circles(tmp_path / "mine.svg") == 1


def test_the_figure_is_a_file_of_its_own(tiny_model: None, tmp_path: Path):
    run(tmp_path / "mine.toml", "--trials", "2", "--budget", "1000")
    assert figure(tmp_path / "mine.svg").tag == "{http://www.w3.org/2000/svg}svg"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "0"], "--budget must be a number above 0 and at most 1000, got 0.0"),
        (["--budget", "nan"], "--budget must be a number above 0"),
        (["--out", "mine.json"], "--out must be a .toml file, got mine.json"),
        (["--out", "missing/mine.toml"], "missing"),
    ],
)
def test_wrong_options_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str],
    message: str,
) -> None:  # fmt: skip
    def no_model(*_: object, **__: object) -> None:
        raise RuntimeError("a model was loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("worldstride.commands.options.load", no_model)
    assert run(tmp_path / "a.toml", *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trials", "1"], "at least 2 trials, full compute and one more, got 1"),
        (["--worlds", "1"], "--worlds must be an integer of at least 2, got 1"),
        (["--chunks", "0"], "at least one world, chunk and walk, got 2, 0, 1"),
    ],
)
def test_wrong_numbers_are_refused(
    tiny_model: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    assert run(tmp_path / "mine.toml", *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_models_that_the_renderer_cannot_show_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("worldstride.commands.options.load", lambda *_: joint_engine(JointModel()))
    assert run(tmp_path / "mine.toml") == 2
    assert "'joint' shows 16 x 24" in capsys.readouterr().err
