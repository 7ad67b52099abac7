"""Moments (mean, variance and count): how they are measured, merged and differentiated."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxbn._kernel import inputs, sums
from jaxbn._kernel.devices import AxisName, DeviceGroups, Groups, resolve_devices
from jaxbn._kernel.xla import materialize, prevent_fma, separate_copy

# The `checkpoint_name` of moments, which reverse mode saves; policies of `jax.checkpoint` may use it too.
MOMENTS_NAME = "jaxbn.moments"

_Function = TypeVar("_Function", bound=Callable[..., Any])


def save_only_moments(function: _Function) -> _Function:
    """Returns `function`, of which reverse mode saves only the arguments and the moments measured in it."""
    policy = jax.checkpoint_policies.save_only_these_names(MOMENTS_NAME)
    return cast(_Function, jax.checkpoint(function, policy=policy, prevent_cse=False))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and variance of a set of values, and the number of values.

    The moments of any two sets merge into those of their union (Chan, Golub & LeVeque 1979). So the same class
    describes part of a batch, the batch of a device, a virtual batch and a whole data set.

    Attributes:
      mean: the mean, rounded; float32 or float64, shape [C].
      var: the biased variance, `sum((x - mean)**2) / count`; shape [C].
      count: the number of values per channel; floating point, shape [C].
      mean_lo: the rounding error of `mean`: the unevaluated sum `mean + mean_lo` has about twice the
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

        For moments that `jax.vmap`, `jax.lax.scan` or an all-gather stacked.

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
        """Returns the moments without `axis`, or several axes, of size 1."""
        return broadcast_fields(self).map(lambda v: jnp.squeeze(v, axis))

    def map(self, function: Callable[[jax.Array], jax.Array]) -> Moments:
        """Returns moments with `function` applied to each field."""
        return cast(Moments, jax.tree.map(function, self))


@dataclasses.dataclass(frozen=True)
class ChannelGroups:
    """Neighbouring channels that share statistics: `number` groups along `axis`."""

    axis: int
    number: int

    def merge(self, m: Moments, equal_counts: bool) -> Moments:
        """Returns the moments of groups, given those of channels."""
        parts, axis = m.map(self.cut), self.axis + 1
        channels = parts.count.shape[axis]
        if not (equal_counts and channels):
            return parts.merge_axis(axis)

        def average(v: jax.Array) -> jax.Array:
            return jnp.sum(v, axis, keepdims=True) / channels

        total = jax.lax.slice_in_dim(parts.count, 0, 1, axis=axis) * channels
        return _merge(parts, average, total).squeeze(axis)

    def sum(self, v: jax.Array) -> jax.Array:
        """Returns the sum of `v` over the channels of each group."""
        return jnp.sum(self.cut(v), self.axis + 1)

    def repeat(self, m: Moments, channels: int) -> Moments:
        """Returns the moments of groups once for each of `channels` channels."""
        return m.map(lambda v: jnp.repeat(v, channels // self.number, self.axis))

    def cut(self, v: jax.Array) -> jax.Array:
        """Returns `v` with the groups along one axis, and the channels of a group along the next."""
        channels = v.shape[self.axis]
        number = self.number if channels > 1 else 1
        return v.reshape(*v.shape[: self.axis], number, channels // number, *v.shape[self.axis + 1 :])


@dataclasses.dataclass(frozen=True)
class Reduction:
    """What a statistic is taken over.

    Attributes:
      axes: the reduced axes of x, in ascending order.
      devices: the devices that share statistics; None if each has its own.
      channel_groups: the channels that share statistics; None if each has its own.
      about_zero: the mean is defined as zero, so that the variance is the mean square.
    """

    axes: tuple[int, ...]
    devices: DeviceGroups | None = None
    channel_groups: ChannelGroups | None = None
    about_zero: bool = False


def moments(
    x: jax.Array,
    *,
    axis: inputs.Axis = -1,
    mask: jax.Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Groups | None = None,
) -> Moments:
    """Measures mean, biased variance and count per channel, over all axes but `axis`.

    Formula: `mean = sum(x) / n`, `var = sum((x - mean)**2) / n`, n the number of values that count.
    For float32 the result is exact to a few units in the last place of the *standard deviation*,
    however large the mean: the sums are of differences from a pivot close to the mean. On GPUs and TPUs the
    pivot is the mean of one in 64 values; if these differ from all others, the variance has a relative error of
    up to `64 * eps`. There the pivot of bfloat16 is zero: the variance is exact to `8 * eps * mean**2`, which is
    less than rounding the data to bfloat16 changed it by.

    Args:
      x: floating-point array of any rank.
      axis: the feature axis or axes; statistics are taken over all others.
      mask: boolean, True counts; broadcastable, rank for rank, to `x` without its feature axes or
        to all of `x`. What it hides may be anything, NaN included.
      axis_name, axis_index_groups: as in `batch_norm_train`: moments of the union over devices.

    Returns:
      `Moments` with fields of shape [C] (the sizes of the feature axes, in ascending order of
      axis); float64 for float64 input, float32 for all other. Where no value counts all are 0.

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
    x = inputs.as_float_array(x)
    reduced = inputs.other_axes(x.ndim, inputs.resolve_axes(x.ndim, axis))
    expanded = None if mask is None else inputs.expand_mask(mask, x, reduced)
    reduction = Reduction(reduced, resolve_devices(axis_name, axis_index_groups))
    return cast(Moments, _moments(x, expanded, reduction=reduction))


