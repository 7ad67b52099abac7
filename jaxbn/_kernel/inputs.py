"""Checks and converts what callers pass: arrays, axes, masks, dtypes, eps.

Inside the library, scale, bias, masks and statistics have the rank of `x`, with size 1 along axes that they do not
vary along. In the public functions they have the feature axes alone, in ascending order. `others` are the axes that
are not feature axes, `reduced` those that a statistic is taken over. In batch norm they are the same.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import SupportsFloat

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

Axis = int | Sequence[int]

_STATIC = "fixed when the function is traced (by functools.partial or static_argnames)"


def as_float_array(x: object) -> jax.Array:
    """Returns `x` as a real JAX array, or raises if its dtype would have to be converted."""
    array = as_inexact_array(x)
    if jnp.iscomplexobj(array):
        raise TypeError(
            f"x: expected a floating-point array, got {array.dtype}; normalize x.real and x.imag, or take a layer of "
            "Flax's names from jaxbn.linen or jaxbn.nnx, which all take complex x"
        )
    return array


def as_inexact_array(x: object) -> jax.Array:
    """`as_float_array`, where `x` may be complex too."""
    if not hasattr(x, "shape"):
        raise TypeError(f"x: expected an array, got {type(x).__name__}; convert it with jnp.asarray(x)")
    array = jnp.asarray(x)
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        raise TypeError(
            f"x: expected a floating-point array, got {array.dtype}; convert it, for example with x.astype(jnp.float32)"
        )
    return array


# For each argument that names axes: which axes these are, and the cure that its errors end with.
_AXES = {
    "axis": (
        "feature axes",
        "axis names the axis that holds the channels, such as -1 for channels last or 1 for channels first",
    ),
    "params_axis": ("feature axes", "params_axis names the axes along which scale and bias vary, -1 for channels last"),
    "feature_axes": ("feature axes", "scale and bias vary along feature_axes, -1 for channels last"),
    "reduction_axes": ("axes", "statistics are taken over reduction_axes, such as (1, 2, 3) for whole images"),
    "batch_axis": ("axes", "batch_axis names the axes along which examples lie; () says that x is one example"),
}


def resolve_axes(ndim: int, axis: Axis, name: str = "axis") -> tuple[int, ...]:
    """Returns the axes that the argument called `name` names, as numbers from 0 in ascending order."""
    kind, cure = _AXES[name]
    try:
        wanted = tuple(operator.index(a) for a in (axis if isinstance(axis, Sequence) else (axis,)))
    except TypeError:
        raise TypeError(f"{name}: expected an integer, or several, {_STATIC}, got {type(axis).__name__}") from None
    if any(not -ndim <= a < ndim for a in wanted):
        raise ValueError(
            f"{name}: expected {kind} in [{-ndim}, {ndim - 1}] for x with {ndim} dimensions, got {axis}; {cure}"
        )
    resolved = {a % ndim for a in wanted}
    if len(resolved) < len(wanted):
        raise ValueError(f"{name}: expected each axis once, got {axis} for x with {ndim} dimensions")
    return tuple(sorted(resolved))


def other_axes(ndim: int, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a for a in range(ndim) if a not in axes)


def are_last(ndim: int, axes: tuple[int, ...]) -> bool:
    return bool(axes) and axes == tuple(range(ndim - len(axes), ndim))


def sizes(x: jax.Array, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x.shape[a] for a in axes)


def check_feature_array(name: str, value: object, x: jax.Array, others: tuple[int, ...]) -> None:
    """Raises unless `value` has one floating-point entry per channel of `x`."""
    array = jnp.asarray(value)
    feature = other_axes(x.ndim, others)
    expected = sizes(x, feature)
    if array.shape != expected:
        cure = (
            "pass the axis that holds the channels as axis=... (params_axis=... in layer and RMS norm), or initialize "
            "with that many features"
        )
        if expected and array.shape[-len(expected) :] == expected:
            cure = "those of several norms, stacked along first axes, go through jax.vmap (nnx.vmap for layers)"
        raise ValueError(
            f"{name}: expected shape {expected}, the size of x with shape {x.shape} along its "
            f"feature axes {feature}, got shape {array.shape}; {cure}"
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name}: expected a floating-point array, got {array.dtype}; use float32")


def expand_mask(mask: object, x: jax.Array, others: tuple[int, ...]) -> jax.Array:
    """Returns `mask` with the rank of `x`, and size 1 along axes that it does not vary along."""
    array = jnp.asarray(mask)
    if array.dtype != jnp.bool_:
        raise TypeError(
            f"mask: expected a boolean array (True counts), got {array.dtype}; write mask != 0 or mask.astype(bool)"
        )
    if array.ndim == x.ndim:
        expanded = array
    elif array.ndim == len(others):
        expanded = jnp.expand_dims(array, other_axes(x.ndim, others))
    else:
        expanded = None
    if expanded is None or any(m not in (1, n) for m, n in zip(expanded.shape, x.shape, strict=True)):
        raise ValueError(
            f"mask: expected a shape that broadcasts, rank for rank, to {sizes(x, others)} (x without its "
            f"feature axes) or to {x.shape} (all of x), got shape {array.shape}; add axes of size 1 where the "
            "mask does not vary"
        )
    return expanded


def statistics_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype of the statistics of values of `dtype`: float64 for float64, float32 for all others."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def is_real(value: object) -> bool:
    """Whether `value` is a real number or an array of real numbers."""
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        return isinstance(value, numbers.Real)
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def check_eps(eps: SupportsFloat, name: str = "eps") -> float:
    try:
        if isinstance(eps, str):
            raise TypeError
        value = float(eps)
    except TypeError:
        raise TypeError(f"{name}: expected a number {_STATIC}, got {type(eps).__name__}") from None
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value}; the usual value is 1e-5")
    return value


def check_output_dtype(dtype: DTypeLike | None, x: jax.Array) -> np.dtype:
    result = np.dtype(x.dtype if dtype is None else dtype)
    if not jnp.issubdtype(result, jnp.floating):
        raise TypeError(f"dtype: expected a floating-point dtype for y, got {result}; leave it out for that of x")
    return result
