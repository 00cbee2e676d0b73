"""What cutting does when the source, the span or ffmpeg is bad: one error with a class and a reason, and nothing left running."""

from __future__ import annotations

import dataclasses
import io
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import psutil
import pytest

from tests.media import read_number, read_pyav, write_video
from videofactory.curation import cut_encode
from videofactory.curation.cut import ClipSettings, cut
from videofactory.curation.cut_encode import Encoding, encode_span, find_ffmpeg, run_limited
from videofactory.curation.cut_plan import make_plan, opened, read_packets
from videofactory.curation.media import Guard, MediaError

TIMES = tuple(Fraction(number, 25) for number in range(100))
OPTIONS = {"preset": "veryfast", "g": "30", "bf": "3"}
SPAN = (1.2, 2.4)
ENCODE = ClipSettings(mode="encode")


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred frames at 25 per second with a key frame at every thirtieth."""
    return write_video(tmp_path_factory.mktemp("source") / "video.mp4", TIMES, options=OPTIONS)


@pytest.mark.parametrize(
    ("start", "end", "error_class"),
    [
        (2.0, 2.0, "bad_span"),
        (3.0, 1.0, "bad_span"),
        (50.0, 60.0, "empty_span"),
        (0.045, 0.07, "empty_span"),
        (-5.0, -1.0, "empty_span"),
    ],
)
def test_wrong_spans(start: float, end: float, error_class: str, video: Path) -> None:
    with pytest.raises(MediaError) as caught:
        cut(video, start, end)
    assert caught.value.error_class == error_class
    assert not caught.value.retryable


def test_unreadable_sources(tmp_path: Path, video: Path) -> None:
    noise = tmp_path / "noise.mp4"
    noise.write_bytes(bytes(range(256)) * 64)
    with pytest.raises(MediaError) as caught:
        cut(noise, 0.0, 1.0)
    assert caught.value.error_class == "not_a_video"
    with pytest.raises(MediaError) as caught:
        cut(tmp_path / "missing.mp4", 0.0, 1.0)
    assert caught.value.error_class == "not_found"


def test_playlist_that_poses_as_a_video_is_not_followed(tmp_path: Path, video: Path) -> None:
    playlist = tmp_path / "playlist.mp4"
    playlist.write_text(f"ffconcat version 1.0\nfile '{video}'\n")
    with pytest.raises(MediaError) as caught:
        cut(playlist, 0.0, 1.0, ENCODE)
    assert caught.value.error_class in {"unsupported_container", "not_a_video"}


def test_damaged_span_is_an_error_and_not_a_wrong_clip(tmp_path: Path, video: Path) -> None:
    whole = video.read_bytes()
    # The index stands behind the frames, whose bytes are replaced and not removed.
    begin = whole.index(b"mdat") + 4 + 4000
    size = (len(whole) - begin) // 2
    path = tmp_path / "damaged.mp4"
    path.write_bytes(whole[:begin] + bytes(size) + whole[begin + size :])
    with pytest.raises(MediaError):
        cut(path, *SPAN, ENCODE)


def test_settings_name_the_wrong_value() -> None:
    with pytest.raises(ValueError, match="crf is 99"):
        ClipSettings(crf=99)
    with pytest.raises(ValueError, match="'fast'"):
        ClipSettings(mode="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'copy' cannot change"):
        ClipSettings(mode="copy", fps=8)


@pytest.fixture
def fake_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a shell script in the place of ffmpeg."""

    def put(script: str) -> None:
        path = tmp_path / "ffmpeg"
        path.write_text("#!/bin/sh\n" + script)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("FFMPEG", str(path))

    return put


SLEEPS = "echo 'cannot find the way' >&2\nsleep 300 &\necho $! >> {pids}\necho $$ >> {pids}\nwait\n"
REFUSES = "trap '' TERM\necho 'cannot find the way' >&2\necho $$ > {pids}\nwhile :; do :; done\n"


@pytest.mark.parametrize("script", [SLEEPS, REFUSES], ids=["sleeps", "spins and refuses to end"])
def test_hanging_ffmpeg_is_ended_with_all_it_started(
    script: str, video: Path, tmp_path: Path, fake_ffmpeg: Callable[[str], None]
) -> None:
    pids = tmp_path / "pids"
    fake_ffmpeg(script.format(pids=pids))
    with pytest.raises(MediaError, match="cannot find the way") as caught:
        cut(video, *SPAN, ENCODE, seconds=4.0)
    assert (caught.value.error_class, caught.value.retryable) == ("encode_timeout", True)
    assert not [pid for pid in map(int, pids.read_text().split()) if alive(pid)]


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent to notice does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="the death of the parent is announced on Linux alone")
def test_ffmpeg_ends_when_its_parent_is_killed(video: Path, tmp_path: Path, fake_ffmpeg: Callable[[str], None]) -> None:
    pids = tmp_path / "pids"
    fake_ffmpeg(f"echo $$ > {pids}.new\nmv {pids}.new {pids}\nexec sleep 300\n")
    code = f"from videofactory.curation.cut import *\ncut(Path({str(video)!r}), 1.2, 2.4, ClipSettings(mode='encode'))"
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        wait_until(pids.exists)
        pid = int(pids.read_text())
        assert alive(pid)
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not alive(pid))


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def test_failing_ffmpeg_is_quoted(video: Path, fake_ffmpeg: Callable[[str], None]) -> None:
    fake_ffmpeg("yes 'a line of noise' | head -n 20000 >&2\necho 'no space left' >&2\nexit 7\n")
    with pytest.raises(MediaError, match=r"code 7[\s\S]*no space left$") as caught:
        cut(video, *SPAN, ENCODE)
    assert caught.value.error_class == "encode_failed"
    assert len(str(caught.value)) < 3000


