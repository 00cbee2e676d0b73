"""What can be scored, which frames are taken of it, and what is left out and counted."""

import shutil

import numpy as np
import pytest
import torch

from videofactory.model.evaluation.inputs import open_videos
from videofactory.model.evaluation.protocol import Protocol, Sampling, protocol_from
from videofactory.model.evaluation.videos import Census, TooShortError, batches, chosen, decode

from .datasets import write_dataset
from .evaluation_clips import FRAMES, HEIGHT, WIDTH, clip, clips, write_clip, write_folder

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"frames": 4, "height": HEIGHT, "width": WIDTH}


def scored(videos, census=None, sampling=None, **settings):
    """All frames of a set (N, F, 3, H, W), and their names."""
    census = census or Census()
    found = list(batches(videos, sampling or Sampling(**SMALL), census, **settings))
    assert [video.name for batch in found for video in batch.videos] == census.scored
    return torch.cat([batch.frames for batch in found]), census


class TestChosen:
    times = (np.arange(30) / 10).tolist()

    @pytest.mark.parametrize(
        ("settings", "wanted"),
        [
            ({"frames": 4, "window": "first"}, [0, 1, 2, 3]),
            ({"frames": 4}, [13, 14, 15, 16]),
            ({"frames": 4, "stride": 3, "window": "first"}, [0, 3, 6, 9]),
            ({"frames": 10, "stride": 3}, [1, 4, 7, 10, 13, 16, 19, 22, 25, 28]),
            ({"frames": 4, "fps": 5, "window": "first"}, [0, 2, 4, 6]),
            ({"frames": 6, "fps": 20, "window": "first"}, [0, 0, 1, 1, 2, 2]),
            ({"frames": 15, "fps": 5}, list(range(0, 30, 2))),
        ],
    )
    def test_frames(self, settings, wanted):
        assert chosen(self.times, Sampling(**settings), "a") == wanted

    @pytest.mark.parametrize("settings", [{"frames": 31}, {"frames": 11, "stride": 3}, {"frames": 16, "fps": 5}])
    def test_too_short_is_said_and_never_filled_up(self, settings):
        with pytest.raises(TooShortError, match="that are needed"):
            chosen(self.times, Sampling(**settings), "a")
        with pytest.raises(TooShortError):
            chosen([], Sampling(**settings), "a")

    def test_a_random_window_depends_on_seed_and_name_alone(self):
        def begin(name, seed):
            return chosen(self.times, Sampling(frames=4, window="random", seed=seed), name)[0]

        assert begin("a", 0) == begin("a", 0)
        assert len({begin(name, 0) for name in "abcdefgh"}) > 2
        assert len({begin("a", seed) for seed in range(8)}) > 2

    def test_a_variable_rate_is_sampled_by_time(self):
        times = [0.0, 0.1, 0.2, 1.0, 1.1, 1.2]
        assert chosen(times, Sampling(frames=3, fps=2, window="first"), "a") == [0, 2, 3]


