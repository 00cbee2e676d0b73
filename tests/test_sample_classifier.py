"""The miniature world's classifier reads what was rendered, and the command that scores a model's videos by it says what it found."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch
import typer
from numpy.typing import NDArray
from typer.testing import CliRunner

from videofactory.model.video_files import write_video
from videofactory.pipelines.sample import classifier as classifier_module
from videofactory.pipelines.sample import train_classifier
from videofactory.pipelines.sample.classifier import CLASSIFIER, Classifier, centres, direction_of, slope
from videofactory.pipelines.sample.classifier_frames import (
    HEIGHT,
    PAIRS,
    WIDTH,
    Degradation,
    Studio,
    degrade,
    draw_degradation,
    draw_videos,
    render_video,
)
from videofactory.pipelines.sample.classifier_scores import TOGETHER, Rate, parse, score
from videofactory.pipelines.sample.classify import PROMPTS, app, score_folder
from videofactory.pipelines.sample.motion import motion_caption
from videofactory.pipelines.sample.prompts import main as write_prompts_file
from videofactory.pipelines.sample.prompts import write_prompts
from videofactory.pipelines.sample.scene import DIRECTIONS, Shot
from videofactory.pipelines.sample.shapes import COLOURS, FORMS
from videofactory.pipelines.sample.training_frames import HELD_OUT, SEEN

from .datasets import write_dataset
from .training_datasets import add_captions, kept

pytestmark = pytest.mark.usefixtures("one_thread")

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
SEED = 4711
"""Of shots that neither the training nor its measurement has drawn."""


@pytest.fixture(scope="module")
def reader() -> Classifier:
    return Classifier.load()


@pytest.fixture(scope="module")
def shots() -> list[Shot]:
    return draw_videos(len(PAIRS), SEED)


@pytest.fixture(scope="module")
def videos(shots: list[Shot]) -> list[NDArray[np.uint8]]:
    return [render_video(shot) for shot in shots]


def prompt_of(shot: Shot) -> str:
    return motion_caption({name: getattr(shot, name) for name in ("colour", "form", "background", "direction")})


# What the classifier reads.


def test_fresh_scenes_are_read_right(reader: Classifier, shots: list[Shot], videos: list[NDArray[np.uint8]]) -> None:
    scores = score(zip(map(prompt_of, shots), videos, strict=True), reader)
    for kind, rate in scores.rates().items():
        assert rate.asked == len(PAIRS)
        assert rate.share is not None and rate.share >= 0.9, (kind, str(rate))


def test_spoilt_scenes_are_mostly_read_right(reader: Classifier, shots: list[Shot], videos: list[NDArray[np.uint8]]) -> None:
    spoilt = [train_classifier.spoil(frames, number) for number, frames in enumerate(videos)]
    rates = score(zip(map(prompt_of, shots), spoilt, strict=True), reader).rates()
    for kind, least in (("colour", 0.85), ("form", 0.75), ("direction", 0.85)):
        share = rates[kind].share
        assert share is not None and share >= least, (kind, str(rates[kind]))


def test_time_reversed_goes_the_opposite_way(reader: Classifier, shots: list[Shot], videos: list[NDArray[np.uint8]]) -> None:
    for shot, frames in zip(shots[:8], videos, strict=False):
        forward, backward = reader.read(frames), reader.read(frames[::-1])
        assert forward.direction == shot.direction
        assert backward.direction == OPPOSITE[shot.direction]
        assert (forward.colour, forward.form) == (backward.colour, backward.form)
        assert forward.speed == pytest.approx(backward.speed, abs=1e-3)


def test_a_mirror_swaps_left_and_right_alone(reader: Classifier, shots: list[Shot], videos: list[NDArray[np.uint8]]) -> None:
    for shot, frames in zip(shots[:8], videos, strict=False):
        swapped = OPPOSITE[shot.direction] if shot.direction in ("left", "right") else shot.direction
        assert reader.read(frames[:, :, ::-1]).direction == swapped


def test_what_stands_still_has_no_direction(reader: Classifier, shots: list[Shot], videos: list[NDArray[np.uint8]]) -> None:
    still = reader.read(np.repeat(videos[0][:1], 16, axis=0))
    assert (still.colour, still.direction, still.speed) == (shots[0].colour, None, pytest.approx(0, abs=1e-6))
    # The camera may move all the same.
    for shot in shots[:6]:
        before = reader.read(render_video(replace(shot, speed=0.0)))
        assert (before.colour, before.form, before.direction) == (shot.colour, shot.form, None)
    assert reader.read(videos[0][:1]).direction is None


def test_without_a_shape_nothing_is_read(reader: Classifier, shots: list[Shot]) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (16, HEIGHT, WIDTH, 3), dtype=np.uint8)
    sceneries = [render_video(replace(shot, middle=(-3.0, 0.5)), frames=4) for shot in shots[:8]]
    for frames in (noise, np.zeros_like(noise), *sceneries):
        reading = reader.read(frames)
        assert (reading.colour, reading.form, reading.direction) == (None, None, None), reading.confidence


def test_speed_is_that_of_the_shot(reader: Classifier, shots: list[Shot], videos: list[NDArray[np.uint8]]) -> None:
    ratios = [reader.read(frames).speed / shot.speed for shot, frames in zip(shots[:12], videos, strict=False)]
    assert np.median(ratios) == pytest.approx(1, abs=0.12)
    twice = reader.read(videos[0], fps=16.0)
    assert twice.speed == pytest.approx(2 * reader.read(videos[0]).speed, rel=1e-6)


def test_frames_of_other_sizes_are_scaled(reader: Classifier, shots: list[Shot]) -> None:
    for shot in shots[:3]:
        large = reader.read(render_video(shot, height=180, width=320))
        assert (large.colour, large.form, large.direction) == (shot.colour, shot.form, shot.direction)


@pytest.mark.parametrize(
    "frames",
    [np.zeros((0, 64, 112, 3), np.uint8), np.zeros((64, 112, 3), np.uint8), np.zeros((4, 64, 112, 3), np.float32)],
)
def test_frames_of_another_kind_are_refused(reader: Classifier, frames: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(str(frames.shape))):
        reader.read(frames)


# Its arithmetic.


def test_centres_lie_where_the_mask_is() -> None:
    cover = torch.zeros(2, 16, 28)
    cover[0, 4, 7], cover[1, 8, 10:12] = 1.0, 0.5
    wanted = torch.tensor([[7.5 / 28, 4.5 / 28], [11 / 28, 8.5 / 28]])
    torch.testing.assert_close(centres(cover), wanted)


def test_slope_fits_a_line_and_leaves_out_what_has_no_weight() -> None:
    points = np.stack([0.1 + 0.02 * np.arange(16), 0.3 - 0.01 * np.arange(16)], axis=1)
    weights = np.ones(16)
    assert slope(points, weights) == pytest.approx((0.02, -0.01))
    points[5], weights[5] = 9.0, 0.0
    assert slope(points, weights) == pytest.approx((0.02, -0.01))
    assert slope(points[:1], weights[:1]) == slope(points, np.zeros(16)) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("way", "direction"),
    [((-0.2, 0.1), "left"), ((0.2, 0.1), "right"), ((0.1, -0.2), "up"), ((0.1, 0.2), "down"), ((0.01, 0.02), None)],
)
def test_direction_is_the_nearest_of_four(way: tuple[float, float], direction: str | None) -> None:
    assert direction_of(*way) == direction


# Its files and its training.


def test_the_files_are_small_and_described(tmp_path: Path, reader: Classifier, videos: list[NDArray[np.uint8]]) -> None:
    assert sum(path.stat().st_size for path in CLASSIFIER.glob("*.safetensors")) < 600_000
    card = (CLASSIFIER / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card and "through the miniature's VAE" in card
    reader.save(tmp_path)
    again = Classifier.load(tmp_path)
    assert again.read(videos[0]) == reader.read(videos[0]) and again.training == reader.training


def test_weights_of_another_world_are_refused(tmp_path: Path, reader: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    reader.save(tmp_path)
    monkeypatch.setattr(classifier_module, "COLOURS", {"mauve": (1, 2, 3)})
    with pytest.raises(ValueError, match="the world has mauve"):
        Classifier.load(tmp_path)


def command_of(function: Any) -> typer.Typer:
    command = typer.Typer()
    command.command()(function)
    return command


def test_same_seed_same_weights_and_a_card(tmp_path: Path) -> None:
    first, second = (train_classifier.train(1, seed=3, sceneries=2).network.state_dict() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    result = CliRunner().invoke(command_of(train_classifier.main), ["--out", str(tmp_path), "--steps", "1", "--videos", "2"])
    assert result.exit_code == 0, result.output
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| degraded | 2 |" in card and "--steps 1 --seed 0" in card


def test_batches_show_what_they_say() -> None:
    batch = Studio(4, seed=1).batch(120)
    assert batch.pixels.shape == (120, HEIGHT, WIDTH, 3) and batch.pixels.dtype == np.uint8
    covered = batch.masks.mean(axis=(1, 2))
    assert covered[batch.form >= 0].min() > 0.005
    empty = covered == 0
    assert 0 < empty.sum() < 30 and (batch.colour[empty] == -1).all() and (batch.form[empty] == -1).all()
    assert set(batch.colour[batch.colour >= 0]) == set(range(len(COLOURS))) and set(batch.form) == set(range(-1, len(FORMS)))


def test_degradation_spoils_only_when_told_to(videos: list[NDArray[np.uint8]]) -> None:
    rng = np.random.default_rng(0)
    frame = videos[0][0]
    assert np.abs(degrade(frame, Degradation(), rng).astype(int) - frame).max() <= 1
    for how in (
        Degradation(shrink=4.0),
        Degradation(blur=1.5),
        Degradation(block=8),
        Degradation(quality=15),
        Degradation(stain=12.0),
    ):
        spoilt = degrade(frame, how, rng)
        assert spoilt.shape == frame.shape and spoilt.dtype == np.uint8
        assert np.abs(spoilt.astype(int) - frame).mean() > 0.5, how
    assert draw_degradation(np.random.default_rng(5)) == draw_degradation(np.random.default_rng(5))


# Prompts.


def test_a_prompt_is_parsed_by_its_words() -> None:
    asked = parse("A red Circle moving left, in front of a striped background")
    assert (asked.colour, asked.form, asked.direction, asked.held_out) == ("red", "circle", "left", False)
    assert parse("an orange cross in front of a cloudy background").direction is None
    assert parse("a red star moving up in front of a shaded background").held_out


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a circle moving left", "no colour"),
        ("a red thing", "no form"),
        ("a red circle and a blue circle", "blue and red"),
        ("a red circle moving left and right", "left and right"),
    ],
)
def test_a_prompt_that_cannot_be_scored_is_named(prompt: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        parse(prompt)
    assert prompt in str(caught.value)


def test_prompts_are_balanced_and_parsed_again() -> None:
    prompts = write_prompts(164, 28, seed=0)
    asked = [parse(prompt) for prompt in prompts]
    assert [a.held_out for a in asked] == [False] * 164 + [True] * 28
    pairs = Counter((a.colour, a.form, a.direction) for a in asked)
    assert pairs == Counter({(c, f, way): 1 for c, f in {*SEEN, *HELD_OUT} for way in DIRECTIONS})
    fewer = Counter(parse(prompt).direction for prompt in write_prompts(41, 0, seed=0))
    assert max(fewer.values()) - min(fewer.values()) <= 1
    assert write_prompts(20, 5, seed=1) == write_prompts(20, 5, seed=1) != write_prompts(20, 5, seed=2)
    with pytest.raises(ValueError, match="at least one"):
        write_prompts(0, 0, seed=0)


def test_prompts_are_written_one_a_line(tmp_path: Path) -> None:
    file = tmp_path / "new" / "prompts.txt"
    result = CliRunner().invoke(
        command_of(write_prompts_file), ["--out", str(file), "--seen", "3", "--held-out", "2", "--seed", "7"]
    )
    assert result.exit_code == 0, result.output
    assert file.read_text(encoding="utf-8").splitlines() == write_prompts(3, 2, seed=7)
    result = CliRunner().invoke(command_of(write_prompts_file), ["--out", str(file), "--seen", "0", "--held-out", "0"])
    assert result.exit_code == 2 and "at least one" in result.output


# Scores.


def test_wilson_intervals() -> None:
    assert Rate(8, 10).interval == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert Rate(10, 10).interval == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert Rate(0, 10).interval == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert (Rate(0, 0).share, Rate(0, 0).interval, str(Rate(0, 0))) == (None, (0.0, 1.0), "–")


def test_wrong_videos_are_counted_as_wrong(reader: Classifier, shots: list[Shot], videos: list[NDArray[np.uint8]]) -> None:
    shot, frames = shots[0], videos[0]
    assert (shot.colour, shot.form) == ("red", "circle")
    # Prompts, and what of each is shown.
    told = [
        (prompt_of(shot), {"colour": True, "form": True, "direction": True, TOGETHER: True}),
        ("a blue circle in front of a shaded background", {"colour": False, "form": True, TOGETHER: False}),
        (
            f"a red star moving {OPPOSITE[shot.direction]} in front of a shaded background",
            {"colour": True, "form": False, "direction": False, TOGETHER: False},
        ),
    ]
    scores = score([(prompt, frames) for prompt, _ in told], reader)
    assert [video.right for video in scores.videos] == [right for _, right in told]
    assert scores.rates()["direction"] == Rate(1, 2) and scores.rates()["colour"] == Rate(2, 3)
    assert scores.rates("held-out pairs")["colour"] == Rate(1, 1) and scores.rates("seen pairs")[TOGETHER] == Rate(1, 2)
    assert scores.chance()[TOGETHER] == pytest.approx((2 / 192 + 1 / 48) / 3) and scores.found == 3
    assert scores.confusion()["colour"] == {"red": {"red": 2}, "blue": {"red": 1}}


# The command.


@pytest.fixture
def samples(tmp_path: Path, shots: list[Shot], videos: list[NDArray[np.uint8]]) -> Path:
    folder = tmp_path / "samples"
    folder.mkdir()
    rows = []
    for number in (0, 9, 20, 31):
        frames = np.stack([cv2.resize(frame, (WIDTH, HEIGHT)) for frame in videos[number]])
        rows.append({"number": len(rows), "file": f"{len(rows):06}.mp4", "prompt": prompt_of(shots[number]), "seed": 1})
        write_video(folder / rows[-1]["file"], frames, 8.0)
    (folder / PROMPTS).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "140", "TERM": "dumb"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, " ".join(result.output.split())


def test_the_command_scores_a_folder(samples: Path, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "scores.json"
    code, printed = run(samples, "--json", file)
    assert code == 0, printed
    assert "seen pairs" in printed and "held-out pairs" in printed and "by chance 12.5 % 16.7 % 25.0 % 0.5 %" in printed
    written = json.loads(file.read_text(encoding="utf-8"))
    assert written["summary"]["all"]["videos"] == len(written["videos"]) == 4
    assert written["summary"]["all"]["colour"]["right"] == written["found"] == 4
    assert {"file", "prompt", "held_out", "asked", "read", "right"} <= set(written["videos"][0])
    assert written["videos"][0]["read"]["speed"] > 0.03
    assert written["summary"]["all"]["all_asked"] == score_folder(samples).rates()[TOGETHER].as_dict()


def test_the_command_scores_a_dataset(tmp_path: Path, shots: list[Shot], videos: list[NDArray[np.uint8]]) -> None:
    write_video(tmp_path / "clip.mp4", videos[0], 8.0)
    video = (tmp_path / "clip.mp4").read_bytes()
    dataset = write_dataset(tmp_path / "out", sources=1, per_shard=4, video=video, seconds=1.96).uri
    ids = [row["clip_id"] for row in kept(dataset)]
    table = pa.table({"clip_id": ids[1:], "caption": [prompt_of(shots[0])] * (len(ids) - 1)})
    add_captions(dataset, "motion", table)
    file = tmp_path / "scores.json"
    code, printed = run(dataset, "--captions", "motion.caption", "--json", file)
    assert code == 0, printed
    summary = json.loads(file.read_text(encoding="utf-8"))["summary"]["all"]
    assert (summary["videos"], summary["all_asked"]["right"]) == (len(ids) - 1, len(ids) - 1)
    for captions, said in (("other.caption", "no captions other.caption"), ("motion.text", "no column text")):
        code, printed = run(dataset, "--captions", captions)
        assert code == 2 and said in printed


def test_help_teaches() -> None:
    code, printed = run("--help")
    assert code == 0 and "prompts.jsonl" in printed and "model.evaluate sample" in printed


def test_what_cannot_be_scored_ends_in_one_line(samples: Path, tmp_path: Path) -> None:
    code, printed = run(tmp_path / "nowhere")
    assert code == 2 and "nowhere is no folder" in printed
    code, printed = run(tmp_path)
    assert code == 2 and f"has no {PROMPTS}" in printed
    code, printed = run(samples, "--classifier", tmp_path / "nothing")
    assert code == 2 and "nothing" in printed
    (samples / "000002.mp4").write_bytes(b"no video")
    code, printed = run(samples)
    assert code == 2 and "000002.mp4 holds no video" in printed
    (samples / "000002.mp4").unlink()
    code, printed = run(samples)
    assert code == 2 and "1 of 4 videos" in printed and "000002.mp4" in printed
    (samples / PROMPTS).write_text('{"file": "000000.mp4", "prompt": "a nice day"}\n', encoding="utf-8")
    code, printed = run(samples)
    assert code == 2 and "a nice day" in printed and "no colour" in printed
    (samples / PROMPTS).write_text("{}\n", encoding="utf-8")
    code, printed = run(samples)
    assert code == 2 and "does not hold file and prompt" in printed
