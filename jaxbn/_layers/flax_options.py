"""Converts the options of Flax's layers to those of the functions, and calls these."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxbn._kernel.devices import AxisName, DeviceGroups, Groups, resolve_devices
from jaxbn._kernel.inputs import other_axes, statistics_dtype
from jaxbn._norms.arguments import (
    WITHOUT_STATE,
    Arguments,
    Axis,
    as_array,
    as_float_array,
    check_arguments,
    resolve_axes,
)
from jaxbn._norms.batch_norm import evaluate_batch, train_batch
from jaxbn._norms.batch_renorm import renormalize
from jaxbn._norms.domains import put_domain, take_domain
from jaxbn._norms.running_statistics import check_momentum
from jaxbn._norms.state import AffineParams, BatchNormState

# Limits of batch renormalization: (r_max, d_max), or a function that returns them for the number of batches tracked.
Limits = tuple[float, float] | Callable[[jax.Array], tuple[float | jax.Array, float | jax.Array]]
# The axes that a statistic is taken over, and those along which scale and bias vary.
ReducedAndFeature = tuple[tuple[int, ...], tuple[int, ...]]


class NormLayer(Protocol):
    """A norm of Flax Linen or NNX."""

    epsilon: float

    @property
    def axis_name(self) -> AxisName | None: ...
    @property
    def axis_index_groups(self) -> Groups | None: ...


class BatchNormLayer(NormLayer, Protocol):
    """A batch norm of `jaxbn.linen` or `jaxbn.nnx`."""

    axis: Axis
    momentum: float | None
    correction: float
    virtual_batch_size: int | None
    num_domains: int | None
    domain_affine: bool

    @property
    def _renorm_limits(self) -> Limits | None:
        """The limits of batch renormalization; None if the layer does not renormalize."""


def resolve_features(layer: BatchNormLayer, x: jax.Array) -> tuple[int, ...]:
    """Returns the feature axes of `x`, or raises if the layer's options are wrong, by the names that Flax has."""
    _check_epsilon(layer.epsilon)
    check_momentum(layer.momentum, "the decay of the running statistics", "0.9 is PyTorch's 0.1")
    return resolve_axes(x.ndim, layer.axis)


def check_mode(use_running_average: object) -> bool:
    """Returns whether to evaluate. In Linen a number of features, given as in PyTorch, would be taken for the mode."""
    if _is_static(use_running_average):
        return bool(use_running_average)
    raise TypeError(
        "use_running_average: expected True to evaluate or False to train, fixed when the function is traced (by "
        f"functools.partial or static_argnames), got {type(use_running_average).__name__}; a Linen layer takes the "
        "number of features from x, and a mask is passed as mask=..."
    )


def check_update_stats(update_stats: object) -> bool:
    """Returns whether the running statistics are updated in training."""
    if _is_static(update_stats):
        return bool(update_stats)
    raise TypeError(
        "update_stats: expected True or False, fixed when the function is traced (by functools.partial or "
        f"static_argnames), got {type(update_stats).__name__}"
    )


def _is_static(flag: Any) -> bool:
    return np.shape(flag) == () and not isinstance(flag, jax.core.Tracer) and flag in (False, True)


def check_complex(layer: BatchNormLayer, x: jax.Array, domain: object, **others: bool) -> None:
    """Raises if Flax's layer, which normalizes complex x, would ignore an option of `layer` or one of `others`."""
    added = {
        "momentum=None": layer.momentum is None,
        "correction": layer.correction != 0,
        "virtual_batch_size": layer.virtual_batch_size is not None,
        "num_domains": layer.num_domains is not None,
        "domain": domain is not None,
        "limits": layer._renorm_limits is not None,
        **others,
    }
    used = [name for name, is_used in added.items() if is_used]
    if used:
        raise TypeError(
            f"x: expected an array of real numbers with {', '.join(used)}, got {x.dtype}; complex x is normalized by "
            "Flax's layer, which has no such option: leave it out, or normalize x.real and x.imag"
        )


def _check_epsilon(epsilon: float) -> None:
    if isinstance(epsilon, int) and epsilon >= 1:
        raise ValueError(
            f"epsilon: expected a small number, such as 1e-5, got {epsilon}; "
            "a Linen layer takes the number of features from x"
        )


def as_number_array(x: object) -> jax.Array:
    """Returns `x` as an array of numbers. Integers and booleans, which Flax's layers take too, are among them."""
    array = as_array(x)
    is_number = jnp.issubdtype(array.dtype, jnp.number) or array.dtype == jnp.bool_
    return array if is_number else as_float_array(array)


