"""Probing by content, errors by class, and the guarded child process under real crashes, hangs and memory blow-ups."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import av
import cv2
import numpy as np
import psutil
import pytest

from tests.labelled_shots import CODINGS, Coding, Image, Scene, write_video
from videofactory.curation.media import ERRORS, Guard, GuardLimits, MediaError, probe, shared_guard


def moving_frames(count: int = 24, width: int = 160, height: int = 90) -> Iterator[Image]:
    scene = Scene(3, width, height, speed=0.2)
    return (scene.frame(number / 24, number) for number in range(count))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("media") / "plain.mp4", moving_frames(48), 24)


def error_class(path: Path) -> str:
    with pytest.raises(MediaError) as caught:
        probe(path)
    assert caught.value.error_class in ERRORS
    assert path.name in str(caught.value)
    assert str(path.parent) not in str(caught.value), "the message tells the file's name and not where it lies"
    return caught.value.error_class


@pytest.mark.parametrize(
    "coding", {coding.codec + coding.suffix: coding for coding in CODINGS}.values(), ids=lambda c: c.codec + c.suffix
)
def test_probe_tells_what_was_encoded(tmp_path: Path, coding: Coding) -> None:
    path = write_video(tmp_path / f"video{coding.suffix}", moving_frames(), 24, coding)
    found = probe(path)
    names = {"libx264": "h264", "libx265": "hevc", "libvpx-vp9": "vp9"}
    assert found.codec == names.get(coding.codec, coding.codec)
    assert (found.width, found.height, found.rotation) == (160, 90, 0)
    assert found.fps == pytest.approx(24, rel=0.05)
    assert found.duration == pytest.approx(1.0, abs=0.15)
    assert not found.has_audio


def test_content_decides_and_not_the_name(plain: Path, tmp_path: Path) -> None:
    disguised = tmp_path / "holiday.txt"
    disguised.write_bytes(plain.read_bytes())
    assert probe(disguised).codec == "h264"


def test_names_that_look_like_protocols_are_plain_files(plain: Path, tmp_path: Path) -> None:
    odd = tmp_path / "concat:a|b%03d.mp4"
    odd.write_bytes(plain.read_bytes())
    assert probe(odd).codec == "h264"


def test_every_failure_has_its_class(plain: Path, tmp_path: Path) -> None:
    def written(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    assert error_class(tmp_path / "absent.mp4") == "not_found"
    folder = tmp_path / "folder.mp4"
    folder.mkdir()
    assert error_class(folder) == "unreadable"
    pipe = tmp_path / "pipe.mp4"
    os.mkfifo(pipe)
    assert error_class(pipe) == "unreadable"
    assert error_class(written("empty.mp4", b"")) == "not_a_video"
    noise = np.random.default_rng(0).integers(0, 256, 5000, np.uint8).tobytes()
    assert error_class(written("noise.mp4", noise)) == "not_a_video"
    assert error_class(written("half.mp4", plain.read_bytes()[: plain.stat().st_size // 2])) == "truncated"


def test_nothing_that_a_file_refers_to_is_read(plain: Path, tmp_path: Path) -> None:
    playlist = tmp_path / "playlist.mp4"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nfile://{plain}\n#EXT-X-ENDLIST\n")
    # libav does not even recognise a playlist under this name; under another one it is off the list.
    assert error_class(playlist) in ("unsupported_container", "not_a_video")
    assert error_class(playlist.rename(tmp_path / "playlist.m3u8")) == "unsupported_container"
    concat = tmp_path / "concat.mp4"
    concat.write_text(f"ffconcat version 1.0\nfile {plain}\n")
    assert error_class(concat) == "unsupported_container"
    picture = tmp_path / "picture.mp4"
    assert cv2.imwrite(str(tmp_path / "picture.png"), np.zeros((90, 160, 3), np.uint8))
    picture.write_bytes((tmp_path / "picture.png").read_bytes())
    assert error_class(picture) == "unsupported_container"


def test_codecs_off_the_list_and_sound_alone_are_refused(tmp_path: Path) -> None:
    odd = write_video(tmp_path / "odd.mkv", moving_frames(), 24, Coding("ffv1", ".mkv", ()))
    assert error_class(odd) == "unsupported_codec"
    sound = tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        samples.rate = 44100
        container.mux(stream.encode(samples))
        container.mux(stream.encode(None))
    assert error_class(sound) == "no_video_stream"


def test_rotation_and_pixel_aspect_are_displayed_sizes(tmp_path: Path) -> None:
    turned = tmp_path / "turned.mp4"
    with av.open(str(turned), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 160, 90, "yuv420p"
        stream.set_display_rotation(90)
        for image in moving_frames():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="bgr24")))
        container.mux(stream.encode(None))
    found = probe(turned)
    assert (found.width, found.height, found.rotation) == (90, 160, 270), "90 degrees counter-clockwise are 270 clockwise"
    wide = write_video(tmp_path / "wide.mp4", moving_frames(), 24, Coding(options=(("aspect", "4:3"),)))
    found = probe(wide)
    assert found.pixel_aspect == pytest.approx(4 / 3, rel=0.01)
    assert (found.width, found.height) == (213, 90)


def test_errors_cross_processes() -> None:
    error = pickle.loads(pickle.dumps(MediaError("decode_failed", "clip.mp4: broken", retryable=True)))
    assert (error.error_class, str(error), error.retryable) == ("decode_failed", "clip.mp4: broken", True)


# What follows runs in the guarded child; the child imports this module to find the functions.


def crash() -> None:
    os.abort()


def spin() -> None:
    while True:
        pass


def hog() -> int:
    return len([bytearray(2**28) for _ in range(64)])


def hang_uninterruptibly() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    spin()


class UnpicklableError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__("cannot travel")


def raise_unpicklable() -> None:
    raise UnpicklableError(1, 2)


def failing(kind: str) -> None:
    raise MediaError("no_frames", "x") if kind == "media" else KeyError("y")


@pytest.fixture(scope="module")
def guard() -> Iterator[Guard]:
    with Guard(GuardLimits(memory_bytes=2 * 2**30, seconds=60)) as made:
        yield made


def test_guard_runs_and_keeps_its_child(guard: Guard, plain: Path) -> None:
    assert guard.run(probe, plain) == probe(plain)
    child = guard.run(os.getpid)
    assert child != os.getpid()
    assert guard.run(os.getpid) == child


@pytest.mark.parametrize(
    ("function", "seconds", "expected"),
    [
        (crash, 30, "decoder_crashed"),
        (spin, 0.5, "decoder_timeout"),
        (hog, 30, "decoder_memory"),
        (hang_uninterruptibly, 0.5, "decoder_timeout"),
    ],
)
def test_a_dead_child_costs_one_call(guard: Guard, function: object, seconds: float, expected: str) -> None:
    with pytest.raises(MediaError) as caught:
        guard.run(function, seconds=seconds)  # type: ignore[arg-type]
    assert caught.value.error_class == expected
    assert guard.run(abs, -3) == 3, "the next call finds a living child"


def test_the_child_outlives_the_thread_that_first_used_it() -> None:
    with Guard() as made:
        children: list[int] = []
        thread = threading.Thread(target=lambda: children.append(made.run(os.getpid)))
        thread.start()
        thread.join()
        assert made.run(os.getpid) == children[0]


def test_processor_time_is_limited_too() -> None:
    with Guard(GuardLimits(seconds=120, cpu_seconds=1)) as short, pytest.raises(MediaError) as caught:
        short.run(spin)
    assert caught.value.error_class == "decoder_timeout"


def test_exceptions_arrive_as_they_are(guard: Guard) -> None:
    with pytest.raises(MediaError) as caught:
        guard.run(failing, "media")
    assert caught.value.error_class == "no_frames"
    with pytest.raises(KeyError):
        guard.run(failing, "key")
    with pytest.raises(RuntimeError, match="cannot travel"):
        guard.run(raise_unpicklable)


def test_an_idle_child_killed_from_outside_is_replaced(guard: Guard) -> None:
    child = guard.run(os.getpid)
    os.kill(child, signal.SIGKILL)
    assert guard.run(os.getpid) != child


def test_closing_reaps_the_child() -> None:
    with Guard() as made:
        child = psutil.Process(made.run(os.getpid))
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert made.run(abs, -1) == 1, "a closed guard opens again when it is used"
    made.close()


def test_one_guard_for_equal_limits() -> None:
    assert shared_guard(GuardLimits(seconds=7)) is shared_guard(GuardLimits(seconds=7))


PARENT = """
    import sys, time
    from videofactory.curation.media import Guard, shared_guard

    if __name__ == "__main__":
        guard = shared_guard()
        import os
        print(guard.run(os.getpid), flush=True)
        if sys.argv[1] == "busy":
            guard.run(time.sleep, 120)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills a child with its parent")
@pytest.mark.parametrize("way", ["busy", "exit"])
def test_no_orphan_remains(tmp_path: Path, way: str) -> None:
    script = tmp_path / "parent.py"
    script.write_text(textwrap.dedent(PARENT))
    parent = subprocess.Popen([sys.executable, str(script), way], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    if way == "busy":
        parent.kill()
    code = parent.wait(timeout=60)
    parent.stdout.close()
    assert code == (-signal.SIGKILL if way == "busy" else 0)
    gone, alive = psutil.wait_procs([child], timeout=30)
    assert gone and not alive


def test_limits_do_not_touch_this_process(guard: Guard) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    guard.run(abs, -1)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
