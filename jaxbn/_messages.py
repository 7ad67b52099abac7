"""What several modules' errors and findings say alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def few(values: Iterable[Any], most: int = 5) -> str:
    """The first values, and dots if there are more."""
    shown = [str(v) for v in values]
    return ", ".join(shown[:most] + ["..."] * (len(shown) > most))


def in_channels(bad: Any, total: int) -> str:
    """Where something is so: `bad` has the numbers of the channels."""
    return f"in {len(bad)} of {total} channels ({few(bad)})"
