"""The same builds on Ray: equal to the plain loop, and unharmed by the death of any process at any moment."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from videofactory.curation.ingest import Ingest
from videofactory.curation.sources import find_sources
from videofactory.pipelines import build as building
from videofactory.pipelines.graph import GraphError, Resources, check_fits, cluster, resources, run_graph
from videofactory.pipelines.plan import Plan
from videofactory.pipelines.recipe import Recipe
from videofactory.shards.index import Index
from videofactory.shards.lease import Lease
from videofactory.shards.storage import Storage
from videofactory.shards.verify import verify

from .test_build import recipe, run
from .videos import make_folder

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

KILLS = 10
SOURCES = 24
CONTENT = "select clip_id, state, rejected_by, sha256, caption from clips order by clip_id"


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("videos"), SOURCES)


@pytest.fixture(scope="module")
def expected(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What an undisturbed build in a plain loop holds."""
    return run(videos, tmp_path_factory.mktemp("plain") / "out").query(CONTENT).to_pylist()


@dataclass(frozen=True)
class Poisoned(Ingest):
    """A step whose worker process dies whenever it cuts a clip of one source."""

    victim: str = ""

    def _cut(self, row: dict[str, Any], fetch: Any) -> dict[str, Any]:
        if row["source_id"] == self.victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._cut(row, fetch)


@dataclass(frozen=True)
class PoisonedPlan(Plan):
    """A plan with a poisoned first step."""

    victim: str = ""

    def ingest(self) -> Ingest:
        return Poisoned(**{**super().ingest().__dict__, "victim": self.victim})


class Hanging:
    """A captioner that never answers."""

    name = "hanging"

    def caption(self, images: Any) -> list[str]:
        while True:
            signal.pause()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def start(videos: Path, out: Path, chosen: Recipe) -> subprocess.Popen[bytes]:
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(chosen.model_dump(mode="json")))
    command = [sys.executable, "-m", "videofactory.pipelines.cli", "build", "-s", str(videos), "-o", str(out), "-r", str(path)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_heed_interrupts
    )


def _heed_interrupts() -> None:
    """A shell starts what it runs in the background with SIGINT ignored, and the tests may run there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a build to end well."""
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output.decode()[-3000:]


def parts(out: Path) -> list[str]:
    return sorted(
        str(path.relative_to(out)) for folder in ("sources", "clips") for path in (out / "index" / folder).glob("*.parquet")
    )


def test_killed_ten_times_and_continued(videos: Path, out: Path, expected: list[dict[str, Any]]) -> None:
    """Kill -9 of the driver after one to three commits of its own, ten times; the last run ends as if undisturbed."""
    written: dict[str, int] = {}
    for number in range(KILLS):
        before = len(parts(out))
        process = start(videos, out, recipe())
        while process.poll() is None and len(parts(out)) <= before + number % 3:
            time.sleep(0.01)  # what decides the moment is the number of commits
        assert process.poll() is None, f"ended by itself at kill {number}: {process.communicate()[0].decode()[-2000:]}"
        process.kill()
        process.communicate(timeout=120)
        for path in (out / "index/sources").glob("*.parquet"):
            written.setdefault(path.name, path.stat().st_mtime_ns)
    finish(start(videos, out, recipe()))
    index = Index(str(out))
    assert index.query(CONTENT).to_pylist() == expected
    assert len(index.shards()) >= 8
    assert verify(str(out)).broken == []
    # A source whose record was committed was never decoded again: there is one record of each, and it was never touched.
    sources = [path.name.split("-")[2] for path in (out / "index/sources").glob("*-1.parquet")]
    assert len(sources) == len(set(sources)) == SOURCES + 1
    assert all((out / "index/sources" / name).stat().st_mtime_ns == moment for name, moment in written.items())


