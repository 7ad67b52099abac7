"""Converts the options of Flax's layers to those of the functions, and calls these."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._kernel import inputs
from jaxbn._kernel.devices import resolve_devices
from jaxbn._norms.batch_norm import TrainOptions, batch_norm_eval, train
from jaxbn._norms.batch_renorm import renorm_train
from jaxbn._norms.domains import put_domain, take_domain
from jaxbn._norms.sample_norms import SampleNorm, normalize_samples
from jaxbn._norms.state import AffineParams, BatchNormState

# Limits of batch renormalization: (r_max, d_max), or a function that returns them for the number of batches tracked.
Limits = tuple[float, float] | Callable[[jax.Array], tuple[float | jax.Array, float | jax.Array]]


def check_call(layer: Any, x: jax.Array) -> tuple[jax.Array, tuple[int, ...]]:
    """Returns `x` and the sizes of its feature axes; errors use Flax's names of options."""
    _check_epsilon(layer.epsilon)
    if layer.momentum is not None and not inputs.is_real(layer.momentum):
        raise TypeError(
            f"momentum: expected a number or None, got {type(layer.momentum).__name__}; "
            "0.9 is PyTorch's 0.1, and None averages over all batches"
        )
    if isinstance(layer.momentum, numbers.Real) and not 0 <= float(layer.momentum) <= 1:
        raise ValueError(
            f"momentum: expected the decay of the running statistics, between 0 and 1, got {layer.momentum}; "
            "0.9 is PyTorch's 0.1, and None averages over all batches"
        )
    return x, inputs.sizes(x, inputs.resolve_axes(x.ndim, layer.axis))


def check_mode(use_running_average: object) -> bool:
    """Returns whether to evaluate. In Linen a number of features, given as in PyTorch, would be taken for the mode."""
    value: Any = use_running_average
    if np.shape(value) == () and not isinstance(value, jax.core.Tracer) and value in (False, True):
        return bool(value)
    raise TypeError(
        "use_running_average: expected True to evaluate or False to train, fixed when the function is traced (by "
        f"functools.partial or static_argnames), got {type(value).__name__}; a Linen layer takes the number of "
        "features from x, and a mask is passed as mask=..."
    )


def check_complex(layer: Any, x: jax.Array, domain: object) -> None:
    """Raises if Flax's layer, which normalizes complex x, would ignore an option of `layer`."""
    added = {
        "momentum=None": layer.momentum is None,
        "correction": layer.correction != 0,
        "virtual_batch_size": layer.virtual_batch_size is not None,
        "num_domains": layer.num_domains is not None,
        "domain": domain is not None,
        "limits": layer._renorm_limits is not None,
    }
    used = [name for name, is_used in added.items() if is_used]
    if used:
        raise TypeError(
            f"x: expected an array of real numbers with {', '.join(used)}, got {x.dtype}; complex x is normalized by "
            "Flax's layer, which has no such option: leave it out, or normalize x.real and x.imag"
        )


def _check_epsilon(epsilon: float) -> float:
    if isinstance(epsilon, int) and epsilon >= 1:
        raise ValueError(
            f"epsilon: expected a small number, such as 1e-5, got {epsilon}; "
            "a Linen layer takes the number of features from x"
        )
    return inputs.check_eps(epsilon, "epsilon")


def as_number_array(x: object) -> jax.Array:
    """Returns `x` as an array. Integers and booleans, which Flax's layers take too, enter the dtype of the result."""
    array = jnp.asarray(x) if hasattr(x, "shape") else None
    if array is not None and (jnp.issubdtype(array.dtype, jnp.integer) or array.dtype == jnp.bool_):
        return array
    return inputs.as_inexact_array(x)


def _as_inexact(x: jax.Array, dtype: Any) -> jax.Array:
    """Returns `x`, if integers as floating-point numbers; `dtype` is that of the result."""
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(inputs.statistics_dtype(jnp.dtype(dtype)))


