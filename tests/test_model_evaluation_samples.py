"""Samples of a model: the same videos for any number of processes, continued where a run broke off; prompts from files."""

import hashlib
import json

import pytest

from videofactory.model.evaluation import samples
from videofactory.model.evaluation.inputs import open_videos
from videofactory.model.evaluation.prompts import read_prompts

from .test_model_evaluation_command import run

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = ["--model", "miniature", "--steps", 1, "--frames", 3, "--height", 24, "--width", 40, "--device", "cpu"]


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n\n a blue star \nein Übungs-Stern\n")
    return file


def sample(prompts, out, *arguments, count=5):
    code, printed = run("sample", *FAST, "--prompts", prompts, "--count", count, "--out", out, *arguments)
    assert code == 0, printed
    return printed


def hashes(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.mp4"))}


class TestSample:
    def test_numbered_videos_with_their_prompts(self, prompts, tmp_path):
        out = tmp_path / "new/out"
        assert "5 videos made" in sample(prompts, out)
        assert sorted(file.name for file in out.iterdir()) == [
            *(f"{number:06}.mp4" for number in range(5)),
            "prompts.jsonl",
            "samples.json",
        ]
        rows = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
        assert [row["prompt"] for row in rows] == [
            "a red circle",
            "a blue star",
            "ein Übungs-Stern",
            "a red circle",
            "a blue star",
        ]
        assert rows[2]["seed"] == samples.seed_of(0, 2) and len({row["seed"] for row in rows}) == 5
        videos = open_videos(str(out))
        assert videos.has_prompts and len(videos.videos) == 5

    def test_any_number_of_processes_makes_the_same_videos(self, prompts, tmp_path, monkeypatch):
        sample(prompts, tmp_path / "one", "--batch", 2)
        for rank in ("1", "2", "0"):
            monkeypatch.setenv("WORLD_SIZE", "3")
            monkeypatch.setenv("RANK", rank)
            sample(prompts, tmp_path / "three", "--batch", 2)
        assert len(hashes(tmp_path / "one")) == 5 and hashes(tmp_path / "one") == hashes(tmp_path / "three")

    def test_a_run_goes_on_where_it_broke_off(self, prompts, tmp_path):
        sample(prompts, tmp_path / "out", "--batch", 2)
        whole = hashes(tmp_path / "out")
        (tmp_path / "out/000001.mp4").unlink()
        cut = tmp_path / "out/000004.mp4"
        cut.write_bytes(cut.read_bytes()[:40])
        kept = (tmp_path / "out/000000.mp4").stat().st_mtime_ns
        assert "2 videos made" in (printed := sample(prompts, tmp_path / "out", "--batch", 2)) and "and 3 kept" in printed
        assert hashes(tmp_path / "out") == whole and (tmp_path / "out/000000.mp4").stat().st_mtime_ns == kept
        assert "0 videos made" in sample(prompts, tmp_path / "out", "--batch", 2)

    def test_a_folder_grows_to_what_a_larger_one_holds(self, prompts, tmp_path):
        """Batches of two of three and then four videos: the third is made beside the fourth both times."""
        sample(prompts, tmp_path / "a", "--batch", 2, count=3)
        sample(prompts, tmp_path / "a", "--batch", 2, count=4)
        sample(prompts, tmp_path / "b", "--batch", 2, count=4)
        assert len(hashes(tmp_path / "b")) == 4 and hashes(tmp_path / "a") == hashes(tmp_path / "b")
        code, printed = run("sample", *FAST, "--prompts", prompts, "--batch", 2, "--count", 2, "--out", tmp_path / "a")
        assert code == 2 and "count was 4 and is 2" in printed

    def test_another_seed_has_other_videos(self, prompts, tmp_path):
        sample(prompts, tmp_path / "a", count=2)
        sample(prompts, tmp_path / "b", "--seed", 1, count=2)
        assert not set(hashes(tmp_path / "a").values()) & set(hashes(tmp_path / "b").values())

    def test_a_folder_of_another_plan_is_refused(self, prompts, tmp_path):
        sample(prompts, tmp_path / "out", count=1)
        arguments = ["sample", *FAST, "--prompts", prompts, "--out", tmp_path / "out"]
        code, printed = run(*arguments, "--count", 1, "--seed", 5)
        assert code == 2 and "videos of another plan: seed was 0 and is 5" in printed
        prompts.write_text("something else")
        code, printed = run(*arguments, "--count", 1)
        assert code == 2 and "prompts_hash was" in printed
        (tmp_path / "out/samples.json").unlink()
        code, printed = run(*arguments, "--count", 1)
        assert code == 2 and "were not made so" in printed

    def test_other_weights_in_the_folder_of_the_model_are_another_plan(self, tmp_path):
        weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
        weights.parent.mkdir()
        found = set()
        for content in (b"first", b"second"):
            weights.write_bytes(content)
            found.add(samples.weights_hash(str(tmp_path)))
        assert len(found) == 2 and samples.weights_hash("miniature") == ""

    def test_a_dry_run_makes_nothing(self, prompts, tmp_path):
        printed = sample(prompts, tmp_path / "out", "--dry-run")
        assert "process 0 of 1, 5 videos" in printed and "nothing was done" in printed and not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--prompts", "nowhere.txt"], "No such file"),
            (["--model", "nowhere/at/all"], "nowhere/at/all"),
            (["--height", "13"], "height"),
            (["--fps", "0"], "fps is 0"),
            (["--dtype", "fp8"], "--dtype is 'fp8'"),
            (["--column", "name"], "leave out --column"),
        ],
    )
    def test_mistakes(self, prompts, tmp_path, arguments, words):
        code, printed = run("sample", *FAST, "--prompts", prompts, "--count", 1, "--out", tmp_path / "out", *arguments)
        assert code == 2 and words in printed and "Traceback" not in printed

    def test_a_wrong_environment_is_said(self, prompts, tmp_path, monkeypatch):
        monkeypatch.setenv("RANK", "4")
        code, printed = run("sample", *FAST, "--prompts", prompts, "--count", 1, "--out", tmp_path / "out")
        assert code == 2 and "RANK is 4 and WORLD_SIZE 1" in printed


