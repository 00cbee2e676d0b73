"""Which clip goes to which bucket and why not, and which frames of a clip make up a sample."""

from __future__ import annotations

import io
from typing import Any

import av
import numpy as np
import pytest
import torch
from rich.console import Console

from videofactory.model.training.buckets import BucketError, BucketTable, Measures, assign
from videofactory.model.training.frames import ClipError, _promised, decode, window_of
from videofactory.model.training.options import Bucket, DataOptions
from videofactory.shards.reader import scaled

from .test_reader import _broken, odd_clip

WIDE = Bucket(16, 192, 344, 2, 8.0)
TALL = Bucket(16, 344, 192, 1, 8.0)
LONG = Bucket(32, 192, 344, 1, 8.0)


def measures(*clips: tuple[float, float, float, float], captioned: list[bool] | None = None) -> Measures:
    """Clips of (width, height, frames, fps)."""
    values = np.array(clips, np.float64).reshape(-1, 4)
    return Measures(*values.T, np.array(captioned if captioned is not None else [True] * len(clips)))


def members(table: BucketTable) -> dict[str, list[int]]:
    return {share.bucket.name: share.clips.tolist() for share in table.shares}


def test_a_clip_goes_to_the_bucket_that_fits_best() -> None:
    clips = measures(
        (1280, 720, 60, 30.0),  # wide, two seconds
        (1280, 720, 150, 30.0),  # wide, five seconds: the longer bucket
        (720, 1280, 150, 30.0),
        (1000, 1000, 60, 30.0),  # fits both within 1.8: nearer to tall by rounding
        (344, 192, 58, 30.0),  # exactly large and long enough
    )
    table = assign([WIDE, TALL, LONG], clips, DataOptions(max_aspect_change=1.8))
    assert members(table) == {"16x192x344@8": [0, 3, 4], "16x344x192@8": [2], "32x192x344@8": [1]}
    assert [share.fitting for share in table.shares] == [4, 2, 1]
    table.check()


def test_every_dropped_clip_is_counted_once_with_its_reason() -> None:
    clips = measures(
        (1280, 720, 60, 30.0),
        (1280, 720, 56, 30.0),  # 55 / 30 s of 15 / 8 s
        (340, 192, 60, 30.0),
        (2000, 400, 60, 30.0),
        (1280, 720, 60, 6.0),
        (1280, 720, 0, 30.0),
        (1280, 720, 60, 30.0),
        captioned=[True] * 6 + [False],
    )
    table = assign([WIDE, TALL], clips, DataOptions())
    wide, tall = table.shares
    assert members(table) == {WIDE.name: [0], TALL.name: []}
    assert wide.dropped == {"not described": 1, "aspect too far": 1, "too small": 1, "too slow": 1, "too short": 1}
    assert table.uncaptioned == 1 and not any(tall.dropped.values())
    assert sum(wide.dropped.values()) + table.uncaptioned + table.used == table.total == 7
    larger = assign([WIDE], clips, DataOptions(max_upscale=1.02, max_aspect_change=4))
    assert larger.used == 3


def test_images_take_frames_of_any_clip_beside_the_videos() -> None:
    clips = measures((1280, 720, 60, 30.0), (1280, 720, 2, 30.0))
    table = assign([WIDE, Bucket(1, 384, 688, 8, 8.0)], clips, DataOptions())
    assert members(table) == {"16x192x344@8": [0], "1x384x688": [0, 1]} and table.used == 2


def test_frames_spread_over_the_clip_ask_for_frames_and_for_no_rate() -> None:
    table = assign([Bucket(16, 192, 344)], measures((1280, 720, 16, 5.0), (1280, 720, 15, 30.0)), DataOptions())
    assert members(table) == {"16x192x344": [0]} and table.shares[0].dropped["too short"] == 1


def test_the_table_says_all_of_it() -> None:
    clips = measures(*[(1280, 720, 60, 30.0)] * 5, (100, 56, 60, 30.0), captioned=[True] * 4 + [False, True])
    table = assign([WIDE], clips, DataOptions(), world=2)
    text = table.text()
    assert text.splitlines() == [
        "bucket        batch  clips  batches per epoch  too small",
        "16x192x344@8      4      4                1.0          1",
        "all                      4                1.0          1",
        "4 of 6 clips are used; 1 were dropped because they have no caption",
    ]
    console = Console(width=100, file=io.StringIO())
    console.print(table.rich())
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(word in shown for word in ("16x192x344@8", "batches per epoch", "too small", "1 were dropped"))


