"""Parameters and state: initialization, the update of running statistics, and synchronization across devices."""

from __future__ import annotations

import functools
import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._kernel import inputs
from jaxbn._kernel.devices import AxisName, DeviceGroups, all_devices
from jaxbn._kernel.explicit_mesh import shard_as
from jaxbn._kernel.moments import Moments, broadcast_fields


class BatchNormParams(NamedTuple):
    """The learned parameters. Each may be None: then there is no factor, or no shift.

    Attributes:
      scale: factor per channel (PyTorch: `weight`, the paper: gamma); floating point, shape [C].
      bias: shift per channel (the paper: beta); floating point, shape [C].

    Example:
      >>> import jax.numpy as jnp, jaxbn
      >>> jaxbn.BatchNormParams(scale=None, bias=jnp.zeros(3)).bias.shape
      (3,)
    """

    scale: jax.Array | None = None
    bias: jax.Array | None = None


class BatchNormState(NamedTuple):
    """The running statistics of the batches seen in training. They have no gradient.

    Attributes:
      mean: running mean; float32, shape [C].
      var: running variance, unbiased unless `correction` says otherwise; float32, shape [C].
      num_batches_tracked: the number of batches seen; int32, shape [].

    Example:
      >>> import jaxbn
      >>> _, state = jaxbn.batch_norm_init(2)
      >>> state.mean.tolist(), state.var.tolist(), int(state.num_batches_tracked)
      ([0.0, 0.0], [1.0, 1.0], 0)
    """

    mean: jax.Array
    var: jax.Array
    num_batches_tracked: jax.Array


def batch_norm_init(
    num_features: int | tuple[int, ...],
    *,
    affine: bool = True,
    track_running_stats: bool = True,
    param_dtype: Any = jnp.float32,
) -> tuple[BatchNormParams | None, BatchNormState | None]:
    """Returns initial parameters (scale 1, bias 0) and state (mean 0, variance 1, no batch seen).

    Args:
      num_features: the number of channels C; with several feature axes their sizes, in ascending
        order of axis.
      affine: False gives None for the parameters: normalize only.
      track_running_stats: False gives None for the state: evaluate with the batch's own moments.
      param_dtype: floating-point dtype of scale and bias. The state is float32 (float64 if
        `param_dtype` is), since small updates of running statistics are lost in half precision.

    Raises:
      ValueError: a number of features is below 1.
      TypeError: `num_features` is not an integer or a tuple of them, or `param_dtype` is not
        floating point.

    Source: torch.nn.BatchNorm2d (`affine`, `track_running_stats`).

    Example:
      >>> import jaxbn
      >>> params, state = jaxbn.batch_norm_init(3)
      >>> params.scale.shape, state.var.shape
      ((3,), (3,))
      >>> jaxbn.batch_norm_init(3, affine=False, track_running_stats=False)
      (None, None)
    """
    shape = _check_features(num_features, param_dtype)
    params = affine_init(shape, param_dtype=param_dtype) if affine else None
    state = None
    if track_running_stats:
        dtype = inputs.statistics_dtype(jnp.dtype(param_dtype))
        state = BatchNormState(jnp.zeros(shape, dtype), jnp.ones(shape, dtype), jnp.zeros((), jnp.int32))
    return params, state


def affine_init(
    num_features: int | tuple[int, ...], *, scale: bool = True, bias: bool = True, param_dtype: Any = jnp.float32
) -> BatchNormParams:
    """Returns initial parameters for any norm: scale 1 and bias 0.

    Args:
      num_features: the number of channels C; for `layer_norm` over several axes their sizes, in
        ascending order of axis.
      scale, bias: False gives None; `rms_norm` usually has no bias.
      param_dtype: floating-point dtype of both.

    Raises:
      ValueError, TypeError: as `batch_norm_init`.

    Source: torch.nn.LayerNorm, torch.nn.RMSNorm, torch.nn.GroupNorm (`reset_parameters`).

    Example:
      >>> import jaxbn
      >>> jaxbn.affine_init(2, bias=False).scale.tolist()
      [1.0, 1.0]
    """
    shape = _check_features(num_features, param_dtype)
    return BatchNormParams(
        jnp.ones(shape, param_dtype) if scale else None, jnp.zeros(shape, param_dtype) if bias else None
    )


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
    for name, value, kind in (("state", state, BatchNormState), ("moments", moments, Moments)):
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected jaxbn.{kind.__name__}, got {type(value).__name__}")
    _check_array("state.mean", state.mean)
    _check_array("state.var", state.var)
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


def expand_params(
    params: BatchNormParams | None, x: jax.Array, others: tuple[int, ...]
) -> tuple[jax.Array | None, jax.Array | None]:
    """Returns scale and bias with the rank of `x`, size 1 on the axes that are not feature axes."""
    _check_kind("params", params, BatchNormParams)
    for name, value in zip(BatchNormParams._fields, params or (), strict=False):
        if value is not None:
            _check_array(f"params.{name}", value)
            inputs.check_feature_array(f"params.{name}", value, x, others)
    scale, bias = (None if v is None else jnp.expand_dims(jnp.asarray(v), others) for v in params or (None, None))
    return scale, bias


def check_state(state: BatchNormState | None, x: jax.Array, others: tuple[int, ...]) -> None:
    _check_kind("state", state, BatchNormState)
    if state is not None:
        for name, value in (("state.mean", state.mean), ("state.var", state.var)):
            _check_array(name, value)
            inputs.check_feature_array(name, value, x, others)


def _check_kind(name: str, value: object, kind: type[BatchNormParams | BatchNormState]) -> None:
    if value is not None and not isinstance(value, kind):
        raise TypeError(
            f"{name}: expected jaxbn.{kind.__name__} or None, got {type(value).__name__}; "
            "the arguments are x, params, state, as jaxbn.batch_norm_init returns them"
        )


def _check_features(num_features: int | tuple[int, ...], param_dtype: Any) -> tuple[int, ...]:
    shape = tuple(num_features) if isinstance(num_features, tuple | list) else (num_features,)
    if not all(isinstance(n, numbers.Integral) for n in shape):
        raise TypeError(f"num_features: expected an integer or a tuple of integers, got {num_features!r}")
    if not all(n >= 1 for n in shape):
        raise ValueError(f"num_features: expected at least 1 channel, got {num_features}")
    if not jnp.issubdtype(param_dtype, jnp.floating):
        raise TypeError(f"param_dtype: expected a floating-point dtype, got {jnp.dtype(param_dtype)}; use float32")
    return shape


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


def _check_array(name: str, value: object) -> None:
    if not hasattr(value, "shape"):
        raise TypeError(f"{name}: expected an array, got {type(value).__name__}; convert it with jnp.asarray")


def check_correction(correction: float) -> float:
    if not isinstance(correction, numbers.Real) or not 0 <= float(correction) < math.inf:
        raise ValueError(
            f"correction: expected a finite number of at least 0, got {correction}; "
            "1 stores the unbiased variance (PyTorch), 0 the biased one (Flax)"
        )
    return float(correction)
