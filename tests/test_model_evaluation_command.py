"""The command end to end: scores with their protocol, comparisons and their refusal, mistakes without traceback."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from videofactory.model import evaluate
from videofactory.model.evaluation import results

from .evaluation_clips import FRAMES, HEIGHT, WIDTH, clip, clips, write_clip, write_folder
from .test_model_evaluation_extractors import clip_folder, scripts  # noqa: F401 - fixtures

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = ["--frames", FRAMES, "--height", HEIGHT, "--width", WIDTH, "--resamples", 20, "--device", "cpu"]


def run(*arguments: object) -> tuple[int, str]:
    """Exit code and everything printed, as one line."""
    result = CliRunner().invoke(evaluate.app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, re.sub(r"\s+", " ", result.output)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Clips with prompts, and others to compare them with."""
    folder = tmp_path_factory.mktemp("folders")
    mine = write_folder(folder / "mine", clips(12), [f"a disc {number}" for number in range(12)])
    return mine, write_folder(folder / "real", clips(16, begin=100))


def scored(out: Path, *arguments: object) -> dict:
    code, printed = run(*FAST, *arguments, "--out", out)
    assert code == 0, printed
    return json.loads(out.read_text())


class TestScore:
    def test_a_result_holds_the_scores_and_the_whole_protocol(self, folders, tmp_path):
        mine, real = folders
        out = tmp_path / "new/result.json"
        code, printed = run("--data", mine, "--data", real, *FAST, "--out", out, "--seed", 3)
        assert code == 0, printed
        found = json.loads(out.read_text())
        assert list(found["metrics"]) == ["fvd", "fid", "kid", "consistency", "motion", "displacement"]
        for name, one in found["metrics"].items():
            assert one["interval"]["low"] <= one["value"] <= one["interval"]["high"], name
            assert one["interval"]["resamples"] == 20 and one["videos"] == 12 and one["seconds"] >= 0
            assert f"{name} " in printed
        assert found["metrics"]["fvd"]["reference_videos"] == 16 and found["metrics"]["fvd"]["floor"]["videos"] == 8
        assert found["metrics"]["motion"]["reference"] > 0
        sampling = {"frames": FRAMES, "stride": 1, "fps": None, "height": HEIGHT, "width": WIDTH}
        assert found["protocol"]["sampling"] == {**sampling, "crop": "centre", "window": "centre", "seed": 3}
        assert (found["protocol"]["videos"], found["protocol"]["reference_videos"]) == (12, 16)
        assert found["protocol"]["form"] == found["protocol"]["reference_form"] == "encoded"
        assert len(found["protocol"]["extractors"]["video"]["hash"]) == 64
        assert {"scored", "reference", "fvd"} <= set(found["seconds"]) and "torch" in found["versions"]
        assert any("12 videos of the scored set for 32 features" in warning for warning in found["warnings"])
        assert "compare among themselves only" in printed and "left out clipsim" in printed

    def test_the_same_again_is_the_same_whatever_the_batches(self, folders, tmp_path):
        one = scored(tmp_path / "a.json", *folders, "--batch", 5, "--threads", 1)
        again = scored(tmp_path / "b.json", *folders, "--batch", 8)
        assert one["protocol"] == again["protocol"]
        for name, score in one["metrics"].items():
            assert score["value"] == pytest.approx(again["metrics"][name]["value"], rel=1e-3, abs=1e-7), name

    def test_alone(self, folders, tmp_path):
        found = scored(tmp_path / "a.json", folders[0])
        assert list(found["metrics"]) == ["consistency", "motion", "displacement"] and "reference" not in found
        assert found["metrics"]["motion"]["reference"] is None

    def test_with_files_and_a_clip(self, folders, scripts, clip_folder, tmp_path):  # noqa: F811
        extractors = ["--video-extractor", "torchscript", "--video-weights", scripts / "i3d.pt"]
        extractors += ["--image-extractor", "torchscript", "--image-weights", scripts / "inception.pt"]
        extractors += ["--text-extractor", "clip", "--text-weights", clip_folder]
        found = scored(tmp_path / "a.json", *folders, *extractors)
        assert list(found["metrics"]) == list(evaluate_metrics())
        assert -1 <= found["metrics"]["clipsim"]["value"] <= 1 and found["metrics"]["clipsim"]["reference"] is None
        assert found["metrics"]["fvd"]["dimension"] == 9 and found["metrics"]["fid"]["dimension"] == 3
        assert not any("random" in warning for warning in found["warnings"])
        assert len(found["protocol"]["prompts_hash"]) == 64

    def test_too_few_frames_for_the_net(self, folders, scripts, tmp_path):  # noqa: F811
        arguments = ["--video-extractor", "torchscript", "--video-weights", scripts / "i3d.pt", "--out", tmp_path / "a.json"]
        code, printed = run(*folders, *FAST, *arguments, "--frames", 8)
        assert code == 2 and "cannot take 8x8x3x48x64 pixels (I3D, for example, needs 10 frames)" in printed

    def test_an_archive_against_files(self, folders, tmp_path):
        np.savez(tmp_path / "a.npz", videos=clips(12))
        found = scored(tmp_path / "a.json", tmp_path / "a.npz", folders[0])
        assert found["protocol"]["form"] == "frames"
        assert found["metrics"]["fvd"]["value"] < 0.1 * scored(tmp_path / "b.json", *folders)["metrics"]["fvd"]["value"]

    def test_a_dry_run_decodes_nothing(self, tmp_path):
        (tmp_path / "a.mp4").write_text("no video at all")
        code, printed = run(tmp_path, "--dry-run", "--out", tmp_path / "a.json", "--device", "cpu")
        assert code == 0 and "(folder, 1 videos)" in printed and "nothing was done" in printed
        assert not (tmp_path / "a.json").exists()

    def test_what_was_left_out_is_in_the_result(self, folders, tmp_path):
        import shutil

        mine = shutil.copytree(folders[0], tmp_path / "mine")
        (mine / "x.mp4").write_text("no")
        write_clip(mine / "y.mp4", clip(1)[:5], fps=20)
        found = scored(tmp_path / "a.json", mine, folders[1])
        assert (found["scored"]["short"], list(found["scored"]["damaged"])) == (1, ["x.mp4"])
        assert any("1 damaged videos of the scored set" in warning and "x.mp4" in warning for warning in found["warnings"])

    def test_rates_that_differ_are_said(self, folders, tmp_path):
        other = write_folder(tmp_path / "fast", clips(3), fps=25)
        found = scored(tmp_path / "a.json", other, folders[1])
        assert any("25 frames per second and the reference 10" in warning for warning in found["warnings"])

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["{mine}", "--metric", "fvdd"], "--metric fvdd is not known; is fvd meant?"),
            (["{mine}", "--metric", "fvd"], "fvd cannot be computed: a distance needs a second set"),
            (["{mine}", "--metric", "clipsim"], "clipsim cannot be computed: CLIP is needed"),
            (["{real}", "--metric", "clipsim", "--text-extractor", "clip"], "every video needs a text"),
            (["nowhere"], "nowhere is not there"),
            (["{mine}", "{real}", "{real}"], "3 were given to score"),
            (["--frames", "4"], "nothing was given to score"),
            (["{mine}", "--split", "val"], "is no dataset, so --split"),
            (
                ["{mine}", "--frames", "400"],
                "has 0 videos to score, at least 2 are needed; of 12, 12 are too short for 400 frames",
            ),
            (["{mine}", "--out", "{mine}"], "is a folder; name a file"),
            (["{mine}", "--device", "cuda:99"], "--device cuda:99 is not there"),
            (["{mine}", "--image-extractor", "inception"], "--image-extractor inception is not known"),
            (["{mine}", "--fps", "8", "--stride", "2"], "exclude each other"),
        ],
    )
    def test_mistakes(self, folders, tmp_path, arguments, words):
        mine, real = folders
        given = [argument.format(mine=mine, real=real) for argument in arguments]
        extra = [] if "--out" in given else ["--out", str(tmp_path / "a.json")]
        code, printed = run(*given, *extra, *([] if "--device" in given else ["--device", "cpu"]))
        assert code == 2 and words in printed, printed
        assert "Traceback" not in printed and not (tmp_path / "a.json").exists()


