"""The build on Ray against the same functions in a plain loop: ten files, ten minutes of video in all.

Each side is a process of its own, which first builds from as many excerpts of a shot each: what it has used until then
(interpreter, imports, on Ray also the cluster and as many workers as the graph asks for) is its start-up, reported apart. The
build that follows, in the same process and the same cluster, is what is compared: from the first look at the ledger to the last
commit, without the report. With models the second build loads them again on both sides, on Ray in a new process.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from videofactory.curation.sources import find_sources
from videofactory.pipelines.build import prepare, todo
from videofactory.pipelines.plan import Plan, model_path, run_plainly
from videofactory.pipelines.recipe import CaptionSettings, EmbedSettings, Recipe
from videofactory.shards.index import Index
from videofactory.shards.lease import Lease
from videofactory.shards.storage import Storage

from .cpu import Mark, Reading, run_marked
from .film import Film, excerpts
from .outcome import Outcome

GOAL = 1.15
"""Ray may cost at most 15% over the plain loop, in processor seconds."""

FILES = 10

_WARM_SHARD_BYTES = 1 << 20
"""Small, so that in the warm-up, too, clips are written while others are cut."""

PLAIN = Recipe(rules={"duration": "duration >= 1.0"})
DESCRIBED = PLAIN.model_copy(
    update={
        "embed": EmbedSettings(model="sample:embedder"),
        "caption": CaptionSettings(options={"model": "sample:captioner"}),
    }
)
"""With the miniature models that come with the package: their captions of this film mean nothing, their cost is real."""

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class _Side:
    """What one side used: for its start-up, and for the build."""

    start_cpu: float
    start_wall: float
    cpu: float
    wall: float
    processes: int
    clips: int


def measure(film: Film, folder: Path, rounds: int) -> list[Outcome]:
    """Without models (gated) and, where the miniature models are there, with them."""
    warm = find_sources([str(path) for path in excerpts(film, folder / "warm", FILES, 1)])
    sources = find_sources([str(path) for path in excerpts(film, folder / "sources", FILES, film.seconds / 5)])
    cases: list[tuple[str, Recipe, int, float | None]] = [("without models", PLAIN, rounds, GOAL)]
    if Path(model_path("sample:captioner")).is_dir():
        cases.append(("with the miniature models", DESCRIBED, 1, None))
    return [_compare(name, recipe, folder, warm, sources, times, goal) for name, recipe, times, goal in cases]


def _compare(name: str, recipe: Recipe, folder: Path, warm: Rows, sources: Rows, rounds: int, goal: float | None) -> Outcome:
    plain, ray = [], []
    for _ in range(rounds):
        plain.append(_side(_plainly, recipe, folder / "out", warm, sources))
        ray.append(_side(_on_ray, recipe, folder / "out", warm, sources))
    if any(side.clips != plain[0].clips for side in (*plain, *ray)):
        raise AssertionError(f"the two sides made {plain[0].clips} and {[side.clips for side in ray]} clips of the same files")
    loop, graph = statistics.median(side.cpu for side in plain), statistics.median(side.cpu for side in ray)
    walls = statistics.median(side.wall for side in ray), statistics.median(side.wall for side in plain)
    return Outcome(
        what=f"Ray, {name}, {len(sources)} files",
        ours=f"{graph:.1f} CPU s",
        peer=f"{loop:.1f} CPU s (plain loop)",
        ratio=graph / loop,
        goal=goal,
        note=f"{plain[0].clips} clips; wall {walls[0]:.0f} s against {walls[1]:.0f}; start-up {ray[0].start_cpu:.1f} CPU s "
        f"({ray[0].start_wall:.0f} s) against {plain[0].start_cpu:.1f}; {ray[0].processes} processes; rounds "
        + ", ".join(f"{a.cpu / b.cpu:.2f}" for a, b in zip(ray, plain, strict=True)),
    )


def _side(work: Callable[..., None], recipe: Recipe, out: Path, warm: Rows, sources: Rows) -> _Side:
    readings = run_marked(work, recipe, out, warm, sources)
    start, end = readings["started"], readings["built"]
    clips = _kept(out / "main")
    shutil.rmtree(out)
    return _Side(start.cpu, start.wall, end.cpu - start.cpu, end.wall - start.wall, _most(start, end), clips)


def _most(*readings: Reading) -> int:
    return max(reading.processes for reading in readings)


def _kept(out: Path) -> int:
    found = Index(Storage(str(out))).query("select count(*) as kept from clips where state = 'kept'")
    return int(found["kept"][0].as_py())


def _plainly(mark: Mark, recipe: Recipe, out: Path, warm: Rows, sources: Rows) -> None:
    _build(_warm(recipe), out / "warm", warm, run_plainly)
    mark("started")
    _build(recipe, out / "main", sources, run_plainly)
    mark("built")


def _on_ray(mark: Mark, recipe: Recipe, out: Path, warm: Rows, sources: Rows) -> None:
    from videofactory.pipelines.graph import cluster, resources, run_graph

    def run(plan: Plan, waiting: Rows) -> None:
        run_graph(plan, resources(plan), waiting)

    with cluster(recipe.execution):
        _build(_warm(recipe), out / "warm", warm, run)
        mark("started")
        _build(recipe, out / "main", sources, run)
        mark("built")


def _warm(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"execution": recipe.execution.model_copy(update={"shard_bytes": _WARM_SHARD_BYTES})})


def _build(recipe: Recipe, out: Path, sources: Rows, run: Callable[[Plan, Rows], object]) -> None:
    """What `pipelines.build.build` does between the lease and the report, in one round."""
    storage = Storage(str(out))
    with Lease(storage) as lease:
        plan = Plan(recipe, storage, lease.run)
        prepare(plan, sources, ())
        run(plan, todo(Index(storage)))
