"""Latents made beforehand: equal to those made while training, committed part by part, refused where they do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from videofactory.model import miniature
from videofactory.model.precompute import Encoder, Work, app, precompute
from videofactory.model.training import latents as stored
from videofactory.model.training.buckets import assign
from videofactory.model.training.clips import Clips
from videofactory.model.training.data import Bucket, DataOptions, Loader
from videofactory.model.training.frames import decode
from videofactory.model.training.latents import LatentsError, Record, fingerprint, read_index
from videofactory.model.training.samples import VideoSource
from videofactory.shards.storage import Storage

from .training_datasets import damage, training_dataset

BUCKET = Bucket(3, 24, 40, batch=4, fps=4.0)
IMAGES = Bucket(1, 24, 40, batch=4)
HERE = DataOptions(seed=3, split=None, workers=0)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def vae() -> Any:
    return miniature.vae()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return training_dataset(tmp_path_factory.mktemp("training"), sources=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, dataset: str, vae: Any) -> str:
    """Latents of two windows of every clip, for the videos and the images."""
    out = str(tmp_path_factory.mktemp("latents"))
    assert precompute(Storage(out), work_of(dataset, vae, [BUCKET, IMAGES]), chunk=4) == {}
    return out


def work_of(dataset: str, vae: Any, buckets: list[Bucket], windows: int = 2) -> Work:
    options = replace(HERE, uncaptioned="empty")
    clips = Clips(dataset, options)
    record = Record(fingerprint(vae), vae.config.scaling_factor, 0.0, windows)
    return Work(clips, assign(buckets, clips.measures, options), record, Encoder(vae, 2), options)


def loader(dataset: str, folder: str, vae: Any, buckets: list[Bucket] | None = None, **changes: Any) -> Loader:
    return Loader(dataset, buckets or [BUCKET], replace(HERE, **changes), latents=folder, vae=fingerprint(vae))


def test_stored_posteriors_are_those_of_the_vae(dataset: str, folder: str, vae: Any) -> None:
    rows = read_index(Storage(folder)).to_pylist()
    assert len(rows) == 9 * 2 * 2 and len({(row["clip_id"], row["bucket"], row["window"]) for row in rows}) == len(rows)
    clips = Clips(dataset, HERE)
    for row in (row for row in rows if row["clip_id"] == clips.clip_id(4)):
        bucket = BUCKET if row["bucket"] == BUCKET.name else IMAGES
        video = decode(VideoSource(clips, HERE).encoded(4), bucket, (row["window"] + 0.5) / 2)
        with torch.no_grad():
            posterior = vae.encode(video.transpose(0, 1).float() / 127.5 - 1).latent_dist
        content = Storage(folder).get_range(row["file"], row["offset"], 2 * int(np.prod(row["shape"])))
        moments = torch.from_numpy(np.frombuffer(content, np.float16).reshape(row["shape"]).copy()).float()
        expected = torch.stack([posterior.mean, posterior.std]).transpose(1, 2)
        assert moments.shape == (2, 4, bucket.frames, 3, 5)
        torch.testing.assert_close(moments, expected, rtol=2e-3, atol=2e-3)


def test_the_files_are_safetensors(folder: str) -> None:
    from safetensors.numpy import load_file

    found = [load_file(path)["moments"] for path in Path(folder, "parts").iterdir()]
    # Nine clips in parts of four, two windows each.
    assert sorted(len(moments) for moments in found) == [2, 2, 8, 8, 8, 8] and found[0].dtype == np.float16


def test_batches_hold_scaled_samples_of_the_posterior(dataset: str, folder: str, vae: Any) -> None:
    reading = loader(dataset, folder, vae, [BUCKET, IMAGES], image_share=0.5)
    batch = reading.at(0)
    assert set(batch) == {"latents", "captions", "clip_ids", "bucket", "step"}
    assert batch["latents"].shape == (4, 4, 3, 3, 5) and batch["latents"].dtype == torch.float32
    assert reading.at(1)["latents"].shape == (4, 4, 1, 3, 5)
    with torch.no_grad():
        shown = vae.decode(batch["latents"][0].transpose(0, 1) / vae.config.scaling_factor).sample
    seen = Loader(dataset, [BUCKET], HERE).at(0)["video"][0].transpose(0, 1).float() / 127.5 - 1
    # Blurred: all windows show the same texture, moving; the miniature's pictures are rough.
    small, true = (torch.nn.functional.avg_pool2d(pictures, 8).flatten() for pictures in (shown, seen))
    assert torch.corrcoef(torch.stack([small, true]))[0, 1] > 0.5


def test_every_visit_draws_another_sample_and_repeats_exactly(dataset: str, folder: str, vae: Any) -> None:
    reading = loader(dataset, folder, vae)
    batches = list(reading.iterate(0, 9))
    assert all(torch.equal(batch["latents"], loader(dataset, folder, vae).at(batch["step"])["latents"]) for batch in batches[::4])
    visits: dict[str, list[torch.Tensor]] = {}
    for batch in batches:
        for clip, latent in zip(batch["clip_ids"], batch["latents"], strict=True):
            visits.setdefault(clip, []).append(latent)
    assert all(len(found) == 4 and not torch.equal(found[0], found[1]) for found in visits.values())
    videos = Loader(dataset, [BUCKET], HERE)
    assert all(batch["clip_ids"] == videos.at(batch["step"])["clip_ids"] for batch in batches)
    assert all(batch["captions"] == videos.at(batch["step"])["captions"] for batch in batches)


def test_workers_and_ranks_change_nothing(dataset: str, folder: str, vae: Any) -> None:
    whole = loader(dataset, folder, vae).at(5)["latents"]
    ahead = next(loader(dataset, folder, vae, workers=1).iterate(5, 6))
    half = replace(BUCKET, batch=2)
    ranks = [
        Loader(dataset, [half], HERE, rank=rank, world=2, latents=folder, vae=fingerprint(vae)).at(5)["latents"]
        for rank in (0, 1)
    ]
    assert torch.equal(ahead["latents"], whole) and torch.equal(torch.cat(ranks), whole)


class _Breaking(Encoder):
    """An encoder that fails after some windows."""

    left = 7

    def __call__(self, video: torch.Tensor) -> Any:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("the machine is gone")
        return super().__call__(video)


def test_a_second_run_goes_on_where_the_first_stopped(tmp_path: Path, dataset: str, vae: Any) -> None:
    work, storage = work_of(dataset, vae, [BUCKET]), Storage(str(tmp_path))
    with pytest.raises(RuntimeError, match="the machine is gone"):
        precompute(storage, replace(work, encoder=_Breaking(vae, 2)), chunk=2)
    with pytest.raises(LatentsError, match="7 of 9 clips of bucket 3x24x40@4 have no latents"):
        loader(dataset, str(tmp_path), vae)
    assert len(read_index(storage)) == 4
    steps: list[tuple[int, int]] = []
    precompute(storage, work, chunk=2, progress=lambda made, left: steps.append((made, left)))
    assert steps == [(4, 14), (8, 14), (12, 14), (14, 14)] and len(read_index(storage)) == 18
    loader(dataset, str(tmp_path), vae).at(0)
    precompute(storage, work, progress=lambda made, left: steps.append((made, left)))
    assert len(steps) == 4


def test_machines_divide_the_clips(tmp_path: Path, dataset: str, vae: Any) -> None:
    work, storage = work_of(dataset, vae, [BUCKET], windows=1), Storage(str(tmp_path))
    for number in range(2):
        precompute(storage, work, part=(number, 2))
    assert len(set(read_index(storage)["clip_id"].to_pylist())) == len(read_index(storage)) == 9


@pytest.fixture
def own_folder(folder: str, tmp_path: Path) -> str:
    return str(shutil.copytree(folder, tmp_path / "latents"))


def test_latents_of_something_else_are_refused(
    dataset: str, own_folder: str, vae: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LatentsError, match=f"vae is '{fingerprint(vae)}', and 'another' is wanted"):
        Loader(dataset, [BUCKET], HERE, latents=own_folder, vae="another")
    with pytest.raises(LatentsError, match="pass vae=fingerprint"):
        Loader(dataset, [BUCKET], HERE, latents=own_folder)
    with pytest.raises(LatentsError, match=r"bucket 4x24x40@4 .* the buckets there are 1x24x40, 3x24x40@4"):
        loader(dataset, own_folder, vae, [replace(BUCKET, frames=4)])
    with pytest.raises(LatentsError, match="flip"):
        loader(dataset, own_folder, vae, flip=True)
    with pytest.raises(LatentsError, match=r"holds no latents \(latents.json is missing\)"):
        loader(dataset, str(tmp_path), vae)
    with pytest.raises(LatentsError, match="windows is 2, and 3 is wanted"):
        precompute(Storage(own_folder), work_of(dataset, vae, [BUCKET], windows=3))
    monkeypatch.setattr(stored, "DECODING", "bilinear")
    with pytest.raises(LatentsError, match=r"decoding is 'bicubic.*and 'bilinear' is wanted"):
        loader(dataset, own_folder, vae)


def test_clips_that_were_made_again_need_new_latents(tmp_path: Path, own_folder: str, vae: Any) -> None:
    from .datasets import write_dataset
    from .videos import make_video

    video = make_video(tmp_path / "other.mp4", 6, seconds=[1.0]).read_bytes()
    other = write_dataset(tmp_path / "other", sources=3, video=video).uri
    with pytest.raises(LatentsError, match="9 of 9 clips"):
        loader(other, own_folder, vae)


def test_a_damaged_record_or_index_is_named(dataset: str, own_folder: str, vae: Any) -> None:
    part = next(Path(own_folder, "index").iterdir())
    content = part.read_bytes()
    part.write_bytes(content[:50])
    with pytest.raises(LatentsError, match=part.name):
        loader(dataset, own_folder, vae)
    part.write_bytes(content)
    Path(own_folder, "latents.json").write_text("{")
    with pytest.raises(LatentsError, match=r"latents.json cannot be read"):
        loader(dataset, own_folder, vae)


def test_damaged_latents_are_replaced_and_named(dataset: str, own_folder: str, vae: Any) -> None:
    row = read_index(Storage(own_folder)).to_pylist()[0]
    with Path(own_folder, row["file"]).open("r+b") as file:
        file.seek(row["offset"])
        file.write(b"\x01" * 8)
    reading = loader(dataset, own_folder, vae, [BUCKET if row["bucket"] == BUCKET.name else IMAGES])
    list(reading.iterate(0, 20))
    assert list(reading.bad) == [row["clip_id"]] and "CRC-32" in reading.bad[row["clip_id"]]


def test_unreadable_clips_are_recorded_and_then_replaced(tmp_path: Path, dataset: str, vae: Any) -> None:
    own = str(shutil.copytree(dataset, tmp_path / "copy"))
    broken = damage(own, 2)
    out = str(tmp_path / "out")
    assert set(precompute(Storage(out), work_of(own, vae, [BUCKET]))) == broken
    reading = loader(own, out, vae)
    seen = {clip for batch in reading.iterate(0, 9) for clip in batch["clip_ids"]}
    assert set(reading.bad) == broken and not seen & broken
    assert set(precompute(Storage(out), work_of(own, vae, [BUCKET]))) == broken
    assert len(read_index(Storage(out))) == 18
    # The same dataset, repaired: what was unreadable is made now.
    assert precompute(Storage(out), work_of(dataset, vae, [BUCKET])) == {}
    repaired = loader(dataset, out, vae)
    list(repaired.iterate(0, 9))
    assert not repaired.bad and len(read_index(Storage(out))) == 22


def test_another_vae_has_another_fingerprint(vae: Any) -> None:
    other = miniature.vae()
    assert fingerprint(other) == fingerprint(vae)
    with torch.no_grad():
        next(iter(other.parameters())).view(-1)[0] += 1e-3
    assert fingerprint(other) != fingerprint(vae)


def test_numbers_that_are_none_are_an_error(vae: Any) -> None:
    class Broken:
        device, dtype = vae.device, vae.dtype

        def encode(self, pixels: torch.Tensor) -> Any:
            return type("Output", (), {"latent_dist": vae.encode(pixels * torch.nan).latent_dist})

    with pytest.raises(FloatingPointError, match="--dtype fp32"):
        Encoder(Broken(), 2)(torch.zeros(3, 2, 24, 40, dtype=torch.uint8))


@pytest.fixture(scope="module")
def runner() -> Iterator[CliRunner]:
    yield CliRunner()


def test_the_command_makes_latents_that_training_reads(runner: CliRunner, tmp_path: Path, dataset: str, vae: Any) -> None:
    arguments = [dataset, "--vae", "miniature", "--out", str(tmp_path), "--bucket", "3x24x40@4", "--split", "all"]
    ended = runner.invoke(app, [*arguments, "--workers", "1", "--chunk", "4"])
    assert ended.exit_code == 0, ended.output
    assert "9 of 9 clips are used" in " ".join(ended.output.split()) and "done in" in ended.output
    assert json.loads((tmp_path / "latents.json").read_text())["vae"] == fingerprint(vae)
    assert loader(dataset, str(tmp_path), vae).at(0)["latents"].shape == (4, 4, 3, 3, 5)
    assert runner.invoke(app, [*arguments, "--windows", "2", "--workers", "0"]).exit_code == 2


def test_a_variant_of_the_weights_is_read(runner: CliRunner, tmp_path: Path, dataset: str, vae: Any) -> None:
    vae.save_pretrained(tmp_path / "pipeline" / "vae", variant="fp16")
    arguments = [dataset, "--vae", str(tmp_path / "pipeline"), "--out", str(tmp_path / "out"), "--bucket", "3x24x40@4"]
    arguments += ["--split", "all", "--workers", "0"]
    assert runner.invoke(app, arguments).exit_code == 2
    ended = runner.invoke(app, [*arguments, "--variant", "fp16", "--revision", "main"])
    assert ended.exit_code == 0, ended.output
    assert json.loads((tmp_path / "out" / "latents.json").read_text())["vae"] == fingerprint(vae)


def test_a_revision_is_asked_for_on_the_hub(
    runner: CliRunner, tmp_path: Path, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []

    def from_pretrained(name: str, revision: str | None = None, **_: Any) -> Any:
        asked.append(revision)
        raise OSError(f"{name} is not here")

    monkeypatch.setattr("diffusers.AutoencoderKL.from_pretrained", from_pretrained)
    arguments = [dataset, "--vae", "someone/vae", "--revision", "v1.2", "--out", str(tmp_path / "out"), "--bucket", "3x24x40@4"]
    assert runner.invoke(app, arguments).exit_code == 2
    assert asked == ["v1.2", "v1.2"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--bucket": "3x24"}, "FRAMESxHEIGHTxWIDTH"),
        ({"--bucket": "99x24x40@4"}, "none of the 9 clips"),
        ({"--share": "4/4"}, "--share '4/4'"),
        ({"--vae": "/no/such/vae"}, "/no/such/vae"),
        ({"--device": "abacus"}, "abacus"),
        ({"--where": "motion > 9"}, "motion > 9"),
    ],
)
def test_wrong_arguments_are_found_before_any_work(
    runner: CliRunner, tmp_path: Path, dataset: str, changes: dict[str, str], message: str
) -> None:
    options = {"--vae": "miniature", "--out": str(tmp_path / "out"), "--bucket": "3x24x40@4", "--split": "all", **changes}
    ended = runner.invoke(app, [dataset, *(text for pair in options.items() for text in pair)])
    assert ended.exit_code == 2 and message in " ".join(ended.output.split()), ended.output
    assert not (tmp_path / "out").exists()
