"""Axes and sizes of x, and the dtype of its statistics.

Inside the kernel, masks and statistics have the rank of `x`, with size 1 along axes that they do not vary along.
"""

from __future__ import annotations

import jax
import numpy as np


def other_axes(ndim: int, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted({*range(ndim)} - {*axes}))


def are_last(ndim: int, axes: tuple[int, ...]) -> bool:
    return bool(axes) and axes == tuple(range(ndim - len(axes), ndim))


def sizes(x: jax.Array, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(map(x.shape.__getitem__, axes))


def statistics_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype of the statistics of values of `dtype`: float64 for float64, float32 for all others."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)
