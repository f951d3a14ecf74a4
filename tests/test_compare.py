"""Model against truth: walks, scores, files, page."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import worldstride
from worldstride import worlds
from worldstride.acceleration import resolve
from worldstride.bench import page
from worldstride.bench.compare import METRICS, NO_MEMORY, compare, play, score
from worldstride.bench.walks import CLASSES, HeldOutWorld, held_out_world, look_away_walk
from worldstride.cli import main
from worldstride.errors import InputError, MissingDependencyError
from worldstride.video import read_video


class Page(HTMLParser):
    """Tags with their attributes, and the text of table cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self._open):
            self.cells[-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


ARGUMENTS = ["--weights", "random", "--worlds", "2", "--chunks", "3", "--accelerations", "steps-2"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "deep" / "out"
    assert main(["compare", "courtyard", *ARGUMENTS, "--out", str(folder)]) == 0
    return folder


def test_compare_writes_all_files(out: Path) -> None:
    assert sorted(p.name for p in out.iterdir()) == ["compare.json", "compare.mp4", "index.html", "sheet.png"]
    result = json.loads((out / "compare.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["steps-2", "no memory"]
    for row in result["rows"]:
        assert set(row["quality"]) == set(METRICS)
        assert set(row["quality"]["psnr"]) == {"all", *CLASSES}
        assert 5 < row["quality"]["psnr"]["all"]["mean"] < 20
        assert row["speed"]["frames_per_second"] > 0
    assert [w["walk"] for w in result["worlds"]] == ["look away and back", "journey"]
    for world in result["worlds"]:
        assert len(world["psnr"]["steps-2"]["all"]) == 3
        assert [sum(s) for s in zip(*world["shares"].values(), strict=True)] == pytest.approx([1.0] * 3)
    assert result["command"].startswith("worldstride compare courtyard")
    assert {"versions", "hardware", "date", "note"} <= result.keys()


def test_sheet_and_video_show_truth_beside_model(out: Path) -> None:
    sheet = Image.open(out / "sheet.png")
    assert sheet.width > 8 * 192
    assert sheet.height > 2 * 3 * 192
    pytest.importorskip("av")
    video = read_video(out / "compare.mp4")
    assert tuple(video.shape) == (2 * (8 + 12), 32 + 96 * 4, 3 * 96 * 4, 3)


def test_the_page_holds_everything(out: Path) -> None:
    text = (out / "index.html").read_text(encoding="utf-8")
    parsed = Page(text)
    (image,) = parsed.all("img")
    assert (image["src"] or "").startswith("data:image/png;base64,")
    assert image["alt"]
    (video,) = parsed.all("video")
    assert (video["src"] or "").startswith("data:video/mp4;base64,")
    assert len(parsed.all("svg")) == 2
    assert len(parsed.all("polyline")) == 4
    assert len(parsed.all("table")) == 1
    assert {"steps-2", "no memory", "revisited", "frames/s"} <= {c.strip() for c in parsed.cells}
    assert "nothing about quality" in text
    assert "http" not in text.replace("data:", "")  # nothing is fetched


def test_without_pyav_the_page_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise MissingDependencyError("video files need PyAV: pip install 'worldstride[video]'")

    monkeypatch.setattr("worldstride.video._import_av", missing)
    arguments = ["--weights", "random", "--worlds", "1", "--chunks", "1", "--accelerations", "steps-2"]
    assert main(["compare", "courtyard", *arguments, "--family", "plain", "--out", str(tmp_path)]) == 0
    assert not (tmp_path / "compare.mp4").exists()
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "worldstride[video]" in text
    assert not Page(text).all("video")


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


def test_the_truth_scores_best() -> None:
    world = held_out_world("courtyard", 1_000_001, "journey", 8, [4] * 2, [8] * 2, 96)
    truth = world.truth
    perfect = score(truth, truth, world.masks, (12, 12))
    assert float(perfect["psnr"]["all"].min()) == pytest.approx(80, abs=0.1)
    for metric in ("ssim", "sharpness", "seam"):
        assert torch.allclose(perfect[metric]["all"], torch.ones(8), atol=1e-3)
    blurred = score(truth * 0.5 + 0.25, truth, world.masks, (12, 12))
    assert bool((blurred["psnr"]["all"] < perfect["psnr"]["all"]).all())
    assert torch.allclose(blurred["sharpness"]["all"], torch.full((8,), 0.5), atol=1e-3)
    assert bool(score(truth, truth, world.masks, None)["seam"]["all"].isnan().all())


def test_playing_repeats_itself_and_no_memory_keeps_only_the_window() -> None:
    engine = worldstride.load("courtyard", weights="random")
    world: HeldOutWorld = held_out_world("plain", 5, "journey", 8, [4] * 2, [8] * 2, 96)
    first, second, without = play(engine, world, [resolve("steps-2"), resolve("steps-2"), NO_MEMORY], 2)
    assert np.array_equal(first.frames, second.frames)
    assert [len(r.context.memory) for r in without.reports] == [0, 0]
    assert without.reports[1].context_latents == 8


def test_compare_refuses_wrong_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = worldstride.load("courtyard", weights="random")
    with pytest.raises(InputError, match="at least one world and one chunk, got 0 and 1"):
        compare(engine, [resolve("off")], count=0, chunks=1)
    with pytest.raises(InputError, match="names of their own"):
        compare(engine, [resolve("off"), resolve("off")], count=1, chunks=1)
    (tmp_path / "file").write_text("")
    assert main(["compare", "courtyard", *ARGUMENTS, "--out", str(tmp_path / "file" / "x")]) == 2
    assert "cannot make the folder" in capsys.readouterr().err


def test_a_bad_rate_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_model(*_: object, **__: object) -> None:
        raise RuntimeError("a model was loaded")

    monkeypatch.setattr("worldstride.commands.options.load", no_model)
    assert main(["compare", "courtyard", *ARGUMENTS, "--fps", "0", "--out", str(tmp_path / "x")]) == 2
    assert "fps must be" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_charts_survive_missing_values() -> None:
    nothing = {"seed": 1, "walk": "journey", "shares": {"revisited": [0.0]}, "psnr": {"off": {"all": [math.nan]}}}
    assert "polyline" in page.chart(nothing)
