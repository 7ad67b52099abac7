"""Batch normalization as pure functions of x, parameters and state."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxbn._kernel.devices import AxisName, DeviceGroups, Groups, resolve_devices
from jaxbn._kernel.inputs import sizes, statistics_dtype
from jaxbn._kernel.normalize import normalize, normalize_with_moments
from jaxbn._kernel.reduction import Reduction
from jaxbn._norms.arguments import Arguments, Axis, as_float_array, check_arguments, resolve_axes
from jaxbn._norms.running_statistics import check_correction, check_counter, check_momentum, update
from jaxbn._norms.state import AffineParams, BatchNormState, State
from jaxbn._norms.virtual_batches import AdjustFor, VirtualBatches, form_virtual_batches, normalize_parts


def batch_norm_train(
    x: ArrayLike,
    params: AffineParams | None,
    state: State,
    *,
    axis: Axis = -1,
    momentum: float | jax.Array | None = 0.1,
    eps: float = 1e-5,
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Groups | None = None,
    virtual_batch_size: int | None = None,
    correction: float = 1,
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, State]:
    """Normalizes `x` by the moments of this batch, and updates the running statistics with them.

    Formula, per channel over all other axes:
    `y = (x - mean(x)) / sqrt(var(x) + eps) * scale + bias` with the biased variance, and
    `state.mean = (1 - momentum) * state.mean + momentum * mean(x)`,
    `state.var = (1 - momentum) * state.var + momentum * var(x) * n / (n - correction)`.
    Gradients pass through the moments of the batch; the state has none.

    Args:
      x: floating-point array of any rank, in which each channel has at least two values.
      params: scale and bias, or None for neither.
      state: the running statistics, or None to track nothing.
      axis: the axis, or axes, of the channels. The default is JAX's channels last; for PyTorch's
        [N, C, ...] pass 1.
      momentum: weight of the *new* batch (PyTorch's meaning; Flax's decay is `1 - momentum`), one for
        all channels; may be traced; None averages over all batches seen, with equal weights.
      eps: added to the variance.
      mask: boolean, True counts; broadcastable, rank for rank, to `x` without its feature axes or
        to all of `x`. Masked values enter no statistic, and NaN among them no gradient; their own
        output is normalized like the rest. A channel in which no value counts does not change in the
        state, and one with a single value keeps its variance.
      axis_name: name of the mapped axis (jax.shard_map, jax.pmap, jax.vmap), or several, whose
        devices share statistics: those of the union of their batches, with equal weight for each value.
        Under jax.jit alone statistics of a sharded batch are global without it.
      axis_index_groups: sets of device numbers along `axis_name`; each set shares statistics and has
        a state of its own.
      virtual_batch_size: how many examples, along the first axis that is not a feature axis, share
        statistics, on one device or on several. The batch is cut in order, the last part may be
        smaller, and the running statistics take the mean of the parts' means and variances. With
        `axis_name` it must divide or be a multiple of the examples on each device.
      correction: subtracted from the count for the *stored* variance: 1 as PyTorch, 0 as Flax.
      dtype: of y; that of `x` by default. Statistics are float32 at least (float64 for float64).

    Returns:
      `(y, new_state)`; y has the shape of `x`, and `new_state` is None if `state` is.

    Raises:
      ValueError: a channel of `x` has one value only; `axis` out of range; `params`, `state` or
        `mask` do not fit `x`; `momentum` outside [0, 1] or `eps` negative; `axis_name` not bound;
        devices that cannot form the groups or the virtual batches.
      TypeError: `x` is not floating point, `mask` not boolean, `momentum` not a number; device numbers in
        `axis_index_groups` are not integers; `params` or `state` is of another type, or has lists for arrays.

    Source: Ioffe & Szegedy (2015), Batch Normalization, arXiv:1502.03167, algorithm 1;
    torch.nn.functional.batch_norm with `training=True`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbn
      >>> params, state = jaxbn.batch_norm_init(2)
      >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
      >>> y, state = jax.jit(jaxbn.batch_norm_train)(x, params, state)
      >>> y.round(3).tolist(), state.mean.tolist()
      ([[-1.0, -1.0], [1.0, 1.0]], [0.20000000298023224, 2.0])
    """
    x = as_float_array(x)
    a = check_arguments(x, params, state, feature=resolve_axes(x.ndim, axis), eps=eps, mask=mask, dtype=dtype)
    check_momentum(momentum)
    return train_batch(
        a,
        state,
        momentum=momentum,
        correction=correction,
        devices=resolve_devices(axis_name, axis_index_groups),
        virtual_batch_size=virtual_batch_size,
    )


def batch_norm_eval(
    x: ArrayLike,
    params: AffineParams | None,
    state: State,
    *,
    axis: Axis = -1,
    eps: float = 1e-5,
    mask: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, State]:
    """Normalizes `x` by the running statistics, so that an example's output does not depend on the others.

    Formula: `y = (x - state.mean) / sqrt(state.var + eps) * scale + bias`. With `state=None` there
    are no running statistics, and the moments of `x` itself are used, as in training.

    Args:
      x: floating-point array of any rank; with a state a batch of one, or of none, is enough.
      params: scale and bias, or None for neither.
      state: running statistics, which carry no gradient; or None.
      axis: the axis, or axes, of the channels.
      eps: added to the variance; the same as in training.
      mask: as in `batch_norm_train`. It decides what enters the moments if `state` is None; in
        any case NaN or infinity among masked values does not reach outputs or gradients.
      dtype: of y; that of `x` by default.

    Returns:
      `(y, state)`, with the state that was passed.

    Raises:
      ValueError, TypeError: as `batch_norm_train`; one value per channel is an error only without
        a state.

    Source: Ioffe & Szegedy (2015), arXiv:1502.03167, algorithm 2; torch.nn.functional.batch_norm
    with `training=False`, or with no running statistics.

    Example:
      >>> import jax.numpy as jnp, jaxbn
      >>> params, state = jaxbn.batch_norm_init(2)
      >>> state = state._replace(mean=jnp.array([1.0, 2.0]), var=jnp.array([4.0, 9.0]))
      >>> y, _ = jaxbn.batch_norm_eval(jnp.array([[3.0, 5.0]]), params, state, eps=0.0)
      >>> y.round(5).tolist()
      [[1.0, 1.0]]
    """
    if state is None:
        return batch_norm_train(x, params, state, axis=axis, eps=eps, mask=mask, dtype=dtype)
    x = as_float_array(x)
    a = check_arguments(x, params, state, feature=resolve_axes(x.ndim, axis), eps=eps, mask=mask, dtype=dtype)
    return evaluate_batch(a, state), state


def evaluate_batch(a: Arguments, state: BatchNormState) -> jax.Array:
    """`batch_norm_eval` of checked arguments."""
    mean, var = (jnp.asarray(v).astype(statistics_dtype(a.x.dtype)) for v in (state.mean, state.var))
    return normalize_with_moments(a.x, mean, var, a.scale, a.bias, a.mask, feature=a.feature, eps=a.eps, dtype=a.dtype)


def train_batch(
    a: Arguments,
    state: State,
    *,
    momentum: float | jax.Array | None,
    correction: float,
    devices: DeviceGroups | None,
    virtual_batch_size: int | None,
    adjust_for: AdjustFor | None = None,
) -> tuple[jax.Array, State]:
    """`batch_norm_train` of checked arguments, in which the kernel adjusts scale and bias if there is `adjust_for`."""
    # All arguments are checked before anything is computed, including those that only the update uses.
    check_counter(state)
    correction = check_correction(correction)
    batches = VirtualBatches(None, devices, None)
    if virtual_batch_size is not None:
        batches = form_virtual_batches(a, virtual_batch_size, devices)
    if batches.split is not None:
        y, moments, count = normalize_parts(a, batches.split, adjust_for)
    else:
        _check_values(a, batches.devices)
        reduction = Reduction(a.reduced, batches.devices)
        adjust = None if adjust_for is None else adjust_for(a.reduced)
        y, moments = normalize(
            a.x, a.scale, a.bias, a.mask, adjust, reduction=reduction, feature=a.feature, eps=a.eps, dtype=a.dtype
        )
        moments = moments.map(functools.partial(jnp.squeeze, axis=a.reduced))
        count = reduction.count(a.x) if a.mask is None else None
    return y, update(state, moments, momentum, count, correction=correction, average=batches.average)


def _check_values(a: Arguments, devices: DeviceGroups | None) -> None:
    values = math.prod(sizes(a.x, a.reduced)) * (1 if devices is None else devices.smallest)
    if values == 1:
        raise ValueError(
            f"x: expected more than 1 value per channel to take batch statistics over, got shape {a.x.shape}, "
            f"1 value for each of {math.prod(sizes(a.x, a.feature))} channels, whose normalized value would always be "
            "0; use a larger batch, or normalize by running statistics (batch_norm_eval; use_running_average=True in a "
            "layer)"
        )
