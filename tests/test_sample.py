"""The miniature world: the same from the same seed, and its truth is what its files show."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from videofactory.curation.guard import ERRORS, MediaError
from videofactory.curation.media import probe
from videofactory.pipelines.sample import World, make_world
from videofactory.pipelines.sample.scenario import KINDS, write_scenario
from videofactory.pipelines.sample.scene import Renderer
from videofactory.pipelines.sample.shapes import COLOURS, FORMS
from videofactory.pipelines.sample.truth import KEPT, RULES, SCHEMA, verdict_of

SEED = 5
INTACT = ("h264_mixed", "hevc_mkv", "mpeg2_ts", "h264_variable_rate", "h264_rotated", "h264_letterbox")
FAULTS = ("no_index", "cut_in_half", "text", "audio_only", "empty")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), SEED, kinds=(*INTACT, *FAULTS))


def rows_of(world: World, kind: str) -> list[dict[str, Any]]:
    return [row for row in world.truth.to_pylist() if row["kind"] == kind]


def frames_of(world: World, kind: str) -> list[tuple[float, NDArray[np.float32]]]:
    """Timestamps and upright frames of the file of `kind`."""
    (path,) = (path for path in world.videos if path.stem.endswith(kind))

    def read() -> Iterator[tuple[float, NDArray[np.float32]]]:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                pixels = frame.to_ndarray(format="rgb24").astype(np.float32)
                yield frame.time, np.rot90(pixels, frame.rotation // 90)

    return list(read())


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    kinds = ("h264_shorts", "no_index", "text")
    worlds = [make_world(tmp_path / str(number), seed, kinds=kinds) for number, seed in enumerate((1, 1, 2))]
    manifests = [json.loads((world.directory / "sample.json").read_text()) for world in worlds]
    assert manifests[0] == manifests[1]
    assert manifests[0]["sha256"]["000_h264_shorts.mp4"] != manifests[2]["sha256"]["000_h264_shorts.mp4"]
    assert worlds[0].truth.equals(worlds[1].truth)
    for path in worlds[0].videos:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == manifests[0]["sha256"][path.name]


@pytest.mark.parametrize("kind", INTACT)
def test_truth_is_what_the_file_shows(world: World, kind: str) -> None:
    """Every shot has its frames between start and end, upright, and they are the frames of that shot and no other."""
    number = [*INTACT, *FAULTS].index(kind)
    video = write_scenario(SEED, kinds=(*INTACT, *FAULTS))[number]
    frames = frames_of(world, kind)
    rows = rows_of(world, kind)
    assert len(rows) == len(video.shots)
    assert sum(row["frames"] for row in rows) == len(frames)
    for row, shot in zip(rows, video.shots, strict=True):
        inside = [(moment, pixels) for moment, pixels in frames if row["start"] - 1e-6 <= moment < row["end"] - 1e-6]
        assert len(inside) == row["frames"]
        assert inside[0][1].shape == (row["height"], row["width"], 3)
        moment, pixels = inside[len(inside) // 2]
        expected = Renderer(shot, row["width"], row["height"]).frame(moment - row["start"]).astype(np.float32)
        assert np.abs(pixels - expected).mean() < 8, (row["shot"], np.abs(pixels - expected).mean())


def test_cuts_are_seen_and_fades_are_black(world: World) -> None:
    for kind in ("h264_mixed", "hevc_mkv"):
        frames = frames_of(world, kind)
        for row in rows_of(world, kind)[1:]:
            after = next(i for i, (moment, _) in enumerate(frames) if moment >= row["start"] - 1e-6)
            if row["transition_in"] == "fade":
                assert frames[after][1].mean() < 12
            else:
                assert np.abs(frames[after][1] - frames[after - 1][1]).mean() > 20


def test_verdicts_name_what_is_wrong(world: World) -> None:
    assert [row["verdict"] for row in rows_of(world, "h264_mixed")] == [KEPT, "still", KEPT, "dark", "duration", KEPT]
    assert {row["verdict"] for row in rows_of(world, "h264_letterbox")} == {"letterbox"}
    assert {row["verdict"] for row in rows_of(world, "mpeg2_ts")} == {KEPT}


def test_rejects_look_as_they_are_described(world: World) -> None:
    frames = frames_of(world, "h264_mixed")
    for row in rows_of(world, "h264_mixed"):
        pixels = [p for moment, p in frames if row["start"] - 1e-6 <= moment < row["end"] - 1e-6]
        steps = [np.abs(b - a).mean() for a, b in pairwise(pixels)]
        # Frozen frames differ by what the encoder makes of them; moving ones by their motion.
        assert (np.median(steps) < 0.5) == (row["verdict"] in ("still", "dark")), (row["verdict"], np.median(steps))
        assert (pixels[5].mean() / 255 < 0.08) == (row["verdict"] == "dark")
        assert (row["duration"] < 1) == (row["verdict"] == "duration")
    row = rows_of(world, "h264_letterbox")[0]
    bar = round(row["letterbox"] * row["height"] / 2)
    picture = frames_of(world, "h264_letterbox")[3][1]
    assert picture[: bar - 2].mean() < 4
    assert picture[bar + 2 : bar + 20].mean() > 20


def test_faults_are_of_their_class(world: World) -> None:
    for kind in FAULTS:
        (row,) = rows_of(world, kind)
        assert row["error_class"] in ERRORS
        assert row["verdict"] is None
        if kind != "cut_in_half":
            (path,) = (path for path in world.videos if path.name == row["video"])
            with pytest.raises(MediaError) as caught:
                probe(path)
            assert caught.value.error_class == row["error_class"]


def test_a_file_cut_in_half_opens_and_ends_early(world: World) -> None:
    (path,) = (path for path in world.videos if path.stem.endswith("cut_in_half"))
    declared = probe(path).duration
    assert declared is not None
    decoded = 0.0
    with av.open(str(path)) as container:
        try:
            for frame in container.decode(video=0):
                decoded = frame.time
        except av.error.FFmpegError:
            pass
    assert decoded < 0.8 * declared


def test_copies_are_exact(tmp_path: Path) -> None:
    world = make_world(tmp_path, 3, kinds=("h264_24fps", "h264_copy"))
    original, copy = world.videos
    assert original.read_bytes() == copy.read_bytes()
    ours, theirs = rows_of(world, "h264_24fps"), rows_of(world, "h264_copy")
    assert {row["duplicate_of"] for row in theirs} == {original.name}
    different = ("video", "kind", "duplicate_of")
    assert [{k: v for k, v in row.items() if k not in different} for row in ours] == [
        {k: v for k, v in row.items() if k not in different} for row in theirs
    ]


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, KEPT),
        ({"duration": 0.8}, "duration"),
        ({"width": 320, "height": 180}, "resolution"),
        ({"width": 640, "height": 480}, "widescreen"),
        ({"letterbox": 0.25}, "letterbox"),
        ({"brightness": 0.03}, "dark"),
        ({"static_fraction": 1.0}, "still"),
        ({"motion": 0.0}, "still"),
        ({"motion": 0.0, "duration": 0.5}, "duration"),
    ],
)
def test_first_broken_rule_is_the_verdict(change: dict[str, float], verdict: str) -> None:
    good = {"duration": 2, "width": 640, "height": 360, "letterbox": 0, "brightness": 0.4, "static_fraction": 0, "motion": 0.08}
    assert verdict_of({**good, **change}) == verdict
    assert verdict == KEPT or verdict in RULES


def test_a_default_world_has_every_kind_and_most_pairs() -> None:
    videos = write_scenario(0)
    assert [video.kind.name for video in videos] == [kind.name for kind in KINDS]
    pairs = {(shot.colour, shot.form) for video in videos for shot in video.shots}
    assert len(pairs) >= 0.8 * len(COLOURS) * len(FORMS)
    for video in videos:
        for before, after in pairwise(video.shots):
            assert before.colour != after.colour
            assert before.form != after.form
            assert before.background != after.background


def test_more_sources_than_kinds_are_other_videos() -> None:
    videos = write_scenario(0, sources=len(KINDS) + 2)
    assert len({video.name for video in videos}) == len(KINDS) + 2
    assert not videos[-1].kind.fault
    assert videos[-2].kind == videos[0].kind
    assert videos[-2].shots != videos[0].shots


def test_scenarios_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="kind 'opera' is none of"):
        write_scenario(0, kinds=["opera"])
    with pytest.raises(ValueError, match="has to come before it"):
        write_scenario(0, kinds=["h264_copy"])
    with pytest.raises(ValueError, match="0 sources"):
        write_scenario(0, sources=0)


def test_what_is_not_a_world_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "holiday.mp4").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="was not made by the sample"):
        make_world(tmp_path, kinds=["text"])
    assert (tmp_path / "videos" / "holiday.mp4").exists()


def test_command_line_makes_and_replaces_a_world(tmp_path: Path) -> None:
    make_world(tmp_path, kinds=["text", "empty"])
    command = [sys.executable, "-m", "videofactory.pipelines.sample", "--out", str(tmp_path), "--seed", "9", "--sources", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "videos").iterdir()] == ["000_h264_24fps.mp4"]
    assert pq.read_table(tmp_path / "truth.parquet").schema.equals(SCHEMA)
