"""The kernel that every normalization of the library is: measure, centre, scale, shift."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._kernel import inputs
from jaxbn._kernel.moments import Moments, Reduction, keep_only_moments, measure, prepare
from jaxbn._kernel.xla import once, unshared

# Scale and bias to use, made from the moments just measured, eps, and those given. A pytree, jax.tree_util.Partial,
# of a function of a module: one that is made for each call would be compiled for each call.
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

    All arrays have the rank of `x`; scale and bias may vary along reduced axes and others; with only_y the caller
    has no use for the moments. Reverse mode keeps `x` in its own dtype and arrays of the size of the moments;
    everything else is computed again.
    """
    groups = reduction.groups

    @keep_only_moments
    def kernel(
        x: jax.Array, scale: jax.Array | None, bias: jax.Array | None, adjust: Adjust | None
    ) -> tuple[jax.Array, Moments]:
        prepared = prepare(x, mask)
        plain = groups is None and reduction.across is None and adjust is None
        alone = only_y and plain and _is_direct(x, scale, reduction.axes)
        m = measure(prepared, mask, reduction, x.dtype, alone)
        if groups is not None:
            m = groups.spread(m, x.shape[groups.axis])
        if adjust is not None:
            scale, bias = adjust(m, eps, scale, bias)
        return _scale_and_shift(prepared, m, scale, bias, eps, reduction).astype(dtype), m

    return kernel(x, scale, bias, adjust)


@functools.partial(jax.jit, static_argnames=("eps", "dtype"), inline=True)
def normalize_with(
    x: jax.Array,
    moments: Moments,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mask: jax.Array | None,
    *,
    eps: float,
    dtype: np.dtype,
) -> jax.Array:
    """`normalize` with moments that are given, which carry no gradient."""

    @keep_only_moments
    def kernel(x: jax.Array, scale: jax.Array | None, bias: jax.Array | None) -> jax.Array:
        return _scale_and_shift(prepare(x, mask), moments, scale, bias, eps, Reduction(())).astype(dtype)

    moments = jax.lax.stop_gradient(moments)
    return kernel(x, scale, bias)


def reciprocal_std(m: Moments, eps: float) -> jax.Array:
    # Where nothing counts y is the bias. So it is where all values are the same, with eps=0 too.
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
    if reduction.about_zero or _is_direct(x, scale, reduction.axes):
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

    For norms without a mean or a scale, and those where each value that a statistic is taken over has a scale of
    its own.
    """
    mean = m.mean
    if reduction.across is not None:
        factor, mean = reduction.across.spread(factor, mean)
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
    """The same value as `(x - m0) * factor + shift`, m0 being the mean held fixed.

    The derivative with respect to the mean passes through the shift. It is the same, but transposed it needs the
    sums of dy and of dy * (x - mean) alone, which the gradients of scale and bias need anyway.
    """
    across, fixed = reduction.across, jax.lax.stop_gradient(m)
    shift = -factor * ((m.mean - fixed.mean) + fixed.mean_lo)
    # Parameters that vary along a reduced axis are divided among the devices as x is, and with them the
    # sums that their gradients are made of.
    divided = any(v is not None and any(v.shape[a] > 1 for a in reduction.axes) for v in (scale, bias))
    if across is not None and divided:
        factor, shift = across.spread(factor, shift)
    if scale is not None:
        factor, shift = factor * scale, shift * scale
    if bias is not None:
        shift = shift + bias
    if across is not None and not divided:
        factor, shift = across.spread(factor, shift)
    return _affine(x, *(once(v, fixed.var) for v in (fixed.mean, factor, shift)))


def _is_direct(x: jax.Array, scale: jax.Array | None, reduced: tuple[int, ...]) -> bool:
    """Whether y is best made from `x - mean`: each value that a statistic is taken over has a scale of its own."""
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
    centred = x - unshared(centre, 1)

    # The product rule. Transposed, this is the sums of dy and of dy * centred.
    def separate(centred: jax.Array, dfactor: jax.Array, dshift: jax.Array) -> jax.Array:
        return centred * dfactor + dshift

    # On GPUs one sum of both: then what makes dy, such as ReLU, has one user less, and becomes part of the sum.
    def stacked(centred: jax.Array, dfactor: jax.Array, dshift: jax.Array) -> jax.Array:
        both = jnp.stack(jnp.broadcast_arrays(dfactor, dshift), -2)
        spread = jnp.broadcast_to(both, (*x.shape[:-1], 2, x.shape[-1]))
        dfactor, dshift = (jnp.squeeze(v, -2) for v in jax.lax.split(spread, (1, 1), spread.ndim - 2))
        return separate(centred, dfactor, dshift)

    moved = jax.lax.platform_dependent(centred, dfactor, dshift, cuda=stacked, rocm=stacked, default=separate)
    return _affine(*primals), (dx - dcentre) * factor + moved


@jax.custom_jvp
def _scale_centred(
    x: jax.Array, centre: tuple[jax.Array, ...], factor: jax.Array, scale: jax.Array | None
) -> jax.Array:
    """`(x - sum(centre)) * factor * scale`; no scale is one."""
    return _centred(x, centre, 0) * factor * _or_one(scale, 0)


@_scale_centred.defjvp
def _scale_centred_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    x, centre, factor, scale = primals
    dx, dcentre, dfactor, dscale = tangents
    # The product rule. Transposed, each line but the first becomes a sum over all of x.
    dy = dx * factor * _or_one(scale, 1)
    if centre:
        dy -= sum(dcentre) * factor * _or_one(scale, 1)
    dy += _centred(x, centre, 1) * (dfactor * _or_one(scale, 1))
    if scale is not None:
        dy += _centred(x, centre, 2) * unshared(factor, 2) * dscale
    return _scale_centred(x, centre, factor, scale), dy


def _centred(x: jax.Array, centre: tuple[jax.Array, ...], number: int) -> jax.Array:
    for v in centre:
        x = x - unshared(v, number)
    return x


def _or_one(scale: jax.Array | None, number: int) -> jax.Array | int:
    return 1 if scale is None else unshared(scale, number)
