"""Check every promise a dataset makes, from what is on the disk, and name each one that is broken.

The tars are read with the standard library's `tarfile`, not with the code that wrote them.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .index import Index, listed_shards
from .storage import Storage
from .writer import EMBEDDINGS, SHARDS

_KEPT = "select * from clips where state = 'kept' order by shard, \"offset\""

_LAWS = {
    "a source is neither done, failed nor pending": (
        "select source_id as id, status as found from sources where status not in ('done', 'failed', 'pending') or status is null"
    ),
    "a done source's clips do not add up to n_clips": """
        select s.source_id as id, concat('n_clips ', s.n_clips, ', rows ', coalesce(c.rows, 0)) as found
        from sources s left join (select source_id, count(*) as rows from clips group by 1) c using (source_id)
        where s.status in ('done') and s.n_clips is distinct from coalesce(c.rows, 0)""",
    "a clip belongs to no source": (
        "select clip_id as id, source_id as found from clips where source_id not in (select source_id from sources)"
    ),
    "a failed source does not say why": (
        "select source_id as id, 'no error_class' as found from sources where status = 'failed' and error_class is null"
    ),
    "clips of one source stand in several splits": """
        select source_id as id, string_agg(distinct split, ', ') as found from clips where split is not null
        group by 1 having count(distinct split) > 1""",
    "two clips of one source overlap": """
        select clip_id as id, concat('begins at ', start, ' before ', previous) as found from (
            select clip_id, start, lag("end") over (partition by source_id order by start, clip_id) as previous, origin_id from clips)
        where origin_id is null and start < previous - 1e-6""",
    "a kept clip lacks its description": """
        select clip_id as id, 'sha256, bytes, frames, width, height and a span are required' as found from clips
        where state = 'kept' and (sha256 is null or bytes is null or frames is null or width is null or height is null
            or not "end" > start)""",
}


@dataclass
class Report:
    """What `verify` found.

    Attributes:
        checked: how many of each thing were looked at.
        broken: promises that do not hold, as (promise, id or file, what was found).
        notes: what is worth knowing and breaks nothing, such as sources still pending and orphans of killed runs.
    """

    checked: dict[str, int] = field(default_factory=dict)
    broken: list[tuple[str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every promise holds."""
        return not self.broken


def verify(storage: Storage | str, fast: bool = False) -> Report:
    """Check a dataset.

    Args:
        storage: the dataset, or its path or URI.
        fast: check the tables, and that the shards are there in their stated sizes, without reading the shards.

    Raises:
        FileNotFoundError: there is no dataset.
    """
    storage = storage if isinstance(storage, Storage) else Storage(storage)
    if not storage.list("index/sources", ".parquet"):
        raise FileNotFoundError(
            f"{storage.uri} holds no dataset (no parts below index/sources); build one with `videofactory build`"
        )
    index = Index(storage, skip_damaged=True)
    report = Report(checked={"sources": len(index.sources()), "clips": len(index.clips())})
    for promise, sql in _LAWS.items():
        report.broken += [(promise, row["id"], str(row["found"])) for row in index.query(sql).to_pylist()]
    pending = len(index.incomplete())
    if pending:
        report.notes.append(f"{pending} sources are pending; the same build command goes on with them")
    kept = index.query(_KEPT).to_pylist()
    report.checked["kept"] = len(kept)
    _check_embeddings(index, kept, report)
    _check_shards(index, kept, report, fast)
    _check_shard_list(index, report)
    report.broken += [("a part of the index cannot be read", name, reason) for name, reason in sorted(index.damaged.items())]
    leftovers = storage.leftovers()
    if leftovers:
        size = sum(entry.size for entry in leftovers)
        report.notes.append(f"{len(leftovers)} temporary files ({size} bytes) are of a killed run, or of one still running")
    return report


def _check_embeddings(index: Index, kept: list[dict[str, Any]], report: Report) -> None:
    if not index.storage.list(EMBEDDINGS, ".parquet"):
        return
    embedded = set(index.embeddings()["clip_id"].to_pylist())
    # A sidecar has the name of its part, with which the shard's name begins; one that cannot be read is named once, as such.
    unread = {
        f"{SHARDS}/{name.removeprefix(EMBEDDINGS + '/').removesuffix('.parquet')}"
        for name in index.damaged
        if name.startswith(EMBEDDINGS + "/")
    }
    expected = {row["clip_id"] for row in kept if str(row["shard"]).rpartition("-")[0] not in unread}
    for missing in sorted(expected - embedded):
        report.broken.append(("a kept clip has no embedding", missing, f"not in {EMBEDDINGS}"))


def _check_shards(index: Index, kept: list[dict[str, Any]], report: Report, fast: bool) -> None:
    stated = {shard["url"]: shard for shard in index.shards()}
    present = {entry.name: entry.size for entry in index.storage.list(SHARDS, ".tar")}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in stated}
    for row in kept:
        if row["shard"] not in rows:
            report.broken.append(("a kept clip lies in a shard that no part committed", row["clip_id"], row["shard"]))
        else:
            rows[row["shard"]].append(row)
    for name, shard in stated.items():
        if present.get(name) != shard["filesize"]:
            found = f"{present[name]} bytes" if name in present else "no file"
            report.broken.append(
                ("a committed shard is missing or of another size", name, f"{found}, {shard['filesize']} stated")
            )
        elif not fast:
            _check_shard(index.storage, shard, rows[name], report)
    report.checked["shards"] = len(stated)
    orphans = sorted(set(present) - set(stated))
    if orphans:
        size = sum(present[name] for name in orphans)
        report.notes.append(
            f"{len(orphans)} shards ({size} bytes) were never committed (left by a killed run) and are never read"
        )


