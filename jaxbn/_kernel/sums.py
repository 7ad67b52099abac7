"""Count, mean and variance of x: the reductions, in the form that each platform's compiler runs fastest.

Results have the rank of x, with size 1 along the reduced axes. docs/design.md has the reasons and the measurements.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._kernel import inputs
from jaxbn._kernel.xla import prevent_fma, separate_copy

# A mean within so many standard deviations of zero needs no mean_lo, which is less than the rounding error of y.
_NEAR_ZERO = 2
# On GPUs and TPUs one in so many values is in the sample whose mean is the pivot.
_SAMPLE_STEP = 64
# The longest row that fits into one block of a GPU.
_LONGEST_CHAINED_ROW = 2**14
# The mean, its rounding error (mean_lo), and the variance.
MeanAndVariance = tuple[jax.Array, jax.Array, jax.Array]
Form = Callable[[jax.Array, jax.Array | None, tuple[int, ...]], MeanAndVariance]
# Count, mean, mean_lo, and the sum of squared differences from the mean.
_Accumulator = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def count(x: jax.Array, mask: jax.Array | None, reduced: tuple[int, ...]) -> jax.Array:
    """Returns how many values of `x` count, in its dtype."""
    if mask is None:
        return jnp.full((1,) * x.ndim, math.prod(inputs.sizes(x, reduced)), x.dtype)
    entries, values = count_entries(x, mask, reduced)
    return entries.astype(x.dtype) * values


def count_entries(x: jax.Array, mask: jax.Array, reduced: tuple[int, ...]) -> tuple[jax.Array, int]:
    """Returns the number of True entries of the mask, int32, and the number of values of `x` for each entry."""
    values = math.prod(inputs.sizes(x, tuple(a for a in reduced if mask.shape[a] == 1)))
    return jnp.sum(mask, reduced, dtype=jnp.int32, keepdims=True), values


def total(x: jax.Array, mask: jax.Array | None, reduced: tuple[int, ...]) -> jax.Array:
    """Returns the sum of the values of `x` that count."""
    return jnp.sum(x if mask is None else jnp.where(mask, x, 0), reduced, keepdims=True)


def mean(x: jax.Array, mask: jax.Array | None, reduced: tuple[int, ...]) -> jax.Array:
    """Returns the mean of the values of `x` that count; 0 if none does."""
    return total(x, mask, reduced) / jnp.maximum(count(x, mask, reduced), 1)


def mean_and_variance(
    x: jax.Array, mask: jax.Array | None, reduced: tuple[int, ...], input_dtype: np.dtype, only_y: bool
) -> MeanAndVariance:
    """Returns mean and biased variance of `x`, which was converted from `input_dtype`.

    With `only_y` they are used for nothing but normalizing `x`: `mean + mean_lo` is the mean, but the first of the
    two may be another number than the rounded mean.
    """
    rows = inputs.are_last(x.ndim, reduced)
    if input_dtype == jnp.bfloat16:
        forms: dict[str, Form] = {"cpu": _around_mean, "default": _around_zero}
    else:
        forms = {"cpu": _around_mean, "tpu": _by_merging if rows else _around_sample, "default": _around_sample}
    if rows and only_y and mask is None and math.prod(inputs.sizes(x, reduced)) <= _LONGEST_CHAINED_ROW:
        forms |= {"cuda": _by_chained_sums, "rocm": _by_chained_sums}
    chosen = {platform: functools.partial(form, x, mask, reduced) for platform, form in forms.items()}
    return cast(MeanAndVariance, jax.lax.platform_dependent(**chosen))


def _around_mean(x: jax.Array, mask: jax.Array | None, reduced: tuple[int, ...]) -> MeanAndVariance:
    """With the mean as the pivot, which costs nothing on CPU: it reads x again for each sum anyway.

    The sum of the differences is only for mean_lo, and in a branch that is skipped where mean_lo does not matter.
    """
    pivot = prevent_fma(mean(x, mask, reduced))
    d = x - separate_copy(pivot, 1)
    square = mean(d * d, mask, reduced)

    def near() -> MeanAndVariance:
        return pivot, jnp.zeros_like(pivot), square

    def far() -> MeanAndVariance:
        return from_differences(pivot, mean(x - separate_copy(pivot, 2), mask, reduced), square)

    close = (pivot == 0) | (pivot * pivot < _NEAR_ZERO**2 * square)
    return cast(MeanAndVariance, jax.lax.cond(jnp.all(close), near, far))


def _around_sample(x: jax.Array, mask: jax.Array | None, reduced: tuple[int, ...]) -> MeanAndVariance:
    """With the mean of a sample as the pivot: the two sums do not depend on each other, and one loop does both."""
    pivot = prevent_fma(mean(x if mask is not None else _sample(x, reduced), mask, reduced))
    d = x - pivot
    return from_differences(pivot, mean(d, mask, reduced), mean(d * d, mask, reduced))


def _by_merging(x: jax.Array, mask: jax.Array | None, reduced: tuple[int, ...]) -> MeanAndVariance:
    """One reduction whose operation is Chan's merge of moments, where each value of x is a set of its own."""

    def merge(a: _Accumulator, b: _Accumulator) -> _Accumulator:
        (n, m, lo, squares), (other_n, other_m, other_lo, other_squares) = a, b
        total = n + other_n
        weight = other_n / jnp.maximum(total, 1)
        d = (other_m - m) + (other_lo - lo)
        merged = m + d * weight
        return total, merged, lo + (d * weight - (merged - m)), squares + other_squares + d * d * (n * weight)

    ones, zeros = jnp.ones_like(x), jnp.zeros_like(x)
    if mask is not None:
        ones, x = jnp.where(mask, ones, 0), jnp.where(mask, x, 0)
    zero = jnp.zeros((), x.dtype)
    n, m, lo, squares = jax.lax.reduce((ones, x, zeros, zeros), (zero,) * 4, merge, reduced)
    n, m, lo, squares = (jnp.expand_dims(v, reduced) for v in (n, m, lo, squares))
    return *_two_sum(m, lo), squares / jnp.maximum(n, 1)


