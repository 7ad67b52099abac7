"""Complex x in the layers, as Flax has it: the mean is complex, and the variance is the mean of |x - mean|**2.

To the kernel that is two real parts along a leading axis, whose variances are added before they are used.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._kernel import inputs
from jaxbn._kernel.moments import Moments
from jaxbn._norms.batch_norm import TrainOptions, batch_norm_eval, train
from jaxbn._norms.state import BatchNormParams, BatchNormState


def parts(v: jax.Array) -> jax.Array:
    return jnp.stack([jnp.real(v), jnp.imag(v)])


def shifted(axes: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of x as those of its parts."""
    return tuple(a + 1 for a in axes)


def whole(y: jax.Array, params: BatchNormParams, feature: tuple[int, ...], dtype: Any) -> jax.Array:
    """Returns the parts of y as one, times scale plus bias, which may be complex."""
    if not jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"dtype: expected a complex dtype for complex x, got {jnp.dtype(dtype)}; leave it out")
    joined: jax.Array = jax.lax.complex(y[0], y[1])
    others = inputs.other_axes(joined.ndim, feature)
    scale, bias = (None if v is None else jnp.expand_dims(v, others).astype(joined.dtype) for v in params)
    joined = joined if scale is None else joined * scale
    joined = joined if bias is None else joined + bias
    return joined.astype(dtype)


def _by_both(
    m: Moments, eps: float, scale: jax.Array | None, bias: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """The scale that makes the kernel divide each part by the standard deviation of both."""
    own, both = m.var + eps, jnp.sum(m.var, 0, keepdims=True) + eps
    # Without eps a part that does not vary is 0 already.
    some = own > 0
    return jnp.sqrt(jnp.where(some, own, 1) / jnp.where(some, both, 1)), None


BY_BOTH = jax.tree_util.Partial(_by_both)


def complex_state(state: BatchNormState) -> BatchNormState:
    """`state`, whose mean is real in a fresh layer, with a mean that is complex."""
    if jnp.iscomplexobj(state.mean):
        return state
    mean = state.mean.astype(inputs.statistics_dtype(state.mean.dtype))
    return state._replace(mean=jax.lax.complex(mean, jnp.zeros_like(mean)))


def complex_train(
    x: jax.Array, params: BatchNormParams, state: BatchNormState, options: TrainOptions
) -> tuple[jax.Array, BatchNormState]:
    """`batch_norm_train` for complex x, with a complex `state.mean` and a mask of the rank of x."""
    feature, mask = inputs.resolve_axes(x.ndim, options.axis), options.mask
    # Each part enters with its own variance. The update is linear, so that their sum is the update of the sum.
    split = BatchNormState(parts(state.mean), jnp.stack([state.var, state.var]) / 2, state.num_batches_tracked)
    of_parts = dataclasses.replace(
        options, axis=(0, *shifted(feature)), mask=None if mask is None else mask[None], dtype=None
    )
    y, new = train(parts(x), None, split, of_parts, lambda *_: BY_BOTH)
    assert new is not None
    mean: jax.Array = jax.lax.complex(new.mean[0], new.mean[1])
    new_state = BatchNormState(mean, jnp.sum(new.var, 0), new.num_batches_tracked)
    return whole(y, params, feature, options.dtype), new_state


def complex_eval(
    x: jax.Array,
    params: BatchNormParams,
    state: BatchNormState,
    *,
    axis: inputs.Axis,
    mask: jax.Array | None,
    dtype: Any,
    eps: float,
) -> tuple[jax.Array, BatchNormState]:
    """`batch_norm_eval` in the same way."""
    feature = inputs.resolve_axes(x.ndim, axis)
    split = BatchNormState(parts(state.mean), jnp.stack([state.var, state.var]), state.num_batches_tracked)
    keep = None if mask is None else mask[None]
    y, _ = batch_norm_eval(parts(x), None, split, axis=(0, *shifted(feature)), eps=eps, mask=keep)
    return whole(y, params, feature, dtype), state
