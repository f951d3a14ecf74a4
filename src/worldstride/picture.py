"""Pictures that worlds begin with: read from files, and fitted to a frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from worldstride.errors import InputError


def read_picture(path: str | Path) -> Image.Image:
    """The picture in a file, upright, in red, green and blue; `InputError` where there is none."""
    try:
        with Image.open(path) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except FileNotFoundError:
        raise InputError(f"no image {path}") from None
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise InputError(f"cannot read the image {path}: {error}") from error


def fit_picture(picture: Image.Image, height: int, width: int) -> Tensor:
    """The picture, upright, cut around the middle to the shape of a frame and resized with Lanczos.

    Returns uint8 [height, width, 3].
    """
    upright = ImageOps.exif_transpose(picture).convert("RGB")
    fitted = ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted))
