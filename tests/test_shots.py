"""The shot detector against PySceneDetect's own, and against labelled cuts under real codecs."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import scenedetect
from scenedetect.common import FrameTimecode, Timecode

from tests.labelled_shots import CODINGS, Labelled, Scene, labelled_set, shot_frames, write_video
from videofactory.curation.analysis import Analysis, AnalysisSettings, analyse
from videofactory.curation.decode import SmallFrames
from videofactory.curation.shots import ShotDetector, ShotSettings, detect, make_detector
from videofactory.curation.signals import Frame


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> list[Labelled]:
    made = labelled_set(tmp_path_factory.mktemp("labelled"))
    assert sum(len(video.cuts) for video in made) >= 200
    assert len({coding.codec for coding in CODINGS}) >= 5
    return made


@pytest.fixture(scope="session")
def analysed(labelled: list[Labelled]) -> dict[Path, Analysis]:
    return {video.path: analyse(video.path) for video in labelled}


def matched(truth: Sequence[float], found: Sequence[float], tolerance: float) -> int:
    """Number of pairs within `tolerance`, each boundary used once; both lists ascend."""
    pairs, place = 0, 0
    for cut in truth:
        while place < len(found) and found[place] < cut - tolerance:
            place += 1
        if place < len(found) and found[place] <= cut + tolerance:
            pairs += 1
            place += 1
    return pairs


def test_matching_counts_each_boundary_once() -> None:
    assert matched([1.0, 2.0, 3.0], [1.05, 1.08, 2.5, 2.95], 0.1) == 2
    assert matched([1.0], [], 0.1) == matched([], [1.0], 0.1) == 0


def f1(videos: list[Labelled], boundaries: dict[Path, list[float]]) -> float:
    right = total = 0
    for video in videos:
        truth = [cut / video.rate for cut in video.cuts]
        found = boundaries[video.path]
        # Two frames, and a little for containers that round timestamps to milliseconds.
        right += matched(truth, found, 2 / video.rate + 0.002)
        total += len(truth) + len(found)
    return 2 * right / total


def test_shot_f1_equals_full_frames(labelled: list[Labelled], analysed: dict[Path, Analysis]) -> None:
    ours, reference = {}, {}
    for video in labelled:
        found = analysed[video.path]
        ours[video.path] = [shot.start - found.probe.start for shot in found.shots[1:]]
        scenes = scenedetect.detect(str(video.path), make_detector(ShotSettings()))
        reference[video.path] = [start.seconds for start, _ in scenes[1:]]
    score, full = f1(labelled, ours), f1(labelled, reference)
    print(f"F1 {score:.4f} on decoded reference frames, {full:.4f} on full frames with PySceneDetect's detect()")
    assert score >= full - 0.01
    assert score > 0.85


def test_trimmed_shots_hold_no_foreign_frame(labelled: list[Labelled], analysed: dict[Path, Analysis]) -> None:
    """Of the cuts that were found, no frame of [start, end) lies beyond: frames not decoded are in neither shot."""
    for video in labelled:
        found = analysed[video.path]
        cuts = [found.probe.start + cut / video.rate for cut in video.cuts]
        starts = [shot.start for shot in found.shots[1:]]
        for before, after in pairwise(found.shots):
            near = [cut for cut in cuts if abs(cut - after.start) <= 2 / video.rate + 0.002]
            # A shot may only be judged where its cut was found, and found once.
            if (
                len(near) == 1
                and sum(abs(near[0] - start) <= 4 / video.rate for start in starts) == 1
                and after.start >= near[0] - 0.002
            ):
                assert before.end <= near[0] + 0.002, f"{video.path.name}: shot to {before.end}, cut at {near[0]}"
            assert before.end <= after.start


def test_same_boundaries_and_scores_as_the_library(labelled: list[Labelled]) -> None:
    for video in labelled[:6]:
        own, library = ShotDetector(), make_detector(ShotSettings())
        expected, times, start = [], [], 0.0
        for number, (time, image) in enumerate(SmallFrames(video.path, skip="none")):
            start = start if number else time
            score = own.push(Frame(time, image))
            # Exact, as the library's own reader has it: 18 frames of 30 per second are 0.6 s and not a little less.
            step = 1 / Fraction(video.rate).limit_denominator(1001)
            exact = Timecode(round((time - start) / float(step)), step)
            cuts = library.process_frame(FrameTimecode(exact, fps=1 / step), image)
            assert score == pytest.approx(library._frame_score, abs=1e-9), f"frame {number}"
            expected += [cut.seconds for cut in cuts]
            times.append(time)
        found = [times[place] for place in own.finish()]
        assert [time - start for time in found] == pytest.approx(expected, abs=0.5 / video.rate)


def test_detect_covers_the_film(labelled: list[Labelled]) -> None:
    video = labelled[0]
    shots = detect(video.path)
    assert shots[0][0] == pytest.approx(0.0, abs=0.001)
    assert shots[-1][1] == pytest.approx(video.frames / video.rate, abs=0.001)
    assert all(end == following for (_, end), (following, _) in pairwise(shots))
    assert [start for start, _ in shots[1:]] == pytest.approx([cut / video.rate for cut in video.cuts], abs=0.001)


def test_least_length_is_seconds_and_not_frames(tmp_path: Path) -> None:
    """Shots of 18 frames: too short at 60 frames per second, long enough at 12."""
    counts = {}
    for rate in (12, 60):
        path = write_video(tmp_path / f"{rate}.mp4", shot_frames(4, 160, 90, [18] * 6, rate), rate)
        counts[rate] = len(detect(path, ShotSettings(min_shot_seconds=0.6)))
    assert counts[12] == 6
    assert counts[60] < 6


def test_settings_reach_the_detector(tmp_path: Path) -> None:
    path = write_video(tmp_path / "two.mp4", shot_frames(4, 160, 90, [24, 24], 24), 24)
    assert len(detect(path)) == 2
    assert len(detect(path, ShotSettings(min_content=200))) == 1
    assert len(analyse(path, AnalysisSettings(adaptive_threshold=250.0)).shots) == 1


def test_an_empty_detector_finds_nothing() -> None:
    assert ShotDetector().finish() == []
    detector = ShotDetector()
    image = Scene(1, 64, 36).frame(0, 0)
    assert detector.push(Frame(-3.0, image)) == 0.0
    assert detector.push(Frame(-2.9, np.full_like(image, 255) - image)) > 15
    assert detector.finish() == []