def _check_shard(storage: Storage, shard: dict[str, Any], rows: list[dict[str, Any]], report: Report) -> None:
    """Read one shard whole: its checksum, its members and their order, and each kept row against its sample."""
    name = shard["url"]
    try:
        content = storage.get(name)
    except OSError as error:
        report.broken.append(("a shard is no readable tar", name, str(error)))
        return
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != shard["md5sum"]:
        report.broken.append(("a shard's MD5 differs from the index", name, f"{shard['md5sum']} stated"))
    try:
        samples = list(_samples(content))
    except (tarfile.TarError, ValueError, OSError) as error:
        report.broken.append(("a shard is no readable tar", name, str(error)))
        return
    if len(samples) != shard["nsamples"]:
        report.broken.append(("a shard holds another number of samples", name, f"{len(samples)}, {shard['nsamples']} stated"))
    keys = [key for key, _, _ in samples]
    for key in sorted({key for key in keys if keys.count(key) > 1} if len(set(keys)) < len(keys) else ()):
        report.broken.append(("the members of a sample are not adjacent, or the sample is there twice", key, name))
    found = {key: (offset, members) for key, offset, members in samples}
    for row in rows:
        _check_sample(row, found.get(row["clip_id"]), report)


def _samples(content: bytes) -> Iterator[tuple[str, int, dict[str, bytes]]]:
    """The samples of a tar: key, offset of the first header, members by field. A new key begins a new sample."""
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        current: tuple[str, int, dict[str, bytes]] | None = None
        for member in tar:
            key, _, extension = _printable(member.name).partition(".")
            if current is None or current[0] != key:
                if current is not None:
                    yield current
                current = (key, member.offset, {})
            file = tar.extractfile(member)
            current[2][extension] = file.read() if file is not None else b""
        if current is not None:
            yield current


def _printable(name: str) -> str:
    """A tar name may hold bytes that are no UTF-8, which nothing can print."""
    return name.encode("utf-8", "backslashreplace").decode()


def _check_sample(row: dict[str, Any], sample: tuple[int, dict[str, bytes]] | None, report: Report) -> None:
    clip = row["clip_id"]
    if sample is None:
        report.broken.append(("a kept clip is not in its shard", clip, row["shard"]))
        return
    offset, members = sample
    video = members.get("mp4", b"")
    described = _described(members.get("json", b""))
    if described is None:
        report.broken.append(("a sample's JSON cannot be read", clip, row["shard"]))
        described = {"clip_id": clip}
    differing = [name for name, value in described.items() if name in _STORED and value != row.get(name)]
    size = sum(512 + (len(content) + 511) // 512 * 512 for content in members.values())
    for holds, promise, found in (
        (offset == row["offset"], "a sample begins elsewhere than its row says", f"{offset}, {row['offset']} stated"),
        (size == row["size"], "a sample is of another size than its row says", f"{size}, {row['size']} stated"),
        (hashlib.sha256(video).hexdigest() == row["sha256"], "a clip's SHA-256 differs from its row", f"{row['sha256']} stated"),
        (len(video) == row["bytes"], "a clip is of another length than its row says", f"{len(video)}, {row['bytes']} stated"),
        (members.get("txt", b"") == (row["caption"] or "").encode(), "a caption differs from its row", repr(row["caption"])),
        (described.get("clip_id") == clip and not differing, "a sample's JSON differs from its row", ", ".join(differing)),
    ):
        if not holds:
            report.broken.append((promise, clip, found))


def _described(content: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(content)
    except ValueError:  # of which broken JSON and text that is no UTF-8 are kinds
        return None
    return found if isinstance(found, dict) else None


# What a later amendment of the row never changes, so that the JSON inside the shard must still say it.
_STORED = ("clip_id", "source_id", "start", "end", "frames", "width", "height", "codec", "bytes", "sha256", "caption")


def _check_shard_list(index: Index, report: Report) -> None:
    """`shards.json` is derived; where it exists it must say what the index says."""
    if not index.storage.exists("shards.json"):
        return
    derive = "run `videofactory report` to derive it again"
    try:
        listed = listed_shards(index.storage)
    except (ValueError, OSError) as error:
        report.broken.append(("shards.json cannot be read", "shards.json", f"{error}; {derive}"))
        return
    known = index.shards()
    lost = [shard["url"] for shard in listed if shard["url"] not in {shard["url"] for shard in known}]
    for name in lost:
        found = (
            "its index part is gone or damaged; put it back from a copy, or run the same build command to make the clips again"
        )
        report.broken.append(("shards.json names a shard that the index does not", str(name), found))
    if listed != known and not lost and not len(index.incomplete()):
        report.broken.append(("shards.json differs from the index", "shards.json", derive))
