"""Packages that are light to import: their names are loaded from their modules when they are first taken."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def names_from(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A `__getattr__` for the package (PEP 562) that takes each name from its module in it.

    Args:
        package: its `__name__`.
        homes: the module of each name.
    """

    def take(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f".{homes[name]}", package), name)

    return take
