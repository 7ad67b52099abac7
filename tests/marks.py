"""Grids of cases of which a few are in the quick loop."""

import pytest


def grid(names, cases, *, quick, ids=None):
    """`pytest.mark.parametrize`, where cases of which `quick` is false are marked `slow`."""
    values = [case if isinstance(names, tuple) else (case,) for case in cases]
    marked = [
        pytest.param(*value, marks=() if quick(case) else pytest.mark.slow)
        for value, case in zip(values, cases, strict=True)
    ]
    return pytest.mark.parametrize(names, marked, ids=ids)
