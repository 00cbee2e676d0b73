"""Batches for training: pure functions of the step, whatever the workers and processes; captions; unreadable clips; damage."""

from __future__ import annotations

import gc
import multiprocessing
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from videofactory.model.training.buckets import BucketError
from videofactory.model.training.clips import DatasetError
from videofactory.model.training.data import BadClipsError, Bucket, DataOptions, Loader

from .training_datasets import add_captions, damage, kept, training_dataset

BUCKET = Bucket(4, 24, 40, batch=4, fps=8.0)
IMAGES = Bucket(1, 24, 40, batch=4)
HERE = DataOptions(seed=3, split=None, workers=0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return training_dataset(tmp_path_factory.mktemp("training"))


@pytest.fixture
def own_dataset(dataset: str, tmp_path: Path) -> str:
    return str(shutil.copytree(dataset, tmp_path / "copy"))


def options(**changes: Any) -> DataOptions:
    return DataOptions(**{"seed": 3, "split": None, "workers": 0, **changes})


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    texts = all(first[name] == second[name] for name in ("captions", "clip_ids", "bucket", "step"))
    return texts and torch.equal(first["video"], second["video"])


def processes() -> set[int]:
    return {child.pid or 0 for child in multiprocessing.active_children()}


def test_a_batch_says_what_it_holds(dataset: str) -> None:
    batch = Loader(dataset, [BUCKET], HERE).at(0)
    assert set(batch) == {"video", "captions", "clip_ids", "bucket", "step"}
    assert batch["video"].shape == (4, 3, 4, 24, 40) and batch["video"].dtype == torch.uint8
    assert batch["video"].float().std() > 10 and batch["bucket"] == BUCKET and batch["step"] == 0
    assert len(set(batch["clip_ids"])) == 4 and all(text.startswith("a thing at") for text in batch["captions"])


def test_every_epoch_delivers_every_clip_once(dataset: str) -> None:
    loader = Loader(dataset, [BUCKET], HERE)
    seen = [clip for batch in loader.iterate(0, 9) for clip in batch["clip_ids"]]
    clips = sorted(str(row["clip_id"]) for row in kept(dataset))
    # 18 clips in batches of 4: the fifth batch has two clips of each epoch.
    assert sorted(seen[:18]) == sorted(seen[18:]) == clips and seen[:18] != seen[18:]


def test_windows_and_captions_change_from_visit_to_visit(dataset: str) -> None:
    pictures = [batch["video"][0, :, 0].float().mean().item() for batch in Loader(dataset, [IMAGES], HERE).iterate(0, 8)]
    assert len(set(pictures)) > 3
    other = Loader(dataset, [IMAGES], options(seed=4)).at(0)
    assert not same(other, Loader(dataset, [IMAGES], HERE).at(0))


@pytest.mark.parametrize("order", ["shuffled", "shards"])
def test_workers_and_processes_change_nothing(dataset: str, order: str) -> None:
    whole = list(Loader(dataset, [BUCKET], options(order=order, window=2, caption_dropout=0.3, flip=True)).iterate(0, 6))
    for settings, world in ((options(workers=2), 1), (options(), 2), (options(), 4)):
        settings = DataOptions(**{**settings.__dict__, "order": order, "window": 2, "caption_dropout": 0.3, "flip": True})
        bucket = Bucket(4, 24, 40, batch=4 // world, fps=8.0)
        parts = [list(Loader(dataset, [bucket], settings, rank=rank, world=world).iterate(0, 6)) for rank in range(world)]
        for number, batch in enumerate(whole):
            ranks = [part[number] for part in parts]
            assert [value for part in ranks for value in part["clip_ids"]] == batch["clip_ids"]
            assert [value for part in ranks for value in part["captions"]] == batch["captions"]
            assert torch.equal(torch.cat([part["video"] for part in ranks]), batch["video"])


def test_a_run_goes_on_from_any_step(dataset: str) -> None:
    settings = options(image_share=0.25)
    first = list(Loader(dataset, [BUCKET, IMAGES], settings).iterate(0, 12))
    resumed = Loader(dataset, [BUCKET, IMAGES], settings)
    assert all(same(batch, first[7 + number]) for number, batch in enumerate(resumed.iterate(7, 12)))
    assert same(resumed.at(2), first[2])
    assert [batch["bucket"].is_image for batch in first] == [False, False, False, True] * 3


def test_reading_leaves_the_global_chance_alone(dataset: str) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    list(Loader(dataset, [BUCKET], options(workers=1)).iterate(0, 1))
    assert torch.equal(torch.rand(3), expected)


def test_workers_that_are_spawned_give_the_same(dataset: str) -> None:
    spawned = Loader(dataset, [BUCKET], options(workers=1, start_method="spawn"))
    assert all(same(batch, Loader(dataset, [BUCKET], HERE).at(batch["step"])) for batch in spawned.iterate(3, 5))


def test_processes_end_with_the_iteration_and_when_the_consumer_fails(dataset: str) -> None:
    before = processes()
    loader = Loader(dataset, [BUCKET], options(workers=2))
    assert len(list(loader.iterate(0, 3))) == 3 and loader.waited > 0
    assert processes() == before

    def consume() -> None:
        with loader:
            for batch in loader.iterate():
                assert processes() > before
                if batch["step"] == 2:
                    raise RuntimeError("the consumer fails")

    with pytest.raises(RuntimeError, match="consumer fails"):
        consume()
    assert processes() == before
    loose = loader.iterate()
    next(loose)
    del loose
    gc.collect()
    assert processes() == before


def test_a_program_that_fails_while_reading_ends(dataset: str) -> None:
    program = (
        "from videofactory.model.training.data import *\n"
        f"loader = Loader({dataset!r}, [{BUCKET!r}], DataOptions(split=None, workers=2))\n"
        "for batch in loader.iterate():\n"
        "    raise SystemExit(7)\n"
    )
    begun = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", program], timeout=120, capture_output=True, text=True, check=False)
    assert ended.returncode == 7 and not ended.stderr, ended.stderr
    assert time.monotonic() - begun < 100


def test_captions_come_from_the_column_and_from_sidecars(own_dataset: str) -> None:
    clips = [str(row["clip_id"]) for row in kept(own_dataset)]
    add_captions(own_dataset, "longer", pa.table({"clip_id": clips, "caption": [f"long {clip}" for clip in clips]}))
    lists = pa.array([[f"first {clip}", f"second {clip}"] for clip in clips[1:]] + [[]])
    add_captions(own_dataset, "several", pa.table({"clip_id": [*clips[1:], "unknown"], "texts": lists}))
    loader = Loader(own_dataset, [IMAGES], options(captions=("caption", "longer.caption", "several.texts")))
    seen = Counter()
    for batch in loader.iterate(0, 40):
        for clip, text in zip(batch["clip_ids"], batch["captions"], strict=True):
            kind, _, rest = text.partition(" ")
            assert rest == clip or kind == "a"
            seen[kind, clip == clips[0]] += 1
    assert {kind for kind, first in seen if not first} == {"a", "long", "first", "second"}
    assert {kind for kind, first in seen if first} <= {"a", "long"}
    alone = Loader(own_dataset, [IMAGES], options(captions=("several.texts",)))
    assert alone.table.uncaptioned == 1 and alone.table.used == 17
    empty = Loader(own_dataset, [IMAGES], options(captions=("several.texts",), uncaptioned="empty"))
    assert empty.table.used == 18
    texts = dict(pair for batch in empty.iterate(0, 9) for pair in zip(batch["clip_ids"], batch["captions"], strict=True))
    assert texts[clips[0]] == "" and all(texts[clip] for clip in clips[1:])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("motion",), "no such column of texts"),
        (("absent.caption",), "no tables in index/absent"),
        (("numbers.caption",), "has no column caption; it has clip_id, text"),
        (("numbers.text",), "holds int64 there"),
    ],
)
def test_captions_that_are_not_there_are_an_error(own_dataset: str, names: tuple[str, ...], message: str) -> None:
    add_captions(own_dataset, "numbers", pa.table({"clip_id": ["a"], "text": [1]}))
    with pytest.raises(DatasetError, match=message):
        Loader(own_dataset, [BUCKET], options(captions=names))


