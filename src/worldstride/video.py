"""Video files that stay playable: what was written before a crash or Ctrl-C is a complete file."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldstride.atomic import cannot_write, put_in_place, temporary_beside
from worldstride.errors import InputError, MissingDependencyError

SUFFIXES = (".mp4", ".mkv", ".mov")
"""Containers that `VideoWriter` writes."""

_BT709 = 1  # FFmpeg's number of BT.709 for matrix, primaries and transfer alike


def _import_av() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise MissingDependencyError("video files need PyAV: pip install 'worldstride[video]'") from error
    return av


def _best_codec(av: ModuleType) -> str:
    """H.264 where this FFmpeg has an encoder for it, else MPEG-4 part 2, which every FFmpeg has."""
    return next((name for name in ("libx264", "libopenh264") if name in av.codecs_available), "mpeg4")


def check_video(path: str | Path, fps: int | Fraction, scale: int = 1) -> None:
    """Refuse what `VideoWriter` would refuse of these arguments, so that no work is lost to it.

    Raises:
        InputError: the name, the frames per second or the scale cannot be used.
        MissingDependencyError: PyAV is not installed.
    """
    rate = Fraction(fps) if isinstance(fps, int | Fraction) else Fraction(0)
    if not 0 < rate <= 1000 or rate.numerator > 65535 or rate.denominator > 65535:
        raise InputError(f"fps must be an int or Fraction in (0, 1000], terms up to 65535, got {fps!r}")
    if Path(path).suffix.lower() not in SUFFIXES:
        raise InputError(f"cannot write {Path(path).name!r}: a video file ends in {', '.join(SUFFIXES)}")
    if not isinstance(scale, int) or scale < 1:
        raise InputError(f"scale must be a whole number of at least 1, got {scale!r}")
    _import_av()


class VideoWriter:
    """Write frames to an .mp4, .mkv or .mov file (H.264 yuv420p, or MPEG-4 where H.264 is missing).

    Use it as a context manager. Leaving the block for whatever reason, Ctrl-C and exceptions included,
    finishes the file with every frame written so far and only then puts it at `path`; if no frame was
    written, `path` is untouched.

    Args:
        path: target; its folder must exist.
        fps: frames per second.
        size: (height, width) in pixels of the frames given to `write`; a video has even sides, so an odd
            side of the scaled picture gains one row or column that repeats its edge.
        quality: constant rate factor, 0 (best, largest) to 51; 18 looks like the source.
        scale: enlarge by this whole factor, pixels repeated.

    Raises:
        InputError: an argument cannot be used.
        MissingDependencyError: PyAV is not installed.
    """

    def __init__(
        self,
        path: str | Path,
        fps: int | Fraction,
        size: tuple[int, int],
        *,
        quality: int = 18,
        scale: int = 1,
    ) -> None:
        check_video(path, fps, scale)
        self.path, self._rate = Path(path), Fraction(fps)
        if len(size) != 2 or not all(isinstance(n, int) and n >= 1 for n in size):
            raise InputError(f"size must be (height, width) in pixels, both at least 1, got {size!r}")
        if not isinstance(quality, int) or not 0 <= quality <= 51:
            raise InputError(f"quality must be a whole number from 0 (best) to 51, got {quality!r}")
        self.size, self.quality, self.scale = (size[0], size[1]), quality, scale
        self._av = _import_av()
        self._temporary = temporary_beside(self.path)
        # Ctrl-C interrupts the main thread only; a thread of its own keeps the encoder in step with the file.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="worldstride-video")
        self._stream: Any = None
        self._container: Any = None
        self._written = 0
        self._closed = False

    @property
    def frames_written(self) -> int:
        """Frames handed to the encoder so far."""
        return self._written

    def write(self, frames: Tensor | np.ndarray) -> None:
        """Append frames uint8 [F, H, W, 3] (red, green, blue), any device; `InputError` on other inputs."""
        if self._closed:
            raise InputError(f"the video {self.path} is already finished; open a new VideoWriter")
        wanted = (*self.size, 3)
        if not isinstance(frames, Tensor | np.ndarray):
            raise InputError(f"frames must be a tensor or array [F, {wanted}], got {type(frames).__name__}")
        if frames.ndim != 4 or tuple(frames.shape[1:]) != wanted:
            raise InputError(f"frames must have shape [F, *{list(wanted)}], got {list(frames.shape)}")
        if str(frames.dtype).removeprefix("torch.") != "uint8":
            raise InputError(f"frames must be uint8 with values 0 to 255, got {frames.dtype}")
        array = frames.numpy(force=True) if isinstance(frames, Tensor) else frames
        self._thread.submit(self._encode, array).result()

    def close(self) -> None:
        """Finish the file and put it in place; more calls do nothing."""
        if not self._closed:
            self._closed = True
            done = self._thread.submit(self._finish)
            self._thread.shutdown(wait=True)
            done.result()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> Any:
        height, width = (side * self.scale + side * self.scale % 2 for side in self.size)
        options = {"movflags": "+faststart"} if self.path.suffix.lower() != ".mkv" else {}
        container = self._av.open(str(self._temporary), "w", container_options=options)
        try:
            self._stream = self._add_stream(container, height, width)
        except BaseException:
            container.close()  # Windows removes no file that is still open
            raise
        return container

    def _add_stream(self, container: Any, height: int, width: int) -> Any:
        codec = _best_codec(self._av)
        x264 = {"crf": str(self.quality), "preset": "fast"} if codec == "libx264" else {}
        stream = container.add_stream(codec, rate=self._rate, options=x264)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.time_base = 1 / self._rate
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        if not x264:  # these encoders know quantisers 1 to 31, not a rate factor
            context.qmin = context.qmax = 1 + self.quality * 30 // 51
        return stream

    def _encode(self, frames: np.ndarray) -> None:
        if not len(frames):
            return
        try:
            if self._container is None:
                self._container = self._open()
            self._append(frames)
        except OSError as error:  # a folder that cannot be written to, a full disk
            raise cannot_write(self.path, error) from error

    def _append(self, frames: np.ndarray) -> None:
        for picture in frames:
            picture = picture.repeat(self.scale, 0).repeat(self.scale, 1)
            odd = [(0, side % 2) for side in picture.shape[:2]]
            picture = np.ascontiguousarray(np.pad(picture, [*odd, (0, 0)], mode="edge"))
            frame = self._av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
            frame.pts, frame.time_base = self._written, 1 / self._rate
            self._container.mux(self._stream.encode(frame))
            self._written += 1

    def _finish(self) -> None:
        try:
            try:
                if self._written:
                    self._container.mux(self._stream.encode())
            finally:
                if self._container is not None:  # also after a first frame that failed: open files stay on Windows
                    self._container.close()
            if self._written:
                put_in_place(self._temporary, self.path)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        finally:  # only an unfinished or empty file still lies there
            with contextlib.suppress(OSError):
                self._temporary.unlink()


def read_video(path: str | Path) -> Tensor:
    """Every frame of a video file as uint8 [F, H, W, 3]; H and W are the file's (even) sides.

    Raises `InputError` if the file is missing, no video, or damaged.
    """
    av = _import_av()
    try:
        with av.open(str(path)) as container:
            frames = [_rgb(frame) for frame in container.decode(video=0)]
    except (OSError, ValueError, IndexError) as error:  # FFmpeg's errors derive from these
        raise InputError(f"cannot read a video from {path}: {error}") from error
    if not frames:
        raise InputError(f"{path} holds no video frames")
    return torch.from_numpy(np.stack(frames))


def _rgb(frame: Any) -> np.ndarray:
    source = "ITU709" if int(frame.colorspace) == _BT709 else None
    return frame.reformat(format="rgb24", src_colorspace=source).to_ndarray()