def evaluate_metrics() -> list[str]:
    from videofactory.model.evaluation.metrics import METRICS

    return list(METRICS)


@pytest.fixture(scope="module")
def made(folders, tmp_path_factory) -> Path:
    """Results: two of one protocol, one sampled otherwise, one against another reference."""
    folder = tmp_path_factory.mktemp("results")
    scored(folder / "a.json", *folders)
    scored(folder / "b.json", folders[0], folders[1], "--metric", "fvd")
    scored(folder / "fps.json", *folders, "--fps", 8, "--count", 8, "--frames", 8)
    scored(folder / "other.json", folders[1], folders[0])
    return folder


class TestCompare:
    def test_of_one_protocol(self, made):
        code, printed = run("compare", made / "a.json", made / "b.json")
        assert code == 0 and "fvd lower" in printed and "motion – " in printed
        value = json.loads((made / "a.json").read_text())["metrics"]["fvd"]["value"]
        assert printed.count(results.number(value)) >= 2

    def test_of_different_protocols_is_refused_with_what_differs(self, made):
        code, printed = run("compare", made / "a.json", made / "fps.json")
        assert code == 2 and "different protocols and cannot be compared" in printed
        for words in ("frames: 12 in", "fps: None in", "8.0 in", "videos: 12 in", "reference_hash: "):
            assert words in printed
        code, printed = run("compare", made / "a.json", made / "other.json")
        assert code == 2 and "reference_hash" in printed and "seed" not in printed

    def test_what_is_no_result(self, made, tmp_path):
        (tmp_path / "x.json").write_text('{"format": "something"}')
        (tmp_path / "y.json").write_text("{")
        for file, words in (("x", "its format is 'something'"), ("y", "is no result"), ("z", "No such file")):
            code, printed = run("compare", made / "a.json", tmp_path / f"{file}.json")
            assert code == 2 and words in printed
        code, printed = run("compare", made / "a.json")
        assert code == 2 and "nothing to be compared with" in printed
        broken = json.loads((made / "a.json").read_text())
        del broken["protocol"]["sampling"]
        (tmp_path / "x.json").write_text(json.dumps(broken))
        assert "is no whole result" in run("compare", made / "a.json", tmp_path / "x.json")[1]


def test_importing_is_light():
    import subprocess
    import sys

    code = "import sys, videofactory.model.evaluate; sys.exit('torch' in sys.modules or 'av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_lack_of_memory_is_said(folders, tmp_path, monkeypatch):
    from videofactory.model.evaluation import scoring

    def fails(*_arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(scoring, "extract", fails)
    code, printed = run(*folders, *FAST, "--out", tmp_path / "a.json")
    assert code == 1 and "the memory did not suffice while scoring" in printed and "--batch" in printed