def test_clip_with_other_frames_than_planned_is_refused(video: Path, tmp_path: Path, fake_ffmpeg: Callable[[str], None]) -> None:
    wrong = write_video(tmp_path / "wrong.mp4", TIMES[:29], options=OPTIONS)
    fake_ffmpeg(f'for last; do :; done\ncp "{wrong}" "$last"\n')
    with pytest.raises(MediaError, match="29 frames, expected 30") as caught:
        cut(video, *SPAN, ENCODE)
    assert caught.value.error_class == "clip_check_failed"


def test_clip_that_is_no_video_is_refused(video: Path, fake_ffmpeg: Callable[[str], None]) -> None:
    fake_ffmpeg("exit 0\n")
    with pytest.raises(MediaError) as caught:
        cut(video, *SPAN, ENCODE)
    assert caught.value.error_class == "clip_check_failed"


def test_ffmpeg_named_by_the_environment_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FFMPEG", "/nowhere/ffmpeg")
    with pytest.raises(MediaError, match="/nowhere/ffmpeg") as caught:
        find_ffmpeg()
    assert caught.value.error_class == "ffmpeg_missing"


def test_output_is_drained_while_the_process_runs(tmp_path: Path) -> None:
    """More than a pipe holds would block a process that nobody reads."""
    finished = tmp_path / "finished"
    run_limited(["/bin/sh", "-c", f"yes | head -c 1000000 >&2; touch '{finished}'"], seconds=60)
    assert finished.exists()


def test_reading_goes_through_the_guard(video: Path) -> None:
    with Guard() as guard:
        for mode in ("copy", "encode"):
            clip = cut(video, *SPAN, ClipSettings(mode=mode), guard=guard)  # type: ignore[arg-type]
            assert [read_number(image) for image in read_pyav(clip.video)] == list(range(30, 30 + clip.frames))
        with pytest.raises(MediaError) as caught:
            cut(video, 50.0, 60.0, guard=guard)
    assert caught.value.error_class == "empty_span"


needs_prlimit = pytest.mark.skipif(shutil.which("prlimit") is None, reason="the limit is set by prlimit of util-linux")


@needs_prlimit
def test_memory_of_ffmpeg_is_limited(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut_encode, "MEMORY_BYTES", 200 * 2**20)
    with pytest.raises(MediaError) as caught:
        cut(video, *SPAN, ClipSettings(mode="encode", preset="veryslow"))
    assert caught.value.error_class == "encode_failed"


@needs_prlimit
def test_program_gets_no_more_memory_than_it_was_given() -> None:
    program = [sys.executable, "-c", "bytearray(2**30)"]
    run_limited(program, seconds=60)
    with pytest.raises(MediaError, match="MemoryError") as caught:
        run_limited(program, seconds=60, memory_bytes=2**29)
    assert caught.value.error_class == "encode_failed"


def test_complaint_about_memory_is_a_failure(video: Path, fake_ffmpeg: Callable[[str], None]) -> None:
    fake_ffmpeg("echo 'Error while decoding stream #0:0: Cannot allocate memory' >&2\n")
    with pytest.raises(MediaError, match="used up its 4096 MiB") as caught:
        cut(video, *SPAN, ENCODE)
    assert caught.value.error_class == "encode_failed"


def test_ffmpeg_decodes_listed_codecs_alone(tmp_path: Path, video: Path) -> None:
    """The list is ffmpeg's own; a stream that was analysed as one codec and decodes as another finds no decoder."""
    other = tmp_path / "other.mkv"
    with av.open(str(other), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(30):
            container.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
        container.mux(stream.encode())
    with opened(video) as (container, stream):
        plan = make_plan(video, container, stream, read_packets(container, stream, *SPAN), *SPAN)
    plan = dataclasses.replace(plan, source=other, format="matroska")
    encoding = Encoding(crf=20, preset="veryfast", height=None, fps=None, audio=False, threads=1)
    with pytest.raises(MediaError, match="whitelist") as caught:
        encode_span(plan, tmp_path / "out.mp4", encoding, seconds=60)
    assert caught.value.error_class == "encode_failed"


@pytest.mark.parametrize("audio", [False, True])
def test_streams_that_are_not_decoded_do_no_harm(audio: bool, tmp_path: Path, video: Path) -> None:
    path = tmp_path / "many.mkv"
    tracks = ["-map", "0:v", *["-map", "1:a"] * 8]
    sound = ["-f", "lavfi", "-i", "sine=duration=4"]
    command = [find_ffmpeg(), "-v", "error", "-i", str(video), *sound, *tracks, "-c:v", "copy", "-c:a", "aac", str(path)]
    subprocess.run(command, check=True, timeout=60)
    clip = cut(path, *SPAN, ClipSettings(mode="encode", audio=audio))
    with av.open(io.BytesIO(clip.video)) as container:
        assert len(container.streams.audio) == int(audio)
    assert [read_number(image) for image in read_pyav(clip.video)] == list(range(30, 60))
