"""Settings against full compute and the truth: walks, scores, arms, files, page."""

import json
import math
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from worldstride import worlds
from worldstride.acceleration import PRESETS, Acceleration, resolve
from worldstride.bench import metrics, page
from worldstride.bench.ablation import ablation
from worldstride.bench.compare import NO_MEMORY, Comparison, brackets, compare, held_out, plain
from worldstride.bench.quality import GROUPS, Table, earlier_visit, score, summarise
from worldstride.bench.recall import recalled
from worldstride.bench.sheet import contact_sheet, pictured
from worldstride.bench.trials import Arm, Party
from worldstride.bench.walks import CLASSES, HeldOutWorld, held_out_world, look_away_walk
from worldstride.camera import camera_from_pose
from worldstride.cli import main
from worldstride.context.kept import KeptContext
from worldstride.context.policy import SpatialMemory, TemporalWindow
from worldstride.denoising.policy import StepCache
from worldstride.engine import Engine
from worldstride.errors import InputError, MissingDependencyError
from worldstride.video import read_video

VOID = {"meta", "img"}
CPU = torch.device("cpu")
FULL = Arm(Acceleration("full compute"))


class Page(HTMLParser):
    """Tags with their attributes, and the text of table cells; fails where tags do not close as they opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


ARGUMENTS = ["--weights", "random", "--worlds", "2", "--chunks", "3", "--accelerations", "off", "steps-2"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "deep" / "out"
    assert main(["compare", "courtyard", *ARGUMENTS, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def small(tiny_engine: Engine) -> tuple[HeldOutWorld, ...]:
    return held_out(tiny_engine, "plain", 2, 2, ("look away and back", "walk"))


@pytest.fixture
def tiny_model(tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command plays a small model, whatever it is asked for."""
    monkeypatch.setattr("worldstride.commands.options.load", lambda *_: tiny_engine)


def test_compare_writes_all_files(out: Path) -> None:
    assert sorted(p.name for p in out.iterdir()) == ["compare.json", "compare.mp4", "index.html", "sheet.png"]
    result = json.loads((out / "compare.json").read_text())
    assert result["format"] == "worldstride-compare"
    assert [row["name"] for row in result["rows"]] == ["full compute", "steps-2", "no memory"]
    assert [row["speed"]["evaluations_per_chunk"] for row in result["rows"]] == [8.0, 2.0, 8.0]
    for row in result["rows"]:
        assert set(row["quality"]["energy"]) == set(GROUPS)
        assert 5 < row["quality"]["psnr"]["all"]["mean"] < 20
        assert row["worlds"] == 2
        assert row["speed"]["chunks"] == 2 * 3 * 2  # worlds, chunks, noise seeds
    assert result["rows"][1]["speedup"]["core"] > 1.2
    assert [w["walk"] for w in result["worlds"]] == ["look away and back", "walk"]
    for world in result["worlds"]:
        assert len(world["psnr"]["steps-2"]) == len(world["revisited"]) == 3
    for row in result["rows"]:  # one world of a kind tells no spread
        assert {kind: of["worlds"] for kind, of in row["by_walk"].items()} == {"look away and back": 1, "walk": 1}
        losses = [of["loss"]["all"] for of in row["by_walk"].values()]
        assert [loss["high"] for loss in losses] == [None, None]
        low, high = sorted(loss["mean"] for loss in losses)
        assert low - 1e-6 <= row["quality"]["loss"]["all"]["mean"] <= high + 1e-6  # of the sum of both
    assert set(result["shares"]) == set(CLASSES)
    assert sum(result["shares"].values()) == pytest.approx(1)
    assert result["command"].startswith("worldstride compare courtyard")
    assert not result["interrupted"]
    assert result["seeds"] == {"worlds": [1_000_000, 1_000_001], "noise": [1, 2]}
    assert {"versions", "hardware", "date", "note", "modes", "walks", "chunks", "family", "engine"} <= result.keys()


