"""The index: what the dataset holds, and what is still to be done. It is the ledger: a shard exists because a part names it.

Two kinds of Parquet parts hold everything. A part of `index/sources` is the record of one source (its row and the rows of its
candidate clips) or the list of sources of a run; a part of `index/clips` holds final rows. Later parts supersede earlier rows
of the same id. This module is the one place that knows it: it offers `sources` and `clips` as tables with one row per id.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from .lease import committing
from .schema import CORE_CLIP_FIELDS, clip_schema, conform, source_schema, table_of
from .storage import Storage
from .writer import CLIPS, EMBEDDINGS, SOURCES, put_table, read_models, read_summary

# Of each source the latest attempt counts, and within it the outcome, not the note that it was begun.
_SOURCES_VIEW = """
create or replace view latest_sources as
    select * from source_parts
    qualify row_number() over (partition by source_id order by attempt desc, status = 'pending', part desc) = 1
"""

# A final row supersedes the candidate row of the record; among final rows the later part wins.
_CLIPS_VIEW = """
create or replace view clips as
    with candidates as (
        select '' as part, unnest(candidates, max_depth := 2) from latest_sources where candidates is not null
    ),
    latest as (
        select * from (select * from clip_parts union all by name select * from candidates)
        qualify row_number() over (partition by clip_id order by part desc) = 1
    )
    select * exclude (part),
        case when rejected_by is not null then 'rejected'
             when error_class is not null then 'failed'
             when shard is not null then 'kept'
             else 'pending' end as state
    from latest
"""

_SOURCES_PUBLIC = """
create or replace view sources as
    select s.* exclude (candidates, part, status),
        case when s.status = 'done' and coalesce(p.pending, 0) > 0 then 'pending' else s.status end as status
    from latest_sources s
    left join (select source_id, count(*) as pending from clips where state = 'pending' group by 1) p using (source_id)
