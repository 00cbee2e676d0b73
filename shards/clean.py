"""Remove what killed builds left behind: half-written files, and shards that no index part names."""

from __future__ import annotations

import re

from .index import Index, IndexDamagedError, listed_shards
from .storage import Entry, Storage
from .writer import SHARDS

_RUN = re.compile(r"^(\d{6}-[0-9a-f]{4})-")


def clean(storage: Storage, index: Index, run: str) -> list[Entry]:
    """Delete what runs before `run` began and never committed; call it while holding the lease, before the run writes.

    Deleted are temporary files and shards whose names begin with the id of an earlier run. A shard stays if an index part or
    `shards.json` names it (if only the latter does, the index was damaged, and the shard is what there is to save). On an
    object store nothing is deleted: no lock there tells a dead build from a slow one.

    Args:
        storage: the dataset.
        index: its index, read without leaving anything out.
        run: id of the current run (`Lease.run`), of which nothing is deleted.

    Returns:
        What was deleted.

    Raises:
        IndexDamagedError: a part of the index cannot be read, so that nobody knows which shards it names.
    """
    if not storage.is_local:
        return []
    index.refresh()
    named = {shard["url"] for shard in index.shards()}
    for part, reason in index.damaged.items():
        raise IndexDamagedError(part, reason)
    unwanted = [entry for entry in storage.leftovers() if _is_earlier(entry, run)]
    try:
        named |= {shard["url"] for shard in listed_shards(storage)}
        unwanted += [entry for entry in storage.list(SHARDS, ".tar") if entry.name not in named and _is_earlier(entry, run)]
    except ValueError:
        pass  # an unreadable shards.json might name any of them; the end of this build writes it again
    for entry in unwanted:
        storage.delete(entry.name)
    return unwanted


def _is_earlier(entry: Entry, run: str) -> bool:
    found = _RUN.match(entry.name.rpartition("/")[2].removeprefix("."))
    return found is not None and found[1] < run
