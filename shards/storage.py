"""Files of a dataset by name, on a local disk or on any object store that `pyarrow.fs` opens.

Every write is all or nothing: on a disk a file is written under a temporary name, flushed to the disk and renamed; an object
store shows an object only when its upload is complete.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs


@dataclass(frozen=True)
class Entry:
    """A stored file: its name below the dataset's root, its size in bytes, and when it was last written."""

    name: str
    size: int
    modified: datetime | None


class Storage:
    """The folder (or bucket prefix) that holds one dataset.

    Args:
        uri: a local path, or a URI such as `s3://bucket/prefix`, `gs://...`, `abfs://...`. Credentials come from where the
            store's own tools look for them (environment, configuration files, instance role).
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        self.uri = os.fspath(uri)

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return Storage, (self.uri,)  # workers open their own connection

    def __repr__(self) -> str:
        return f"Storage({self.uri!r})"

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        if "://" not in self.uri:
            return fs.LocalFileSystem(), str(Path(self.uri).expanduser().resolve())
        filesystem, root = fs.FileSystem.from_uri(self.uri)
        return filesystem, root.rstrip("/")

    @property
    def filesystem(self) -> Any:
        """The `pyarrow.fs.FileSystem` underneath."""
        return self._opened[0]

    @property
    def is_local(self) -> bool:
        """Whether the dataset stands on a disk of this machine (or one mounted here)."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def path(self, name: str = "") -> str:
        """`name` as a path that `filesystem` understands."""
        return f"{self._opened[1]}/{name}".rstrip("/")

    def local_path(self, name: str = "") -> Path:
        """`name` as a path on this machine; only for local datasets."""
        if not self.is_local:
            raise ValueError(f"{self.uri} is not a local folder")
        return Path(self.path(name))

    def list(self, folder: str, suffix: str = "") -> list[Entry]:
        """Files directly in `folder` whose name ends with `suffix`, sorted by name; a folder that is not there is empty."""
        selector = fs.FileSelector(self.path(folder), allow_not_found=True)
        found = self.filesystem.get_file_info(selector)
        entries = [
            Entry(f"{folder}/{info.base_name}" if folder else info.base_name, info.size, info.mtime)
            for info in found
            if info.type == fs.FileType.File and info.base_name.endswith(suffix) and not info.base_name.startswith(".")
        ]
        return sorted(entries, key=lambda entry: entry.name)

    def exists(self, name: str) -> bool:
        """Whether a file called `name` is there."""
        return bool(self.filesystem.get_file_info(self.path(name)).type == fs.FileType.File)

    def open(self, name: str) -> Any:
        """`name` opened for random access (`pyarrow.NativeFile`)."""
        return self.filesystem.open_input_file(self.path(name))

    def get(self, name: str) -> bytes:
        """Content of `name`."""
        with self.open(name) as file:
            return bytes(file.read())

    def get_range(self, name: str, offset: int, size: int) -> bytes:
        """`size` bytes of `name` from `offset`; fewer when the file ends before."""
        with self.open(name) as file:
            return bytes(file.read_at(size, offset))

    def put(self, name: str, content: bytes | pa.Buffer) -> None:
        """Write `content` as `name`, replacing what is there, all or nothing."""
        with self.create(name) as file:
            file.write(content)

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[Any]:
        """A stream to write; `name` appears, complete, when the block ends without an exception."""
        target = self.path(name)
        if not self.is_local:
            with self.filesystem.open_output_stream(target) as stream:
                yield stream
            return
        final = Path(target)
        final.parent.mkdir(parents=True, exist_ok=True)
        # A leading dot keeps half-written files out of every listing.
        temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with temporary.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(final)
            _flush_folder(final.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def delete(self, name: str) -> None:
        """Remove `name`; it is no error when it is not there."""
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(self.path(name))


def _flush_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
