"""What can be scored: a dataset of ours, a folder of video files, or an .npz file of frames; each a list of videos with names.

Nothing is decoded here, and no more than one video is read at a time.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".mpg", ".mpeg")
PROMPTS, RECORD = "prompts.jsonl", "generate.json"
"""Beside the videos of a folder: their texts, as `evaluate sample` and as `generate` write them."""

Content = bytes | NDArray[np.uint8]


@dataclass(frozen=True)
class Video:
    """A video that has not been read.

    Attributes:
        name: unlike those of the others of its set; the same wherever the set lies.
        read: gives an encoded file, or frames, uint8 (F, H, W, 3).
        prompt: the text that belongs to it, if any.
        fps: of frames; a file knows its own.
    """

    name: str
    read: Callable[[], Content]
    prompt: str | None = None
    fps: float | None = None


@dataclass(frozen=True)
class VideoSet:
    """Videos to score, in order of their names, with the place that they come from and what kind of place it is."""

    place: str
    kind: str
    videos: list[Video]

    @property
    def form(self) -> str:
        """Whether its videos are `encoded` files or `frames` that were never encoded."""
        return "frames" if self.kind == "frames" else "encoded"

    @property
    def has_prompts(self) -> bool:
        """Whether a text belongs to every video."""
        return bool(self.videos) and all(video.prompt for video in self.videos)


def content_hash(content: Content) -> str:
    """Of the bytes of a file or of the frames, whatever decodes them."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha256(repr(content.shape).encode() + content.tobytes()).hexdigest()


def open_videos(place: str, split: str | None = None, where: str | None = None) -> VideoSet:
    """The videos at `place`.

    Args:
        place: a dataset (folder with `index/`, or a URI), a folder that holds video files at any depth, or an .npz file.
        split, where: of a dataset: train, val or test, and a condition in SQL on its clips.

    Raises:
        ValueError: there is nothing to score at `place`, or it is of no such kind.
        OSError: it cannot be read.
    """
    path = Path(place)
    if "://" in place or (path / "index").is_dir():
        return _dataset(place, split, where)
    if split is not None or where is not None:
        raise ValueError(f"{place} is no dataset, so --split and --where cannot choose from it; leave them out")
    if path.is_dir():
        return _folder(path)
    if path.suffix == ".npz" and path.is_file():
        return _archive(path)
    if not path.exists():
        raise FileNotFoundError(f"{place} is not there; name a dataset, a folder of video files or an .npz file")
    raise ValueError(
        f"{place} is no dataset, no folder and no .npz file; put video files into a folder, or save frames with "
        "numpy.savez(file, videos=…) as uint8 (videos, frames, height, width, 3)"
    )


def _dataset(place: str, split: str | None, where: str | None) -> VideoSet:
    from videofactory.shards.index import Index
    from videofactory.shards.reader import MapDataset, selection

    try:
        clips = MapDataset(place, split=split, where=where)
        wanted = selection(split, where)
        rows = Index(place).query(f'select clip_id, caption from clips where {wanted} order by shard, "offset"').to_pylist()
    # DuckDB and the index have classes of their own for a wrong condition and a damaged part.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the dataset {place} cannot be read: {reason}") from error

    def reader(number: int) -> Callable[[], bytes]:
        return lambda: clips[number]["video"]

    videos = [Video(row["clip_id"], reader(number), row["caption"]) for number, row in enumerate(rows)]
    return VideoSet(place, "dataset", sorted(videos, key=lambda video: video.name))


def _folder(path: Path) -> VideoSet:
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    names = {file.relative_to(path).as_posix(): file for file in files}
    prompts = _prompts(path)
    videos = [Video(name, file.read_bytes, prompts.get(name)) for name, file in sorted(names.items())]
    return _checked(VideoSet(str(path), "folder", videos))


