"""Sources: every way to name them leads to the same ids."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from videofactory.curation.sources import SourcesError, canonical_uri, find_sources, local_path


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
        assert [json.loads(row["extra"]) for row in rows] == [{"title": "one"}, {"title": "two"}]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("title\nx\n", "bad.csv", "no column path or url or uri; it has title"),
        ("not json", "bad.jsonl", "cannot be read as jsonl"),
        ("[1]", "bad.jsonl", "is no object with columns"),
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
