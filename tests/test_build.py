"""Builds in a plain loop: what ends up in the dataset, resuming, changed rules, errors, and refusals before any work."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from videofactory.curation import ingest
from videofactory.curation.rules import RuleError
from videofactory.curation.sources import find_sources
from videofactory.pipelines import build as building
from videofactory.pipelines.recipe import Recipe, RecipeError, load_recipe
from videofactory.shards.index import Index
from videofactory.shards.verify import verify

from .videos import make_folder, make_video

PLAIN = {
    "rules": {"moving": "motion >= 0.01", "long": "duration >= 1.0"},
    "execution": {"shard_bytes": 1 << 16, "describe_batch": 2},
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("videos"), 4)


@pytest.fixture
def analysed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were decoded, in order."""
    names: list[str] = []
    real = ingest.analyse_guarded

    def counting(path: Path, *arguments: Any, **options: Any) -> Any:
        names.append(Path(path).name)
        return real(path, *arguments, **options)

    monkeypatch.setattr(ingest, "analyse_guarded", counting)
    return names


def recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate({**PLAIN, **changes})


def run(videos: Path | Sequence[Path], out: Path, chosen: Recipe | None = None, **options: Any) -> Index:
    named = [videos] if isinstance(videos, Path) else videos
    return building.build(chosen or recipe(), find_sources(map(str, named)), str(out), plainly=True, **options)


def states(index: Index) -> dict[str, int]:
    rows = index.query(
        "select coalesce(rejected_by, error_class, state) as what, count(*) as n from clips group by 1"
    ).to_pylist()
    return {row["what"]: row["n"] for row in rows}


def test_build_verifies_and_accounts_for_everything(videos: Path, tmp_path: Path) -> None:
    index = run(videos, tmp_path / "out")
    assert states(index) == {"kept": 10, "moving": 2}
    sources = index.query("select status, error_class, count(*) as n from sources group by all order by 1").to_pylist()
    assert sources == [
        {"status": "done", "error_class": None, "n": 4},
        {"status": "failed", "error_class": "not_a_video", "n": 1},
    ]
    report = verify(str(tmp_path / "out"))
    assert report.broken == [] and report.notes == [] and report.checked["shards"] >= 2
    for name in ("shards.json", "README.md", "report.html", "recipe.yaml"):
        assert (tmp_path / "out" / name).stat().st_size > 0


