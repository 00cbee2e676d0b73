"""Files of a dataset by name, on a local disk or on any object store that `pyarrow.fs` opens.

Every write is all or nothing: on a disk a file is written under a temporary name, flushed to the disk and renamed; an object
store shows an object only when its upload is complete.
"""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

_TEMPORARY = re.compile(r"^\..+\.[0-9a-f]{8}\.tmp$")


class StorageError(ValueError):
    """The place that a path or URI names cannot be opened; the message says what can."""


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

    Raises:
        StorageError: at the first use, when the URI names no store that can be opened.
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
        try:
            filesystem, root = fs.FileSystem.from_uri(self.uri)
        except (pa.ArrowException, ValueError, OSError) as error:
            raise StorageError(f"cannot open {self.uri!r}: {error}; name a folder, or s3://, gs:// or abfs://") from error
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

    def leftovers(self) -> list[Entry]:
        """Temporary files of writes that are not complete, sorted by name; unless a build is running, killed ones left them.

        Only a local dataset can have them; an object store shows nothing of an upload that broke off.
        """
        if not self.is_local:
            return []
        root = self.local_path()
        found = []
        for folder, _, names in os.walk(root):
            for name in filter(_TEMPORARY.match, names):
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):  # a running build may just have completed it
                    status = path.stat()
                    modified = datetime.fromtimestamp(status.st_mtime, UTC)
                    found.append(Entry(path.relative_to(root).as_posix(), status.st_size, modified))
        return sorted(found, key=lambda entry: entry.name)

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
