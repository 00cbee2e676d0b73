"""Schema, writer, index, verify and reader: round trips, the laws, and kills at every file-system event of a build."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from videofactory.shards.clean import clean
from videofactory.shards.index import Index, IndexDamagedError, amend_clips, shard_list
from videofactory.shards.lease import DatasetBusyError, Lease, StaleRunError
from videofactory.shards.schema import clip_id, clip_schema, conform, source_id, source_schema, split_of, table_of
from videofactory.shards.storage import Storage, StorageError
from videofactory.shards.verify import verify
from videofactory.shards.writer import ShardWriter, put_record

from .datasets import SIGNALS, candidates, contents, finished, source_row, write_dataset


@pytest.fixture
def dataset(tmp_path: Path) -> Storage:
    return write_dataset(tmp_path / "out")


class TestSchema:
    @given(st.floats(0, 999_999.999))
    def test_clip_ids_have_no_dot_and_sort_by_time(self, start: float) -> None:
        identity = clip_id("a" * 16, start)
        assert "." not in identity and len(identity) == 26
        assert identity <= clip_id("a" * 16, min(start + 1, 999_999.999))

    @pytest.mark.parametrize("start", [-1.0, 1e6])
    def test_a_start_that_fits_no_id_is_refused(self, start: float) -> None:
        with pytest.raises(ValueError, match="does not fit"):
            clip_id("a" * 16, start)

    def test_splits_follow_their_fractions(self) -> None:
        drawn = [split_of(source_id(str(number)), 0.1, 0.2) for number in range(4000)]
        assert abs(drawn.count("val") / 4000 - 0.1) < 0.02
        assert abs(drawn.count("test") / 4000 - 0.2) < 0.03

    def test_conform_settles_types(self) -> None:
        table = pa.table({"clip_id": ["x"], "source_id": ["y"], "motion": pa.array([1], pa.int64()), "foreign": [1]})
        conformed = conform(table, clip_schema(SIGNALS))
        assert conformed.schema == clip_schema(SIGNALS)
        assert conformed["motion"].to_pylist() == [1.0] and conformed["caption"].to_pylist() == [None]

    def test_an_undeclared_field_is_an_error(self) -> None:
        with pytest.raises(KeyError, match="motoin"):
            table_of([{"clip_id": "x", "source_id": "y", "motoin": 1.0}], clip_schema(SIGNALS))

    def test_a_signal_may_not_take_a_core_name(self) -> None:
        with pytest.raises(ValueError, match="caption"):
            clip_schema(["caption"])


class TestDataset:
    def test_verifies(self, dataset: Storage) -> None:
        report = verify(dataset)
        assert report.broken == [] and report.notes == []
        assert report.checked == {"sources": 3, "clips": 12, "kept": 9, "shards": 3}

    def test_standard_tar_reads_it(self, dataset: Storage) -> None:
        rows = {row["clip_id"]: row for row in Index(dataset).clips().to_pylist()}
        for entry in dataset.list("shards", ".tar"):
            with tarfile.open(dataset.local_path(entry.name)) as tar:
                for member in tar:
                    key, field = member.name.split(".")
                    content = tar.extractfile(member).read()  # type: ignore[union-attr]
                    if field == "json":
                        assert json.loads(content)["sha256"] == rows[key]["sha256"]
                        assert member.offset == rows[key]["offset"]
                    elif field == "txt":
                        assert content.decode() == rows[key]["caption"]
                    assert member.mtime == 0

    def test_equal_rows_give_equal_shards(self, tmp_path: Path) -> None:
        sums = []
        for name in ("a", "b"):
            storage = write_dataset(tmp_path / name)
            sums.append([shard["md5sum"] for shard in Index(storage).shards()])
        assert sums[0] == sums[1] and len(sums[0]) == 3

    def test_embeddings_are_a_sidecar_of_half_precision(self, dataset: Storage) -> None:
        table = Index(dataset).embeddings()
        assert len(table) == 9 and table.schema.field("embedding").type.value_type == pa.float16()

    def test_shard_list_is_what_wids_expects(self, dataset: Storage) -> None:
        listed = shard_list(Index(dataset), "test")
        assert listed["__kind__"] == "wids-shard-index-v1" and listed["wids_version"] == 1
        for shard in listed["shardlist"]:
            assert dataset.local_path(shard["url"]).stat().st_size == shard["filesize"]
        assert sum(shard["nsamples"] for shard in listed["shardlist"]) == 9

    def test_queries_reach_no_file(self, dataset: Storage) -> None:
        with pytest.raises(Exception, match=r"(?i)disabled|permission|not allowed"):
            Index(dataset).query("select * from read_csv('/etc/passwd')")

    def test_a_later_part_supersedes(self, dataset: Storage) -> None:
        index = Index(dataset)
        kept = index.query("select * from clips where state = 'kept' order by clip_id limit 1")
        with Lease(dataset) as lease:
            row = {**kept.to_pylist()[0], "rejected_by": "motion"}
            row.pop("state")
            amend_clips(dataset, lease.run, "before", table_of([row], clip_schema(SIGNALS)), SIGNALS)
        index.refresh()
        states = index.query("select state, count(*) as n from clips group by 1 order by 1").to_pylist()
        assert states == [{"state": "kept", "n": 8}, {"state": "rejected", "n": 4}]
        assert verify(dataset).ok


class TestVerifyNamesWhatIsBroken:
    def test_flipped_byte(self, dataset: Storage) -> None:
        row = Index(dataset).query("select * from clips where state = 'kept' order by clip_id limit 1").to_pylist()[0]
        path = dataset.local_path(row["shard"])
        path.chmod(0o644)
        content = bytearray(path.read_bytes())
        content[row["offset"] + row["size"] - 1500] ^= 1
        path.write_bytes(content)
        promises = {promise for promise, _, _ in verify(dataset).broken}
        assert "a shard's MD5 differs from the index" in promises
        assert "a clip's SHA-256 differs from its row" in promises
        assert verify(dataset, fast=True).ok  # which does not read the shards, and says so in its help

    def test_missing_shard(self, dataset: Storage) -> None:
        dataset.delete(dataset.list("shards", ".tar")[0].name)
        assert [found for _, _, found in verify(dataset, fast=True).broken if "no file" in found]

    def test_shortened_shard(self, dataset: Storage) -> None:
        path = dataset.local_path(dataset.list("shards", ".tar")[0].name)
        with path.open("r+b") as file:
            file.truncate(1000)
        assert "of another size" in verify(dataset).broken[0][0]

    def test_lost_row(self, dataset: Storage) -> None:
        for entry in dataset.list("index/sources", ".parquet"):
            if entry.name.endswith("-1.parquet"):
                path = dataset.local_path(entry.name)
                table = pq.read_table(path)
                changed = table.set_column(table.schema.get_field_index("n_clips"), "n_clips", pa.array([5], pa.int32()))
                pq.write_table(changed, path)
                break
        assert [found for promise, _, found in verify(dataset, fast=True).broken if "n_clips" in promise] == ["n_clips 5, rows 4"]

    @pytest.mark.parametrize("value", [0xFF, ord("x")], ids=["no UTF-8", "no JSON"])
    def test_damaged_json_member(self, dataset: Storage, value: int) -> None:
        row = Index(dataset).query("select * from clips where state = 'kept' order by clip_id limit 1").to_pylist()[0]
        _overwrite(dataset, row["shard"], row["offset"] + 512, bytes([value]))
        assert ("a sample's JSON cannot be read", row["clip_id"], row["shard"]) in verify(dataset).broken

    def test_damaged_caption(self, dataset: Storage) -> None:
        row = Index(dataset).query("select * from clips where state = 'kept' order by clip_id limit 1").to_pylist()[0]
        _overwrite(dataset, row["shard"], row["offset"] + row["size"] - 512, b"\xff")
        assert ("a caption differs from its row", row["clip_id"]) in [broken[:2] for broken in verify(dataset).broken]

    @pytest.mark.parametrize("folder", ["index/clips", "index/sources", "index/embeddings"])
    def test_truncated_index_part(self, dataset: Storage, folder: str) -> None:
        names = [entry.name for entry in dataset.list(folder, ".parquet")][:2]
        for name in names:
            path = dataset.local_path(name)
            path.write_bytes(path.read_bytes()[:-20])
        broken = verify(dataset).broken
        assert [name for promise, name, _ in broken if promise == "a part of the index cannot be read"] == names
        assert not any("no embedding" in promise for promise, _, _ in broken)
        with pytest.raises(IndexDamagedError, match=rf"^{names[0]} cannot be read: .*from a copy, or delete it"):
            Index(dataset).embeddings()

    def test_truncated_shard_list(self, dataset: Storage) -> None:
        dataset.put("shards.json", json.dumps(shard_list(Index(dataset), "test")).encode()[:-30])
        assert [broken[:2] for broken in verify(dataset).broken] == [("shards.json cannot be read", "shards.json")]

    def test_deleted_index_part(self, dataset: Storage) -> None:
        listed = shard_list(Index(dataset), "test")
        dataset.put("shards.json", json.dumps(listed).encode())
        assert verify(dataset).ok
        dataset.delete(dataset.list("index/clips", ".parquet")[0].name)
        report = verify(dataset)
        assert "pending" in report.notes[0]  # which does not excuse it
        lost = ("shards.json names a shard that the index does not", listed["shardlist"][0]["url"])
        assert [broken[:2] for broken in report.broken] == [lost]

    def test_orphans_are_a_note(self, dataset: Storage) -> None:
        dataset.put("shards/000009-dead-1-000000-00000000.tar", b"half a tar")
        report = verify(dataset)
        assert report.ok and "never committed" in report.notes[0]

    def test_no_dataset(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no dataset"):
            verify(str(tmp_path))


def _overwrite(storage: Storage, name: str, offset: int, content: bytes) -> None:
    path = storage.local_path(name)
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def test_an_unknown_kind_of_store_is_said_clearly() -> None:
    with pytest.raises(StorageError, match=r"cannot open 'foo://bar': .*s3://, gs:// or abfs://"):
        Storage("foo://bar").list("index")


class TestRefresh:
    def test_reads_only_what_is_new(self, dataset: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
        index = Index(dataset)
        before = index.clips()
        source = source_row(7)
        with Lease(dataset) as lease:
            rows = candidates(source["source_id"])
            put_record(dataset, lease.run, {**source, "status": "done", "n_clips": 4}, rows, source_schema(SIGNALS))
        opened: list[str] = []
        real = Storage.open

        def watched(self: Storage, name: str) -> object:
            opened.append(name)
            return real(self, name)

        monkeypatch.setattr(Storage, "open", watched)
        index.refresh()
        assert [name.rpartition("-")[0].rpartition("-")[2] for name in opened] == [source["source_id"]]
        assert len(index.clips()) == len(before) + 4
        assert index.clips() == Index(dataset).clips()

    def test_parts_of_other_signals_stand_beside(self, dataset: Storage) -> None:
        index = Index(dataset)
        source = source_row(8)
        rows = [{**row, "sharpness": 0.25} for row in candidates(source["source_id"])]
        with Lease(dataset) as lease:
            schema = source_schema([*SIGNALS, "sharpness"])
            put_record(dataset, lease.run, {**source, "status": "done", "n_clips": 4}, rows, schema)
        index.refresh()
        assert index.signals == (*SIGNALS, "sharpness")
        found = index.query("select sharpness, count(*) as n from clips group by 1 order by 1").to_pylist()
        assert found == [{"sharpness": 0.25, "n": 4}, {"sharpness": None, "n": 12}]


class TestClean:
    def test_removes_what_killed_runs_left_and_nothing_else(self, dataset: Storage) -> None:
        dead = "000001-dead-1-000000-00000000.tar"
        half = ".000001-dead-1-000001-00000000.tar.0123abcd.tmp"
        for name in (dead, half):
            dataset.put(f"shards/{name}", b"half a tar")
        assert "1 temporary files (10 bytes)" in verify(dataset).notes[1]
        with Lease(dataset) as lease:
            own = [f"shards/{lease.run}-1-000000-00000000.tar", f"shards/.{lease.run}-1-000001-00000000.tar.0123abcd.tmp"]
            foreign = ["shards/mine.tar", "shards/.mine.tar.0123abcd.tmp"]
            for name in (*own, *foreign):
                dataset.put(name, b"")
            removed = clean(dataset, Index(dataset), lease.run)
        assert [entry.name for entry in removed] == [f"shards/{half}", f"shards/{dead}"]
        assert all(dataset.exists(name) for name in (*own, *foreign)) and not dataset.exists(f"shards/{dead}")
        assert verify(dataset).ok

    def test_keeps_shards_whose_index_part_was_lost(self, dataset: Storage) -> None:
        dataset.put("shards.json", json.dumps(shard_list(Index(dataset), "test")).encode())
        part = dataset.list("index/clips", ".parquet")[0].name
        dataset.put(part, b"damaged")
        with Lease(dataset) as lease:
            with pytest.raises(IndexDamagedError, match=part):
                clean(dataset, Index(dataset, skip_damaged=True), lease.run)
            dataset.delete(part)
            assert clean(dataset, Index(dataset), lease.run) == []


class TestLease:
    def test_one_build_at_a_time(self, tmp_path: Path) -> None:
        storage = Storage(str(tmp_path))
        with Lease(storage), pytest.raises(DatasetBusyError, match=f"process {os.getpid()}"):
            Lease(storage)
        with Lease(storage) as second:
            assert second.run.startswith("000002-")

    def test_workers_of_a_replaced_run_cannot_commit(self, tmp_path: Path) -> None:
        storage = Storage(str(tmp_path))
        with Lease(storage) as first:
            writer = ShardWriter(storage, first.run, f"{first.run}-1-000000", SIGNALS)
            writer.add(finished(candidates(source_row(0)["source_id"])[1]))
        with Lease(storage), pytest.raises(StaleRunError, match="replaced"):
            writer.commit()
        assert storage.list("index/clips") == []

    def test_a_failed_write_leaves_nothing(self, tmp_path: Path) -> None:
        storage = Storage(str(tmp_path))
        with pytest.raises(RuntimeError), storage.create("x/y") as file:
            file.write(b"half")
            raise RuntimeError
        assert list((tmp_path / "x").iterdir()) == []


def test_killed_at_any_file_system_event_and_continued(tmp_path: Path) -> None:
    """Kill -9 at the n-th file-system event, for events spread over the whole build, then continue: the result is always equal."""
    expected = contents(Path(write_dataset(tmp_path / "undisturbed").uri))
    event, deaths = 3, 0
    while True:
        root = tmp_path / f"killed-{event}"
        died = _run_and_die(root, event)
        if not died:
            break
        deaths += 1
        storage = write_dataset(root)
        assert contents(root) == expected, f"killed at event {event}"
        report = verify(storage)
        assert report.broken == [], f"killed at event {event}"
        event += 13
    assert deaths >= 6


def _run_and_die(root: Path, event: int) -> bool:
    done = subprocess.run(
        [sys.executable, "-m", "tests.datasets", str(root), str(event)],
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-2000:]
    return done.returncode != 0
