"""The two tables of a dataset: their columns, their ids, and what a row's state means.

`sources` has one row per source and attempt, `clips` one row per candidate shot, kept or not. Both hold fixed core columns;
`clips` has a float column per declared signal besides. Everything that reads or writes a table conforms to the schemas
built here, because independent writers (Ray blocks, Parquet parts, older runs) otherwise disagree about types.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

Step = Literal["analyse", "cut", "embed", "caption"]
"""The steps that fill columns, in the order in which they run; a rule runs after the last step that one of its columns needs."""

STEPS: tuple[Step, ...] = ("analyse", "cut", "embed", "caption")

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Column:
    """A measured number: what it is called, what it means, and what it costs.

    Attributes:
        name: column name, the field's own word for it; never the name of a model.
        meaning: one sentence, with the formula.
        unit: unit of the value ("fraction", "frame widths per second", ...).
        low, high: the range the value always lies in (`None`: unbounded).
        step: the step that fills it.
        cost: CPU cost in words, for the documentation.
        source: paper, specification or reasoning behind the formula.
    """

    name: str
    meaning: str
    unit: str
    low: float | None = None
    high: float | None = None
    step: Step = "analyse"
    cost: str = ""
    source: str = ""


CAPTION_SIMILARITY = Column(
    name="caption_similarity",
    meaning="cosine similarity between the image embedding of the middle frame and the text embedding of the caption",
    unit="cosine",
    low=-1.0,
    high=1.0,
    step="caption",
    cost="one text-encoder pass per clip",
    source="Radford et al. 2021 (CLIP); the measure behind CLIPSIM and most caption filters",
)

# Fields of a clip that are known as soon as its source is analysed.
_IDENTITY = [
    pa.field("clip_id", pa.string(), nullable=False),
    pa.field("source_id", pa.string(), nullable=False),
    pa.field("origin_id", pa.string()),
]
_SPAN = [
    pa.field("start", pa.float64()),
    pa.field("end", pa.float64()),
    pa.field("duration", pa.float64()),
    pa.field("frames", pa.int64()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("fps", pa.float64()),
]
_MEDIA = [
    pa.field("codec", pa.string()),
    pa.field("has_audio", pa.bool_()),
    pa.field("bytes", pa.int64()),
    pa.field("sha256", pa.string()),
    pa.field("lead_in_bytes", pa.int64()),
]
_OUTCOME = [
    pa.field("caption", pa.string()),
    pa.field("split", pa.string()),
    pa.field("rejected_by", pa.string()),
    pa.field("error", pa.string()),
    pa.field("error_class", pa.string()),
]
_PLACE = [
    pa.field("shard", pa.string()),
    pa.field("offset", pa.int64()),
    pa.field("size", pa.int64()),
]

CORE_CLIP_FIELDS: tuple[pa.Field, ...] = (*_IDENTITY, *_SPAN, *_MEDIA, *_OUTCOME, *_PLACE)

# What travels between the steps with a clip and never enters a table: the encoded clip, and the middle frame as JPEG.
PAYLOAD_FIELDS: tuple[pa.Field, ...] = (
    pa.field("video", pa.large_binary()),
    pa.field("middle_frame", pa.binary()),
    pa.field("embedding", pa.list_(pa.float16())),
)

CORE_SOURCE_FIELDS: tuple[pa.Field, ...] = (
    pa.field("source_id", pa.string(), nullable=False),
    pa.field("uri", pa.string(), nullable=False),
    pa.field("attempt", pa.int32(), nullable=False),
    pa.field("status", pa.string(), nullable=False),
    pa.field("error_class", pa.string()),
    pa.field("error", pa.string()),
    pa.field("retryable", pa.bool_()),
    pa.field("n_clips", pa.int32()),
    pa.field("title", pa.string()),
    pa.field("uploader", pa.string()),
    pa.field("license", pa.string()),
    pa.field("upload_date", pa.string()),
    pa.field("webpage_url", pa.string()),
    pa.field("duration", pa.float64()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("fps", pa.float64()),
    pa.field("codec", pa.string()),
    pa.field("sha256", pa.string()),
    pa.field("analysed_with", pa.string()),
    # Columns of the input table that are not ours travel along as one JSON object.
    pa.field("extra", pa.string()),
)


def clip_schema(signals: Iterable[str]) -> pa.Schema:
    """Schema of the `clips` table with a float64 column for each name in `signals`, between the media and outcome columns."""
    measured = [pa.field(name, pa.float64()) for name in signals]
    taken = {field.name for field in (*CORE_CLIP_FIELDS, *PAYLOAD_FIELDS)}
    names = [field.name for field in measured]
    for name in names:
        if name in taken or names.count(name) > 1:
            raise ValueError(f"signal column {name!r} is declared twice or collides with a core column")
    return pa.schema([*_IDENTITY, *_SPAN, *_MEDIA, *measured, *_OUTCOME, *_PLACE])


def travelling_schema(signals: Iterable[str]) -> pa.Schema:
    """Schema of the rows that travel between the steps: a `clips` row and its payload."""
    return pa.schema([*clip_schema(signals), *PAYLOAD_FIELDS])


def source_schema(signals: Iterable[str]) -> pa.Schema:
    """Schema of a part of the `sources` table.

    The list column `candidates` holds the source's candidate clips with everything known after the analysis, so that a
    source row and its clip rows are committed by one put of one object: there is no moment at which one exists without the other.
    """
    return pa.schema([*CORE_SOURCE_FIELDS, pa.field("candidates", pa.list_(pa.struct(list(clip_schema(signals)))))])


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """`table` with exactly the columns and types of `schema`: missing columns become NULL, others are dropped."""
    columns = [
        table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def table_of(rows: Sequence[dict[str, object]], schema: pa.Schema) -> pa.Table:
    """Rows as a table of `schema`; keys that the schema does not name are an error, for they would be lost in silence."""
    known = set(schema.names)
    for row in rows:
        if unknown := set(row) - known:
            raise KeyError(f"row has fields {sorted(unknown)} that the schema does not declare")
    return pa.Table.from_pylist(list(rows), schema=schema)


def source_id(canonical_uri: str) -> str:
    """Id of a source: the first 16 hexadecimal digits of the SHA-256 of its canonical URI (64 bits: one collision expected
    among 6 billion sources)."""
    return hashlib.sha256(canonical_uri.encode()).hexdigest()[:16]


def clip_id(source: str, start: float) -> str:
    """Id of the clip of `source` that starts `start` seconds after the source's first frame: `{source}_{milliseconds, 9 digits}`.

    It contains no dot, because a WebDataset key ends at the first one.

    Raises:
        ValueError: the start is negative or beyond 11.5 days, where nine digits end.
    """
    milliseconds = round(start * 1000)
    if not 0 <= milliseconds < 10**9:
        raise ValueError(f"clip start {start} s does not fit an id; 0 to 999,999.999 s do")
    return f"{source}_{milliseconds:09d}"


def split_of(source: str, val: float, test: float) -> Split:
    """The split of every clip of `source`, by hash, so that clips of one source never stand on two sides.

    Args:
        source: what tells the source from others on every machine: its id, or the SHA-256 of a file that has a path alone.
        val, test: fractions of sources, each in [0, 1], together at most 1.
    """
    draw = int.from_bytes(hashlib.sha256(b"split:" + source.encode()).digest()[:8], "big") / 2**64
    if draw < test:
        return "test"
    return "val" if draw < test + val else "train"