def _prompts(folder: Path) -> dict[str, str]:
    """The texts of a folder's videos by the names of their files."""
    file = next((folder / name for name in (PROMPTS, RECORD) if (folder / name).is_file()), None)
    if file is None:
        return {}
    try:
        text = file.read_text(encoding="utf-8")
        rows = json.loads(text)["videos"] if file.name == RECORD else [json.loads(line) for line in text.splitlines() if line]
        return {row["file"]: row["prompt"] for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} does not hold file and prompt of each video ({error}); write it again, or remove it") from error


def _archive(path: Path) -> VideoSet:
    """The videos of an .npz file: `videos`, and if they are there `prompts` (texts) and `fps` (a number)."""
    try:
        # Of what is no archive, numpy only says that it will not unpickle it.
        zipfile.ZipFile(path).close()
        with np.load(path, allow_pickle=False) as archive:
            if "videos" not in archive.files:
                raise ValueError(f"{path} holds {', '.join(archive.files) or 'nothing'}; an array `videos` is wanted")
            prompts = [str(text) for text in archive["prompts"]] if "prompts" in archive.files else []
            fps = float(archive["fps"]) if "fps" in archive.files else None
        with zipfile.ZipFile(path) as file, file.open("videos.npy") as member:
            shape, dtype = _header(member, path)
    except (zipfile.BadZipFile, EOFError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no .npz file of numpy ({error}); save it with numpy.savez(file, videos=…)") from error
    if len(shape) != 5 or dtype != np.uint8 or 3 not in (shape[2], shape[4]):
        raise ValueError(
            f"{path} holds videos of {dtype} {shape}; uint8 of (videos, frames, height, width, 3) or of "
            "(videos, frames, 3, height, width) is wanted"
        )
    if prompts and len(prompts) != shape[0]:
        raise ValueError(f"{path} holds {shape[0]} videos and {len(prompts)} prompts; as many of both are wanted")
    reader = _ArchiveReader(path, shape)
    names = [f"{number:08}" for number in range(shape[0])]
    texts: list[str] | list[None] = prompts or [None] * shape[0]
    videos = [Video(name, reader.of(number), texts[number], fps) for number, name in enumerate(names)]
    return _checked(VideoSet(str(path), "frames", videos))


def _header(member: Any, path: Path) -> tuple[tuple[int, ...], Any]:
    version = np.lib.format.read_magic(member)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"{path} is written in version {version} of numpy's format; save it again with numpy.savez")
    shape, fortran, dtype = read(member)
    if fortran:
        raise ValueError(f"{path} holds its frames in the order of Fortran; save numpy.ascontiguousarray(videos)")
    return shape, dtype


class _ArchiveReader:
    """Reads one video after the other out of the archive; going back starts from its beginning again."""

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self._path, self._shape = path, shape
        self._size = int(np.prod(shape[1:]))
        self._member: Any = None
        self._next = 0

    def of(self, number: int) -> Callable[[], NDArray[np.uint8]]:
        return lambda: self._read(number)

    def _read(self, number: int) -> NDArray[np.uint8]:
        if self._member is None or number < self._next:
            # It stays open for the next video.
            self._member = zipfile.ZipFile(self._path).open("videos.npy")  # noqa: SIM115
            _header(self._member, self._path)
            self._next = 0
        # Forward seeking in a member reads and drops, which is what a compressed one needs anyway.
        self._member.seek((number - self._next) * self._size, io.SEEK_CUR)
        content = self._member.read(self._size)
        self._next = number + 1
        frames = np.frombuffer(content, np.uint8).reshape(self._shape[1:])
        return frames if self._shape[4] == 3 else np.ascontiguousarray(frames.transpose(0, 2, 3, 1))


def _checked(videos: VideoSet) -> VideoSet:
    if not videos.videos:
        raise ValueError(f"{videos.place} holds no video" + (f" ({', '.join(SUFFIXES)})" if videos.kind != "frames" else ""))
    return videos
