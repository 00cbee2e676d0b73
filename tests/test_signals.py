"""Every signal against pictures whose right answer is known, and the promise that a new signal is one new module."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.labelled_shots import Coding, Image, Scene, write_video
from videofactory.curation import signals
from videofactory.curation.analysis import AnalysisSettings, analyse
from videofactory.curation.signals import Frame, Signal
from videofactory.curation.signals.letterbox import Letterbox

WIDTH, HEIGHT = 320, 180


def ranks(values: list[float]) -> np.ndarray:
    return np.argsort(np.argsort(values)).astype(float)


def measured(path: Path, frames: Iterator[Image], rate: int = 24, coding: Coding | None = None) -> dict[str, float | None]:
    """The signals of a one-shot video made of `frames`."""
    write_video(path, frames, rate, coding or Coding())
    # A threshold that nothing reaches keeps the video one shot.
    found = analyse(path, AnalysisSettings(min_content=255))
    assert len(found.shots) == 1
    return found.shots[0].signals


def scene_frames(seconds: float, rate: int, **scene: float) -> Iterator[Image]:
    made = Scene(width=WIDTH, height=HEIGHT, objects=0, **{"seed": 11, "zoom": 0.0, **scene})  # type: ignore[arg-type]
    return (made.frame(number / rate, number) for number in range(int(seconds * rate)))


MOTION_CODINGS = {
    "x264 at 24": (24, Coding()),
    "x264 at 60": (60, Coding()),
    "x264 at 24, coarse": (24, Coding(options=(("preset", "veryfast"), ("crf", "36")))),
    "vp9 at 30": (30, Coding("libvpx-vp9", ".webm", (("deadline", "realtime"), ("cpu-used", "8"), ("b", "600000")))),
    "mpeg4 at 12": (12, Coding("mpeg4", ".mp4", (("q:v", "6"), ("bf", "0"), ("b", "900000")))),
}


def test_motion_ranks_moves_by_true_speed_whatever_the_encoder(tmp_path: Path) -> None:
    speeds = [0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7]
    pairs = []
    for name, (rate, coding) in MOTION_CODINGS.items():
        found = []
        for seed, speed in enumerate(speeds):
            path = tmp_path / f"{rate}_{seed}{coding.suffix}"
            value = measured(path, scene_frames(1.2, rate, seed=seed, speed=speed, noise=3.0), rate, coding)["motion"]
            assert value is not None
            found.append(value)
        assert np.corrcoef(ranks(found), ranks(speeds))[0, 1] > 0.96, f"{name}: {found}"
        assert found[0] < 0.005, f"{name}: a still picture moves at {found[0]}"
        pairs += list(zip(speeds, found, strict=True))
    truth, value = (list(side) for side in zip(*pairs, strict=True))
    assert np.corrcoef(ranks(truth), ranks(value))[0, 1] > 0.95, "numbers of different encoders and frame rates compare"
    for speed, number in pairs:
        if 0.05 <= speed <= 0.4:
            assert 0.5 * speed < number < 1.3 * speed, f"{number} for a true speed of {speed}"


def test_motion_sees_the_whole_shot_and_both_directions(tmp_path: Path) -> None:
    still, moving = list(scene_frames(2, 24, speed=0.0)), list(scene_frames(2, 24, speed=0.3))
    late = measured(tmp_path / "late.mp4", iter([*still, *moving]))["motion"]
    forth_and_back = measured(tmp_path / "back.mp4", iter([*moving, *reversed(moving)]))["motion"]
    always = measured(tmp_path / "always.mp4", iter(moving))["motion"]
    assert late is not None and always is not None and forth_and_back is not None
    assert late == pytest.approx(always / 2, rel=0.35)
    assert forth_and_back == pytest.approx(always, rel=0.25), "motion has no sign"


def test_still_pictures_are_static_and_slow_moves_are_not(tmp_path: Path) -> None:
    def fraction(name: str, **scene: float) -> float | None:
        return measured(tmp_path / name, scene_frames(2, 24, **scene))["static_fraction"]

    assert fraction("still.mp4", speed=0.0, noise=0.0) == 1.0
    assert fraction("noisy.mp4", speed=0.0, noise=8.0) == 1.0
    assert fraction("slow.mp4", speed=0.03, noise=3.0) == 0.0
    half = [*scene_frames(2, 24, speed=0.0), *scene_frames(2, 24, speed=0.2)]
    assert measured(tmp_path / "half.mp4", iter(half))["static_fraction"] == pytest.approx(0.5, abs=0.08)


def test_coarse_coding_does_not_move_a_still(tmp_path: Path) -> None:
    coding = Coding(options=(("preset", "veryfast"), ("crf", "40"), ("g", "24")))
    found = measured(tmp_path / "coarse.mp4", scene_frames(3, 24, speed=0.0, noise=4.0), coding=coding)
    assert found["static_fraction"] is not None and found["static_fraction"] > 0.7
    assert found["motion"] is not None and found["motion"] < 0.01


def test_brightness_and_sharpness(tmp_path: Path) -> None:
    def blurred(sigma: float) -> Iterator[Image]:
        return (cv2.GaussianBlur(frame, (0, 0), sigma) for frame in scene_frames(1, 24, noise=0.0))  # type: ignore[misc]

    grays = [np.full((HEIGHT, WIDTH, 3), level, np.uint8) for level in (51, 204)]
    for level, gray in zip((0.2, 0.8), grays, strict=True):
        found = measured(tmp_path / f"gray{level}.mp4", iter([gray] * 24))
        assert found["brightness"] == pytest.approx(level, abs=0.02)
        assert found["brightness_spread"] == pytest.approx(0.0, abs=0.01)
    halves = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    halves[:, WIDTH // 2 :] = 255
    assert measured(tmp_path / "halves.mp4", iter([halves] * 24))["brightness_spread"] == pytest.approx(0.5, abs=0.02)
    sharp = [measured(tmp_path / f"blur{sigma}.mp4", blurred(sigma))["sharpness"] for sigma in (0.3, 2.0, 6.0)]
    assert None not in sharp and sharp[0] > 3 * sharp[1] and sharp[1] > 1.3 * sharp[2]  # type: ignore[operator]


def barred(frames: Iterator[Image], top: float = 0.0, left: float = 0.0) -> Iterator[Image]:
    for frame in frames:
        image = frame.copy()
        rows, columns = int(top * HEIGHT), int(left * WIDTH)
        if rows:
            image[:rows] = image[-rows:] = 0
        if columns:
            image[:, :columns] = image[:, -columns:] = 0
        yield image


def night(seed: int) -> Iterator[Image]:
    """A lamp that sways in a dark room with sensor noise."""
    rng = np.random.default_rng(seed)
    for number in range(36):
        image = np.clip(rng.normal(6, 3, (HEIGHT, WIDTH, 3)), 0, 255).astype(np.uint8)
        place = (WIDTH // 2 + int(40 * np.sin(number / 6)), HEIGHT // 2)
        cv2.circle(image, place, 30, (150, 190, 220), -1, cv2.LINE_AA)
        yield cv2.GaussianBlur(image, (0, 0), 4)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        (lambda: scene_frames(1.5, 24, speed=0.1), 0.0),
        (lambda: barred(scene_frames(1.5, 24, speed=0.1), top=0.12), 0.24),
        (lambda: barred(scene_frames(1.5, 24, speed=0.1), left=0.2), 0.4),
        (lambda: barred(scene_frames(1.5, 24, speed=0.1), top=0.1, left=0.1), 0.36),
        (lambda: night(1), 0.0),
        (lambda: (cv2.convertScaleAbs(frame, alpha=0.12) for frame in scene_frames(1.5, 24, speed=0.1)), 0.0),
    ],
    ids=["picture", "letterbox", "pillarbox", "windowbox", "night", "dark"],
)
def test_letterbox(tmp_path: Path, frames: Callable[[], Iterator[Image]], expected: float) -> None:
    assert measured(tmp_path / "bars.mp4", frames())["letterbox"] == pytest.approx(expected, abs=0.025)


def test_letterbox_of_a_black_shot_is_not_measured(tmp_path: Path) -> None:
    black = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    assert measured(tmp_path / "black.mp4", iter([black] * 24))["letterbox"] is None
    letterbox = Letterbox()
    assert letterbox.summarise(np.zeros(1), np.array([letterbox.measure(Frame(0.0, black), None)])) == {"letterbox": None}


def test_one_frame_has_no_motion(tmp_path: Path) -> None:
    found = measured(tmp_path / "one.mp4", itertools.islice(scene_frames(1, 24), 1))
    assert found["motion"] is found["cut_score"] is found["static_fraction"] is None
    assert found["brightness"] is not None and found["sharpness"] is not None


NEW_SIGNAL = '''
from videofactory.curation.signals import Signal
from videofactory.shards.schema import Column

class Redness(Signal):
    """Mean of the red channel."""
    columns = (Column(name="redness", meaning="mean of red", unit="fraction"),)

    def measure(self, frame, previous):
        return (frame.bgr[..., 2].mean() / 255,)

    def summarise(self, times, values):
        return {"redness": values[:, 0].mean()}

NOT_A_SIGNAL = 3
'''


@pytest.fixture
def extension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Installs a package with one entry point, as pip would lay it out."""

    def install(target: str) -> None:
        (tmp_path / "extra_signal.py").write_text(NEW_SIGNAL)
        info = tmp_path / "extra_signal-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: extra-signal\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{signals.ENTRY_POINTS}]\nredness = extra_signal:{target}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        signals.load.cache_clear()

    yield install
    sys.modules.pop("extra_signal", None)
    signals.load.cache_clear()


