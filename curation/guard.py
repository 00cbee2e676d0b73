"""The child process in which untrusted bytes are decoded, and the errors that come out of it.

A crash, a hang or a memory blow-up of a decoder ends the child and costs its caller one `MediaError`; the next call finds a
new child. Use it through `videofactory.curation.media`.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

ERRORS: dict[str, tuple[bool, str]] = {
    "not_found": (False, "no file at the given path"),
    "unreadable": (True, "the operating system refuses to read it: permission, a device, a broken disk"),
    "not_a_video": (False, "the content is no container that could be recognised"),
    "unsupported_container": (False, "recognised, but not on the list of containers: playlists, images, subtitles"),
    "unsupported_codec": (False, "the video stream's codec is not on the list of codecs"),
    "no_video_stream": (False, "sound, subtitles or a cover picture only"),
    "truncated": (True, "the file ends long before the video that its header promises"),
    "no_frames": (False, "a video stream from which no frame comes"),
    "decode_failed": (False, "too many packets do not decode"),
    "bad_timestamps": (False, "the timestamps run backwards, so nothing can be cut by them"),
    "decoder_crashed": (False, "the decoding process died"),
    "decoder_timeout": (True, "the decoding process used up its time"),
    "decoder_memory": (False, "the decoding process used up its memory"),
    "analysis_failed": (False, "the analysis raised an error that is nobody's fault in particular; the message quotes it"),
    # Cutting a clip.
    "cut_failed": (False, "cutting raised an error that is nobody's fault in particular; the message quotes it"),
    "bad_span": (False, "the span to cut is empty or runs backwards"),
    "empty_span": (False, "the source has no frame inside the span"),
    "not_copyable": (False, "mode `copy` was asked for, and the span cannot be copied safely"),
    "ffmpeg_missing": (True, "there is no ffmpeg to encode with"),
    "encode_failed": (False, "ffmpeg ended with an error; the end of what it said is in the message"),
    "encode_timeout": (True, "cutting the clip used up its time"),
    "clip_check_failed": (False, "the clip that was written does not hold the frames that it should"),
    # Fetching a source.
    "source_changed": (False, "the file is not the one that was analysed"),
    "unsupported_address": (False, "an address of a kind that cannot be fetched"),
    "fetch_failed": (True, "the object store or the network did not deliver"),
    # Describing a clip, and the pipeline itself.
    "embed_failed": (True, "the embedding model raised an error on the clip's middle frame or caption"),
    "caption_failed": (True, "the captioner raised an error on the clip's middle frame"),
    "worker_died": (True, "worker after worker died over the source, outside the guarded decoder"),
    "incomplete": (True, "two rounds of the pipeline did not finish it"),
}
"""Every error class: whether the same source may succeed when fetched and tried again, and what the class means."""


class MediaError(Exception):
    """A file that cannot be used.

    Attributes:
        error_class: one of `ERRORS`.
        retryable: whether fetching and trying the source again may help.
    """

    def __init__(self, error_class: str, message: str, retryable: bool | None = None) -> None:
        super().__init__(message)
        self.error_class = error_class
        self.retryable = ERRORS[error_class][0] if retryable is None else retryable

    def __reduce__(self) -> tuple[type[MediaError], tuple[str, str, bool]]:
        return type(self), (self.error_class, str(self), self.retryable)


@dataclass(frozen=True)
class GuardLimits:
    """What a guarded call may use.

    Attributes:
        memory_bytes: address space of the child, its libraries included (about 1 GiB with PyAV, OpenCV and one decoder thread).
        seconds: wall-clock time of a call that does not say.
        cpu_seconds: processor time of a call; `None` allows four times its wall-clock time, which only a runaway exceeds.
    """

    memory_bytes: int = 3 * 2**30
    seconds: float = 600.0
    cpu_seconds: float | None = None


DEFAULT_LIMITS = GuardLimits()

# What a call may wait for its child to start and import, on top of its own time, before the pool counts as stuck.
_START_SECONDS = 120.0


def _die_with_parent(parent: int) -> None:
    """Ask Linux to kill this process when its parent ends, whatever ends the parent."""
    import ctypes
    import signal
    import sys

    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
        # The parent may have died before the request was in place; nobody would then ever end this process.
        if os.getppid() != parent:
            os._exit(1)


def _prepare_child(parent: int, memory_bytes: int) -> None:
    """Set the child's limits and quieten its libraries; runs once in every new child."""
    import resource

    _die_with_parent(parent)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import av.logging

    # PyAV's own log callback takes Python's lock inside decoder threads, which can deadlock with the thread that waits for them.
    av.logging.restore_default_callback()
    quiet = -8
    av.logging.set_libav_level(quiet)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


@dataclass(frozen=True)
class _Failure:
    """An exception as it crosses the process border, so that one that cannot be pickled breaks nothing."""

    error: BaseException


