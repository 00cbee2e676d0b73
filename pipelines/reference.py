"""`python -m videofactory.pipelines.reference`: writes the reference pages of the documentation from the code they describe.

`docs/recipes.md` comes from the recipe's settings, `docs/signals.md` from the columns that the signals declare, and the table of
error classes in `docs/dataset.md` from `ERRORS`. A page cannot name a key, a default or a range that does not exist.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from videofactory.curation.caption import Blip2Captioner
from videofactory.curation.guard import ERRORS
from videofactory.curation.rules import RuleError, Rules
from videofactory.curation.signals import columns as signal_columns
from videofactory.curation.signals import load as load_signals
from videofactory.shards.schema import CAPTION_SIMILARITY, CORE_CLIP_FIELDS, STEPS, Column

from .recipe import RECIPES, CaptionSettings, Recipe

DOCS = Path("docs")
COMMAND = "python -m videofactory.pipelines.reference"
_NOTE = f"<!-- Written by `{COMMAND}` from the code; changes belong there. -->\n"

_CHANGEABLE = (
    "name",
    "about",
    "rules",
    "execution",
    "analysis.threads",
    "embed.batch_size",
    "caption.options.batch_size",
    "caption.options.device",
)
"""Keys that may change between two builds of one dataset; with a section, everything in it."""


@dataclass(frozen=True)
class Setting:
    """One key of a recipe.

    Attributes:
        key: the dotted key, as `--set` takes it.
        kind: what values it takes, in words.
        default: the default as YAML; empty where a value must be given.
        meaning: one sentence.
        fixed: whether it is fixed once a dataset exists.
    """

    key: str
    kind: str
    default: str
    meaning: str
    fixed: bool


@dataclass(frozen=True)
class Section:
    """A group of settings: the dotted key of the group, what it is about, and its settings."""

    key: str
    about: str
    settings: tuple[Setting, ...]


def sections() -> list[Section]:
    """Every setting of a recipe, by group; the keys at the top come first, in the group with the empty name."""
    top: list[Setting] = []
    groups: list[Section] = []
    for name, field in Recipe.model_fields.items():
        inner = _settings_class(field.annotation)
        if inner is None:
            top.append(_of_field(name, field))
        else:
            off = type(None) in get_args(field.annotation)
            groups += _groups(name, inner, f" Off unless given: `{name}: null` is the default." if off else "")
    return [Section("", "Keys that belong to no group.", tuple(top)), *groups]


def _groups(key: str, settings: type[Any], note: str) -> Iterator[Section]:
    if issubclass(settings, BaseModel):
        found = tuple(_of_field(f"{key}.{name}", field) for name, field in settings.model_fields.items())
    else:
        found = tuple(_of_dataclass(key, settings))
    yield Section(key, _about(settings) + note, found)
    if settings is CaptionSettings:
        about = "What the default captioner takes. A captioner of your own takes what its constructor takes."
        yield Section(f"{key}.options", about, tuple(_of_signature(f"{key}.options", Blip2Captioner.__init__)))


def _of_field(key: str, field: FieldInfo) -> Setting:
    bounds = [
        (name, getattr(limit, name)) for limit in field.metadata for name in ("ge", "gt", "le", "lt") if hasattr(limit, name)
    ]
    if field.is_required():
        default = ""
    elif field.default_factory is not None:
        default = _as_yaml(field.get_default(call_default_factory=True, validated_data={}))
    else:
        default = _as_yaml(field.default)
    return Setting(key, _kind(field.annotation, bounds), default, field.description or "see above", _fixed(key))


def _of_dataclass(key: str, settings: type[Any]) -> Iterator[Setting]:
    meanings: dict[str, str] = {}
    for base in reversed(settings.__mro__):
        meanings.update(_described(inspect.getdoc(base) or "", "Attributes:"))
    hints = get_type_hints(settings, include_extras=True)
    for field in dataclasses.fields(settings):
        name = f"{key}.{field.name}"
        yield Setting(name, _kind(hints[field.name], ()), _as_yaml(field.default), meanings[field.name], _fixed(name))


def _of_signature(key: str, function: Callable[..., Any]) -> Iterator[Setting]:
    meanings, hints = _described(inspect.getdoc(function) or "", "Args:"), get_type_hints(function)
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        name = f"{key}.{parameter.name}"
        kind, default = _kind(hints[parameter.name], ()), _as_yaml(parameter.default)
        yield Setting(name, kind, default, meanings[parameter.name], _fixed(name))


def _fixed(key: str) -> bool:
    return not any(key == free or key.startswith(f"{free}.") for free in _CHANGEABLE)


def _settings_class(annotation: Any) -> type[Any] | None:
    """The class behind a field that holds a group of settings, else `None`."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and (issubclass(part, BaseModel) or dataclasses.is_dataclass(part)):
            return part
    return None


