"""The command that makes videos, end to end over the miniature, and the files that it writes."""

import io
import json
import re
import shutil
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from videofactory.model import generate, miniature
from videofactory.model.generate_tasks import slug
from videofactory.model.video_files import contact_sheet, evenly_spaced, write_video

FAST = ["--steps", "1", "--frames", "3", "--height", "24", "--width", "40"]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A small saved pipeline, whose defaults are not the miniature's."""
    folder = tmp_path_factory.mktemp("saved")
    unet = miniature.unet(block_out_channels=(16, 16), norm_num_groups=4, swap_windows=((4, 4, 4), (4, 2, 2)))
    pipeline = miniature.pipeline(unet=unet)
    pipeline.register_to_config(default_frames=2, default_height=32, default_width=48)
    pipeline.save_pretrained(folder)
    return folder


def _run(*arguments: object) -> tuple[int, str]:
    """Exit code and everything printed, as one line."""
    result = CliRunner().invoke(generate.app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, re.sub(r"\s+", " ", result.output)


def _read(path: Path) -> tuple[np.ndarray, float]:
    """The frames (F, H, W, 3) and the frame rate of a file."""
    with av.open(str(path)) as container:
        rate = float(container.streams.video[0].average_rate)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), rate


def test_a_run_writes_videos_a_sheet_and_a_record(saved, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\nein Übungs-Stern: blau!\n", encoding="utf-8")
    out = tmp_path / "made" / "here"
    code, printed = _run(
        "a white ring", "--prompts-file", prompts, "--model", saved, "--out", out, "--steps", 2, "--fps", 12, "--seed", 5,
        "--batch", 2, "--negative-prompt", "a cross", "--guidance-rescale", 0.5,
    )  # fmt: skip
    assert code == 0, printed
    names = ["000-a-white-ring.mp4", "001-a-red-circle.mp4", "002-ein-ubungs-stern-blau.mp4"]
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "contact-sheet.png", "generate.json"])
    for name in names:
        frames, rate = _read(out / name)
        assert frames.shape == (2, 32, 48, 3)
        assert rate == 12
    record = json.loads((out / "generate.json").read_text(encoding="utf-8"))
    assert [(video["file"], video["prompt"], video["seed"]) for video in record["videos"]] == [
        (names[0], "a white ring", 5),
        (names[1], "a red circle", 6),
        (names[2], "ein Übungs-Stern: blau!", 7),
    ]
    assert record["settings"]["guidance_rescale"] == 0.5
    assert record["settings"]["negative_prompt"] == "a cross"
    assert record["running"] == {
        "batch": 2, "device": "cpu", "dtype": "fp32", "offload": False, "cuda_graph": True, "attention_backend": None,
        "decode_chunk_size": 16,
    }  # fmt: skip
    assert set(record["versions"]) == {"python", "videofactory", "torch", "diffusers", "transformers"}
    with PIL.Image.open(out / "contact-sheet.png") as sheet:
        assert sheet.width >= 2 * 48
        assert sheet.height > 3 * 32
    assert "never trained" not in printed
    assert "2/3 videos: 001-a-red-circle.mp4" in printed
    assert "wrote 3 videos" in printed


def test_a_video_does_not_depend_on_its_batch(saved, tmp_path):
    options = ("--model", saved, "--steps", 2, "--videos-per-prompt", 2)
    assert _run("a red circle", "a blue star", *options, "--batch", 3, "--out", tmp_path / "batch")[0] == 0
    assert _run("a red circle", "a blue star", *options, "--out", tmp_path / "alone")[0] == 0
    names = sorted(path.name for path in (tmp_path / "alone").glob("*.mp4"))
    assert names == ["000-a-red-circle.mp4", "001-a-red-circle.mp4", "002-a-blue-star.mp4", "003-a-blue-star.mp4"]
    pairs = [(_read(tmp_path / "batch" / name)[0], _read(tmp_path / "alone" / name)[0]) for name in names]
    for together, alone in pairs:
        assert np.abs(together.astype(int) - alone).max() <= 8
    assert np.abs(pairs[0][1].astype(int) - pairs[1][1]).mean() > 8
    assert _run("a blue star", "--model", saved, "--steps", 2, "--seed", 3, "--out", tmp_path / "one")[0] == 0
    np.testing.assert_array_equal(_read(tmp_path / "one" / "000-a-blue-star.mp4")[0], pairs[3][1])


