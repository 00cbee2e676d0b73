"""The configuration of a training run: read from YAML, changed by `key=value`, checked as a whole before any work.

    config = load_config("miniature", ["steps=200", "optimiser.learning_rate=3e-4", "data.buckets.0.batch=2"])

The keys in `FREE` may change when a run is continued; all others decide what is learned, and `differences` names them.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from .settings import (
    CheckpointSettings,
    DataSettings,
    EmaSettings,
    LogSettings,
    ModelSettings,
    NoiseSettings,
    OptimiserSettings,
    Section,
    ValidationSettings,
)

RECIPES = Path(__file__).parent / "recipes"
"""The configurations that come with the package, by name."""

FREE = (
    "about",
    "parallel",
    "gradient_checkpointing",
    "compile",
    "steps",
    "output",
    "checkpoints",
    "validation",
    "log",
    "data.workers",
    "data.prefetch",
    "data.decode_threads",
    "data.max_bad_fraction",
)
"""Keys that may change when a run is continued; with a section, everything in it."""


class ConfigError(Exception):
    """A configuration cannot be used; the message names the key, the value and the way out."""


class TrainingConfig(Section):
    """Every setting of a training run. See `recipes/` for some with the reasons."""

    about: str = Field("", description="what the configuration is for, in a sentence")
    output: str = Field(description="folder for checkpoints, logs, validation videos and the finished pipeline")
    steps: int = Field(
        ge=1, description="steps of the optimiser; with a schedule that falls, another number changes the way there"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="of new weights, of the order of clips, of all noise")
    data: DataSettings = Field(description="what is trained on")
    model: ModelSettings = Field(description="which weights are trained")
    noise: NoiseSettings = Field(default_factory=NoiseSettings, description="the diffusion process")
    optimiser: OptimiserSettings = Field(default_factory=OptimiserSettings, description="how weights are changed")
    ema: EmaSettings | None = Field(default_factory=EmaSettings, description="moving average; none when null")
    precision: Literal["float32", "bfloat16"] = Field(
        "bfloat16",
        description="of computation; weights, their average and the optimiser's state stay float32",
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="with several processes: `ddp`, every one has all weights; `fsdp`, each has a part of them (FSDP2)",
    )
    gradient_checkpointing: bool = Field(
        True, description="compute layers again in the backward pass rather than keep them: less memory"
    )
    compile: bool = Field(False, description="compile the repeated layers with torch.compile; each bucket compiles anew")
    checkpoints: CheckpointSettings = Field(default_factory=CheckpointSettings, description="what is kept")
    validation: ValidationSettings | None = Field(None, description="videos and losses while training; none when null")
    log: LogSettings = Field(default_factory=LogSettings, description="where numbers go")

    @model_validator(mode="after")
    def _sections_agree(self) -> TrainingConfig:
        if self.optimiser.warmup_steps > self.steps:
            raise ValueError(
                f"optimiser.warmup_steps is {self.optimiser.warmup_steps} and steps is {self.steps}, so the learning rate would never "
                f"be reached; lower the first, for example to {self.steps // 10}"
            )
        if self.model.spatial == "frozen" and self.data.image_share > 0:
            raise ValueError(
                f"model.spatial is 'frozen' and data.image_share is {self.data.image_share}: an image passes through spatial layers "
                "alone, so it would teach nothing; set data.image_share to 0, or model.spatial to a number"
            )
        prompts = self.validation.prompts if self.validation else ()
        if prompts and len(self.data.images) == len(self.data.buckets):
            raise ValueError(
                f"validation.prompts has {len(prompts)} texts and data.buckets has no size of more than 1 frame, in which to make "
                "their videos; add a video bucket, or set validation.prompts to []"
            )
        return self

    def fingerprint(self) -> str:
        """16 hexadecimal digits over every key that is not free: what is learned depends on these alone, and on the data."""
        text = json.dumps(sorted(_fixed(self).items()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_config(source: str | Path, overrides: Iterable[str] = ()) -> TrainingConfig:
    """A configuration by name or file, with single settings changed.

    Args:
        source: path of a YAML file, or the name of a configuration of the package.
        overrides: changes as `dotted.key=value`, the value in YAML; items of lists go by number, `data.buckets.0.batch=2`.

    Raises:
        ConfigError: it does not exist, is no YAML, has an unknown key or a wrong value, or two values do not go together.
    """
    values = _read(source)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"{override!r} is not of the form key=value, for example steps=1000")
        try:
            _change(values, key.split("."), _parse_yaml(text))
        except yaml.YAMLError as error:
            raise ConfigError(f"{override!r}: the value is no YAML ({_one_line(error)})") from None
        except (IndexError, ValueError) as error:
            raise ConfigError(f"{override!r}: {error}") from None
    return parse_config(values, str(source))


def parse_config(values: Mapping[str, Any], origin: str) -> TrainingConfig:
    """Settings as a `TrainingConfig`; `origin` names them in errors. Raises `ConfigError`."""
    try:
        return TrainingConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error, origin))) from None


def dump_config(config: TrainingConfig) -> str:
    """The configuration as YAML, every key written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def differences(stored: TrainingConfig, wanted: TrainingConfig) -> list[tuple[str, Any, Any]]:
    """The keys that may not change and did: (dotted key, stored value, wanted value), sorted by key. Empty: it can go on."""
    before, after = _fixed(stored), _fixed(wanted)
    return [(key, before.get(key), after.get(key)) for key in sorted({*before, *after}) if before.get(key) != after.get(key)]


