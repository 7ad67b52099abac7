"""The kernel of all norms: measure moments, subtract the mean, scale, shift."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._kernel import inputs
from jaxbn._kernel.forward import normalize_forward
from jaxbn._kernel.jit import jit
from jaxbn._kernel.linear import combine, prepare
from jaxbn._kernel.measure import as_statistics, measure, measure_to_keep, moments_tangent
from jaxbn._kernel.moments import Moments, reciprocal_root
from jaxbn._kernel.reduction import Reduction

# Returns the scale and bias to use, given the moments just measured, eps, and the caller's scale and bias. It is a
# pytree, a jax.tree_util.Partial of a module's function: a new function in each call would be compiled in each call.
Adjust = Callable[[Moments, float, jax.Array | None, jax.Array | None], tuple[jax.Array | None, jax.Array | None]]
# Scale and bias, or their tangents.
_Affine = tuple[jax.Array | None, ...]
_Tangent = jax.Array | jax.custom_derivatives.SymbolicZero | None
_Pair = TypeVar("_Pair", bound=_Affine)


@jit("reduction", "feature", "eps", "dtype")
def normalize(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mask: jax.Array | None,
    adjust: Adjust | None = None,
    *,
    reduction: Reduction,
    feature: tuple[int, ...],
    eps: float,
    dtype: np.dtype,
) -> tuple[jax.Array, Moments]:
    """Returns `(x - mean) / sqrt(var + eps) * scale + bias` and the moments that it used.

    Scale and bias are along the `feature` axes of `x`; a mask has its rank. Reverse mode keeps `x` in its own dtype
    and arrays of the size of the moments.
    """
    y, m = _normalize(x, mask, (scale, bias), adjust, reduction, feature, eps, dtype, False)
    return y, cast(Moments, m)


@jit("reduction", "feature", "eps", "dtype")
def normalize_only(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mask: jax.Array | None,
    *,
    reduction: Reduction,
    feature: tuple[int, ...],
    eps: float,
    dtype: np.dtype,
) -> jax.Array:
    """Returns the y of `normalize` alone, by a shorter program."""
    return _normalize(x, mask, (scale, bias), None, reduction, feature, eps, dtype, True)[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5, 6, 7, 8))
def _normalize(
    x: jax.Array,
    mask: jax.Array | None,
    affine: _Affine,
    adjust: Adjust | None,
    reduction: Reduction,
    feature: tuple[int, ...],
    eps: float,
    dtype: np.dtype,
    only_y: bool,
) -> tuple[jax.Array, Moments | None]:
    shared = reduction.devices is not None or any(jax.typeof(x).sharding.spec)
    if only_y and mask is None and adjust is None and not (reduction.about_zero or shared):
        return normalize_forward(x, affine[0], affine[1], reduction, feature, eps).astype(dtype), None
    affine = _with_rank_of(x, affine, feature)
    m = measure(x, mask, reduction)
    if adjust is not None:
        affine = adjust(m, eps, affine[0], affine[1])
    return _apply(x, mask, m, affine, _factor(m, eps, mask), reduction).astype(dtype), None if only_y else m


@functools.partial(_normalize.defjvp, symbolic_zeros=True)
def _normalize_jvp(
    reduction: Reduction,
    feature: tuple[int, ...],
    eps: float,
    dtype: np.dtype,
    only_y: bool,
    primals: tuple[jax.Array, jax.Array | None, _Affine, Adjust | None],
    tangents: tuple[_Tangent, object, tuple[_Tangent, ...], object],
) -> tuple[tuple[jax.Array, Moments | None], tuple[jax.Array, Moments | None]]:
    x, mask, affine, adjust = primals
    dx = _nonzero(tangents[0])
    m = measure_to_keep(x, mask, reduction)
    affine, daffine = (_with_rank_of(x, pair, feature) for pair in (affine, tuple(map(_nonzero, tangents[2]))))
    if dx is None:
        dm = None
    else:
        dx = as_statistics(x, mask, dx)
        dm = moments_tangent(x, mask, m, dx, reduction)
    if adjust is not None:
        changes = tuple(
            None if v is None else jnp.zeros_like(v) if d is None else d for v, d in zip(affine, daffine, strict=True)
        )
        changed_m = m.map(jnp.zeros_like) if dm is None else dm
        affine, daffine = jax.jvp(lambda m, affine: adjust(m, eps, *affine), (m, affine), (changed_m, changes))
    y, dy = _apply_jvp(x, mask, m, affine, dx, dm, daffine, reduction, eps)
    if only_y:
        return (y.astype(dtype), None), (dy.astype(dtype), None)
    return (y.astype(dtype), m), (dy.astype(dtype), m.map(jnp.zeros_like) if dm is None else dm)


@jit("feature", "eps", "dtype")
def normalize_with_moments(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mask: jax.Array | None,
    *,
    feature: tuple[int, ...],
    eps: float,
    dtype: np.dtype,
) -> jax.Array:
    """Normalizes by a given mean and variance, which are constants to the derivative."""
    statistics = jax.lax.stop_gradient((mean, var))
    affine, statistics = _with_rank_of(x, (scale, bias), feature), _with_rank_of(x, statistics, feature)
    if x.dtype == statistics[0].dtype:
        # JAX's own derivative will do: it keeps x - mean, which is no larger than x. Every tool knows these operations.
        return _apply_given(x, mask, affine, statistics, eps).astype(dtype)
    return _normalize_with_moments(x, mask, affine, statistics, eps, dtype)


# For given statistics: nothing is measured, over no axes, groups or devices.
_GIVEN = Reduction(())


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def _normalize_with_moments(
    x: jax.Array,
    mask: jax.Array | None,
    affine: _Affine,
    statistics: tuple[jax.Array, jax.Array],
    eps: float,
    dtype: np.dtype,
) -> jax.Array:
    return _apply_given(x, mask, affine, statistics, eps).astype(dtype)


@functools.partial(_normalize_with_moments.defjvp, symbolic_zeros=True)
def _normalize_with_moments_jvp(
    eps: float,
    dtype: np.dtype,
    primals: tuple[jax.Array, jax.Array | None, _Affine, tuple[jax.Array, jax.Array]],
    tangents: tuple[_Tangent, object, tuple[_Tangent, ...], object],
) -> tuple[jax.Array, jax.Array]:
    x, mask, affine, statistics = primals
    m, dx = _given(statistics), _nonzero(tangents[0])
    dx = None if dx is None else as_statistics(x, mask, dx)
    y, dy = _apply_jvp(x, mask, m, affine, dx, None, tuple(map(_nonzero, tangents[2])), _GIVEN, eps)
    return y.astype(dtype), dy.astype(dtype)


def reciprocal_std(var: jax.Array, eps: float, count: jax.Array | None = None) -> jax.Array:
    """Returns `1 / sqrt(var + eps)`; 0 where no value counts, and where var and eps are 0: y is the bias there."""
    root = reciprocal_root(var + eps, eps)
    return root if count is None else root * jnp.sign(count)


def _reciprocal_std_tangent(r: jax.Array, dvar: jax.Array) -> jax.Array:
    # Multiplied one after the other: r**3 underflows long before the product does. Reverse mode keeps r alone.
    return dvar * r * r * r * -0.5


def _apply(
    x: jax.Array, mask: jax.Array | None, m: Moments, affine: _Affine, factor: jax.Array, reduction: Reduction
) -> jax.Array:
    y = prepare(x, mask)
    for centre in _centres(m, reduction):
        y = y - centre
    scale, bias = (None if v is None else v.astype(y.dtype) for v in affine)
    if scale is not None and not _has_scale_per_value(x, scale, reduction.axes):
        factor, scale = scale * factor, None
    y = y * factor
    y = y if scale is None else y * scale
    return y if bias is None else y + bias


def _apply_jvp(
    x: jax.Array,
    mask: jax.Array | None,
    m: Moments,
    affine: _Affine,
    dx: jax.Array | None,
    dm: Moments | None,
    daffine: _Affine,
    reduction: Reduction,
    eps: float,
) -> tuple[jax.Array, jax.Array]:
    """Returns y and its tangent, whose transpose sums dy and dy * (x - mean) once each for all gradients."""
    dtype = m.mean.dtype
    scale, dscale, dbias = (None if v is None else v.astype(dtype) for v in (affine[0], *daffine))
    per_value = scale is not None and _has_scale_per_value(x, scale, reduction.axes)
    mean, mean_lo = (*_centres(m, reduction), None, None)[:2]
    factor, dfactor, dmean = _factor(m, eps, mask), None, None
    y = _apply(x, mask, m, affine, factor, reduction)
    if dm is not None:
        dfactor = _reciprocal_std_tangent(factor, dm.var)
        dmean = None if mean is None else dm.mean
    devices = reduction.devices
    # Scale and bias that vary along a reduced axis are sharded as x is, and so are the sums of their gradients.
    sharded = any(v is not None and any(v.shape[a] > 1 for a in reduction.axes) for v in affine)
    if devices is not None and sharded:
        dfactor, dmean = (None if v is None else devices.as_varying(v) for v in (dfactor, dmean))
    if scale is not None and not per_value:
        dfactor = _sum(_product(dfactor, scale), _product(factor, dscale))
        factor = factor * scale
    shift = _sum(_product(factor, dmean), _product(dfactor, mean_lo))
    shift = None if shift is None else -shift
    if not per_value:
        shift = _sum(shift, dbias)
    if devices is not None and not sharded:
        dfactor, shift = (None if v is None else devices.as_varying(v) for v in (dfactor, shift))
    dy = combine((x, mask, mean, None, factor, scale if per_value else None), dx, shift, dfactor)
    if per_value:
        # The gradient of scale needs sums along other axes.
        dy = _sum(dy, combine((x, mask, mean, mean_lo, None, factor), b=dscale), dbias)
    zero = jnp.zeros(x.shape, dtype)
    return y, zero if dy is None else jnp.broadcast_to(dy, x.shape)


def _sum(*terms: jax.Array | None) -> jax.Array | None:
    """Returns the sum of the terms, of which None is 0."""
    present = [v for v in terms if v is not None]
    return functools.reduce(jnp.add, present) if present else None


def _product(a: jax.Array | None, b: jax.Array | None) -> jax.Array | None:
    return None if a is None or b is None else a * b


def _factor(m: Moments, eps: float, mask: jax.Array | None) -> jax.Array:
    return reciprocal_std(m.var, eps, None if mask is None else m.count)


def _apply_given(
    x: jax.Array, mask: jax.Array | None, affine: _Affine, statistics: tuple[jax.Array, jax.Array], eps: float
) -> jax.Array:
    m = _given(statistics)
    return _apply(x, mask, m, affine, _factor(m, eps, mask), _GIVEN)


def _given(statistics: tuple[jax.Array, jax.Array]) -> Moments:
    mean, var = statistics
    return Moments(mean, var, jnp.ones_like(mean))


def _centres(m: Moments, reduction: Reduction) -> list[jax.Array]:
    """Returns what is subtracted from x: the mean, and its rounding error unless that is a number."""
    if reduction.about_zero:
        return []
    return [m.mean] if isinstance(m.mean_lo, float) else [m.mean, m.mean_lo]


def _with_rank_of(x: jax.Array, pair: _Pair, feature: tuple[int, ...]) -> _Pair:
    """Returns arrays along the `feature` axes with the rank of `x`."""
    others = inputs.other_axes(x.ndim, feature)
    return cast(_Pair, tuple(None if v is None else jnp.expand_dims(v, others) for v in pair))


def _nonzero(tangent: _Tangent) -> jax.Array | None:
    return None if isinstance(tangent, jax.custom_derivatives.SymbolicZero) else tangent


def _has_scale_per_value(x: jax.Array, scale: jax.Array, reduced: tuple[int, ...]) -> bool:
    """Whether each value that a statistic is taken over has a scale of its own."""
    return bool(reduced) and all(scale.shape[a] == x.shape[a] for a in reduced)