def test_the_miniature_says_what_it_is(tmp_path):
    code, printed = _run("a red circle", *FAST, "--out", tmp_path)
    assert code == 0
    assert "never trained on videos" in printed
    assert _read(tmp_path / "000-a-red-circle.mp4")[0].shape == (3, 24, 40, 3)


@pytest.mark.parametrize("model", ["miniature", "saved"])
def test_a_dry_run_writes_and_loads_nothing(saved, tmp_path, monkeypatch, model):
    monkeypatch.setattr(generate, "load", lambda *_: pytest.fail("the model was loaded"))
    name = saved if model == "saved" else model
    code, printed = _run("a red circle", "a star", "--model", name, "--out", tmp_path / "new", "--seed", 8, "--dry-run")
    assert code == 0
    assert "001-a-star.mp4 seed 9 a star" in printed
    assert "nothing was done" in printed
    assert not list(tmp_path.iterdir())


def test_a_dry_run_says_what_it_could_not_check(tmp_path):
    code, printed = _run("a red circle", "--model", "someone/model", "--out", tmp_path / "new", "--dry-run")
    assert code == 0
    assert (
        "note: someone/model is no folder here, so whether it is on the Hub, and takes these sizes and steps, was not" in printed
    )


def test_a_dry_run_reads_no_weights(saved, tmp_path):
    """Files that are no weights do for it, none do not."""
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    for weights in folder.rglob("*.safetensors"):
        weights.write_bytes(b"")
    assert _run("a red circle", "--model", folder, "--out", tmp_path / "out", "--dry-run")[0] == 0
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    code, printed = _run("a red circle", "--model", folder, "--out", tmp_path / "out", "--dry-run")
    assert code == 2
    assert "vae holds no weights (*.safetensors)" in printed


@pytest.mark.parametrize("there", ["000-a-red-circle.mp4", "contact-sheet.png", "generate.json"])
def test_nothing_is_overwritten_unasked(saved, tmp_path, there):
    (tmp_path / there).write_text("precious")
    code, printed = _run("a red circle", "--model", saved, "--steps", 1, "--out", tmp_path)
    assert code == 2
    assert f"{there} would be overwritten; name another folder with --out, or add --overwrite" in printed
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]
    assert _run("a red circle", "--model", saved, "--steps", 1, "--out", tmp_path, "--force")[0] == 0
    assert (tmp_path / there).stat().st_size > 100


