import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from worldstride import video
from worldstride.errors import InputError, MissingDependencyError
from worldstride.video import VideoWriter, read_video


def clip(frames: int, height: int = 32, width: int = 48, first: int = 0) -> Tensor:
    """Frames uint8 [F, H, W, 3] of flat colours that brighten frame by frame."""
    level = (20 + 8 * (first + torch.arange(frames)))[:, None, None, None]
    tint = torch.tensor([1.0, 0.6, 0.3])
    return (level * tint).to(torch.uint8).expand(frames, height, width, 3).contiguous()


def worst(a: Tensor, b: Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".MOV"])
def test_round_trip(tmp_path: Path, suffix: str):
    path = tmp_path / f"out{suffix}"
    with VideoWriter(path, 16, (32, 48)) as writer:
        writer.write(clip(5))
        writer.write(clip(0))
        writer.write(clip(4, first=5).numpy())
        assert not path.exists()
        assert writer.frames_written == 9
    back = read_video(path)
    assert back.dtype == torch.uint8
    assert worst(back, clip(9)) <= 6
    assert list(tmp_path.iterdir()) == [path]


def test_mpeg4_where_h264_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(video, "_best_codec", lambda av: "mpeg4")
    with VideoWriter(tmp_path / "a.mp4", Fraction(30000, 1001), (32, 48)) as writer:
        writer.write(clip(6))
    assert worst(read_video(tmp_path / "a.mp4"), clip(6)) <= 10


@pytest.mark.parametrize(
    ("size", "scale", "sides"), [((7, 9), 1, (8, 10)), ((7, 9), 3, (22, 28)), ((8, 9), 4, (32, 36))]
)
def test_odd_sizes_and_scale(tmp_path: Path, size: tuple[int, int], scale: int, sides: tuple[int, int]):
    with VideoWriter(tmp_path / "a.mp4", 10, size, scale=scale, quality=5) as writer:
        writer.write(clip(3, *size))
    back = read_video(tmp_path / "a.mp4")
    assert back.shape == (3, *sides, 3)
    assert worst(back, clip(3, *sides)) <= 6


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_interruption_leaves_a_playable_file(tmp_path: Path, error: type[BaseException]):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"older")
    with pytest.raises(error), VideoWriter(path, 16, (32, 48)) as writer:
        writer.write(clip(7))
        raise error
    assert worst(read_video(path), clip(7)) <= 6
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="signals reach a Windows thread only between waits")
def test_ctrl_c_while_encoding_leaves_a_playable_file(tmp_path: Path):
    import signal
    import threading

    timer = threading.Timer(0.1, signal.raise_signal, [signal.SIGINT])
    written = 0
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "a.mp4", 16, (64, 64)) as writer:
        timer.start()
        while True:
            writer.write(clip(8, 64, 64))
            written = writer.frames_written
    assert len(read_video(tmp_path / "a.mp4")) == writer.frames_written >= written


def test_nothing_written_leaves_no_file(tmp_path: Path):
    with VideoWriter(tmp_path / "a.mp4", 16, (32, 48)) as writer:
        writer.write(clip(0))
    assert list(tmp_path.iterdir()) == []


def test_close_twice_and_write_after(tmp_path: Path):
    writer = VideoWriter(tmp_path / "a.mp4", 16, (32, 48))
    writer.write(clip(1))
    writer.close()
    writer.close()
    assert len(read_video(tmp_path / "a.mp4")) == 1
    with pytest.raises(InputError, match="finished"):
        writer.write(clip(1))


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        (clip(2, 32, 40), r"\[2, 32, 40, 3\]"),
        (clip(2)[0], r"\[32, 48, 3\]"),
        (clip(2).permute(0, 3, 1, 2), "shape"),
        (clip(2).float(), "float32"),
        (clip(2).numpy().astype(np.int64), "int64"),
        ([1, 2], "list"),
    ],
)
def test_wrong_frames(tmp_path: Path, frames: Tensor, words: str):
    with VideoWriter(tmp_path / "a.mp4", 16, (32, 48)) as writer, pytest.raises(InputError, match=words):
        writer.write(frames)


@pytest.mark.parametrize("fps", [0, -3, 29.97, "16", Fraction(100000, 99999), 2000])
def test_wrong_fps(tmp_path: Path, fps: int):
    with pytest.raises(InputError, match="fps"):
        VideoWriter(tmp_path / "a.mp4", fps, (32, 48))


def test_wrong_arguments(tmp_path: Path):
    for name in ("a.webm", "a.avi", "a"):
        with pytest.raises(InputError, match=r"\.mp4, \.mkv, \.mov"):
            VideoWriter(tmp_path / name, 16, (32, 48))
    with pytest.raises(InputError, match="does not exist"):
        VideoWriter(tmp_path / "missing" / "a.mp4", 16, (32, 48))
    with pytest.raises(InputError, match="size"):
        VideoWriter(tmp_path / "a.mp4", 16, (0, 48))
    with pytest.raises(InputError, match="scale"):
        VideoWriter(tmp_path / "a.mp4", 16, (32, 48), scale=0)
    with pytest.raises(InputError, match="quality"):
        VideoWriter(tmp_path / "a.mp4", 16, (32, 48), quality=99)


def test_missing_dependency_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'worldstride\[video\]'"):
        VideoWriter(tmp_path / "a.mp4", 16, (32, 48))


def test_reading_what_is_no_video(tmp_path: Path):
    with pytest.raises(InputError, match="cannot read"):
        read_video(tmp_path / "missing.mp4")
    (tmp_path / "a.mp4").write_bytes(b"no video" * 100)
    with pytest.raises(InputError, match="cannot read"):
        read_video(tmp_path / "a.mp4")


@pytest.mark.parametrize(
    ("name", "fps", "scale", "words"),
    [("a.gif", 10, 1, r"\.mp4, \.mkv, \.mov"), ("a.mp4", 0, 1, "fps"), ("a.mp4", 10, 0, "scale")],
)
def test_checking_before_the_work(name: str, fps: int, scale: int, words: str):
    with pytest.raises(InputError, match=words):
        video.check_video(name, fps, scale)
    video.check_video("nowhere/a.mp4", 10, 2)  # folders are for the writer to check


def test_a_first_frame_that_fails_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    closed = []

    class Watched:
        def __init__(self, container: Any) -> None:
            self._container = container

        def __getattr__(self, name: str) -> Any:
            return getattr(self._container, name)

        def mux(self, _: object) -> None:
            raise RuntimeError("no packet")

        def close(self) -> None:
            closed.append(True)
            self._container.close()

    open_real = VideoWriter._open
    monkeypatch.setattr(VideoWriter, "_open", lambda self: Watched(open_real(self)))
    with pytest.raises(RuntimeError, match="no packet"), VideoWriter(tmp_path / "a.mp4", 16, (32, 48)) as writer:
        writer.write(clip(1))
    assert closed == [True]
    assert list(tmp_path.iterdir()) == []


def test_a_stream_that_cannot_be_added_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(video, "_best_codec", lambda av: "no such codec")
    with pytest.raises(ValueError, match="codec"), VideoWriter(tmp_path / "a.mp4", 16, (32, 48)) as writer:
        writer.write(clip(1))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_vanishes_is_an_input_error(tmp_path: Path):
    folder = tmp_path / "out"
    folder.mkdir()
    writer = VideoWriter(folder / "a.mp4", 16, (32, 48))
    folder.rmdir()
    with pytest.raises(InputError, match=r"cannot write .*a\.mp4: No such file.*; choose a folder"), writer:
        writer.write(clip(1))
