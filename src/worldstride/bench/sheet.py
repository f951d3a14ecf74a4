"""Pictures of a comparison: a contact sheet, and frames of a video with the truth beside the model."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from worldstride.atomic import atomic_write
from worldstride.bench.compare import NO_MEMORY, Comparison

_PAPER, _INK, _FAINT = (250, 250, 248), (30, 30, 30), (110, 110, 108)
_GAP, _HEAD, _LABEL, _BAR = 6, 64, 190, 32  # pixels
_LARGE, _SMALL = 20, 14  # letters of the sheet, which pages show reduced, and of the video


def pictured(result: Comparison, most: int = 6) -> list[str]:
    """What is worth seeing beside the truth: full compute, the settings after it, last what forgets, if played.

    Settings have a row in the tables, too: where scoring was interrupted there are frames without scores.
    """
    names = list(dict.fromkeys(t.arm.name for t in result.trials if t.tables and t.arm.name in result.shown))
    forgets = [n for n in names if n == NO_MEMORY.name]
    return [n for n in names if n not in forgets][: most - len(forgets)] + forgets


def contact_sheet(result: Comparison, columns: int = 8, scale: int = 2, worlds: int = 3) -> Image.Image:
    """Rows truth and settings; a few frames of each of the first worlds, evenly spread, the last included.

    What a setting has not played yet stays empty.
    """
    names = pictured(result)
    frames = result.shown[names[0]]
    total, height, width = next(iter(frames.values())).shape[:3]
    picks = np.unique(np.linspace(0, total - 1, min(columns, total)).round().astype(int))
    cell_w, cell_h = width * scale + _GAP, height * scale + _GAP
    block = _HEAD + (1 + len(names)) * cell_h + _GAP
    numbers = sorted(frames)[:worlds]
    sheet = Image.new("RGB", (_LABEL + len(picks) * cell_w, len(numbers) * block), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for at, number in enumerate(numbers):
        world, top = result.worlds[number], at * block
        _text(draw, (8, top + 8), f"world {world.seed}: {world.walk}", _INK, sheet.width, _LARGE)
        for c, frame in enumerate(picks):
            where = (_LABEL + c * cell_w, top + _HEAD - 28)
            _text(draw, where, f"frame {world.given + frame}", _FAINT, cell_w - _GAP, _LARGE)
        rows: list[tuple[str, np.ndarray | None]] = [("truth", world.frames[world.given :].numpy())]
        rows += [(name, result.shown[name].get(number)) for name in names]
        for r, (label, shown) in enumerate(rows):
            y = top + _HEAD + r * cell_h
            _text(draw, (8, y + cell_h // 2 - 14), label, _INK, _LABEL - 16, _LARGE)
            if shown is None:
                continue
            for c, frame in enumerate(picks):
                picture = Image.fromarray(shown[frame].repeat(scale, 0).repeat(scale, 1))
                sheet.paste(picture, (_LABEL + c * cell_w, y))
    return sheet


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG atomically."""
    with atomic_write(path) as temporary:
        picture.save(temporary, optimize=True)


def filmed(result: Comparison) -> list[str]:
    """Settings of the video's columns: few enough to be seen beside the truth on one screen."""
    return pictured(result)[:3]


def side_by_side(result: Comparison, scale: int = 3) -> Iterator[np.ndarray]:
    """Frames uint8 [F, H, W, 3] of each world that all columns have: the truth and settings, side by side, labelled."""
    names = filmed(result)
    for number, world in enumerate(result.worlds):
        if any(number not in result.shown[name] for name in names):
            continue
        given = world.frames[: world.given].numpy()
        strips = [world.frames.numpy()]
        strips += [np.concatenate([given, result.shown[name][number]]) for name in names]
        joined = np.concatenate(strips, 2).repeat(scale, 1).repeat(scale, 2)
        labels = ["truth", *names]
        yield np.stack([
            np.concatenate([_bar(labels, joined.shape[2], f"world {world.seed}, frame {i}", i < world.given), frame])
            for i, frame in enumerate(joined)
        ])  # fmt: skip


def _bar(labels: Sequence[str], width: int, note: str, given: bool) -> np.ndarray:
    bar = Image.new("RGB", (width, _BAR), _PAPER)
    draw, column = ImageDraw.Draw(bar), width // len(labels)
    for i, label in enumerate(labels):
        text = f"{label}, {note}" if i == 0 else f"{label} (given frame)" if given else label
        _text(draw, (i * column + 8, 8), text, _INK, column - 12, _SMALL)
    return np.asarray(bar)


@functools.cache
def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _text(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, colour: tuple[int, int, int], room: int, size: int
) -> None:
    """Write text, cut off where it is wider than `room` pixels."""
    font, shown = _font(size), text
    while len(shown) > 1 and draw.textlength(shown, font=font) > room:
        shown = shown[:-2].rstrip() + "\N{HORIZONTAL ELLIPSIS}"
    draw.text(at, shown, colour, font=font)
