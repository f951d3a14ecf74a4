"""The page of a comparison: one HTML file that holds everything it shows."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from worldstride.atomic import atomic_write
from worldstride.bench.quality import GROUPS
from worldstride.bench.rollout import STAGES

SPLIT = ("revisited", "recent", "novel")
"""Classes of pixels that losses are split by."""
MODES = {
    "closed": ("Closed loop", "the model goes on from its own frames, as a player sees it"),
    "forced": ("Forced", "the truth takes the place of every chunk that was made, so each is judged by itself"),
}
"""Mode -> its title and what it means."""
METRICS: dict[str, tuple[str, int, str]] = {
    "loss": ("Loss", 1, "% by which the energy score is above full compute's; paired intervals"),
    "energy": ("Energy score", 4, "distance to the truth less half the distance of two noise seeds; lower is better"),
    "psnr": ("PSNR", 2, "dB against the truth; blur raises it"),
    "psnr_full": ("PSNR against full compute", 2, "dB with the same noise: how much the picture changed"),
    "floor": ("PSNR of two noise seeds", 2, "dB against each other: how much the picture changes by chance"),
    "ssim": ("SSIM", 3, "structural similarity to the truth"),
    "sharpness": ("Sharpness", 3, "detail inside patches; the truth's is 1, less is blur"),
    "softening": ("Softening", 1, "% by which the sharpness is below full compute's; paired intervals"),
    "seam": ("Seams", 3, "steps across patch borders; the truth's are 1, more are visible"),
    "visits": ("Two visits", 2, "dB between frames of two visits of one place: whether it stayed what it was"),
}
"""Metric -> its title, digits that are shown, and what it means."""
COLOURS = 10
"""Colours of settings; more settings take them in turns."""

_Box = tuple[float, float, float, float]  # left, top, right, bottom
_TIMES = "\N{MULTIPLICATION SIGN}"
_STYLE = (
    "svg { background: #fff } text { font: 12px system-ui, sans-serif; fill: #1d1d1b } line { stroke: #deded8 } "
    ".zero, .lead { stroke: #62625e } .end { text-anchor: end } .mid { text-anchor: middle } "
    "circle { fill: #2a6fc9 } line[class^='s'] { stroke: #2a6fc9; stroke-width: 2 }"
)
_EMBED = 12_000_000  # bytes; a longer video stays a file beside the page
_LETTER = 6.6  # pixels of a letter, about
_PERCENTS = (0.0, *(sign * v for v in (1, 10, 100, 5, 50, 2, 20, 0.5, 0.2, 0.1, 200, 500, 1000) for sign in (1, -1)))
_FACTORS = (1, 2, 5, 10, 20, 50, 0.5, 3, 1.5, 4, 7, 15, 30, 0.2, 0.1, 0.75, 1.25, 1.75, 2.5)


def write_page(path: Path, result: Mapping[str, Any], sheet: Path, video: Path | None, no_video: str = "") -> None:
    """Write the page of `result` (see `compare.json`) with its contact sheet and, where there is one, its video.

    `no_video` says why there is none.
    """
    source = (resources.files("worldstride.bench") / "templates" / "compare.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(number=number, signed=signed)
    by_mode = {m: [row for row in result["rows"] if row["mode"] == m] for m in result["modes"]}
    by_mode = {m: rows for m, rows in by_mode.items() if rows}
    places = {name: k for k, name in enumerate(dict.fromkeys(row["name"] for row in result["rows"]))}
    page = environment.from_string(source).render(
        result=result, by_mode=by_mode, modes=MODES, groups=GROUPS, split=SPLIT, metrics=METRICS, stages=STAGES,
        colours=COLOURS, places=places, cell=cell, scatter=scatter, by_class=by_class,
        charts=[chart(world, {n: places[n] for n in result["pictured"]}) for world in result["worlds"]],
        sheet=_data_uri(sheet, "image/png"), video=None if video is None else _video(video), no_video=no_video,
    )  # fmt: skip
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def number(value: float | None, digits: int = 1) -> str:
    """A number with so many digits, a dash where it is not known."""
    return "\N{EN DASH}" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 1) -> str:
    """A number that says which way it goes; what rounds to nothing has no sign."""
    text = number(value, digits)
    if value is None or not math.isfinite(value) or not float(text):
        return text.removeprefix("-")
    return f"+{text}" if value > 0 else text


def cell(row: Mapping[str, Any], metric: str, group: str = "all") -> dict[str, float]:
    """Mean of one metric over one group, and the low and high end of its interval; NaN where it is not known."""
    found = row["quality"].get(metric, {}).get(group, {})
    return {end: math.nan if found.get(end) is None else found[end] for end in ("mean", "low", "high")}


def scatter(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Speed against loss as SVG: the core's speed-up to the right, the energy score's loss upwards with whiskers."""
    width, height, left, right, top, bottom = 900, 430, 62, 880, 16, 378
    known = [(k, row, row["speedup"]["core"], cell(row, "loss")) for k, row in enumerate(rows)]
    known = [one for one in known if _finite(one[2], one[3]["mean"])]
    speeds = [speed for _, _, speed, _ in known]
    x = _Axis.over([0.9, 1.5, *speeds], left, right, math.log)
    y = _Axis.over([-0.5, 0.5, *(v for one in known for v in one[3].values())], bottom, top, math.asinh)
    parts = list[str]()
    for tick in y.ticks(_PERCENTS, 18):
        parts.append(_line("grid" if tick else "zero", left, y(tick), right, y(tick)))
        parts.append(_text("tick end", left - 7, y(tick) + 4, f"{tick:+g} %" if tick else "0 %"))
    for tick in x.ticks(_FACTORS, 34):
        parts.append(_line("grid", x(tick), top, x(tick), bottom))
        parts.append(_text("tick mid", x(tick), bottom + 16, f"{tick:g}{_TIMES}"))
    axis = "core speed-up over full compute; further right is faster, lower is better"
    parts.append(_text("tick mid", (left + right) / 2, height - 12, axis))
    points = [(x(speed), y(loss["mean"])) for _, _, speed, loss in known]
    for (k, row, speed, loss), (px, py) in zip(known, points, strict=True):
        parts.append(_whisker(k, px, py, y, loss, upright=True))
        parts.append(_dot(k, px, py, 5, f"{row['name']}: {speed:.2f}{_TIMES}, {_interval(loss)}"))
    named = len(known) <= COLOURS
    labels = [f"{k + 1} {_short(row['name'])}" if named else str(k + 1) for k, row, _, _ in known]
    lines = [(left, y(0) - 1, right, y(0) + 1)]
    ends = [(px, loss["low"], loss["high"]) for (px, _), (_, _, _, loss) in zip(points, known, strict=True)]
    lines += [(px - 1, y(high), px + 1, y(low)) for px, low, high in ends if _finite(low, high)]
    parts += _labels(points, labels, lines, (left, top, width, bottom))
    return _svg(width, height, "Loss against speed-up of all settings", parts)


