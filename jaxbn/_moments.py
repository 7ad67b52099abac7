"""Moments: the one statistic of the library. Measured here, merged here, differentiated here."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxbn import _axes
from jaxbn._across import Across, AxisName, Groups, find_across
from jaxbn._compiler import once, settle, unshared

_SAVED = "jaxbn.moments"
# A mean within so many standard deviations of zero needs no second number: its rounding is lost in that of y.
_NEAR = 2

_Function = TypeVar("_Function", bound=Callable[..., Any])


def keep_only_moments(function: _Function) -> _Function:
    """Lets reverse mode keep the arguments of `function` and the moments measured in it, and no more."""
    policy = jax.checkpoint_policies.save_only_these_names(_SAVED)
    return cast(_Function, jax.checkpoint(function, policy=policy, prevent_cse=False))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and variance of a set of values, and how many values they are.

    Any two merge into those of the union (Chan, Golub & LeVeque 1979), so a slice of the data, a
    device, a virtual batch and a whole data set are described by the same thing.

    Attributes:
      mean: the mean, rounded; float32 or float64, shape [C].
      var: the biased variance, `sum((x - mean)**2) / count`; shape [C].
      count: the number of values per channel; floating point, shape [C].
      mean_lo: what rounding took from the mean: `mean + mean_lo` is the mean to about twice the
        precision, which data with a mean far from zero need; shape [C].

    Example:
      >>> import jax.numpy as jnp, jaxbn
      >>> x = jnp.arange(12.0).reshape(6, 2)
      >>> whole = jaxbn.moments(x)
      >>> parts = jaxbn.moments(x[:1]).merge(jaxbn.moments(x[1:]))
      >>> whole.mean.tolist(), parts.mean.tolist(), parts.count.tolist()
      ([5.0, 6.0], [5.0, 6.0], [6.0, 6.0])
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array
    mean_lo: jax.Array | float = 0.0

    def merge(self, *others: Moments) -> Moments:
        """Returns the moments of the union of disjoint sets: these values and those of `others`.

        Formula: with weights `w_i = count_i / sum(count)`, `mean = sum(w_i * mean_i)` and
        `var = sum(w_i * (var_i + (mean_i - mean)**2))`. A set of no values changes nothing.

        Raises:
          ValueError: the shapes differ.
          TypeError: one of `others` is not a `Moments`.

        Source: Chan, Golub & LeVeque (1979), Updating formulae and a pairwise algorithm for
        computing sample variances.

        Example:
          >>> import jax.numpy as jnp, jaxbn
          >>> a, b = jaxbn.moments(jnp.zeros((1, 1))), jaxbn.moments(jnp.ones((3, 1)))
          >>> a.merge(b).mean.tolist(), a.merge(b).var.tolist()
          ([0.75], [0.1875])
        """
        for other in others:
            if not isinstance(other, Moments):
                raise TypeError(f"merge: expected jaxbn.Moments, got {type(other).__name__}")
            if jnp.shape(other.mean) != jnp.shape(self.mean):
                raise ValueError(
                    f"merge: expected moments of shape {jnp.shape(self.mean)}, got {jnp.shape(other.mean)}; "
                    "only sets with the same channels have a union"
                )
        parts = [broadcast_fields(m) for m in (self, *others)]
        stacked: Moments = jax.tree.map(lambda *fields: jnp.stack(fields), *parts)
        return stacked.merge_axis(0)

    def merge_axis(self, axis: int = 0) -> Moments:
        """Returns the moments of the union of the sets stacked along `axis`; see `merge`.

        This is what `jax.vmap`, `jax.lax.scan` or an all-gather over `moments` leaves to be done.

        Example:
          >>> import jax, jax.numpy as jnp, jaxbn
          >>> x = jnp.arange(12.0).reshape(3, 2, 2)
          >>> jax.vmap(jaxbn.moments)(x).merge_axis(0).mean.tolist()
          [5.0, 6.0]
        """
        parts = broadcast_fields(self)
        total = jnp.sum(parts.count, axis, keepdims=True)
        weight = parts.count / jnp.maximum(total, 1)

        def average(v: jax.Array) -> jax.Array:
            return jnp.sum(weight * jnp.where(parts.count > 0, v, 0), axis, keepdims=True)

        return _merge(parts, average, total).squeeze(axis)

    def squeeze(self, axis: int | tuple[int, ...]) -> Moments:
        """Returns the moments without `axis`, along which there is one set only."""
        return broadcast_fields(self).map(lambda v: jnp.squeeze(v, axis))

    def map(self, function: Callable[[jax.Array], jax.Array]) -> Moments:
        """Returns moments with `function` applied to each field."""
        return cast(Moments, jax.tree.map(function, self))


@dataclasses.dataclass(frozen=True)
class ChannelGroups:
    """Neighbouring channels that share a statistic: `number` groups along `axis`."""

    axis: int
    number: int

    def merge(self, m: Moments, equal_counts: bool) -> Moments:
        """Moments of the groups from those of channels."""
        parts, axis = m.map(self.cut), self.axis + 1
        each = parts.count.shape[axis]
        if not (equal_counts and each):
            return parts.merge_axis(axis)

        def average(v: jax.Array) -> jax.Array:
            return jnp.sum(v, axis, keepdims=True) / each

        return _merge(parts, average, jax.lax.slice_in_dim(parts.count, 0, 1, axis=axis) * each).squeeze(axis)

    def sum(self, v: jax.Array) -> jax.Array:
        return jnp.sum(self.cut(v), self.axis + 1)

    def spread(self, m: Moments, channels: int) -> Moments:
        """Moments of the groups, for each of their channels."""
        return m.map(lambda v: jnp.repeat(v, channels // self.number, self.axis))

    def cut(self, v: jax.Array) -> jax.Array:
        """`v` with the groups along one axis, and the channels of a group along the next."""
        channels = v.shape[self.axis]
        number = self.number if channels > 1 else 1
        return v.reshape(*v.shape[: self.axis], number, channels // number, *v.shape[self.axis + 1 :])


def moments(
    x: jax.Array,
    *,
    axis: _axes.Axis = -1,
    mask: jax.Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Groups | None = None,
) -> Moments:
    """Measures mean, biased variance and count per channel, over all axes but `axis`.

    Formula: `mean = sum(x) / n`, `var = sum((x - mean)**2) / n`, n the number of values that count.
    float32 in, the result is exact to a few units in the last place of the *standard deviation*,
    wherever the mean is: the sums are taken around a pivot close to the mean.

    Args:
      x: floating-point array of any rank.
      axis: the feature axis or axes; statistics are taken over all others.
      mask: boolean, True counts; broadcastable, rank for rank, to `x` without its feature axes or
        to all of `x`. What it hides may be anything, NaN included.
      axis_name, axis_index_groups: as in `batch_norm_train`: moments of the union over devices.

    Returns:
      `Moments` with fields of shape [C] (the sizes of the feature axes, in ascending order of
      axis); float64 for float64 input, float32 for all other. Where nothing counts all are 0.

    Raises:
      TypeError: `x` is not floating point, or `mask` not boolean.
      ValueError: `axis` is out of range or named twice, or `mask` does not broadcast.

    Source: Chan, Golub & LeVeque (1983), Algorithms for computing the sample variance (shifted data).

    Example:
      >>> import jax.numpy as jnp, jaxbn
      >>> x = jnp.array([[1.0, 10.0], [3.0, 10.0]]) + 1e6
      >>> jaxbn.moments(x).var.tolist()
      [1.0, 0.0]
    """
    x = _axes.as_float_array(x)
    reduced = _axes.other_axes(x.ndim, _axes.resolve_axes(x.ndim, axis))
    expanded = None if mask is None else _axes.expand_mask(mask, x, reduced)
    across = find_across(axis_name, axis_index_groups)
    return cast(Moments, _moments(x, expanded, reduced=reduced, across=across))


@functools.partial(jax.jit, static_argnames=("reduced", "across"), inline=True)
def _moments(x: jax.Array, mask: jax.Array | None, *, reduced: tuple[int, ...], across: Across | None) -> Moments:
    @keep_only_moments
    def measured(x: jax.Array) -> Moments:
        return measure(prepare(x, mask), mask, reduced, across)

    return measured(x).squeeze(reduced)


def prepare(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Returns `x` in the dtype of its statistics, with nothing under the mask that could spread."""
    x = x.astype(_axes.statistics_dtype(x.dtype))
    return x if mask is None else jnp.where(mask | jnp.isfinite(x), x, 0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4, 5))