def test_a_second_run_does_nothing(videos: Path, tmp_path: Path, analysed: list[str]) -> None:
    run(videos, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/shards").iterdir()}
    assert len(analysed) == 5
    run(videos, tmp_path / "out")
    assert len(analysed) == 5
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out/shards").iterdir()} == before


def test_two_builds_are_equal(videos: Path, tmp_path: Path) -> None:
    query = "select clip_id, state, sha256, motion, rejected_by from clips order by clip_id"
    first, second = (run(videos, tmp_path / name).query(query).to_pylist() for name in ("a", "b"))
    assert first == second


def test_files_are_divided_alike_wherever_they_lie(videos: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(videos, moved)
    for file in sorted(moved.glob("video-*.mp4")):
        shutil.copy(file, file.with_name(f"copy-{file.name}"))
    chosen = recipe(split={"val": 0.3, "test": 0.3})
    query = "select parse_filename(s.uri) as name, any_value(c.split) as split from clips c join sources s using (source_id) group by all"
    first, second = (
        {row["name"]: row["split"] for row in run(folder, tmp_path / out, chosen).query(query).to_pylist()}
        for folder, out in ((videos, "a"), (moved, "b"))
    )
    assert len(first) == 4 and len(second) == 8 and len(set(first.values())) > 1
    assert second == first | {f"copy-{name}": split for name, split in first.items()}


def test_added_sources_are_built_alone(videos: Path, tmp_path: Path, analysed: list[str]) -> None:
    files = sorted(videos.glob("video-*.mp4"))
    run(files[:2], tmp_path / "out")
    index = run(videos, tmp_path / "out")
    assert sorted(analysed) == sorted(path.name for path in videos.iterdir())
    assert states(index) == {"kept": 10, "moving": 2}


def test_changed_rules_judge_stored_rows_and_decode_nothing(videos: Path, tmp_path: Path, analysed: list[str]) -> None:
    out = tmp_path / "out"
    run(videos, out)
    analysed.clear()
    strict = run(videos, out, recipe(rules={"moving": "motion >= 0.01", "long": "duration >= 1.3"}))
    assert states(strict) == {"kept": 6, "moving": 2, "long": 4}
    assert verify(str(out)).ok
    loose = run(videos, out, recipe(rules={"long": "duration >= 1.0"}))
    assert states(loose) == {"kept": 12}
    assert verify(str(out)).ok
    assert analysed == []
    fresh = run(videos, tmp_path / "fresh", recipe(rules={"long": "duration >= 1.0"}))
    query = "select clip_id, sha256, state from clips order by 1"
    assert fresh.query(query).to_pylist() == loose.query(query).to_pylist()


def test_changed_content_is_refused_and_named(videos: Path, tmp_path: Path) -> None:
    run(videos, tmp_path / "out")
    with pytest.raises(RecipeError, match=r"clips\.crf: 18 in the dataset, 30 now"):
        run(videos, tmp_path / "out", recipe(clips={"crf": 30}))


def test_failed_source_is_tried_again_only_on_request(tmp_path: Path, analysed: list[str]) -> None:
    folder = tmp_path / "videos"
    make_video(folder / "good.mp4", 1)
    (folder / "bad.mp4").write_bytes(b"")
    run(folder, tmp_path / "out")
    make_video(folder / "bad.mp4", 2)
    run(folder, tmp_path / "out")
    assert sorted(analysed) == ["bad.mp4", "good.mp4"]
    index = run(folder, tmp_path / "out", retry=["not_a_video"])
    assert sorted(analysed) == ["bad.mp4", "bad.mp4", "good.mp4"]
    assert index.query("select status, attempt from sources order by attempt").to_pylist() == [
        {"status": "done", "attempt": 1},
        {"status": "done", "attempt": 2},
    ]
    assert verify(str(tmp_path / "out")).ok


def test_a_source_that_changed_since_its_analysis_is_not_cut(tmp_path: Path) -> None:
    video = make_video(tmp_path / "videos/a.mp4", 1)
    run(video, tmp_path / "out", recipe(rules={"none": "false"}))
    make_video(video, 2)
    index = run(video, tmp_path / "out", recipe(rules={}))
    assert states(index) == {"source_changed": 3}
    assert verify(str(tmp_path / "out")).ok


def test_source_that_kills_its_worker_each_time_becomes_an_error_row(tmp_path: Path, analysed: list[str]) -> None:
    video = make_video(tmp_path / "videos/a.mp4", 1)
    out = tmp_path / "out"
    rows = find_sources([str(video)])
    storage = building.Storage(str(out))
    with building.Lease(storage) as lease:
        plan = building.Plan(recipe(), storage, lease.run)
        building.prepare(plan, rows, ())
        for death in range(3):  # the marks that three dead workers leave behind
            storage.put(f"{ingest.ATTEMPTS}/{lease.run}-1-{rows[0]['source_id']}.{death}", b"")
        assert list(plan.ingest()(rows[0])) == []
    index = Index(storage)
    assert index.query("select status, error_class from sources").to_pylist() == [
        {"status": "failed", "error_class": "worker_died"}
    ]
    assert analysed == []


class Moody:
    """A captioner that fails while its mood is bad, and has an opinion of nothing else."""

    name = "moody"
    fails = True

    def caption(self, images: list[Any]) -> list[str]:
        if Moody.fails:
            raise RuntimeError("not now")
        return ["a picture" for _ in images]


MOODY = {"captioner": "tests.test_build:Moody"}


def test_failed_captions_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = make_video(tmp_path / "videos/a.mp4", 1)
    chosen = recipe(caption=MOODY, rules={"talks": "length(caption) > 0"})
    assert states(run(video, tmp_path / "out", chosen)) == {"caption_failed": 3}
    assert states(run(video, tmp_path / "out", chosen)) == {"caption_failed": 3}
    monkeypatch.setattr(Moody, "fails", False)
    assert states(run(video, tmp_path / "out", chosen, retry=["caption_failed"])) == {"kept": 3}
    assert verify(str(tmp_path / "out")).ok


def test_dropped_rules_of_every_step_end_where_a_fresh_build_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Moody, "fails", False)
    video = make_video(tmp_path / "videos/a.mp4", 1)
    talks = {"talks": "length(caption) > 0"}
    for number, rule in enumerate(("motion > 9", "has_audio", "length(caption) > 99")):
        out = tmp_path / f"out-{number}"
        assert states(run(video, out, recipe(caption=MOODY, rules={"strict": rule, **talks}))) == {"strict": 3}
        assert states(run(video, out, recipe(caption=MOODY, rules=talks))) == {"kept": 3}
        assert verify(str(out)).ok


def test_any_error_of_the_analysis_costs_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose timestamps jump by eleven days gives a clip that no id can name."""
    make_video(tmp_path / "videos/a.mp4", 1)
    jumping = make_video(tmp_path / "videos/b.mp4", 2)
    real = ingest.analyse_guarded

    def jump(path: Path, *arguments: Any, **options: Any) -> Any:
        found = real(path, *arguments, **options)
        if Path(path) == jumping:
            found.shots[-1] = replace(found.shots[-1], start=1e6, end=1e6 + 2)
        return found

    monkeypatch.setattr(ingest, "analyse_guarded", jump)
    index = run(tmp_path / "videos", tmp_path / "out")
    rows = index.query("select status, error_class, error from sources order by status").to_pylist()
    assert [(row["status"], row["error_class"]) for row in rows] == [("done", None), ("failed", "analysis_failed")]
    assert "does not fit an id" in rows[1]["error"]


def test_what_the_sources_table_says_travels_along(tmp_path: Path) -> None:
    make_video(tmp_path / "a.mp4", 1)
    (tmp_path / "list.csv").write_text("path,license,title,mood\na.mp4,CC0-1.0,A film,blue\n")
    index = run(tmp_path / "list.csv", tmp_path / "out")
    (row,) = index.sources().to_pylist()
    assert (row["license"], row["title"], row["extra"]) == ("CC0-1.0", "A film", '{"mood": "blue"}')
    assert "CC0-1.0" in (tmp_path / "out/README.md").read_text()


def test_content_may_change_until_the_first_source_is_analysed(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be imported"):
        run(videos, tmp_path / "out", recipe(caption={"captioner": "nope.nope:X"}))
    with pytest.raises(RecipeError, match="unexpected keyword argument 'modle'"):
        run(videos, tmp_path / "out", recipe(caption={"options": {"modle": "x"}}))
    assert states(run(videos, tmp_path / "out")) == {"kept": 10, "moving": 2}


class TestRefusedBeforeAnyWork:
    def test_retry_of_an_unknown_class(self, videos: Path, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="did you mean 'not_a_video'"):
            run(videos, tmp_path / "out", retry=["not_video"])
        self.refused(tmp_path / "out")

    def refused(self, out: Path) -> None:
        assert not (out / "index").exists()

    def test_unknown_column(self, videos: Path, tmp_path: Path) -> None:
        with pytest.raises(RuleError, match="did you mean 'motion'"):
            run(videos, tmp_path / "out", recipe(rules={"x": "motoin > 1"}))
        self.refused(tmp_path / "out")

    def test_weights_that_are_not_there(self, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(Exception, match="Three ways out"):
            run(videos, tmp_path / "out", load_recipe("hdvg"))
        self.refused(tmp_path / "out")

    def test_miniature_models_on_other_videos(self, videos: Path, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match=r"miniature.*--set caption=null.*--force"):
            run(videos, tmp_path / "out", load_recipe("sample"))
        self.refused(tmp_path / "out")
