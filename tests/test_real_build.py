"""Real camera footage through the whole build: several codecs, containers, frame rates and sizes, as their makers encoded them."""

from __future__ import annotations

from pathlib import Path

import pytest

from videofactory.shards.reader import Decode, MapDataset
from videofactory.shards.verify import verify

from .test_build import recipe, run
from .test_real_footage import footage

__all__ = ["footage"]


@pytest.mark.timeout(900)
def test_real_footage_is_built(footage: dict[str, Path], tmp_path: Path) -> None:
    index = run(
        list(footage.values()),
        tmp_path / "out",
        recipe(rules={"long": "duration >= 1.0", "still": "motion >= 0.002"}),
    )
    sources = index.query("select uri, status, error_class, n_clips from sources").to_pylist()
    assert [row for row in sources if row["status"] != "done"] == []
    kept = index.query("select source_id, count(*) as n from clips where state = 'kept' group by 1").to_pylist()
    assert len(kept) >= 3, "fewer than three of the films have a kept clip"
    assert index.query("select * from clips where state = 'failed'").to_pylist() == []
    bikes = next(row["n_clips"] for row in sources if "bikes" in row["uri"])
    assert 5 <= bikes <= 7  # TransNetV2 and the eye find 6
    assert verify(str(tmp_path / "out")).broken == []
    clips = MapDataset(str(tmp_path / "out"), split=None, decode=Decode(frames=4, height=64))
    for number in range(len(clips)):
        video = clips[number]["video"].float()
        assert video.std() > 5, "a picture of real footage is not flat"
