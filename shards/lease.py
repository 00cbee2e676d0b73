"""One build per dataset: who may write, and how the workers of a killed build are kept from committing afterwards.

On a disk this is exact. The builder holds a file lock for as long as it lives, so a dead builder never blocks the next one.
Its workers may outlive it by seconds (Ray notices a killed driver late): each commit therefore happens under a shared lock and
only while the dataset's run number is still the worker's own, and a new builder takes that lock alone to raise the number.
On an object store there is no lock: the run id still keeps names apart, but two builds at once are not prevented.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import uuid
from collections.abc import Iterator
from typing import Any

from .storage import Storage

_OWNER = ".lock"
_COMMIT = ".commit.lock"
_RUN = ".run"
_NUMBER = re.compile(r"^(\d{6})-")


class DatasetBusyError(Exception):
    """Another build is writing to the dataset."""


class StaleRunError(Exception):
    """The build that this worker belongs to was replaced by a newer one; nothing may be committed any more."""


class Lease:
    """The right to write to a dataset, from construction to `close` (or the death of the process).

    Attributes:
        run: id of this run, `{number, 6 digits}-{4 random hexadecimal digits}`; sorts after the ids of all earlier runs.

    Raises:
        DatasetBusyError: another live process holds the lease; the message names it.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._held: Any = None
        if storage.is_local:
            self._held = self._lock_owner()
        try:
            with _exclusive(storage):
                self.run = f"{_last_number(storage) + 1:06d}-{uuid.uuid4().hex[:4]}"
                storage.put(_RUN, self.run.encode())
        except BaseException:
            self.close()
            raise

    def _lock_owner(self) -> Any:
        path = self._storage.local_path(_OWNER)
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = _owner_name(file.read())
            file.close()
            raise DatasetBusyError(
                f"{self._storage.uri} is being built by {owner}; wait for it, stop it, or choose another output folder"
            ) from None
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        file.flush()
        return file

    def close(self) -> None:
        """Give the lease back."""
        if self._held is not None:
            self._held.close()
            self._held = None

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def committing(storage: Storage, run: str) -> Iterator[None]:
    """Hold off a new build while one file is committed, and refuse when one has begun already.

    Raises:
        StaleRunError: `run` is no longer the dataset's current run.
    """
    if not storage.is_local:
        yield
        return
    with storage.local_path(_COMMIT).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        current = storage.get(_RUN).decode()
        if current != run:
            raise StaleRunError(f"run {run} was replaced by run {current}; its work is left to the newer run")
        yield


@contextlib.contextmanager
def _exclusive(storage: Storage) -> Iterator[None]:
    if not storage.is_local:
        yield
        return
    with storage.local_path(_COMMIT).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _last_number(storage: Storage) -> int:
    """The highest run number that this dataset has seen."""
    names = [storage.get(_RUN).decode()] if storage.exists(_RUN) else []
    for folder in ("index/sources", "index/clips"):
        names += [entry.name.rsplit("/", 1)[-1] for entry in storage.list(folder, ".parquet")]
    return max((int(match[1]) for name in names if (match := _NUMBER.match(name))), default=0)


def _owner_name(text: str) -> str:
    try:
        owner = json.loads(text)
        return f"process {owner['pid']} on {owner['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
