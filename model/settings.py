"""Checks of a U-Net's settings, one by one and together, with errors that name the value, the cause and the way out."""

import difflib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from .attention import INTERACTIONS

COUNTS = ("in_channels", "out_channels", "layers_per_block", "cross_attention_dim", "norm_num_groups")
# Settings that may be chosen anew for weights that exist; the others say what shapes these have, or what they were trained to do.
FREE = ("interaction", "swap_windows", "dropout")


def nearest(name: object, known: Iterable[str]) -> str:
    """The one of `known` that `name` was probably meant to be."""
    return difflib.get_close_matches(str(name), sorted(known), n=1, cutoff=0)[0]


def check_names(given: Mapping[str, Any], known: Collection[str], owner: str, others: Iterable[str] = ()) -> None:
    """Raise a `ValueError` for the first name that is no known setting.

    It names the nearest setting or, of `others`, argument that may stand beside settings; where none is near, all settings.
    """
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), sorted({*known, *others}), n=1)
            hint = f"The nearest is {near[0]!r}." if near else f"Its settings are {', '.join(sorted(known))}."
            raise ValueError(f"{owner} has no setting {name!r} (= {value!r}). {hint}")


def check_agreement(given: Mapping[str, Any], present: Mapping[str, Any], owner: str) -> None:
    """Raise a `ValueError` for the first setting given that is not as in `present`, those of `owner`; those in `FREE` may differ."""
    for name, value in given.items():
        if name not in FREE and not _is_same(value, present[name]):
            raise ValueError(
                f"{name} = {value!r} contradicts {owner}, which has {present[name]!r}; of the settings only {', '.join(FREE)} may "
                "differ from it."
            )


def per_level(value: Any, levels: int) -> tuple[Any, ...]:
    """A setting that is one number for all levels, or one for each."""
    return tuple(value) if _is_list(value) else (value,) * levels


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check the arguments of `SwapUNet`.

    Raises:
        ValueError: one is of another type or out of its range, or two do not fit together; the message names both values.
    """
    for name in COUNTS:
        if not _is_count(settings[name]):
            raise ValueError(f"{name} = {settings[name]!r}; a whole number of at least 1 is wanted.")
    if not _is_number(settings["norm_eps"]) or not 0 < settings["norm_eps"] < math.inf:
        raise ValueError(f"norm_eps = {settings['norm_eps']!r}; a number above 0 is wanted.")
    if not _is_number(settings["dropout"]) or not 0 <= settings["dropout"] <= 1:
        raise ValueError(f"dropout = {settings['dropout']!r}; a probability is wanted, 0 to 1.")
    if settings["interaction"] not in INTERACTIONS:
        interaction = settings["interaction"]
        raise ValueError(
            f"interaction = {interaction!r} is not known; the nearest of {', '.join(INTERACTIONS)} is "
            f"{nearest(interaction, INTERACTIONS)!r}."
        )
    _check_levels(settings)
    _check_widths(settings)


def _check_levels(settings: Mapping[str, Any]) -> None:
    """Whether what is set for every level has as many levels, and every level's value is of its kind."""
    channels = settings["block_out_channels"]
    if not _is_list(channels) or not channels or not all(_is_count(width) for width in channels):
        raise ValueError(f"block_out_channels = {channels!r}; the channels of every level are wanted, e.g. (320, 640).")
    kinds = {
        "attention_levels": (lambda value: isinstance(value, bool), "True or False"),
        "attention_head_dim": (_is_count, "a whole number of at least 1"),
        "swap_windows": (_is_window, "three whole numbers of at least 1 (frames, height, width)"),
    }
    for name, (fits, wanted) in kinds.items():
        values = settings[name]
        if name == "attention_head_dim":
            values = per_level(values, len(channels))
        if not _is_list(values):
            raise ValueError(f"{name} = {values!r}; {wanted} for every level is wanted.")
        if len(values) != len(channels):
            raise ValueError(
                f"{name} = {values!r} has {len(values)} levels, block_out_channels = {tuple(channels)!r} has {len(channels)}."
            )
        for value in values:
            if not fits(value):
                raise ValueError(f"{name} = {settings[name]!r} holds {value!r}; {wanted} is wanted for every level.")


def _check_widths(settings: Mapping[str, Any]) -> None:
    """Whether groups and heads divide the channels of every level."""
    channels, groups = settings["block_out_channels"], settings["norm_num_groups"]
    for width, head_dim in zip(channels, per_level(settings["attention_head_dim"], len(channels)), strict=True):
        for name, divisor in {"norm_num_groups": groups, "attention_head_dim": head_dim}.items():
            if width % divisor:
                raise ValueError(f"{name} = {divisor} does not divide {width} of block_out_channels = {tuple(channels)!r}.")


def _is_same(one: Any, other: Any) -> bool:
    """Whether two values of a setting mean the same: a list is as good as a tuple, and one number stands for all levels."""
    levels = max((len(value) for value in (one, other) if _is_list(value)), default=1)
    return per_level(one, levels) == per_level(other, levels)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_window(value: Any) -> bool:
    return _is_list(value) and len(value) == 3 and all(_is_count(length) for length in value)