class TestDecode:
    def test_the_frames_are_those_of_the_file(self, tmp_path):
        frames = clip(1)
        content = write_clip(tmp_path / "a.mp4", frames).read_bytes()
        found, rate = decode(content, Sampling(**SMALL, stride=2, window="first"), "a")
        assert rate == 10 and found.dtype == torch.uint8 and found.shape == (4, 3, HEIGHT, WIDTH)
        wanted = torch.from_numpy(frames[:8:2]).permute(0, 3, 1, 2)
        difference = (found.int() - wanted.int()).abs().float().mean((1, 2, 3))
        assert difference.max() < 6  # chroma is stored in half size
        nearest = [int((found[0].int() - torch.from_numpy(f).permute(2, 0, 1).int()).abs().sum()) for f in frames]
        assert int(np.argmin(nearest)) == 0

    def test_cropped_and_distorted(self):
        frames = np.zeros((2, 40, 80, 3), np.uint8)
        frames[:, :, 20:60] = 255
        cropped, _ = decode(frames, Sampling(2, height=20, width=20), "a")
        distorted, _ = decode(frames, Sampling(2, height=20, width=20, crop="none"), "a")
        assert cropped.float().mean() > 250
        assert distorted.float().mean() == pytest.approx(127, abs=10)

    @pytest.mark.parametrize(("content", "words"), [(b"", "cannot be decoded"), (b"this is no video" * 99, "cannot be decoded")])
    def test_what_is_no_video(self, content, words):
        with pytest.raises(ValueError, match=words):
            decode(content, Sampling(**SMALL), "a")

    def test_a_file_that_breaks_off(self, tmp_path):
        """An MP4 whose index promises frames that are not there any more."""
        from videofactory.model.video_files import write_video

        write_video(tmp_path / "a.mp4", clip(2), 10)  # its index comes first
        content = (tmp_path / "a.mp4").read_bytes()
        with pytest.raises(ValueError):
            decode(content[: len(content) // 3], Sampling(12, height=HEIGHT, width=WIDTH), "a")


class TestInputs:
    def test_a_folder_with_prompts(self, tmp_path):
        folder = write_folder(tmp_path / "a", clips(3), ["one", "two", "three"])
        write_clip(folder / "deeper/x.MP4", clip(9))
        videos = open_videos(str(folder))
        assert [(video.name, video.prompt) for video in videos.videos] == [
            ("000.mp4", "one"),
            ("001.mp4", "two"),
            ("002.mp4", "three"),
            ("deeper/x.MP4", None),
        ]
        assert not videos.has_prompts and videos.form == "encoded"
        (folder / "deeper/x.MP4").unlink()
        assert open_videos(str(folder)).has_prompts

    @pytest.mark.parametrize("channels_last", [True, False])
    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_an_archive_is_read_video_by_video(self, tmp_path, save, channels_last):
        wanted = clips(5)
        stored = wanted if channels_last else wanted.transpose(0, 1, 4, 2, 3)
        save(tmp_path / "a.npz", videos=np.ascontiguousarray(stored), prompts=list("abcde"), fps=12.0)
        videos = open_videos(str(tmp_path / "a.npz"))
        assert videos.form == "frames" and [video.prompt for video in videos.videos] == list("abcde")
        for number in (0, 1, 3, 2, 4, 4):
            assert (videos.videos[number].read() == wanted[number]).all()
        frames, census = scored(videos, sampling=Sampling(FRAMES, height=HEIGHT, width=WIDTH))
        assert (frames.permute(0, 1, 3, 4, 2).numpy() == wanted).all()
        assert census.summary()["fps"]["median"] == 12

    @pytest.mark.parametrize(
        ("arrays", "words"),
        [
            ({"frames": np.zeros(3)}, "holds frames; an array `videos` is wanted"),
            ({"videos": np.zeros((2, 3, 8, 8, 3))}, "float64"),
            ({"videos": np.zeros((2, 3, 8, 8), np.uint8)}, r"uint8 \(2, 3, 8, 8\)"),
            ({"videos": np.zeros((2, 3, 8, 8, 3), np.uint8), "prompts": ["a"]}, "2 videos and 1 prompts"),
            ({"videos": np.array([None])}, "holds videos of object"),
            ({"videos": np.zeros((0, 3, 8, 8, 3), np.uint8)}, "holds no video"),
        ],
    )
    def test_other_archives_are_refused(self, tmp_path, arrays, words):
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(ValueError, match=words):
            open_videos(str(tmp_path / "a.npz"))

    def test_what_is_no_input(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nothing is not there"):
            open_videos("nothing")
        (tmp_path / "a.npz").write_text("no")
        with pytest.raises(ValueError, match=r"no \.npz file of numpy"):
            open_videos(str(tmp_path / "a.npz"))
        (tmp_path / "a.pt").write_text("no")
        with pytest.raises(ValueError, match="no dataset, no folder and no"):
            open_videos(str(tmp_path / "a.pt"))
        with pytest.raises(ValueError, match="holds no video"):
            open_videos(str(tmp_path))
        (tmp_path / "prompts.jsonl").write_text("{}\n")
        with pytest.raises(ValueError, match=r"prompts\.jsonl does not hold file and prompt"):
            open_videos(str(tmp_path))
        with pytest.raises(ValueError, match="no dataset, so --split"):
            open_videos(str(tmp_path), split="val")


class TestBatches:
    def test_what_is_short_or_damaged_is_left_out_counted_and_named(self, tmp_path, caplog):
        folder = write_folder(tmp_path, clips(10))
        write_clip(folder / "short.mp4", clip(1)[:3])
        (folder / "text.mp4").write_text("no")
        frames, census = scored(open_videos(str(folder)), size=4)
        assert frames.shape == (10, 4, 3, HEIGHT, WIDTH)
        assert census.short == 1 and list(census.damaged) == ["text.mp4"] and len(census.scored) == 10
        assert "left out text.mp4" in caplog.text
        assert census.summary()["fps"] == {"least": 10, "median": 10, "most": 10}

    def test_too_many_damaged_videos_are_an_error(self, tmp_path):
        folder = write_folder(tmp_path, clips(3))
        for number in range(4):
            (folder / f"a{number}.mp4").write_text("no")
        with pytest.raises(ValueError, match=r"more than a tenth of its 7 \(the first is a0.mp4: it cannot be decoded"):
            scored(open_videos(str(folder)))

    @pytest.mark.parametrize("archive", [True, False])
    def test_so_many_are_drawn_by_the_seed(self, tmp_path, archive):
        if archive:
            np.savez(tmp_path / "a.npz", videos=clips(9))
        else:
            write_folder(tmp_path / "a.npz", clips(9))
        videos = open_videos(str(tmp_path / "a.npz"))
        drawn = [scored(videos, sampling=Sampling(**SMALL, seed=seed), count=4)[1].scored for seed in (0, 0, 1, 2)]
        assert drawn[0] == drawn[1] and len({tuple(sorted(names)) for names in drawn}) > 1
        assert all(len(set(names)) == 4 for names in drawn)
        assert len(scored(videos, count=99)[1].scored) == 9

    def test_one_that_is_too_short_is_replaced_by_the_next(self, tmp_path):
        folder = write_folder(tmp_path, clips(4))
        for number in range(4):
            write_clip(folder / f"short{number}.mp4", clip(1)[:3])
        assert len(scored(open_videos(str(folder)), count=4)[1].scored) == 4

    def test_neither_batches_nor_threads_nor_place_change_anything(self, tmp_path):
        folder = write_folder(tmp_path / "a", clips(5))
        frames, census = scored(open_videos(str(folder)), size=2, threads=1)
        others, other_census = scored(open_videos(str(shutil.copytree(folder, tmp_path / "b"))), size=5, threads=3)
        assert (frames == others).all() and census.hash == other_census.hash
        write_clip(folder / "004.mp4", clip(77))
        assert scored(open_videos(str(folder)))[1].hash != census.hash


def test_a_dataset(tmp_path):
    """Of the shards of a dataset, the clips that are kept, chosen by split and condition."""
    content = write_clip(tmp_path / "a.mp4", clip(1)).read_bytes()
    dataset = write_dataset(tmp_path / "data", sources=2, video=content).uri
    videos = open_videos(dataset)
    assert videos.kind == "dataset" and videos.form == "encoded" and len(videos.videos) == 6 and videos.has_prompts
    frames, census = scored(videos)
    assert frames.shape == (6, 4, 3, HEIGHT, WIDTH) and not census.damaged
    name = videos.videos[2].name
    only = open_videos(dataset, where=f"clip_id = 'nothing' or clip_id = '{name}'")
    assert [video.name for video in only.videos] == [name] and only.videos[0].read() == videos.videos[2].read()
    with pytest.raises(ValueError, match=r"holds no kept clip with .*nothing"):
        open_videos(dataset, split="nothing")
    with pytest.raises(ValueError, match="cannot be read: "):
        open_videos(dataset, where="no such thing")


class TestProtocol:
    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"frames": 0}, "--frames is 0; it has to lie between 1 and"),
            ({"height": 4}, "--height is 4"),
            ({"fps": 0.0}, r"--fps is 0\.0; it has to lie between 0\.1"),
            ({"fps": 8.0, "stride": 2}, "exclude each other"),
            ({"crop": "top"}, "--crop is 'top'; it has to be centre or none"),
            ({"window": "last"}, "centre or first or random"),
        ],
    )
    def test_wrong_values_are_said(self, settings, words):
        with pytest.raises(ValueError, match=words):
            Sampling(**settings)

    def test_differences(self):
        from dataclasses import asdict

        video = {"name": "torchscript", "hash": "a" * 64}
        one = Protocol(Sampling(), 100, reference_videos=50, reference_hash="x", extractors={"video": video})
        assert protocol_from(asdict(one)) == one and not one.differences(one)
        other = Protocol(
            Sampling(fps=8.0), 99, reference_videos=50, reference_hash="y", extractors={"video": {**video, "hash": "b"}}
        )
        assert one.differences(other) == {
            "fps": (None, 8.0),
            "videos": (100, 99),
            "reference_hash": ("x", "y"),
            "video extractor hash": ("a" * 64, "b"),
        }

    def test_what_only_one_used_is_no_difference(self):
        alone = Protocol(Sampling(), 100, extractors={"image": {"name": "clip", "hash": "c"}})
        against = Protocol(Sampling(), 100, reference_videos=50, reference_hash="x", reference_form="frames")
        assert not alone.differences(against) and not against.differences(alone)