def test_killed_workers_change_nothing(videos: Path, out: Path, tmp_path: Path) -> None:
    """Kill -9 of a worker of each kind while it works: the build goes on and ends as if undisturbed."""
    chosen = recipe(caption={"captioner": "tests.test_ray:Naming"})
    undisturbed = run(videos, tmp_path / "plain", chosen).query(CONTENT).to_pylist()
    assert any(row["caption"] for row in undisturbed)
    process = start(videos, out, chosen)
    killed = []
    for victim in ("MapBatches(ingest)", "Describe", "ingest", "Describe", "Write"):
        while process.poll() is None:
            found = [child for child in _children(process) if victim in child]
            if found and len(parts(out)) >= 2 * len(killed):
                found[0].kill()
                killed.append(victim)
                break
    finish(process)
    assert len(killed) >= 4
    assert Index(str(out)).query(CONTENT).to_pylist() == undisturbed
    assert verify(str(out)).broken == []


def test_ctrl_c_ends_in_one_line_and_goes_on(videos: Path, out: Path, expected: list[dict[str, Any]]) -> None:
    process = start(videos, out, recipe())
    while process.poll() is None and len(parts(out)) < 4:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to every process of the command
    printed = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 130, printed[-3000:]
    assert "interrupted" in printed and "the same command goes on" in printed and "Traceback" not in printed
    finish(start(videos, out, recipe()))
    assert Index(str(out)).query(CONTENT).to_pylist() == expected


def test_source_that_kills_its_worker_every_time(videos: Path, out: Path, expected: list[dict[str, Any]]) -> None:
    storage = Storage(str(out))
    rows = find_sources([str(videos)])
    victim = rows[1]["source_id"]
    chosen = recipe()
    with Lease(storage) as lease, cluster(chosen.execution):
        plan = PoisonedPlan(chosen, storage, lease.run, victim=victim)
        building.prepare(plan, rows, ())
        run_graph(plan, resources(plan), building.todo(Index(storage)))
    index = Index(storage)
    died = index.query("select distinct source_id, error_class from clips where state = 'failed'").to_pylist()
    assert died == [{"source_id": victim, "error_class": "worker_died"}]
    assert not len(index.incomplete())
    others = index.query(CONTENT.replace("order", f"where source_id <> '{victim}' order")).to_pylist()
    assert others == [row for row in expected if not row["clip_id"].startswith(victim)]
    assert verify(storage).broken == []


def test_a_step_that_hangs_is_named(videos: Path, out: Path) -> None:
    chosen = recipe(
        caption={"captioner": "tests.test_ray:Hanging"},
        execution={"shard_bytes": 1 << 16, "describe_batch": 2, "no_progress_seconds": 15},
    )
    rows = find_sources([str(videos / "video-01.mp4")])
    with pytest.raises(GraphError, match=r"nothing moved for 15 s.*Describe"):
        building.build(chosen, rows, str(out))


class TestCheckFits:
    fits = Resources(cpus=4, gpus=0, ingest_tasks=2, describers=1, object_store=1 << 30, bundle=1 << 28)

    def test_room_for_the_largest_task(self) -> None:
        check_fits(self.fits)
        check_fits(replace(self.fits, describers=6))

    def test_actors_that_hold_every_cpu(self) -> None:
        with pytest.raises(
            GraphError, match=r"7 describers and one task need 4\.5 CPUs, and there are 4; lower execution\.describers"
        ):
            check_fits(replace(self.fits, describers=7))

    def test_actors_without_a_gpu_each(self) -> None:
        with pytest.raises(GraphError, match="need a GPU each"):
            check_fits(replace(self.fits, gpus=1, describers=2))


class Naming:
    """A captioner that names the mean colour of a picture."""

    name = "naming"

    def caption(self, images: Any) -> list[str]:
        return ["a picture of mean colour " + "-".join(map(str, image.resize((1, 1)).getpixel((0, 0)))) for image in images]


class _Child:
    def __init__(self, process: psutil.Process, title: str) -> None:
        self._process, self._title = process, title

    def __contains__(self, name: str) -> bool:
        return name in self._title

    def kill(self) -> None:
        self._process.kill()


def _children(process: subprocess.Popen[bytes]) -> list[_Child]:
    """The processes below a build, with the titles that Ray gives them while they work."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found.append(_Child(child, " ".join(child.cmdline())))
    return found
