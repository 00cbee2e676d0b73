"""The instruments of the benchmarks: the clock that follows a tree of processes, the film and its excerpts, the goals."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import av
import pytest

from benchmarks import reader_speed
from benchmarks.cpu import Mark, ProcessTree, WorkFailedError, processor_seconds, run_marked
from benchmarks.film import RATE, Film, FilmSettings, excerpts
from benchmarks.outcome import Outcome
from tests.labelled_shots import shot_frames, write_video

BURN = "import time\nwhile time.process_time() < {seconds}: pass\n"
TOLERANCE = 0.25
"""Seconds of start-up and of the kernel's clock ticks that a burn may differ by."""


def burn(seconds: float) -> list[str]:
    """A command that uses `seconds` of processor time."""
    return [sys.executable, "-S", "-c", BURN.format(seconds=seconds)]


def waits_for_children(mark: Mark) -> None:
    mark("before")
    for _ in range(3):
        subprocess.run(burn(0.5), check=True)
    mark("after", "three")


def leaves_a_child_to_nobody(mark: Mark) -> None:
    import signal

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # as Ray's daemon does: the kernel drops the child's times
    mark("before")
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    child = os.posix_spawn(sys.executable, burn(1.0), dict(os.environ))
    with pytest.raises(ChildProcessError):
        os.waitpid(child, 0)
    mark("after", resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)


def keeps_a_child(mark: Mark) -> None:
    mark("before")
    child = subprocess.Popen([*burn(0.5)[:-1], burn(0.5)[-1] + "print(flush=True)\ninput()"], stdin=-1, stdout=-1)
    assert child.stdout is not None
    child.stdout.readline()
    mark("after")
    child.kill()


def fails(mark: Mark) -> None:
    mark("before")
    raise ValueError("no such film")


def dies(mark: Mark) -> None:
    os._exit(3)


def hangs(mark: Mark) -> None:
    import threading

    threading.Event().wait()


class TestRunMarked:
    def test_counts_children_that_ended(self) -> None:
        readings = run_marked(waits_for_children)
        assert readings["after"].cpu - readings["before"].cpu == pytest.approx(1.5, abs=3 * TOLERANCE)
        assert readings["after"].value == "three"
        assert readings["after"].wall > readings["before"].wall > 0

    def test_counts_children_that_nobody_waited_for(self) -> None:
        readings = run_marked(leaves_a_child_to_nobody)
        assert readings["after"].value == 0  # what `getrusage` knows of it
        # The child may use what lies between two looks without being seen.
        assert 0.5 < readings["after"].cpu - readings["before"].cpu < 1.0 + TOLERANCE

    def test_counts_children_that_live(self) -> None:
        readings = run_marked(keeps_a_child)
        assert readings["after"].cpu - readings["before"].cpu == pytest.approx(0.5, abs=TOLERANCE)
        assert readings["after"].processes == readings["before"].processes + 1

    def test_says_why_the_work_failed(self) -> None:
        with pytest.raises(WorkFailedError, match=r"fails failed after .*\n(.*\n)*ValueError: no such film"):
            run_marked(fails)

    def test_notices_that_the_work_died(self) -> None:
        with pytest.raises(WorkFailedError, match="dies died"):
            run_marked(dies)

    def test_stops_work_that_takes_too_long(self) -> None:
        with pytest.raises(WorkFailedError, match="hangs took longer than 5 s"):
            run_marked(hangs, seconds=5)


def test_the_tree_counts_no_second_twice() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "import subprocess, sys\nsubprocess.run(sys.argv[1:])\ninput()", *burn(1.0)], stdin=-1
    )
    try:
        tree = ProcessTree(process.pid)
        seen: list[float] = []
        while not seen or tree.alive() > 1 or max(seen) < 1.0:  # looks while the child works, and after it was waited for
            tree.look()
            seen.append(tree.seconds())
        assert seen == sorted(seen)
        assert seen[-1] < 1.0 + 2 * TOLERANCE
    finally:
        process.kill()
        process.wait()


def test_processor_seconds_of_children() -> None:
    spent = processor_seconds(resource.RUSAGE_CHILDREN, lambda: subprocess.run(burn(0.5), check=True))
    assert spent == pytest.approx(0.5, abs=TOLERANCE)


def test_the_full_film_has_the_cuts_it_promises() -> None:
    lengths = FilmSettings().shot_lengths()
    assert len(lengths) - 1 >= 60
    assert 300 <= sum(lengths) / RATE < 307
    assert FilmSettings(60).shot_lengths() == lengths[: len(FilmSettings(60).shot_lengths())]


def test_excerpts_hold_whole_groups_of_pictures(tmp_path: Path) -> None:
    lengths = [30] * 6
    path = write_video(tmp_path / "film.mp4", shot_frames(1, 320, 180, lengths, RATE), RATE)
    film = Film(path, "H.264", 6.0, 5)
    found = excerpts(film, tmp_path / "excerpts", 3, 2.0)
    with av.open(str(path)) as container:
        whole = {bytes(frame.to_ndarray()) for frame in container.decode(video=0)}
    for excerpt in found:
        with av.open(str(excerpt)) as container:
            frames = [(frame.pts, bytes(frame.to_ndarray())) for frame in container.decode(video=0)]
        assert len(frames) >= 2 * RATE
        assert {pixels for _, pixels in frames} <= whole
        assert [pts for pts, _ in frames] == sorted({pts for pts, _ in frames})
    assert len({excerpt.read_bytes() for excerpt in found}) == 3


@pytest.mark.parametrize(("ratio", "goal", "missed"), [(0.9, 0.9, False), (0.91, 0.9, True), (7.0, None, False)])
def test_a_goal_is_missed_above_it(ratio: float, goal: float | None, missed: bool) -> None:
    assert Outcome("pass", "1", "1", ratio, goal).missed is missed


@pytest.mark.parametrize(("ratio", "missed"), [(0.9, False), (0.89, True), (7.0, False)])
def test_a_goal_of_a_rate_is_missed_below_it(ratio: float, missed: bool) -> None:
    assert Outcome("reader", "1", "1", ratio, 0.9, at_least=True).missed is missed


def test_the_reader_and_the_plain_loop_read_the_same_pictures(tmp_path: Path) -> None:
    """`measure` refuses anything else."""
    path = write_video(tmp_path / "film.mp4", shot_frames(1, 640, 360, [90] * 4, RATE), RATE)
    outcomes = reader_speed.measure(Film(path, "H.264", 12.0, 3), tmp_path, 1)
    assert [outcome.goal for outcome in outcomes] == [0.9, 0.9] and all(outcome.ratio > 0 for outcome in outcomes)
    assert all("4 samples of 4 clips" in outcome.note for outcome in outcomes)
