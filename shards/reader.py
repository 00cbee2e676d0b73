"""Samples for training from a dataset's shards: streaming (webdataset) or map-style by (shard, offset, size).

Needs torch, webdataset and PyAV; nothing of Ray, yt-dlp or the rest of this project.

    loader = torch.utils.data.DataLoader(stream("data/sample", decode=Decode(frames=16, height=192)), batch_size=4, num_workers=2)
    for batch in loader:
        batch["video"]      # uint8 [4, 16, 3, 192, 344]
        batch["caption"]    # list of 4 strings
"""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import numpy as np
import torch
import webdataset as wds

from .index import Index
from .storage import Storage

Sample = dict[str, Any]


@dataclass(frozen=True)
class Decode:
    """How a clip becomes a tensor: evenly spaced frames, scaled and centre-cropped to one size.

    Args:
        frames: frames per sample; a clip with fewer repeats its last one.
        height, width: size of the frames in pixels; `width=None` keeps 16:9 and rounds to a multiple of 8.
        fps: frames per second to sample at, from the middle of the clip; `None` spreads `frames` over the whole clip.
    """

    frames: int = 16
    height: int = 192
    width: int | None = None
    fps: float | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the frames."""
        return self.height, self.width or max(8, round(self.height * 16 / 9 / 8) * 8)

    def __call__(self, video: bytes) -> torch.Tensor:
        """Decode an encoded clip to uint8 `[frames, 3, height, width]`, RGB.

        Raises:
            ValueError: the clip has no frame.
        """
        times = _shown_times(video)
        images, seen = self._chosen(video, times)
        if seen and [seen[0], seen[-1]] != [*times[:1], *times[-1:]]:
            # The packets promised another beginning or end than the decoder delivers: believe the decoder.
            images, seen = self._chosen(video, seen)
        if not seen:
            raise ValueError(f"a clip of {len(video)} bytes has no frame")
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()

    def _chosen(self, video: bytes, times: list[float]) -> tuple[list[np.ndarray], list[float]]:
        """The last frame at or before each instant, scaled, and the times of all frames; one decoded frame is held at a time."""
        import av

        instants = self._instants(times)
        images: list[np.ndarray] = []
        seen: list[float] = []
        before: Any = None
        with av.open(io.BytesIO(video)) as container:
            for frame in container.decode(video=0):
                seen.append(frame.time or 0.0)
                reached = int(np.searchsorted(instants, seen[-1], side="left")) - len(images)
                if reached > 0 and len(seen) > 1:
                    images += [self._scaled(before)] * reached
                before = frame
        if before is not None:
            images += [self._scaled(before)] * (len(instants) - len(images))
        return images, seen

    def _instants(self, times: list[float]) -> np.ndarray:
        """The instants to show, in seconds, rising, for a clip whose frames are shown at `times`."""
        first, last = (times[0], times[-1]) if times else (0.0, 0.0)
        if self.fps is None:
            return np.linspace(first, last, self.frames)
        begin = max(first, (first + last) / 2 - (self.frames - 1) / self.fps / 2)
        return np.minimum(begin + np.arange(self.frames) / self.fps, last) + 1e-9

    def _scaled(self, frame: Any) -> np.ndarray:
        return scaled(frame, *self.size)


def all_frames(video: bytes) -> tuple[np.ndarray, float | None]:
    """Every frame of an encoded video at its own size, uint8 `[frames, height, width, 3]` RGB, and its frames per second if known.

    Raises:
        ValueError: it holds no video that can be decoded.
    """
    import av

    try:
        with av.open(io.BytesIO(video)) as container:
            if not container.streams.video:
                raise ValueError("no video stream")
            rate = container.streams.video[0].average_rate
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except av.FFmpegError as error:
        raise ValueError(f"no video that can be decoded: {error.strerror or error}") from error
    if not frames:
        raise ValueError("no frame")
    return np.stack(frames), float(rate) if rate else None


def scaled(frame: Any, height: int, width: int) -> np.ndarray:
    """A decoded `av.VideoFrame` scaled to cover height and width in pixels and cropped about its centre: uint8 `[height, width, 3]`."""
    scale = max(height / frame.height, width / frame.width)
    image = frame.reformat(
        width=max(width, round(frame.width * scale)),
        height=max(height, round(frame.height * scale)),
        format="rgb24",
        interpolation="BICUBIC",
    ).to_ndarray()
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return np.ascontiguousarray(image[top : top + height, left : left + width])


def _shown_times(video: bytes) -> list[float]:
    """The times in seconds, rising, at which a clip's packets say that its frames are shown; nothing is decoded."""
    import av

    with av.open(io.BytesIO(video)) as container:
        packets = container.demux(video=0)
        return sorted(float(p.pts * p.time_base) for p in packets if p.pts is not None and p.time_base and not p.is_discard)


