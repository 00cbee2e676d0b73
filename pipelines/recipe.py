"""Recipes: every setting of a build, checked before any work, in YAML.

A recipe's *content keys* decide the data (what is measured, how clips are cut, which models describe them); once a dataset
exists they are fixed. Its rules, and its *execution keys* (processors, limits, shard size), may change between runs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from videofactory.curation.analysis import AnalysisSettings
from videofactory.curation.caption import DEFAULT_CAPTIONER
from videofactory.curation.cut import ClipSettings
from videofactory.shards.schema import Step

RECIPES = Path(__file__).parent / "recipes"
"""The recipes that come with the package, by name."""


class RecipeError(Exception):
    """A recipe or a setting cannot be used; the message names the key, the value and the way out."""


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EmbedSettings(_Settings):
    """The image-text model behind embeddings and caption similarity."""

    model: str = Field(description="local directory, hf-hub:owner/name, or an open_clip architecture (then with `pretrained`)")
    pretrained: str | None = Field(None, description="name of pretrained weights for an open_clip architecture")
    batch_size: int = Field(64, ge=1, description="images per forward pass")


class CaptionSettings(_Settings):
    """The model that describes the middle frame."""

    captioner: str = Field(DEFAULT_CAPTIONER, description="import path of a captioner, package.module:Class")
    options: dict[str, Any] = Field(
        default_factory=dict, description="passed to the captioner: model, batch_size, prompt, max_new_tokens, num_beams"
    )


class SplitSettings(_Settings):
    """Fractions of sources (never of clips: a source does not leak) that go to validation and test."""

    val: float = Field(0.0, ge=0, le=1, description="fraction of sources for validation")
    test: float = Field(0.0, ge=0, le=1, description="fraction of sources for test")

    @model_validator(mode="after")
    def _leave_some_for_training(self) -> SplitSettings:
        if self.val + self.test > 1:
            raise ValueError(f"val {self.val} and test {self.test} are more than everything")
        return self


class ExecutionSettings(_Settings):
    """How a build runs; nothing here decides what the dataset holds."""

    cpus: int | None = Field(None, ge=1, description="CPUs to use on this machine; all of them unless given")
    gpus: int | None = Field(None, ge=0, description="GPUs to use on this machine; all of them unless given")
    describers: int = Field(1, ge=1, description="processes that hold the models (one GPU each where there are GPUs)")
    describe_batch: int = Field(32, ge=1, description="clips that a describer takes at a time")
    shard_bytes: int = Field(256 << 20, ge=1 << 16, description="size at which a shard is closed, in bytes")
    object_store_bytes: int | None = Field(
        None, ge=128 << 20, description="memory for rows on their way, in bytes; Ray's default (30% of memory) unless given"
    )
    decode_seconds: float = Field(3600, gt=0, description="wall-clock limit for one source's analysis, in seconds")
    cut_seconds: float = Field(600, gt=0, description="wall-clock limit for one clip's cut, in seconds")
    decode_memory: int = Field(3 << 30, ge=1 << 29, description="address space of the process that decodes, in bytes")
    no_progress_seconds: float | None = Field(
        None,
        gt=0,
        description="a build in which nothing moves for this long ends with an error that names the step; "
        "decode_seconds and half an hour unless given",
    )
    worker_deaths: int = Field(3, ge=1, description="after how many dead workers a source becomes an error row")
    thumbnails: bool = Field(True, description="keep a small picture of every candidate, for the report")


class Recipe(_Settings):
    """Every setting of a build. See `recipes/hdvg.yaml` for one with the reasons."""

    name: str = Field("custom", description="name of the recipe, for the card")
    about: str = Field("", description="what the recipe is for, one sentence")
    analysis: AnalysisSettings = Field(default_factory=AnalysisSettings, description="the pass over each source")
    rules: dict[str, str] = Field(
        default_factory=dict, description="conditions in SQL by name; a clip is kept where all are true"
    )
    clips: ClipSettings = Field(default_factory=ClipSettings, description="how kept shots become files")
    embed: EmbedSettings | None = Field(None, description="image embeddings and caption similarity; off when null")
    caption: CaptionSettings | None = Field(None, description="captions; off when null")
    split: SplitSettings = Field(default_factory=SplitSettings, description="how sources are divided for training")
    execution: ExecutionSettings = Field(default_factory=ExecutionSettings, description="how the build runs")

    @field_validator("rules", mode="before")
    @classmethod
    def _without_dropped_rules(cls, rules: Any) -> Any:
        """`--set rules.NAME=null` drops a rule that the named recipe has."""
        return {name: sql for name, sql in rules.items() if sql is not None} if isinstance(rules, Mapping) else rules

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps that this recipe runs."""
        described: tuple[Step, ...] = (*(("embed",) if self.embed else ()), *(("caption",) if self.caption else ()))
        return ("analyse", "cut", *described)


