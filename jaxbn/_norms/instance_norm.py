"""Instance norm: statistics of each channel of each example, optionally with running statistics."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxbn._kernel.devices import AxisName, DeviceGroups, all_devices
from jaxbn._kernel.inputs import other_axes
from jaxbn._kernel.normalize import normalize
from jaxbn._kernel.reduction import Reduction
from jaxbn._norms.arguments import Axis, as_float_array, check_arguments
from jaxbn._norms.batch_norm import evaluate_batch
from jaxbn._norms.running_statistics import check_correction, check_counter, check_momentum, update
from jaxbn._norms.sample_norms import check_more_than_one, normalize_examples, within_examples
from jaxbn._norms.state import AffineParams, State


def instance_norm_train(
    x: ArrayLike,
    params: AffineParams | None,
    state: State,
    *,
    axis: Axis = -1,
    batch_axis: Axis = 0,
    momentum: float | jax.Array | None = 0.1,
    eps: float = 1e-5,
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    correction: float = 1,
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, State]:
    """Normalizes each channel of each example of `x` by its own moments.

    Formula: `y = (x - mean(x)) / sqrt(var(x) + eps) * scale + bias` with mean and biased variance over
    all axes but `axis` and `batch_axis`. The running statistics are updated as in `batch_norm_train`, with
    the mean over examples of their means and of their variances (unbiased, with `correction=1`). PyTorch's
    defaults are `params=None` and `state=None`.

    Args:
      x: floating-point array of any rank, in which each channel of an example has at least two values.
      params: scale and bias, or None for neither.
      state: the running statistics, or None to track nothing.
      axis: the axis, or axes, of the channels; 1 for PyTorch's [N, C, ...].
      batch_axis: the axis, or axes, along which examples lie; `()` for one example.
      axis_name: name of the mapped axis, or several, along which devices have different examples: the
        running statistics then take the mean over all of them. Outputs do not depend on it. For devices that
        have parts of each example use `group_norm` with C groups.
      mask: boolean, True counts; broadcastable, rank for rank, to `x` without its channels or to all of
        `x`. An example in which no value counts has the bias for y and enters no statistic.
      momentum, eps, correction, dtype: as in `batch_norm_train`. PyTorch's InstanceNorm does not count
        batches and takes momentum None as 0; here both are as in batch norm.

    Returns:
      `(y, new_state)`; y has the shape of `x`, and `new_state` is None if `state` is.

    Raises:
      ValueError: a channel of an example has one value only; `axis` or `batch_axis` out of range or the
        same; `params`, `state` or `mask` do not fit `x`; `momentum` outside [0, 1] or `eps` negative;
        `axis_name` not bound.
      TypeError: `x` is not floating point, `mask` not boolean, or `params` or `state` of another type.

    Source: Ulyanov, Vedaldi & Lempitsky (2016), Instance Normalization, arXiv:1607.08022;
    torch.nn.functional.instance_norm with `use_input_stats=True`.

    Example:
      >>> import jax.numpy as jnp, jaxbn
      >>> _, state = jaxbn.batch_norm_init(1)
      >>> x = jnp.array([[[1.0], [3.0]], [[10.0], [30.0]]])
      >>> y, state = jaxbn.instance_norm_train(x, None, state, momentum=1.0)
      >>> y[..., 0].round(3).tolist(), state.mean.tolist(), state.var.tolist()
      ([[-1.0, 1.0], [-1.0, 1.0]], [11.0], [101.0])
    """
    x = as_float_array(x)
    feature, reduced = within_examples(x, axis, batch_axis)
    a = check_arguments(x, params, state, feature=feature, reduced=reduced, eps=eps, mask=mask, dtype=dtype)
    check_counter(state)
    check_momentum(momentum)
    correction = check_correction(correction)
    devices = None if axis_name is None else all_devices(axis_name)
    check_more_than_one(a, None)
    if state is None:
        return normalize_examples(a, None), state
    reduction = Reduction(reduced)
    y, moments = normalize(a.x, a.scale, a.bias, a.mask, reduction=reduction, feature=feature, eps=a.eps, dtype=a.dtype)
    kept = other_axes(x.ndim, reduced)
    examples = [k for k, axis_of_x in enumerate(kept) if axis_of_x not in feature]
    moments = moments.squeeze(reduced).map(lambda v: jnp.moveaxis(v, examples, range(len(examples))))
    average = None if devices is None else DeviceGroups(devices.names, tuple((i,) for i in devices.groups[0]))
    count = reduction.count(x) if mask is None else None
    return y, update(state, moments, momentum, count, correction=correction, average=average)


def instance_norm_eval(
    x: ArrayLike,
    params: AffineParams | None,
    state: State,
    *,
    axis: Axis = -1,
    batch_axis: Axis = 0,
    eps: float = 1e-5,
    mask: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, State]:
    """Normalizes `x` by the running statistics; without any, each example's channels by their own moments.

    Formula: with a state that of `batch_norm_eval`, otherwise that of `instance_norm_train`. The two
    are different functions of `x`: for a network trained with `instance_norm_train` the former is an
    approximation, which is good if examples have similar moments.

    Args:
      x, params, state, axis, batch_axis, eps, mask, dtype: as in `instance_norm_train`.

    Returns:
      `(y, state)`, with the state that was passed.

    Raises:
      ValueError, TypeError: as `instance_norm_train`; one value per channel is an error only without a
        state.

    Source: torch.nn.functional.instance_norm with `use_input_stats=False`, or with no running
    statistics.

    Example:
      >>> import jax.numpy as jnp, jaxbn
      >>> _, state = jaxbn.batch_norm_init(1)
      >>> x = jnp.array([[[1.0], [3.0]]])
      >>> tracked, _ = jaxbn.instance_norm_eval(x, None, state, eps=0.0)
      >>> untracked, _ = jaxbn.instance_norm_eval(x, None, None)
      >>> tracked.ravel().tolist(), untracked.ravel().round(3).tolist()
      ([1.0, 3.0], [-1.0, 1.0])
    """
    if state is None:
        return instance_norm_train(x, params, state, axis=axis, batch_axis=batch_axis, eps=eps, mask=mask, dtype=dtype)
    x = as_float_array(x)
    feature, _ = within_examples(x, axis, batch_axis)
    a = check_arguments(x, params, state, feature=feature, eps=eps, mask=mask, dtype=dtype)
    return evaluate_batch(a, state), state