MISTAKES = [
    ([], "no prompt; give one"),
    (["a", " "], "prompt 2 is empty"),
    (["a", "b\udcff"], r"prompt 2 is not UTF-8 text, at letter 2: 'b\udcff'"),
    (["a", "--prompts-file", "/nowhere/prompts.txt"], "No such file or directory: '/nowhere/prompts.txt'"),
    (["a", "--fps", "0"], "--fps is 0.0; it has to lie between 0.1 and 1000 frames per second"),
    (["a", "--fps", "-2"], "--fps is -2.0; it has to lie"),
    (["a", "--fps", "inf"], "--fps is inf; it has to lie"),
    (["a", "--fps", "nan"], "--fps is nan; it has to lie"),
    (["a", "--device", "toaster"], "--device toaster is not there"),
    (["a", "--device", "meta"], "--device meta is not there"),
    (["a", "--device", "cpu", "--offload"], "--offload moves models between a GPU and the CPU, and the device is the CPU"),
    (["a", "--height", "60"], "--height is 60, no multiple of 8, the VAE's factor; the nearest are 56 and 64"),
    (["a", "--frames", "0"], "--frames is 0; it has to be at least 1 (a picture)"),
    (["a", "--frames", 10**20], "--frames"),
    (["a", "--videos-per-prompt", 10**10], "--videos-per-prompt"),
    (["a", "--steps", "1001"], "--steps is 1001, which DDIMScheduler cannot take: it takes at most 1000"),
    (["a", "--steps", "0"], "--steps"),
    (["a", "--guidance-scale", "nan"], "--guidance-scale is nan; it has to be a finite number"),
    (["a", "--guidance-scale", "inf"], "--guidance-scale is inf; it has to be a finite number"),
    (["a", "--seed", 2**70], f"--seed {2**70} is too large: seeds end at 18446744073709551615"),
    (["a", "b", "--seed", 2**64 - 1], "of 2 videos each has the next one; give at most 18446744073709551614"),
    (["a", "--seed", "-1"], "--seed"),
    (["a", "--model", "/nowhere/at/all"], "/nowhere/at/all is no directory, and cannot be the name of a repository"),
    (["a", "--model", ""], "--model is empty; name a saved pipeline's folder, a Hub id such as owner/name, or miniature"),
    (
        ["a", "--revision", "v1"],
        "--revision v1 is for a model on the Hub, and --model miniature is on this machine; leave it out",
    ),
    (["a", "--variant", "fp16"], "--variant fp16 chooses among the weights of a saved pipeline, and --model is miniature"),
    (["a", "--decode-chunk-size", "0"], "--decode-chunk-size"),
    (["a", "--attention-backend", "telepathy"], "--attention-backend telepathy does not run on cpu with fp32"),
    (["a", "--attention-backend", "flash"], "Flash Attention backend 'flash' is not usable because of missing package"),
    (["a", "--attention-backend", "_native_flash", "--height", "60"], "--height is 60"),
    (["a", "--dtype", "fp8"], "--dtype"),
]


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry-run"])
@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(map(repr, case[0]))[:40] for case in MISTAKES])
def test_mistakes_end_in_one_message(tmp_path, arguments, message, dry):
    code, printed = _run("--device", "cpu", *arguments, "--out", tmp_path / "out", *dry)
    assert code == 2
    assert message in printed.replace("│", "").replace("  ", " ")
    assert "Traceback" not in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry-run"])
def test_mistakes_over_a_saved_model(saved, tmp_path, dry):
    for arguments, message in (
        (["--steps", "1001"], "--steps is 1001, which DDIMScheduler cannot take"),
        (["--revision", "v1"], f"--revision v1 is for a model on the Hub, and --model {saved} is on this machine; leave it out"),
        (["--variant", "fp16"], "`variant=fp16`, but no such modeling files are available"),
        (["--width", "20"], "--width is 20, no multiple of 8"),
        (["--height", "8"], "--height is 8; the model needs at least 16 pixels"),
    ):
        code, printed = _run("a", "--model", saved, *arguments, "--out", tmp_path, *dry)
        assert (code, message in printed) == (2, True), printed


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry-run"])
def test_a_folder_that_takes_no_files_is_found_before_any_work(saved, monkeypatch, dry):
    """/proc takes none even from an administrator."""
    monkeypatch.setattr(generate, "load", lambda *_: pytest.fail("the model was loaded"))
    code, printed = _run("a red circle", "--model", saved, "--out", "/proc/videos", *dry)
    assert code == 2
    assert re.search(r"--out /proc/videos cannot be written: .* \(/proc\); name another folder", printed)


def test_the_folder_is_asked_for(tmp_path):
    assert _run("a red circle") == (2, "error: no output; name a folder with --out, for example --out videos ")
    (tmp_path / "file").write_text("")
    code, printed = _run("a red circle", "--out", tmp_path / "file")
    assert code == 2
    assert "is a file; name a folder" in printed
    assert "is a file; name a folder" in _run("a red circle", "--out", tmp_path / "file" / "deeper")[1]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("tried to allocate 20 GiB\nand more"), "tried to allocate 20 GiB"),
        (MemoryError(), "it was full"),
        (
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 2147483648 bytes."),
            "tried to allocate 2.0 GiB",
        ),
    ],
)
def test_too_little_memory_says_what_helps(saved, tmp_path, monkeypatch, error, reason):
    def full(*_arguments, **_options):
        raise error

    monkeypatch.setattr("videofactory.model.pipeline.TextToVideoSwapPipeline.prepare_latents", full)
    code, printed = _run("a red circle", "a star", "a ring", "--batch", 2, "--model", saved, "--out", tmp_path, "--device", "cpu")
    assert code == 1
    assert (
        f"the memory of cpu does not suffice for 2 videos at once of 2 frames, 48 x 32 pixels ({reason}); these need less memory: "
        "--batch 1, --decode-chunk-size 1, fewer --frames, a smaller --height and --width, --dtype bf16"
    ) in printed


