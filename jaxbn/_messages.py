"""Phrases that the errors and findings of several modules have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def few(values: Iterable[Any], most: int = 5) -> str:
    """Returns the first values as text, and dots if there are more."""
    shown = [str(v) for v in values]
    return ", ".join(shown[:most] + ["..."] * (len(shown) > most))


def in_channels(bad: Any, total: int) -> str:
    """Returns the phrase that names channels, given their numbers."""
    return f"in {len(bad)} of {total} channels ({few(bad)})"