"""

_REQUIRED = {SOURCES: {"source_id", "uri", "attempt", "status"}, CLIPS: {"clip_id", "source_id"}, EMBEDDINGS: {"clip_id"}}

# So many parts become one chunk: enough that a chunk costs nothing, few enough that its columns stay below 2 GiB.
_CHUNK = 4096


class IndexDamagedError(Exception):
    """A part of the index cannot be read.

    Attributes:
        part: its name below the dataset's root.
        reason: what was found.
    """

    def __init__(self, part: str, reason: str) -> None:
        super().__init__(part, reason)
        self.part = part
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"{self.part} cannot be read: {self.reason}; `videofactory verify` names everything that is damaged. Put the file "
            "back from a copy, or delete it: the same build command then does again what only this part recorded"
        )


class Index:
    """The tables of a dataset as they stand now; `refresh` reads what was committed since.

    Args:
        storage: the dataset, or its path or URI.
        skip_damaged: leave out parts that cannot be read and name them in `damaged`; only for looking, never to build on.

    Attributes:
        damaged: why each part that was left out cannot be read, by its name.

    Raises:
        IndexDamagedError: a part cannot be read.

    Views for `query`: `sources` (core columns; `status` is done, failed or pending), `clips` (core and signal columns, and
    `state`: kept, rejected, failed or pending).
    """

    def __init__(self, storage: Storage | str, skip_damaged: bool = False) -> None:
        self.storage = storage if isinstance(storage, Storage) else Storage(storage)
        self.damaged: dict[str, str] = {}
        self._skip_damaged = skip_damaged
        self._names: set[str] = set()
        self._tables: dict[str, list[pa.Table]] = {SOURCES: [], CLIPS: []}
        self._connection = duckdb.connect(config={"enable_external_access": "false"})
        self.refresh()

    def refresh(self) -> None:
        """Read the parts committed since the last look; parts never change once written, except by an equal attempt."""
        for folder, tables in self._tables.items():
            names = [entry.name for entry in self.storage.list(folder, ".parquet")]
            new = [name for name in names if name not in self._names and name not in self.damaged]
            read = list(self._readable(new))
            tables += _merged(read)
            self._names.update(name for name, _ in read)
        signals = self.signals
        self._register("source_parts", SOURCES, source_schema(signals))
        self._register("clip_parts", CLIPS, clip_schema(signals))
        for view in (_SOURCES_VIEW, _CLIPS_VIEW, _SOURCES_PUBLIC):
            self._connection.execute(view)

    def _readable(self, names: Iterable[str]) -> Iterator[tuple[str, pa.Table]]:
        for name in names:
            try:
                table = _read(self.storage, name)
            except (pa.ArrowException, ValueError, OSError) as error:
                self._note_damage(name, error)
            else:
                yield name, table

    def _note_damage(self, name: str, error: Exception) -> None:
        reason = str(error).partition("\n")[0] or type(error).__name__
        if not self._skip_damaged:
            raise IndexDamagedError(name, reason) from error
        self.damaged[name] = reason

    def _register(self, view: str, folder: str, schema: pa.Schema) -> None:
        named = schema.append(pa.field("part", pa.string()))
        tables = [conform(table, named) for table in self._tables[folder]]
        self._connection.register(view, pa.concat_tables(tables) if tables else named.empty_table())

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of the signal columns that the parts hold."""
        core = {"part", *(field.name for field in CORE_CLIP_FIELDS)}
        found: dict[str, None] = {}
        for table in self._tables[SOURCES]:
            if "candidates" in table.schema.names:
                names = [field.name for field in table.schema.field("candidates").type.value_type]
                found.update(dict.fromkeys(name for name in names if name not in core))
        for table in self._tables[CLIPS]:
            found.update(dict.fromkeys(name for name in table.schema.names if name not in core))
        return tuple(found)

    def query(self, sql: str, parameters: Iterable[Any] | None = None) -> pa.Table:
        """Rows that `sql` (DuckDB's dialect) selects from the views; it can read nothing else."""
        return self._connection.sql(sql, params=list(parameters or [])).to_arrow_table()

    def sources(self) -> pa.Table:
        """One row per source."""
        return self.query("select * from sources order by source_id")

    def clips(self) -> pa.Table:
        """One row per candidate clip, with its `state`."""
        return self.query("select * from clips order by clip_id")

    def incomplete(self) -> pa.Table:
        """Sources with something left to do: never finished, or with clips that have no final row yet."""
        return self.query("select * from sources where status = 'pending' order by source_id")

    def pending_clips(self) -> pa.Table:
        """The clips that passed every rule so far and have no final row, as rows of `clips`, by source and time."""
        return conform(
            self.query("select * from clips where state = 'pending' order by source_id, start, clip_id"),
            clip_schema(self.signals),
        )

    def candidates(self) -> pa.Table:
        """The candidate rows of all records: what was known of every clip right after the analysis."""
        found = self.query("select unnest(candidates, max_depth := 2) from latest_sources where candidates is not null")
        return conform(found, clip_schema(self.signals)) if len(found) else clip_schema(self.signals).empty_table()

    def embeddings(self) -> pa.Table:
        """Image embeddings of the kept clips: `clip_id`, `embedding` (float16, unit norm), one row per clip."""
        tables = [table for _, table in self._readable(entry.name for entry in self.storage.list(EMBEDDINGS, ".parquet"))]
        if not tables:
            return pa.table({"clip_id": pa.array([], pa.string()), "embedding": pa.array([], pa.list_(pa.float16()))})
        joined = pa.concat_tables(tables)
        kept = {row["clip_id"]: None for row in self.query("select clip_id from clips where state = 'kept'").to_pylist()}
        last = {clip: place for place, clip in enumerate(joined["clip_id"].to_pylist()) if clip in kept}
        return joined.take(pa.array(sorted(last.values()), pa.int64()))

    def shards(self) -> list[dict[str, Any]]:
        """The committed shards, as `wids-shard-index-v1` describes them (`url` below the dataset's root)."""
        found = []
        for name in self._clip_parts():
            try:
                summary = read_summary(self.storage, name.removeprefix(CLIPS + "/").removesuffix(".parquet"))
            except (pa.ArrowException, ValueError, TypeError, OSError) as error:
                self._note_damage(name, error)
                continue
            if summary and summary.shard:
                described = {"nsamples": summary.nsamples, "filesize": summary.filesize, "md5sum": summary.md5sum}
                found.append({"url": summary.shard, **described})
        return found

    def _clip_parts(self) -> list[str]:
        return sorted(name for name in self._names if name.startswith(CLIPS + "/"))

    def models(self) -> dict[str, str]:
        """Which model made which column, over all parts; differing answers are joined by ` | `."""
        answers: dict[str, dict[str, None]] = {}
        for name in self._clip_parts():
            for column, model in read_models(self.storage, name.removeprefix(CLIPS + "/").removesuffix(".parquet")).items():
                answers.setdefault(column, {})[model] = None
        return {column: " | ".join(models) for column, models in answers.items()}


