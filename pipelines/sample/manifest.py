"""Whether a file belongs to a miniature world: told by the world's manifest and the file's hash, not by its name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def is_of_world(path: Path) -> bool:
    """Whether `path` lies in a world that `make_world` wrote, unchanged since."""
    manifest = path.parent.parent / "sample.json"
    try:
        expected = json.loads(manifest.read_text(encoding="utf-8"))["sha256"].get(path.name)
        with path.open("rb") as file:
            return bool(expected == hashlib.file_digest(file, "sha256").hexdigest())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False
