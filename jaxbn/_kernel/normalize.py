"""The kernel of all norms: measure moments, subtract the mean, scale, shift."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._kernel import inputs
from jaxbn._kernel.moments import Moments, Reduction, measure, prepare, save_only_moments
from jaxbn._kernel.xla import materialize, separate_copy

# Returns the scale and bias to use, given the moments just measured, eps, and the caller's scale and bias. It is a
# pytree, a jax.tree_util.Partial of a module's function: a new function in each call would be compiled in each call.
Adjust = Callable[[Moments, float, jax.Array | None, jax.Array | None], tuple[jax.Array | None, jax.Array | None]]


@functools.partial(jax.jit, static_argnames=("reduction", "eps", "dtype", "only_y"), inline=True)
def normalize(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mask: jax.Array | None,
    adjust: Adjust | None = None,
    *,
    reduction: Reduction,
    eps: float,
    dtype: np.dtype,
    only_y: bool = False,
) -> tuple[jax.Array, Moments]:
    """Returns `(x - mean) / sqrt(var + eps) * scale + bias` and the moments that it used.

    All arrays have the rank of `x`; scale and bias may vary along any axes. With `only_y` the caller does not use
    the moments. Reverse mode saves `x` in its own dtype and arrays of the size of the moments; everything else is
    recomputed.
    """
    groups = reduction.channel_groups

    @save_only_moments
    def kernel(
        x: jax.Array, scale: jax.Array | None, bias: jax.Array | None, adjust: Adjust | None
    ) -> tuple[jax.Array, Moments]:
        prepared = prepare(x, mask)
        nothing_between = groups is None and reduction.devices is None and adjust is None
        for_y = only_y and nothing_between and _has_scale_per_value(x, scale, reduction.axes)
        m = measure(prepared, mask, reduction, x.dtype, for_y)
        if groups is not None:
            m = groups.repeat(m, x.shape[groups.axis])
        if adjust is not None:
            scale, bias = adjust(m, eps, scale, bias)
        return _scale_and_shift(prepared, m, scale, bias, eps, reduction).astype(dtype), m

    return kernel(x, scale, bias, adjust)


@functools.partial(jax.jit, static_argnames=("eps", "dtype"), inline=True)
def normalize_with_moments(
    x: jax.Array,
    moments: Moments,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mask: jax.Array | None,
    *,
    eps: float,
    dtype: np.dtype,
) -> jax.Array:
    """`normalize` by given moments, which are constants to the derivative."""

    @save_only_moments
    def kernel(x: jax.Array, scale: jax.Array | None, bias: jax.Array | None) -> jax.Array:
        return _scale_and_shift(prepare(x, mask), moments, scale, bias, eps, Reduction(())).astype(dtype)

    moments = jax.lax.stop_gradient(moments)
    return kernel(x, scale, bias)


def reciprocal_std(m: Moments, eps: float) -> jax.Array:
    # 0 where no value counts, and where all values are equal and eps is 0: y is the bias there.
    some, v = jnp.sign(m.count), m.var + eps
    if v.dtype.type(eps) == 0:
        some, v = jnp.where(v == 0, 0, some), jnp.where(v == 0, 1, v)
    # 1 / sqrt(v) and not rsqrt(v), whose derivative's v**-1.5 underflows long before v**-1 does.
    return some / jnp.sqrt(v)


def _scale_and_shift(
    x: jax.Array,
    m: Moments,
    scale: jax.Array | None,
    bias: jax.Array | None,
    eps: float,
    reduction: Reduction,
) -> jax.Array:
    factor = reciprocal_std(m, eps)
    scale, bias = (None if v is None else v.astype(x.dtype) for v in (scale, bias))
    if reduction.about_zero or _has_scale_per_value(x, scale, reduction.axes):
        return _through_difference(x, m, factor, scale, bias, reduction)
    return _through_shift(x, m, factor, scale, bias, reduction)


def _through_difference(
    x: jax.Array,
    m: Moments,
    factor: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    reduction: Reduction,
) -> jax.Array:
    """`(x - mean) * factor * scale + bias`, where the derivative with respect to the mean passes through `x - mean`.

    For norms without a mean, and those where each value that a statistic is taken over has a scale of its own, or
    rows have none: there the other way saves no sum.
    """
    mean = m.mean
    if reduction.devices is not None:
        factor, mean = reduction.devices.as_varying(factor, mean)
    y = _scale_centred(x, () if reduction.about_zero else (mean, m.mean_lo), factor, scale)
    return y if bias is None else y + bias


def _through_shift(
    x: jax.Array,
    m: Moments,
    factor: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    reduction: Reduction,
) -> jax.Array:
    """The same value as `(x - m0) * factor + shift`, where m0 is the mean as a constant.

    The derivative with respect to the mean passes through the shift. It is the same derivative, but its transpose
    needs only the sums of dy and of dy * (x - mean), which the gradients of scale and bias need anyway.
    """
    devices, fixed = reduction.devices, jax.lax.stop_gradient(m)
    shift = -factor * ((m.mean - fixed.mean) + fixed.mean_lo)
    # Scale and bias that vary along a reduced axis are sharded as x is, and so are the sums of their gradients.
    sharded = any(v is not None and any(v.shape[a] > 1 for a in reduction.axes) for v in (scale, bias))
    if devices is not None and sharded:
        factor, shift = devices.as_varying(factor, shift)
    if scale is not None:
        factor, shift = factor * scale, shift * scale
    if bias is not None:
        shift = shift + bias
    if devices is not None and not sharded:
        factor, shift = devices.as_varying(factor, shift)
    return _affine(x, *(materialize(v, fixed.var) for v in (fixed.mean, factor, shift)))


def _has_scale_per_value(x: jax.Array, scale: jax.Array | None, reduced: tuple[int, ...]) -> bool:
    """Whether each value that a statistic is taken over has a scale of its own, or rows have no scale."""
    if scale is None:
        return inputs.are_last(x.ndim, reduced)
    return bool(reduced) and all(scale.shape[a] == x.shape[a] for a in reduced)


@jax.custom_jvp
def _affine(x: jax.Array, centre: jax.Array, factor: jax.Array, shift: jax.Array) -> jax.Array:
    """`(x - centre) * factor + shift`."""
    return (x - centre) * factor + shift


@_affine.defjvp
def _affine_jvp(primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    x, centre, factor, _ = primals
    dx, dcentre, dfactor, dshift = tangents
    centred = x - separate_copy(centre, 1)

    # The product rule. Its transpose is the sums of dy and of dy * centred.
    def separate(centred: jax.Array, dfactor: jax.Array, dshift: jax.Array) -> jax.Array:
        return centred * dfactor + dshift

    # On GPUs both sums are one, of stacked arrays: then the operation that computes dy, such as ReLU's derivative,
    # has one user less, and is fused into it.
    def stacked(centred: jax.Array, dfactor: jax.Array, dshift: jax.Array) -> jax.Array:
        both = jnp.stack(jnp.broadcast_arrays(dfactor, dshift), -2)
        both = jnp.broadcast_to(both, (*x.shape[:-1], 2, x.shape[-1]))
        dfactor, dshift = (jnp.squeeze(v, -2) for v in jax.lax.split(both, (1, 1), both.ndim - 2))
        return separate(centred, dfactor, dshift)

    tangent = jax.lax.platform_dependent(centred, dfactor, dshift, cuda=stacked, rocm=stacked, default=separate)
    return _affine(*primals), (dx - dcentre) * factor + tangent


@jax.custom_jvp
def _scale_centred(
    x: jax.Array, centre: tuple[jax.Array, ...], factor: jax.Array, scale: jax.Array | None
) -> jax.Array:
    """Returns `(x - sum(centre)) * factor * scale`; a scale of None is 1."""
    return _centred(x, centre, 0) * factor * _or_one(scale, 0)


@_scale_centred.defjvp
def _scale_centred_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    x, centre, factor, scale = primals
    dx, dcentre, dfactor, dscale = tangents
    # The product rule. The transpose of each line but the first is a sum over x, with copies of its own.
    dy = dx * factor * _or_one(scale, 1)
    if centre:
        dy -= sum(dcentre) * factor * _or_one(scale, 1)
    dy += _centred(x, centre, 1) * (dfactor * _or_one(scale, 1))
    if scale is not None:
        dy += _centred(x, centre, 2) * separate_copy(factor, 2) * dscale
    return _scale_centred(x, centre, factor, scale), dy


def _centred(x: jax.Array, centre: tuple[jax.Array, ...], number: int) -> jax.Array:
    for v in centre:
        x = x - separate_copy(v, number)
    return x


def _or_one(scale: jax.Array | None, number: int) -> jax.Array | int:
    return 1 if scale is None else separate_copy(scale, number)
