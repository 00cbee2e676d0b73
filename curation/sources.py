"""From what a user names to rows of `sources`: files, folders, lists, tables and object stores, each source once.

Nothing is opened here but lists and tables: whether a file is a video is found out where it is decoded.
"""

from __future__ import annotations

import codecs
import csv
import errno
import json
import logging
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote, unquote_to_bytes, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from videofactory.shards.schema import source_id

_log = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .m2ts .mts .ts .flv .f4v .wmv .asf .ogv .ogg .3gp .3g2 .mxf .vob".split()  # noqa: SIM905
)
"""Files that a folder contributes; a file named by itself is taken whatever its ending."""

_LISTS = frozenset((".txt", ".csv", ".tsv", ".parquet", ".jsonl"))
_COLUMNS = ("path", "url", "uri")
_OWN_COLUMNS = ("title", "uploader", "license", "upload_date", "webpage_url")
_SPELLINGS = {"licence": "license"}
_OBJECT_STORES = ("s3", "gs", "gcs", "abfs", "abfss")
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)  # `clip:1.mp4` is a file, and a single letter is a drive
_UNFIT = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # control characters, and what is no character at all


class SourcesError(Exception):
    """What was named cannot be turned into sources; the message names it and the way out."""


def find_sources(named: Iterable[str], stdin: TextIO | None = None) -> list[dict[str, Any]]:
    """Rows of `sources` for everything named, in order, each source once.

    A row has `source_id`, `uri`, `attempt` 1, the columns `title`, `uploader`, `license`, `upload_date` and `webpage_url`, as text,
    where a table has them (in any case; `licence`, too), and in `extra` a JSON object of the table's other columns.

    Args:
        named: video files, folders (searched below), `-` for addresses on standard input, `.txt` lists, `.csv`, `.tsv`,
            `.parquet` and `.jsonl` tables with a column `path`, `url` or `uri`, and object-store URIs of files or folders. A scheme
            ends with `://`; anything else is a file name. Relative paths in a list count from the list's folder. What a list names
            need not be there, and its empty rows are passed over. An address in a list that cannot be one is a source, too, with
            the URI `invalid:` and its text, so that it ends as an error and the other rows go on.
        stdin: what `-` reads; standard input unless given.

    Raises:
        SourcesError: something named is not there or cannot be read as what it seems to be, or nothing was found at all.
    """
    rows: dict[str, dict[str, Any]] = {}
    named = list(named)
    for name in named:
        for uri, columns in _expand(name, stdin):
            row = _source(uri, columns)
            rows.setdefault(row["source_id"], row)
    if not rows:
        raise SourcesError(
            "no video was found in "
            + (", ".join(repr(name) for name in named) or "an empty list")
            + f"; folders are searched for files ending in {' '.join(sorted(VIDEO_SUFFIXES))}"
        )
    return list(rows.values())


def canonical_uri(address: str) -> str:
    """One spelling per source, so that its id is stable: local files as absolute `file://` URIs, links resolved.

    Raises:
        SourcesError: nothing can have this address (a NUL byte, the home of an unknown user, no host that can be).
    """
    scheme = _scheme(address)
    try:
        if scheme in ("", "file"):
            return (_path(address) if scheme else Path(address).expanduser()).resolve().as_uri()
        if unfit := _UNFIT.search(address):
            raise ValueError(f"it contains {unfit[0]!r}")
        parts = urlsplit(address)
    except (OSError, ValueError, RuntimeError) as error:
        way_out = "; put ./ before the name of a file that begins with ~" if address.startswith("~") else ""
        raise SourcesError(f"{address!r} is no address of a file or a video: {error}{way_out}") from None
    return parts._replace(scheme=scheme, fragment="").geturl()


def local_path(uri: str) -> Path | None:
    """The path behind a `file://` URI, or `None` for another scheme. A name need not be UTF-8: its bytes are kept."""
    return _path(uri) if _scheme(uri) == "file" else None


def _path(uri: str) -> Path:
    return Path(os.fsdecode(unquote_to_bytes(os.fsencode(urlsplit(uri).path))))


def _scheme(address: str) -> str:
    found = _SCHEME.match(address)
    return found[1].lower() if found else ""