def domain_axes(num_domains: int | None) -> tuple[int, ...]:
    """Returns the leading axes of arrays of which a layer has one for each domain."""
    if num_domains is None:
        return ()
    if not isinstance(num_domains, numbers.Integral) or num_domains < 1:
        raise ValueError(f"num_domains: expected a number of domains, at least 1, or None, got {num_domains}")
    return (int(num_domains),)


def as_layer_norm(layer: Any, x: jax.Array, *, about_zero: bool = False) -> SampleNorm:
    return SampleNorm(
        inputs.resolve_axes(x.ndim, layer.reduction_axes, "reduction_axes"),
        inputs.resolve_axes(x.ndim, layer.feature_axes, "feature_axes"),
        about_zero=about_zero,
    )


def as_group_norm(layer: Any, x: jax.Array, num_groups: int) -> SampleNorm:
    last = x.ndim - 1
    if layer.reduction_axes is None:
        reduced: tuple[int, ...] = tuple(range(1, x.ndim))
    else:
        reduced = inputs.resolve_axes(x.ndim, layer.reduction_axes, "reduction_axes")
    if last not in reduced:
        raise ValueError(
            f"reduction_axes: expected the last axis among them, which holds the channels, got {layer.reduction_axes} "
            f"for x with shape {x.shape}"
        )
    return SampleNorm(reduced[:-1], (last,), num_groups=num_groups, more_than_one=True)


def as_instance_norm(layer: Any, x: jax.Array) -> SampleNorm:
    feature = inputs.resolve_axes(x.ndim, layer.feature_axes, "feature_axes")
    if 0 in feature:
        raise ValueError(
            f"feature_axes: expected axes other than the first, along which examples lie, got {layer.feature_axes} "
            f"for x with shape {x.shape}"
        )
    return SampleNorm(inputs.other_axes(x.ndim, (0, *feature)), feature, more_than_one=True)


def batch_norm(
    layer: Any,
    x: jax.Array,
    params: AffineParams,
    state: BatchNormState,
    *,
    evaluate: bool,
    only_shapes: bool,
    mask: jax.Array | None,
    domain: int | jax.Array | None,
    limits: Limits | None,
    dtype: Any,
) -> tuple[jax.Array, BatchNormState]:
    """Calls the function of a batch norm layer.

    If only the shapes are used, one value per channel is enough, and mapped axes need not be bound.
    """
    x = _as_inexact(x, dtype)
    all_states = state
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
    if evaluate or (only_shapes and x.size == state.mean.size):
        y, _ = batch_norm_eval(x, params, state, axis=layer.axis, eps=layer.epsilon, mask=mask, dtype=dtype)
        return y, all_states
    options = TrainOptions(
        axis=layer.axis,
        momentum=None if layer.momentum is None else 1 - layer.momentum,
        eps=layer.epsilon,
        mask=mask,
        axis_name=None if only_shapes else layer.axis_name,
        axis_index_groups=None if only_shapes else layer.axis_index_groups,
        virtual_batch_size=layer.virtual_batch_size,
        correction=layer.correction,
        dtype=dtype,
    )
    if limits is not None:
        r_max, d_max = limits(state.num_batches_tracked) if callable(limits) else limits
        y, new_state = renorm_train(x, params, state, options, r_max, d_max)
    else:
        y, new_state = train(x, params, state, options)
    return y, new_state if domain is None else put_domain(all_states, domain, new_state)


def sample_norm(
    layer: Any,
    x: jax.Array,
    params: AffineParams,
    norm: SampleNorm,
    *,
    only_shapes: bool,
    mask: jax.Array | None,
    dtype: Any,
) -> jax.Array:
    """Calls the function of a layer whose statistics are within an example; `only_shapes` as in `batch_norm`."""
    x, devices = _as_inexact(x, dtype), None
    if only_shapes:
        norm = dataclasses.replace(norm, more_than_one=False)
    else:
        devices = resolve_devices(layer.axis_name, layer.axis_index_groups)
    eps, mask = _check_epsilon(layer.epsilon), full_rank_mask(mask, x)
    return normalize_samples(x, params, norm, devices, eps=eps, mask=mask, dtype=dtype)[0]


def full_rank_mask(mask: jax.Array | None, x: jax.Array) -> jax.Array | None:
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
