"""y alone, where nobody uses the moments: the shortest program. Arrays of their size have no reduced axes here."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxbn._kernel import inputs
from jaxbn._kernel.linear import prepare
from jaxbn._kernel.measure import merge_values, take_sample
from jaxbn._kernel.moments import is_rounding_error, reciprocal_root, variance
from jaxbn._kernel.platforms import by_platform
from jaxbn._kernel.reduction import ChannelGroups, Reduction, as_float
from jaxbn._kernel.xla import prevent_fma, prevent_fma_by_arithmetic, rounded_copy, sum_over
from jaxbn._versions import HAS_SUMS_IN_TREES

# The longest row that fits into one block of a GPU.
_LONGEST_CHAINED_ROW = 2**14
# XLA's CPU compiler takes arithmetic on at least so many statistics into one kernel with their sums.
_MANY = 4096
# Equal values are a few units in the last place from the pivot, and the sum of so many such differences is exact.
_EXACTLY_SUMMED = 2**17
# x - mean, and var + eps.
_CentredAndVariance = tuple[jax.Array, jax.Array]


def normalize_forward(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    reduction: Reduction,
    feature: tuple[int, ...],
    eps: float,
) -> jax.Array:
    """Returns `(x - mean) / sqrt(var + eps) * scale + bias`, scale and bias along the `feature` axes."""
    groups = reduction.channel_groups
    # From the last axis, since jax.vmap adds a first one.
    place = None if groups is None else (groups.axis - x.ndim, groups.number)
    y, v = _by_platform(x, axes=reduction.axes, options=(eps, place))
    y = y * _Statistics(x, reduction.axes, place).spread(reciprocal_root(v, eps))
    scale, bias = (
        None if p is None else jax.lax.broadcast_in_dim(p.astype(y.dtype), x.shape, feature) for p in (scale, bias)
    )
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


class _Statistics:
    """Which values of x share a statistic."""

    def __init__(self, x: jax.Array, axes: tuple[int, ...], place: tuple[int, int] | None):
        self.axes, self.values = axes, prepare(x, None)
        self.are_rows = inputs.are_last(x.ndim, axes)
        self._kept = inputs.other_axes(x.ndim, axes)
        self._groups = None if place is None else ChannelGroups(place[0] + x.ndim, place[1])
        count = Reduction(axes, channel_groups=self._groups).count(x)
        number: int = math.prod(inputs.sizes(x, self._kept))
        self.are_many = isinstance(number, int) and number >= _MANY and place is None
        self._count = as_float(count, self.values.dtype)
        self._divisor: jax.Array | None = None
        self._known_count = count if isinstance(count, int) else None

    def has_at_most(self, number: int) -> bool:
        return self._known_count is not None and self._known_count <= number

    def means(self, *arrays: jax.Array) -> list[jax.Array]:
        # Functions of jax.lax, here and in measure.py: jax2onnx replaces those of jax.numpy while it traces, and
        # jax.jit keeps what was traced.
        totals = [sum_over(v, self.axes) for v in arrays]
        if self._groups is not None:
            place = self._kept.index(self._groups.axis)
            totals = [jax.lax.reduce_sum(self._groups.cut(total, place), (place + 1,)) for total in totals]
        if self._divisor is None:
            self._divisor = jnp.full_like(totals[0], self._count)
        return [total / self._divisor for total in totals]

    def pivot(self) -> jax.Array:
        """Returns the mean of a sample."""
        sample, axes = take_sample(self.values, self.axes), self.axes
        if self._groups is not None:
            channels = self._groups.axis
            sample = self._groups.cut(sample, channels)
            axes = (*(a + (a > channels) for a in axes), channels + 1)
        total, count = sum_over(sample, axes), Reduction(axes).count(sample)
        mean = total / as_float(count, total.dtype)
        # A product with a power of two is exact, in a fused multiply-add or not.
        return mean if isinstance(count, int) and count.bit_count() == 1 else prevent_fma(mean)

    def of_channels(self, v: jax.Array) -> jax.Array:
        """Returns the statistics of groups once for each of their channels."""
        if self._groups is None:
            return v
        place, shape = self._kept.index(self._groups.axis), inputs.sizes(self.values, self._kept)
        cut = self._groups.cut_shape(shape, place)
        return jax.lax.broadcast_in_dim(v, cut, inputs.other_axes(len(cut), (place + 1,))).reshape(shape)

    def over_x(self, v: jax.Array) -> jax.Array:
        return jax.lax.broadcast_in_dim(v, self.values.shape, self._kept)

    def spread(self, v: jax.Array) -> jax.Array:
        """Returns statistics for each value of x."""
        return self.over_x(self.of_channels(v))

    def zero_if_equal(self, v: jax.Array, var: jax.Array, first: jax.Array) -> jax.Array:
        """Returns `v`; infinity for equal values whose mean may be rounded, so that y is 0 there."""
        if self.has_at_most(_EXACTLY_SUMMED):
            return v
        return jax.lax.select(is_rounding_error(var, first, 64), jnp.full_like(var, jnp.inf), v)


def _around_mean(s: _Statistics, eps: float) -> _CentredAndVariance:
    """With a second sum around the mean, which is exact and costs nothing where each sum is a loop of its own.

    Each use of the pivot has a copy, so that XLA's CPU compiler makes no array of the size of x that two uses share.
    """
    pivot = s.of_channels(s.pivot())
    copy = rounded_copy(pivot)
    (first,) = s.means(s.values - s.over_x(copy))
    again = s.values - s.over_x(rounded_copy(copy)) - s.spread(first)
    (var,) = s.means(again * again)
    return s.values - s.over_x(pivot) - s.spread(prevent_fma(first)), s.zero_if_equal(var + eps, var, first)


def _around_sample(s: _Statistics, eps: float) -> _CentredAndVariance:
    """With two sums around the mean of a sample, which one loop computes."""
    d = s.values - s.spread(s.pivot())
    first, square = s.means(d, d * d)
    var = variance(first, square)
    least = jnp.full_like(var, eps)
    return d - s.spread(prevent_fma(first)), s.zero_if_equal(jax.lax.max(var + least, least), var, first)


def _with_zero_pivot(s: _Statistics, eps: float) -> _CentredAndVariance:
    """For bfloat16, whose rounding changed the variance by more than sums about zero do."""
    first, square = s.means(s.values, s.values * s.values)
    var = variance(first, square)
    v = jax.lax.select(is_rounding_error(var, first, 4), jnp.full_like(var, jnp.inf), var + eps)
    return s.values - s.spread(first), v


def _by_chained_sums(
    s: _Statistics, eps: float, rounded: Callable[[jax.Array], jax.Array] = prevent_fma
) -> _CentredAndVariance:
    """A chain of sums, each of which needs the one before: some compilers make it, and what uses it, one kernel."""
    d = s.values - s.spread(rounded(*s.means(s.values)))
    d = d - s.spread(rounded(*s.means(d)))
    return d, s.means(d * d)[0] + eps


# eps; and the axis of the groups of channels, from the end, with their number.
_Options = tuple[float, tuple[int, int] | None]


def _on_cpu(x: jax.Array, *, axes: tuple[int, ...], options: _Options) -> _CentredAndVariance:
    s, eps = _Statistics(x, axes, options[1]), options[0]
    if HAS_SUMS_IN_TREES and s.are_many and s.has_at_most(_LONGEST_CHAINED_ROW):
        return _by_chained_sums(s, eps, prevent_fma_by_arithmetic)
    return _around_mean(s, eps)


def _on_gpu(x: jax.Array, *, axes: tuple[int, ...], options: _Options) -> _CentredAndVariance:
    s, eps = _Statistics(x, axes, options[1]), options[0]
    if s.are_rows and s.has_at_most(_LONGEST_CHAINED_ROW):
        return _by_chained_sums(s, eps)
    return _with_zero_pivot(s, eps) if x.dtype == jnp.bfloat16 else _around_sample(s, eps)


def _on_tpu(x: jax.Array, *, axes: tuple[int, ...], options: _Options) -> _CentredAndVariance:
    s, eps = _Statistics(x, axes, options[1]), options[0]
    if s.are_rows and x.dtype != jnp.bfloat16:
        mean, rest, var = merge_values(x, None, axes)
        return s.values - s.over_x(mean) - s.over_x(rest), var + eps
    return _with_zero_pivot(s, eps) if x.dtype == jnp.bfloat16 else _around_sample(s, eps)


_by_platform = by_platform({"default": _on_cpu, "cuda": _on_gpu, "rocm": _on_gpu, "tpu": _on_tpu})
