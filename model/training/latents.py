"""Latents made beforehand: how they are stored, and how training reads them in place of videos.

A folder holds `latents.json` (which VAE, which way of decoding), `parts/*.safetensors` (of many windows of clips the posterior's mean and
standard deviation, half precision) and `index/*.parquet` (which clip lies where). A part counts once an index part names it, so a killed
run leaves nothing half done. Posteriors and no samples are stored: every visit of a clip draws another sample of it.
"""

from __future__ import annotations

import hashlib
import json
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from videofactory.shards.storage import Storage
from videofactory.shards.writer import put_table

from .buckets import BucketTable
from .clips import Clips
from .frames import ClipError
from .options import Bucket, DataOptions
from .samples import ShardFiles

RECORD, INDEX, PARTS = "latents.json", "index", "parts"

DECODING = "bicubic, cropped about the centre, 1"
"""How frames become pixels; another number for every change of it, so that latents of before are refused."""

_SCHEMA = pa.schema(
    [
        pa.field("clip_id", pa.string()),
        pa.field("sha256", pa.string()),
        pa.field("bucket", pa.string()),
        pa.field("window", pa.int32()),
        pa.field("file", pa.string()),
        pa.field("offset", pa.int64()),
        pa.field("shape", pa.list_(pa.int32())),
        pa.field("crc32", pa.int64()),
        pa.field("error", pa.string()),
    ]
)


class LatentsError(ValueError):
    """Latents do not fit what they shall be used for; the message names what differs, and the way out."""


@dataclass(frozen=True)
class Record:
    """What latents were made with.

    Attributes:
        vae: fingerprint of the VAE.
        scaling_factor, shift_factor: of the VAE; the U-Net takes `(sample - shift_factor) * scaling_factor`.
        windows: windows of every clip, evenly spaced.
        decoding: how frames became pixels.
    """

    vae: str
    scaling_factor: float
    shift_factor: float
    windows: int
    decoding: str = DECODING


@dataclass(frozen=True)
class Window:
    """A part of a clip, encoded, or why it could not be.

    Attributes:
        clip_id, sha256: of the clip.
        bucket: name of the bucket.
        window: its number.
        moments: mean and standard deviation of the posterior, float16 `[2, channels, frames, height, width]`, unscaled.
        error: why there is none.
    """

    clip_id: str
    sha256: str
    bucket: str
    window: int
    moments: np.ndarray | None = None
    error: str | None = None