def check_same(stored: TrainingConfig, wanted: TrainingConfig, origin: str) -> None:
    """Whether a run that began with `stored` may go on with `wanted`; `origin` says where the first was found.

    Raises:
        ConfigError: it may not; the message names every key that differs, with both values.
    """
    if changed := differences(stored, wanted):
        lines = [f"  {key}: {old!r} there, {new!r} now" for key, old, new in changed]
        raise ConfigError(
            f"{origin} began with other settings:\n" + "\n".join(lines) + "\nSet them back, or start anew in another `output`, "
            "from these weights if you like (model.start). May change: " + ", ".join(FREE) + "."
        )


def is_free(key: str) -> bool:
    """Whether the setting of this dotted key may change when a run is continued."""
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field of this type holds, one or several or perhaps none of them; `None` for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := section_of(part))), None)


def _fixed(config: TrainingConfig) -> dict[str, Any]:
    return {key: value for key, value in _flat(config.model_dump(mode="json")) if not is_free(key)}


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value with its dotted key. Lists of sections count by item, other lists are values."""
    if isinstance(values, list) and any(isinstance(item, dict) for item in values):
        values = {str(number): item for number, item in enumerate(values)}
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, values


class _Loader(yaml.SafeLoader):
    """YAML as people write it: `1e-4` is a number (YAML 1.1 wants `1.0e-4`), and no key stands twice."""

    yaml_implicit_resolvers = {key: list(found) for key, found in yaml.SafeLoader.yaml_implicit_resolvers.items()}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.YAMLError(f"the key {twice!r} stands twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def _parse_yaml(text: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _read(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if not path.is_file() and (RECIPES / f"{source}.yaml").is_file():
        path = RECIPES / f"{source}.yaml"
    try:
        values = _parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
        raise ConfigError(f"there is no configuration {str(source)!r}: it is no file, and none of {known}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read as YAML ({_one_line(error)})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{str(path)!r} must be a mapping of keys to values, and is {type(values).__name__}")
    return values


def _change(values: Any, keys: list[str], value: Any) -> None:
    """Set one value inside nested mappings and lists; what is no mapping on the way becomes one."""
    for key, following in zip(keys, [*keys[1:], None], strict=True):
        place: Any = key
        if isinstance(values, list):
            if not key.isdigit() or int(key) >= len(values):
                raise ValueError(f"a list of {len(values)} has no item {key!r}; items go by number, from 0")
            place = int(key)
        if following is None:
            values[place] = value
        else:
            inner = values[place] if isinstance(values, list) else values.get(place)
            values[place] = inner if isinstance(inner, dict | list) else {}
            values = values[place]


def _explain(error: ValidationError, origin: str) -> Iterator[str]:
    """One line per key. A value that may be of two types has one problem for each; they become one line."""
    problems: dict[str, list[str]] = {}
    values: dict[str, Any] = {}
    for problem in error.errors():
        place, section = _place(problem["loc"])
        key, kind = ".".join(place), problem["type"]
        if kind == "extra_forbidden":
            known = sorted(section.model_fields)
            near = difflib.get_close_matches(place[-1], known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(known)}"
            message = f"is unknown; {hint}"
        elif kind == "missing" and place[-1] in section.model_fields:
            message = f"must be given: {section.model_fields[place[-1]].description}"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            if not isinstance(problem["input"], dict):
                values[key] = problem["input"]
        problems.setdefault(key, []).append(message)
    for key, messages in problems.items():
        found = f" (it is {values[key]!r})" if key in values else ""
        text = " or ".join(dict.fromkeys(messages))
        yield f"{origin}, key {key!r}: {text}{found}" if key else f"{origin}: {text}"


def _place(location: tuple[int | str, ...]) -> tuple[list[str], type[BaseModel]]:
    """A problem's place as keys, without pydantic's own names for the types of a union, and the section of the last key."""
    place: list[str] = []
    owner: type[BaseModel] = TrainingConfig
    current: type[BaseModel] | None = owner
    for part in location:
        if isinstance(part, int):
            place.append(str(part))
        elif current is None:
            break  # below a plain value stand names of types only
        else:
            place.append(part)
            owner, field = current, current.model_fields.get(part)
            current = section_of(field.annotation) if field else None
    return place, owner


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
