"""A miniature world through the whole build: every verdict and caption held against the truth that came with the world."""

from __future__ import annotations

from pathlib import Path

import pytest

from videofactory.curation.sources import find_sources
from videofactory.pipelines.build import build
from videofactory.pipelines.recipe import load_recipe
from videofactory.pipelines.sample import make_world
from videofactory.pipelines.sample.compare import compare
from videofactory.pipelines.sample.motion import motion_captions
from videofactory.pipelines.sample.training_frames import HELD_OUT
from videofactory.shards.index import Index
from videofactory.shards.verify import verify

KINDS = ["h264_mixed", "vp9_webm", "h264_stills", "h264_letterbox", "h264_portrait", "no_index", "text"]
SEED = 90417  # that nothing else here uses


@pytest.mark.timeout(900)
def test_verdicts_and_captions_are_the_truth(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world", seed=SEED, kinds=KINDS)
    out = str(tmp_path / "out")
    build(load_recipe("sample"), find_sources([str(tmp_path / "world/videos")]), out, plainly=True)
    found = compare(tmp_path / "world", out)
    assert found.shots == sum(shot["error_class"] is None for shot in world.truth.to_pylist()) >= 15
    assert found.right >= 0.95 * found.shots - 1, found.misses  # one shot more: so few shots are coarse
    assert found.kept >= 5 and found.named >= 0.8 * found.kept, found.misses
    rows = motion_captions(tmp_path / "world", out)
    captions = {row["clip_id"]: row["caption"] for row in rows}
    for row in rows:
        assert row["seen_caption"] in (row["caption"], None)
        assert (row["seen_caption"] is None) == (tuple(row["caption"].split()[1:3]) in HELD_OUT)
    kept = [row for row in Index(out).clips().to_pylist() if row["state"] == "kept"]
    assert set(captions) <= {row["clip_id"] for row in kept} and len(captions) >= found.kept - 1
    truths = {(shot["video"], shot["colour"], shot["form"], shot["direction"]) for shot in world.truth.to_pylist()}
    names = {row["source_id"]: Path(row["uri"]).name for row in Index(out).sources().to_pylist()}
    for row in kept:
        words = captions.get(row["clip_id"], "").split()
        if words:
            assert (names[row["source_id"]], words[1], words[2], words[4]) in truths and words[3] == "moving"
    assert verify(out).broken == []
