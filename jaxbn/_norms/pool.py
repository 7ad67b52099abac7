"""Moments of long streams of batches: measured on the device, merged on the host in float64.

float32 counts to 2**24, which is 335 images of 224 x 224; beyond that a sum of counts stands still.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from jaxbn._extras import need
from jaxbn._kernel.moments import Moments


class Pool:
    """The moments of the union of all that was added (Chan, Golub & LeVeque 1979)."""

    def __init__(self) -> None:
        self._mean: Any = np.float64(0)
        self._squares: Any = np.float64(0)
        self._count: Any = np.float64(0)

    def add(self, moments: Moments) -> None:
        mean, var, count, lo = (
            np.asarray(v, np.float64) for v in (moments.mean, moments.var, moments.count, moments.mean_lo)
        )
        if np.ndim(self._mean) and np.shape(self._mean) != mean.shape:
            raise ValueError(
                f"batches: expected moments of shape {np.shape(self._mean)}, as before, got {mean.shape}; "
                "all batches need the same channels, along the same axis"
            )
        total = self._count + count
        weight = count / np.maximum(total, 1)
        # Data that are not finite are for the caller to report.
        with np.errstate(all="ignore"):
            shift = np.where(count > 0, mean + lo - self._mean, 0)
            self._squares = self._squares + var * count + shift * shift * self._count * weight
            self._mean = self._mean + shift * weight
        self._count = total

    @property
    def moments(self) -> Moments:
        """Of everything; float64 NumPy arrays."""
        return Moments(self._mean, self._squares / np.maximum(self._count, 1), self._count, np.zeros_like(self._mean))


def each(batches: Iterable[Any], progress: bool, description: str) -> Iterator[Any]:
    """The batches, under a progress bar if wanted. Where there is no terminal it would fill the log."""
    if progress:
        bar = need("tqdm", "for progress=True").tqdm
        batches = bar(batches, desc=description, unit="batch", disable=None)
    return iter(batches)


def check_batches(batches: object) -> None:
    if hasattr(batches, "shape"):
        raise TypeError(
            f"batches: expected an iterable of batches, got one array of shape {tuple(batches.shape)}; "
            "if it is one batch put it into a list: [x]"
        )
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches: expected an iterable of batches, got {type(batches).__name__}")


def as_arrays(batch: Any, cure: str) -> Any:
    """A batch as jax.jit takes it: PyTorch's tensors, for one, become NumPy arrays."""

    def convert(leaf: Any) -> Any:
        # JAX's own may be no numbers: random keys have a dtype of theirs.
        if isinstance(leaf, jax.Array | numbers.Number):
            return leaf
        if not isinstance(leaf, np.ndarray | np.generic) and not hasattr(leaf, "__array__"):
            raise TypeError(f"batches: expected arrays in each batch, got {type(leaf).__name__}; {cure}")
        array = np.asarray(leaf)
        if array.dtype.kind in "OSU":
            raise TypeError(f"batches: expected arrays of numbers in each batch, got dtype {array.dtype}; {cure}")
        return array

    return jax.tree.map(convert, batch)