def test_the_allocator_of_the_cpu_is_understood(saved, tmp_path):
    """A size that no machine has: 2**60 latent positions."""
    sizes = ("--frames", 2**20, "--height", 2**20, "--width", 2**20)
    code, printed = _run("a red circle", "--model", saved, *sizes, "--out", tmp_path, "--device", "cpu")
    assert code == 1
    assert re.search(r"does not suffice for 1 video at once of 1048576 frames, .* \(tried to allocate [\d,.]+ GiB\)", printed)


def test_our_own_mistakes_are_not_hidden(saved, tmp_path, monkeypatch):
    def broken(*_arguments, **_options):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("videofactory.model.pipeline.TextToVideoSwapPipeline.prepare_latents", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        _run("a red circle", "--model", saved, "--out", tmp_path)


def test_a_video_of_no_numbers_is_not_written(saved, tmp_path):
    code, printed = _run("a red circle", "--model", saved, "--steps", 1, "--guidance-scale", "1e38", "--out", tmp_path)
    assert code == 1
    assert "000-a-red-circle.mp4 (seed 0) holds values that are no numbers; a smaller --guidance-scale or" in printed
    assert not list(tmp_path.iterdir())


def test_a_long_prompt_is_told_once_and_shown_in_part(saved, tmp_path, caplog):
    prompt = "a red circle moves to the left while a blue star turns " * 75
    code, printed = _run(prompt, "--model", saved, "--steps", 1, "--videos-per-prompt", 3, "--out", tmp_path)
    assert code == 0
    assert [record.getMessage().count("1127 tokens, of which 24 are read") for record in caplog.records] == [1]
    assert len(printed) + len(caplog.text) < 1500
    names = [path.name for path in sorted(tmp_path.glob("*.mp4"))]
    assert names[0] == "000-a-red-circle-moves-to-the-left-while-a-blue-star-turns-a-red.mp4"
    with PIL.Image.open(tmp_path / "contact-sheet.png") as sheet:
        assert sheet.height < 3 * (32 + 2 * 8 + 3 * 20) + 8
    assert json.loads((tmp_path / "generate.json").read_text())["videos"][2]["prompt"] == prompt


def test_an_interrupted_run_leaves_a_record_of_what_it_made(saved, tmp_path, monkeypatch):
    made = generate.make

    def interrupted(*arguments):
        yield next(made(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "make", interrupted)
    code, printed = _run("a red circle", "a star", "--model", saved, "--steps", 1, "--out", tmp_path)
    assert code == 130
    assert "interrupted; the videos that were finished are in" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000-a-red-circle.mp4", "contact-sheet.png", "generate.json"]
    assert len(json.loads((tmp_path / "generate.json").read_text())["videos"]) == 1


def test_a_terminal_shows_steps_and_videos(saved, tmp_path, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(generate, "notes", Console(file=screen, force_terminal=True, width=120))
    assert _run("a red circle", "a star", "a ring", "--model", saved, "--steps", 2, "--batch", 2, "--out", tmp_path)[0] == 0
    assert "3/3 videos" in screen.getvalue()
    assert "4/4" in screen.getvalue()


def test_names_of_files_are_plain():
    assert slug("A Red   circle, (moving)!") == "a-red-circle-moving"
    assert slug("../../etc/passwd") == "etc-passwd"
    assert slug("日本語") == "video"
    assert slug("word " * 40) == "-".join(["word"] * 12)
    assert slug("x" * 70) == "x" * 60
    tasks = generate.plan(["a"] * 600, 2, 10)
    assert (tasks[0].file, tasks[-1].file, tasks[-1].seed) == ("0000-a.mp4", "1199-a.mp4", 1209)


# Files


def _moving(frames: int, height: int, width: int) -> np.ndarray:
    """A ramp with a bright square that moves, (F, H, W, 3)."""
    video = np.zeros((frames, height, width, 3), np.uint8)
    video[..., 0] = np.linspace(0, 255, width).astype(np.uint8)
    video[..., 2] = 128
    for number, frame in enumerate(video):
        frame[8:24, 8 + 2 * number : 24 + 2 * number] = (240, 230, 40)
    return video


@pytest.mark.parametrize(
    ("frames", "height", "width", "fps"),
    [(16, 192, 344, 8), (5, 40, 56, 29.97), (1, 64, 112, 24), (3, 32, 32, 0.1), (3, 32, 32, 1000)],
)
def test_a_file_has_the_true_size_frames_and_rate(tmp_path, frames, height, width, fps):
    video = _moving(frames, height, width)
    write_video(tmp_path / "video.mp4", video, fps)
    found, rate = _read(tmp_path / "video.mp4")
    assert found.shape == video.shape
    assert rate == pytest.approx(fps, rel=1e-4)
    assert np.abs(found.astype(int) - video).mean() < 4
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (np.zeros((2, 9, 16, 3), np.uint8), 8, "frames have 16 x 9 pixels; H.264 with 4:2:0 chroma needs an even"),
        (np.zeros((2, 8, 16, 3), np.float32), 8, r"frames are float32 of the shape \(2, 8, 16, 3\)"),
        (np.zeros((0, 8, 16, 3), np.uint8), 8, r"of the shape \(0, 8, 16, 3\)"),
        (np.zeros((2, 8, 16, 3), np.uint8), 0, "fps is 0; it has to lie between 0.1 and 1000"),
        (np.zeros((2, 8, 16, 3), np.uint8), float("inf"), "fps is inf"),
        (np.zeros((2, 8, 16, 3), np.uint8), 1e-9, "fps is 1e-09"),
    ],
)
def test_what_cannot_be_written_is_named(tmp_path, frames, fps, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "video.mp4", frames, fps)
    assert not list(tmp_path.iterdir())


def test_frames_of_a_sheet_are_spread_from_first_to_last():
    frames = np.arange(16, dtype=np.uint8).reshape(16, 1, 1, 1).repeat(3, axis=-1)
    assert evenly_spaced(frames, 4)[:, 0, 0, 0].tolist() == [0, 5, 10, 15]
    assert len(evenly_spaced(frames[:3], 8)) == 3


def test_a_sheet_shows_every_video_and_its_text():
    red = np.zeros((4, 32, 100, 3), np.uint8) + np.array([250, 0, 0], np.uint8)
    blue = np.zeros((2, 48, 100, 3), np.uint8) + np.array([0, 0, 250], np.uint8)
    sheet = np.asarray(contact_sheet([("a red field", red), ("a blue field " * 8, blue)]))
    assert (sheet == [250, 0, 0]).all(-1).sum() == red[..., 0].size
    assert (sheet == [0, 0, 250]).all(-1).sum() == blue[..., 0].size
    short = np.asarray(contact_sheet([("a red field", red), ("a blue field", blue)]))
    assert short.shape[0] < sheet.shape[0]
    assert short.shape[1] == sheet.shape[1] == 4 * 102 - 2 + 16
    long = contact_sheet([("a blue field " * 300, blue)])
    assert long.height == contact_sheet([("a blue field " * 30, blue)]).height < 48 + 16 + 3 * 20 + 8
    cut = contact_sheet([("x" * 500, blue)])
    assert cut.size == (320 + 16, long.height)
    with pytest.raises(ValueError, match="contact sheet of no videos"):
        contact_sheet([])


def test_a_sheet_takes_frames_as_the_reader_and_the_pipeline_make_them():
    frames = np.random.default_rng(0).integers(0, 256, (3, 32, 40, 3), np.uint8)
    tensor = torch.from_numpy(frames).permute(0, 3, 1, 2)
    pictures = [PIL.Image.fromarray(frame) for frame in frames]
    sheets = [np.asarray(contact_sheet(zip(["a field"], [video], strict=True))) for video in (frames, tensor, pictures)]
    assert all((sheet == sheets[0]).all() for sheet in sheets)
    with pytest.raises(ValueError, match=r"frames are float32 of the shape \(3, 32, 40, 3\)"):
        contact_sheet([("a field", frames.astype(np.float32) / 255)])
