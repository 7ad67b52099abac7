"""Packages that only some modules need, imported when they do."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any


def need(name: str, purpose: str) -> Any:
    """Imports a package of the extra `tools`, or says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(f"{name}: needed {purpose}; pip install 'jaxbn[tools]'") from None


@contextlib.contextmanager
def needs_flax(module: str) -> Iterator[None]:
    """Around a module's imports of Flax: says how to get it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "flax":
            raise
        raise ModuleNotFoundError(f"flax: needed for {module}; pip install 'jaxbn[flax]'", name="flax") from None