def measure(
    x: jax.Array,
    mask: jax.Array | None,
    reduced: tuple[int, ...],
    across: Across | None,
    about_zero: bool = False,
    groups: ChannelGroups | None = None,
) -> Moments:
    """Moments of a prepared `x`, of the rank of `x` with size 1 on the reduced axes; merged across devices.

    With `about_zero` the mean is taken to be zero, so that the variance is the mean square. With `groups`
    moments are merged across channels too, and have as many as there are groups.
    """
    if about_zero:
        square = _mean(x * x, mask, reduced)
        zero = jnp.zeros_like(square)
        local = Moments(zero, square, _count(x, mask, reduced) + zero, zero)
    else:
        local = _measure_around_pivot(x, mask, reduced)
    if groups is not None:
        local = groups.merge(local, equal_counts=mask is None)
    if across is None:
        return local
    # All fields in one array: one collective.
    gathered, counts = across.gather(jnp.stack([local.mean, local.var, local.count, local.mean_lo]))
    mean, var, count, mean_lo = jnp.moveaxis(gathered, 1, 0)
    count = jnp.where(counts.reshape(-1, *(1,) * x.ndim), count, 0)
    return Moments(mean, var, count, mean_lo).merge_axis(0)


@measure.defjvp
def _measure_jvp(
    reduced: tuple[int, ...],
    across: Across | None,
    about_zero: bool,
    groups: ChannelGroups | None,
    primals: tuple[jax.Array, jax.Array | None],
    tangents: tuple[jax.Array, object],
) -> tuple[Moments, Moments]:
    x, mask = primals
    dx, _ = tangents
    m = measure(x, mask, reduced, across, about_zero, groups).map(lambda v: checkpoint_name(v, _SAVED))
    zero = jnp.zeros_like(m.count)
    # What is known without looking at x need not be kept.
    if about_zero:
        m = dataclasses.replace(m, mean=zero, mean_lo=zero)
    if mask is None and across is None:
        each = 1 if groups is None else x.shape[groups.axis] // groups.number
        m = dataclasses.replace(m, count=_count(x, None, reduced) * each + zero)
    mean = m.mean if groups is None else groups.spread(m, x.shape[groups.axis]).mean
    sums = [_sum((x - unshared(mean, 1)) * dx, mask, reduced)]
    if not about_zero:
        sums.append(_sum(dx, mask, reduced))
    if groups is not None:
        sums = [groups.sum(total) for total in sums]
    if across is not None:
        sums = list(across.sum(jnp.stack(sums)))
    # Transposed, these quotients are what the loop over x takes.
    means = [once(total / jnp.maximum(m.count, 1), m.var) for total in sums]
    if about_zero:
        return m, Moments(zero, 2 * means[0], zero, zero)
    return m, Moments(means[1], 2 * (means[0] - m.mean_lo * means[1]), zero, zero)


