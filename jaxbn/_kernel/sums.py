"""The sums that moments are made of, in the form that each platform's compiler makes the most of.

Arrays have the rank of x, with size 1 on the reduced axes. docs/design.md has the reasons and what was measured.
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
from jaxbn._kernel.xla import settle, unshared

# A mean within so many standard deviations of zero needs no second number: its rounding is lost in that of y.
_NEAR = 2
# One in so many values makes the pivot of float32 and float16 where x is read once.
_SAMPLED = 64
# Rows of at most so many values fit into one block of a GPU.
_CHAINED = 2**14
# The mean, what rounding took from it, and the variance.
Measured = tuple[jax.Array, jax.Array, jax.Array]
Form = Callable[[jax.Array, jax.Array | None, tuple[int, ...]], Measured]
# Count, mean, what rounding took from it, and the sum of squares around it.
Sums = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def count(x: jax.Array, mask: jax.Array | None, reduced: tuple[int, ...]) -> jax.Array:
    if mask is None:
        return jnp.full((1,) * x.ndim, math.prod(inputs.sizes(x, reduced)), x.dtype)
    entries, each = count_entries(x, mask, reduced)
    return entries.astype(x.dtype) * each


def count_entries(x: jax.Array, mask: jax.Array, reduced: tuple[int, ...]) -> tuple[jax.Array, int]:
    """Returns how many entries of the mask count, int32, and how many values of `x` each of them stands for."""
    each = math.prod(inputs.sizes(x, tuple(a for a in reduced if mask.shape[a] == 1)))
    return jnp.sum(mask, reduced, dtype=jnp.int32, keepdims=True), each


def total(x: jax.Array, mask: jax.Array | None, reduced: tuple[int, ...]) -> jax.Array:
    return jnp.sum(x if mask is None else jnp.where(mask, x, 0), reduced, keepdims=True)


def mean(x: jax.Array, mask: jax.Array | None, reduced: tuple[int, ...]) -> jax.Array:
    return total(x, mask, reduced) / jnp.maximum(count(x, mask, reduced), 1)


def mean_and_variance(
    x: jax.Array, mask: jax.Array | None, reduced: tuple[int, ...], stored: np.dtype, only_y: bool
) -> Measured:
    """Mean and biased variance of `x`, which came in the dtype `stored`.

    With `only_y` they are for normalizing `x` alone, and the pair may be one whose first number is not the
    rounded mean.
    """
    rows = inputs.are_last(x.ndim, reduced)
    if stored == jnp.bfloat16:
        forms: dict[str, Form] = {"cpu": _around_mean, "default": _around_zero}
    else:
        forms = {"cpu": _around_mean, "tpu": _merged if rows else _around_sample, "default": _around_sample}
    if rows and only_y and mask is None and math.prod(inputs.sizes(x, reduced)) <= _CHAINED:
        forms |= {"cuda": _chained, "rocm": _chained}
    chosen = {platform: functools.partial(form, x, mask, reduced) for platform, form in forms.items()}
    return cast(Measured, jax.lax.platform_dependent(**chosen))


def _around_mean(x: jax.Array, mask: jax.Array | None, reduced: tuple[int, ...]) -> Measured:
    """CPU reads x for each sum anyway, so the mean as a pivot costs nothing, and a branch saves what it skips."""
    pivot = settle(mean(x, mask, reduced))
    d = x - unshared(pivot, 1)
    square = mean(d * d, mask, reduced)

    def near() -> Measured:
        return pivot, jnp.zeros_like(pivot), square

    def far() -> Measured:
        return from_differences(pivot, mean(x - unshared(pivot, 2), mask, reduced), square)

    close = (pivot == 0) | (pivot * pivot < _NEAR**2 * square)
    return cast(Measured, jax.lax.cond(jnp.all(close), near, far))


def _around_sample(x: jax.Array, mask: jax.Array | None, reduced: tuple[int, ...]) -> Measured:
    """Sums that do not wait for one another are one loop, which reads x once."""
    pivot = settle(mean(x if mask is not None else _sample(x, reduced), mask, reduced))
    d = x - pivot
    return from_differences(pivot, mean(d, mask, reduced), mean(d * d, mask, reduced))


def _merged(x: jax.Array, mask: jax.Array | None, reduced: tuple[int, ...]) -> Measured:
    """Chan's merge as the operation of one reduction, of which each value is a set of its own."""

    def merge(a: Sums, b: Sums) -> Sums:
        (n, m, lo, squares), (other_n, other_m, other_lo, other_squares) = a, b
        together = n + other_n
        share = other_n / jnp.maximum(together, 1)
        d = (other_m - m) + (other_lo - lo)
        moved = m + d * share
        return together, moved, lo + (d * share - (moved - m)), squares + other_squares + d * d * (n * share)

    ones, zeros = jnp.ones_like(x), jnp.zeros_like(x)
    if mask is not None:
        ones, x = jnp.where(mask, ones, 0), jnp.where(mask, x, 0)
    zero = jnp.zeros((), x.dtype)
    n, m, lo, squares = jax.lax.reduce((ones, x, zeros, zeros), (zero,) * 4, merge, reduced)
    n, m, lo, squares = (jnp.expand_dims(v, reduced) for v in (n, m, lo, squares))
    return *_rounded_sum(m, lo), squares / jnp.maximum(n, 1)


