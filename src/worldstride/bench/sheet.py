"""Pictures of a comparison: a contact sheet, and frames of a video with the truth beside the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from worldstride.atomic import atomic_write
from worldstride.bench.compare import NO_MEMORY, Comparison

_PAPER, _INK, _FAINT = (250, 250, 248), (30, 30, 30), (110, 110, 108)
_GAP, _HEAD, _LABEL = 6, 30, 130  # pixels


def shown_settings(result: Comparison) -> list[str]:
    """What is worth seeing beside the truth: the first settings, and those without memory where they were played."""
    names = [s.name for s in result.settings]
    return list(dict.fromkeys([names[0], *(n for n in names if n == NO_MEMORY.name)]))


def contact_sheet(result: Comparison, columns: int = 8, scale: int = 2) -> Image.Image:
    """Rows truth, model and model without memory; a few frames of each world, evenly spread, the last included."""
    names = shown_settings(result)
    total, height, width = result.played[names[0]][0].frames.shape[:3]
    picks = np.unique(np.linspace(0, total - 1, min(columns, total)).round().astype(int))
    cell_w, cell_h = width * scale + _GAP, height * scale + _GAP
    block = _HEAD + (1 + len(names)) * cell_h + _GAP
    sheet = Image.new("RGB", (_LABEL + len(picks) * cell_w, len(result.worlds) * block), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for w, world in enumerate(result.worlds):
        top = w * block
        _text(draw, (8, top + 8), f"world {world.seed}", _INK)
        rows = [("truth", world.frames[world.given :].numpy())]
        rows += [("model" if name == names[0] else name, result.played[name][w].frames) for name in names]
        for c, frame in enumerate(picks):
            text = f"frame {world.given + frame}" + (f", {world.walk}" if c == 0 else "")
            _text(draw, (_LABEL + c * cell_w, top + 8), text, _FAINT)
        for r, (label, frames) in enumerate(rows):
            y = top + _HEAD + r * cell_h
            _text(draw, (8, y + cell_h // 2 - 8), label, _INK)
            for c, frame in enumerate(picks):
                picture = Image.fromarray(frames[frame].repeat(scale, 0).repeat(scale, 1))
                sheet.paste(picture, (_LABEL + c * cell_w, y))
    return sheet


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG atomically."""
    with atomic_write(path) as temporary:
        picture.save(temporary, optimize=True)


def side_by_side(result: Comparison, scale: int = 4) -> Iterator[np.ndarray]:
    """Frames uint8 [F, H, W, 3] of each world: truth, model and model without memory beside each other, labelled."""
    names = shown_settings(result)
    for w, world in enumerate(result.worlds):
        given = world.frames[: world.given].numpy()
        strips = [np.concatenate([given, world.frames[world.given :].numpy()])]
        strips += [np.concatenate([given, result.played[name][w].frames]) for name in names]
        joined = np.concatenate(strips, 2).repeat(scale, 1).repeat(scale, 2)
        labels = ["truth", "model", *names[1:]]
        yield np.stack([
            np.concatenate([_bar(labels, joined.shape[2], f"world {world.seed}, frame {i}", i < world.given), frame])
            for i, frame in enumerate(joined)
        ])  # fmt: skip


def _bar(labels: Sequence[str], width: int, note: str, given: bool) -> np.ndarray:
    bar = Image.new("RGB", (width, 32), _PAPER)
    draw, column = ImageDraw.Draw(bar), width // len(labels)
    for i, label in enumerate(labels):
        text = f"{label}, {note}" if i == 0 else f"{label} (given frame)" if given else label
        _text(draw, (i * column + 8, 8), text, _INK)
    return np.asarray(bar)


def _text(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, colour: tuple[int, int, int]) -> None:
    draw.text(at, text, colour, font=ImageFont.load_default(14))
