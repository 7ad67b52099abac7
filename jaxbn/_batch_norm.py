"""Batch normalization as pure functions: parameters and state in, output and state out."""

from __future__ import annotations

import functools
import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn import _axes
from jaxbn._across import Across, AxisName, Groups, all_devices, find_across
from jaxbn._moments import Moments
from jaxbn._normalize import normalize, normalize_with
from jaxbn._virtual import Plan, make_plan


class BatchNormParams(NamedTuple):
    """What is learned. Either may be None: then there is no such factor, or no such shift.

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
    """What is remembered of the batches seen in training. It carries no gradient.

    Attributes:
      mean: running mean; float32, shape [C].
      var: running variance, unbiased unless `correction` says otherwise; float32, shape [C].
      num_batches_tracked: how many batches have entered; int32, shape [].

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
    """Returns fresh parameters (scale 1, bias 0) and state (mean 0, variance 1, no batch seen).

    Args:
      num_features: the number of channels C; with several feature axes their sizes, in ascending
        order of axis.
      affine: False gives None for the parameters: normalize only.
      track_running_stats: False gives None for the state: evaluate with the batch's own moments.
      param_dtype: floating-point dtype of scale and bias. The state is float32 (float64 if
        `param_dtype` is), since running statistics in half precision stop moving.

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
    shape = tuple(num_features) if isinstance(num_features, tuple | list) else (num_features,)
    if not all(isinstance(n, numbers.Integral) for n in shape):
        raise TypeError(f"num_features: expected an integer or a tuple of integers, got {num_features!r}")
    if not all(n >= 1 for n in shape):
        raise ValueError(f"num_features: expected at least 1 channel, got {num_features}")
    if not jnp.issubdtype(param_dtype, jnp.floating):
        raise TypeError(f"param_dtype: expected a floating-point dtype, got {jnp.dtype(param_dtype)}; use float32")
    params = state = None
    if affine:
        params = BatchNormParams(jnp.ones(shape, param_dtype), jnp.zeros(shape, param_dtype))
    if track_running_stats:
        dtype = _axes.statistics_dtype(jnp.dtype(param_dtype))
        state = BatchNormState(jnp.zeros(shape, dtype), jnp.ones(shape, dtype), jnp.zeros((), jnp.int32))
    return params, state


def batch_norm_train(
    x: jax.Array,
    params: BatchNormParams | None,
    state: BatchNormState | None,
    *,
    axis: _axes.Axis = -1,
    momentum: float | jax.Array | None = 0.1,
    eps: float = 1e-5,
    mask: jax.Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Groups | None = None,
    virtual_batch_size: int | None = None,
    correction: float = 1,
    dtype: Any = None,
) -> tuple[jax.Array, BatchNormState | None]:
    """Normalizes `x` by the moments of this batch, and lets them enter the running statistics.

    Formula, per channel over all other axes:
    `y = (x - mean(x)) / sqrt(var(x) + eps) * scale + bias` with the biased variance, and
    `state.mean = (1 - momentum) * state.mean + momentum * mean(x)`,
    `state.var = (1 - momentum) * state.var + momentum * var(x) * n / (n - correction)`.
    Gradients pass through the batch's moments, as they must; none enter the state.

    Args:
      x: floating-point array of any rank, in which each channel has at least two values.
      params: scale and bias, or None for neither.
      state: the running statistics, or None to track nothing.
      axis: the axis, or axes, of the channels. The default is JAX's channels last; for PyTorch's
        [N, C, ...] pass 1.
      momentum: weight of the *new* batch (PyTorch's meaning; Flax's decay is `1 - momentum`), may
        be traced; None averages over all batches seen, each with equal weight.
      eps: added to the variance.
      mask: boolean, True counts; broadcastable, rank for rank, to `x` without its feature axes or
        to all of `x`. What it hides enters no statistic and harms no gradient, NaN included; its
        own output is normalized like the rest. A channel in which nothing counts leaves the state
        as it was, and one with a single value leaves the variance.
      axis_name: name of the mapped axis (jax.shard_map, jax.pmap, jax.vmap), or several, whose
        devices share statistics: those of the union of their batches, each value weighing the same.
        Under jax.jit alone statistics of a sharded batch are global without it.
      axis_index_groups: sets of device numbers along `axis_name`; each set shares its own statistics,
        in its own state.
      virtual_batch_size: how many examples, along the first axis that is not a feature axis, share a
        statistic, whatever the devices they are on. The batch is cut in order, the last part may be
        smaller, and the running statistics take the mean over the parts' means and variances. With
        `axis_name` it must divide or be a multiple of the examples on each device.
      correction: subtracted from the count for the *stored* variance: 1 as PyTorch, 0 as Flax.
      dtype: of y; that of `x` by default. Statistics are float32 at least (float64 for float64).

    Returns:
      `(y, new_state)`; y has the shape of `x`, and `new_state` is None if `state` is.

    Raises:
      ValueError: a channel of `x` has one value only; `axis` out of range; `params`, `state` or
        `mask` do not fit `x`; `momentum` outside [0, 1] or `eps` negative; `axis_name` not bound;
        devices that cannot form the groups or the virtual batches.
      TypeError: `x` is not floating point, or `mask` not boolean.

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
    x = _axes.as_float_array(x)
    reduced = _axes.reduced_axes(x.ndim, axis)
    _check_state(state, x, reduced)
    # Checked before anything is computed, though only the update uses them.
    _check_momentum(momentum)
    _check_correction(correction)
    plan = make_plan(x, reduced, virtual_batch_size, find_across(axis_name, axis_index_groups))
    y, moments = _normalize_by_batch(x, params, reduced, plan, eps, mask, dtype)
    if state is None:
        return y, None
    new = _update(state, jax.lax.stop_gradient(moments), momentum, correction=correction, average=plan.average)
    return y, new


