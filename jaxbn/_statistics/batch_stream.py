"""Streams of batches, and their moments: measured on the device, merged on the host in float64.

Counts in float32 are exact up to 2**24, which is 335 images of 224 x 224; beyond that adding 1 changes nothing.
"""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from jaxbn._arrays import to_numpy
from jaxbn._extras import need
from jaxbn._kernel.moments import Moments

Batch = TypeVar("Batch")


class MomentsAccumulator:
    """Merges the moments of sets into the moments of their union (Chan, Golub & LeVeque 1979)."""

    def __init__(self) -> None:
        self._mean = self._squares = self._count = np.zeros(())

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
        weight = count / np.where(total > 0, total, 1)
        # NaN and infinity are for the caller to report.
        with np.errstate(all="ignore"):
            shift = np.where(count > 0, mean + lo - self._mean, 0)
            self._squares = self._squares + var * count + shift * shift * self._count * weight
            self._mean = self._mean + shift * weight
        self._count = total

    @property
    def moments(self) -> Moments:
        """The moments of all that was added; float64 NumPy arrays."""
        var = self._squares / np.where(self._count > 0, self._count, 1)
        # To type checkers, moments are JAX's arrays.
        fields: tuple[Any, ...] = (self._mean, var, self._count, np.zeros_like(self._mean))
        return Moments(*fields)


def with_progress(batches: Iterable[Batch], progress: bool, description: str) -> Iterator[Batch]:
    """Returns the batches, with a progress bar if `progress` is True and there is a terminal."""
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
    if isinstance(batches, Mapping):
        raise TypeError(
            f"batches: expected an iterable of batches, got one {type(batches).__name__}; if it is one batch put it "
            "into a list: [batch]"
        )
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches: expected an iterable of batches, got {type(batches).__name__}")


@contextlib.contextmanager
def taken_apart(batches: object) -> Iterator[None]:
    """Adds to an exception that each array of a tuple, such as `(x, labels)`, was taken as a batch."""
    try:
        yield
    except Exception as error:
        if isinstance(batches, tuple | list) and all(hasattr(batch, "shape") for batch in batches):
            ranks = {len(batch.shape) for batch in batches}
            if len(batches) > 1 and (isinstance(batches, tuple) or len(ranks) > 1):
                error.add_note(
                    f"batches: got a {type(batches).__name__} of {len(batches)} arrays, taken as {len(batches)} "
                    "batches; if it is one batch put it into a list: [batch]"
                )
        raise


def as_arrays(batch: object, cure: str) -> Any:
    """Returns a batch whose arrays jax.jit takes: PyTorch's tensors, for example, become NumPy arrays."""

    def convert(leaf: object) -> jax.Array | np.ndarray | numbers.Number:
        # Known by their class, since JAX's random keys have a dtype that is not numeric.
        if isinstance(leaf, jax.Array | numbers.Number):
            return leaf
        if not isinstance(leaf, np.ndarray | np.generic) and not hasattr(leaf, "__array__"):
            raise TypeError(f"batches: expected arrays in each batch, got {type(leaf).__name__}; {cure}")
        array = to_numpy(leaf)
        if array.dtype.kind in "OSU":
            raise TypeError(f"batches: expected arrays of numbers in each batch, got dtype {array.dtype}; {cure}")
        return array

    return jax.tree.map(convert, batch)