def _chained(x: jax.Array, mask: jax.Array | None, reduced: tuple[int, ...]) -> Measured:
    """Sums along rows of which each needs the one before: with what is made of them, GPUs have one loop for all."""
    pivot = settle(mean(x, mask, reduced))
    d = x - pivot
    rest = settle(mean(d, mask, reduced))
    return pivot, rest, mean((d - rest) ** 2, mask, reduced)


def _rounded_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sum, and what rounding took from it (Knuth 1969)."""
    whole = a + b
    part = whole - a
    return whole, (a - (whole - part)) + (b - part)


def _around_zero(x: jax.Array, mask: jax.Array | None, reduced: tuple[int, ...]) -> Measured:
    """For values of bfloat16, whose own rounding changed the variance more than these sums do."""
    first, square = mean(x, mask, reduced), mean(x * x, mask, reduced)
    var = jnp.maximum(square - first * first, 0)
    # A constant is a number of bfloat16.
    constant = var <= 4 * float(np.finfo(var.dtype).eps) * square
    first = jnp.where(constant, jax.lax.reduce_precision(first, exponent_bits=8, mantissa_bits=7), first)
    return first, jnp.zeros_like(first), jnp.where(constant, 0, var)


def from_differences(pivot: jax.Array, first: jax.Array, square: jax.Array) -> Measured:
    """Mean and variance of x from the means of `x - pivot` and of its square."""
    rest = settle(first)
    var = jnp.maximum(square - first * first, 0)
    whole, lo = _rounded_sum(pivot, rest)
    # Where nothing but rounding is left of the variance the channel is constant, and its value the mean.
    constant = var <= 64 * float(np.finfo(var.dtype).eps) * (rest * rest)
    return whole, jnp.where(constant, 0, lo), jnp.where(constant, 0, var)


def _sample(x: jax.Array, reduced: tuple[int, ...]) -> jax.Array:
    """About one of `_SAMPLED` values that a statistic is taken over, from regular places within `x`.

    Not along the first axis, along which there are few examples or many devices, nor along the last, whose
    values are read together, if there are others; and not along one that explicit mesh axes divide, where a
    slice has no type.
    """
    free = [a for a in reduced if jax.typeof(x).sharding.spec[a] is None]
    axes = [a for a in free if 0 < a < x.ndim - 1] or free
    starts, stops, steps = [0] * x.ndim, list(x.shape), [1] * x.ndim
    left = _SAMPLED
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