def batch_norm_eval(
    x: jax.Array,
    params: BatchNormParams | None,
    state: BatchNormState | None,
    *,
    axis: _axes.Axis = -1,
    eps: float = 1e-5,
    mask: jax.Array | None = None,
    dtype: Any = None,
) -> tuple[jax.Array, BatchNormState | None]:
    """Normalizes `x` by the running statistics, so that each example's output is its own.

    Formula: `y = (x - state.mean) / sqrt(state.var + eps) * scale + bias`. With `state=None` there
    are no running statistics, and the moments of `x` itself are used, as in training.

    Args:
      x: floating-point array of any rank; a batch of one, or of none, will do if there is a state.
      params: scale and bias, or None for neither.
      state: running statistics, which carry no gradient; or None.
      axis: the axis, or axes, of the channels.
      eps: added to the variance; the one that was trained with.
      mask: as in `batch_norm_train`. It decides what enters the moments if `state` is None; in
        any case what it hides cannot put NaN or infinity into outputs or gradients.
      dtype: of y; that of `x` by default.

    Returns:
      `(y, state)`, the state being the one that was passed.

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
    x = _axes.as_float_array(x)
    reduced = _axes.reduced_axes(x.ndim, axis)
    if state is None:
        return _normalize_by_batch(x, params, reduced, Plan(None, None, None), eps, mask, dtype)[0], None
    _check_state(state, x, reduced)
    scale, bias = _expand_params(params, x, reduced)
    mean, var = (jnp.expand_dims(v, reduced).astype(_axes.statistics_dtype(x.dtype)) for v in state[:2])
    y = normalize_with(
        x,
        Moments(mean, var, jnp.ones_like(mean)),
        scale,
        bias,
        None if mask is None else _axes.expand_mask(mask, x, reduced),
        eps=_axes.check_eps(eps),
        dtype=_axes.check_output_dtype(dtype, x),
    )
    return y, state


def batch_norm_update(
    state: BatchNormState,
    moments: Moments,
    *,
    momentum: float | jax.Array | None = 0.1,
    correction: float = 1,
) -> BatchNormState:
    """Lets measured moments enter the running statistics as one batch.

    Formula: that of `batch_norm_train`, which calls this. Use it for moments that were merged from
    several microbatches, or measured in a layer of your own.

    Args:
      state: the running statistics.
      moments: of the new batch, biased variance; shape [C].
      momentum: weight of the new batch, in [0, 1]; may be traced; None averages over all batches.
      correction: subtracted from the count for the stored variance: 1 unbiased, 0 biased.

    Returns:
      The new state, in the dtypes of the old. Where `moments.count` is 0 nothing changes, where
      it is 1 the variance does not, and the batch is counted if any channel has a value.

    Raises:
      ValueError: the shapes differ, or `momentum` or `correction` is out of range.

    Source: torch.nn.modules.batchnorm (`momentum`, `num_batches_tracked`).

    Example:
      >>> import jax.numpy as jnp, jaxbn
      >>> _, state = jaxbn.batch_norm_init(1)
      >>> halves = jaxbn.moments(jnp.array([[1.0]])).merge(jaxbn.moments(jnp.array([[3.0]])))
      >>> state = jaxbn.batch_norm_update(state, halves, momentum=None)
      >>> state.mean.tolist(), state.var.tolist()
      ([2.0], [2.0])
    """
    _check_momentum(momentum)
    _check_correction(correction)
    if jnp.shape(moments.mean) != state.mean.shape:
        raise ValueError(
            f"moments: expected shape {state.mean.shape}, that of the running mean, "
            f"got shape {jnp.shape(moments.mean)}; measure them along the same feature axes"
        )
    new: BatchNormState = _update(state, jax.lax.stop_gradient(moments), momentum, correction=correction, average=None)
    return new


@functools.partial(jax.jit, static_argnames=("correction", "average"), inline=True)
def _update(
    state: BatchNormState,
    new: Moments,
    momentum: float | jax.Array | None,
    *,
    correction: float,
    average: Across | None,
) -> BatchNormState:
    """`batch_norm_update`, with the mean over parts (leading axes of the moments) and over groups of devices."""
    dtype = new.mean.dtype
    parts = tuple(range(new.mean.ndim - state.mean.ndim))
    some, enough = new.count > 0, new.count > max(correction, 1)
    var = new.var * (new.count / jnp.where(enough, new.count - correction, 1))
    fields = (jnp.where(some, new.mean, 0), some.astype(dtype), jnp.where(enough, var, 0), enough.astype(dtype))
    sums = jnp.stack([jnp.sum(v, parts) for v in fields])
    if average is not None:
        sums = average.sum_groups(sums)
    mean, means, var, variances = sums

    seen = state.num_batches_tracked + jnp.any(means > 0).astype(state.num_batches_tracked.dtype)
    weight = 1 / jnp.maximum(seen, 1).astype(dtype) if momentum is None else jnp.asarray(momentum, dtype)

    def enter(old: jax.Array, total: jax.Array, number: jax.Array) -> jax.Array:
        value = total / jnp.maximum(number, 1)
        mixed = (1 - weight) * old.astype(dtype) + weight * value
        return jnp.where(number > 0, mixed.astype(old.dtype), old)

    return BatchNormState(enter(state.mean, mean, means), enter(state.var, var, variances), seen)


def sync_state(state: Any, axis_name: AxisName) -> Any:
    """Makes running statistics that devices kept each for itself the same on all of them.

    To be called inside the mapped function, before evaluation or a checkpoint, when training ran
    without `axis_name`. With it states never differ.

    Formula: the mean over devices of their running means and of their running variances. As both are
    linear in what entered, that is the state of training with virtual batches of one device's size.
    A `BatchNormState` that has seen no batch does not weigh. `num_batches_tracked` is the largest.

    Args:
      state: a `BatchNormState`, or any tree of them and of other arrays: Linen's `batch_stats`, or an
        NNX state. Floating-point arrays become their mean over devices, integers their maximum.
      axis_name: name of the mapped axis, or several.

    Returns:
      A tree like `state`, the same on all devices.

    Raises:
      ValueError: `axis_name` is not bound.

    Source: torch.nn.parallel.DistributedDataParallel (which takes the first device's buffers instead).

    Example:
      >>> import jax, jax.numpy as jnp, jaxbn
      >>> _, state = jaxbn.batch_norm_init(1)
      >>> x = jnp.array([[[1.0], [3.0]], [[5.0], [7.0]]])
      >>> def per_device(x):
      ...     _, own = jaxbn.batch_norm_train(x, None, state, momentum=None)
      ...     return jaxbn.sync_state(own, "devices")
      >>> jax.vmap(per_device, axis_name="devices")(x).mean.tolist()
      [[4.0], [4.0]]
    """
    names = all_devices(axis_name).names

    def sync(leaf: Any) -> Any:
        if isinstance(leaf, BatchNormState):
            tracked = sync(leaf.num_batches_tracked)
            # Whoever has seen no batch has nothing to say, unless nobody has.
            weight = ((leaf.num_batches_tracked > 0) | (tracked == 0)).astype(leaf.mean.dtype)
            mean, var = (jax.lax.psum(v * weight, names) / jax.lax.psum(weight, names) for v in leaf[:2])
            return BatchNormState(mean, var, tracked)
        if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating):
            return jax.lax.pmean(leaf, names)
        return jax.lax.pmax(leaf, names)

    return jax.tree.map(sync, state, is_leaf=lambda v: isinstance(v, BatchNormState))


def _normalize_by_batch(
    x: jax.Array,
    params: BatchNormParams | None,
    reduced: tuple[int, ...],
    plan: Plan,
    eps: float,
    mask: object,
    dtype: object,
) -> tuple[jax.Array, Moments]:
    """Returns y and the moments that made it: shape [C], or [parts, C] if the batch is split."""
    _check_values(x, reduced, plan)
    scale, bias = _expand_params(params, x, reduced)
    expanded = None if mask is None else _axes.expand_mask(mask, x, reduced)
    split, examples = plan.split, x
    if split:
        examples, expanded = split.apply(x, expanded)
        scale, bias = (None if v is None else jnp.expand_dims(v, split.axis) for v in (scale, bias))
        reduced = tuple(a + 1 for a in reduced)
    y, moments = normalize(
        examples,
        scale,
        bias,
        expanded,
        reduced=reduced,
        across=plan.share,
        eps=_axes.check_eps(eps),
        dtype=_axes.check_output_dtype(dtype, x),
    )
    moments = moments.squeeze(reduced)
    if split:
        y = split.undo(y, x.shape[split.axis])
        moments = moments.map(lambda v: jnp.moveaxis(v, split.axis, 0))
    return y, moments


def _check_values(x: jax.Array, reduced: tuple[int, ...], plan: Plan) -> None:
    values = _axes.values_per_channel(x, reduced)
    if plan.split:
        examples = x.shape[plan.split.axis]
        values = values // examples * min(plan.split.size, examples % plan.split.size or plan.split.size)
    if plan.share:
        values *= min(map(len, plan.share.groups))
    if values == 1:
        raise ValueError(
            f"x: expected more than 1 value per channel to take batch statistics over, got shape {x.shape}, "
            f"1 value for each of {x.size} channels, whose normalized value would always be 0; use a larger "
            "batch, or normalize by running statistics (batch_norm_eval; use_running_average=True in a layer)"
        )


def _expand_params(
    params: BatchNormParams | None, x: jax.Array, reduced: tuple[int, ...]
) -> tuple[jax.Array | None, jax.Array | None]:
    if params is None:
        return None, None
    scale, bias = (
        None if v is None else jnp.expand_dims(_axes.check_feature_array(name, v, x, reduced), reduced)
        for name, v in zip(("params.scale", "params.bias"), params, strict=True)
    )
    return scale, bias


def _check_state(state: BatchNormState | None, x: jax.Array, reduced: tuple[int, ...]) -> None:
    if state is not None:
        _axes.check_feature_array("state.mean", state.mean, x, reduced)
        _axes.check_feature_array("state.var", state.var, x, reduced)


def _check_momentum(momentum: float | jax.Array | None) -> None:
    if isinstance(momentum, numbers.Real) and not 0 <= float(momentum) <= 1:
        raise ValueError(
            f"momentum: expected the weight of the new batch, between 0 and 1, got {momentum}; "
            "0.1 is usual, and None averages over all batches"
        )


def _check_correction(correction: float) -> None:
    if not isinstance(correction, float | int) or not 0 <= correction < math.inf:
        raise ValueError(
            f"correction: expected a finite number of at least 0, got {correction}; "
            "1 stores the unbiased variance (PyTorch), 0 the biased one (Flax)"
        )
