"""The page of a comparison: one HTML file that holds everything it shows."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from worldstride.atomic import atomic_write
from worldstride.bench.walks import CLASSES

_EMBED = 12_000_000  # bytes; a longer video stays a file beside the page
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 460, 240, 38, 10, 46


def write_page(path: Path, result: Mapping[str, Any], sheet: Path, video: Path | None, no_video: str = "") -> None:
    """Write the page of `result` (see `compare.json`) with its contact sheet and, where there is one, its video.

    `no_video` says why there is none.
    """
    source = (resources.files("worldstride.bench") / "templates" / "compare.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["number"] = _number
    page = environment.from_string(source).render(
        result=result,
        classes=CLASSES,
        charts=[chart(world) for world in result["worlds"]],
        names=[row["name"] for row in result["rows"]],
        sheet=_data_uri(sheet, "image/png"),
        video=None if video is None else _video(video),
        no_video=no_video,
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def chart(world: Mapping[str, Any]) -> Markup:
    """PSNR chunk by chunk of one world as SVG, above the share of pixels that show revisited places."""
    lines: Mapping[str, Sequence[float]] = {name: scores["all"] for name, scores in world["psnr"].items()}
    values = [v for line in lines.values() for v in line if math.isfinite(v)] or [0.0]
    low, high = 5 * math.floor(min(values) / 5), 5 * math.ceil((max(values) + 0.01) / 5)
    count = max(len(line) for line in lines.values())
    right, bottom = _WIDTH - 10, _HEIGHT - _BOTTOM

    def x(i: float) -> float:
        return _LEFT + (right - _LEFT) * (i + 0.5) / count

    def y(v: float) -> float:
        return bottom - (bottom - _TOP) * (v - low) / (high - low)

    parts = []
    for tick in range(low, high + 1, 5 if high - low <= 25 else 10):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 6}" y="{y(tick) + 4:.1f}">{tick}</text>')
    for i, share in enumerate(world["shares"]["revisited"]):
        wide = (right - _LEFT) / count
        parts.append(
            f'<rect class="share" x="{_LEFT + i * wide:.1f}" y="{bottom + 8}" width="{wide - 1:.1f}" height="10" '
            f'fill-opacity="{0.06 + 0.94 * share:.2f}"><title>chunk {i}: {share:.0%} revisited</title></rect>'
        )
    explained = "chunks; the darker the bar, the more pixels are revisited"
    parts.append(f'<text class="tick" x="{_LEFT}" y="{_HEIGHT - 10}">{explained}</text>')
    for k, (name, line) in enumerate(lines.items()):
        shown = [(x(i), y(v), v, i) for i, v in enumerate(line) if math.isfinite(v)]
        points = " ".join(f"{px:.1f},{py:.1f}" for px, py, _, _ in shown)
        parts.append(f'<polyline class="s{k % 6}" points="{points}"/>')
        parts += [
            f'<circle class="s{k % 6}" cx="{px:.1f}" cy="{py:.1f}" r="3">'
            f"<title>{escape(name)}, chunk {i}: {v:.1f} dB</title></circle>"
            for px, py, v, i in shown
        ]
    label = escape(f"PSNR in dB of world {world['seed']}, chunk by chunk")
    return Markup(f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>')


def _number(value: float | None, digits: int = 1) -> str:
    return "\N{EN DASH}" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _video(path: Path) -> str:
    return _data_uri(path, "video/mp4") if path.stat().st_size <= _EMBED else path.name


def _data_uri(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
