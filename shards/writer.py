"""Write one shard: a tar of samples, then the index part that commits it.

The order is the guarantee. The tar is completed under a name of its own (no two attempts share one), then the sidecar of
embeddings is put, then the Parquet part that names both. A tar that no part names was never committed and is never read.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import tarfile
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .lease import committing
from .schema import PAYLOAD_FIELDS, clip_schema, table_of
from .storage import Storage

CLIPS = "index/clips"
SOURCES = "index/sources"
EMBEDDINGS = "index/embeddings"
THUMBNAILS = "index/thumbnails"
SHARDS = "shards"

_SHARD_KEY = b"videofactory.shard"
_MODELS_KEY = b"videofactory.models"


@dataclass(frozen=True)
class ShardSummary:
    """What a committed part says of its shard; `shard` is `None` when no row of the part had bytes to store."""

    shard: str | None
    nsamples: int
    filesize: int
    md5sum: str


class ShardWriter:
    """Writes the rows of one bundle; nothing is visible before `commit`.

    Args:
        storage: the dataset.
        run: id of the run (`Lease.run`).
        part: name of the index part to commit, without its ending; unique per bundle, equal for all attempts at it.
        signals: names of the signal columns.
        models: which model made which column, kept in the part's metadata (never in a column's name).
    """

    def __init__(
        self, storage: Storage, run: str, part: str, signals: Iterable[str], models: Mapping[str, str] | None = None
    ) -> None:
        self._storage = storage
        self._run = run
        self._part = part
        self._schema = clip_schema(signals)
        self._models = dict(models or {})
        self._rows: list[dict[str, Any]] = []
        self._embeddings: list[tuple[str, Any]] = []
        self._shard = f"{SHARDS}/{part}-{uuid.uuid4().hex[:8]}.tar"
        self._open = contextlib.ExitStack()
        self._tar: tarfile.TarFile | None = None
        self._stream: _CountingStream | None = None
        self._nsamples = 0

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a final row; with bytes in `video` it becomes a sample of the shard, without (an error, a late rejection) only a row."""
        record = {name: row.get(name) for name in self._schema.names}
        video = row.get("video")
        if video is not None:
            record["offset"], record["size"] = self._add_sample(record, video)
            record["shard"] = self._shard
            self._nsamples += 1
            if row.get("embedding") is not None:
                self._embeddings.append((str(record["clip_id"]), row["embedding"]))
        self._rows.append(record)

    def _add_sample(self, record: Mapping[str, Any], video: bytes) -> tuple[int, int]:
        if self._tar is None:
            self._stream = _CountingStream(self._open.enter_context(self._storage.create(self._shard)))
            self._tar = self._open.enter_context(tarfile.open(fileobj=self._stream, mode="w", format=tarfile.USTAR_FORMAT))  # noqa: SIM115 - the stack closes it
        offset = self._tar.offset
        key = record["clip_id"]
        for name, content in sample_members(key, record, video):
            member = tarfile.TarInfo(name)  # mtime 0, no owner: two attempts at one bundle give equal bytes
            member.size, member.mode = len(content), 0o444
            self._tar.addfile(member, io.BytesIO(content))
        return offset, self._tar.offset - offset

    def commit(self) -> ShardSummary:
        """Complete the tar, put the part that names it, and return what was written.

        Raises:
            StaleRunError: a newer run has taken the dataset over; the tar stays behind as an orphan.
        """
        self._open.close()
        summary = ShardSummary(
            shard=self._shard if self._stream else None,
            nsamples=self._nsamples,
            filesize=self._stream.count if self._stream else 0,
            md5sum=self._stream.md5.hexdigest() if self._stream else "",
        )
        with committing(self._storage, self._run):
            if self._embeddings:
                put_table(self._storage, f"{EMBEDDINGS}/{self._part}.parquet", _embedding_table(self._embeddings))
            metadata = {_SHARD_KEY: json.dumps(summary.__dict__), _MODELS_KEY: json.dumps(self._models)}
            table = table_of(self._rows, self._schema).replace_schema_metadata(metadata)
            put_table(self._storage, f"{CLIPS}/{self._part}.parquet", table)
        return summary

    def abort(self) -> None:
        """Drop what was written so far."""
        with contextlib.suppress(BaseException):  # the error that led here is the one to report
            self._open.__exit__(RuntimeError, RuntimeError("aborted"), None)


