"""`python -m videofactory.model.training.reference`: writes docs/training-reference.md, every setting of a training run, from the code.

The page cannot name a key, a default or a range that does not exist.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .config import RECIPES, TrainingConfig, is_free, section_of

PAGE = Path("docs/training-reference.md")
COMMAND = "python -m videofactory.model.training.reference"
_WORDS = {int: "integer", float: "number", str: "text", bool: "`true`, `false`", type(None): "`null`"}
_SIGNS = {"ge": "from", "gt": "above", "le": "to", "lt": "below"}


@dataclass(frozen=True)
class Setting:
    """One key of a configuration.

    Attributes:
        key: the dotted key; the items of a list stand as `0`.
        kind: what values it takes, in words, with its range.
        default: the default as YAML; empty where a value must be given.
        meaning: one sentence, with the unit.
        free: whether it may change when a run is continued.
    """

    key: str
    kind: str
    default: str
    meaning: str
    free: bool


@dataclass(frozen=True)
class Group:
    """The settings of one section: its dotted key, empty at the top, what it is about, and its settings."""

    key: str
    about: str
    settings: tuple[Setting, ...]


def groups() -> list[Group]:
    """Every setting of a training run, section by section, those inside a section after it."""
    return list(_groups("", TrainingConfig, "Keys that belong to no section."))


def _groups(key: str, section: type[BaseModel], about: str) -> Iterator[Group]:
    settings: list[Setting] = []
    inner: list[tuple[str, type[BaseModel], str]] = []
    for name, field in section.model_fields.items():
        place = f"{key}.{name}" if key else name
        below = section_of(field.annotation)
        if below is None:
            settings.append(_setting(place, field))
            continue
        many = get_origin(_bare(field.annotation)) is tuple
        note = " A list of these." if many else ""
        if type(None) in get_args(field.annotation):
            off = field.default is None and field.default_factory is None
            note = f" `{place}: null` {'is the default, and ' if off else ''}does without."
        inner.append((f"{place}.0" if many else place, below, _about(below) + note))
    yield Group(key, about, tuple(settings))
    for place, below, text in inner:
        yield from _groups(place, below, text)


def _setting(key: str, field: FieldInfo) -> Setting:
    default = "" if field.is_required() else _as_yaml(field.get_default(call_default_factory=True, validated_data={}))
    return Setting(key, _kind(field.annotation, field.metadata), default, field.description or "", is_free(key))


def _about(section: type[BaseModel]) -> str:
    return " ".join((inspect.getdoc(section) or "").split("\n\n")[0].split())


def _bare(annotation: Any) -> Any:
    return _bare(get_args(annotation)[0]) if get_origin(annotation) is Annotated else annotation


def _kind(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """A type in words, with the bounds that a value is checked against."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(inner[0], [*inner[1:], *metadata])
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(part, metadata if part is not type(None) else ()) for part in inner)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin is tuple:
        if inner[-1] is Ellipsis:
            return f"list of {_kind(inner[0])}"
        return f"list of {len(inner)}: {_kind(inner[0])}"
    bounds = [f"{_SIGNS[name]} {limit if isinstance(limit, int) else format(limit, 'g')}" for name, limit in _bounds(metadata)]
    return " ".join([_WORDS[annotation], *bounds])


def _bounds(metadata: Iterable[Any]) -> Iterator[tuple[str, float]]:
    for entry in metadata:
        for limits in (entry, *getattr(entry, "metadata", ())):
            for name in _SIGNS:
                if isinstance(limit := getattr(limits, name, None), int | float):
                    yield name, limit


def _as_yaml(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=200).removesuffix("\n").removesuffix("\n...").strip()


def page() -> str:
    """`docs/training-reference.md`."""
    blocks = [f"<!-- Written by `{COMMAND}` from the code; changes belong there. -->", "# Settings of training", _INTRODUCTION]
    for group in groups():
        blocks += [f"## `{group.key}`" if group.key else "## At the top", group.about]
        if group.settings:
            heads = ("key", "value", "default", "continued runs", "meaning")
            blocks.append(_table(heads, map(_cells, group.settings)))
    blocks.append("## Configurations that come with the package")
    for file in sorted(RECIPES.glob("*.yaml")):
        blocks += [f"### `{file.stem}`", f"```yaml\n{file.read_text(encoding='utf-8').strip()}\n```"]
    return "\n\n".join(block.strip() for block in blocks) + "\n"


def _cells(setting: Setting) -> tuple[str, ...]:
    default = f"`{setting.default}`" if setting.default else "must be given"
    return f"`{setting.key}`", setting.kind, default, "may change" if setting.free else "fixed", setting.meaning


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)


def main(path: Annotated[Path, typer.Option(help="The page to write.")] = PAGE) -> None:
    """Write the reference page."""
    path.write_text(page(), encoding="utf-8")
    typer.echo(str(path))


_INTRODUCTION = """
A training run is told what to do by a YAML file, or by the name of one that comes with the package, and by single changes after it,
the value in YAML: `steps=1000`, `ema=null`, `data.buckets.0.batch=2`. Numbers may be written as `1e-4`. An unknown key, a value of
another type or out of its range, and values that do not go together end the command before any work; the message names the key, the
nearest known one, both values, and the way out.

A run that is continued must have been begun with the same *fixed* settings, for they decide what is learned; another value is
refused, and the message names the key. The others may change from one day to the next.
"""


if __name__ == "__main__":
    typer.run(main)
