"""`worldstride compare`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tqdm import tqdm
from tyro.conf import arg

from worldstride.acceleration import resolve
from worldstride.bench.compare import NO_MEMORY, Comparison, compare
from worldstride.bench.environment import engine_facts, environment
from worldstride.bench.page import write_page
from worldstride.bench.results import make_folder, plain, write_json
from worldstride.bench.rollout import RANDOM_WEIGHTS_NOTE
from worldstride.bench.sheet import contact_sheet, save_picture, side_by_side
from worldstride.bench.walks import CLASSES, FIRST_SEED
from worldstride.commands.options import EngineOptions, Family, ModelName
from worldstride.commands.table import table
from worldstride.errors import MissingDependencyError
from worldstride.video import VideoWriter, check_video


@dataclass(frozen=True)
class Compare:
    """Compare the model with the truth on held-out worlds: a table, a contact sheet, a video and a page."""

    model: ModelName
    """Name of the model."""
    worlds: int = 3
    """Held-out worlds; every second walk is a journey, the others look away and back."""
    chunks: int = 12
    """Chunks in each world; 12 of the courtyard's turn half around and back."""
    family: Family = "courtyard"
    """Kind of the worlds."""
    accelerations: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ("off", "steps-4")
    """Presets or .json files; full compute without memory is always played too."""
    out: Path = Path("out/compare")
    """Folder for the page and its files."""
    seed: int = FIRST_SEED
    """Seed of the first world; worlds from 1000000 on were kept from training."""
    fps: int = 10
    """Frames per second of the video."""
    engine: Annotated[EngineOptions, arg(name="")] = field(default_factory=EngineOptions)

    def run(self, command: str) -> int:
        """Play, write the files, print the table."""
        settings = [resolve(name) for name in self.accelerations]
        if NO_MEMORY.name not in (s.name for s in settings):
            settings.append(NO_MEMORY)
        no_video = self._check_video()
        make_folder(self.out)
        engine = self.engine.load(self.model)
        begin = time.perf_counter()
        with tqdm(total=self.worlds * self.chunks * len(settings), unit="chunk", desc=self.model) as bar:
            played = compare(engine, settings, self.family, self.worlds, self.chunks, self.seed, bar.update)
        facts: dict[str, Any] = {
            "format": "worldstride-compare",
            **environment(engine.device, command),
            "engine": engine_facts(engine),
            "note": RANDOM_WEIGHTS_NOTE if engine.source.weights == "random" else "",
            "family": self.family,
            "chunks": self.chunks,
            "rows": played.rows(),
            "worlds": played.curves(),
            "seconds": time.perf_counter() - begin,
        }
        page = self._write(facts, played, no_video)
        _print(facts)
        print(f"\npage: {page}")
        return 0

    def _check_video(self) -> str:
        """Why there will be no video, or nothing; raises what cannot be used before the work, not after it."""
        try:
            check_video(self._video, self.fps)
        except MissingDependencyError as error:  # the numbers and the page are worth having without it
            print(f"no video will be written: {error}")
            return f"No video was written: {error}"
        return ""

    @property
    def _video(self) -> Path:
        return self.out / "compare.mp4"

    def _write(self, facts: Mapping[str, Any], played: Comparison, no_video: str) -> Path:
        write_json(self.out / "compare.json", facts)
        sheet, page = self.out / "sheet.png", self.out / "index.html"
        save_picture(contact_sheet(played), sheet)
        if not no_video:
            self._film(played, self._video)
        shown = plain(facts)
        write_page(page, shown if isinstance(shown, dict) else {}, sheet, None if no_video else self._video, no_video)
        return page

    def _film(self, played: Comparison, path: Path) -> None:
        parts = side_by_side(played)
        first = next(parts)
        with VideoWriter(path, self.fps, (first.shape[1], first.shape[2])) as video:
            video.write(first)
            for part in parts:
                video.write(part)


def _print(facts: Mapping[str, Any]) -> None:
    headers = ["settings", "PSNR", *CLASSES, "SSIM", "sharp", "seam", "frames/s", "ms/chunk", "p95", "context KiB"]
    rows = []
    for row in facts["rows"]:
        quality, speed = row["quality"], row["speed"]
        psnr = [_cell(quality["psnr"][c]["mean"], 2) for c in ("all", *CLASSES)]
        other = [_cell(quality[m]["all"]["mean"], 3) for m in ("ssim", "sharpness", "seam")]
        total = speed["stage_ms"]["total"]
        times = [f"{speed['frames_per_second']:.1f}", f"{total['p50']:.0f}", f"{total['p95']:.0f}"]
        rows.append([row["name"], *psnr, *other, *times, f"{speed['context_bytes'] / 1024:.0f}"])
    print(table(headers, rows))
    if facts["note"]:
        print(f"\n{facts['note']}")


def _cell(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if value == value else "-"
