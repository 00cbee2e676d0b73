"""What a run of the command makes: videos with their prompts, seeds and files, and whether they can be made and written."""

from __future__ import annotations

import re
import tempfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path

SHEET, RECORD = "contact-sheet.png", "generate.json"
MOST_SEED = 2**64 - 1
"""Of a generator of PyTorch."""
MOST_LETTERS = 60
"""Of a prompt in the name of a file."""


@dataclass(frozen=True)
class Settings:
    """What a run does with each prompt; `None` is the model's own."""

    model: str
    revision: str | None
    variant: str | None
    negative_prompt: str | None
    steps: int
    guidance_scale: float
    guidance_rescale: float
    frames: int | None
    height: int | None
    width: int | None
    fps: float
    seed: int
    videos_per_prompt: int


@dataclass(frozen=True)
class Task:
    """One video to make: its file's name, its prompt and the seed of its noise."""

    file: str
    prompt: str
    seed: int


def plan(prompts: list[str], videos_per_prompt: int, seed: int) -> list[Task]:
    """The videos of a run in order. Each has a seed of its own, so that it does not depend on the batch it is made in."""
    texts = [prompt for prompt in prompts for _ in range(videos_per_prompt)]
    digits = max(3, len(str(len(texts) - 1)))
    return [Task(f"{number:0{digits}}-{slug(text)}.mp4", text, seed + number) for number, text in enumerate(texts)]


def slug(text: str) -> str:
    """`text` as a part of a file's name: its first words, at most 60 lower-case letters and digits with hyphens between words."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
    if len(words) > MOST_LETTERS:
        whole_words = words[: MOST_LETTERS + 1].rpartition("-")[0]
        words = whole_words or words[:MOST_LETTERS]
    return words or "video"


def read_prompts(given: list[str], file: Path | None) -> list[str]:
    """The prompts of the command line, then those of the file: one a line, empty lines left out.

    Raises:
        ValueError: there is none, one is empty, or one or the file is no text.
        OSError: the file cannot be read.
    """
    prompts = list(given)
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError("no prompt; give one, e.g. 'a red circle', or a file of them with --prompts-file")
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError(f"prompt {[bool(prompt.strip()) for prompt in prompts].index(False) + 1} is empty; leave it out")
    for number, prompt in enumerate(prompts, start=1):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"prompt {number} is not UTF-8 text, at letter {error.start + 1}: {prompt!r}") from error
    return prompts


def check_seeds(tasks: list[Task]) -> None:
    """Whether PyTorch has generators of these seeds.

    Raises:
        ValueError: the last one is too large; the message has the largest.
    """
    first, last = tasks[0].seed, tasks[-1].seed
    if last > MOST_SEED:
        raise ValueError(
            f"--seed {first} is too large: seeds end at {MOST_SEED} (2**64 - 1), and of {len(tasks)} videos each has the next one; "
            f"give at most {MOST_SEED - (last - first)}"
        )


def check_outputs(tasks: list[Task], out: Path, overwrite: bool) -> None:
    """Whether the files of a run can be written into the folder `out`, which need not be there; nothing stays behind.

    Raises:
        ValueError: `out` is no folder, or would be in none, or files of the run are there and `overwrite` is false.
        OSError: nothing can be written there.
    """
    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not nearest.is_dir():
        raise ValueError(f"--out {out} cannot be made, {nearest} is a file; name a folder")
    there = [name for name in (*(task.file for task in tasks), SHEET, RECORD) if (out / name).exists()]
    if there and not overwrite:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise ValueError(f"{out / there[0]}{more} would be overwritten; name another folder with --out, or add --overwrite")
    try:
        # Permissions do not tell of a file system that is full or takes no files.
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(b"0")
    except OSError as error:
        raise OSError(f"--out {out} cannot be written: {error.strerror} ({nearest}); name another folder") from error
