"""The one pass over whole files: timestamps, orientation, damage, equality of settings, and what a crash costs."""

from __future__ import annotations

import pickle
import subprocess
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from tests.labelled_shots import Coding, Image, Scene, shot_frames, write_video
from videofactory.curation import signals
from videofactory.curation.analysis import AnalysisSettings, analyse, analyse_guarded, analysed_with
from videofactory.curation.decode import SmallFrames
from videofactory.curation.media import Guard, GuardLimits, MediaError

LENGTHS = [30, 36, 42]


def cut_frames(width: int = 192, height: int = 108, seed: int = 21) -> Iterator[Image]:
    return shot_frames(seed, width, height, LENGTHS, 24)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("analysis") / "plain.mp4", cut_frames(), 24)


def test_shots_frames_and_every_column(plain: Path) -> None:
    found = analyse(plain)
    assert [shot.start for shot in found.shots] == pytest.approx([0, 30 / 24, 66 / 24], abs=1e-6)
    assert found.shots[-1].end == pytest.approx(108 / 24, abs=1e-6)
    assert found.frames == 108
    assert found.frames_decoded < 0.8 * found.frames, "B-frames that nothing refers to are not decoded"
    assert sum(shot.frames for shot in found.shots) >= 108 - 2 * 3
    assert found.damaged == 0 and found.cpu_seconds > 0
    names = {column.name for column in signals.columns()}
    for shot in found.shots:
        assert set(shot.signals) == names
        assert None not in shot.signals.values()
        for column in signals.columns():
            value = shot.signals[column.name]
            assert value is not None
            assert (column.low is None or value >= column.low) and (column.high is None or value <= column.high)


def test_every_frame_gives_nearly_the_same_numbers(plain: Path) -> None:
    thin, full = analyse(plain), analyse(plain, AnalysisSettings(skip="none"))
    assert full.frames_decoded == full.frames == sum(shot.frames for shot in full.shots) == 108
    for one, other in zip(thin.shots, full.shots, strict=True):
        assert other.start <= one.start < one.end <= other.end + 1e-9
        for name in ("brightness", "brightness_spread", "letterbox", "static_fraction"):
            assert one.signals[name] == pytest.approx(other.signals[name], rel=0.1, abs=0.01), name
        # Encoders give the frames that nothing refers to fewer bits, so these are a little softer.
        assert one.signals["sharpness"] == pytest.approx(other.signals["sharpness"], rel=0.3)


def test_results_are_deterministic_and_travel(plain: Path) -> None:
    one, other = analyse(plain), analyse(plain, AnalysisSettings(threads=2))
    assert one.shots == other.shots, "threads change no number"
    assert pickle.loads(pickle.dumps(one)) == one


def test_fingerprint_follows_what_decides_the_numbers() -> None:
    assert analysed_with(AnalysisSettings(threads=1)) == analysed_with(AnalysisSettings(threads=4)) == analysed_with()
    different = [AnalysisSettings(width=320), AnalysisSettings(skip="none"), AnalysisSettings(window=2)]
    assert len({analysed_with(settings) for settings in different} | {analysed_with()}) == 4


@pytest.mark.parametrize(("name", "value"), [("width", 8), ("skip", "half")])
def test_senseless_settings_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=str(value)):
        AnalysisSettings(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "coding",
    [
        Coding("libvpx-vp9", ".webm", (("deadline", "realtime"), ("cpu-used", "8"))),
        Coding("mpeg2video", ".mpg", (("b", "3000000"), ("bf", "2"))),
        Coding("mpeg2video", ".ts", (("b", "3000000"), ("bf", "2"))),
        Coding("libx264", ".ts"),
        Coding("libx265", ".mkv", (("preset", "ultrafast"), ("x265-params", "log-level=none"))),
        Coding("mpeg4", ".avi", (("b", "2000000"), ("bf", "2"))),
        Coding("libx264", ".avi"),
        Coding("libx264", ".flv"),
        Coding("libsvtav1", ".mp4", (("preset", "10"), ("crf", "35"))),
        Coding("libtheora", ".ogg", (("q", "7"),)),
        Coding("mjpeg", ".avi", (("q:v", "4"),), "yuvj420p"),
    ],
    ids=lambda coding: coding.codec + coding.suffix,
)
def test_codecs_and_containers(tmp_path: Path, coding: Coding) -> None:
    if coding.codec not in av.codecs_available:
        pytest.skip(f"this PyAV cannot encode {coding.codec}")
    path = write_video(tmp_path / f"video{coding.suffix}", cut_frames(), 24, coding)
    found = analyse(path)
    starts = [shot.start - found.probe.start for shot in found.shots]
    assert starts == pytest.approx([0, 30 / 24, 66 / 24], abs=2 / 24 + 0.002)
    assert found.shots[-1].end - found.probe.start == pytest.approx(108 / 24, abs=2 / 24 + 0.002)
    assert found.frames == pytest.approx(108, abs=2)


