"""From what a user names to rows of `sources`: files, folders, lists, tables and object stores, each source once.

Nothing is opened here but lists and tables: whether a file is a video is found out where it is decoded.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from videofactory.shards.schema import source_id

VIDEO_SUFFIXES = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .m2ts .mts .ts .flv .f4v .wmv .asf .ogv .ogg .3gp .3g2 .mxf .vob".split()  # noqa: SIM905
)
"""Files that a folder contributes; a file named by itself is taken whatever its ending."""

_LISTS = frozenset((".txt", ".csv", ".tsv", ".parquet", ".jsonl"))
_COLUMNS = ("path", "url", "uri")
_OBJECT_STORES = ("s3", "gs", "gcs", "abfs", "abfss")


class SourcesError(Exception):
    """What was named cannot be turned into sources; the message names it and the way out."""


def find_sources(named: Iterable[str], stdin: TextIO | None = None) -> list[dict[str, Any]]:
    """Rows of `sources` (`source_id`, `uri`, `attempt` 1, `extra`) for everything named, in order, each source once.

    Args:
        named: video files, folders (searched below), `-` for addresses on standard input, `.txt` lists, `.csv`, `.tsv`,
            `.parquet` and `.jsonl` tables with a column `path`, `url` or `uri` (their other columns travel along in `extra`),
            and object-store URIs of files or folders. Relative paths in a list count from the list's folder.
        stdin: what `-` reads; standard input unless given.

    Raises:
        SourcesError: something named is not there or cannot be read as what it seems to be, or nothing was found at all.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name in named:
        for address, extra in _expand(name, stdin):
            row = _source(address, extra)
            rows.setdefault(row["source_id"], row)
    if not rows:
        raise SourcesError(
            "no video was found in "
            + (", ".join(repr(name) for name in named) or "an empty list")
            + f"; folders are searched for files ending in {' '.join(sorted(VIDEO_SUFFIXES))}"
        )
    return list(rows.values())


def _source(address: str, extra: dict[str, Any]) -> dict[str, Any]:
    uri = canonical_uri(address)
    text = json.dumps(extra, ensure_ascii=False, sort_keys=True, default=str) if extra else None
    return {"source_id": source_id(uri), "uri": uri, "attempt": 1, "extra": text}


def canonical_uri(address: str) -> str:
    """One spelling per source, so that its id is stable: local files as absolute `file://` URIs, links resolved."""
    parts = urlsplit(address)
    if parts.scheme in ("", "file") or len(parts.scheme) == 1:  # a single letter is a drive, not a scheme
        path = unquote(parts.path) if parts.scheme == "file" else address
        return Path(path).expanduser().resolve().as_uri()
    return parts._replace(scheme=parts.scheme.lower(), netloc=parts.netloc, fragment="").geturl()


def local_path(uri: str) -> Path | None:
    """The path behind a `file://` URI, or `None` for another scheme."""
    parts = urlsplit(uri)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


def _expand(name: str, stdin: TextIO | None) -> Iterator[tuple[str, dict[str, Any]]]:
    if name == "-":
        yield from _lines((stdin or sys.stdin).read().splitlines(), Path.cwd())
        return
    if urlsplit(name).scheme in _OBJECT_STORES:
        yield from ((address, {}) for address in _object_store(name))
        return
    if "://" in name and not name.startswith("file://"):
        yield name, {}
        return
    path = local_path(canonical_uri(name)) or Path(name)
    if path.is_dir():
        yield from (
            (str(file), {}) for file in sorted(path.rglob("*")) if file.suffix.lower() in VIDEO_SUFFIXES and file.is_file()
        )
    elif not path.exists():
        raise SourcesError(f"{name!r} does not exist; name video files, folders, lists (.txt .csv .tsv .parquet .jsonl) or `-`")
    elif path.suffix.lower() in _LISTS:
        yield from _list(path)
    else:
        yield str(path), {}


def _list(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    suffix = path.suffix.lower()
    try:
        if suffix == ".txt":
            yield from _lines(path.read_text(encoding="utf-8-sig").splitlines(), path.parent)
            return
        if suffix == ".parquet":
            rows: Iterable[Any] = pq.read_table(path).to_pylist()
        elif suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        else:
            with path.open(newline="", encoding="utf-8-sig") as file:
                rows = list(csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ","))
    except (UnicodeDecodeError, ValueError, csv.Error, pa.ArrowException) as error:
        raise SourcesError(f"{str(path)!r} cannot be read as {suffix[1:]}: {error}") from None
    yield from _table(rows, path)


def _lines(lines: Iterable[str], folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in lines:
        if (text := line.strip()) and not text.startswith("#"):
            yield _from_folder(text, folder), {}


def _table(rows: Iterable[Any], path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise SourcesError(f"{str(path)!r}, row {number}: {row!r} is no object with columns")
        column = next((name for name in row if str(name).lower() in _COLUMNS), None)
        if column is None:
            raise SourcesError(f"{str(path)!r} has no column {' or '.join(_COLUMNS)}; it has {', '.join(map(str, row))}")
        if row[column]:
            extra = {str(name): value for name, value in row.items() if name != column and value is not None}
            yield _from_folder(str(row[column]), path.parent), extra


def _from_folder(address: str, folder: Path) -> str:
    if "://" in address or Path(address).expanduser().is_absolute():
        return address
    return str(folder / address)


def _object_store(uri: str) -> list[str]:
    """The videos below an object-store URI, or the object itself."""
    try:
        filesystem, path = fs.FileSystem.from_uri(uri)
        if filesystem.get_file_info(path).type == fs.FileType.File:
            return [uri]
        found = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    except (OSError, pa.ArrowException) as error:
        raise SourcesError(f"{uri!r} cannot be listed: {error}") from None
    base = urlsplit(uri)
    return [
        base._replace(path=info.path[len(base.netloc) :] if info.path.startswith(base.netloc) else "/" + info.path).geturl()
        for info in sorted(found, key=lambda info: str(info.path))
        if info.type == fs.FileType.File and Path(info.path).suffix.lower() in VIDEO_SUFFIXES
    ]
