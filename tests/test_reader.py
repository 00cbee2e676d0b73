"""Training from the shards: streaming and map-style, in data-loader workers, without Ray or yt-dlp."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import webdataset as wds

from videofactory.shards.index import Index
from videofactory.shards.reader import Decode, MapDataset, stream

from .datasets import write_dataset
from .videos import SIZE, make_video


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("reader")
    video = make_video(root / "clip.mp4", 5, seconds=[1.0])
    return write_dataset(root / "out", sources=6, per_shard=3, video=video.read_bytes()).uri


def kept(dataset: str, where: str = "true") -> set[str]:
    return set(Index(dataset).query(f"select clip_id from clips where state = 'kept' and {where}")["clip_id"].to_pylist())


def test_data_loader_trains_from_a_stream(dataset: str) -> None:
    source = stream(dataset, split=None, decode=Decode(frames=8, height=96))
    loader = torch.utils.data.DataLoader(source, batch_size=4, num_workers=2)
    seen: list[str] = []
    model = torch.nn.Conv3d(3, 1, 3)
    for batch in loader:
        assert batch["video"].dtype == torch.uint8 and batch["video"].shape[1:] == (8, 3, 96, 168)
        model(batch["video"].float().div(255).transpose(1, 2)).mean().backward()
        seen += batch["clip_id"]
        assert all(caption.startswith("a thing") for caption in batch["caption"])
    assert sorted(seen) == sorted(kept(dataset))
    assert model.weight.grad is not None and model.weight.grad.abs().sum() > 0


def test_splits_and_conditions(dataset: str) -> None:
    parts = [{sample["clip_id"] for sample in _all(dataset, split)} for split in ("train", "val", "test")]
    assert set.union(*parts) == kept(dataset) and sum(map(len, parts)) == len(kept(dataset))
    fast = {sample["clip_id"] for sample in stream(dataset, split=None, where="motion > 0.15")}
    assert fast == kept(dataset, "motion > 0.15") != kept(dataset)
    with pytest.raises(ValueError, match="no kept clip"):
        stream(dataset, where="motion > 99")


def _all(dataset: str, split: str) -> list[dict[str, object]]:
    try:
        return list(stream(dataset, split=split))
    except ValueError:  # a split of six sources may be empty
        return []


def test_each_node_reads_its_own_shards(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        parts.append({sample["clip_id"] for sample in stream(dataset, split=None)})
    assert parts[0] | parts[1] == kept(dataset) and not parts[0] & parts[1] and parts[0] and parts[1]


def test_resampled_stream_does_not_end_and_draws_every_clip(dataset: str) -> None:
    source = stream(dataset, split=None, resampled=True, shuffle=8, seed=1)
    drawn = [sample["clip_id"] for sample, _ in zip(source, range(200), strict=False)]
    assert len(drawn) == 200 and set(drawn) == kept(dataset)


def test_map_style_equals_the_stream(dataset: str) -> None:
    by_number = MapDataset(dataset, split=None)
    streamed = {sample["clip_id"]: sample for sample in stream(dataset, split=None)}
    assert len(by_number) == len(streamed)
    for number in range(len(by_number)):
        sample = by_number[number]
        assert sample == streamed[sample["clip_id"]]
    assert by_number[-1] == by_number[len(by_number) - 1]
    with pytest.raises(IndexError):
        by_number[len(by_number)]


def test_decode_chooses_evenly_spaced_frames(dataset: str) -> None:
    video = MapDataset(dataset, split=None)[0]["video"]
    whole = Decode(frames=25, height=SIZE[1], width=SIZE[0])(video)
    few = Decode(frames=5, height=SIZE[1], width=SIZE[0])(video)
    assert torch.equal(few, whole[[0, 6, 12, 18, 24]])
    repeated = Decode(frames=40, height=90, width=160, fps=50)(video)
    assert repeated.shape == (40, 3, 90, 160)


def test_plain_webdataset_reads_the_shards(dataset: str) -> None:
    urls = [str(Path(dataset) / shard["url"]) for shard in Index(dataset).shards()]
    keys = {sample["__key__"] for sample in wds.WebDataset(urls, shardshuffle=False).decode()}
    assert keys == kept(dataset)


def test_reader_needs_neither_ray_nor_yt_dlp(dataset: str) -> None:
    program = (
        "import sys\n"
        "for name in ('ray', 'yt_dlp', 'scenedetect', 'cv2', 'open_clip', 'transformers', 'typer', 'pydantic'):\n"
        "    sys.modules[name] = None\n"
        "from videofactory.shards.reader import Decode, stream\n"
        f"assert len(list(stream({dataset!r}, split=None, decode=Decode(frames=2, height=32)))) == {len(kept(dataset))}\n"
        "assert not [name for name in sys.modules if name.startswith(('videofactory.curation', 'videofactory.pipelines'))]\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