@pytest.mark.parametrize("processes", [1, 3, 8])
def test_groups_share_the_work(processes):
    plan = samples.Plan("m", 23, 0, 4, 1, 1.0, None, None, None, 8.0, None, "fp32", "")
    parts = [samples.groups(["a"], plan, samples.Place(rank, processes)) for rank in range(processes)]
    found = sorted([sample.number for sample in group] for part in parts for group in part)
    assert found == [list(range(begin, begin + 4)) for begin in range(0, 24, 4)]
    assert sum(len(samples.wanted_of(group, plan)) for part in parts for group in part) == 23


def test_seeds_of_runs_do_not_overlap():
    """As they would if a video's seed were the run's plus its number."""
    seeds = [{samples.seed_of(seed, number) for number in range(500)} for seed in range(4)]
    assert len(set.union(*seeds)) == 2000 and all(0 <= value < 2**63 for value in seeds[0])


class TestPrompts:
    @pytest.mark.parametrize(
        ("name", "text", "column"),
        [
            ("a.txt", "ApplyEyeMakeup\nArchery\n", None),
            ("a.csv", "videoid,name\n1,ApplyEyeMakeup\n2,Archery\n", None),
            ("a.csv", '\ufeffclass,id\nApplyEyeMakeup,1\nArchery,"2\n3"\n', "class"),
            ("a.tsv", "id\tcaption\n1\tApplyEyeMakeup\n2\tArchery\n", None),
            ("a.jsonl", '{"caption": "ApplyEyeMakeup"}\n\n{"caption": "Archery"}\n', None),
            ("a.jsonl", '"ApplyEyeMakeup"\n"Archery"\n', None),
            ("a.jsonl", '{"x": "ApplyEyeMakeup"}\n{"x": "Archery"}\n', "x"),
        ],
    )
    def test_forms(self, tmp_path, name, text, column):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert read_prompts(tmp_path / name, column) == ["ApplyEyeMakeup", "Archery"]

    @pytest.mark.parametrize(
        ("name", "content", "column", "words"),
        [
            ("a.txt", b"\n \n", None, "holds no prompt"),
            ("a.txt", b"\xff\xfe\x00", None, "is not UTF-8 text"),
            ("a.csv", b"id,captoin\n1,a\n", "caption", r"no column caption, it has id, captoin; is captoin meant\?"),
            ("a.csv", b"id,words\n1,a\n", None, "no column prompt or caption .* it has id, words; name one with --column"),
            ("a.jsonl", b'{"caption": 3}\n', None, "holds no text in line 1"),
            ("a.jsonl", b'{"caption": "a"}\nno\n', None, "is no JSON in line 2"),
        ],
    )
    def test_mistakes(self, tmp_path, name, content, column, words):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=words):
            read_prompts(tmp_path / name, column)