def _about(documented: object) -> str:
    """The first paragraph of a docstring on one line, without its pointers to other classes."""
    text = " ".join((inspect.getdoc(documented) or "").split("\n\n")[0].split())
    return re.sub(r"; see `\w+`[^.]*", "", text)


def _described(text: str, heading: str) -> dict[str, str]:
    """What a docstring says below `heading`, by name: `name, other: text`, continued on lines indented further."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in text.partition(heading + "\n")[2].splitlines():
        if not line.startswith("    "):
            break
        if match := re.match(r"    ([a-z_]+(?:, [a-z_]+)*): (.*)", line):
            names = match[1].split(", ")
            found.update(dict.fromkeys(names, match[2]))
        else:
            found.update({name: f"{found[name]} {line.strip()}" for name in names})
    # What Python calls None is null in YAML; a single sentence stands in a table without its full stop.
    plain = {name: text.replace("`None`", "`null`") for name, text in found.items()}
    return {name: text if ". " in text else text.removesuffix(".") for name, text in plain.items()}


def _kind(annotation: Any, bounds: Any) -> str:
    """A type in words, with the bounds that a value is checked against."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(inner[0], bounds)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(part, bounds if part is not type(None) else ()) for part in inner)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin is dict:
        return "mapping"
    words = {int: "integer", float: "number", str: "text", bool: "`true`, `false`", type(None): "`null`"}
    signs = {"ge": "from", "gt": "above", "le": "to", "lt": "below"}
    return " ".join([words[annotation], *(f"{signs[name]} {_size(limit) or f'{limit:g}'}" for name, limit in bounds)])


def _as_yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...").strip()
    return f"{text} ({_size(value)})" if _size(value) else text


def _size(value: Any) -> str:
    """A whole number of MiB or KiB in words; empty for what is no such number of bytes."""
    if isinstance(value, int) and value >= 1 << 16:
        for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
            if value % (1 << shift) == 0:
                return f"{value >> shift} {unit}"
    return ""


def recipes_page() -> str:
    """`docs/recipes.md`."""
    blocks = [_NOTE, "# Recipes", _RECIPES_INTRODUCTION]
    for section in sections():
        if section.settings:
            blocks += [f"## `{section.key}`" if section.key else "## At the top", section.about]
            blocks.append(
                _table(("key", "value", "default", "after the first build", "meaning"), map(_setting_cells, section.settings))
            )
        if section.key == "":
            blocks += ["## Columns that rules may use", _RULES, _rule_columns()]
    blocks.append("## Recipes that come with the package")
    for file in sorted(RECIPES.glob("*.yaml")):
        blocks += [f"### `{file.stem}`", f"```yaml\n{file.read_text(encoding='utf-8').strip()}\n```"]
    return "\n\n".join(block.strip() for block in blocks) + "\n"


def _setting_cells(setting: Setting) -> tuple[str, ...]:
    default, _, size = setting.default.partition(" (")
    shown = f"`{default}`" + (f" ({size}" if size else "") if setting.default else "must be given"
    return f"`{setting.key}`", setting.kind, shown, "fixed" if setting.fixed else "may change", setting.meaning


def rule_columns() -> dict[str, str]:
    """Every column that a rule may use, with the step after which such a rule runs, in the order of the table `clips`."""
    known: dict[str, str] = {}
    signals = [*signal_columns(), CAPTION_SIMILARITY]
    for name in [*(field.name for field in CORE_CLIP_FIELDS), *(column.name for column in signals)]:
        try:
            known[name] = next(iter(Rules({"rule": f'"{name}" is not null'}, signal_columns()))).step
        except RuleError:
            continue
    return known


def _rule_columns() -> str:
    known = rule_columns()
    rows = [(step, ", ".join(f"`{name}`" for name, at in known.items() if at == step)) for step in STEPS]
    return _table(("step", "columns"), ((f"`{step}`", names) for step, names in rows if names))


