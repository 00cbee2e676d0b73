"""Clips: whatever the source and the way of cutting, four readers deliver frames of the shot and nothing else."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, cycle, islice
from pathlib import Path
from typing import Literal

import av
import numpy as np
import pytest

from tests.media import read_ffmpeg, read_number, read_opencv, read_pyav, read_torchcodec, write_video
from videofactory.curation.cut import ClipSettings, cut
from videofactory.curation.cut_encode import find_ffmpeg
from videofactory.curation.media import MediaError

COUNT = 120
EVEN = tuple(Fraction(number, 25) for number in range(COUNT))
UNEVEN = tuple(
    Fraction(milliseconds, 1000) for milliseconds in accumulate(islice(cycle((20, 40, 33, 80, 17)), COUNT - 1), initial=0)
)


def torchcodec_missing() -> str | None:
    """Why torchcodec cannot be used here, if so."""
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        return f"torchcodec does not load: {str(error).splitlines()[0]}"
    return None


@dataclass(frozen=True)
class Source:
    """A generated video, and where its first frame stands on its own clock, in seconds."""

    path: Path
    times: tuple[Fraction, ...]
    size: tuple[int, int] = (320, 180)

    def span(self, first: int, stop: int) -> tuple[float, float]:
        """The span that holds the frames `first` to `stop - 1`."""
        end = self.times[stop] if stop < len(self.times) else self.times[-1] + Fraction(1, 25)
        return float(self.times[first]), float(end)


CLOSED = {"preset": "veryfast", "g": "30", "bf": "3"}
MAKERS: dict[str, Callable[[Path], Source]] = {}


def source(function: Callable[[Path], Source]) -> Callable[[Path], Source]:
    MAKERS[function.__name__] = function
    return function


@source
def fixed_key_frames(folder: Path) -> Source:
    return Source(write_video(folder / "fixed.mp4", EVEN, options=CLOSED, tone=True), EVEN)


@source
def scene_key_frames(folder: Path) -> Source:
    def scene(number: int) -> int:
        return (number >= 37) + (number >= 80)

    return Source(write_video(folder / "scene.mp4", EVEN, options={"preset": "veryfast", "bf": "3"}, scene_of=scene), EVEN)


@source
def open_groups(folder: Path) -> Source:
    options = {"preset": "veryfast", "x264-params": "open-gop=1:keyint=30:min-keyint=30:bframes=3"}
    return Source(write_video(folder / "open.mp4", EVEN, options=options), EVEN)


@source
def no_b_frames(folder: Path) -> Source:
    return Source(write_video(folder / "plain.mkv", EVEN, options={**CLOSED, "bf": "0"}), EVEN)


@source
def hevc(folder: Path) -> Source:
    options = {"preset": "ultrafast", "x265-params": "keyint=30:log-level=error"}
    return Source(write_video(folder / "hevc.mp4", EVEN, codec="libx265", options=options), EVEN)


@source
def vp9(folder: Path) -> Source:
    options = {"g": "30", "deadline": "good", "cpu-used": "5", "crf": "30", "b": "0", "auto-alt-ref": "1", "lag-in-frames": "12"}
    return Source(write_video(folder / "vp9.webm", EVEN, codec="libvpx-vp9", options=options), EVEN)


@source
def uneven_times(folder: Path) -> Source:
    return Source(write_video(folder / "uneven.mp4", UNEVEN, options=CLOSED), UNEVEN)


@source
def uneven_matroska(folder: Path) -> Source:
    return Source(write_video(folder / "uneven.mkv", UNEVEN, options=CLOSED), UNEVEN)


@source
def late_start(folder: Path) -> Source:
    times = tuple(time + 100 for time in EVEN)
    return Source(write_video(folder / "late.mkv", times, options=CLOSED), times)


@source
def negative_start(folder: Path) -> Source:
    # The clock of a transport stream wraps at 33 bits; a stream that starts 3 s before that is read with negative times.
    times = tuple(time + Fraction(2**33, 90000) - 3 for time in EVEN)
    made = _with_its_own_clock(write_video(folder / "negative.ts", times, options=CLOSED))
    assert made.times[0] < -1
    return made


@source
def hidden_head(folder: Path) -> Source:
    """An MP4 file that itself hides its first 25 frames by an edit list."""
    times = tuple(time - 1 for time in EVEN)
    return Source(write_video(folder / "hidden.mp4", times, options=CLOSED), times)


@source
def transport_stream(folder: Path) -> Source:
    return _with_its_own_clock(write_video(folder / "transport.ts", EVEN, options=CLOSED))


@source
def program_stream(folder: Path) -> Source:
    return _with_its_own_clock(
        write_video(folder / "program.mpg", EVEN, codec="mpeg2video", options={"g": "12", "bf": "2"}, time_base=Fraction(1, 25))
    )


@source
def avi(folder: Path) -> Source:
    options = {"g": "30", "bf": "2"}
    return _with_its_own_clock(write_video(folder / "old.avi", EVEN, codec="mpeg4", options=options, time_base=Fraction(1, 25)))


@source
def turned(folder: Path) -> Source:
    return Source(write_video(folder / "turned.mp4", EVEN, options=CLOSED, rotation=90), EVEN)


@source
def turned_the_other_way(folder: Path) -> Source:
    return Source(write_video(folder / "other.mp4", EVEN, options=CLOSED, rotation=270), EVEN)


@source
def odd_size(folder: Path) -> Source:
    path = write_video(folder / "odd.mp4", EVEN, options=CLOSED, size=(321, 181), pixel_format="yuv444p")
    return Source(path, EVEN, (320, 180))


def _with_its_own_clock(path: Path, count: int = COUNT) -> Source:
    """These containers shift all timestamps; what counts is what the decoder says."""
    with av.open(str(path)) as container:
        times = tuple(Fraction(frame.pts) * frame.time_base for frame in container.decode(video=0))
    assert len(times) == count
    return Source(path, times)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Source]:
    """Generated sources by name, each made once."""
    folder, known = tmp_path_factory.mktemp("sources"), {}

    def get(name: str) -> Source:
        if name not in known:
            known[name] = MAKERS[name](folder)
        return known[name]

    return get


def delivered(video: bytes, folder: Path) -> dict[str, list[int]]:
    """The frame numbers that each reader delivers, in its order."""
    images = {
        "PyAV": read_pyav(video),
        "OpenCV": read_opencv(video, folder),
        "ffmpeg": read_ffmpeg(video, find_ffmpeg(), folder),
    }
    if torchcodec_missing() is None:
        images["torchcodec"] = read_torchcodec(video)
    return {reader: [read_number(image) for image in each] for reader, each in images.items()}


def times_of(video: bytes) -> list[float]:
    with av.open(io.BytesIO(video)) as container:
        return [frame.time for frame in container.decode(video=0)]


def named(span: tuple[int, int]) -> str:
    return f"{span[0]}-{span[1]}"


@pytest.mark.parametrize("span", [(25, 55), (59, 61), (47, 48), (COUNT - 1, COUNT)], ids=named)
@pytest.mark.parametrize("name", MAKERS)
def test_encoded_clip_holds_exactly_the_span(
    name: str, span: tuple[int, int], made: Callable[[str], Source], tmp_path: Path
) -> None:
    given = made(name)
    clip = cut(given.path, *given.span(*span), ClipSettings(mode="encode", preset="ultrafast"))
    wanted = list(range(*span))
    for reader, numbers in delivered(clip.video, tmp_path).items():
        assert numbers == wanted, reader
    expected = [float(time - given.times[span[0]]) for time in given.times[span[0] : span[1]]]
    assert times_of(clip.video) == pytest.approx(expected, abs=0.0006)
    assert (clip.frames, clip.codec, clip.lead_in_bytes, (clip.width, clip.height)) == (len(wanted), "h264", 0, given.size)
    assert not clip.has_audio


@pytest.mark.parametrize("span", [(30, 75), (33, 66), (61, COUNT)], ids=named)
@pytest.mark.parametrize("name", MAKERS)
def test_clip_made_either_way_stays_inside_the_shot(
    name: str, span: tuple[int, int], made: Callable[[str], Source], tmp_path: Path
) -> None:
    given = made(name)
    clip = cut(given.path, *given.span(*span), ClipSettings(max_lead_in=0.6, preset="ultrafast"))
    for reader, numbers in delivered(clip.video, tmp_path).items():
        assert numbers == list(range(span[0], span[0] + clip.frames)), reader
        assert span[1] - clip.frames - span[0] <= 0.1 * (span[1] - span[0]), "more left out at the end than allowed"
    assert times_of(clip.video)[0] == 0


LONG = tuple(Fraction(number, 25) for number in range(330))
WITHOUT_INDEX: dict[str, tuple[str, dict[str, str]]] = {
    "h264.ts": ("libx264", {**CLOSED, "g": "100"}),
    "open.ts": ("libx264", {"preset": "veryfast", "x264-params": "open-gop=1:keyint=50:bframes=3"}),
    "mpeg2.ts": ("mpeg2video", {"g": "12", "bf": "2"}),
    "mpeg2.mpg": ("mpeg2video", {"g": "12", "bf": "2"}),
    "mpeg1.mpg": ("mpeg1video", {"g": "100"}),
}


@pytest.mark.parametrize("name", WITHOUT_INDEX)
def test_far_into_a_container_without_an_index(name: str, tmp_path: Path) -> None:
    """Seeking lands in the middle of a group there, and program streams leave the first times after a jump to guesses."""
    codec, options = WITHOUT_INDEX[name]
    path = write_video(tmp_path / name, LONG, codec=codec, options=options, size=(192, 108), time_base=Fraction(1, 25))
    given = _with_its_own_clock(path, len(LONG))
    for first, stop in [(297, 311), (251, 252), (len(LONG) - 3, len(LONG))]:
        clip = cut(path, *given.span(first, stop), ClipSettings(mode="encode", preset="ultrafast"))
        assert [read_number(image) for image in read_pyav(clip.video)] == list(range(first, stop))


@pytest.mark.parametrize(
    ("name", "copies"),
    [("fixed_key_frames", True), ("no_b_frames", True), ("vp9", True), ("uneven_times", True), ("late_start", True)]
    + [(name, False) for name in ("open_groups", "hevc", "turned", "transport_stream", "program_stream", "avi", "odd_size")],
)
def test_copies_only_what_every_reader_obeys(name: str, copies: bool, made: Callable[[str], Source]) -> None:
    given = made(name)
    start, end = given.span(33, 110)
    if copies:
        clip = cut(given.path, start, end, ClipSettings(mode="copy"))
        assert clip.lead_in_bytes > 0
    else:
        with pytest.raises(MediaError, match="cannot be copied") as caught:
            cut(given.path, start, end, ClipSettings(mode="copy"))
        assert caught.value.error_class == "not_copyable"


def test_lead_in_is_limited_by_its_share_of_the_bytes(made: Callable[[str], Source]) -> None:
    given = made("fixed_key_frames")
    hidden = cut(given.path, *given.span(33, 110))
    assert 0 < hidden.lead_in_bytes <= 0.25 * len(hidden.video)
    clean = cut(given.path, *given.span(33, 110), ClipSettings(max_lead_in=0.0))
    assert clean.lead_in_bytes == 0
    assert clean.frames == 77, "encoded, for no key frame starts the shot"
    copied = cut(given.path, *given.span(30, 110), ClipSettings(mode="copy", max_lead_in=0.0))
    assert copied.lead_in_bytes == 0


def packets(file: object) -> list[bytes]:
    with av.open(file) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def test_copy_is_the_sources_own_packets(made: Callable[[str], Source]) -> None:
    given = made("fixed_key_frames")
    clip = cut(given.path, *given.span(30, 90), ClipSettings(mode="copy"))
    copied = packets(io.BytesIO(clip.video))
    assert len(copied) == clip.frames
    assert set(copied) <= set(packets(str(given.path)))


@pytest.mark.parametrize(
    "settings", [ClipSettings(mode="encode", audio=True), ClipSettings(mode="copy"), ClipSettings(mode="encode")]
)
def test_two_runs_give_the_same_bytes(settings: ClipSettings, made: Callable[[str], Source]) -> None:
    given = made("fixed_key_frames")
    digests = {hashlib.sha256(cut(given.path, *given.span(33, 90), settings).video).hexdigest() for _ in range(2)}
    assert len(digests) == 1


@pytest.mark.parametrize("mode", ["copy", "encode"])
def test_sound_is_kept_on_request_and_cut_to_the_span(mode: Literal["copy", "encode"], made: Callable[[str], Source]) -> None:
    given = made("fixed_key_frames")
    clip = cut(given.path, *given.span(30, 90), ClipSettings(mode=mode, audio=True))
    assert clip.has_audio
    with av.open(io.BytesIO(clip.video)) as container:
        frames = list(container.decode(audio=0))
    assert frames[0].time == pytest.approx(0, abs=0.03)
    seconds = sum(frame.samples for frame in frames) / frames[0].sample_rate
    assert seconds == pytest.approx(clip.duration, abs=0.06)
    assert not cut(given.path, *given.span(30, 90), ClipSettings(mode=mode)).has_audio


def test_scales_down_and_never_up(made: Callable[[str], Source]) -> None:
    given = made("fixed_key_frames")
    small = cut(given.path, *given.span(33, 60), ClipSettings(height=90))
    assert (small.width, small.height, small.frames) == (160, 90, 27)
    assert [read_number(image) for image in read_pyav(small.video)] == list(range(33, 60))
    same = cut(given.path, *given.span(33, 60), ClipSettings(height=720))
    assert (same.width, same.height) == (320, 180)


@pytest.mark.parametrize(("name", "fps"), [("fixed_key_frames", 12.5), ("uneven_times", 10.0), ("no_b_frames", 30.0)])
def test_resampled_clip_stays_inside_the_shot(name: str, fps: float, made: Callable[[str], Source], tmp_path: Path) -> None:
    given = made(name)
    clip = cut(given.path, *given.span(33, 83), ClipSettings(fps=fps))
    assert clip.frames == pytest.approx(float(given.times[83] - given.times[33]) * fps, abs=1.01)
    assert times_of(clip.video) == pytest.approx([number / fps for number in range(clip.frames)], abs=0.001)
    for reader, numbers in delivered(clip.video, tmp_path).items():
        assert numbers == sorted(numbers), reader
        assert 33 <= numbers[0] <= 36, reader
        assert 78 <= numbers[-1] <= 82, reader


@pytest.mark.parametrize("name", ["fixed_key_frames", "turned"])
def test_middle_frame_is_the_middle_one_and_upright(name: str, made: Callable[[str], Source]) -> None:
    import cv2

    given = made(name)
    clip = cut(given.path, *given.span(30, 61), ClipSettings(mode="encode"))
    image = cv2.imdecode(np.frombuffer(clip.middle_frame, np.uint8), cv2.IMREAD_COLOR)
    assert image.shape == (180, 320, 3)
    assert read_number(image) == 45


def test_wide_pixels_become_square(tmp_path: Path) -> None:
    path = write_video(tmp_path / "wide.mp4", EVEN[:30], options={**CLOSED, "x264-params": "sar=4/3"})
    clip = cut(path, 0.0, 1.2)
    assert (clip.width, clip.height) == (426, 180)
    assert [read_number(image) for image in read_pyav(clip.video)] == list(range(30))


def test_times_rounded_to_milliseconds_select_the_same_frames(tmp_path: Path) -> None:
    times = [Fraction(number * 1001, 30000) for number in range(60)]
    path = write_video(tmp_path / "ntsc.mp4", times, options=CLOSED, rate=Fraction(30000, 1001))
    for first, stop in [(7, 23), (10, 11), (13, 50)]:
        clip = cut(path, round(float(times[first]), 3), round(float(times[stop]), 3), ClipSettings(mode="encode"))
        assert [read_number(image) for image in read_pyav(clip.video)] == list(range(first, stop))


def test_numbers_of_the_clip(made: Callable[[str], Source]) -> None:
    given = made("fixed_key_frames")
    clip = cut(given.path, *given.span(30, 90), ClipSettings(mode="encode"))
    assert clip.fps == pytest.approx(25)
    assert clip.duration == pytest.approx(2.4)
    assert clip.video.index(b"moov") < clip.video.index(b"mdat"), "the index stands at the front"


def test_ffmpeg_of_the_package_serves_where_there_is_no_other(
    made: Callable[[str], Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FFMPEG", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "imageio_ffmpeg" in find_ffmpeg()
    for name in ("uneven_times", "turned", "program_stream"):
        given = made(name)
        clip = cut(given.path, *given.span(33, 60), ClipSettings(mode="encode"))
        assert [read_number(image) for image in read_pyav(clip.video)] == list(range(33, 60))


def test_torchcodec_is_among_the_readers(made: Callable[[str], Source]) -> None:
    reason = torchcodec_missing()
    if reason:
        pytest.skip(reason)
    given = made("uneven_times")
    clip = cut(given.path, *given.span(33, 60), ClipSettings(mode="encode"))
    assert [read_number(image) for image in read_torchcodec(clip.video)] == list(range(33, 60))