def write_timed(path: Path, ticks: list[int], base: Fraction, frames: Iterator[Image], rotation: int = 0) -> Path:
    """Encode frames at the given timestamps, in units of `base` seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"preset": "veryfast", "bf": "2"})
        stream.codec_context.time_base = base
        for index, (tick, image) in enumerate(zip(ticks, frames, strict=True)):
            if not index:
                stream.height, stream.width = image.shape[:2]
                stream.pix_fmt = "yuv420p"
                if rotation:
                    stream.set_display_rotation(rotation)
            frame = av.VideoFrame.from_ndarray(image, format="bgr24")
            frame.pts, frame.time_base = tick, base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_variable_frame_rate_keeps_the_files_own_timestamps(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    steps = rng.choice([20, 33, 41, 90], sum(LENGTHS) - 1)
    ticks = [0, *np.cumsum(steps).tolist()]
    path = write_timed(tmp_path / "variable.mkv", ticks, Fraction(1, 1000), cut_frames())
    found = analyse(path)
    expected = [ticks[place] / 1000 for place in (0, 30, 66)]
    assert [shot.start for shot in found.shots] == pytest.approx(expected, abs=0.2)
    frame_times = {tick / 1000 for tick in ticks}
    for shot, cut in zip(found.shots[1:], expected[1:], strict=True):
        assert min(abs(shot.start - time) for time in frame_times) < 0.002, "a shot starts at a frame"
        assert shot.start >= cut - 0.002
    for shot, cut in zip(found.shots, expected[1:], strict=False):
        assert shot.end <= cut + 0.002


@pytest.mark.parametrize("offset", [7.3, -0.5])
def test_odd_starts(tmp_path: Path, offset: float) -> None:
    ticks = [round(offset * 1000) + round(number * 1000 / 24) for number in range(sum(LENGTHS))]
    path = write_timed(tmp_path / "offset.mkv", ticks, Fraction(1, 1000), cut_frames())
    with av.open(str(path)) as container:
        first = next(container.decode(video=0)).time
    found = analyse(path)
    assert first is not None
    assert found.probe.start == found.shots[0].start == pytest.approx(first, abs=1e-6)
    starts = [shot.start - first for shot in found.shots]
    assert starts == pytest.approx([0, 30 / 24, 66 / 24], abs=2 / 24)


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_frames_stand_as_the_player_shows_them(tmp_path: Path, rotation: int, ffmpeg: str) -> None:
    ticks = list(range(24))
    scene = Scene(8, 192, 108, speed=0.0, noise=0.0)
    path = write_timed(tmp_path / "turned.mp4", ticks, Fraction(1, 24), (scene.frame(0, 0) for _ in ticks), rotation)
    shown = tmp_path / "shown.png"
    subprocess.run([ffmpeg, "-v", "error", "-i", str(path), "-frames:v", "1", str(shown)], check=True, timeout=60)
    expected = cv2.imread(str(shown))
    frames = SmallFrames(path, width=192, skip="none")
    _, image = next(iter(frames))
    assert expected is not None
    assert image.shape == expected.shape
    assert (frames.probe.width, frames.probe.height) == (expected.shape[1], expected.shape[0])
    assert np.abs(image.astype(int) - expected.astype(int)).mean() < 4


@pytest.fixture(scope="session")
def ffmpeg() -> str:
    import shutil

    import imageio_ffmpeg

    return shutil.which("ffmpeg") or imageio_ffmpeg.get_ffmpeg_exe()


def test_portrait_and_pixel_aspect(tmp_path: Path) -> None:
    tall = write_video(tmp_path / "tall.mp4", cut_frames(270, 480), 24)
    frames = SmallFrames(tall, width=256)
    _, image = next(iter(frames))
    assert image.shape == (256, 144, 3)
    assert len(analyse(tall).shots) == 3
    squeezed = write_video(tmp_path / "squeezed.mp4", cut_frames(180, 120), 24, Coding(options=(("aspect", "4:3"),)))
    frames = SmallFrames(squeezed)
    _, image = next(iter(frames))
    assert image.shape == (120, 240, 3), "a pixel a third wider than high makes 240 of 180"


def test_a_film_without_b_frames_is_decoded_whole(tmp_path: Path) -> None:
    zerolatency = Coding(options=(("preset", "veryfast"), ("tune", "zerolatency")))
    found = analyse(write_video(tmp_path / "p.mp4", cut_frames(), 24, zerolatency))
    assert found.frames_decoded == found.frames == 108


def test_too_few_reference_frames_turn_skipping_off(tmp_path: Path) -> None:
    sparse = Coding(options=(("preset", "veryfast"), ("x264-params", "b-pyramid=none:bframes=8:b-adapt=0:scenecut=0")))
    path = write_video(tmp_path / "sparse.mp4", cut_frames(), 24, sparse)
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.skip_frame = "NONREF"
        assert sum(1 for _ in container.decode(video=0)) < 30, "the file is what it is meant to be"
    found = analyse(path)
    assert found.frames_decoded == 108
    assert [shot.start for shot in found.shots] == pytest.approx([0, 30 / 24, 66 / 24], abs=1e-6)


def test_slow_films_are_decoded_whole(tmp_path: Path) -> None:
    found = analyse(write_video(tmp_path / "slow.mp4", cut_frames(), 10))
    assert found.frames_decoded == 108


def test_a_film_that_breaks_off_is_truncated(tmp_path: Path) -> None:
    whole = tmp_path / "whole.mp4"
    with av.open(str(whole), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=24, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = 192, 108, "yuv420p"
        for image in cut_frames():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="bgr24")))
        container.mux(stream.encode(None))
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(MediaError) as caught:
        analyse(broken)
    assert caught.value.error_class == "truncated" and caught.value.retryable
    webm = write_video(tmp_path / "whole.mkv", cut_frames(), 24)
    broken = tmp_path / "broken.mkv"
    broken.write_bytes(webm.read_bytes()[: webm.stat().st_size // 2])
    with pytest.raises(MediaError) as caught:
        analyse(broken)
    assert caught.value.error_class == "truncated"


def damage(source: Path, target: Path, part: float) -> Path:
    """Overwrite the payload of a fraction of the packets with noise."""
    rng = np.random.default_rng(1)
    data = bytearray(source.read_bytes())
    with av.open(str(source)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size and packet.pos is not None]
    for position, size in packets[5:]:
        if rng.random() < part:
            data[position + 4 : position + size] = rng.integers(0, 256, max(0, size - 4), np.uint8).tobytes()
    target.write_bytes(data)
    return target


def test_some_damage_is_counted_and_much_is_an_error(plain: Path, tmp_path: Path) -> None:
    lightly = analyse(damage(plain, tmp_path / "light.mp4", 0.03), AnalysisSettings(skip="none"))
    assert 0 < lightly.damaged <= 11
    assert lightly.shots[-1].end == pytest.approx(108 / 24, abs=0.2)
    with pytest.raises(MediaError) as caught:
        analyse(damage(plain, tmp_path / "heavy.mp4", 0.8))
    assert caught.value.error_class in ("decode_failed", "truncated")


def test_guarded_analysis_is_the_same_and_names_the_file(plain: Path, tmp_path: Path) -> None:
    with Guard(GuardLimits(seconds=60)) as guard:
        assert analyse_guarded(plain, guard=guard).shots == analyse(plain).shots
        with pytest.raises(MediaError, match=r"absent\.mp4"):
            analyse_guarded(tmp_path / "absent.mp4", guard=guard)
        zerolatency = Coding(options=(("preset", "ultrafast"), ("tune", "zerolatency")))
        long = write_video(tmp_path / "long.mp4", shot_frames(2, 640, 360, LENGTHS * 8, 24), 24, zerolatency)
        with pytest.raises(MediaError, match=r"long\.mp4") as caught:
            analyse_guarded(long, guard=guard, seconds=0.05)
        assert caught.value.error_class == "decoder_timeout"
        assert len(analyse_guarded(plain, guard=guard).shots) == 3
