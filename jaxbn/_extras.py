"""Optional packages: imported where they are needed, with an error that says how to install them."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from jaxbn._versions import check_version


def need(name: str, purpose: str, install: str = "'jaxbn[tools]'") -> Any:
    """Imports and returns an optional package; if it is missing, the error says what for and how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(f"{name}: needed {purpose}; pip install {install}") from None


@contextlib.contextmanager
def needs_flax(module: str) -> Iterator[None]:
    """Encloses the imports of `module`: if Flax is missing, the error says how to install it."""
    try:
        import flax

        check_version("flax", flax.__version__, "0.11.2", "pip install --upgrade flax")
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "flax":
            raise
        raise ModuleNotFoundError(f"flax: needed for {module}; pip install 'jaxbn[flax]'", name="flax") from None
