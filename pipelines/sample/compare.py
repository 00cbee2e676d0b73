"""Hold a built dataset of a miniature world against the world's truth: every verdict, every error, every caption.

python -m videofactory.pipelines.sample.compare --world data/sample-world --dataset data/sample
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console

from videofactory.curation.sources import local_path
from videofactory.shards.index import Index


@dataclass
class Comparison:
    """What a dataset makes of a world's shots.

    Attributes:
        shots: number of shots in the truth.
        right: those for which there is a clip of the same span with the true verdict.
        named: kept clips whose caption names the true colour and form.
        kept: kept clips with a caption.
        misses: each miss in words.
    """

    shots: int = 0
    right: int = 0
    named: int = 0
    kept: int = 0
    misses: list[str] = field(default_factory=list)


def compare(world: Path, dataset: str) -> Comparison:
    """Compare every shot and every broken source of `world` with `dataset`."""
    index = Index(dataset)
    names = {row["source_id"]: (local_path(row["uri"]) or Path(row["uri"])).name for row in index.sources().to_pylist()}
    errors = {names[row["source_id"]]: row["error_class"] for row in index.sources().to_pylist()}
    clips: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in index.clips().to_pylist():
        clips[names[row["source_id"]]].append(row)
    result = Comparison()
    for shot in pq.read_table(world / "truth.parquet").to_pylist():
        if shot["error_class"] is not None:
            if errors.get(shot["video"]) != shot["error_class"]:
                result.misses.append(f"{shot['video']}: error {errors.get(shot['video'])}, truly {shot['error_class']}")
            continue
        result.shots += 1
        _compare_shot(shot, clips[shot["video"]], result)
    return result


def _compare_shot(shot: dict[str, Any], clips: list[dict[str, Any]], result: Comparison) -> None:
    place = f"{shot['video']} shot {shot['shot']} ({shot['start']:.2f}-{shot['end']:.2f} s)"
    clip = max(clips, key=lambda clip: overlap(shot, clip), default=None)
    if clip is None or overlap(shot, clip) < 0.5:
        result.misses.append(f"{place}: no clip covers it, truly {shot['verdict']}")
        return
    verdict = clip["rejected_by"] or clip["error_class"] or clip["state"]
    if verdict == shot["verdict"]:
        result.right += 1
    else:
        result.misses.append(f"{place}: {verdict}, truly {shot['verdict']}")
    if clip["state"] == "kept" and clip["caption"] is not None:
        result.kept += 1
        words = clip["caption"].split()
        if shot["colour"] in words and shot["form"] in words:
            result.named += 1
        else:
            result.misses.append(f"{place}: captioned {clip['caption']!r}, truly {shot['caption']!r}")


def overlap(shot: dict[str, Any], clip: dict[str, Any]) -> float:
    """Time in common divided by time in either (intersection over union)."""
    common = min(shot["end"], clip["end"]) - max(shot["start"], clip["start"])
    return float(common / (max(shot["end"], clip["end"]) - min(shot["start"], clip["start"])))


def main() -> None:
    """Print the comparison; exit code 1 where fewer than 95% of the verdicts or of the captions are right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, required=True, help="folder that the sample was made in")
    parser.add_argument("--dataset", required=True, help="dataset built from its videos")
    arguments = parser.parse_args()
    found = compare(arguments.world, arguments.dataset)
    console = Console(highlight=False)
    for miss in found.misses:
        console.print(f"miss  {miss}", markup=False, soft_wrap=True)
    verdicts, captions = found.right / max(1, found.shots), found.named / max(1, found.kept)
    console.print(f"verdicts right: {found.right} of {found.shots} ({verdicts:.1%})")
    console.print(f"captions naming colour and form: {found.named} of {found.kept} ({captions:.1%})")
    sys.exit(0 if verdicts >= 0.95 and captions >= 0.95 else 1)


if __name__ == "__main__":
    main()
