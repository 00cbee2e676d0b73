"""Training from the shards: streaming and map-style, in data-loader workers, without Ray or yt-dlp."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import webdataset as wds

from videofactory.shards.index import Index
from videofactory.shards.reader import Decode, MapDataset, all_frames, stream

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
    with pytest.raises(ValueError, match="no kept clip"):
        MapDataset(dataset, where="motion > 99")


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


def plain(decode: Decode, video: bytes) -> torch.Tensor:
    """What `decode` shall give, chosen from all frames at once."""
    with av.open(io.BytesIO(video)) as container:
        frames = list(container.decode(video=0))
    times = [frame.time or 0.0 for frame in frames]
    places = np.searchsorted(times, decode._instants(times), side="right") - 1
    images = [decode._scaled(frames[place]) for place in places.clip(0)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def odd_clip(timestamps: list[int], ends: bool = True) -> bytes:
    """A Matroska clip with B frames at the given milliseconds; `ends=False` breaks its last packets."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "2", "g": "12"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, pts in enumerate(timestamps):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 5 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = pts, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        for packet in stream.encode():
            if not ends:
                packet = _broken(packet)
            container.mux(packet)
    return file.getvalue()


def _broken(packet: av.Packet) -> av.Packet:
    broken = av.Packet(bytes(packet.size))
    broken.pts, broken.dts, broken.time_base, broken.stream = packet.pts, packet.dts, packet.time_base, packet.stream
    return broken


@pytest.mark.parametrize(
    "decode",
    [Decode(16, 48, 64), Decode(7, 32), Decode(40, 24), Decode(5, 48, fps=3.0), Decode(30, 48, 48, fps=60.0), Decode(1, 48)],
)
def test_decode_gives_what_choosing_from_all_frames_gives(decode: Decode, dataset: str) -> None:
    regular, uneven = range(0, 2000, 40), [7, 40, 41, 90, 300, 310, 1000, 1001, 1700, 1710, 1720]
    videos = [odd_clip(list(regular)), odd_clip(uneven), odd_clip([500]), MapDataset(dataset, split=None)[0]["video"]]
    for video in videos:
        assert torch.equal(decode(video), plain(decode, video))


def test_all_frames_are_those_that_were_written() -> None:
    frames, rate = all_frames(odd_clip(list(range(0, 400, 40))))
    assert frames.shape == (10, 48, 64, 3) and rate == pytest.approx(25)
    assert np.abs(frames.mean(axis=(1, 2, 3)) - 5.0 * np.arange(10)).max() < 2
    for content in (b"", b"no video", b"\0" * 10_000):
        with pytest.raises(ValueError, match="no video that can be decoded"):
            all_frames(content)


def test_decode_believes_the_decoder_more_than_the_packets() -> None:
    video = odd_clip(list(range(0, 2000, 40)), ends=False)
    decode = Decode(9, 48)
    assert torch.equal(decode(video), plain(decode, video))


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of the peak differs")
def test_memory_of_decoding_does_not_grow_with_the_clip(tmp_path: Path) -> None:
    path = tmp_path / "long.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((1080, 1280), np.uint8), format="yuv420p")
        for number in range(300):
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    program = (
        "import resource, sys\n"
        "from videofactory.shards.reader import Decode\n"
        "import av, torch\n"
        f"video = open({str(path)!r}, 'rb').read()\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "assert Decode(frames=16, height=96)(video).shape == (16, 3, 96, 168)\n"
        "print((peak() - before) // 1024)\n"
    )
    grown = int(subprocess.run([sys.executable, "-c", program], check=True, timeout=120, capture_output=True).stdout)
    # All frames at once take 300 x 1.3 MiB.
    assert grown < 200


def epochs(source: object, count: int) -> list[list[str]]:
    return [[sample["clip_id"] for sample, _ in zip(source, range(100), strict=False)] for _ in range(count)]  # type: ignore[call-overload]


@pytest.mark.parametrize("resampled", [False, True])
def test_every_epoch_has_its_own_order_and_can_be_repeated(dataset: str, resampled: bool) -> None:
    def orders(seed: int) -> list[list[str]]:
        return epochs(stream(dataset, split=None, shuffle=4, resampled=resampled, seed=seed), 3)

    first = orders(1)
    assert len({tuple(order) for order in first + orders(2)}) == 6
    if not resampled:
        assert all(sorted(order) == sorted(kept(dataset)) for order in first)
    program = (
        "from tests.test_reader import *\n"
        f"print(epochs(stream({dataset!r}, split=None, shuffle=4, resampled={resampled}, seed=1), 3))\n"
    )
    said = subprocess.run([sys.executable, "-c", program], check=True, timeout=120, capture_output=True, text=True).stdout
    assert first == orders(1) == ast.literal_eval(said)


@pytest.mark.parametrize("persistent", [False, True])
def test_every_epoch_of_a_data_loader_has_its_own_order(dataset: str, persistent: bool) -> None:
    def orders() -> list[list[str]]:
        source = stream(dataset, split=None, shuffle=4, seed=1, decode=len)
        loader = torch.utils.data.DataLoader(source, batch_size=None, num_workers=2, persistent_workers=persistent)
        return epochs(loader, 3)

    first = orders()
    assert all(sorted(order) == sorted(kept(dataset)) for order in first)
    assert len({tuple(order) for order in first}) == 3
    assert orders() == first


def test_nodes_have_disjoint_parts_in_every_shuffled_epoch(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    nodes = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        nodes.append(epochs(stream(dataset, split=None, shuffle=4, seed=3), 8))
    for parts in zip(*nodes, strict=True):
        assert sorted(parts[0] + parts[1]) == sorted(kept(dataset)) and all(parts)
    assert len({frozenset(part) for part in nodes[0]}) > 1


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