@functools.partial(jax.jit, static_argnames="reduction", inline=True)
def _moments(x: jax.Array, mask: jax.Array | None, *, reduction: Reduction) -> Moments:
    @save_only_moments
    def measured(x: jax.Array) -> Moments:
        return measure(prepare(x, mask), mask, reduction, x.dtype)

    return measured(x).squeeze(reduction.axes)


def prepare(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Returns `x` in the dtype of its statistics, with 0 for NaN and infinity where the mask is False."""
    x = x.astype(inputs.statistics_dtype(x.dtype))
    return x if mask is None else jnp.where(mask | jnp.isfinite(x), x, 0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def measure(
    x: jax.Array, mask: jax.Array | None, reduction: Reduction, input_dtype: np.dtype, only_y: bool = False
) -> Moments:
    """Returns the moments of `x`, with its rank and size 1 along the reduced axes.

    Args:
      x: what `prepare` returned.
      mask: of the rank of `x`, or None.
      reduction: what is measured. With channel groups there are moments for each group, not for each channel.
      input_dtype: the dtype of x before `prepare`.
      only_y: the caller uses the moments for nothing but normalizing `x`.
    """
    axes, devices = reduction.axes, reduction.devices
    if reduction.about_zero:
        square = sums.mean(x * x, mask, axes)
        zero = jnp.zeros_like(square)
        mean, mean_lo, var = zero, zero, square
    else:
        mean, mean_lo, var = sums.mean_and_variance(x, mask, axes, input_dtype, only_y)
    local = Moments(mean, var, sums.count(x, mask, axes) + jnp.zeros_like(var), mean_lo)
    if reduction.channel_groups is not None:
        local = reduction.channel_groups.merge(local, equal_counts=mask is None)
    return local if devices is None else _merge_devices(local, devices)


def _merge_devices(local: Moments, devices: DeviceGroups) -> Moments:
    # All fields in one array: one collective.
    gathered, valid = devices.gather(jnp.stack([local.mean, local.var, local.count, local.mean_lo]))
    mean, var, count, mean_lo = jnp.moveaxis(gathered, 1, 0)
    count = jnp.where(valid.reshape(-1, *(1,) * local.mean.ndim), count, 0)
    return Moments(mean, var, count, mean_lo).merge_axis(0)


@measure.defjvp
def _measure_jvp(
    reduction: Reduction,
    input_dtype: np.dtype,
    only_y: bool,
    primals: tuple[jax.Array, jax.Array | None],
    tangents: tuple[jax.Array, object],
) -> tuple[Moments, Moments]:
    x, mask = primals
    dx, _ = tangents
    axes, devices, groups, about_zero = (
        reduction.axes,
        reduction.devices,
        reduction.channel_groups,
        reduction.about_zero,
    )
    # Not only for y, since these moments are saved for the backward pass.
    m = measure(x, mask, reduction, input_dtype).map(lambda v: checkpoint_name(v, MOMENTS_NAME))
    zero = jnp.zeros_like(m.count)
    # Values that do not depend on x need not be saved.
    if about_zero:
        m = dataclasses.replace(m, mean=zero, mean_lo=zero)
    if mask is None and devices is None:
        channels = 1 if groups is None else x.shape[groups.axis] // groups.number
        m = dataclasses.replace(m, count=sums.count(x, None, axes) * channels + zero)
    mean = m.mean if groups is None else groups.repeat(m, x.shape[groups.axis]).mean
    totals = [sums.total((x - separate_copy(mean, 1)) * dx, mask, axes)]
    if not about_zero:
        totals.append(sums.total(dx, mask, axes))
    if groups is not None:
        totals = [groups.sum(total) for total in totals]
    if devices is not None:
        totals = list(devices.sum(jnp.stack(totals)))
    # The transpose of these quotients is computed before the loop over x, not in it.
    means = [materialize(total / jnp.maximum(m.count, 1), m.var) for total in totals]
    if about_zero:
        return m, Moments(zero, 2 * means[0], zero, zero)
    return m, Moments(means[1], 2 * (means[0] - m.mean_lo * means[1]), zero, zero)


def _merge(parts: Moments, average: Callable[[jax.Array], jax.Array], total: jax.Array) -> Moments:
    """Returns the merged moments; `average` is the mean over parts, weighted by count, and `total` the count."""
    pivot = prevent_fma(average(parts.mean))
    shift = (parts.mean - pivot) + parts.mean_lo
    mean, mean_lo, var = sums.from_differences(pivot, average(shift), average(parts.var + shift * shift))
    return Moments(mean, var, total, mean_lo)


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
