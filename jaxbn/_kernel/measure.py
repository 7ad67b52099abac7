"""Count, mean and variance of x, and their derivative. Results have the rank of x, with size 1 along reduced axes.

docs/platforms.md has the reasons for the forms.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxbn._kernel import inputs
from jaxbn._kernel.linear import keep_finite, prepare, products_and_sums
from jaxbn._kernel.moments import MeanAndVariance, Moments, from_differences, is_rounding_error, two_sum, variance
from jaxbn._kernel.platforms import by_platform
from jaxbn._kernel.reduction import Count, Reduction, as_float, count_values
from jaxbn._kernel.xla import materialize, prevent_fma, separate_copy, sum_over

# The `checkpoint_name` of moments, which reverse mode saves; policies of `jax.checkpoint` may use it too.
MOMENTS_NAME = "jaxbn.moments"
# The pivot is the mean of a sample: one value in 64,
_SAMPLE_STEP = 64
# but at least 16 values, if x has so many,
_SMALLEST_SAMPLE = 16
# and all values of an x that has no more than this.
_SMALL = 2**12
# Count, mean, mean_lo, and the sum of squared differences from the mean.
_Accumulator = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def measure(x: jax.Array, mask: jax.Array | None, reduction: Reduction) -> Moments:
    """Returns the moments of `x`.

    Args:
      x: of floating point.
      mask: of the rank of `x`, or None.
      reduction: what is measured. With channel groups each channel gets the moments of its group.
    """
    axes = reduction.axes
    if reduction.about_zero:
        values = prepare(x, mask)
        (var,), count = reduction.means(x, mask, squares=_sum(values * values, mask, axes))
        mean = mean_lo = jnp.zeros_like(var)
    elif reduction.is_local and has_forms(x, axes):
        count = reduction.count(x) if mask is None else count_values(x, mask, axes)
        mean, mean_lo, var = _by_platform(x, *(() if mask is None else (mask,)), axes=axes)
    else:
        (mean, mean_lo, var), count = _with_pivot(x, mask, reduction)
    if not reduction.about_zero:
        mean, mean_lo, var = materialize(mean, mean_lo, var)
    counts = jnp.asarray(as_float(count, var.dtype), var.dtype)
    return Moments(mean, var, jnp.broadcast_to(counts, (1,) * x.ndim) if mask is None else counts, mean_lo)


def has_forms(x: jax.Array, axes: tuple[int, ...]) -> bool:
    """Whether platforms measure `x` in forms of their own."""
    return x.dtype == jnp.bfloat16 or inputs.are_last(x.ndim, axes)


def _with_pivot(
    x: jax.Array, mask: jax.Array | None, reduction: Reduction, zero_pivot: bool | None = None
) -> tuple[MeanAndVariance, Count]:
    """Measures by sums of differences from a pivot.

    The pivot is the mean of a sample, so that the two sums do not depend on each other, and one loop computes both.
    For bfloat16 the pivot is 0: rounding to bfloat16 changed the variance by more than sums about zero do.
    """
    values, axes = prepare(x, mask), reduction.axes
    if zero_pivot is None:
        zero_pivot = x.dtype == jnp.bfloat16
    if zero_pivot:
        squares = _sum(values * values, mask, axes)
        (first, square), count = reduction.means(x, mask, _sum(values, mask, axes), squares=squares)
        return _from_zero_pivot(first, square), count
    # A mask may hide the whole sample.
    sample = values if mask is not None else take_sample(values, axes)
    (mean,), number = reduction.means(sample, mask, _sum(sample, mask, axes))
    pivot = prevent_fma(mean)
    d, again = values - pivot, values - separate_copy(pivot)
    total, squares = _sum(d, mask, axes), _sum(again * again, mask, axes)
    (first, square), count = reduction.means(x, mask, total, squares=squares, count=number)
    return from_differences(pivot, first, square), count


def _sum(v: jax.Array, mask: jax.Array | None, axes: tuple[int, ...]) -> jax.Array:
    return jnp.expand_dims(sum_over(v if mask is None else jnp.where(mask, v, 0), axes), axes)


def _from_zero_pivot(first: jax.Array, square: jax.Array) -> MeanAndVariance:
    """Returns mean and variance of bfloat16 values, given the means of x and of its square."""
    var = variance(first, square)
    constant = is_rounding_error(var, first, 4)
    # The mean of a constant channel is its value, which bfloat16 represents.
    rounded, zero = jax.lax.reduce_precision(first, exponent_bits=8, mantissa_bits=7), jnp.zeros_like(first)
    return jax.lax.select(constant, rounded, first), zero, jax.lax.select(constant, zero, var + (first - first))


def _around_sample(x: jax.Array, *masks: jax.Array, axes: tuple[int, ...], options: None) -> MeanAndVariance:
    return _with_pivot(x, masks[0] if masks else None, Reduction(axes), zero_pivot=False)[0]


def _on_gpu(x: jax.Array, *masks: jax.Array, axes: tuple[int, ...], options: None) -> MeanAndVariance:
    return _with_pivot(x, masks[0] if masks else None, Reduction(axes))[0]


def _on_tpu(x: jax.Array, *masks: jax.Array, axes: tuple[int, ...], options: None) -> MeanAndVariance:
    if x.dtype == jnp.bfloat16:
        return _on_gpu(x, *masks, axes=axes, options=options)
    mean, rest, var = merge_values(x, masks[0] if masks else None, axes)
    return *two_sum(*(jnp.expand_dims(v, axes) for v in (mean, rest))), jnp.expand_dims(var, axes)


_by_platform = by_platform({"default": _around_sample, "cuda": _on_gpu, "rocm": _on_gpu, "tpu": _on_tpu})


def merge_values(x: jax.Array, mask: jax.Array | None, axes: tuple[int, ...]) -> MeanAndVariance:
    """Returns the mean, in two parts, and the variance, without the reduced axes.

    On TPUs a sample along a row would read all of it. One reduction whose operation is Chan's merge of moments, where
    each value of x is a set of its own, reads it once.
    """

    def merge(a: _Accumulator, b: _Accumulator) -> _Accumulator:
        (n, m, lo, squares), (other_n, other_m, other_lo, other_squares) = a, b
        total = n + other_n
        # Where nothing counts, mean and squares are 0.
        weight = other_n / jnp.maximum(total, 1)
        d = (other_m - m) + (other_lo - lo)
        change = d * weight
        merged = m + change
        return total, merged, lo + (change - (merged - m)), squares + other_squares + d * change * n

    values = prepare(x, mask)
    zero = jnp.zeros((), values.dtype)
    ones, zeros = jnp.ones_like(values), jnp.broadcast_to(zero, values.shape)
    if mask is not None:
        ones, values = jnp.where(mask, ones, 0), jnp.where(mask, values, 0)
    n, m, lo, squares = jax.lax.reduce((ones, values, zeros, zeros), (zero,) * 4, merge, axes)
    return m, lo, squares / (n if mask is None else jnp.maximum(n, 1))


def take_sample(x: jax.Array, reduced: tuple[int, ...]) -> jax.Array:
    """Returns about one in `_SAMPLE_STEP` of the values that a statistic is taken over, at regular places.

    If possible it takes whole first and last axes: along the first there may be few examples, or they may be
    sharded; along the last, values are read together. Axes that explicit mesh axes shard are taken whole always,
    since a slice of them has no type.
    """
    if isinstance(x.size, int) and x.size <= _SMALL:
        return x
    unsharded = [a for a in reduced if jax.typeof(x).sharding.spec[a] is None]
    axes = [a for a in unsharded if 0 < a < x.ndim - 1] or unsharded
    starts, stops, steps = [0] * x.ndim, list(x.shape), [1] * x.ndim
    left = _SAMPLE_STEP
    values = math.prod(inputs.sizes(x, reduced))
    if isinstance(values, int):
        left = max(1, min(left, values // _SMALLEST_SAMPLE))
    for k, a in enumerate(axes):
        step, size = round(left ** (1 / (len(axes) - k))), x.shape[a]
        if not isinstance(size, int):
            # Of a symbolic size nothing is known but that it is at least 1.
            steps[a] = step
        else:
            step = max(1, min(size, step))
            if a == x.ndim - 1:
                starts[a] = (size - size // step) // 2
                stops[a] = starts[a] + size // step
            else:
                starts[a], steps[a] = min(step // 2, size), step
        left = max(1, left // step)
    return jax.lax.slice(x, starts, stops, steps)


@measure.defjvp
def _measure_jvp(
    reduction: Reduction,
    primals: tuple[jax.Array, jax.Array | None],
    tangents: tuple[jax.Array, object],
) -> tuple[Moments, Moments]:
    x, mask = primals
    m = measure_to_keep(x, mask, reduction)
    return m, moments_tangent(x, mask, m, as_statistics(x, mask, tangents[0]), reduction)


def measure_to_keep(x: jax.Array, mask: jax.Array | None, reduction: Reduction) -> Moments:
    """Returns the moments of `x` under the name by which reverse mode keeps them."""
    return measure(x, mask, reduction).map(lambda v: checkpoint_name(v, MOMENTS_NAME))


def as_statistics(x: jax.Array, mask: jax.Array | None, dx: jax.Array) -> jax.Array:
    """Returns the tangent of `prepare(x, mask)`."""
    return keep_finite(x, mask, dx.astype(inputs.statistics_dtype(x.dtype)))


def moments_tangent(x: jax.Array, mask: jax.Array | None, m: Moments, dx: jax.Array, reduction: Reduction) -> Moments:
    """Returns the tangent of the moments `m` of x: `dmean = mean(dx)` and `dvar = 2 * mean((x - mean) * dx)`."""
    axes, about_zero = reduction.axes, reduction.about_zero
    zero = jnp.zeros_like(m.mean)
    totals = products_and_sums(x, mask, None if about_zero else m.mean, dx, axes, only_products=about_zero)
    (product, *plain), _ = reduction.means(x, mask, *totals, count=m.count)
    if about_zero:
        return Moments(zero, 2 * product, jnp.zeros_like(m.count), zero)
    return Moments(plain[0], 2 * (product - m.mean_lo * plain[0]), jnp.zeros_like(m.count), zero)
