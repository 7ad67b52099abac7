"""The desk of the norms: what callers pass is checked and converted here, once.

Scale, bias and running statistics have the feature axes alone, in ascending order. `others` are the axes that are not
feature axes, `reduced` those that a statistic is taken over. In batch norm they are the same.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from typing import SupportsFloat

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxbn._kernel.inputs import other_axes, sizes
from jaxbn._norms.state import AffineParams, BatchNormState

Axis = int | Sequence[int]

WITH_STATE = "the arguments are x, params, state, as jaxbn.batch_norm_init returns them"
WITHOUT_STATE = "the arguments are x and params, which jaxbn.affine_init returns"
_STATIC = "fixed when the function is traced (by functools.partial or static_argnames)"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The arguments that all norms have in common, checked.

    Attributes:
      x: of floating point.
      scale, bias: along the feature axes of x.
      mask: of the rank of x.
      feature: the axes along which scale, bias and running statistics vary, in ascending order.
      reduced: the axes that a statistic is taken over, in ascending order.
      eps: added to the variance.
      dtype: of y.
    """

    x: jax.Array
    scale: jax.Array | None
    bias: jax.Array | None
    mask: jax.Array | None
    feature: tuple[int, ...]
    reduced: tuple[int, ...]
    eps: float
    dtype: np.dtype


def check_arguments(
    x: jax.Array,
    params: AffineParams | None,
    state: BatchNormState | None = None,
    *,
    feature: tuple[int, ...],
    reduced: tuple[int, ...] | None = None,
    eps: float,
    mask: ArrayLike | None,
    dtype: DTypeLike | None,
    cure: str = WITH_STATE,
    eps_name: str = "eps",
) -> Arguments:
    """Returns the arguments of a norm, or raises; `x` is checked. Without `reduced`, all but the feature axes are.

    `cure` ends the error about `params` of another kind; the caller's name of `eps` is `eps_name`.
    """
    others, expected, scale, bias = other_axes(x.ndim, feature), sizes(x, feature), None, None
    if params is not None:
        check_params(params, cure)
        scale, bias = params.scale, params.bias
        scale = None if scale is None else _feature_array("params.scale", scale, x, feature, expected)
        bias = None if bias is None else _feature_array("params.bias", bias, x, feature, expected)
    if state is not None:
        if not isinstance(state, BatchNormState):
            cure = cure_of_restored("state", state, BatchNormState) or WITH_STATE
            raise TypeError(f"state: expected jaxbn.BatchNormState or None, got {type(state).__name__}; {cure}")
        _feature_array("state.mean", state.mean, x, feature, expected)
        _feature_array("state.var", state.var, x, feature, expected)
    return Arguments(
        x=x,
        scale=scale,
        bias=bias,
        mask=None if mask is None else expand_mask(mask, x, others),
        feature=feature,
        reduced=others if reduced is None else reduced,
        eps=check_eps(eps, eps_name),
        dtype=_check_output_dtype(dtype, x),
    )


def as_array(x: object) -> jax.Array:
    if not hasattr(x, "shape"):
        raise TypeError(f"x: expected an array, got {type(x).__name__}; convert it with jnp.asarray(x)")
    return jnp.asarray(x)


def as_float_array(x: object) -> jax.Array:
    """Returns `x` as a real JAX array, or raises if its dtype would have to be converted."""
    array = as_array(x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        cure = "convert it, for example with x.astype(jnp.float32)"
        if jnp.iscomplexobj(array):
            cure = (
                "normalize x.real and x.imag, or take a layer of Flax's names from jaxbn.linen or jaxbn.nnx, which all "
                "take complex x"
            )
        raise TypeError(f"x: expected a floating-point array, got {array.dtype}; {cure}")
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
        wanted = list(map(operator.index, axis if isinstance(axis, Sequence) else (axis,)))
    except TypeError:
        raise TypeError(f"{name}: expected an integer, or several, {_STATIC}, got {type(axis).__name__}") from None
    if wanted and not -ndim <= min(wanted) <= max(wanted) < ndim:
        raise ValueError(
            f"{name}: expected {kind} in [{-ndim}, {ndim - 1}] for x with {ndim} dimensions, got {axis}; {cure}"
        )
    resolved = {a % ndim for a in wanted}
    if len(resolved) < len(wanted):
        raise ValueError(f"{name}: expected each axis once, got {axis} for x with {ndim} dimensions")
    return tuple(sorted(resolved))


def _feature_array(
    name: str, value: object, x: jax.Array, feature: tuple[int, ...], expected: tuple[int, ...]
) -> jax.Array:
    """Returns `value` as an array, or raises unless it has one floating-point entry per channel of `x`."""
    check_array(name, value)
    array = jnp.asarray(value)
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
    return array


def check_array(name: str, value: object) -> None:
    if not hasattr(value, "shape"):
        raise TypeError(f"{name}: expected an array, got {type(value).__name__}; convert it with jnp.asarray")


def expand_mask(mask: ArrayLike, x: jax.Array, others: tuple[int, ...]) -> jax.Array:
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


def _check_output_dtype(dtype: DTypeLike | None, x: jax.Array) -> np.dtype:
    result = np.dtype(x.dtype if dtype is None else dtype)
    if not jnp.issubdtype(result, jnp.floating):
        raise TypeError(f"dtype: expected a floating-point dtype for y, got {result}; leave it out for that of x")
    return result


def check_params(params: object, cure: str) -> None:
    """`cure` ends the error if `params` is not even like parameters."""
    if params is not None and not isinstance(params, AffineParams):
        if cure == WITHOUT_STATE and _is_of_torch(params):
            cure = "make it of PyTorch's arrays: jaxbn.AffineParams(jnp.asarray(weight), jnp.asarray(bias))"
        else:
            cure = cure_of_restored("params", params, AffineParams) or cure
        raise TypeError(f"params: expected jaxbn.AffineParams or None, got {type(params).__name__}; {cure}")


def cure_of_restored(name: str, value: object, kind: type[AffineParams | BatchNormState]) -> str | None:
    """How to make a NamedTuple of its fields in a dict, tuple or list, as checkpoints are restored, or of PyTorch's."""
    if _is_of_torch(value):
        return "params, state = jaxbn.interop.batch_norm_from_torch(state_dict) makes both of PyTorch's"
    if isinstance(value, Mapping) and set(value) <= set(kind._fields):
        missing = set(kind._fields) - set(value) - set(kind._field_defaults)
        count = ", num_batches_tracked=jnp.zeros((), jnp.int32)" * (missing == {"num_batches_tracked"})
        if count or not missing:
            return f"make it of the dict that a checkpoint was restored to: jaxbn.{kind.__name__}(**{name}{count})"
    items = value if isinstance(value, tuple | list) else ()
    if len(items) == len(kind._fields) and all(v is None or hasattr(v, "shape") for v in items):
        return f"make it of these arrays: jaxbn.{kind.__name__}(*{name})"
    return None


def _is_of_torch(value: object) -> bool:
    """Whether `value` is a PyTorch module, or the `state_dict` of a norm."""
    entries = value if isinstance(value, Mapping) else ()
    return hasattr(value, "state_dict") or "weight" in entries or "running_mean" in entries
