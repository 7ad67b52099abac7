"""Paths of modules and variables in a model: their keys, joined by slashes. The path of the model itself is empty."""

from __future__ import annotations

from collections.abc import Iterable


def path_of(keys: Iterable[object]) -> str:
    return "/".join(map(str, keys))


def name_of(keys: Iterable[object]) -> str:
    """The path as messages and reports show it."""
    return "/".join(map(str, keys)) or "(the model itself)"


def numbered(path: str, index: Iterable[int]) -> str:
    """The path of one of several layers that are stacked in one place, by its numbers along the leading axes."""
    numbers = ", ".join(map(str, index))
    return f"{path}[{numbers}]" if numbers else path


def join(*paths: str) -> str:
    return "/".join(filter(None, paths))


def split(path: str) -> tuple[str, str]:
    """The path of the module that has a variable, and the variable's name in it."""
    module, _, name = path.rpartition("/")
    return module, name