def _call(function: Callable[..., R], args: tuple[Any, ...], kwargs: dict[str, Any], cpu_seconds: float) -> R | _Failure:
    import pickle
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = int(usage.ru_utime + usage.ru_stime + cpu_seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
    try:
        return function(*args, **kwargs)
    except MemoryError:
        return _Failure(MediaError("decoder_memory", "decoding needs more memory than allowed"))
    except Exception as error:  # noqa: BLE001  (every exception is handed to the caller, who raises it)
        # OpenCV reports a failed allocation as an error of its own: code -4.
        if getattr(error, "code", None) == -4:
            return _Failure(MediaError("decoder_memory", "image processing needs more memory than allowed"))
        try:
            pickle.loads(pickle.dumps(error))  # noqa: S301  (bytes of our own making)
        except Exception:  # noqa: BLE001  (whatever its reason, it cannot travel)
            return _Failure(RuntimeError(f"{type(error).__name__}: {error}"))
        return _Failure(error)


class Guard:
    """Runs functions in a child process that may die, one call at a time; the child lives on between calls.

    The function, its arguments and its result are pickled; the function must stand in an importable module. In a script, the
    guard must be made under `if __name__ == "__main__":`, for the child imports the script. Threads may share a guard.

        with Guard() as guard:
            analysis = guard.run(analyse, path, seconds=60)
    """

    def __init__(self, limits: GuardLimits = DEFAULT_LIMITS) -> None:
        self.limits = limits
        self._pool: Any = None
        self._starter: threading.Thread | None = None
        self._close = threading.Event()
        self._lock = threading.Lock()
        self._turn = threading.Lock()

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, function: Callable[..., R], /, *args: Any, seconds: float | None = None, **kwargs: Any) -> R:
        """`function(*args, **kwargs)` in the child, at most `seconds` of wall-clock time.

        Raises:
            MediaError: decoder_crashed, decoder_timeout, decoder_memory, or what `function` raised.
            Exception: any other exception of `function`, unchanged.
        """
        from pebble import ProcessExpired

        wall = self.limits.seconds if seconds is None else seconds
        cpu = 4 * wall if self.limits.cpu_seconds is None else self.limits.cpu_seconds
        task = (function, args, kwargs, cpu)
        try:
            with self._turn:
                result: R | _Failure
                try:
                    result = self._schedule(task, wall).result(wall + _START_SECONDS)
                except BrokenProcessPool:
                    # The child died while it had nothing to do, so this call has not run yet.
                    self.close()
                    result = self._schedule(task, wall).result(wall + _START_SECONDS)
        except ProcessExpired as error:
            raise self._why_died(error.exitcode) from error
        except FutureTimeoutError as error:
            if "Task timeout" not in str(error):
                self.close()  # the pool itself is stuck; the next call makes another
            raise MediaError("decoder_timeout", f"decoding took more than the {wall:g} s it was given") from error
        except (RuntimeError, OSError, CancelledError) as error:
            self.close()
            why = f"the decoding process does not start, or cannot import {function.__module__}.{function.__qualname__}: {error}"
            raise MediaError("decoder_crashed", why, retryable=True) from error
        if isinstance(result, _Failure):
            raise result.error
        return result

    def close(self) -> None:
        """End the child and wait until it is gone; the next `run` starts another."""
        with self._lock:
            starter, self._starter, self._pool = self._starter, None, None
            self._close.set()
        if starter is not None and starter is not threading.current_thread():
            starter.join()

    @staticmethod
    def _why_died(exit_code: int | None) -> MediaError:
        import signal

        if exit_code == -signal.SIGXCPU:
            return MediaError("decoder_timeout", "decoding used up the processor time it was given", retryable=False)
        if exit_code == -signal.SIGKILL:
            # The kernel's out-of-memory killer, or a person: it says nothing about the file.
            return MediaError("decoder_crashed", "the decoding process was killed (SIGKILL)", retryable=True)
        how = signal.Signals(-exit_code).name if exit_code is not None and exit_code < 0 else f"exit code {exit_code}"
        return MediaError("decoder_crashed", f"the decoder crashed ({how})")

    def _schedule(self, arguments: tuple[Any, ...], wall: float) -> Future[Any]:
        with self._lock:
            if self._pool is None or not self._pool.active:
                self._start()
            future: Future[Any] = self._pool.schedule(_call, args=arguments, timeout=wall)
        return future

    def _start(self) -> None:
        """Start the pool from a thread that outlives it: Linux kills the child when the *thread* that started it ends."""
        if self._starter is not None:
            self._close.set()
            self._starter.join()
        self._close = threading.Event()
        ready = threading.Event()
        self._starter = threading.Thread(target=self._keep, args=(self._close, ready), name="guard", daemon=True)
        self._starter.start()
        ready.wait()

    def _keep(self, close: threading.Event, ready: threading.Event) -> None:
        import multiprocessing

        from pebble import ProcessPool

        pool = ProcessPool(
            max_workers=1,
            context=multiprocessing.get_context("spawn"),
            initializer=_prepare_child,
            initargs=(os.getpid(), self.limits.memory_bytes),
        )
        self._pool = pool
        try:
            _ = pool.active  # starts the child
        finally:
            ready.set()
        close.wait()
        pool.stop()
        pool.join()


_shared: dict[tuple[int, GuardLimits], Guard] = {}
_shared_lock = threading.Lock()


def shared_guard(limits: GuardLimits = DEFAULT_LIMITS) -> Guard:
    """The one guard of this process for `limits`; its child ends with the process."""
    key = (os.getpid(), limits)
    with _shared_lock:
        if key not in _shared:
            guard = Guard(limits)
            # A forked copy of this process has a key of its own, and never closes the child of another.
            _shared[key] = guard
            atexit.register(lambda: guard.close() if os.getpid() == key[0] else None)
        return _shared[key]