def load_recipe(recipe: str, settings: Iterable[str] = ()) -> Recipe:
    """A recipe by name or file, with single settings changed.

    Args:
        recipe: name of a recipe of the package, or path of a YAML file. A file may say `extends: NAME|FILE`.
        settings: changes as `dotted.key=value`, the value in YAML (`caption=null` switches captions off).

    Raises:
        RecipeError: it does not exist, is no YAML, or has an unknown key or a wrong value.
    """
    values = _read(recipe, ())
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise RecipeError(f"--set {setting!r} is not of the form key=value, for example --set clips.crf=20")
        try:
            _change(values, key.split("."), yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {setting!r}: the value is no YAML ({_one_line(error)})") from None
    return parse_recipe(values, recipe)


def parse_recipe(values: Mapping[str, Any], origin: str) -> Recipe:
    """Settings as a `Recipe`; `origin` names them in errors."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(problem, origin) for problem in error.errors())) from None


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every key written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def changed_content(stored: Recipe, wanted: Recipe) -> list[tuple[str, Any, Any]]:
    """The content keys in which two recipes differ: (dotted key, stored value, wanted value)."""
    before, after = dict(_flat(_content(stored))), dict(_flat(_content(wanted)))
    return [(key, before.get(key), after.get(key)) for key in sorted({*before, *after}) if before.get(key) != after.get(key)]


def _content(recipe: Recipe) -> dict[str, Any]:
    values = recipe.model_dump(mode="json", exclude={"name", "about", "rules", "execution"})
    # Where, by how many threads and how many at a time is no matter of content.
    for settings in (values["analysis"], values["embed"], (values["caption"] or {}).get("options")):
        for name in ("threads", "batch_size", "device"):
            (settings or {}).pop(name, None)
    return values


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read(recipe: str, seen: tuple[str, ...]) -> dict[str, Any]:
    path = Path(recipe)
    if not path.suffix and "/" not in recipe:
        path = RECIPES / f"{recipe}.yaml"
    if recipe in seen:
        raise RecipeError(f"recipe {recipe!r} extends itself ({' -> '.join((*seen, recipe))})")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        names = sorted(file.stem for file in RECIPES.glob("*.yaml"))
        near = difflib.get_close_matches(recipe, names, 1)
        hint = f"did you mean {near[0]!r}?" if near else "name a YAML file"
        raise RecipeError(f"there is no recipe {recipe!r}; there are {', '.join(names)}; {hint}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {recipe!r} is no YAML: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"recipe {recipe!r} must be a mapping of keys to values, and is {type(values).__name__}")
    parent = values.pop("extends", None)
    if parent is None:
        return values
    base = str(parent) if not str(parent).endswith((".yaml", ".yml")) else str(path.parent / str(parent))
    return _merged(_read(base, (*seen, recipe)), values)


def _merged(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, mappings merged key by key."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return result


def _change(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = values.get(key)
        values[key] = dict(inner) if isinstance(inner, dict) else {}
        values = values[key]
    values[keys[-1]] = value


def _explain(problem: Any, origin: str) -> str:
    place = [str(part) for part in problem["loc"]]
    key = ".".join(place)
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _known_keys(place[:-1])
        near = difflib.get_close_matches(place[-1], known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(known)}"
        return f"recipe {origin!r} has the unknown key {key!r}; {hint}"
    return f"recipe {origin!r}, key {key!r}: {problem['msg']} (it is {problem['input']!r})"


def _known_keys(place: list[str]) -> list[str]:
    defaults: Any = {
        **Recipe().model_dump(),
        "embed": EmbedSettings(model="").model_dump(),
        "caption": CaptionSettings().model_dump(),
    }
    for part in place:
        defaults = defaults.get(part, {}) if isinstance(defaults, dict) else {}
    return sorted(defaults) if isinstance(defaults, dict) else []


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
