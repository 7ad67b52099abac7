"""Running statistics: the update with measured moments, and the checks of its arguments."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbn._kernel.devices import DeviceGroups
from jaxbn._kernel.explicit_mesh import shard_as
from jaxbn._kernel.moments import Moments, broadcast_fields
from jaxbn._kernel.reduction import Count, as_float
from jaxbn._norms.arguments import check_array, cure_of_restored, is_real
from jaxbn._norms.state import BatchNormState, State


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
      state: the running statistics; or several, stacked along leading axes (domains, layers of a scan), with a
        `num_batches_tracked` for each.
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
    stack = jnp.shape(state.mean)[: np.ndim(state.num_batches_tracked)]
    check_counter(state, stack)
    check_momentum(momentum)
    correction = check_correction(correction)
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
    return update(state, broadcast_fields(moments), momentum, correction=correction)


def update(
    state: State,
    new: Moments,
    momentum: float | jax.Array | None,
    count: Count | None = None,
    *,
    correction: float,
    average: DeviceGroups | None = None,
) -> State:
    """First averages the moments over their leading axes and over the device groups `average`; None stays None.

    `count` is that of all moments, if shapes alone decide it; else it is `new.count`.
    """
    if state is None:
        return state
    known = count if isinstance(count, int) else None
    if known is None and count is not None:
        new = dataclasses.replace(new, count=jnp.broadcast_to(as_float(count, new.mean.dtype), new.mean.shape))
    updated: State = _update(
        *jax.lax.stop_gradient((state, new)), momentum, known=known, correction=correction, average=average
    )
    return updated


@functools.partial(jax.jit, static_argnames=("known", "correction", "average"))
def _update(
    state: BatchNormState,
    new: Moments,
    momentum: float | jax.Array | None,
    *,
    known: int | None,
    correction: float,
    average: DeviceGroups | None,
) -> BatchNormState:
    seen, dtype, parts = state.num_batches_tracked, new.mean.dtype, tuple(range(new.mean.ndim - state.mean.ndim))
    has_mean = has_var = None

    def total(*fields: jax.Array) -> list[jax.Array]:
        sums = [jnp.sum(v, parts) for v in fields] if parts else list(fields)
        return sums if average is None else list(average.sum_over_groups(jnp.stack(jnp.broadcast_arrays(*sums))))

    if known is None:
        # One value has no variance, whatever the correction.
        there = new.count > 0, (new.count > correction) & (new.count != 1)
        unbiased = new.var * (new.count / jnp.where(there[1], new.count - correction, 1))
        values = (jnp.where(t, v, 0) for t, v in zip(there, (new.mean, unbiased), strict=True))
        mean, var, *numbers = total(*values, *(t.astype(dtype) for t in there))
        mean, var = (v / jnp.maximum(n, 1) for v, n in zip((mean, var), numbers, strict=True))
        has_mean, has_var = (n > 0 for n in numbers)
        # There may be several states, along leading axes.
        seen = seen + jnp.any(has_mean, tuple(range(seen.ndim, has_mean.ndim))).astype(seen.dtype)
    elif known == 0 or 0 in new.mean.shape[: len(parts)]:
        return state
    else:
        bessel = known / (known - correction) if known > max(correction, 1) else 1.0
        mean, var = total(new.mean, new.var * bessel)
        number = math.prod(new.mean.shape[: len(parts)]) * (1 if average is None else len(average.groups))
        if number != 1:
            mean, var = mean / as_float(number, dtype), var / as_float(number, dtype)
        seen = seen + 1
    weight = 1 / jnp.maximum(seen, 1).astype(dtype) if momentum is None else jnp.asarray(momentum, dtype)
    # One condition for all values stays a scalar, which jax.vmap of a shard_map can batch.
    select = jnp.where if weight.ndim else jax.lax.select

    def mix(old: jax.Array, value: jax.Array, there: jax.Array | None) -> jax.Array:
        value, kept = shard_as(value, old), old.astype(dtype)
        w = jnp.expand_dims(weight, tuple(range(weight.ndim, old.ndim))) if weight.ndim else weight
        # The rounded weights 1 - w and w do not sum to 1, an error that adds up over a million batches. So a fraction
        # of the difference is added to the nearer of the two values. With weight 1 the result is the new value.
        step = value - kept
        mixed = select(w < 0.5, kept + step * w, value - step * (1 - w))
        # The difference of infinities is NaN.
        mixed = jnp.where(jnp.isfinite(step), mixed, (1 - w) * kept + w * value).astype(old.dtype)
        return mixed if there is None else jnp.where(shard_as(there, old), mixed, old)

    new_mean = mix(state.mean, mean, has_mean)
    keeps_var = known is not None and known <= max(correction, 1)
    return BatchNormState(new_mean, state.var if keeps_var else mix(state.var, var, has_var), seen)


def check_counter(state: BatchNormState | None, stack: tuple[int, ...] = ()) -> None:
    """`stack` are the leading axes along which there are several states."""
    if state is None:
        return
    if state.num_batches_tracked is None:
        raise TypeError("state.num_batches_tracked: expected an integer, got None; it is 0 before any batch")
    _check_one_number("state.num_batches_tracked", state.num_batches_tracked, stack)


def check_momentum(
    momentum: float | jax.Array | None, meaning: str = "the weight of the new batch", usual: str = "0.1 is usual"
) -> None:
    """`meaning` and `usual` are what errors say about the momentum."""
    if momentum is None:
        return
    _check_one_number("momentum", momentum, ())
    if not is_real(momentum):
        raise TypeError(
            f"momentum: expected a number or None, got {type(momentum).__name__}; "
            f"{usual}, and None averages over all batches"
        )
    # What JAX's arrays hold is not looked at, since that would wait for the device.
    if not isinstance(momentum, jax.Array) and not 0 <= float(momentum) <= 1:
        raise ValueError(
            f"momentum: expected {meaning}, between 0 and 1, got {momentum}; "
            f"{usual}, and None averages over all batches"
        )


def _check_one_number(name: str, value: ArrayLike, stack: tuple[int, ...]) -> None:
    if np.shape(value) != stack:
        raise ValueError(
            f"{name}: expected one number for all channels, got shape {np.shape(value)}; several states, each with "
            "its own, go through jax.vmap"
        )


def check_correction(correction: float) -> float:
    if not isinstance(correction, numbers.Real) or not 0 <= float(correction) < math.inf:
        raise ValueError(
            f"correction: expected a finite number of at least 0, got {correction}; "
            "1 stores the unbiased variance (PyTorch), 0 the biased one (Flax)"
        )
    return float(correction)
