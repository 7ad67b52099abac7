"""Calls of batch norm layers that a tool makes in place of the caller: arguments by name, other options."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_ARGUMENTS = ("x", "use_running_average", "mask", "domain", "update_stats")


def by_name(args: Sequence[object], kwargs: Mapping[str, object]) -> dict[str, Any]:
    """Returns all arguments of a call by their names."""
    return {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}


@contextlib.contextmanager
def options(layer: object, **values: object) -> Iterator[None]:
    """Gives a layer other options, until the context ends."""
    before = {name: getattr(layer, name) for name in values}
    try:
        for name, value in values.items():
            object.__setattr__(layer, name, value)
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(layer, name, value)


def in_evaluation(layer: object) -> contextlib.AbstractContextManager[None]:
    """Lets a call of the layer say `use_running_average=True`, whatever the layer's own option is."""
    # Linen accepts the mode from the call only if the constructor was given none.
    return options(layer, use_running_average=None)