def test_captions_are_dropped_with_the_probability_that_is_set(dataset: str) -> None:
    batches = Loader(dataset, [IMAGES], options(caption_dropout=0.5)).iterate(0, 50)
    dropped = [not text for batch in batches for text in batch["captions"]]
    assert 0.35 < sum(dropped) / len(dropped) < 0.65


def test_half_of_the_samples_are_mirrored_where_asked(dataset: str) -> None:
    plain = Loader(dataset, [BUCKET], HERE)
    mirrored = Loader(dataset, [BUCKET], options(flip=True))
    flips = []
    for step in range(6):
        for first, second in zip(plain.at(step)["video"], mirrored.at(step)["video"], strict=True):
            assert torch.equal(second, first) or torch.equal(second, first.flip(-1))
            flips.append(not torch.equal(second, first))
    assert 4 < sum(flips) < 20


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_clips_are_replaced_and_named(own_dataset: str, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    broken = damage(own_dataset, 3)
    loader = Loader(own_dataset, [BUCKET], options(workers=workers))
    batches = list(loader.iterate(0, 9))
    assert set(loader.bad) == broken and all("SHA-256" in error for error in loader.bad.values())
    assert not broken & {clip for batch in batches for clip in batch["clip_ids"]} and len(caplog.records) == 3
    for rank in range(2):
        half = Loader(own_dataset, [Bucket(4, 24, 40, batch=2, fps=8.0)], HERE, rank=rank, world=2)
        for batch in batches:
            own = half.at(batch["step"])
            assert own["clip_ids"] == batch["clip_ids"][2 * rank : 2 * rank + 2]
            assert torch.equal(own["video"], batch["video"][2 * rank : 2 * rank + 2])


def test_too_many_unreadable_clips_stop_the_run(own_dataset: str) -> None:
    broken = damage(own_dataset, 12)
    loader = Loader(own_dataset, [BUCKET], options(workers=1))
    with pytest.raises(BadClipsError, match="11 of 18 clips are unreadable, and 10 may be") as failed:
        list(loader.iterate(0, 50))
    assert sum(clip in str(failed.value) for clip in broken) == 3
    list(Loader(own_dataset, [BUCKET], options(max_bad_fraction=0.9)).iterate(0, 20))


def test_all_clips_unreadable_is_an_error_and_no_endless_search(own_dataset: str) -> None:
    damage(own_dataset, 18)
    with pytest.raises(DatasetError, match="100 clips of bucket 4x24x40@8 in a row"):
        Loader(own_dataset, [BUCKET], HERE).at(0)


def test_a_damaged_dataset_is_refused_before_the_first_step(own_dataset: str) -> None:
    shards = sorted((Path(own_dataset) / "shards").glob("*.tar"))
    content = shards[0].read_bytes()
    shards[0].write_bytes(content[:-512])
    with pytest.raises(
        DatasetError, match=rf"{shards[0].name} has {len(content) - 512} bytes, and the index states {len(content)}"
    ):
        Loader(own_dataset, [BUCKET], HERE)
    shards[0].unlink()
    with pytest.raises(DatasetError, match=f"{shards[0].name} is missing"):
        Loader(own_dataset, [BUCKET], HERE)


def test_no_dataset_and_a_damaged_index_are_errors(own_dataset: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="holds no dataset"):
        Loader(str(tmp_path / "nothing"), [BUCKET], HERE)
    part = next(Path(own_dataset, "index", "clips").glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(DatasetError, match=f"{part.name} cannot be read"):
        Loader(own_dataset, [BUCKET], HERE)


def test_a_shard_that_is_lost_on_the_way_stops_the_run(own_dataset: str) -> None:
    loader = Loader(own_dataset, [BUCKET], HERE)
    shutil.rmtree(Path(own_dataset) / "shards")
    with pytest.raises(DatasetError, match="cannot be read"):
        loader.at(0)


def test_no_clip_and_a_wrong_rank_are_errors(dataset: str) -> None:
    with pytest.raises(DatasetError, match="motion > 9"):
        Loader(dataset, [BUCKET], options(where="motion > 9"))
    with pytest.raises(DatasetError, match=r"condition .*moton.* does not work"):
        Loader(dataset, [BUCKET], options(where="moton > 9"))
    with pytest.raises(ValueError, match="rank 2 of 2"):
        Loader(dataset, [BUCKET], HERE, rank=2, world=2)
    with pytest.raises(BucketError, match=r"image_share = 0\.0"):
        Loader(dataset, [BUCKET, IMAGES], HERE)
    with pytest.raises(BucketError, match=r"18 clips, fewer than one global batch of 20 \(batch 4 x 5 processes\).*batch to 3"):
        Loader(dataset, [BUCKET], HERE, world=5)
