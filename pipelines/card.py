"""The dataset card: `README.md` in the form of the Hugging Face Hub, from what the index says.

The front matter follows the Hub's specification of dataset cards; what cannot be said truthfully in it is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from videofactory.shards.index import Index
from videofactory.shards.writer import SHARDS

from . import formats
from .funnel import FunnelRow
from .summary import Summary

# Licences as sources state them (in lower case), and the Hub's identifier. YouTube's only free licence is CC BY 3.0.
_HUB_LICENCES = {
    "creative commons attribution license (reuse allowed)": "cc-by-3.0",
    "https://creativecommons.org/licenses/by/3.0/": "cc-by-3.0",
    "https://creativecommons.org/licenses/by/4.0/": "cc-by-4.0",
    "https://creativecommons.org/licenses/by-sa/4.0/": "cc-by-sa-4.0",
    "https://creativecommons.org/publicdomain/zero/1.0/": "cc0-1.0",
    "cc0": "cc0-1.0",
    **{
        name: name
        for name in (
            *("cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0"),
            *("cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0", "apache-2.0", "mit", "pddl"),
        )
    },
}

_HUB_SPLITS = {"train": "train", "val": "validation", "test": "test"}

_SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
    (10**9, "100M<n<1B"),
    (10**10, "1B<n<10B"),
    (10**11, "10B<n<100B"),
    (10**12, "100B<n<1T"),
)


def card(index: Index, summary: Summary) -> str:
    """The dataset card, Markdown with YAML front matter."""
    sections = [
        _introduction(summary),
        _made(summary),
        _funnel(summary),
        _signals(summary),
        _splits(summary),
        _loading(summary),
        _licences(summary),
        _limits(summary),
    ]
    front = yaml.safe_dump(front_matter(index, summary), sort_keys=False, allow_unicode=True, width=120)
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


def front_matter(index: Index, summary: Summary) -> dict[str, Any]:
    """The card's metadata as the Hub defines them."""
    front: dict[str, Any] = {
        "license": hub_licence(summary),
        "task_categories": ["text-to-video"],
        "size_categories": [_size_category(summary.funnel.kept)],
        "tags": ["webdataset", "video"],
        "pretty_name": _name(summary),
    }
    split = _only_split(index, summary)
    if split is not None:
        front["configs"] = [{"config_name": "default", "data_files": [{"split": split, "path": f"{SHARDS}/*.tar"}]}]
    else:
        # Left alone the Hub would show every tar as one training split, also what was rejected later or kept apart for tests.
        front["viewer"] = False
    return front


def hub_licence(summary: Summary) -> str:
    """The Hub's identifier of the licence, when all sources of kept clips state the same one and the Hub knows it; else `other`."""
    names = {licence.name for licence in summary.licences if licence.kept}
    name = names.pop() if len(names) == 1 else None
    return _HUB_LICENCES.get(name.strip().lower(), "other") if name else "other"


def _only_split(index: Index, summary: Summary) -> str | None:
    """The split of everything that lies below `shards/`, or `None` when that is not one split of kept clips alone."""
    splits = list(summary.funnel.kept_by_split)
    stored = {entry.name for entry in index.storage.list(SHARDS, ".tar")}
    committed = {shard["url"] for shard in index.shards()}
    pure = stored == committed and summary.shard_samples == summary.funnel.kept
    return _HUB_SPLITS.get(splits[0]) if pure and len(splits) == 1 else None


def _size_category(clips: int) -> str:
    return next((name for limit, name in _SIZES if clips < limit), "n>1T")


def _name(summary: Summary) -> str:
    name = formats.line(summary.recipe.name, 80) if summary.recipe else "custom"
    return f"Video clips by the recipe {name}"


