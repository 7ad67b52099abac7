"""y alone, where nobody uses the moments: the shortest program. Arrays of their size have no reduced axes here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._kernel import inputs
from jaxbn._kernel.linear import prepare
from jaxbn._kernel.measure import ChannelGroups, Reduction, as_float, has_forms, merge_values, take_sample
from jaxbn._kernel.moments import is_rounding_error, variance
from jaxbn._kernel.platforms import by_platform
from jaxbn._kernel.xla import prevent_fma

# The longest row that fits into one block of a GPU.
_LONGEST_CHAINED_ROW = 2**14
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
    axes, groups = reduction.axes, reduction.channel_groups
    if groups is None and has_forms(x, axes):
        y, v = _by_platform(x, axes=axes, options=eps)
    else:
        y, v = _around_sample(x, axes, eps, groups)
    y = y * _spread(_reciprocal_root(v, eps), x, axes, groups)
    scale, bias = (
        None if p is None else jax.lax.broadcast_in_dim(p.astype(y.dtype), x.shape, feature) for p in (scale, bias)
    )
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


def _reciprocal_root(v: jax.Array, eps: float) -> jax.Array:
    if eps >= np.finfo(v.dtype).tiny:
        return jax.lax.rsqrt(v)
    return jnp.where(v == 0, 0, jax.lax.rsqrt(jnp.where(v == 0, 1, v)))


def _spread(v: jax.Array, x: jax.Array, axes: tuple[int, ...], groups: ChannelGroups | None) -> jax.Array:
    """Returns statistics for each value of `x`."""
    kept = inputs.other_axes(x.ndim, axes)
    if groups is not None:
        shape = inputs.sizes(x, kept)
        place = kept.index(groups.axis)
        cut = groups.cut_shape(shape, place)
        v = jax.lax.broadcast_in_dim(v, cut, inputs.other_axes(len(cut), (place + 1,))).reshape(shape)
    return jax.lax.broadcast_in_dim(v, x.shape, kept)


def _means(axes: tuple[int, ...], groups: ChannelGroups | None, *arrays: jax.Array) -> list[jax.Array]:
    # Functions of jax.lax, here and in measure.py: jax2onnx replaces those of jax.numpy while it traces, and jax.jit
    # keeps what was traced.
    totals = [jax.lax.reduce_sum(v, axes) for v in arrays]
    if groups is not None:
        place = inputs.other_axes(arrays[0].ndim, axes).index(groups.axis)
        totals = [jax.lax.reduce_sum(groups.cut(total, place), (place + 1,)) for total in totals]
    count = jnp.full_like(totals[0], as_float(Reduction(axes, channel_groups=groups).count(arrays[0]), totals[0].dtype))
    return [total / count for total in totals]


def _has_at_most(x: jax.Array, axes: tuple[int, ...], most: int, groups: ChannelGroups | None = None) -> bool:
    count = Reduction(axes, channel_groups=groups).count(x)
    return isinstance(count, int) and count <= most


def _around_sample(
    x: jax.Array, axes: tuple[int, ...], eps: float, groups: ChannelGroups | None = None
) -> _CentredAndVariance:
    """With the mean of a sample as the pivot."""
    values = prepare(x, None)
    pivot = prevent_fma(*_means(axes, groups, take_sample(values, axes)))
    d = values - _spread(pivot, x, axes, groups)
    first, square = _means(axes, groups, d, d * d)
    var = variance(first, square)
    least = jnp.full_like(var, eps)
    v = jax.lax.max(var + least, least)
    if not _has_at_most(x, axes, _EXACTLY_SUMMED, groups):
        # Divided by infinity the differences of equal values from their rounded mean are 0.
        v = jax.lax.select(is_rounding_error(var, first, 64), jnp.full_like(var, jnp.inf), v)
    return d - _spread(prevent_fma(first), x, axes, groups), v


def _about_zero(x: jax.Array, axes: tuple[int, ...], eps: float) -> _CentredAndVariance:
    """For bfloat16, whose rounding changed the variance by more than sums about zero do."""
    values = prepare(x, None)
    first, square = _means(axes, None, values, values * values)
    var = variance(first, square)
    v = jax.lax.select(is_rounding_error(var, first, 4), jnp.full_like(var, jnp.inf), var + eps)
    return values - _spread(first, x, axes, None), v


def _by_chained_sums(x: jax.Array, axes: tuple[int, ...], eps: float) -> _CentredAndVariance:
    """A chain of sums along rows, each of which needs the one before: GPUs run it, and what uses it, as one kernel."""
    d = prepare(x, None)
    for _ in range(2):
        d = d - _spread(prevent_fma(*_means(axes, None, d)), x, axes, None)
    return d, _means(axes, None, d * d)[0] + eps


def _on_cpu(x: jax.Array, *, axes: tuple[int, ...], options: float) -> _CentredAndVariance:
    return _around_sample(x, axes, options)


def _on_gpu(x: jax.Array, *, axes: tuple[int, ...], options: float) -> _CentredAndVariance:
    if inputs.are_last(x.ndim, axes) and _has_at_most(x, axes, _LONGEST_CHAINED_ROW):
        return _by_chained_sums(x, axes, options)
    return _about_zero(x, axes, options) if x.dtype == jnp.bfloat16 else _around_sample(x, axes, options)


def _on_tpu(x: jax.Array, *, axes: tuple[int, ...], options: float) -> _CentredAndVariance:
    if x.dtype == jnp.bfloat16:
        return _about_zero(x, axes, options)
    mean, rest, var = merge_values(x, None, axes)
    return prepare(x, None) - _spread(mean, x, axes, None) - _spread(rest, x, axes, None), var + options


_by_platform = by_platform({"default": _on_cpu, "cuda": _on_gpu, "rocm": _on_gpu, "tpu": _on_tpu})
