"""The clips to train on, as the index of a dataset has them: where each lies in the shards, how large it is, what its captions are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from videofactory.shards.index import Index, IndexDamagedError
from videofactory.shards.reader import selection
from videofactory.shards.schema import CORE_CLIP_FIELDS
from videofactory.shards.storage import Storage
from videofactory.shards.writer import SHARDS, SOURCES

from .buckets import Measures
from .options import DataOptions

_COLUMNS = """
    clip_id, shard, "offset", size, coalesce(sha256, '') as sha256, coalesce(width, 0) as width, coalesce(height, 0) as height,
    coalesce(frames, 0) as frames, coalesce(fps, frames / nullif("end" - start, 0), 0) as fps"""


class DatasetError(ValueError):
    """A dataset is not whole, or lacks what is asked of it; the message says what, and the way out."""


@dataclass(frozen=True)
class Captions:
    """Every caption of every clip.

    Attributes:
        texts: the captions, by clip.
        begins: where each clip's captions begin in `texts`, int64 `[clips + 1]`.
    """

    texts: pa.Array
    begins: np.ndarray

    def counts(self) -> np.ndarray:
        """How many captions each clip has, int64 `[clips]`."""
        return np.diff(self.begins)

    def draw(self, clip: int, chance: float) -> str:
        """A caption of the clip number `clip`, chosen by `chance`, 0 to below 1; the empty text where it has none."""
        begin, end = int(self.begins[clip]), int(self.begins[clip + 1])
        return str(self.texts[begin + int(chance * (end - begin))].as_py()) if end > begin else ""

    def spread(self, clips: np.ndarray, most: int) -> tuple[list[str], int]:
        """Captions of the clips of these numbers, at most so many, spread evenly over all of them; and how many these are."""
        ends = np.cumsum(self.counts()[clips])
        total = int(ends[-1]) if len(ends) else 0
        places = np.linspace(0, total - 1, min(total, most)).astype(np.int64)
        owners = np.searchsorted(ends, places, side="right")
        numbers = self.begins[clips[owners] + 1] - ends[owners] + places
        return self.texts.take(pa.array(numbers)).to_pylist(), total


class Clips:
    """The kept clips of a dataset that a split and a condition select, by shard and offset.

    Their columns are Arrow and NumPy arrays, about 150 bytes a clip, which processes that are forked share.

    Args:
        dataset: path or URI.
        options: `split`, `where`, `captions` and `uncaptioned` are used.

    Attributes:
        storage: the dataset.
        ids: `clip_id` of every clip.
        sha256: of every clip's video, in hexadecimal; empty where the index has none.
        shard_names: names of the shards that hold them.
        shards: number of each clip's shard in `shard_names`.
        offsets, sizes: of each clip in its shard, in bytes.
        measures: what decides the bucket of each clip.
        captions: of each clip.

    Raises:
        DatasetError: no clip is selected, captions are asked for that are not there, or a shard is missing or of another size.
    """

    def __init__(self, dataset: Storage | str, options: DataOptions) -> None:
        index = _opened(dataset)
        self.storage = index.storage
        rows = _selected(index, selection(options.split, options.where))
        self.ids = rows["clip_id"].combine_chunks()
        self.sha256 = rows["sha256"].combine_chunks()
        encoded = rows["shard"].combine_chunks().dictionary_encode()
        self.shard_names: list[str] = encoded.dictionary.to_pylist()
        self.shards: np.ndarray = encoded.indices.to_numpy()
        self.offsets: np.ndarray = rows["offset"].to_numpy()
        self.sizes: np.ndarray = rows["size"].to_numpy()
        self.captions = _captions(index, self.ids, options.captions)
        captioned = (self.captions.counts() > 0) | (options.uncaptioned == "empty")
        width, height, frames, fps = (rows[name].to_numpy().astype(np.float64) for name in ("width", "height", "frames", "fps"))
        self.measures = Measures(width, height, frames, fps, captioned)
        self._check_shards(index)

    def __len__(self) -> int:
        return len(self.ids)

    def clip_id(self, clip: int) -> str:
        """Id of the clip number `clip`."""
        return str(self.ids[clip].as_py())

    def _check_shards(self, index: Index) -> None:
        """Every shard that is used is there, in the size that the index states, and no clip lies beyond its end."""
        stated = {shard["url"]: shard["filesize"] for shard in index.shards()}
        present = {entry.name: entry.size for entry in self.storage.list(SHARDS, ".tar")}
        ends = np.zeros(len(self.shard_names), np.int64)
        np.maximum.at(ends, self.shards, self.offsets + self.sizes)
        broken = []
        for name, end in zip(self.shard_names, ends.tolist(), strict=True):
            if name not in present:
                broken.append(f"{name} is missing")
            elif present[name] != stated.get(name):
                broken.append(f"{name} has {present[name]} bytes, and the index states {stated.get(name, 'nothing of it')}")
            elif end > present[name]:
                broken.append(f"{name} has {present[name]} bytes, and a clip ends at {end}")
        if broken:
            more = f" (and {len(broken) - 3} more)" if len(broken) > 3 else ""
            raise DatasetError(
                f"{self.storage.uri} is damaged: {'; '.join(broken[:3])}{more}. Copy it again, or run `videofactory verify` on it; "
                "the build command makes lost clips again"
            )


def _opened(dataset: Storage | str) -> Index:
    try:
        index = Index(dataset)
    except IndexDamagedError as error:
        raise DatasetError(str(error)) from error
    if not index.storage.list(SOURCES, ".parquet"):
        raise DatasetError(
            f"{index.storage.uri} holds no dataset (no parts below {SOURCES}); build one with `videofactory build`"
        )
    return index


def _selected(index: Index, condition: str) -> pa.Table:
    """The columns of the kept clips that meet a condition in SQL."""
    try:
        rows = index.query(f'select {_COLUMNS} from clips where {condition} order by shard, "offset"')
    except duckdb.Error as error:
        raise DatasetError(f"the condition {condition} does not work: {error}") from error
    if not len(rows):
        raise DatasetError(f"{index.storage.uri} holds no kept clip with {condition}; look at split and where")
    return rows


def _captions(index: Index, ids: pa.Array, names: Sequence[str]) -> Captions:
    """The captions that `names` name, in this order for each clip; empty ones are none."""
    clips, texts = [], []
    for name in names:
        table = _column(index, name) if "." not in name else _sidecar(index.storage, *name.split(".", 1))
        owners, values = table["clip_id"].combine_chunks(), table["text"].combine_chunks()
        if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
            owners, values = owners.take(pc.list_parent_indices(values)), pc.list_flatten(values)
        numbers = pc.index_in(owners, value_set=ids)
        # Texts of more than 2 GiB do not fit Arrow's plain strings.
        values = values.cast(pa.large_string())
        good = pc.and_(pc.is_valid(numbers), pc.fill_null(pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(values)), 0), False))
        clips.append(numbers.filter(good).to_numpy().astype(np.int64))
        texts.append(values.filter(good))
    owner = np.concatenate(clips)
    order = np.argsort(owner, kind="stable")
    begins = np.searchsorted(owner[order], np.arange(len(ids) + 1))
    return Captions(pa.concat_arrays(texts).take(pa.array(order)), begins)


def _column(index: Index, name: str) -> pa.Table:
    known = [field.name for field in CORE_CLIP_FIELDS if field.type == pa.string()]
    if name not in known:
        raise DatasetError(f"captions {name!r}: the clips have no such column of texts; name caption, or SIDECAR.COLUMN")
    return index.query(f"select clip_id, \"{name}\" as text from clips where state = 'kept'")


def _sidecar(storage: Storage, folder: str, column: str) -> pa.Table:
    """A column of the tables in `index/FOLDER`, as `clip_id` and `text`."""
    parts = [entry.name for entry in storage.list(f"index/{folder}", ".parquet")]
    if not parts:
        raise DatasetError(
            f"captions {folder}.{column}: {storage.uri} has no tables in index/{folder}; write them, or drop the name"
        )
    tables = []
    for part in parts:
        with storage.open(part) as file:
            schema = pq.read_schema(file)
            if missing := [name for name in ("clip_id", column) if name not in schema.names]:
                raise DatasetError(
                    f"captions {folder}.{column}: {part} has no column {missing[0]}; it has {', '.join(schema.names)}"
                )
            kind = schema.field(column).type
            if not any(_is_text(t) for t in (kind, getattr(kind, "value_type", kind))):
                raise DatasetError(f"captions {folder}.{column}: {part} holds {kind} there; texts or lists of texts are wanted")
            table = pq.read_table(file, columns=["clip_id", column])
        tables.append(pa.table({"clip_id": table["clip_id"].cast(pa.string()), "text": table[column]}))
    return pa.concat_tables(tables, promote_options="permissive")


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
