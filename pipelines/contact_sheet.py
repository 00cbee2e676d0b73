"""Contact sheets: a small, fixed choice of a dataset's kept and rejected clips with their thumbnails.

The choice follows the hash of the clip's id, so that it is spread over the sources and the same whenever the report is rebuilt.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pyarrow.parquet as pq

from videofactory.shards.index import Index
from videofactory.shards.storage import Storage
from videofactory.shards.writer import THUMBNAILS

PICTURE_BYTES = 3 << 20
"""Bytes of JPEG that one page may hold; as text they are a third larger."""

LARGEST_PICTURE = 64 << 10
"""A larger thumbnail is left out, in bytes: one of the expected size has 3 to 10 KB."""

# A part of one source ends with its id; others were merged and may hold anything.
_OF_ONE_SOURCE = re.compile(r"-([0-9a-f]{16})\.parquet$")


@dataclass(frozen=True)
class Picture:
    """One clip on a sheet.

    Attributes:
        clip_id: its id.
        link: page of its source on the web, or `None`.
        title: title of its source, as strangers wrote it.
        caption: as the model wrote it.
        start, duration: in seconds.
        reasons: the values that the rejecting rule judged, by column.
        image: the thumbnail as a `data:` URI, or `None`.
    """

    clip_id: str
    link: str | None
    title: str | None
    caption: str | None
    start: float | None
    duration: float | None
    reasons: tuple[tuple[str, Any], ...]
    image: str | None


@dataclass(frozen=True)
class Sheet:
    """Some of the clips that were kept, or that one rule rejected.

    Attributes:
        name: the rule, `unmeasured:COLUMN`, or "kept".
        total: how many clips there are of this kind.
        pictures: those shown.
    """

    name: str
    total: int
    pictures: tuple[Picture, ...]


def contact_sheets(
    index: Index, columns_of: Mapping[str, Sequence[str]], order: Iterable[str], kept: int = 24, rejected: int = 12
) -> list[Sheet]:
    """The sheet of kept clips, then a sheet for every rule that rejected some.

    Args:
        index: the dataset's index.
        columns_of: the columns that a rule uses, by rule; their values are shown as the reason.
        order: what clips are rejected by, in the order in which the sheets are to stand.
        kept, rejected: how many clips a sheet shows at most.
    """
    place = {name: number for number, name in enumerate(order)}
    totals = {
        row["rejected_by"]: row["n"]
        for row in index.query(
            "select rejected_by, count(*) as n from clips where state in ('kept', 'rejected') group by 1"
        ).to_pylist()
    }
    names = [None, *sorted((name for name in totals if name is not None), key=lambda name: (place.get(name, len(place)), name))]
    rows = _choose(index, kept, rejected)
    images = _images(index.storage, [row["clip_id"] for name in names for row in rows.get(name, ())])
    return [
        Sheet(
            name="kept" if name is None else name,
            total=totals.get(name, 0),
            pictures=tuple(_picture(row, columns_of.get(str(name), ()), images) for row in rows.get(name, ())),
        )
        for name in names
    ]


def _choose(index: Index, kept: int, rejected: int) -> dict[str | None, list[dict[str, Any]]]:
    """The rows that the sheets show, with their sources' titles and pages, by what rejected them (`None`: kept)."""
    rows = index.query(f"""
        with ranked as (
            select *, row_number() over (partition by rejected_by order by md5(clip_id)) as place
            from clips where state in ('kept', 'rejected')
        )
        select c.*, s.title as source_title, s.webpage_url as source_page, s.uri as source_uri
        from ranked c left join sources s using (source_id)
        where place <= case when rejected_by is null then {kept} else {rejected} end
        order by c.place""").to_pylist()
    chosen: dict[str | None, list[dict[str, Any]]] = {}
    for row in rows:
        chosen.setdefault(row["rejected_by"], []).append(row)
    return chosen


def _picture(row: Mapping[str, Any], columns: Sequence[str], images: Mapping[str, str]) -> Picture:
    return Picture(
        clip_id=row["clip_id"],
        link=web_address(row["source_page"]) or web_address(row["source_uri"]),
        title=row["source_title"],
        caption=row["caption"],
        start=row["start"],
        duration=row["duration"],
        reasons=tuple((column, row[column]) for column in columns if column in row),
        image=images.get(row["clip_id"]),
    )


def web_address(address: str | None) -> str | None:
    """`address` when it is one that a page may link to; a stranger's `javascript:` or `file:` is none."""
    if address is None:
        return None
    try:
        parts = urlsplit(address)
    except ValueError:
        return None
    return address if parts.scheme in ("http", "https") and parts.netloc else None


def _images(storage: Storage, clips: Sequence[str]) -> dict[str, str]:
    """Thumbnails of `clips` as `data:` URIs, as many as the page may hold, in the order of `clips`."""
    stored = _thumbnails(storage, clips)
    left = PICTURE_BYTES
    images = {}
    for clip in clips:
        content = stored.get(clip)
        # What is no JPEG would be a broken picture at best.
        if content is None or not content.startswith(b"\xff\xd8\xff") or len(content) > min(left, LARGEST_PICTURE):
            continue
        left -= len(content)
        images[clip] = "data:image/jpeg;base64," + base64.b64encode(content).decode("ascii")
    return images


def _thumbnails(storage: Storage, clips: Iterable[str]) -> dict[str, bytes]:
    """The stored thumbnails of `clips`; reads the parts of their sources, and those that belong to no single source."""
    wanted = set(clips)
    sources = {clip.partition("_")[0] for clip in wanted}
    found: dict[str, bytes] = {}
    for entry in storage.list(THUMBNAILS, ".parquet"):
        owner = _OF_ONE_SOURCE.search(entry.name)
        if wanted and (owner is None or owner[1] in sources):
            with storage.open(entry.name) as file:
                table = pq.read_table(file, columns=["clip_id", "thumbnail"], filters=[("clip_id", "in", sorted(wanted))])
            found.update(zip(table["clip_id"].to_pylist(), table["thumbnail"].to_pylist(), strict=True))
    return found