def _by_chained_sums(x: jax.Array, mask: jax.Array | None, reduced: tuple[int, ...]) -> MeanAndVariance:
    """A chain of sums along rows, each of which needs the one before: GPUs run it, and what uses it, as one kernel."""
    pivot = prevent_fma(mean(x, mask, reduced))
    d = x - pivot
    rest = prevent_fma(mean(d, mask, reduced))
    return pivot, rest, mean((d - rest) ** 2, mask, reduced)


def _two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the rounded sum and its rounding error (Knuth 1969)."""
    rounded = a + b
    part = rounded - a
    return rounded, (a - (rounded - part)) + (b - part)


def _around_zero(x: jax.Array, mask: jax.Array | None, reduced: tuple[int, ...]) -> MeanAndVariance:
    """Without a pivot, for bfloat16 input, whose rounding changed the variance by more than these sums do."""
    first, square = mean(x, mask, reduced), mean(x * x, mask, reduced)
    var = jnp.maximum(square - first * first, 0)
    # The mean of a constant channel is its value, which bfloat16 represents.
    constant = var <= 4 * float(np.finfo(var.dtype).eps) * square
    first = jnp.where(constant, jax.lax.reduce_precision(first, exponent_bits=8, mantissa_bits=7), first)
    return first, jnp.zeros_like(first), jnp.where(constant, 0, var)


def from_differences(pivot: jax.Array, first: jax.Array, square: jax.Array) -> MeanAndVariance:
    """Returns mean and variance of x, given the means of `x - pivot` and of its square."""
    rest = prevent_fma(first)
    var = jnp.maximum(square - first * first, 0)
    rounded, lo = _two_sum(pivot, rest)
    # A variance that is no more than the rounding error of the pivot is that of a constant channel, whose value is
    # the mean.
    constant = var <= 64 * float(np.finfo(var.dtype).eps) * (rest * rest)
    return rounded, jnp.where(constant, 0, lo), jnp.where(constant, 0, var)


def _sample(x: jax.Array, reduced: tuple[int, ...]) -> jax.Array:
    """Returns about one in `_SAMPLE_STEP` of the values that a statistic is taken over, at regular places.

    If possible it takes whole first and last axes: along the first there may be few examples, or they may be
    sharded; along the last, values are read together. Axes that explicit mesh axes shard are taken whole always,
    since a slice of them has no type.
    """
    unsharded = [a for a in reduced if jax.typeof(x).sharding.spec[a] is None]
    axes = [a for a in unsharded if 0 < a < x.ndim - 1] or unsharded
    starts, stops, steps = [0] * x.ndim, list(x.shape), [1] * x.ndim
    left = _SAMPLE_STEP
    for k, a in enumerate(axes):
        step = max(1, min(x.shape[a], round(left ** (1 / (len(axes) - k)))))
        left = max(1, left // step)
        if a == x.ndim - 1:
            size = x.shape[a] // step
            starts[a] = (x.shape[a] - size) // 2
            stops[a] = starts[a] + size
        else:
            starts[a], steps[a] = min(step // 2, x.shape[a]), step
    return jax.lax.slice(x, starts, stops, steps)
