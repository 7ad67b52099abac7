"""Phrases that the errors and findings of several modules have in common."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

# With fewer values, a statistic is a guess.
FEW_VALUES = 16


def few(values: Iterable[Any], most: int = 5) -> str:
    """Returns the first values as text, and dots if there are more."""
    shown = [str(v) for v in values]
    return ", ".join(shown[:most] + ["..."] * (len(shown) > most))


def in_channels(bad: Any, total: int) -> str:
    """Returns the phrase that names channels, given their numbers."""
    return f"in {len(bad)} of {total} channels ({few(bad)})"


def few_values(values: float, enough: float = FEW_VALUES) -> str | None:
    """Returns what is wrong with a statistic of so few values, or None if there are enough."""
    if values >= enough:
        return None
    if values <= 1:
        return "1 value per statistic, which has no variance"
    return f"{values:g} values per statistic: the variance is off by {math.sqrt(2 / values):.0%}"