def sample_members(key: str, row: Mapping[str, Any], video: bytes) -> list[tuple[str, bytes]]:
    """Names and contents of the tar members of a sample, in WebDataset's order (sorted by field)."""
    described = {
        name: value
        for name, value in row.items()
        if name not in ("shard", "offset", "size") and not (isinstance(value, float) and math.isnan(value))
    }
    members = [(f"{key}.json", json.dumps(described, ensure_ascii=False).encode()), (f"{key}.mp4", video)]
    if row.get("caption") is not None:
        members.append((f"{key}.txt", str(row["caption"]).encode()))
    return members


def put_table(storage: Storage, name: str, table: pa.Table) -> None:
    """Write `table` as one Parquet object, all or nothing."""
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    storage.put(name, buffer.getvalue())


def put_record(
    storage: Storage, run: str, source: Mapping[str, Any], candidates: list[dict[str, Any]], schema: pa.Schema
) -> None:
    """Commit the record of a source: its row and the rows of all its candidate clips, as one part.

    Args:
        source: a row of `sources`; its `attempt` and `source_id` name the part, so that a repeated attempt overwrites itself.
        candidates: rows of `clips`, without payload.
        schema: `source_schema(signals)`.
    """
    payload = {field.name for field in PAYLOAD_FIELDS}
    rows = [{name: value for name, value in row.items() if name not in payload} for row in candidates]
    table = table_of([{**source, "candidates": rows}], schema)
    with committing(storage, run):
        put_table(storage, f"{SOURCES}/{run}-{source['source_id']}-{source['attempt']}.parquet", table)


def read_record(storage: Storage, name: str) -> list[dict[str, Any]] | None:
    """The candidate rows of a record that `put_record` wrote as `name`, or `None` when it is not there."""
    if not storage.exists(name):
        return None
    with storage.open(name) as file:
        table = pq.read_table(file, columns=["candidates"])
    return list(table["candidates"][0].as_py() or [])


def put_thumbnails(storage: Storage, name: str, pictures: Mapping[str, bytes | None]) -> None:
    """Write a sidecar of small JPEG pictures by clip id; it is looked at, and decides nothing."""
    rows = {clip: picture for clip, picture in pictures.items() if picture is not None}
    if rows:
        put_table(storage, name, pa.table({"clip_id": list(rows), "thumbnail": pa.array(rows.values(), pa.binary())}))


def read_summary(storage: Storage, part: str) -> ShardSummary | None:
    """What a committed part says of its shard, or `None` when the part is not there (or holds rows only)."""
    name = f"{CLIPS}/{part}.parquet"
    if not storage.exists(name):
        return None
    with storage.open(name) as file:
        text = (pq.read_schema(file).metadata or {}).get(_SHARD_KEY)
    return ShardSummary(**json.loads(text)) if text else ShardSummary(None, 0, 0, "")


def read_models(storage: Storage, part: str) -> dict[str, str]:
    """Which model made which column of the part."""
    with storage.open(f"{CLIPS}/{part}.parquet") as file:
        text = (pq.read_schema(file).metadata or {}).get(_MODELS_KEY)
    return dict(json.loads(text)) if text else {}


def _embedding_table(embeddings: list[tuple[str, Any]]) -> pa.Table:
    import numpy as np

    vectors = np.stack([np.asarray(vector, dtype=np.float16) for _, vector in embeddings])
    flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    return pa.table({"clip_id": [clip for clip, _ in embeddings], "embedding": flat})


class _CountingStream(io.RawIOBase):
    """Passes bytes on, keeping their count and MD5 (which `wids-shard-index-v1` asks for) so that nothing is read twice."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream = stream
        self.count = 0
        self.md5 = hashlib.md5(usedforsecurity=False)

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.count

    def write(self, content: Any) -> int:
        self._stream.write(content)
        self.md5.update(content)
        self.count += len(content)
        return len(content)
