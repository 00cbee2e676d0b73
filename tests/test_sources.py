"""Sources: every way to name them leads to the same ids."""

from __future__ import annotations

import datetime
import io
import json
import logging
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from videofactory.curation.sources import SourcesError, canonical_uri, find_sources, local_path
from videofactory.shards.schema import CORE_SOURCE_FIELDS, source_schema, table_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.mp4", "below/b.MKV", "below/ü – c.webm", "notes.txt.bak", "below/picture.jpg"):
        path = tmp_path / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "videos"


def names(rows: list[dict[str, object]]) -> list[str]:
    return [Path(str(local_path(str(row["uri"])))).name for row in rows]


def test_folder_is_searched_below(folder: Path) -> None:
    assert names(find_sources([str(folder)])) == ["a.mp4", "b.MKV", "ü – c.webm"]


def test_each_source_once_however_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "link.mp4").symlink_to(folder / "a.mp4")
    monkeypatch.chdir(folder)
    rows = find_sources(["a.mp4", "./below/../a.mp4", "link.mp4", (folder / "a.mp4").as_uri()])
    assert len(rows) == 1 and local_path(rows[0]["uri"]) == folder / "a.mp4"


@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "jsonl", "parquet", "-"])
def test_lists_lead_to_the_same_ids(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    path = folder / f"list.{kind}"
    stdin = io.StringIO("a.mp4\n\n# a comment\nbelow/b.MKV\n")
    if kind == "txt":
        path.write_text(stdin.getvalue())
    elif kind in ("csv", "tsv"):
        comma = "," if kind == "csv" else "\t"
        path.write_text(f"title{comma}path\none{comma}a.mp4\ntwo{comma}below/b.MKV\n")
    elif kind == "jsonl":
        path.write_text('{"title": "one", "url": "a.mp4"}\n{"title": "two", "url": "below/b.MKV"}\n')
    elif kind == "parquet":
        pq.write_table(pa.table({"title": ["one", "two"], "path": ["a.mp4", "below/b.MKV"]}), path)
    rows = find_sources(["-" if kind == "-" else str(path)], stdin)
    direct = find_sources([str(folder / "a.mp4"), str(folder / "below/b.MKV")])
    assert [row["source_id"] for row in rows] == [row["source_id"] for row in direct]
    if kind not in ("txt", "-"):
        assert [(row["title"], row["extra"]) for row in rows] == [("one", None), ("two", None)]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("title\nx\n", "bad.csv", "no column path or url or uri; it has title"),
        ("not json", "bad.jsonl", "cannot be read as jsonl"),
        ("[1]", "bad.jsonl", "is no object with columns"),
        ('{"path": "a"}\n\n{"path": 5}', "bad.jsonl", r"bad\.jsonl', row 3: path is 5, not the text"),
        ('{"path": null}', "bad.jsonl", r"bad\.jsonl', row 1: path is None"),
        ('{"path": "a"}\n{"title": "b"}', "bad.jsonl", r"bad\.jsonl', row 2 has no column path or url or uri; it has title"),
        ('{"path": "a"}\n{"path": ', "bad.jsonl", r"bad\.jsonl', row 2 cannot be read as jsonl"),
        ("path,title\na,b\na,b,c\n", "bad.csv", r"bad\.csv', row 2 \(up to line 3\): it has 3 values and the header 2 columns"),
        ("path\ttitle\na\n", "bad.tsv", r"bad\.tsv', row 1 .*it has 1 values"),
        ('path,title\na,b\nc,"d\ne,f\n', "bad.csv", r"bad\.csv', row 2 .*a quote missing"),
        ('path,title\n"a"b,c\n', "bad.csv", r"bad\.csv', row 1 .*expected after"),
        ("not parquet", "bad.parquet", "cannot be read as parquet"),
        ("# nothing\n", "empty.txt", "no video was found"),
    ],
)
def test_unusable_lists(tmp_path: Path, content: str, name: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(SourcesError, match=message):
        find_sources([str(path)])


def test_missing_and_empty(tmp_path: Path) -> None:
    with pytest.raises(SourcesError, match=r"'nowhere\.mp4' does not exist"):
        find_sources(["nowhere.mp4"])
    with pytest.raises(SourcesError, match="no video was found"):
        find_sources([str(tmp_path)])


def test_addresses_keep_their_query(tmp_path: Path) -> None:
    assert canonical_uri("HTTPS://example.org/v?id=3#t=5") == "https://example.org/v?id=3"
    assert local_path("https://example.org/v") is None
    assert local_path(canonical_uri(str(tmp_path / "a b%20c.mp4"))) == tmp_path / "a b%20c.mp4"


ROWS: list[dict[str, Any]] = [
    {"path": "a.mp4", "Title": "A film", "LICENCE": "CC0-1.0", "upload_date": 20240131, "Mood": "blue"},
    {"path": "b.mp4", "webpage_url": "https://example.org/b", "Uploader": "someone", "n": 3},
]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_columns_of_sources_are_filled_and_the_rest_goes_to_extra(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"list.{kind}"
    columns = list(ROWS[0] | ROWS[1])
    if kind == "csv":
        lines = [columns, *([str(row.get(name, "")) for name in columns] for row in ROWS)]
        path.write_text("\n".join(",".join(line) for line in lines))
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS))
    else:
        pq.write_table(pa.table({name: [row.get(name) for row in ROWS] for name in columns}), path)
    first, second = rows = find_sources([str(path)])
    assert [first[name] for name in ("title", "license", "upload_date")] == ["A film", "CC0-1.0", "20240131"]
    assert [second[name] for name in ("webpage_url", "uploader", "license")] == ["https://example.org/b", "someone", None]
    extra = [{name: value for name, value in json.loads(row["extra"]).items() if value} for row in rows]
    assert extra == [{"Mood": "blue"}, {"n": "3" if kind == "csv" else 3}]
    assert table_of([{**row, "status": "pending"} for row in rows], source_schema([])).num_rows == 2
    assert set(first) < {field.name for field in CORE_SOURCE_FIELDS}