def _measure_around_pivot(x: jax.Array, mask: jax.Array | None, reduced: tuple[int, ...]) -> Moments:
    """Sums of differences from a mean that is rounded, and so only close to the mean, whatever the data.

    What they say is exact to a few units in the last place of the standard deviation.
    """
    pivot = settle(_mean(x, mask, reduced))
    d = x - unshared(pivot, 1)
    square = _mean(d * d, mask, reduced)
    count = _count(x, mask, reduced) + jnp.zeros_like(pivot)

    def refined() -> Moments:
        return _from_differences(pivot, _mean(x - unshared(pivot, 2), mask, reduced), square, count)

    def near() -> Moments:
        return Moments(pivot, square, count, jnp.zeros_like(pivot))

    def refined_if_far() -> Moments:
        close = (pivot == 0) | (pivot * pivot < _NEAR**2 * square)
        return cast(Moments, jax.lax.cond(jnp.all(close), near, refined))

    # On other platforms sums of the same values are one loop, and a branch would wait for its condition.
    return cast(Moments, jax.lax.platform_dependent(cpu=refined_if_far, default=refined))


def _count(x: jax.Array, mask: jax.Array | None, reduced: tuple[int, ...]) -> jax.Array:
    if mask is None:
        return jnp.full((1,) * x.ndim, math.prod(_axes.sizes(x, reduced)), x.dtype)
    entries, each = count_entries(x, mask, reduced)
    return entries.astype(x.dtype) * each


