"""Everything about one source, in one place: fetch it, analyse it, judge its shots, commit the record, cut what is kept.

The source is decoded once. What the pass found is committed before anything is cut, so neither a restart nor changed rules
decode it again; given the record, the rows that follow are the same whenever the step runs again.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from videofactory.shards.schema import CAPTION_SIMILARITY, STEPS, Step, clip_id, clip_schema, source_schema, split_of
from videofactory.shards.storage import Storage
from videofactory.shards.writer import SOURCES, THUMBNAILS, put_record, put_thumbnails, read_record

from .analysis import Analysis, AnalysisSettings, analyse_guarded
from .cut import ClipSettings, cut
from .guard import Guard, GuardLimits, MediaError, shared_guard
from .rules import Rules
from .signals import columns as signal_columns
from .sources import local_path

ATTEMPTS = "index/attempts"

CARRIED = ("source_id", "uri", "attempt", "title", "uploader", "license", "upload_date", "webpage_url", "extra")
"""Columns of `sources` that are known before a source is opened."""

_COPY_BLOCK = 8 << 20


@dataclass(frozen=True)
class Ingest:
    """The step `source row -> rows of kept clips with their bytes`, for one source at a time.

    Attributes:
        storage: the dataset, where records are committed.
        run: id of the run (`Lease.run`).
        analysis, clips: how sources are analysed and clips are cut.
        rules: conditions in SQL by name, in order.
        steps: the steps of the recipe, for the rules.
        val, test: fractions of sources for validation and test.
        decode_seconds, cut_seconds: wall-clock limits of one analysis and one cut.
        decode_memory: address space of the decoding child in bytes.
        worker_deaths: the attempt at which a source that keeps killing its worker becomes an error row.
        thumbnails: whether to keep a small picture of every candidate.
        round: which pass over the sources of this run it is; attempts count per round.
    """

    storage: Storage
    run: str
    analysis: AnalysisSettings
    clips: ClipSettings
    rules: Mapping[str, str]
    steps: tuple[Step, ...] = STEPS
    val: float = 0.0
    test: float = 0.0
    decode_seconds: float = 3600
    cut_seconds: float = 600
    decode_memory: int = 3 << 30
    worker_deaths: int = 3
    thumbnails: bool = True
    round: int = 1

    def __call__(self, source: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Rows of `travelling_schema` for the clips of `source` that are still to be written, in order of time.

        Args:
            source: a row of `sources`; with `candidates` (rows of `clips`) when a record of it exists, which then is not made again.

        A clip that cannot be cut is a row with its error. A source that cannot be read leaves a failed record and no row.
        Only a failing output raises.
        """
        pending = source.get("candidates")
        if pending is None:
            pending = self._recorded(source)
        with self._counted(source) as deaths, self._fetching(source) as fetch:
            if deaths >= self.worker_deaths:
                yield from self._given_up(source, pending)
                return
            if pending is None:
                pending = self._record(source, fetch)
            for row in pending:
                yield self._cut(row, fetch)

    @contextlib.contextmanager
    def _counted(self, source: Mapping[str, Any]) -> Iterator[int]:
        """How often a worker has died over this source in this round; the marker of this attempt goes when it ends well."""
        marker = f"{ATTEMPTS}/{self.run}-{self.round}-{source['source_id']}"
        deaths = 0
        while deaths < self.worker_deaths and self.storage.exists(f"{marker}.{deaths}"):
            deaths += 1
        self.storage.put(f"{marker}.{deaths}", b"")
        yield deaths
        for number in range(deaths + 1):
            self.storage.delete(f"{marker}.{number}")

    def _recorded(self, source: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        """What is still to be cut, when an earlier attempt of this run committed the record and died afterwards."""
        name = f"{SOURCES}/{self.run}-{source['source_id']}-{source['attempt']}.parquet"
        candidates = read_record(self.storage, name)
        return None if candidates is None else [row for row in candidates if row["rejected_by"] is None]

    @contextlib.contextmanager
    def _fetching(self, source: Mapping[str, Any]) -> Iterator[_Fetch]:
        with tempfile.TemporaryDirectory(prefix="videofactory-source-") as folder:
            yield _Fetch(source["uri"], Path(folder), source.get("sha256"))

    def _record(self, source: Mapping[str, Any], fetch: _Fetch) -> list[dict[str, Any]]:
        """Analyse, judge, commit; returns the candidates that every rule so far keeps."""
        row = {name: source.get(name) for name in CARRIED}
        schema = source_schema([column.name for column in signal_columns()])
        try:
            path = fetch()
            analysis = analyse_guarded(path, self.analysis, self._guard(), seconds=self.decode_seconds)
            candidates = candidate_rows(source["source_id"], analysis, self.rules, self.steps)
        except Exception as caught:  # noqa: BLE001 - whatever one file brings about costs one row, never the run
            error = _as_media_error(caught, "analysis_failed", source["uri"])
            failed = {"status": "failed", "error_class": error.error_class, "error": str(error), "retryable": error.retryable}
            put_record(self.storage, self.run, {**row, **failed}, [], schema)
            return []
        # The address of a file is this machine's alone: its bytes divide it alike everywhere, and equal files the same way.
        sha256 = fetch.sha256()
        split = split_of(source["source_id"] if local_path(source["uri"]) is None else sha256, self.val, self.test)
        candidates = [{**row, "split": split} for row in candidates]
        probe = analysis.probe
        done = {
            "status": "done",
            "n_clips": len(candidates),
            "duration": probe.duration,
            "width": probe.width,
            "height": probe.height,
            "fps": probe.fps,
            "codec": probe.codec,
            "sha256": sha256,
            "analysed_with": analysis.analysed_with,
        }
        if self.thumbnails:
            pictures = {row["clip_id"]: shot.thumbnail for row, shot in zip(candidates, analysis.shots, strict=True)}
            put_thumbnails(self.storage, f"{THUMBNAILS}/{self.run}-{source['source_id']}.parquet", pictures)
        put_record(self.storage, self.run, {**row, **done}, candidates, schema)
        return [row for row in candidates if row["rejected_by"] is None]

    def _cut(self, row: dict[str, Any], fetch: _Fetch) -> dict[str, Any]:
        """The candidate `row` as a clip with its bytes, or with the error that kept it from becoming one."""
        try:
            clip = cut(fetch(), row["start"], row["end"], self.clips, seconds=self.cut_seconds, guard=self._guard())
        except Exception as caught:  # noqa: BLE001 - as for the analysis
            error = _as_media_error(caught, "cut_failed", row["clip_id"])
            return {**row, "error_class": error.error_class, "error": str(error)}
        finished = {
            **row,
            "duration": clip.duration,
            "frames": clip.frames,
            "width": clip.width,
            "height": clip.height,
            "fps": clip.fps,
            "codec": clip.codec,
            "has_audio": clip.has_audio,
            "bytes": len(clip.video),
            "sha256": hashlib.sha256(clip.video).hexdigest(),
            "lead_in_bytes": clip.lead_in_bytes,
        }
        if (verdict := judge([finished], self.rules, self.steps, "cut")[0]) is not None:
            return {**finished, "rejected_by": verdict}
        return {**finished, "video": clip.video, "middle_frame": clip.middle_frame}

    def _given_up(self, source: Mapping[str, Any], pending: Sequence[dict[str, Any]] | None) -> Iterator[dict[str, Any]]:
        """Error rows for a source over which worker after worker died."""
        error = {
            "error_class": "worker_died",
            "error": f"the worker process died {self.worker_deaths} times over this source, outside the guarded decoder; "
            "look for the kernel's out-of-memory messages, or try again with --retry worker_died",
        }
        if pending is None:
            row = {name: source.get(name) for name in CARRIED}
            schema = source_schema([column.name for column in signal_columns()])
            put_record(self.storage, self.run, {**row, **error, "status": "failed", "retryable": True}, [], schema)
            return
        for row in pending:
            yield {**row, **error}

    def _guard(self) -> Guard:
        return shared_guard(GuardLimits(memory_bytes=self.decode_memory))


class _Fetch:
    """The source as a local file, fetched when it is first needed."""

    def __init__(self, uri: str, folder: Path, expected: str | None) -> None:
        self._uri = uri
        self._folder = folder
        self._expected = expected
        self._path: Path | None = None
        self._error: MediaError | None = None

    def __call__(self) -> Path:
        """Path of the file.

        Raises:
            MediaError: it is not there, or not what was analysed (`source_changed`).
        """
        if self._error is not None:
            raise self._error
        if self._path is None:
            try:
                self._path = self._checked(self._local())
            except MediaError as error:
                self._error = error
                raise
        return self._path

    def _local(self) -> Path:
        path = local_path(self._uri)
        if path is None:
            return self._download()
        try:
            path.stat()
        except FileNotFoundError:
            raise MediaError("not_found", f"{path.name} does not exist (any more)", retryable=True) from None
        except OSError as error:
            raise MediaError("unreadable", f"{path.name} cannot be read: {error.strerror}") from None
        return path

    def _checked(self, path: Path) -> Path:
        if self._expected is not None and _sha256(path) != self._expected:
            raise MediaError(
                "source_changed",
                f"{path.name} is not the file that was analysed (its SHA-256 differs); "
                "bring the old one back, or add the new one under another name",
            )
        return path

    def sha256(self) -> str:
        """SHA-256 of the file."""
        return _sha256(self())

    def _download(self) -> Path:
        """Copy an object of an object store next to the decoder."""
        if self._uri.startswith("invalid:"):
            raise MediaError("unsupported_address", f"{self._uri.removeprefix('invalid:')} is no address")
        try:
            filesystem, remote = fs.FileSystem.from_uri(self._uri)
        except (OSError, ValueError, pa.ArrowException):
            scheme = self._uri.partition("://")[0]
            raise MediaError(
                "unsupported_address",
                f"addresses of scheme {scheme!r} cannot be fetched; name files, folders or object stores (s3, gs, abfs)",
            ) from None
        target = self._folder / "source"
        try:
            with filesystem.open_input_stream(remote) as stream, target.open("wb") as file:
                while block := stream.read(_COPY_BLOCK):
                    file.write(block)
        except FileNotFoundError:
            raise MediaError("not_found", f"{self._uri} does not exist", retryable=True) from None
        except OSError as error:
            raise MediaError("fetch_failed", f"{self._uri} cannot be fetched: {error}") from None
        return target


def candidate_rows(
    source: str, analysis: Analysis, rules: Mapping[str, str], steps: tuple[Step, ...] = STEPS
) -> list[dict[str, Any]]:
    """The shots of an analysis as rows of `clips`, judged by the rules that need nothing but the analysis.

    Args:
        source: a source id.
        analysis: of that source.
        rules: conditions in SQL by name, in order.
        steps: the steps of the recipe that the rules belong to.
    """
    probe = analysis.probe
    rows: list[dict[str, Any]] = [
        {
            "clip_id": clip_id(source, max(0.0, shot.start - probe.start)),
            "source_id": source,
            "start": shot.start,
            "end": shot.end,
            "duration": shot.end - shot.start,
            "frames": shot.frames,
            "width": probe.width,
            "height": probe.height,
            "fps": probe.fps,
            **shot.signals,
        }
        for shot in analysis.shots
    ]
    return [{**row, "rejected_by": verdict} for row, verdict in zip(rows, judge(rows, rules, steps, "analyse"), strict=True)]


def judge(rows: Sequence[Mapping[str, Any]], rules: Mapping[str, str], steps: tuple[Step, ...], step: Step) -> list[str | None]:
    """What the rules of `step` say of each row: `Rules.judge` on rows of `clips`."""
    names = [*(column.name for column in signal_columns()), CAPTION_SIMILARITY.name]
    schema = clip_schema(names)
    table = pa.Table.from_pylist([{name: row.get(name) for name in schema.names} for row in rows], schema=schema)
    return rules_of(tuple(rules.items()), steps).judge(table, [step])


def _as_media_error(error: Exception, error_class: str, what: str) -> MediaError:
    if isinstance(error, MediaError):
        return error
    return MediaError(error_class, f"{what}: {type(error).__name__}: {error}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=8)
def rules_of(rules: tuple[tuple[str, str], ...], steps: tuple[Step, ...]) -> Rules:
    """`Rules`, made once per process: parsing costs more than judging."""
    return Rules(dict(rules), signal_columns(), steps)