def _introduction(summary: Summary) -> str:
    funnel = summary.funnel
    about = f"\n\n{text(summary.recipe.about, 400)}" if summary.recipe and summary.recipe.about else ""
    captioned = next((model for column, model in summary.models.items() if column == "caption"), None)
    sentences = [
        f"{formats.counted(funnel.kept, 'clip')}, {formats.seconds(funnel.kept_seconds)} of video "
        f"({formats.size(funnel.kept_bytes)}), each one shot of a longer video, in "
        f"{formats.counted(funnel.shards, 'WebDataset tar shard')}.",
        f"They are what is left of {formats.counted(funnel.candidates, 'candidate shot')} in "
        f"{formats.counted(funnel.analysed, 'source')}.",
        *([f"Captions were written by {text(captioned, 200)}."] if captioned else []),
        "The index in `index/` also holds the rejected candidates with everything that was measured on them, so that other "
        "thresholds can be tried without decoding anything again.",
        "`report.html` shows the same numbers with histograms and pictures.",
    ]
    warning = _sample_warning(summary) if summary.sample_models else ""
    return f"# {text(_name(summary))}{about}\n\n{' '.join(sentences)}{warning}"


def _sample_warning(summary: Summary) -> str:
    models = ", ".join(dict.fromkeys(text(model, 120) for model in summary.sample_models.values()))
    return (
        f"\n\n> **Made with miniature models.** {models} were trained on the sample's drawn world and know nothing "
        "else. Captions, embeddings and similarities are there to show how a dataset looks; do not train on them, and do not use "
        "them to judge other videos."
    )


def _made(summary: Summary) -> str:
    parts = ["## How it was made"]
    if summary.recipe is None:
        parts.append("The dataset holds no `recipe.yaml`, so the rules behind it are not known.")
    else:
        parts.append(
            "Each source was decoded once, for shot boundaries and signals. A clip is kept where every rule of `recipe.yaml` is "
            "true; a rule whose column was not measured rejects too."
        )
        if summary.rules:
            parts.append(table(("Rule", "Condition (SQL)"), [(text(name, 80), code(sql)) for name, sql in summary.rules.items()]))
        else:
            parts.append("The recipe has no rules: every shot is kept.")
    if summary.models:
        parts.append("Models:")
        parts.append(
            table(("Column", "Model"), [(text(column, 80), text(model, 200)) for column, model in summary.models.items()])
        )
    if summary.analysed_with:
        rows = [(text(versions, 300), formats.count(sources)) for versions, sources in summary.analysed_with.items()]
        parts.append("Versions that analysed the sources:")
        parts.append(table(("Analysed with", "Sources"), rows, right=(1,)))
    return "\n\n".join(parts)


def _funnel(summary: Summary) -> str:
    rows = [
        (_step(row), formats.count(row.count), formats.percent(row.share), formats.count(row.left))
        for row in summary.funnel.rows()
    ]
    funnel, sources = summary.funnel, summary.funnel.sources
    paragraph = (
        f"Sources: {formats.count(funnel.analysed)} analysed ({formats.seconds(funnel.source_seconds)} of video); "
        + ", ".join(f"{formats.count(clips)} {status}" for status, clips in sources.items())
        + "."
    )
    steps = table(("Step", "Clips", "Share of candidates", "Left"), rows, right=(1, 2, 3))
    return "\n\n".join(("## Funnel", paragraph, steps))


def _step(row: FunnelRow) -> str:
    label = text(row.label, 120)
    wording = {
        "candidates": "candidates",
        "rejected": f"rejected by {label}",
        "unmeasured": f"rejected, {label} not measured",
        "failed": f"failed: {label}",
        "pending": "pending",
        "kept": "**kept**",
    }
    return wording[row.kind]


def _signals(summary: Summary) -> str:
    rows = [
        (
            code(spread.column.name),
            text(spread.column.unit, 60),
            *(
                formats.number(value) if value is not None else ""
                for value in (spread.least, spread.low, spread.median, spread.high, spread.most)
            ),
            formats.count(spread.unmeasured),
        )
        for spread in summary.spreads
    ]
    meanings = [f"- {code(column.name)}: {text(column.meaning, 400)}" for column in summary.columns if column.meaning]
    header = ("Column", "Unit", "Least", "5%", "Median", "95%", "Most", "Not measured")
    parts = ["## Signals of the kept clips", table(header, rows, right=range(2, 8))]
    return "\n\n".join([*parts, "\n".join(meanings)] if meanings else parts)


