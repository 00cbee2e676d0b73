"""Progress of a build, read from what is committed: a display on a terminal, plain log lines elsewhere.

The index is the truth of how far a build is, so nothing has to be reported by the steps, and what is shown is what a restart
would find.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from videofactory.shards.storage import Storage
from videofactory.shards.writer import CLIPS, SOURCES

from .build import Outlook

_LOOK_EVERY = 1.0
_LOG_EVERY = 15.0


@dataclass
class Tally:
    """What a run has committed so far.

    Attributes:
        sources_done, sources_failed: sources analysed, and sources that could not be.
        rejected: candidate clips that a rule rejected.
        waiting: clips that are kept so far and not yet in a shard.
        kept, failed: clips in committed shards, and clips that could not be cut or described.
    """

    sources_done: int = 0
    sources_failed: int = 0
    rejected: int = 0
    waiting: int = 0
    kept: int = 0
    failed: int = 0
    _seen: set[str] = field(default_factory=set)

    def look(self, storage: Storage) -> None:
        """Count the parts that were committed since the last look."""
        for folder, count in ((SOURCES, self._count_record), (CLIPS, self._count_clips)):
            for entry in storage.list(folder, ".parquet"):
                if entry.name not in self._seen:
                    self._seen.add(entry.name)
                    with storage.open(entry.name) as file:
                        count(pq.ParquetFile(file))

    def ignore(self, storage: Storage) -> None:
        """Leave out what stands already."""
        self._seen.update(entry.name for folder in (SOURCES, CLIPS) for entry in storage.list(folder, ".parquet"))

    def _count_record(self, part: pq.ParquetFile) -> None:
        for row in part.read(["status", "candidates"]).to_pylist():
            if row["status"] == "failed":
                self.sources_failed += 1
            elif row["status"] == "done":
                self.sources_done += 1
                rejected = sum(clip["rejected_by"] is not None for clip in row["candidates"] or [])
                self.rejected += rejected
                self.waiting += len(row["candidates"] or []) - rejected

    def _count_clips(self, part: pq.ParquetFile) -> None:
        for row in part.read(["rejected_by", "error_class", "shard"]).to_pylist():
            if row["rejected_by"] is not None:
                self.rejected += 1
            elif row["error_class"] is not None:
                self.failed += 1
            elif row["shard"] is not None:
                self.kept += 1
            self.waiting -= 1

    def line(self, total: int, seconds: float) -> str:
        """One line for a log."""
        sources = self.sources_done + self.sources_failed
        left = f", about {(total - sources) * seconds / sources / 60:.0f} min left" if 0 < sources < total else ""
        return (
            f"{sources}/{total} sources ({self.sources_failed} failed), {self.text()}, "
            f"{self.kept / max(seconds, 1e-9):.2f} clips/s{left}"
        )

    def text(self) -> str:
        """The clips in words."""
        return f"{self.kept} clips kept, {self.rejected} rejected, {self.failed} failed, {max(0, self.waiting)} on their way"


@contextlib.contextmanager
def watching(storage: Storage, outlook: Outlook, console: Console) -> Iterator[Tally]:
    """Show how a run comes along until the block ends."""
    tally = Tally()
    tally.ignore(storage)
    if not outlook.todo:
        yield tally
        return
    began = time.monotonic()
    if console.is_terminal:
        columns = (
            SpinnerColumn(),
            TextColumn("sources"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=outlook.todo)

            def show() -> None:
                tally.look(storage)
                rate = tally.kept / max(time.monotonic() - began, 1e-9)
                done = tally.sources_done + tally.sources_failed
                progress.update(task, completed=done, description=f"{tally.text()}, {rate:.2f} clips/s")

            with _repeating(show, _LOOK_EVERY):
                yield tally
            show()
    else:

        def write() -> None:
            tally.look(storage)
            line = tally.line(outlook.todo, time.monotonic() - began)
            console.print(f"[{time.strftime('%H:%M:%S')}] {line}", highlight=False, markup=False, soft_wrap=True)

        with _repeating(write, _LOG_EVERY):
            yield tally
        write()


@contextlib.contextmanager
def _repeating(action: Callable[[], None], seconds: float) -> Iterator[None]:
    """Run `action` on a thread of its own every so often. A look that fails is repeated, never an end of the build."""
    stop = threading.Event()

    def repeat() -> None:
        while not stop.wait(seconds):
            with contextlib.suppress(Exception):
                action()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