def test_cells_that_are_not_text_become_text(tmp_path: Path) -> None:
    path = tmp_path / "list.parquet"
    dates = pa.array([20240131.0, None], pa.float64())
    titles = pa.array([datetime.date(2024, 1, 31), None])
    pq.write_table(pa.table({"path": ["a", "b"], "upload_date": dates, "title": titles, "uploader": [["x", "y"], []]}), path)
    first, second = find_sources([str(path)])
    assert (first["upload_date"], first["title"], first["uploader"]) == ("20240131", "2024-01-31", '["x", "y"]')
    assert (second["upload_date"], second["title"]) == (None, None)


def test_text_that_cannot_be_encoded_is_escaped(tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text('{"path": "a", "title": "\\ud800", "mood": "\\ud800", "two\u2028lines": "\u2028"}')
    (row,) = find_sources([str(tmp_path / "list.jsonl")])
    assert row["title"] == "\\ud800" and json.loads(row["extra"])["mood"] == "\ud800"
    assert table_of([{**row, "status": "pending"}], source_schema([])).num_rows == 1


@pytest.mark.parametrize("how", ["itself", "folder", "txt", "uri", "-"])
def test_names_that_are_not_utf8_lead_back_to_the_file(tmp_path: Path, how: str) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9 %41.mp4")
    path.write_bytes(b"x")
    (tmp_path / "list.txt").write_bytes(os.fsencode(path.name) + b"\r\n")
    stdin = io.TextIOWrapper(io.BytesIO(os.fsencode(path)), encoding="utf-8")
    named = {"itself": str(path), "folder": str(tmp_path), "txt": str(tmp_path / "list.txt"), "uri": path.as_uri(), "-": "-"}
    (row,) = find_sources([named[how]], stdin)
    found = local_path(row["uri"])
    assert row["uri"].isascii() and found == path and found.read_bytes() == b"x"
    assert canonical_uri(row["uri"]) == row["uri"]


def test_a_colon_in_a_name_makes_no_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("clip:1.mp4", "s3:clip.mp4", "file:clip.mp4"):
        (tmp_path / name).touch()
        (tmp_path / "list.txt").write_text(name)
        for named in (name, str(tmp_path / name), "list.txt"):
            (row,) = find_sources([named])
            assert local_path(row["uri"]) == tmp_path / name


BAD = {
    "long" * 75 + ".mp4": "File name too long",
    "nul\0.mp4": "null byte",
    "http://[bad/x": "Invalid IPv6 URL",
    "s3://[x": "Invalid IPv6 URL",
    "file://[x/a.mp4": "Invalid IPv6 URL",
    "file:///a%00b": "null byte",
    "https://example.org/\0": r"contains '\\x00'",
    "https://example.org/\udcff": "contains",
    "~nosuchuser/x": r"put \./ before",
}


@pytest.mark.parametrize("address", BAD)
def test_a_bad_address_is_named(address: str) -> None:
    with pytest.raises(SourcesError, match=BAD[address]) as caught:
        find_sources([address])
    assert repr(address) in str(caught.value)


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_bad_addresses_in_a_list_become_sources_and_the_others_go_on(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    addresses = ["a.mp4", *BAD, "b.mp4"]
    if kind == "txt":
        (tmp_path / "list.txt").write_bytes(os.fsencode("\n".join(addresses)))
    else:
        (tmp_path / "list.jsonl").write_text("\n".join(json.dumps({"path": name, "title": "x"}) for name in addresses))
    with caplog.at_level(logging.WARNING):
        rows = find_sources([str(tmp_path / f"list.{kind}")])
    assert len(rows) == len(addresses) and names([rows[0], rows[-1]]) == ["a.mp4", "b.mp4"]
    for row, address in zip(rows[1:-1], BAD, strict=True):
        assert row["uri"].startswith("invalid:") and row["uri"].isascii() and row["uri"].isprintable()
        assert local_path(row["uri"]) is None and (kind == "txt" or row["title"] == "x")
        assert address[:8].partition("\0")[0] in row["uri"]
    assert f"list.{kind}', row 4: 'http://[bad/x' is no address" in caplog.text
    assert table_of([{**row, "status": "pending"} for row in rows], source_schema([])).num_rows == len(rows)


def test_a_list_may_name_what_is_not_there_and_unusual_line_ends(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("\ufeffgone.mp4\r\npart\u2028ed.mp4\n", newline="")
    assert names(find_sources([str(tmp_path / "list.txt")])) == ["gone.mp4", "part\u2028ed.mp4"]
    (tmp_path / "list.txt").write_text("a.mp4\n", encoding="utf-16")
    with pytest.raises(SourcesError, match="save it as UTF-8"):
        find_sources([str(tmp_path / "list.txt")])


def test_a_symbolic_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    with pytest.raises(SourcesError, match=r"loop\.mp4"):
        find_sources([str(tmp_path / "loop.mp4")])


@pytest.mark.parametrize("kind", ["txt", "csv", "-"])
def test_a_folder_in_a_list_is_searched(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    path = folder.parent / f"list.{kind}"
    path.write_text("path,license\nvideos,CC0\n" if kind == "csv" else "videos\n")
    rows = find_sources(["-" if kind == "-" else str(path)], io.StringIO("videos\n"))
    assert [row["uri"] for row in rows] == [row["uri"] for row in find_sources([str(folder)])]
    assert {row["license"] for row in rows} == {"CC0" if kind == "csv" else None}
