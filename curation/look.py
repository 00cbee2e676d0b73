"""Look at one video: the rows that a build would make of it, without building anything."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from videofactory.shards.schema import source_id

from .analysis import AnalysisSettings, analyse_guarded
from .guard import MediaError
from .ingest import candidate_rows
from .sources import canonical_uri


def look(video: Path, settings: AnalysisSettings, rules: Mapping[str, str]) -> list[dict[str, Any]]:
    """The shots of `video` as rows of `clips` with every signal, judged by the rules that need nothing but the analysis.

    Raises:
        MediaError: it cannot be analysed.
    """
    if not video.exists():
        raise MediaError("not_found", f"{video} does not exist")
    rows = candidate_rows(source_id(canonical_uri(str(video))), analyse_guarded(video, settings), rules)
    return [{"uri": str(video), **row} for row in rows]