def _source(uri: str, columns: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `sources` from the columns that came with an address: ours as text, the others in `extra`."""
    own: dict[str, str | None] = dict.fromkeys(_OWN_COLUMNS)
    extra: dict[str, Any] = {}
    for name, value in columns.items():
        plain = name.strip().lower()
        column = _SPELLINGS.get(plain, plain)
        if column in own and own[column] is None:
            own[column] = _text(value)
        else:
            extra[name] = value
    text = _encodable(json.dumps(extra, ensure_ascii=False, sort_keys=True, default=str)) if extra else None
    return {"source_id": source_id(uri), "uri": uri, "attempt": 1, **own, "extra": text}


def _text(value: Any) -> str | None:
    """A cell as text; `None` for an empty one."""
    if isinstance(value, float):
        if math.isnan(value):  # what tables of numbers have for nothing
            return None
        value = int(value) if value.is_integer() else value  # the date 20240131 in a column with gaps
    if isinstance(value, list | dict):
        value = json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    return _encodable(str(value)) or None


def _encodable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def _expand(name: str, stdin: TextIO | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """URIs, and the columns that come with them, of one thing named."""
    if name == "-":
        for number, address in _lines(_standard_input(stdin or sys.stdin)):
            yield from ((uri, {}) for uri in _listed(address, Path.cwd(), f"standard input, row {number}"))
        return
    uri = canonical_uri(name)
    path = local_path(uri)
    if path is None:
        yield from ((found, {}) for found in (_object_store(uri) if _scheme(uri) in _OBJECT_STORES else [uri]))
        return
    try:
        there = path.exists()
    except OSError as error:
        raise SourcesError(f"{name!r} cannot be opened: {error.strerror}") from None
    if not there:
        raise SourcesError(f"{name!r} does not exist; name video files, folders, lists (.txt .csv .tsv .parquet .jsonl) or `-`")
    if path.is_dir():
        yield from ((found, {}) for found in _folder(path))
    elif path.suffix.lower() in _LISTS:
        yield from _list(path)
    else:
        yield uri, {}


def _standard_input(stdin: TextIO) -> str:
    """All of it; names of files that are not UTF-8 keep their bytes."""
    buffer = getattr(stdin, "buffer", None)
    return stdin.read() if buffer is None else os.fsdecode(buffer.read())


def _folder(path: Path) -> list[str]:
    try:
        return [
            canonical_uri(str(file))
            for file in sorted(path.rglob("*"))
            if file.suffix.lower() in VIDEO_SUFFIXES and file.is_file()
        ]
    except OSError as error:
        raise SourcesError(f"folder {str(path)!r} cannot be searched: {error}") from None


def _list(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a list or a table."""
    kind = path.suffix.lower()[1:]
    addresses: list[tuple[int, str, dict[str, Any]]]
    try:
        if kind == "txt":
            addresses = [(number, text, {}) for number, text in _lines(_text_file(path))]
        elif kind == "parquet":
            with path.open("rb") as file:
                addresses = list(_table(enumerate(pq.read_table(file).to_pylist(), 1), path))
        elif kind == "jsonl":
            addresses = list(_table(_json_rows(path), path))
        else:
            addresses = list(_table(_csv_rows(path, "\t" if kind == "tsv" else ","), path))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise SourcesError(f"{str(path)!r} cannot be read as {kind}: {error}") from None
    for number, address, columns in addresses:
        yield from ((uri, columns) for uri in _listed(address, path.parent, f"{str(path)!r}, row {number}"))


def _text_file(path: Path) -> str:
    """A `.txt` list; names of files that are not UTF-8 keep their bytes."""
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("it is UTF-16; save it as UTF-8")
    return os.fsdecode(content)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):  # splitlines would part names at U+2028, too
        if (address := line.strip()) and not address.startswith("#"):
            yield number, address


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise SourcesError(f"{str(path)!r}, row {number} cannot be read as jsonl: {error}") from None


def _csv_rows(path: Path, comma: str) -> Iterator[tuple[int, dict[str, str]]]:
    number = 0
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, delimiter=comma, strict=True)
        try:
            header = next((values for values in reader if values), [])
            for values in filter(None, reader):
                if len(values) != len(header):
                    raise csv.Error(f"it has {len(values)} values and the header {len(header)} columns")
                number += 1
                yield number, dict(zip(header, values, strict=True))
        except csv.Error as error:
            hint = "is a quote missing, or a delimiter in a value without quotes?"
            raise SourcesError(f"{str(path)!r}, row {number + 1} (up to line {reader.line_num}): {error}; {hint}") from None


def _table(rows: Iterable[tuple[int, Any]], path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Number, address and other columns of the rows that name something."""
    for number, row in rows:
        place = f"{str(path)!r}, row {number}"
        if not isinstance(row, dict):
            raise SourcesError(f"{place}: {row!r} is no object with columns")
        column = next((name for name in row if name.strip().lower() in _COLUMNS), None)
        if column is None:
            raise SourcesError(f"{place} has no column {' or '.join(_COLUMNS)}; it has {', '.join(row) or 'none'}")
        address = row[column]
        if not isinstance(address, str):
            raise SourcesError(f"{place}: {column} is {address!r}, not the text of an address")
        if address:
            yield number, address, {name: value for name, value in row.items() if name != column and value is not None}


def _listed(text: str, folder: Path, place: str) -> list[str]:
    """URIs of what a row of a list names; an address that cannot be one is kept as `invalid:` so that it ends as an error row."""
    try:
        return _of_row(text, folder, place)
    except SourcesError as error:
        _log.warning("%s: %s; it will be a failed source", place, error)
        return ["invalid:" + quote(text, safe="/:~[]@!$&'()*+,;=", errors="surrogatepass")]


def _of_row(text: str, folder: Path, place: str) -> list[str]:
    address = text.strip() if _scheme(text.strip()) else text
    if not _scheme(address) and not address.startswith("~"):
        address = str(folder / address)
    uri = canonical_uri(address)
    path = local_path(uri)
    if path is not None:
        return _folder(path) if _is_folder(path) else [uri]
    if _scheme(uri) in _OBJECT_STORES and Path(urlsplit(uri).path).suffix.lower() not in VIDEO_SUFFIXES:
        try:
            return _object_store(uri)
        except SourcesError as error:
            _log.warning("%s: %s", place, error)  # it may be there when it is fetched
    return [uri]


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise SourcesError(f"{str(path)!r} is no address of a file: {error.strerror}") from None
        return False  # it may be reachable when it is decoded


def _object_store(uri: str) -> list[str]:
    """The videos below an object-store URI, or the object itself."""
    try:
        filesystem, path = fs.FileSystem.from_uri(uri)
        if filesystem.get_file_info(path).type == fs.FileType.File:
            return [uri]
        found = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise SourcesError(f"{uri!r} cannot be listed: {error}") from None
    base = urlsplit(uri)
    return [
        base._replace(path=info.path[len(base.netloc) :] if info.path.startswith(base.netloc) else "/" + info.path).geturl()
        for info in sorted(found, key=lambda info: str(info.path))
        if info.type == fs.FileType.File and Path(info.path).suffix.lower() in VIDEO_SUFFIXES
    ]