def test_full_compute_loses_nothing_against_itself(out: Path) -> None:
    first, second, _ = json.loads((out / "compare.json").read_text())["rows"]
    losses = [v for v in first["quality"]["loss"].values() if v["mean"] is not None]
    assert len(losses) >= 5
    # a class that only one of the two worlds has tells no spread
    assert all(v["mean"] == 0 and v["low"] == v["high"] in (0, None) for v in losses)
    assert losses[0] == {"mean": 0, "low": 0, "high": 0}
    assert first["quality"]["psnr_full"]["all"]["mean"] == pytest.approx(80)
    assert second["quality"]["loss"]["all"]["mean"] != 0
    assert second["quality"]["psnr_full"]["all"]["mean"] < 60


def test_sheet_and_video_show_truth_beside_model(out: Path) -> None:
    sheet = Image.open(out / "sheet.png")
    assert sheet.width > 8 * 192
    assert sheet.height > 2 * (1 + 3) * 192  # worlds; truth and three settings
    pytest.importorskip("av")
    video = read_video(out / "compare.mp4")
    assert tuple(video.shape) == (2 * (8 + 12), 32 + 96 * 3, 4 * 96 * 3, 3)
    shown = video[0, 32:].float().unflatten(1, (4, -1))
    assert float((shown[:, 0] - shown[:, 1]).abs().mean()) < 3  # given frames are the same in all columns
    shown = video[19, 32:].float().unflatten(1, (4, -1))
    assert float((shown[:, 0] - shown[:, 1]).abs().mean()) > 10


def test_the_page_holds_everything(out: Path) -> None:
    text = (out / "index.html").read_text(encoding="utf-8")
    parsed = Page(text)
    (image,) = parsed.all("img")
    assert (image["src"] or "").startswith("data:image/png;base64,")
    assert image["alt"]
    (video,) = parsed.all("video")
    assert (video["src"] or "").startswith("data:video/mp4;base64,")
    assert len(parsed.all("svg")) == 2 + 2  # two figures of the mode, one chart a world
    assert len(parsed.all("polyline")) == 2 * 3
    assert len(parsed.all("details")) == len(page.METRICS) + 1
    assert {"full compute", "steps-2", "no memory", "revisited", "fired in"} <= {c.strip() for c in parsed.cells}
    assert "2.0 evaluations a chunk" in text
    assert "nothing about quality" in text
    assert "interrupted" not in text
    assert "http" not in text.replace("data:", "")  # nothing is fetched