def figure(rows: Sequence[Mapping[str, Any]]) -> str:
    """The scatter plot of `rows` as a file of its own, with the styles that a page would bring."""
    text = str(scatter(rows)).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    head, body = text.split(">", 1)
    return f"{head}><style>{_STYLE}</style>{body}"


def by_class(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Loss by class of pixels as SVG: one panel a class, one line of dot and whisker for all settings but the first."""
    line, first, panel, gap, top = 24, 210, 276, 24, 30
    width, bottom = first + 3 * panel + 2 * gap + 12, top + line * (len(rows) - 1)
    every = [v for row in rows[1:] for group in SPLIT for v in cell(row, "loss", group).values()]
    parts = list[str]()
    for k, row in list(enumerate(rows))[1:]:
        parts.append(_text("label end", first - 14, top + line * (k - 0.5) + 4, f"{k + 1} {_short(row['name'])}"))
    for p, group in enumerate(SPLIT):
        left = first + p * (panel + gap)
        x = _Axis.over([-0.5, 0.5, *every], left, left + panel, math.asinh)
        parts.append(_text("label", left, top - 12, f"{group} pixels"))
        for tick in x.ticks(_PERCENTS, 32):
            parts.append(_line("grid" if tick else "zero", x(tick), top, x(tick), bottom))
            parts.append(_text("tick mid", x(tick), bottom + 16, f"{tick:+g} %" if tick else "0 %"))
        for k, row in list(enumerate(rows))[1:]:
            loss, y = cell(row, "loss", group), top + line * (k - 0.5)
            if not _finite(loss["mean"]):
                parts.append(_text("tick mid", x(0), y + 4, "hardly any"))
                continue
            parts.append(_whisker(k, x(loss["mean"]), y, x, loss, upright=False))
            parts.append(_dot(k, x(loss["mean"]), y, 5, f"{row['name']}, {group}: {_interval(loss)}"))
    return _svg(width, bottom + 28, "Loss of all settings by class of pixels", parts)


def chart(world: Mapping[str, Any], places: Mapping[str, int]) -> Markup:
    """PSNR chunk by chunk of one world as SVG, above the share of pixels that show revisited places.

    `places` holds the names of the settings to draw and their places in the table, which give the colours.
    """
    width, height, left, right, top, bottom = 460, 240, 38, 450, 10, 194
    lines: dict[str, Sequence[float | None]] = {n: world["psnr"][n] for n in places if n in world["psnr"]}
    values = [v for line in lines.values() for v in line if v is not None and math.isfinite(v)] or [0.0]
    low, high = 5 * math.floor(min(values) / 5), 5 * math.ceil((max(values) + 0.01) / 5)
    count = max(len(world["revisited"]), 1)
    wide = (right - left) / count
    y = _Axis(low, high, bottom, top, float)
    parts = list[str]()
    for tick in range(low, high + 1, 5 if high - low <= 25 else 10):
        parts.append(_line("grid", left, y(tick), right, y(tick)))
        parts.append(_text("tick end", left - 6, y(tick) + 4, str(tick)))
    for i, share in enumerate(world["revisited"]):
        parts.append(
            f'<rect class="share" x="{left + i * wide:.1f}" y="{bottom + 8}" width="{wide - 1:.1f}" height="10" '
            f'fill-opacity="{0.06 + 0.94 * share:.2f}"><title>chunk {i}: {share:.0%} revisited</title></rect>'
        )
    parts.append(_text("tick", left, height - 10, "chunks; the darker the bar, the more pixels are revisited"))
    for name, line in lines.items():
        shown = [(left + wide * (i + 0.5), v, i) for i, v in enumerate(line) if v is not None and math.isfinite(v)]
        points = " ".join(f"{x:.1f},{y(v):.1f}" for x, v, _ in shown)
        parts.append(f'<polyline class="s{places[name] % COLOURS}" points="{points}"/>')
        parts += [_dot(places[name], x, y(v), 3, f"{name}, chunk {i}: {v:.1f} dB") for x, v, i in shown]
    return _svg(width, height, f"PSNR in dB of world {world['seed']}, chunk by chunk", parts)


@dataclass(frozen=True)
class _Axis:
    """Values to places from `start` to `stop`; `bend` makes the scale."""

    low: float
    """Bent, as is `high`."""
    high: float
    start: float
    stop: float
    bend: Callable[[float], float]

    @classmethod
    def over(cls, values: Sequence[float], start: float, stop: float, bend: Callable[[float], float]) -> _Axis:
        """An axis that holds all values that are known, and a little more."""
        bent = [bend(v) for v in values if math.isfinite(v)]
        room = 0.05 * (max(bent) - min(bent))
        return cls(min(bent) - room, max(bent) + room, start, stop, bend)

    def __call__(self, value: float) -> float:
        return self.start + (self.stop - self.start) * (self.bend(value) - self.low) / (self.high - self.low)

    def ticks(self, candidates: Sequence[float], apart: float) -> list[float]:
        """Of the candidates, best first, those on the axis that lie so many pixels apart."""
        found = list[float]()
        for v in candidates:
            if self.low <= self.bend(v) <= self.high and all(abs(self(v) - self(other)) >= apart for other in found):
                found.append(v)
        return found


def _labels(
    points: Sequence[tuple[float, float]], texts: Sequence[str], lines: Sequence[_Box], room: _Box
) -> list[str]:
    """Labels beside points, each at the first place in `room` around its point where it covers nothing."""
    taken = [*lines, *((px - 6, py - 6, px + 6, py + 6) for px, py in points)]
    parts = list[str]()
    for (px, py), text in zip(points, texts, strict=True):
        wide, best = _LETTER * len(text), None
        for dx, dy in _AROUND:
            x0 = px + dx if dx > 0 else px + dx - wide if dx < 0 else px - wide / 2
            box = (x0, py + dy - 7, x0 + wide, py + dy + 7)
            inside = box[0] >= room[0] and box[1] >= room[1] and box[2] <= room[2] and box[3] <= room[3]
            covered = sum(_meet(box, other) for other in taken) + (0 if inside else 100)
            if best is None or covered < best[0]:
                best = covered, box, dx, dy
            if not covered:
                break
        if best is None:
            continue
        _, box, dx, dy = best
        taken.append(box)
        kind, at = ("label", box[0]) if dx > 0 else ("label end", box[2]) if dx < 0 else ("label mid", px)
        if math.hypot(dx, dy) > 20:
            parts.append(_line("lead", px, py, at, py + dy))
        parts.append(_text(kind, at, box[3] - 3, text))
    return parts


_AROUND = tuple(
    (dx * r, dy * r)
    for r in (1, 2, 3, 4, 6, 8)
    for dx, dy in ((10, 0), (-10, 0), (0, -14), (0, 14), (9, -12), (9, 12), (-9, -12), (-9, 12))
)
"""Where a label may stand beside its point, best first."""


def _meet(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _whisker(k: int, x: float, y: float, axis: _Axis, ends: Mapping[str, float], upright: bool) -> str:
    if not _finite(ends["low"], ends["high"]):
        return ""
    low, high = axis(ends["low"]), axis(ends["high"])
    return _line(f"s{k % COLOURS}", *((x, low, x, high) if upright else (low, y, high, y)))


def _interval(ends: Mapping[str, float]) -> str:
    return f"loss {signed(ends['mean'])} % ({signed(ends['low'])} to {signed(ends['high'])})"


def _short(name: str, most: int = 26) -> str:
    return name if len(name) <= most else f"{name[: most - 1].rstrip()}\N{HORIZONTAL ELLIPSIS}"


def _finite(*values: float | None) -> bool:
    return all(v is not None and math.isfinite(v) for v in values)


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> Markup:
    inside = "".join(parts)
    return Markup(f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{inside}</svg>')


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(kind: str, x: float, y: float, text: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _dot(k: int, x: float, y: float, radius: float, title: str) -> str:
    where = f'cx="{x:.1f}" cy="{y:.1f}" r="{radius}"'
    return f'<circle class="s{k % COLOURS}" {where}><title>{escape(title)}</title></circle>'


def _video(path: Path) -> str:
    return _data_uri(path, "video/mp4") if path.stat().st_size <= _EMBED else path.name


def _data_uri(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
