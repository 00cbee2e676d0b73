"""The command line, as a user meets it: exit codes, messages, no traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from videofactory.shards.verify import verify

from .test_build import run
from .videos import make_video


def videofactory(*arguments: str, code: int = 0) -> str:
    """Run the command and return what it prints; its exit code must be `code`, and there must be no traceback."""
    command = [sys.executable, "-m", "videofactory.pipelines.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    printed = done.stdout + done.stderr
    assert "Traceback" not in printed, printed[-3000:]
    assert done.returncode == code, printed[-3000:]
    return printed


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_video(tmp_path_factory.mktemp("cli") / "a.mp4", 1, still=[1])


@pytest.fixture(scope="module")
def dataset(video: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "out"
    run(video, out)
    return out


@pytest.mark.parametrize("command", ["build", "analyse", "verify", "stats", "report", "doctor"])
def test_help_teaches(command: str) -> None:
    assert "Usage" in videofactory(command, "--help")


def test_analyse_prints_an_array_of_clip_rows(video: Path) -> None:
    rows = json.loads(videofactory("analyse", str(video), "--json"))
    assert [row["rejected_by"] for row in rows] == ["resolution"] * 3
    assert {"clip_id", "start", "end", "motion", "sharpness", "letterbox"} <= set(rows[0])
    table = videofactory("analyze", str(video))
    assert table.count("resolution") == 3 and "3 shots" in table


def test_verify_and_stats(dataset: Path, tmp_path: Path) -> None:
    assert "ok" in videofactory("verify", str(dataset))
    printed = videofactory("stats", str(dataset))
    assert "rejected moving" in printed and "kept" in printed
    broken = tmp_path / "broken"
    shutil.copytree(dataset, broken)
    next((broken / "shards").iterdir()).unlink()
    printed = videofactory("verify", "--fast", str(broken), code=1)
    assert "broken" in printed and "missing or of another size" in printed


def test_report_is_derived_again(dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    before = {name: (copy / name).read_bytes() for name in ("README.md", "report.html", "shards.json")}
    for name in before:
        (copy / name).unlink()
    videofactory("report", str(copy))
    assert {name: (copy / name).read_bytes() for name in before} == before


def test_dry_run_does_nothing(video: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = videofactory("build", "-s", str(video), "-o", str(out), "--set", "caption=null", "--set", "embed=null", "--dry-run")
    assert "1 new" in printed and "rule resolution" in printed
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build"], "no sources"),
        (["build", "-s", "{video}"], "no output"),
        (["build", "-s", "nowhere.mp4", "-o", "{out}"], "'nowhere.mp4' does not exist"),
        (["build", "-s", "{video}", "-o", "{out}", "-r", "hdgv"], "did you mean 'hdvg'"),
        (
            ["build", "-s", "{video}", "-o", "{out}", "--set", "caption=null", "--set", "rules.x=motoin > 1"],
            "did you mean 'motion'",
        ),
        (["build", "-s", "{video}", "-o", "{out}", "-r", "sample"], "miniature"),
        (["verify", "{out}"], "no dataset"),
        (["verify", "foo://bar"], "cannot open 'foo://bar'"),
        (["stats", "foo://bar"], "cannot open 'foo://bar'"),
        (
            ["build", "-s", "{video}", "-o", "foo://bar", "--set", "caption=null", "--set", "embed=null"],
            "cannot open 'foo://bar'",
        ),
        (["stats", "{out}"], "no dataset"),
        (["report", "{out}"], "no dataset"),
    ],
)
def test_mistakes_are_told_before_any_work(arguments: list[str], message: str, video: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = videofactory(*(argument.format(video=video, out=out) for argument in arguments), code=2)
    assert message in " ".join(printed.split())
    assert not (out / "index").exists()


def test_analyse_of_a_file_that_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "text.mp4"
    path.write_text("no video")
    assert "not_a_video" in videofactory("analyse", str(path), code=3)


@pytest.mark.ray
def test_every_source_failed(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    arguments = ["-s", str(tmp_path), "-o", str(tmp_path / "out"), "--set", "caption=null", "--set", "embed=null"]
    printed = videofactory("build", *arguments, code=3)
    assert "every source failed" in printed and "not_a_video" in printed


@pytest.mark.ray
def test_output_that_cannot_be_written(video: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    arguments = ["-s", str(video), "-o", str(tmp_path / "file" / "out"), "--set", "caption=null", "--set", "embed=null"]
    assert "cannot be written" in videofactory("build", *arguments, code=1)


def test_a_full_disk_stops_and_the_index_stays_true(video: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    out.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(out)], capture_output=True, timeout=30, check=False
    )
    if mounted.returncode:
        pytest.skip("this needs the right to mount a small file system")
    try:
        with pytest.raises(OSError, match="No space left"):
            run(video, out)
        subprocess.run(["mount", "-o", "remount,size=64m", str(out)], check=True, timeout=30)
        index = run(video, out)
        assert index.query("select count(*) as n from clips where state = 'kept'").to_pylist() == [{"n": 2}]
        assert verify(str(out)).broken == []
    finally:
        subprocess.run(["umount", str(out)], check=True, timeout=30)