@pytest.mark.parametrize(
    ("buckets", "world", "message"),
    [
        ([WIDE, TALL], 1, r"16x344x192@8 has none of the 4 clips \(no caption: 1\); name other captions"),
        ([Bucket(64, 192, 344, 1, 8.0)], 1, r"\(no caption: 1, too short: 3\); lower the bucket's frames, or raise its fps"),
        ([Bucket(16, 768, 1376, 1, 8.0)], 1, r"too small: 3\); add a smaller bucket, or raise max_upscale"),
        ([WIDE, Bucket(16, 200, 352, 1, 8.0)], 1, r"3 fit and fit another bucket better\)"),
        ([WIDE], 2, r"3 clips, fewer than one global batch of 4 \(batch 2 x 2 processes\).*lower its batch to 1"),
        ([WIDE], 4, r"global batch of 8.*use fewer processes"),
        ([WIDE, WIDE], 1, "16x192x344@8 is there twice"),
        ([], 1, "there is no bucket"),
    ],
)
def test_buckets_that_cannot_train_are_errors(buckets: list[Bucket], world: int, message: str) -> None:
    clips = measures(*[(1280, 720, 60, 30.0)] * 4, captioned=[True] * 3 + [False])
    with pytest.raises(BucketError, match=message):
        assign(buckets, clips, DataOptions(), world).check()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"frames": 0}, "frames is 0"),
        ({"height": 100}, "height is 100; a multiple of 8 is wanted, the VAE's factor: take 96 or 104"),
        ({"width": 4}, "take 8"),
        ({"batch": 1.5}, "batch is 1.5"),
        ({"fps": 0.0}, "fps is 0.0"),
        ({"fps": float("nan")}, "fps is nan"),
    ],
)
def test_shapes_that_cannot_be_are_errors(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bucket(**{"frames": 16, "height": 64, "width": 112, **values})


def test_buckets_are_written_as_text() -> None:
    assert Bucket.parse("16x192x344@8:4") == Bucket(16, 192, 344, 4, 8.0)
    assert Bucket.parse(" 1x64x112 ") == Bucket(1, 64, 112) and Bucket.parse("8x64x112@7.5").name == "8x64x112@7.5"
    with pytest.raises(ValueError, match="FRAMESxHEIGHTxWIDTH"):
        Bucket.parse("16x192")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("order", "random"),
        ("caption_dropout", 1.1),
        ("image_share", float("nan")),
        ("captions", ()),
        ("split", "dev"),
        ("seed", -1),
    ],
)
def test_options_out_of_range_are_errors(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} is"):
        DataOptions(**{name: value})  # type: ignore[arg-type]


def test_a_window_has_the_rate_that_is_asked_for() -> None:
    times = np.arange(60) / 30
    eight = Bucket(8, 8, 8, 1, 10.0)
    assert window_of(times, eight, 0.0).tolist() == list(range(0, 24, 3))
    # The last instant falls on the last frame.
    assert window_of(times, eight, 1.0).tolist() == list(range(38, 60, 3))
    starts = {int(window_of(times, eight, place)[0]) for place in np.linspace(0, 1, 500)}
    assert starts == set(range(39))
    assert window_of(times, Bucket(4, 8, 8, 1, 60.0), 0.0).tolist() == [0, 0, 1, 1]
    assert window_of(times, Bucket(3, 8, 8), 0.9).tolist() == [0, 29, 59]
    assert {int(window_of(times, Bucket(1, 8, 8), place)[0]) for place in np.linspace(0, 0.999, 500)} == set(range(60))


@pytest.mark.parametrize(("bucket", "message"), [(Bucket(61, 8, 8), "60 frames"), (Bucket(32, 8, 8, 1, 10.0), "lasts 1.967 s")])
def test_a_clip_that_is_too_short_is_an_error(bucket: Bucket, message: str) -> None:
    with pytest.raises(ClipError, match=message):
        window_of(np.arange(60) / 30, bucket, 0.5)


UNEVEN = [7, 40, 41, 90, 300, 310, 1000, 1001, 1700, 1710, 1720]


@pytest.mark.parametrize("place", [0.0, 0.3, 0.77, 0.999])
@pytest.mark.parametrize("bucket", [Bucket(5, 24, 32, 1, 8.0), Bucket(1, 24, 32), Bucket(7, 32, 32), Bucket(3, 24, 32, 1, 25.0)])
@pytest.mark.parametrize("times", [list(range(0, 2000, 40)), UNEVEN], ids=["regular", "uneven"])
@pytest.mark.parametrize("ends", [True, False], ids=["whole", "broken end"])
def test_decoding_from_a_key_frame_gives_the_frames_of_decoding_all(
    bucket: Bucket, place: float, times: list[int], ends: bool
) -> None:
    video = odd_clip(times, ends)
    with av.open(io.BytesIO(video)) as container:
        frames = list(container.decode(video=0))
    with av.open(io.BytesIO(video)) as container:
        shown = sorted(float(p.pts * p.time_base) for p in container.demux(video=0) if p.size)
    whole = len(shown) == len(frames)
    assert whole or not ends
    if not frames:
        with pytest.raises(ClipError, match="it has no frame"):
            decode(video, bucket, place)
        return
    delivered = np.array([frame.time for frame in frames])
    if not whole and _promised(video, bucket, place, 1) is not None:
        # All that is asked for lies before what is broken.
        chosen = np.array(shown)[window_of(np.array(shown), bucket, place)]
        numbers = np.searchsorted(delivered, chosen - 1e-6)
    else:
        numbers = window_of(delivered, bucket, place)
    expected = np.stack([scaled(frames[number], bucket.height, bucket.width) for number in numbers])
    assert torch.equal(decode(video, bucket, place).permute(1, 2, 3, 0), torch.from_numpy(expected))


def test_what_lies_before_the_window_is_not_decoded() -> None:
    video, file = odd_clip(list(range(0, 2000, 40))), io.BytesIO()
    with av.open(io.BytesIO(video)) as source, av.open(file, "w", format="matroska") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(packet for packet in source.demux(video=0) if packet.size):
            # The window lies in the last of five groups of twelve frames.
            changed = _broken(packet) if number < 36 else packet
            changed.stream = stream
            target.mux(changed)
    late = Bucket(1, 24, 32)
    assert torch.equal(decode(file.getvalue(), late, 0.98), decode(video, late, 0.98))


@pytest.mark.parametrize("content", [b"", b"no video at all" * 100])
def test_bytes_that_are_no_video_are_an_error_of_the_clip(content: bytes) -> None:
    with pytest.raises(ClipError):
        decode(content, WIDE, 0.5)