def _decoded(sample: Sample, decode: Callable[[bytes], Any] | None) -> Sample:
    """A tar sample as a training sample: `clip_id`, `video` (decoded, or bytes), `caption`, `row` (the clip's row)."""
    row = json.loads(sample["json"])
    video = sample["mp4"] if decode is None else decode(sample["mp4"])
    result = {"clip_id": sample["__key__"], "video": video, "caption": sample.get("txt", b"").decode()}
    # A default collate cannot batch None, so the whole row only travels when the caller keeps the bytes.
    return {**result, "row": row} if decode is None else result


def _decode_all(samples: Iterator[Sample], decode: Callable[[bytes], Any] | None) -> Iterator[Sample]:
    for sample in samples:
        yield _decoded(sample, decode)


def selection(split: str | None, where: str | None) -> str:
    """The condition in SQL for the kept clips of a split (`None`: all) that meet a condition (`None`: any)."""
    wanted = ["state = 'kept'"]
    if split is not None:
        wanted.append("split = '" + split.replace("'", "''") + "'")
    if where is not None:
        wanted.append(f"({where})")
    return " and ".join(wanted)


def stream(
    dataset: str,
    *,
    split: str | None = "train",
    where: str | None = None,
    decode: Callable[[bytes], Any] | None = None,
    shuffle: int = 0,
    resampled: bool = False,
    seed: int = 0,
) -> Any:
    """A dataset's samples as a `webdataset.WebDataset`, each node and worker taking its own shards.

    Only samples that the index keeps are delivered: what later rules rejected, or a killed run left twice, is passed over.

    With `shuffle` or `resampled`, every new iteration of the object has another order. The order depends on `seed`, on how many
    iterations went before and on the node and worker alone, so that it can be repeated; all nodes have to begin each pass together.

    Args:
        dataset: path or URI.
        split: train, val or test; `None` for all.
        where: a condition in SQL on the columns of `clips`.
        decode: bytes of a clip to what `sample["video"]` shall be (see `Decode`); `None` keeps the bytes and adds `row`.
        shuffle: size of the shuffle buffer, in samples before decoding; 0 keeps the order of the shards.
        resampled: draw shards with replacement for ever (training; limit with `.with_epoch(n)`) instead of a single pass.
        seed: of the shard order and the shuffle buffer.

    Raises:
        ValueError: no sample is selected.
    """
    index = Index(dataset)
    keys: dict[str, set[str]] = {}
    for row in index.query(f"select shard, clip_id from clips where {selection(split, where)} order by shard").to_pylist():
        keys.setdefault(row["shard"], set()).add(row["clip_id"])
    if not keys:
        raise ValueError(f"{dataset} holds no kept clip with {selection(split, where)}")
    storage = index.storage
    source = _ShardOrder(list(keys), seed=seed, shuffle=shuffle > 0, resampled=resampled)
    stages: list[Any] = [source]
    if not resampled:
        # Every node and worker shuffles the whole list alike before it takes its part.
        stages += [wds.split_by_node, wds.split_by_worker]
    stages += [partial(_open_shards, storage=storage), partial(_select, keys=keys)]
    if shuffle:
        stages.append(partial(_shuffle, source=source, size=shuffle))
    stages.append(partial(_decode_all, decode=decode))
    return wds.DataPipeline(*stages)


_PLACES = 1024
"""Workers of one node whose iterations can be told apart."""


