"""Phrases that the errors and findings of several modules have in common."""

from __future__ import annotations

from collections.abc import Collection, Iterable


def few(values: Iterable[object], most: int = 5) -> str:
    """Returns the first values as text, and dots if there are more."""
    shown = [str(v) for v in values]
    return ", ".join(shown[:most] + ["..."] * (len(shown) > most))


def in_channels(bad: Collection[object], total: int) -> str:
    """Returns the phrase that names the channels `bad`, by their numbers, out of `total`."""
    return f"in {len(bad)} of {total} channels ({few(bad)})"
