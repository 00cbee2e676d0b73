"""Do a model's videos show what their prompts ask for? Colour, form and direction, read by a classifier that knows the miniature world.

python -m videofactory.pipelines.sample.classify data/samples
python -m videofactory.pipelines.sample.classify data/sample --captions motion.caption

The first scores a folder of videos with its `prompts.jsonl`, as `videofactory.model.evaluate sample` writes it; the second the real
clips of a dataset by their captions, which tells what to expect at best. `classifier_scores.score` does the same for videos in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, NoReturn

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from videofactory.pipelines.sample.classifier import CLASSIFIER, HEIGHT, WIDTH, Classifier
from videofactory.pipelines.sample.classifier_frames import FPS
from videofactory.pipelines.sample.classifier_scores import TOGETHER, WORDS, Judged, Scores, parse, score

PROMPTS = "prompts.jsonl"
"""Beside the videos of a folder: file and prompt of each, one JSON object a line."""

_FRAMES = 16
"""Of a dataset's clip, taken at `FPS` from its middle."""


def prompts_of(folder: Path) -> dict[str, str]:
    """The prompts of a folder's videos by the names of their files, all of which are there.

    Raises:
        FileNotFoundError: the folder, its prompts or a video is not there.
        ValueError: the prompts cannot be read.
    """
    file = folder / PROMPTS
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; name one that `videofactory.model.evaluate sample` has written")
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} has no {PROMPTS} with file and prompt of each video; make the videos with "
            "python -m videofactory.model.evaluate sample, or, if it is a dataset, add --captions motion.caption"
        )
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        prompts = {str(row["file"]): str(row["prompt"]) for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} does not hold file and prompt of each video ({error!r})") from error
    if not prompts:
        raise ValueError(f"{file} names no video")
    missing = [name for name in prompts if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(prompts)} videos of {file} are not there, the first is {missing[0]}; "
            "the same command that made the others makes them"
        )
    return prompts


def read_video(file: Path) -> tuple[NDArray[np.uint8], float]:
    """All frames of a file, uint8 [n, height, width, 3] RGB, and its frames per second.

    Raises:
        ValueError: it holds no video that can be decoded; the message names it.
    """
    from videofactory.shards.reader import all_frames

    try:
        frames, fps = all_frames(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} holds {error}") from error
    return frames, fps or FPS


def score_folder(folder: Path, classifier: Classifier | None = None) -> Scores:
    """Judge the videos of a folder by its prompts.

    Raises:
        OSError, ValueError: see `prompts_of`, `read_video` and `parse`; a prompt is wrong before any video is read.
    """
    prompts = prompts_of(folder)
    asked = {name: parse(prompt) for name, prompt in prompts.items()}
    reader = classifier or Classifier.load()
    judged = []
    for name, prompt in prompts.items():
        frames, fps = read_video(folder / name)
        judged.append(Judged(name, prompt, asked[name], reader.read(frames, fps)))
    return Scores(tuple(judged))


def score_dataset(dataset: str, captions: str, classifier: Classifier | None = None) -> Scores:
    """Judge the kept clips of a dataset by their captions; a clip without one is left out.

    Args:
        dataset: path or URI.
        captions: `caption`, or SIDECAR.COLUMN for the tables in `index/SIDECAR`.
        classifier: that reads; by default the package's own.

    Raises:
        ValueError: there are no such captions, or one of them is no caption of the miniature world.
    """
    from videofactory.shards.index import IndexDamagedError
    from videofactory.shards.reader import Decode, MapDataset

    try:
        clips = MapDataset(dataset, split=None, decode=Decode(_FRAMES, HEIGHT, WIDTH, fps=FPS))
    except IndexDamagedError as error:
        raise ValueError(str(error)) from error
    texts = None if captions == "caption" else _sidecar(dataset, captions)
    names: list[str] = []

    def videos() -> Iterator[tuple[str, NDArray[np.uint8]]]:
        for number in range(len(clips)):
            clip = clips[number]
            text = clip["caption"] if texts is None else texts.get(clip["clip_id"])
            if text:
                names.append(clip["clip_id"])
                yield text, clip["video"].permute(0, 2, 3, 1).numpy()

    scores = score(videos(), classifier, FPS, names)
    if not scores.videos:
        raise ValueError(f"no kept clip of {dataset} has a caption in {captions}")
    return scores