def signals_page() -> str:
    """`docs/signals.md`."""
    columns = declared_columns()
    overview = [(f"[`{column.name}`](#{column.name})", column.unit, _range(column), f"`{column.step}`") for column, _ in columns]
    blocks = [_NOTE, "# Signals", _SIGNALS_INTRODUCTION, _table(("column", "unit", "range", "step"), overview)]
    for column, module in columns:
        lines = [
            f"- meaning: {column.meaning}",
            f"- unit: {column.unit}; range: {_range(column)}",
            f"- filled by the step `{column.step}`, module `{module}`",
            f"- cost: {column.cost}",
            f"- source: {column.source}",
        ]
        blocks += [f"## {column.name}", "\n".join(lines)]
    return "\n\n".join(block.strip() for block in blocks) + "\n"


def declared_columns() -> list[tuple[Column, str]]:
    """Every declared column with the module that fills it."""
    measured = [(column, signal.__module__) for signal in load_signals() for column in signal.columns]
    return [*measured, (CAPTION_SIMILARITY, "videofactory.curation.describe")]


def _range(column: Column) -> str:
    if column.low is None and column.high is None:
        return "unbounded"
    if column.high is None:
        return f"from {column.low:g}"
    return f"up to {column.high:g}" if column.low is None else f"{column.low:g} to {column.high:g}"


def errors_table() -> str:
    """The table of error classes in `docs/dataset.md`."""
    rows = ((f"`{name}`", "yes" if retryable else "no", meaning) for name, (retryable, meaning) in ERRORS.items())
    return _table(("class", "may succeed when tried again", "meaning"), rows)


def with_errors(page: str) -> str:
    """`page` with the table of error classes between its marks.

    Raises:
        ValueError: the marks are not there.
    """
    before, begin, rest = page.partition("<!-- errors: begin -->")
    _, end, after = rest.partition("<!-- errors: end -->")
    if not end:
        raise ValueError("the page lacks the marks `<!-- errors: begin -->` and `<!-- errors: end -->`; put them back")
    return f"{before}{begin}\n{errors_table()}\n{end}{after}"


def _table(heads: tuple[str, ...], rows: Any) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)


def pages(docs: Path) -> dict[Path, str]:
    """Every generated page below `docs`, with the content it should have."""
    dataset = docs / "dataset.md"
    return {
        docs / "recipes.md": recipes_page(),
        docs / "signals.md": signals_page(),
        dataset: with_errors(dataset.read_text(encoding="utf-8")),
    }


def main(docs: Annotated[Path, typer.Option(help="Folder of the documentation.")] = DOCS) -> None:
    """Write the reference pages."""
    for path, content in pages(docs).items():
        path.write_text(content, encoding="utf-8")
        typer.echo(str(path))


_RECIPES_INTRODUCTION = """
A recipe is a YAML file. `videofactory build --recipe` takes the name of one that comes with the package, or the path of a file of
yours. A file may begin with `extends: NAME` or `extends: FILE` and then holds only what differs; mappings are merged key by key.
`--set key=value` changes one setting, the value in YAML: `--set clips.crf=20`, `--set caption=null`, `--set rules.still=null`
(drops a rule). An unknown key or a wrong value ends the command with exit code 2 before any work, naming the nearest known key.

The recipe is stored with the dataset as `recipe.yaml`. Keys marked *fixed* decide the data: with another value the same folder is
refused, and the message names the key. The others may differ from one run to the next; with other rules the stored rows are judged
again, and only clips that are kept now and were not cut before are cut.
"""

_RULES = """
A rule is a condition in SQL (DuckDB's dialect) on the columns of one clip. A clip is kept where every rule is true. The first rule
that is not true is written to `rejected_by`; where a rule has no answer because a column was not measured, `unmeasured:COLUMN` is.
Each rule runs after the last step that one of its columns needs, and within a step in the order of the recipe. Rules that run after
`analyse` see the shot in its source (its size, its length); later ones see the clip that was cut. `end` is a word of SQL and is
written `"end"`. Subqueries, windows and aggregates are refused.
"""

_SIGNALS_INTRODUCTION = f"""
Columns of `clips` that are measured. `NULL` means not measured. The steps run in the order {", ".join(f"`{step}`" for step in STEPS)};
a rule on a column runs right after its step. How to add one: [architecture](architecture.md#adding-a-signal).
Costs are processor time on one core at the default analysis width.
"""


if __name__ == "__main__":
    typer.run(main)
