"""From what the caller writes to what the arithmetic needs: axes, masks, dtypes, and their errors.

Inside the library every per-channel array keeps the rank of `x`, with size 1 on the reduced axes;
public arrays have the feature axes alone, in ascending order.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, SupportsFloat

import jax
import jax.numpy as jnp
import numpy as np

Axis = int | Sequence[int]

_STATIC = "fixed when the function is traced (by functools.partial or static_argnames)"


def as_float_array(x: object) -> jax.Array:
    """Returns `x` as a JAX array, or raises where normalizing it would need a silent conversion."""
    if not hasattr(x, "shape"):
        raise TypeError(f"x: expected an array, got {type(x).__name__}; convert it with jnp.asarray(x)")
    array = jnp.asarray(x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"x: expected a floating-point array, got {array.dtype}; convert it, for example with x.astype(jnp.float32)"
        )
    return array


def reduced_axes(ndim: int, axis: Axis) -> tuple[int, ...]:
    """Returns the axes that statistics are taken over: all but the feature axes."""
    try:
        wanted = tuple(operator.index(a) for a in (axis if isinstance(axis, Sequence) else (axis,)))
    except TypeError:
        raise TypeError(f"axis: expected an integer, or several, {_STATIC}, got {type(axis).__name__}") from None
    outside = [a for a in wanted if not -ndim <= a < ndim]
    if outside:
        raise ValueError(
            f"axis: expected feature axes in [{-ndim}, {ndim - 1}] for x with {ndim} dimensions, got {axis}; "
            "axis names the axis that holds the channels, such as -1 for channels last or 1 for channels first"
        )
    feature = {a % ndim for a in wanted}
    if len(feature) < len(wanted):
        raise ValueError(f"axis: expected each feature axis once, got {axis} for x with {ndim} dimensions")
    return tuple(a for a in range(ndim) if a not in feature)


def feature_shape(x: jax.Array, reduced: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for a, size in enumerate(x.shape) if a not in reduced)


def values_per_channel(x: jax.Array, reduced: tuple[int, ...]) -> int:
    return math.prod(x.shape[a] for a in reduced)


def check_feature_array(name: str, value: object, x: jax.Array, reduced: tuple[int, ...]) -> None:
    """Raises unless `value` has one floating-point entry per channel of `x`."""
    array = jnp.asarray(value)
    expected = feature_shape(x, reduced)
    if array.shape != expected:
        axes = tuple(a for a in range(x.ndim) if a not in reduced)
        raise ValueError(
            f"{name}: expected shape {expected}, the size of x with shape {x.shape} along its "
            f"feature axes {axes}, got shape {array.shape}; pass the axis that holds the channels "
            "as axis=..., or initialize with that many features"
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name}: expected a floating-point array, got {array.dtype}; use float32")


def expand_mask(mask: object, x: jax.Array, reduced: tuple[int, ...]) -> jax.Array:
    """Returns `mask` with the rank of `x`, size 1 wherever it does not vary."""
    array = jnp.asarray(mask)
    if array.dtype != jnp.bool_:
        raise TypeError(
            f"mask: expected a boolean array (True counts), got {array.dtype}; write mask != 0 or mask.astype(bool)"
        )
    without_features = tuple(x.shape[a] for a in reduced)
    if array.ndim == x.ndim:
        expanded = array
    elif array.ndim == len(reduced):
        expanded = jnp.expand_dims(array, [a for a in range(x.ndim) if a not in reduced])
    else:
        expanded = None
    if expanded is None or any(m not in (1, n) for m, n in zip(expanded.shape, x.shape, strict=True)):
        raise ValueError(
            f"mask: expected a shape that broadcasts, rank for rank, to {without_features} (x without its "
            f"feature axes) or to {x.shape} (all of x), got shape {array.shape}; add axes of size 1 where the "
            "mask does not vary"
        )
    return expanded


def statistics_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype that statistics of values of `dtype` are kept in: float64 for float64, float32 for all others."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def check_eps(eps: SupportsFloat, name: str = "eps") -> float:
    try:
        value = float(eps)
    except TypeError:
        raise TypeError(f"{name}: expected a number {_STATIC}, got {type(eps).__name__}") from None
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value}; the usual value is 1e-5")
    return value


def check_output_dtype(dtype: Any, x: jax.Array) -> np.dtype:
    result = np.dtype(x.dtype if dtype is None else dtype)
    if not jnp.issubdtype(result, jnp.floating):
        raise TypeError(f"dtype: expected a floating-point dtype for y, got {result}; leave it out for that of x")
    return result