def _sidecar(dataset: str, captions: str) -> Mapping[str, str]:
    """A column of the tables in `index/SIDECAR` by clip id."""
    import pyarrow.parquet as pq

    from videofactory.shards.storage import Storage

    folder, dot, column = captions.partition(".")
    storage = Storage(dataset)
    parts = storage.list(f"index/{folder}", ".parquet") if dot and column else []
    if not parts:
        raise ValueError(
            f"{dataset} has no captions {captions}: name `caption`, or SIDECAR.COLUMN for tables in index/SIDECAR; "
            "motion.caption is written by python -m videofactory.pipelines.sample.motion"
        )
    found: dict[str, str] = {}
    for part in parts:
        with storage.open(part.name) as file:
            table = pq.read_table(file)
        if column not in table.schema.names:
            raise ValueError(f"{part.name} of {dataset} has no column {column}; it has {', '.join(table.schema.names)}")
        found.update(zip(table["clip_id"].to_pylist(), table[column].to_pylist(), strict=True))
    return found


def show(scores: Scores, console: Console) -> None:
    """Print the table."""
    table = Table("", box=None, pad_edge=False, padding=(0, 1))
    for name in ("videos", *WORDS, TOGETHER):
        table.add_column(name, justify="right")
    for group, videos in scores.groups.items():
        table.add_row(group, str(len(videos)), *(str(rate) for rate in scores.rates(group).values()))
    table.add_row("by chance", "", *(f"{100 * share:.1f} %" for share in scores.chance().values()), style="dim")
    console.print(table)
    console.print(f"a shape was found in {scores.found} of {len(scores.videos)} videos; the others count as wrong")
    console.print("in brackets: 95 % intervals (Wilson)", style="dim")


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


def _stop(message: object) -> NoReturn:
    """End with a message a person understands, and no traceback."""
    Console(stderr=True, highlight=False).print(f"[red]error:[/red] {escape(str(message))}", soft_wrap=True)
    raise typer.Exit(2)


@app.command()
def main(
    samples: Annotated[str, typer.Argument(help="Folder of videos with prompts.jsonl, or, with --captions, a dataset.")],
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File for every reading, the summary and what was confused.", show_default=False)
    ] = None,
    captions: Annotated[
        str | None, typer.Option(help="Score a dataset by these: caption, or motion.caption.", show_default=False)
    ] = None,
    classifier: Annotated[Path, typer.Option(help="Directory of the classifier.")] = CLASSIFIER,
    threads: Annotated[int, typer.Option(min=1, max=256, help="CPU threads.")] = 1,
) -> None:
    """Score videos of the miniature world: do they show the colour, the form and the direction that their prompts ask for?

    Prompts are like `a red circle moving left in front of a striped background`; the direction may be left out, and is then not
    scored. Pairs of colour and form that training never named have a row of their own. Exit codes: 0 done, 2 cannot be scored.

    \b
    A model's videos, from prompts to scores (python -m videofactory. before each):
      pipelines.sample.prompts --out data/prompts.txt
      model.evaluate sample --model MODEL --prompts data/prompts.txt --count 192 --out data/samples
      pipelines.sample.classify data/samples --json data/scores.json
    """
    import torch

    torch.set_num_threads(threads)
    try:
        reader = Classifier.load(classifier)
        scores = score_dataset(samples, captions, reader) if captions else score_folder(Path(samples), reader)
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            content = {"samples": samples, **scores.as_dict()}
            json_file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        _stop(error)
    show(scores, Console(highlight=False))


if __name__ == "__main__":
    app()