def fingerprint(vae: Any) -> str:
    """SHA-256 of a VAE's configuration and of its weights in float32, as 16 hexadecimal digits.

    Take it of the VAE as it was loaded: a cast to half precision changes weights.
    """
    config = {name: value for name, value in dict(vae.config).items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def begin(storage: Storage, record: Record) -> None:
    """Note what the latents of a folder are made with, or check that it is what the folder's were made with.

    Raises:
        LatentsError: they were made with something else; the message names each difference.
    """
    if storage.exists(RECORD):
        compare(storage, {**asdict(record)}, "name another folder")
    else:
        storage.put(RECORD, json.dumps(asdict(record), indent=2).encode())


def compare(storage: Storage, wanted: dict[str, Any], way_out: str) -> Record:
    """The folder's record, after a check that it says what `wanted` does.

    Raises:
        LatentsError: there is none, or it differs.
    """
    if not storage.exists(RECORD):
        raise LatentsError(f"{storage.uri} holds no latents ({RECORD} is missing); make them with videofactory.model.precompute")
    try:
        record = Record(**json.loads(storage.get(RECORD)))
    except (ValueError, TypeError) as error:
        raise LatentsError(f"{storage.uri}/{RECORD} cannot be read: {error}; {way_out}") from error
    found = asdict(record)
    differing = [f"{name} is {found[name]!r}, and {value!r} is wanted" for name, value in wanted.items() if found[name] != value]
    if differing:
        raise LatentsError(f"the latents of {storage.uri} do not fit: {'; '.join(differing)}; {way_out}")
    return record


def put_part(storage: Storage, windows: Sequence[Window]) -> None:
    """Write windows of one bucket: their moments, and then the index part that makes them count. No window: nothing is written."""
    from safetensors.numpy import save

    if not windows:
        return
    name = uuid.uuid4().hex
    rows = [{name: getattr(window, name) for name in ("clip_id", "sha256", "bucket", "window", "error")} for window in windows]
    moments = [window.moments for window in windows if window.moments is not None]
    if moments:
        content = save({"moments": np.stack(moments)})
        # The only tensor lies after the header, of which the first eight bytes are the length.
        place = 8 + int.from_bytes(content[:8], "little")
        file = f"{PARTS}/{name}.safetensors"
        for row, window in zip(rows, windows, strict=True):
            if window.moments is not None:
                checksum = zlib.crc32(window.moments.tobytes())
                row.update(file=file, offset=place, shape=list(window.moments.shape), crc32=checksum)
                place += window.moments.nbytes
        storage.put(file, content)
    put_table(storage, f"{INDEX}/{name}.parquet", pa.Table.from_pylist(rows, schema=_SCHEMA))


def read_index(storage: Storage) -> pa.Table:
    """The windows that a folder holds, one row each.

    Raises:
        LatentsError: an index part cannot be read.
    """
    tables = [_SCHEMA.empty_table()]
    for entry in storage.list(INDEX, ".parquet"):
        try:
            with storage.open(entry.name) as file:
                tables.append(pq.read_table(file, schema=_SCHEMA))
        except (pa.ArrowException, ValueError, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise LatentsError(f"{storage.uri}/{entry.name} cannot be read: {reason}; delete it, and precompute again") from error
    return pa.concat_tables(tables).combine_chunks()


class LatentSource:
    """Samples of stored posteriors: float32 `[channels, frames, height, width]`, as the U-Net takes them.

    Args:
        folder: path or URI that `videofactory.model.precompute` wrote.
        clips: the clips to train on.
        table: their buckets.
        options: `flip` must be off.
        vae: fingerprint of the VAE that the model goes with.

    Raises:
        LatentsError: the latents were made with something else, or some are missing.
    """

    key = "latents"

    def __init__(self, folder: str, clips: Clips, table: BucketTable, options: DataOptions, vae: str | None) -> None:
        if options.flip:
            raise LatentsError("flip = True and latents made beforehand, which cannot be mirrored; switch one of them off")
        if vae is None:
            raise LatentsError("latents need the VAE's fingerprint, to tell whether they are its own: pass vae=fingerprint(vae)")
        storage = Storage(folder)
        self._record = compare(storage, {"vae": vae, "decoding": DECODING}, "precompute them again into another folder")
        self._files = ShardFiles(storage)
        rows = read_index(storage)
        self._buckets = {share.bucket.name: _Rows(rows, share.bucket.name, clips) for share in table.shares}
        for share in table.shares:
            missing = int((self._buckets[share.bucket.name].counts()[share.clips] == 0).sum())
            if missing:
                known = ", ".join(sorted(pc.unique(rows["bucket"]).to_pylist())) or "none"
                raise LatentsError(
                    f"{missing} of {len(share.clips)} clips of bucket {share.bucket.name} have no latents in {folder}, or were "
                    f"other clips then; the buckets there are {known}. Run videofactory.model.precompute again with this bucket"
                )

    def read(self, clip: int, bucket: Bucket, chances: np.ndarray, *key: int | str) -> torch.Tensor:
        """A sample of the posterior of a random one of the clip's windows; see `Source.read`."""
        row = self._buckets[bucket.name].draw(clip, float(chances[0]))
        if row["error"] is not None:
            raise ClipError(row["error"])
        content = self._files.read(row["file"], row["offset"], 2 * int(np.prod(row["shape"])))
        if zlib.crc32(content) != row["crc32"]:
            raise ClipError(f"its latents in {row['file']} at {row['offset']} are not those that were written (CRC-32 differs)")
        moments = torch.from_numpy(np.frombuffer(content, np.float16).reshape(row["shape"]).astype(np.float32))
        seed = int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode()).digest()[:8], "big") >> 1
        noise = torch.randn(moments.shape[1:], generator=torch.Generator().manual_seed(seed))
        return (moments[0] + moments[1] * noise - self._record.shift_factor) * self._record.scaling_factor


class _Rows:
    """The windows of one bucket, by number of the clip."""

    def __init__(self, rows: pa.Table, bucket: str, clips: Clips) -> None:
        mine = rows.filter(pc.equal(rows["bucket"], bucket))
        owner = pc.index_in(mine["clip_id"].combine_chunks(), value_set=clips.ids)
        # A clip that was made again under the same id has other pictures.
        same = pc.equal(mine["sha256"].combine_chunks(), clips.sha256.take(owner))
        good = pc.fill_null(pc.and_(pc.is_valid(owner), same), False)
        mine, owners = mine.filter(good), owner.filter(good).to_numpy().astype(np.int64)
        windows, wrong = mine["window"].to_numpy(), mine["error"].is_valid().to_numpy()
        # What could be read at last counts more than that it could not; and two machines may have made the same.
        order = np.lexsort((wrong, windows, owners))
        readable = np.bincount(owners[~wrong], minlength=len(clips)) > 0
        order = order[~(wrong[order] & readable[owners[order]])]
        places = np.stack([owners[order], windows[order]])
        order = order[np.append(True, (places[:, 1:] != places[:, :-1]).any(axis=0))[: len(order)]]
        self._rows = mine.take(pa.array(order)).combine_chunks()
        self._begins = np.searchsorted(owners[order], np.arange(len(clips) + 1))

    def counts(self) -> np.ndarray:
        """Windows of each clip."""
        return np.diff(self._begins)

    def draw(self, clip: int, chance: float) -> dict[str, Any]:
        """A window of a clip, by chance."""
        first, last = int(self._begins[clip]), int(self._begins[clip + 1])
        number = first + int(chance * (last - first))
        return {name: self._rows[name][number].as_py() for name in ("file", "offset", "shape", "crc32", "error")}