def count_entries(x: jax.Array, mask: jax.Array, reduced: tuple[int, ...]) -> tuple[jax.Array, int]:
    """Returns how many entries of the mask count, int32, and how many values of `x` each of them stands for."""
    each = math.prod(_axes.sizes(x, tuple(a for a in reduced if mask.shape[a] == 1)))
    return jnp.sum(mask, reduced, dtype=jnp.int32, keepdims=True), each


def _sum(x: jax.Array, mask: jax.Array | None, reduced: tuple[int, ...]) -> jax.Array:
    return jnp.sum(x if mask is None else jnp.where(mask, x, 0), reduced, keepdims=True)


def _mean(x: jax.Array, mask: jax.Array | None, reduced: tuple[int, ...]) -> jax.Array:
    return _sum(x, mask, reduced) / jnp.maximum(_count(x, mask, reduced), 1)


def _merge(parts: Moments, average: Callable[[jax.Array], jax.Array], total: jax.Array) -> Moments:
    pivot = settle(average(parts.mean))
    shift = (parts.mean - pivot) + parts.mean_lo
    return _from_differences(pivot, average(shift), average(parts.var + shift * shift), total)


def _from_differences(pivot: jax.Array, mean: jax.Array, square: jax.Array, count: jax.Array) -> Moments:
    """Moments of x from the means of `x - pivot` and of its square."""
    rest = settle(mean)
    var = jnp.maximum(square - rest * rest, 0)
    # The rounded sum and what rounding took (Knuth 1969).
    total = pivot + rest
    part = total - pivot
    lo = (pivot - (total - part)) + (rest - part)
    # Where nothing but rounding is left of the variance the channel is constant, and its value the mean.
    constant = var <= 64 * float(np.finfo(var.dtype).eps) * (rest * rest)
    return Moments(total, jnp.where(constant, 0, var), count, jnp.where(constant, 0, lo))


def broadcast_fields(m: Moments) -> Moments:
    """Returns moments whose fields all have the shape and dtype of the mean, or raises."""
    mean = jnp.asarray(m.mean)

    def expand(name: str, value: jax.Array | float) -> jax.Array:
        array = jnp.asarray(value, mean.dtype)
        try:
            return jnp.broadcast_to(array, mean.shape)
        except ValueError:
            raise ValueError(
                f"moments: expected {name} of shape {mean.shape}, that of mean, or one that broadcasts to it, "
                f"got shape {array.shape}"
            ) from None

    return Moments(**{f.name: expand(f.name, getattr(m, f.name)) for f in dataclasses.fields(m)})
