"""Rebuild a dataset's two documents from its index: the card `README.md` and the page `report.html`.

The page is one self-contained file: no scripts, no requests, thumbnails and drawings inside. Both are made of nothing but the
dataset, so that the same index always gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from videofactory.shards.index import Index
from videofactory.shards.storage import Storage

from . import formats
from .card import card
from .contact_sheet import PICTURE_BYTES, Sheet, contact_sheets, web_address
from .funnel import UNMEASURED, FunnelRow
from .histogram import Histogram, RuleReader, histograms
from .histogram_drawing import HEIGHT, WIDTH, Drawing, draw
from .recipe import Recipe, parse_recipe
from .summary import Summary, summarise

CARD = "README.md"
PAGE = "report.html"
RECIPE = "recipe.yaml"

_TEMPLATES = Path(__file__).parent / "templates"

# With many rules each sheet shows fewer clips, so that the page stays something one can scroll through.
_REJECTED_SHOWN = 240


@dataclass(frozen=True)
class Chart:
    """A histogram, its drawing, and the rules that judge it, as (name, SQL)."""

    histogram: Histogram
    drawing: Drawing
    rules: tuple[tuple[str, str], ...]


def write_report(storage: Storage, recipe: Recipe | None = None) -> None:
    """Write `README.md` and `report.html` into the dataset, replacing those that are there.

    Args:
        storage: the dataset.
        recipe: its recipe; read from the dataset's `recipe.yaml` unless given. A dataset without one gets a report without rules.

    Raises:
        RecipeError: the stored recipe has unknown keys or wrong values.
    """
    index = Index(storage)
    summary = summarise(index, recipe or stored_recipe(storage))
    storage.put(CARD, card(index, summary).encode())
    storage.put(PAGE, page(index, summary).encode())


def stored_recipe(storage: Storage) -> Recipe | None:
    """The recipe that a dataset was built with, or `None` where none is stored.

    Raises:
        RecipeError: it has unknown keys or wrong values.
    """
    if not storage.exists(RECIPE):
        return None
    return parse_recipe(yaml.safe_load(storage.get(RECIPE)) or {}, RECIPE)


def page(index: Index, summary: Summary) -> str:
    """The report page of a dataset, a complete HTML document."""
    reader = RuleReader()
    columns_of: dict[str, list[str]] = {name: reader.columns(sql) for name, sql in summary.rules.items()}
    order = [*summary.funnel.rejected, *(UNMEASURED + column for column in summary.funnel.unmeasured)]
    shown = max(4, min(12, _REJECTED_SHOWN // max(1, len(order))))
    sheets = contact_sheets(index, columns_of, order, rejected=shown)
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            summary=summary,
            funnel=summary.funnel,
            steps=[_step(row, summary) for row in summary.funnel.rows()],
            charts=_charts(index, summary),
            kept=sheets[0],
            rejected=sheets[1:],
            pictureless=_pictureless(sheets),
            view=(WIDTH, HEIGHT),
        )
    )


def _charts(index: Index, summary: Summary) -> list[Chart]:
    clips = index.query("select * from clips")
    charts = []
    for histogram in histograms(clips, summary.columns, summary.rules):
        judges = dict.fromkeys(line.rule for line in histogram.thresholds)
        charts.append(Chart(histogram, draw(histogram), tuple((name, summary.rules[name]) for name in judges)))
    return charts


def _step(row: FunnelRow, summary: Summary) -> dict[str, Any]:
    """A line of the funnel with its wording and the widths of its bar, in percent of the candidates."""
    wording: Mapping[str, tuple[str, str]] = {
        "candidates": ("Candidate clips", "shots found in the sources"),
        "rejected": (row.label, summary.rules.get(row.label, "a rule of an earlier recipe")),
        "unmeasured": (f"{row.label} not measured", "a rule needs the column, and it has no value"),
        "failed": (row.label, "the clip could not be made"),
        "pending": ("Pending", "passed every rule so far, not written yet"),
        "kept": ("Kept clips", "in the shards"),
    }
    name, about = wording[row.kind]
    total = summary.funnel.candidates or 1
    return {
        "row": row,
        "name": name,
        "about": about,
        "is_sql": row.kind == "rejected" and row.label in summary.rules,
        "left_width": f"{100 * row.left / total:.2f}",
        "taken_width": f"{0.0 if row.kind in ('candidates', 'kept') else 100 * row.count / total:.2f}",
    }


def _pictureless(sheets: list[Sheet]) -> str | None:
    """Why pictures are missing, in one sentence, or `None` when none is."""
    pictures = [picture for sheet in sheets for picture in sheet.pictures]
    missing = sum(picture.image is None for picture in pictures)
    if not missing:
        return None
    if missing == len(pictures):
        return "No thumbnails are stored for these clips (the recipe's execution.thumbnails decides whether they are kept)."
    limit = formats.size(PICTURE_BYTES)
    return (
        f"{formats.count(missing)} of {formats.count(len(pictures))} clips have no thumbnail, or the page's {limit} were spent."
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,  # titles, captions and errors come from strangers
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "count": formats.count,
        "number": formats.number,
        "seconds": formats.seconds,
        "size": formats.size,
        "percent": formats.percent,
        "line": formats.line,
        "web_address": web_address,
    }
    return environment
