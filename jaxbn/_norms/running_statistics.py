"""Running statistics: the update with measured moments, and synchronization across devices."""

from __future__ import annotations

import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._kernel import inputs
from jaxbn._kernel.devices import AxisName, DeviceGroups, all_devices
from jaxbn._kernel.explicit_mesh import shard_as
from jaxbn._kernel.moments import Moments, broadcast_fields
from jaxbn._norms.state import BatchNormState, check_array, cure_of_restored


def batch_norm_update(
    state: BatchNormState,
    moments: Moments,
    *,
    momentum: float | jax.Array | None = 0.1,
    correction: float = 1,
) -> BatchNormState:
    """Updates the running statistics with measured moments, as one batch.

    Formula: that of `batch_norm_train`. For moments that were merged from several microbatches, or measured
    in a layer of your own.

    Args:
      state: the running statistics.
      moments: of the new batch, biased variance; shape [C], and fields that are the same for all channels
        may be numbers.
      momentum: weight of the new batch, in [0, 1], one for all channels; may be traced; None averages over
        all batches.
      correction: subtracted from the count for the stored variance: 1 unbiased, 0 biased.

    Returns:
      The new state, in the dtypes of the old. A channel whose `moments.count` is 0 does not change, and
      one where it is 1 keeps its variance. The batch is counted if any channel has a value.

    Raises:
      ValueError: the shapes differ, or `momentum` or `correction` is out of range.
      TypeError: `state` or `moments` is of another type, `state` has lists or None for arrays, or `momentum`
        is not a number.

    Source: torch.nn.modules.batchnorm (`momentum`, `num_batches_tracked`).

    Example:
      >>> import jax.numpy as jnp, jaxbn
      >>> _, state = jaxbn.batch_norm_init(1)
      >>> halves = jaxbn.moments(jnp.array([[1.0]])).merge(jaxbn.moments(jnp.array([[3.0]])))
      >>> state = jaxbn.batch_norm_update(state, halves, momentum=None)
      >>> state.mean.tolist(), state.var.tolist()
      ([2.0], [2.0])
    """
    if not isinstance(state, BatchNormState):
        cure = cure_of_restored("state", state, BatchNormState) or "jaxbn.batch_norm_init returns it"
        raise TypeError(f"state: expected jaxbn.BatchNormState, got {type(state).__name__}; {cure}")
    if not isinstance(moments, Moments):
        raise TypeError(f"moments: expected jaxbn.Moments, got {type(moments).__name__}; jaxbn.moments returns them")
    check_array("state.mean", state.mean)
    check_array("state.var", state.var)
    correction = check_update(state, momentum, correction)
    if jnp.shape(state.var) != jnp.shape(state.mean):
        raise ValueError(
            f"state.var: expected shape {jnp.shape(state.mean)}, that of the running mean, "
            f"got shape {jnp.shape(state.var)}; jaxbn.batch_norm_init returns both alike"
        )
    if jnp.shape(moments.mean) != jnp.shape(state.mean):
        raise ValueError(
            f"moments: expected shape {jnp.shape(state.mean)}, that of the running mean, "
            f"got shape {jnp.shape(moments.mean)}; measure them along the same feature axes"
        )
    measured = jax.lax.stop_gradient(broadcast_fields(moments))
    new: BatchNormState = update(state, measured, momentum, correction=correction, average=None)
    return new


@functools.partial(jax.jit, static_argnames=("correction", "average"), inline=True)
def update(
    state: BatchNormState,
    new: Moments,
    momentum: float | jax.Array | None,
    *,
    correction: float,
    average: DeviceGroups | None,
) -> BatchNormState:
    """`batch_norm_update` with the mean of several moments: along their leading axes, and over groups of devices."""
    dtype = new.mean.dtype
    parts = tuple(range(new.mean.ndim - state.mean.ndim))
    count = shard_as(new.count, new.mean)
    has_mean, has_var = count > 0, count > max(correction, 1)
    var = new.var * (count / jnp.where(has_var, count - correction, 1))
    fields = (
        jnp.where(has_mean, new.mean, 0),
        has_mean.astype(dtype),
        jnp.where(has_var, var, 0),
        has_var.astype(dtype),
    )
    sums = jnp.stack([jnp.sum(v, parts) for v in fields])
    if average is not None:
        sums = average.sum_over_groups(sums)
    mean_sum, mean_number, var_sum, var_number = sums

    seen = state.num_batches_tracked + jnp.any(mean_number > 0).astype(state.num_batches_tracked.dtype)
    weight = 1 / jnp.maximum(seen, 1).astype(dtype) if momentum is None else jnp.asarray(momentum, dtype)

    def mix(old: jax.Array, total: jax.Array, number: jax.Array) -> jax.Array:
        total, number = shard_as(total, old), shard_as(number, old)
        value, kept = total / jnp.maximum(number, 1), old.astype(dtype)
        # The rounded weights 1 - w and w do not sum to 1, an error that adds up over a million batches. So a fraction
        # of the difference is added to the nearer of the two values. With weight 1 the result is the new value.
        step = value - kept
        mixed = jnp.where(weight < 0.5, kept + step * weight, value - step * (1 - weight))
        # The difference of infinities is NaN.
        mixed = jnp.where(jnp.isfinite(step), mixed, (1 - weight) * kept + weight * value)
        return jnp.where(number > 0, mixed.astype(old.dtype), old)

    return BatchNormState(mix(state.mean, mean_sum, mean_number), mix(state.var, var_sum, var_number), seen)