class _ShardOrder(torch.utils.data.IterableDataset[Sample]):
    """The shards in the order of one iteration after the other.

    A data loader starts new workers for every epoch, each with a copy of this object as it was before the first, so the count of
    iterations is kept in memory that all of them share. Each worker has a place there, with the loader's number for its epoch
    (torch's base seed, shared by its workers) in the upper half and the count in the lower; a worker takes the count of its
    fellows, and the first one the next. One write of 64 bits needs no lock: whoever does not see the first sees what it saw.
    """

    def __init__(self, names: list[str], *, seed: int, shuffle: bool, resampled: bool) -> None:
        super().__init__()
        self._names, self._seed, self._shuffle, self._resampled = names, seed, shuffle, resampled
        self._places = torch.zeros(_PLACES, dtype=torch.int64)
        self._places.share_memory_()  # type: ignore[no-untyped-call]
        self._loader = 0
        self._count, self._round = 0, 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._places.share_memory_()  # type: ignore[no-untyped-call]

    def __iter__(self) -> Iterator[Sample]:
        # Counted at once and not with the first shard, so that all stages of an iteration see the same count.
        self._begin()
        return self._draw() if self._resampled else iter([{"url": name} for name in self._once()])

    def random(self, *purpose: object) -> Random:
        """A generator for this iteration and `purpose`, the same in every process."""
        return Random(repr((self._seed, self._count, self._round, *purpose)))

    def own_random(self, purpose: str) -> Random:
        """As `random`, another one in every node and worker."""
        node, _, worker, _ = wds.utils.pytorch_worker_info()
        return self.random(purpose, node, worker)

    def _begin(self) -> None:
        worker = torch.utils.data.get_worker_info()
        loader = 0 if worker is None else 1 + zlib.crc32(str(worker.seed - worker.id).encode()) % (2**31 - 1)
        if loader and loader == self._loader:
            # A worker that persists, or repeats its part: the others may be at another round, and must not be disturbed.
            self._round += 1
            return
        places = self._places.numpy()
        fellows = places[places >> 32 == loader] if loader else places[:0]
        self._count = int(fellows.max() if len(fellows) else (places & 0xFFFFFFFF).max() + 1) & 0xFFFFFFFF
        self._loader, self._round = loader, 0
        places[0 if worker is None else worker.id % _PLACES] = loader << 32 | self._count

    def _once(self) -> list[str]:
        names = list(self._names)
        if self._shuffle:
            self.random("shards").shuffle(names)
        return names

    def _draw(self) -> Iterator[Sample]:
        generator = self.own_random("shards")
        while True:
            yield {"url": generator.choice(self._names)}


def _shuffle(samples: Iterator[Sample], source: _ShardOrder, size: int) -> Any:
    return wds.shuffle(size, rng=source.own_random("samples"))(samples)


def _open_shards(shards: Iterator[Sample], storage: Storage) -> Iterator[Sample]:
    """The samples of each shard, read sequentially."""
    for shard in shards:
        name = shard["url"]
        with storage.open(name) as file, tarfile.open(fileobj=file, mode="r|") as tar:
            sample: Sample = {}
            for member in tar:
                key, _, extension = member.name.partition(".")
                if sample and sample["__key__"] != key:
                    yield sample
                    sample = {}
                content = tar.extractfile(member)
                sample.update({"__key__": key, "__url__": name, extension: content.read() if content else b""})
            if sample:
                yield sample


def _select(samples: Iterator[Sample], keys: dict[str, set[str]]) -> Iterator[Sample]:
    for sample in samples:
        if sample["__key__"] in keys[sample["__url__"]]:
            yield sample


def members_of(content: bytes) -> dict[str, bytes]:
    """The members of a sample by their names, from the bytes that its row's `offset` and `size` span in the shard.

    Raises:
        tarfile.TarError: these bytes are no members of a tar.
    """
    # The slice holds whole members without an end mark; zeros make it a complete tar.
    with tarfile.open(fileobj=io.BytesIO(content + bytes(1024)), mode="r:") as tar:
        files = ((member.name, tar.extractfile(member)) for member in tar)
        return {name: file.read() if file else b"" for name, file in files}


class MapDataset(torch.utils.data.Dataset[Sample]):
    """A dataset's samples by number, read from the shards by offset: random access, exact epochs, any sampler.

    Args: as for `stream`.

    The rows are kept as Arrow columns (tens of bytes a clip), so that data-loader workers share them.

    Raises:
        ValueError: no sample is selected.
    """

    def __init__(
        self, dataset: str, *, split: str | None = "train", where: str | None = None, decode: Callable[[bytes], Any] | None = None
    ) -> None:
        index = Index(dataset)
        self._storage = index.storage
        self._decode = decode
        self._rows = index.query(
            f'select clip_id, shard, "offset", size from clips where {selection(split, where)} order by shard, "offset"'
        ).combine_chunks()
        if not len(self._rows):
            raise ValueError(f"{dataset} holds no kept clip with {selection(split, where)}")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Sample:
        if not -len(self) <= number < len(self):
            raise IndexError(f"sample {number} of a dataset with {len(self)}")
        place = number % len(self)
        row = {name: self._rows[name][place].as_py() for name in ("clip_id", "shard", "offset", "size")}
        content = self._storage.get_range(row["shard"], row["offset"], row["size"])
        members = {name.partition(".")[2]: member for name, member in members_of(content).items()}
        return _decoded({"__key__": row["clip_id"], **members}, self._decode)