def _read(storage: Storage, name: str) -> pa.Table:
    """One part, without its metadata; every error that a damaged file can cause is one of Arrow's, a ValueError or an OSError."""
    with storage.open(name) as file:
        table = pq.ParquetFile(file).read().replace_schema_metadata(None)
    table.validate(full=True)  # text that is no UTF-8 would fail later, far from its cause
    if missing := _REQUIRED[name.rpartition("/")[0]] - set(table.schema.names):
        raise ValueError(f"it lacks the columns {', '.join(sorted(missing))}")
    return table


def _merged(parts: Iterable[tuple[str, pa.Table]]) -> list[pa.Table]:
    """Parts of equal schema as one table of one chunk, with the column `part`: work per column and chunk is done once for all."""
    groups: list[tuple[list[str], list[pa.Table]]] = []
    for name, table in parts:
        alike = (group for group in groups if len(group[0]) < _CHUNK and group[1][0].schema.equals(table.schema))
        names, tables = next(alike, ([], []))
        if not names:
            groups.append((names, tables))
        names.append(name.rpartition("/")[2])
        tables.append(table)
    merged = []
    for names, tables in groups:
        lengths = zip(names, map(len, tables), strict=True)
        column = pa.chunked_array([pa.repeat(name, length) for name, length in lengths], pa.string())
        merged.append(pa.concat_tables(tables).append_column("part", column).combine_chunks())
    return merged


def listed_shards(storage: Storage) -> list[dict[str, Any]]:
    """What `shards.json` lists; nothing when it is not there.

    Raises:
        ValueError: it is damaged.
    """
    if not storage.exists("shards.json"):
        return []
    try:
        shards = list(json.loads(storage.get("shards.json"))["shardlist"])
        for shard in shards:
            str(shard["url"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"no shard list: {error!r}") from error
    return shards


def add_sources(storage: Storage, run: str, rows: list[Mapping[str, Any]]) -> None:
    """Note that sources went in: rows of `sources`, status pending, under the name of this run. No row: nothing is written."""
    if rows:
        noted = [{**row, "status": "pending"} for row in rows]
        with committing(storage, run):
            put_table(storage, f"{SOURCES}/{run}-inputs.parquet", table_of(noted, source_schema([])))


def amend_clips(storage: Storage, run: str, when: Literal["before", "after"], changed: pa.Table, signals: Iterable[str]) -> None:
    """Supersede clip rows, before or after the work of a run (changed rules, failures to try again; what could not be done).

    The shards stay as they are.
    """
    if len(changed):
        # These names sort before and after the parts of the run's rounds (1, 2).
        name = f"{CLIPS}/{run}-{'0' if when == 'before' else '9'}-amended.parquet"
        with committing(storage, run):
            put_table(storage, name, conform(changed, clip_schema(signals)))


def shard_list(index: Index, name: str) -> dict[str, Any]:
    """The content of `shards.json` (kind `wids-shard-index-v1`, as the wids readers of WebDataset take it)."""
    return {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": name, "shardlist": index.shards()}
