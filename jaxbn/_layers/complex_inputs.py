"""Complex x in the layers, as in Flax: the mean is complex, and the variance is the mean of |x - mean|**2.

The kernel gets the real and the imaginary part, stacked along a leading axis. Their variances are added before they
are used.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._kernel import inputs
from jaxbn._kernel.moments import Moments
from jaxbn._norms.batch_norm import TrainOptions, batch_norm_eval, train
from jaxbn._norms.state import AffineParams, BatchNormState


def real_and_imaginary(v: jax.Array) -> jax.Array:
    """Returns the two parts of `v`, stacked along a new leading axis."""
    return jnp.stack([jnp.real(v), jnp.imag(v)])


def axes_of_parts(axes: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the axes of the stacked parts that are `axes` of x."""
    return tuple(a + 1 for a in axes)


def join_parts(y: jax.Array, params: AffineParams, feature: tuple[int, ...], dtype: Any) -> jax.Array:
    """Returns complex y, given its parts, times scale plus bias, which may be complex."""
    if not jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"dtype: expected a complex dtype for complex x, got {jnp.dtype(dtype)}; leave it out")
    joined: jax.Array = jax.lax.complex(y[0], y[1])
    others = inputs.other_axes(joined.ndim, feature)
    scale, bias = (None if v is None else jnp.expand_dims(v, others).astype(joined.dtype) for v in params)
    joined = joined if scale is None else joined * scale
    joined = joined if bias is None else joined + bias
    return joined.astype(dtype)


def _common_std(
    m: Moments, eps: float, scale: jax.Array | None, bias: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """The scale with which the kernel divides each part by the standard deviation of complex x."""
    var, total = m.var + eps, jnp.sum(m.var, 0, keepdims=True) + eps
    # With eps=0 a part that does not vary is 0 already.
    varies = var > 0
    return jnp.sqrt(jnp.where(varies, var, 1) / jnp.where(varies, total, 1)), None


COMMON_STD = jax.tree_util.Partial(_common_std)


def complex_state(state: BatchNormState) -> BatchNormState:
    """Returns `state` with a complex mean; that of a new layer is real."""
    if jnp.iscomplexobj(state.mean):
        return state
    mean = state.mean.astype(inputs.statistics_dtype(state.mean.dtype))
    return state._replace(mean=jax.lax.complex(mean, jnp.zeros_like(mean)))


def complex_train(
    x: jax.Array, params: AffineParams, state: BatchNormState, options: TrainOptions
) -> tuple[jax.Array, BatchNormState]:
    """`batch_norm_train` for complex x, with a complex `state.mean` and a mask of the rank of x."""
    feature, mask = inputs.resolve_axes(x.ndim, options.axis), options.mask
    # Each part updates a variance of its own. The update is linear, so their sum is the update of the sum.
    state_of_parts = BatchNormState(
        real_and_imaginary(state.mean), jnp.stack([state.var, state.var]) / 2, state.num_batches_tracked
    )
    of_parts = dataclasses.replace(
        options, axis=(0, *axes_of_parts(feature)), mask=None if mask is None else jnp.asarray(mask)[None], dtype=None
    )
    y, new = train(real_and_imaginary(x), None, state_of_parts, of_parts, lambda *_: COMMON_STD)
    assert new is not None
    mean: jax.Array = jax.lax.complex(new.mean[0], new.mean[1])
    new_state = BatchNormState(mean, jnp.sum(new.var, 0), new.num_batches_tracked)
    return join_parts(y, params, feature, options.dtype), new_state


def complex_eval(
    x: jax.Array,
    params: AffineParams,
    state: BatchNormState,
    *,
    axis: inputs.Axis,
    mask: jax.Array | None,
    dtype: Any,
    eps: float,
) -> tuple[jax.Array, BatchNormState]:
    """`batch_norm_eval` in the same way."""
    feature = inputs.resolve_axes(x.ndim, axis)
    state_of_parts = BatchNormState(
        real_and_imaginary(state.mean), jnp.stack([state.var, state.var]), state.num_batches_tracked
    )
    keep = None if mask is None else mask[None]
    y, _ = batch_norm_eval(
        real_and_imaginary(x), None, state_of_parts, axis=(0, *axes_of_parts(feature)), eps=eps, mask=keep
    )
    return join_parts(y, params, feature, dtype), state
