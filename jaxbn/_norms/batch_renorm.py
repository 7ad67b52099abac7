"""Batch renormalization: in training too, outputs are close to those of evaluation, however small the batches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxbn._kernel.devices import AxisName, Groups, resolve_devices
from jaxbn._kernel.moments import Moments
from jaxbn._kernel.normalize import Adjust, reciprocal_std
from jaxbn._norms.arguments import Axis, as_float_array, check_arguments, is_real, resolve_axes
from jaxbn._norms.batch_norm import train_batch
from jaxbn._norms.running_statistics import check_momentum
from jaxbn._norms.state import AffineParams, BatchNormState
from jaxbn._norms.virtual_batches import AdjustFor


def batch_renorm_train(
    x: ArrayLike,
    params: AffineParams | None,
    state: BatchNormState,
    *,
    r_max: float | jax.Array,
    d_max: float | jax.Array,
    axis: Axis = -1,
    momentum: float | jax.Array | None = 0.1,
    eps: float = 1e-5,
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Groups | None = None,
    virtual_batch_size: int | None = None,
    correction: float = 1,
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, BatchNormState]:
    """Batch norm whose output is corrected, within limits, to what the running statistics would give.

    Formula: with the batch's mean m and `s = sqrt(var + eps)`, and M and S likewise from `state` before the
    update, `y = ((x - m) / s * r + d) * scale + bias` where `r = clip(s / S, 1 / r_max, r_max)` and
    `d = clip((m - M) / S, -d_max, d_max)`. Unclipped that is `(x - M) / S`, the output of evaluation;
    but gradients pass through m and s, as in batch norm, and not through r and d. `r_max=1, d_max=0`
    is batch norm. The running statistics are those of batch norm, and evaluation is `batch_norm_eval`.

    Args:
      x, params: as in `batch_norm_train`.
      state: the running statistics, which renormalization needs.
      r_max: one number, at least 1; may be traced, and is 1 where it is below. 3 in the paper, after a while:
        see `batch_renorm_limits`.
      d_max: one number, at least 0; may be traced, and is 0 where it is below. 5 in the paper, after a while.
      axis, momentum, eps, mask, axis_name, axis_index_groups, virtual_batch_size, correction, dtype:
        as in `batch_norm_train`. The paper's momentum is 0.01.

    Returns:
      `(y, new_state)`.

    Raises:
      ValueError: `r_max` below 1 or `d_max` below 0, unless they are JAX arrays; a limit that is no single
        number; else as `batch_norm_train`.
      TypeError: `state` is None, or a limit is not a number; else as `batch_norm_train`.

    Source: Ioffe (2017), Batch Renormalization, arXiv:1702.03275, algorithm 1.

    Example:
      >>> import jax.numpy as jnp, jaxbn
      >>> params, state = jaxbn.batch_norm_init(1)
      >>> x = jnp.array([[1.0], [2.0]])
      >>> y, _ = jaxbn.batch_renorm_train(x, params, state, r_max=3.0, d_max=5.0)
      >>> as_in_evaluation, _ = jaxbn.batch_norm_eval(x, params, state)
      >>> y.round(3).ravel().tolist(), as_in_evaluation.round(3).ravel().tolist()
      ([1.0, 2.0], [1.0, 2.0])
    """
    if state is None:
        raise TypeError(
            "state: expected jaxbn.BatchNormState, got None; renormalization is towards the running "
            "statistics, which jaxbn.batch_norm_init returns"
        )
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
        adjust_for=renormalize(state, r_max, d_max),
    )


def renormalize(state: BatchNormState, r_max: float | jax.Array, d_max: float | jax.Array) -> AdjustFor:
    """Returns how the kernel adjusts scale and bias for batch renormalization."""
    _check_limits(r_max, d_max)

    def adjust_for(others: tuple[int, ...]) -> Adjust:
        mean, var = (jnp.expand_dims(v, others) for v in (state.mean, state.var))
        return jax.tree_util.Partial(_scale_and_bias, mean, var, r_max, d_max)

    return adjust_for


def batch_renorm_limits(
    step: int | jax.Array,
    *,
    start: int = 5_000,
    r_end: int = 40_000,
    d_end: int = 25_000,
    r_max: float = 3.0,
    d_max: float = 5.0,
) -> tuple[jax.Array, jax.Array]:
    """The paper's schedule of the limits: batch norm at first, then linearly wider limits, then constant ones.

    Formula: `r_max` goes from 1 to its end value between steps `start` and `r_end`, `d_max` from 0 to
    its end value between `start` and `d_end`. In shorter training shorten all three, but let the running
    statistics forget their initial values (a few times `1 / momentum` steps) before `start`.

    Args:
      step: how many batches have been seen, `state.num_batches_tracked` for example; may be traced.
      start, r_end, d_end: numbers of steps.
      r_max, d_max: the limits at the end.

    Returns:
      `(r_max, d_max)` for this step, float32 [].

    Raises:
      ValueError: a limit that ends before it starts; `r_max` below 1 or `d_max` below 0; `step` is no single number.

    Source: Ioffe (2017), arXiv:1702.03275, section 4.

    Example:
      >>> import jaxbn
      >>> [tuple(map(float, jaxbn.batch_renorm_limits(step))) for step in (0, 15_000, 50_000)]
      [(1.0, 0.0), (1.5714285373687744, 2.5), (3.0, 5.0)]
    """
    _check_limits(r_max, d_max)
    if start > min(r_end, d_end):
        raise ValueError(
            f"start, r_end, d_end: expected start before both ends, got {start}, {r_end}, {d_end}; "
            "shorten all of them for shorter training"
        )
    if np.shape(step) != ():
        raise ValueError(f"step: expected one number, got shape {np.shape(step)}; use jax.vmap for several")
    step = jnp.asarray(step).astype(jnp.float32)

    def ramp(first: float, last: float, end: int) -> jax.Array:
        return first + float(last - first) * jnp.clip((step - float(start)) / float(max(end - start, 1)), 0, 1)

    return ramp(1, r_max, r_end), ramp(0, d_max, d_end)


def _check_limits(r_max: float | jax.Array, d_max: float | jax.Array) -> None:
    for name, limit, least in (("r_max", r_max, 1), ("d_max", d_max, 0)):
        if not is_real(limit):
            raise TypeError(
                f"{name}: expected a number, got {type(limit).__name__}; jaxbn.batch_renorm_limits returns both limits"
            )
        if np.shape(limit) != ():
            raise ValueError(f"{name}: expected one number for all channels, got shape {np.shape(limit)}")
        # What JAX's arrays hold is not looked at, since that would wait for the device.
        if not isinstance(limit, jax.Array) and not float(limit) >= least:
            raise ValueError(f"{name}: expected a limit of at least {least}, got {limit}; that is batch norm's")


def _scale_and_bias(
    mean: jax.Array,
    var: jax.Array,
    r_max: float | jax.Array,
    d_max: float | jax.Array,
    m: Moments,
    eps: float,
    scale: jax.Array | None,
    bias: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Scale and bias that make `(x - m.mean) * reciprocal_std(m) * scale + bias` renormalized."""
    dtype = m.mean.dtype
    m = jax.lax.stop_gradient(m)
    mean, var, r_max, d_max = (jax.lax.stop_gradient(jnp.asarray(v).astype(dtype)) for v in (mean, var, r_max, d_max))
    # 0 where no value counts, so that d is 0 there too.
    running = reciprocal_std(var, eps, m.count)
    # A limit that only run time knows is taken for batch norm's where it is below that, or NaN.
    r_max, d_max = (jnp.where(limit >= least, limit, least) for limit, least in ((r_max, 1), (d_max, 0)))
    r = jnp.clip(jnp.sqrt(m.var + eps) * running, 1 / r_max, r_max)
    d = jnp.clip((m.mean - mean + m.mean_lo) * running, -d_max, d_max)
    if scale is not None:
        scale = scale.astype(dtype)
        r, d = r * scale, d * scale
    return r, d if bias is None else d + bias.astype(dtype)