def test_tables_and_levers_are_printed(tmp_path: Path, tiny_model: None, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--worlds", "1", "--chunks", "2", "--accelerations", "light-interaction", "--no-video"]
    arguments += ["--modes", "closed", "forced", "--brackets", "all", "--plain", "2", "--out", str(tmp_path)]
    assert main(["compare", "courtyard", *arguments]) == 0
    printed = capsys.readouterr().out
    names = ["full compute", "light-interaction", "no memory", "random memory", "oracle memory", "2 plain steps"]
    for name in names:
        assert sum(line.startswith(f"{name}  ") for line in printed.splitlines()) == 2, name  # one row a mode
    assert "light-interaction: cache: fired in 0 of 4 chunks; the first 3 chunks are made at full compute" in printed
    assert max(map(len, printed.splitlines())) < 200
    result = json.loads((tmp_path / "compare.json").read_text())
    assert [(r["mode"], r["name"]) for r in result["rows"]] == [(m, n) for m in ("closed", "forced") for n in names]
    closed, forced = (next(r for r in result["rows"] if r["mode"] == mode) for mode in ("closed", "forced"))
    assert closed["quality"]["energy"]["first half"] == forced["quality"]["energy"]["first half"]  # the first chunk
    assert closed["quality"]["energy"]["second half"] != forced["quality"]["energy"]["second half"]
    assert [r["recall"] for r in result["rows"]][:5] == ["pose", "pose", "pose", "random", "oracle"]
    assert not (tmp_path / "compare.mp4").exists()
    parsed = Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert not parsed.all("video")
    assert len(parsed.all("svg")) == 2 * 2 + 1


def test_without_pyav_the_page_says_so(tmp_path: Path, tiny_model: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise MissingDependencyError("video files need PyAV: pip install 'worldstride[video]'")

    monkeypatch.setattr("worldstride.video._import_av", missing)
    arguments = ["--worlds", "1", "--chunks", "1", "--accelerations", "steps-2", "--family", "plain"]
    assert main(["compare", "courtyard", *arguments, "--out", str(tmp_path)]) == 0
    assert not (tmp_path / "compare.mp4").exists()
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "worldstride[video]" in text
    assert not Page(text).all("video")


def interrupted_after(calls: int) -> Callable[[], None]:
    """Something that is interrupted once it was called so many times."""
    left = [calls]

    def advance() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    return advance


def test_an_interrupted_comparison_keeps_what_is_finished(tiny_engine: Engine, small: tuple[HeldOutWorld, ...]) -> None:
    arms = [FULL, Arm(resolve("steps-2"))]
    of_a_world = len(arms) * 2 * 2  # chunks, noise seeds
    result = compare(tiny_engine, arms, small, 2, advance=interrupted_after(of_a_world + 3))
    assert result.interrupted
    assert [(r["name"], r["worlds"]) for r in result.rows()] == [("full compute", 1), ("steps-2", 1)]
    assert len(result.curves()) == 1
    assert contact_sheet(result).height < 2 * contact_sheet(compare(tiny_engine, arms, small[:1], 2)).height
    nothing = compare(tiny_engine, arms, small, 2, advance=interrupted_after(of_a_world - 1))
    assert nothing.interrupted
    assert nothing.rows() == []


@pytest.mark.parametrize(("calls", "finished"), [(8 + 3, True), (3, False)])
def test_ctrl_c_writes_what_is_finished(
    tmp_path: Path, tiny_model: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    calls: int, finished: bool,
) -> None:  # fmt: skip
    def play(*given: Any) -> Comparison:
        return compare(*given[:-1], interrupted_after(calls))

    monkeypatch.setattr("worldstride.commands.compare.compare", play)
    arguments = ["--worlds", "2", "--chunks", "2", "--accelerations", "steps-2", "--brackets", "off", "--no-video"]
    assert main(["compare", "courtyard", *arguments, "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert (tmp_path / "index.html").exists() == (tmp_path / "compare.json").exists() == finished
    if finished:
        result = json.loads((tmp_path / "compare.json").read_text())
        assert result["interrupted"]
        assert [row["worlds"] for row in result["rows"]] == [1, 1]
        assert "The run was interrupted" in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_look_away_walk_comes_back() -> None:
    scene = worlds.scene_from_seed("plain", [3])
    start = worlds.sample_plain_walk(scene, 8)[:, 0]
    pose = look_away_walk(scene, start, 8, 56 + 24)[0]
    yaw = pose[:, 2] - pose[0, 2]
    assert bool((yaw[:8].abs() < 1e-6).all())
    assert float(yaw[31]) == pytest.approx(math.pi, abs=1e-4)
    assert float(yaw[55]) == pytest.approx(0, abs=1e-4)
    assert float(yaw[79]) == pytest.approx(-math.pi, abs=1e-4)
    assert float((pose[:, :2] - pose[0, :2]).norm(dim=-1).max()) < 0.3
    assert float(pose[:, 2].diff().abs().max()) < 0.14


def test_a_look_back_is_revisited_and_classes_part_the_pixels() -> None:
    world = held_out_world("courtyard", 1_000_000, "look away and back", 8, [4] * 12, [8] * 12, 96)
    assert tuple(world.frames.shape) == (56, 96, 96, 3)
    assert bool((sum(m.int() for m in world.masks.values()) == 1).all())
    share = {c: world.masks[c].float().mean((1, 2)) for c in CLASSES}
    assert float(share["novel"][12:24].mean()) > 0.1
    assert float(share["revisited"][-8:].mean()) > 0.2  # the window shows most of a chunk's view while turning
    assert float(share["novel"][-8:].mean()) < 0.1
    again = held_out_world("courtyard", 1_000_000, "look away and back", 8, [4] * 12, [8] * 12, 96)
    assert torch.equal(world.frames, again.frames)


def test_a_place_is_found_on_the_way_back_where_it_was_on_the_way_out() -> None:
    out = torch.arange(24) * 0.1
    x = torch.cat([torch.full((8,), -1.0), out, out.flip(0)])
    cameras = camera_from_pose(torch.stack([x, 0 * x, 0 * x, 0 * x], -1))
    found = earlier_visit(cameras, 8)
    assert found[:32] == [None] * 32  # new places, then places left too short a while ago
    assert found[32:] == [47 - i for i in range(32, 48)]
    turned = camera_from_pose(torch.stack([x, 0 * x, torch.where(torch.arange(56) < 32, 0, 0.5), 0 * x], -1))
    assert earlier_visit(turned, 8) == [None] * 48  # the same place seen in another direction


@pytest.fixture(scope="module")
def walked() -> HeldOutWorld:
    return held_out_world("courtyard", 1_000_001, "walk", 8, [4] * 2, [8] * 2, 96)


def scored(samples: torch.Tensor, world: HeldOutWorld, patch: tuple[int, int] | None = (12, 8)) -> Table:
    """Scores of samples float [2, C, 3, H, W]; full compute has the truth."""
    frames = (samples.clamp(0, 1) * 255).round().byte().movedim(-3, -1).numpy()
    truth = world.frames[world.given :].numpy()
    return score(frames, np.stack([truth, truth]), world, patch, CPU)


def test_the_truth_scores_best(walked: HeldOutWorld) -> None:
    truth = walked.truth.expand(2, -1, -1, -1, -1)
    perfect, faded = scored(truth, walked), scored(truth * 0.5 + 0.25, walked)
    assert float(perfect["energy"]["all"].max()) == pytest.approx(0, abs=1e-6)
    assert float(perfect["psnr"]["all"].min()) == pytest.approx(80, abs=0.1)
    assert torch.allclose(perfect["ssim"]["all"], torch.ones(8), atol=1e-3)
    whole, half = (summarise([t], None) for t in (perfect, faded))
    for metric in ("sharpness", "seam"):
        assert whole[metric]["all"]["mean"] == pytest.approx(1, abs=1e-4)
        assert half[metric]["all"]["mean"] == pytest.approx(0.5, abs=0.01)
    for group in ("all", "recent", "first half", "second half"):
        assert bool((faded["energy"][group] > 0.05).all())
        assert bool((faded["psnr"][group] < 40).all())
    assert "seam" not in scored(truth, walked, None)


def test_noise_is_a_loss_and_blur_no_gain(walked: HeldOutWorld) -> None:
    """Where nothing can be foreseen, the mean of what may be there has the better PSNR and the worse energy score."""
    noise = torch.randn(3, 8, 3, 96, 96, generator=torch.Generator().manual_seed(0)) * 0.12
    one, two, real = 0.5 + noise
    world = HeldOutWorld(**{**vars(walked), "frames": walked.frames.clone()})
    world.frames[world.given :] = (real.clamp(0, 1) * 255).round().byte().movedim(-3, -1)
    sharp = scored(torch.stack([one, two]), world)
    blurred = scored(torch.full((2, 8, 3, 96, 96), 0.5), world)
    worse = scored(0.5 + 2 * noise[:2], world)
    assert bool((blurred["psnr"]["all"] > sharp["psnr"]["all"] + 2).all())
    quality = summarise([blurred], [sharp])
    assert quality["loss"]["all"]["mean"] > 20
    assert quality["softening"]["all"]["mean"] == pytest.approx(100, abs=1)
    assert summarise([worse], [sharp])["loss"]["all"]["mean"] > 5
    assert summarise([sharp] * 2, [sharp] * 2)["loss"]["all"] == {"mean": 0, "low": 0, "high": 0}
    alone = summarise([sharp], [sharp])["loss"]["all"]
    assert alone["mean"] == 0
    assert math.isnan(alone["low"])  # one world tells no spread
    assert math.isnan(alone["high"])


def test_intervals_of_losses_are_paired() -> None:
    """Worlds differ far more than settings do: drawn for both sides, they do not widen the interval."""
    energies = [0.1, 0.4, 0.8, 0.2]

    def tables(factor: float) -> list[Table]:
        frames = [torch.full((4,), e * factor) for e in energies]
        return [{m: dict.fromkeys(GROUPS, v) for m in ("energy", "sharpness", "sharpness_truth")} for v in frames]

    quality = summarise(tables(1.1), tables(1.0))
    assert quality["loss"]["all"] == pytest.approx({"mean": 10, "low": 10, "high": 10}, abs=1e-3)
    assert quality["energy"]["all"]["high"] > 1.3 * quality["energy"]["all"]["mean"]


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Also for few worlds, where the plain bootstrap misses it far too often."""
    generator = torch.Generator().manual_seed(0)
    for count in (3, 8, 64):
        draws = torch.randn(1000, count, generator=generator)
        inside = [low <= 0 <= high for low, high in (metrics.interval(d, 400) for d in draws)]
        assert 0.92 < sum(inside) / len(inside) < 0.98
    assert all(math.isnan(end) for end in metrics.interval(torch.ones(1)))


@pytest.mark.parametrize("walk", ["look away and back", "out and back"])
def test_an_oracle_brings_back_more_than_chance(walk: Any) -> None:
    world = held_out_world("courtyard", 1_000_002, walk, 8, [4] * 12, [8] * 12, 24)
    scene, time = worlds.scene_from_seed("courtyard", [world.seed]), torch.arange(56.0)[None]
    covered = {"random": 0, "oracle": 0}
    for begin in range(32, 56, 4):
        older, coming = begin - 8, slice(begin, begin + 4)
        past = (world.pose[:, :begin], time[:, :begin])
        seen = worlds.covisible(scene, world.pose[:, coming], time[:, coming], *past, 24)[0].flatten(1)
        useful = seen & ~seen[older:].any(0)
        for how in ("random", "oracle"):
            rows = recalled(world, how, begin, 4, 8, 2, CPU)
            assert rows is not None
            assert rows == sorted(set(rows))
            assert len(rows) == 2
            assert 0 <= rows[0] <= rows[-1] < older
            assert rows == recalled(world, how, begin, 4, 8, 2, CPU)
            covered[how] += int(useful[rows].any(0).sum())
        best = recalled(world, "oracle", begin, 4, 8, 1, CPU)
        assert best is not None
        # frames that are almost as useful may win by what they show besides
        assert int(useful[best].sum()) >= int(useful[:older].sum(1).max()) - 0.01 * useful.shape[1]
    assert covered["oracle"] > 1.1 * covered["random"] > 0


def test_recall_leaves_pose_alone_and_has_nothing_at_first(small: tuple[HeldOutWorld, ...]) -> None:
    assert recalled(small[0], "pose", 16, 4, 4, 2, CPU) is None
    assert recalled(small[0], "oracle", 4, 4, 4, 2, CPU) is None
    assert recalled(small[0], "random", 5, 4, 4, 2, CPU) == [0]


def test_forced_sessions_go_on_from_the_truth(tiny_engine: Engine, small: tuple[HeldOutWorld, ...]) -> None:
    encode, world = tiny_engine.model.decoder.encode, small[0]
    latents = {}
    for mode in ("closed", "forced"):
        party = Party(tiny_engine, [world], FULL, mode)
        party.step()
        (bank, other), truth = (roll.session.history for roll in party._rolls), world.frames[4:8]
        want = encode(truth[None])[0]
        newest = list(range(len(bank) - len(want), len(bank)))
        latents[mode] = [h.latents(newest, CPU, tuple(want.shape[1:])) for h in (bank, other)]
        assert all(torch.equal(one, want) == (mode == "forced") for one in latents[mode])
        assert party.frames.shape == (2, 1, 4, 24, 24, 3)
        assert not np.array_equal(party.frames[0, 0], truth.numpy())  # what is scored is what was made
    assert not torch.equal(*latents["closed"])  # two noise seeds dream two things


def test_arms_meet_the_same_noise_and_no_memory_keeps_only_the_window(
    tiny_engine: Engine, small: tuple[HeldOutWorld, ...]
) -> None:
    arms = [FULL, Arm(Acceleration("again")), Arm(NO_MEMORY), *brackets()[1:]]
    result = compare(tiny_engine, arms, small[:1], 2)
    assert np.array_equal(result.shown["full compute"][0], result.shown["again"][0])
    reports = {t.arm.name: t.reports[0] for t in result.trials}
    assert [len(r.context.memory) for r in reports["no memory"]] == [0, 0]
    for name in ("full compute", "random memory", "oracle memory"):
        assert [len(r.context.memory) for r in reports[name]] == [0, 2], name  # nothing is old at first
    for how in ("random", "oracle"):
        assert sorted(reports[f"{how} memory"][1].context.memory) == recalled(small[0], how, 8, 4, 4, 2, CPU)
    assert pictured(result)[0] == "full compute"
    assert pictured(result)[-1] == "no memory"
    assert len(pictured(result, 3)) == 3
    result.trials[1].tables.clear()  # as where its scoring was interrupted
    assert "again" not in pictured(result)


def test_compare_refuses_wrong_arms_and_numbers(tiny_engine: Engine, small: tuple[HeldOutWorld, ...]) -> None:
    with pytest.raises(InputError, match="at least one world, chunk and walk, got 0, 1, 1"):
        held_out(tiny_engine, "plain", 0, 1, ("walk",))
    with pytest.raises(InputError, match="names of their own, got off, off"):
        compare(tiny_engine, [Arm(resolve("off")), Arm(resolve("off"))], small, 1)
    with pytest.raises(InputError, match="must be full compute, got 'steps-2'"):
        compare(tiny_engine, [Arm(resolve("steps-2")), Arm(resolve("off"))], small, 1)
    assert [a.steps for a in plain((1, 3))] == [1, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fps", "0"], "fps must be"),
        (["--worlds", "0"], "--worlds must be at least 1, got 0"),
        (["--chunks", "-1"], "--chunks must be at least 1, got -1"),
        (["--block", "0"], "--block must be at least 1, got 0"),
        (["--modes", "closed", "closed"], "must differ from each other, got closed closed"),
        (["--walks"], "--walks needs at least one value"),
        (["--plain", "0"], "at least 1, got 0"),
        (["--accelerations", "steps-2", "steps-2"], "two settings are called 'steps-2'"),
        (["--accelerations", "stepz"], "unknown acceleration 'stepz'"),
        (["--ablate", "off"], "'off' is full compute"),
        (
            ["--plain", "3", "--only", "3 plain step"],
            "no settings are called '3 plain step' (did you mean",
        ),
    ],
)
def test_wrong_options_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str],
    message: str,
) -> None:  # fmt: skip
    def no_model(*_: object, **__: object) -> None:
        raise RuntimeError("a model was loaded")

    monkeypatch.setattr("worldstride.commands.options.load", no_model)
    assert main(["compare", "courtyard", *ARGUMENTS, "--out", str(tmp_path / "x"), *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["compare", "courtyard", *ARGUMENTS, "--out", str(tmp_path / "file" / "x")]) == 2
    assert "cannot make the folder" in capsys.readouterr().err


BIG = Acceleration(
    "big", steps=3, window=2, memory=1, warmup=2, temporal=TemporalWindow(), spatial=SpatialMemory(),
    kept=KeptContext(), shift=2.0,
)  # fmt: skip


def named(arms: Sequence[Acceleration]) -> dict[str, Acceleration]:
    found = {a.name: a for a in arms}
    assert len(found) == len(arms)
    return found


def test_an_ablation_takes_settings_apart() -> None:
    arms = named(ablation(BIG))
    assert list(arms) == [
        "big", "only temporal", "only spatial", "only context", "only incremental", "only solver and steps",
        "+ incremental", "without temporal", "without spatial", "without context", "without incremental",
    ]  # fmt: skip
    assert arms["big"] == BIG
    assert arms["only temporal"] == Acceleration("only temporal", window=2, warmup=2, temporal=TemporalWindow())
    assert arms["only solver and steps"] == Acceleration("only solver and steps", steps=3, shift=2.0, warmup=2)
    assert (arms["only context"].window, arms["only context"].memory, arms["only context"].kept) == (2, 1, None)
    assert arms["+ incremental"] == Acceleration(**{**vars(BIG), "name": "+ incremental", "steps": None, "shift": None})
    assert arms["without spatial"] == Acceleration(
        **{**vars(BIG), "name": "without spatial", "spatial": None, "memory": None}
    )
    assert (arms["without context"].window, arms["without context"].memory, arms["without context"].steps) == (
        None,
        None,
        3,
    )
    assert all(a.warmup == 2 for a in arms.values())


def test_an_ablation_leaves_out_what_says_the_same() -> None:
    assert list(named(ablation(resolve("steps-2")))) == ["steps-2"]
    arms = named(ablation(PRESETS["light-interaction"]))
    assert "+ cache" not in arms  # the whole
    assert "without cache" not in arms  # only context
    assert all(a.pose == PRESETS["light-interaction"].pose for a in arms.values())


def test_an_ablation_takes_other_levers_too() -> None:
    cache = Acceleration("published", warmup=3, cache=StepCache())
    arms = named(ablation(BIG, {"cache": cache}))
    assert arms["only cache"] == Acceleration("only cache", warmup=3, cache=StepCache())
    with pytest.raises(InputError, match="called 'only spatial'"):
        ablation(BIG, {"spatial": cache})
    with pytest.raises(InputError, match="'off' is full compute"):
        ablation(resolve("off"))


def test_ablated_settings_are_played_once(tmp_path: Path, tiny_model: None) -> None:
    (tmp_path / "mine.toml").write_text('steps = 2\nmemory = 1\nname = "mine"\n')
    mine = str(tmp_path / "mine.toml")
    arguments = ["--worlds", "1", "--chunks", "1", "--no-video", "--brackets", "off", "--out", str(tmp_path / "out")]
    assert main(["compare", "courtyard", "--accelerations", mine, "--ablate", mine, *arguments]) == 0
    rows = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    assert [r["name"] for r in rows] == ["full compute", "mine", "only spatial", "only solver and steps"]
    assert main(["compare", "courtyard", "--ablate", mine, "--only", "only spatial", *arguments]) == 0
    rows = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    assert [r["name"] for r in rows] == ["full compute", "only spatial"]


def row(name: str, speed: float, loss: float | None) -> dict[str, Any]:
    ends = {"mean": loss, "low": None if loss is None else loss - 3, "high": None if loss is None else loss + 3}
    return {"name": name, "speedup": {"core": speed}, "quality": {"loss": dict.fromkeys(GROUPS, ends)}}


@pytest.mark.parametrize("count", [1, 2, 10, 30])
def test_figures_hold_any_number_of_settings(count: int) -> None:
    rows = [row("full <compute>", 1.0, 0.0)]
    rows += [row(f"settings {i}", 1 + 0.01 * (i % 3) + (i > 20), (i % 7) * 20 - 40.0) for i in range(1, count)]
    figure = page.scatter(rows)
    parsed = Page(figure)
    assert len(parsed.all("circle")) == count
    assert "full &lt;compute&gt;" in figure
    assert ("settings 1</text>" in figure) == (2 <= count <= page.COLOURS)
    frame = [float(v) for v in (parsed.all("svg")[0]["viewbox"] or "").split()]
    for dot in parsed.all("circle"):
        assert 0 < float(dot["cx"] or -1) < frame[2]
        assert 0 < float(dot["cy"] or -1) < frame[3]
    assert len(Page(page.by_class(rows)).all("circle")) == 3 * (count - 1)


def test_lower_losses_stand_lower_and_faster_settings_further_right() -> None:
    dots = Page(page.scatter([row("full", 1, 0), row("better", 1.5, -8), row("worse", 3, 60)])).all("circle")
    (_, full), (fast, better), (faster, worse) = ((float(d["cx"] or 0), float(d["cy"] or 0)) for d in dots)
    assert fast < faster
    assert worse < full < better  # pixels count downwards


def test_figures_survive_missing_values() -> None:
    rows = [row("full", 1.0, 0.0), row("unknown", 2.0, None)]
    assert len(Page(page.scatter(rows)).all("circle")) == 1
    assert page.by_class(rows).count("hardly any") == 3
    nothing = {"seed": 1, "walk": "walk", "revisited": [0.0], "psnr": {"off": [None]}}
    assert "polyline" in page.chart(nothing, {"off": 0, "not played": 1})


@pytest.mark.parametrize(("value", "text"), [(1.26, "+1.3"), (-0.04, "0.0"), (-2.0, "-2.0"), (None, "\N{EN DASH}")])
def test_signed_numbers(value: float | None, text: str) -> None:
    assert page.signed(value) == text