def sync_state(state: Any, axis_name: AxisName) -> Any:
    """Returns running statistics that are the same on all devices, given those that each device has tracked.

    Call it within the mapped function, before evaluation or a checkpoint, after training without
    `axis_name`. With `axis_name` the states of devices are always the same.

    Formula: the mean over devices of their running means and of their running variances. As both are
    linear in the batches' statistics, that is the state of training with virtual batches of one device's
    size. A `BatchNormState` that has seen no batch gets no weight. `num_batches_tracked` is the largest.

    Args:
      state: a `BatchNormState`, or any tree of them and of other arrays: Linen's `batch_stats`, or an
        NNX state. Floating-point arrays become their mean over devices; integers become their maximum, an
        `nnx.RngCount` too, so that no device draws the same random numbers twice; typed PRNG keys, which
        have no mean or maximum, stay as they are.
      axis_name: name of the mapped axis, or several.

    Returns:
      A tree like `state`, the same on all devices except for keys.

    Raises:
      ValueError: `axis_name` is not bound.

    Source: torch.nn.parallel.DistributedDataParallel (which takes the first device's buffers instead).

    Example:
      >>> import jax, jax.numpy as jnp, jaxbn
      >>> _, state = jaxbn.batch_norm_init(1)
      >>> x = jnp.array([[[1.0], [3.0]], [[5.0], [7.0]]])
      >>> def per_device(x):
      ...     _, tracked = jaxbn.batch_norm_train(x, None, state, momentum=None)
      ...     return jaxbn.sync_state(tracked, "devices")
      >>> jax.vmap(per_device, axis_name="devices")(x).mean.tolist()
      [[4.0], [4.0]]
    """
    names = all_devices(axis_name).names

    def sync(leaf: Any) -> Any:
        if isinstance(leaf, BatchNormState):
            tracked = sync(leaf.num_batches_tracked)
            # A device that has seen no batch gets no weight, unless none has seen any.
            weight = ((leaf.num_batches_tracked > 0) | (tracked == 0)).astype(leaf.mean.dtype)
            mean, var = (jax.lax.psum(v * weight, names) / jax.lax.psum(weight, names) for v in leaf[:2])
            return BatchNormState(mean, var, tracked)
        dtype = jnp.asarray(leaf).dtype
        if jnp.issubdtype(dtype, jax.dtypes.extended):
            return leaf
        return jax.lax.pmean(leaf, names) if jnp.issubdtype(dtype, jnp.inexact) else jax.lax.pmax(leaf, names)

    return jax.tree.map(sync, state, is_leaf=lambda v: isinstance(v, BatchNormState))


def check_update(state: BatchNormState | None, momentum: float | jax.Array | None, correction: float) -> float:
    """Raises if the arguments of the update are invalid; returns `correction` as a Python float."""
    count: Any = 0 if state is None else state.num_batches_tracked
    if count is None:
        raise TypeError("state.num_batches_tracked: expected an integer, got None; it is 0 before any batch")
    value: Any
    for name, value in (("state.num_batches_tracked", count), ("momentum", momentum)):
        if np.shape(value) != ():
            raise ValueError(
                f"{name}: expected one number for all channels, got shape {np.shape(value)}; several states, each with "
                "its own, go through jax.vmap"
            )
    if momentum is not None and not inputs.is_real(momentum):
        raise TypeError(
            f"momentum: expected a number or None, got {type(momentum).__name__}; "
            "0.1 is usual, and None averages over all batches"
        )
    if isinstance(momentum, numbers.Real) and not 0 <= float(momentum) <= 1:
        raise ValueError(
            f"momentum: expected the weight of the new batch, between 0 and 1, got {momentum}; "
            "0.1 is usual, and None averages over all batches"
        )
    return check_correction(correction)


def check_correction(correction: float) -> float:
    if not isinstance(correction, numbers.Real) or not 0 <= float(correction) < math.inf:
        raise ValueError(
            f"correction: expected a finite number of at least 0, got {correction}; "
            "1 stores the unbiased variance (PyTorch), 0 the biased one (Flax)"
        )
    return float(correction)