def _as_inexact(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Returns `x`, if integers as floating-point numbers; `dtype` is that of the result."""
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(statistics_dtype(jnp.dtype(dtype)))


def domain_axes(num_domains: int | None) -> tuple[int, ...]:
    """Returns the leading axes of arrays of which a layer has one for each domain."""
    if num_domains is None:
        return ()
    if not isinstance(num_domains, numbers.Integral) or num_domains < 1:
        raise ValueError(f"num_domains: expected a number of domains, at least 1, or None, got {num_domains}")
    return (int(num_domains),)


def layer_norm_axes(x: jax.Array, reduction_axes: Axis, feature_axes: Axis) -> ReducedAndFeature:
    reduced = resolve_axes(x.ndim, reduction_axes, "reduction_axes")
    return reduced, resolve_axes(x.ndim, feature_axes, "feature_axes")


def group_norm_axes(x: jax.Array, reduction_axes: Axis | None) -> ReducedAndFeature:
    last = x.ndim - 1
    reduced = tuple(range(1, x.ndim))
    if reduction_axes is not None:
        reduced = resolve_axes(x.ndim, reduction_axes, "reduction_axes")
    if last not in reduced:
        raise ValueError(
            f"reduction_axes: expected the last axis among them, which holds the channels, got {reduction_axes} "
            f"for x with shape {x.shape}"
        )
    return reduced[:-1], (last,)


def instance_norm_axes(x: jax.Array, feature_axes: Axis) -> ReducedAndFeature:
    feature = resolve_axes(x.ndim, feature_axes, "feature_axes")
    if 0 in feature:
        raise ValueError(
            f"feature_axes: expected axes other than the first, along which examples lie, got {feature_axes} "
            f"for x with shape {x.shape}"
        )
    return other_axes(x.ndim, (0, *feature)), feature


def batch_norm(
    layer: BatchNormLayer,
    x: jax.Array,
    feature: tuple[int, ...],
    params: AffineParams,
    state: BatchNormState,
    *,
    evaluate: bool,
    only_shapes: bool,
    mask: ArrayLike | None,
    domain: int | jax.Array | None,
    dtype: DTypeLike,
    update: bool = True,
) -> tuple[jax.Array, BatchNormState]:
    """Calls the function of a batch norm layer. Without `update` the state is used, and returned as it is.

    If only the shapes are used, one value per channel is enough, and mapped axes need not be bound.
    """
    x, all_states = _as_inexact(x, dtype), state
    if layer.num_domains is not None:
        if domain is None:
            raise ValueError(
                f"domain: expected which of the layer's {layer.num_domains} domains x is from, got None; "
                "pass domain=... to the call"
            )
        state = take_domain(state, domain)
        if layer.domain_affine:
            params = take_domain(params, domain)
    elif domain is not None:
        raise ValueError(f"domain: expected None, got {domain}; give the layer num_domains to have statistics for each")
    mask = full_rank_mask(mask, x)
    a = check_arguments(
        x, params, state, feature=feature, eps=layer.epsilon, eps_name="epsilon", mask=mask, dtype=dtype
    )
    if evaluate or (only_shapes and x.size == state.mean.size):
        return evaluate_batch(a, state), all_states
    adjust_for, limits = None, layer._renorm_limits
    if limits is not None:
        r_max, d_max = limits(state.num_batches_tracked) if callable(limits) else limits
        adjust_for = renormalize(state, r_max, d_max)
    y, new_state = train_batch(
        a,
        # Where only shapes are used, variables keep their values.
        state if update and not only_shapes else None,
        momentum=None if layer.momentum is None else 1 - layer.momentum,
        correction=layer.correction,
        devices=_devices(layer, only_shapes),
        virtual_batch_size=layer.virtual_batch_size,
        adjust_for=adjust_for,
    )
    if new_state is None:
        return y, all_states
    return y, new_state if domain is None else put_domain(all_states, domain, new_state)


def example_arguments(
    layer: NormLayer,
    x: jax.Array,
    params: AffineParams,
    axes: ReducedAndFeature,
    *,
    only_shapes: bool,
    mask: ArrayLike | None,
    dtype: DTypeLike,
) -> tuple[Arguments, DeviceGroups | None]:
    """Returns the arguments of a norm within an example, and the devices that have parts of it.

    If only the shapes are used, mapped axes need not be bound.
    """
    _check_epsilon(layer.epsilon)
    x, (reduced, feature) = _as_inexact(x, dtype), axes
    a = check_arguments(
        x,
        params,
        feature=feature,
        reduced=reduced,
        eps=layer.epsilon,
        eps_name="epsilon",
        mask=full_rank_mask(mask, x),
        dtype=dtype,
        cure=WITHOUT_STATE,
    )
    return a, _devices(layer, only_shapes)


def _devices(layer: NormLayer, only_shapes: bool) -> DeviceGroups | None:
    return None if only_shapes else resolve_devices(layer.axis_name, layer.axis_index_groups)


def full_rank_mask(mask: ArrayLike | None, x: jax.Array) -> jax.Array | None:
    """Returns a mask of the rank of x, given one of Flax's: of any dtype, and broadcast from the right at any rank."""
    if mask is None:
        return None
    mask = jnp.asarray(mask, bool)
    aligned = (1,) * (x.ndim - mask.ndim) + mask.shape
    if len(aligned) != x.ndim or any(m not in (1, n) for m, n in zip(aligned, x.shape, strict=True)):
        raise ValueError(
            f"mask: expected a shape that broadcasts, from the right as in NumPy, to x with shape {x.shape}, "
            f"got shape {mask.shape}; write mask[..., None] for one that has no feature axis"
        )
    return mask.reshape(aligned)