def _splits(summary: Summary) -> str:
    rows = [(text(split, 40), formats.count(clips)) for split, clips in summary.funnel.kept_by_split.items()]
    shares = f" ({summary.recipe.split.val:g} val, {summary.recipe.split.test:g} test)" if summary.recipe else ""
    return (
        "## Splits\n\n"
        f"A clip's split follows from the hash of its source{shares}, so that no source stands on two sides. The splits share "
        "shards; the column `split` (also in each sample's JSON) tells them apart.\n\n"
    ) + (table(("Split", "Kept clips"), rows, right=(1,)) if rows else "No clip is kept so far.")


def _loading(summary: Summary) -> str:
    largest = max(summary.funnel.kept_by_split.items(), key=lambda item: item[1], default=("train", 0))[0]
    return f"""## How to load it

With VideoFactory, which delivers exactly the kept clips, and selects by split and by SQL over the columns:

```python
from torch.utils.data import DataLoader
from videofactory.shards.reader import Decode, stream

clips = stream(".", split={json.dumps(largest)}, where="duration >= 0.5", decode=Decode(frames=16, height=192))
for batch in DataLoader(clips, batch_size=2):
    print(batch["video"].shape, batch["caption"])  # uint8 [2, 16, 3, 192, 344]
```

`MapDataset` of the same module takes the same arguments and reads by number. With webdataset alone:

```python
import json
import pathlib
import webdataset

shards = [shard["url"] for shard in json.loads(pathlib.Path("shards.json").read_text())["shardlist"]]
for sample in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False):
    row = json.loads(sample["json"])  # the clip's row: split, signals, span in the source
    video, caption = sample["mp4"], sample.get("txt", b"").decode()
```

This delivers every sample of the shards: all splits, and clips that rules changed after they were written have rejected since
({formats.count(summary.shard_samples - summary.funnel.kept)} at present). A tar that `shards.json` does not name was never
committed; leave it out."""


def _licences(summary: Summary) -> str:
    rows = [
        (
            text(licence.name, 120) if licence.name else "unknown",
            formats.count(licence.sources),
            formats.count(licence.kept),
            formats.seconds(licence.kept_seconds),
        )
        for licence in summary.licences
    ]
    return "\n\n".join(
        (
            "## Licences of the sources",
            "As the sources state them, unchecked; `unknown` means that none was stated, not that there is none. The clips are parts "
            "of the sources and remain under their terms. Whoever uses or passes on this dataset is responsible for having the "
            "right to.",
            table(("Licence", "Sources", "Kept clips", "Video"), rows, right=(1, 2, 3)),
        )
    )


def _limits(summary: Summary) -> str:
    limits = [
        "Signals are estimates from a downscaled picture, and the rules are thresholds on them: some of what was kept is bad, and some "
        "of what was rejected is good. The contact sheets of `report.html` show both.",
        "Shot boundaries are detected, not known; a few clips will hold a cut, and slow transitions are the most likely to be missed.",
        "Nobody has looked at the content. People, private places and brands may be visible, and nothing was checked for "
        "offensive or unlawful material.",
    ]
    if any(column == "caption" for column in summary.models):
        limits.insert(
            0,
            "A caption describes the middle frame of its clip. It knows nothing of motion, of what happens before and after, or of "
            "sound, and it is as wrong as its model.",
        )
    if summary.funnel.sources["pending"] or summary.funnel.pending:
        limits.append("The build is not finished: sources or clips are still pending.")
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


def text(value: object, limit: int = 300) -> str:
    """A stranger's text as one line of Markdown that means only itself: no markup, links, HTML or table cells."""
    shown = formats.line(value, limit).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    shown = re.sub(r"([\\`*_\[\]|~#!$])", r"\\\1", shown)
    # The Hub makes links of bare addresses and of names after an @.
    return shown.replace("://", ":&#8203;//").replace("@", "&#64;")


def code(value: str, limit: int = 400) -> str:
    """A text as inline code in a table cell; longer fences keep backticks inside."""
    shown = formats.line(value, limit)
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", shown)), default=0))
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    # GitHub's tables end a cell at a bar even inside code, unless it is escaped.
    return f"{fence}{space}{shown}{space}{fence}".replace("|", "\\|")


def table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    """A Markdown table of cells that are Markdown already; the columns in `right` are set flush right."""
    aligned = set(right)
    marks = ["--:" if number in aligned else "---" for number in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, marks, *rows))