def test_an_entry_point_adds_a_signal(extension: Callable[[str], None], tmp_path: Path) -> None:
    before = {column.name for column in signals.columns()}
    extension("Redness")
    assert {column.name for column in signals.columns()} - before == {"redness"}
    red = np.full((HEIGHT, WIDTH, 3), (0, 0, 204), np.uint8)
    assert measured(tmp_path / "red.mp4", iter([red] * 12))["redness"] == pytest.approx(0.8, abs=0.02)


def test_a_broken_extension_is_named(extension: Callable[[str], None]) -> None:
    extension("NOT_A_SIGNAL")
    with pytest.raises(TypeError, match="redness"):
        signals.load()


def test_a_missing_extension_is_named(extension: Callable[[str], None]) -> None:
    extension("Absent")
    with pytest.raises(ImportError, match=r"redness.*Absent"):
        signals.load()


def test_every_module_of_the_package_is_found_and_documented() -> None:
    modules = {path.stem for path in Path(signals.__file__).parent.glob("*.py")} - {"__init__"}
    assert {signal.__module__.rpartition(".")[2] for signal in signals.load()} == modules
    for column in signals.columns():
        assert column.meaning and column.unit and column.cost and column.source, column.name


def test_values_that_compare_with_the_shot_before_are_left_out(tmp_path: Path) -> None:
    first, second = scene_frames(2, 24, seed=1, speed=0.05), scene_frames(2, 24, seed=2, speed=0.05)
    path = write_video(tmp_path / "two.mp4", iter([*first, *second]), 24)
    found = analyse(path)
    assert len(found.shots) == 2
    for shot in found.shots:
        assert shot.signals["cut_score"] is not None and shot.signals["cut_score"] < 15
        assert shot.signals["motion"] is not None and shot.signals["motion"] < 0.15
        assert shot.signals["static_fraction"] == 0.0


def test_two_signals_may_not_share_a_column(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twin(Signal):
        columns = Letterbox.columns

        def measure(self, frame: Frame, previous: Frame | None) -> tuple[float, ...]:
            return (0.0,)

        def summarise(self, times: np.ndarray, values: np.ndarray) -> dict[str, float | None]:
            return {}

    class Entry:
        name, value = "twin", "here:Twin"

        @staticmethod
        def load() -> type[Signal]:
            return Twin

    monkeypatch.setattr(signals, "entry_points", lambda group: [Entry])
    signals.load.cache_clear()
    try:
        with pytest.raises(ValueError, match="letterbox"):
            signals.load()
    finally:
        signals.load.cache_clear()
