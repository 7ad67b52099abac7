"""Running statistics: the update with measured moments, and synchronization across devices."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbn._kernel.devices import AxisName, DeviceGroups, all_devices
from jaxbn._kernel.explicit_mesh import shard_as
from jaxbn._kernel.measure import Count, as_float
from jaxbn._kernel.moments import Moments, broadcast_fields
from jaxbn._norms.arguments import check_array, cure_of_restored, is_real
from jaxbn._norms.state import BatchNormState, State

_Tree = TypeVar("_Tree")


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
    momentum, correction = check_momentum(momentum), check_correction(correction)
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
    """Updates with the mean of the moments on the leading axes and in the groups of devices `average`; None stays None.

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


def sync_state(state: _Tree, axis_name: AxisName) -> _Tree:
    """Returns running statistics that are the same on all devices, given those that each device has tracked.

    Call it within the mapped function, before evaluation or a checkpoint, after training without
    `axis_name`. With `axis_name` the states of devices are always the same.

    Formula: the mean over devices of their running means and of their running variances. As both are
    linear in the batches' statistics, that is the state of training with virtual batches of one device's
    size. A state whose `num_batches_tracked` is 0 gets no weight, whatever is in it. That number becomes the
    largest. States stacked along leading axes (domains, layers of a scan) each have weights of their own.

    Args:
      state: a `BatchNormState`, or any tree of them and of other arrays: Linen's `batch_stats`, or an
        NNX state. Floating-point arrays become their mean over devices; integers become their maximum, an
        `nnx.RngCount` too, so that no device draws the same random numbers twice; typed PRNG keys, which
        have no mean or maximum, stay as they are.
      axis_name: name of the mapped axis, or several.

    Returns:
      A tree like `state`, the same on all devices except for keys.

    Raises:
      ValueError: `axis_name` is not bound, or the shape of `num_batches_tracked` is not that of the leading axes of
        mean and var beside it.

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

    def largest(leaf: jax.Array) -> jax.Array:
        result: jax.Array = jax.lax.pmax(leaf, names)
        return result

    def mean(leaf: jax.Array, tracked: jax.Array) -> jax.Array:
        # A device that has seen no batch gets no weight, unless none has seen any.
        counts = (tracked > 0) | (largest(tracked) == 0)
        # There may be several states, along leading axes.
        counts = jnp.expand_dims(counts, tuple(range(counts.ndim, leaf.ndim)))
        total: jax.Array = jax.lax.psum(jnp.where(counts, leaf, 0), names)
        weights: jax.Array = jax.lax.psum(counts.astype(leaf.dtype), names)
        return total / weights

    leaves, tree = jax.tree.flatten_with_path(state)
    places = [_place(path) for path, _ in leaves]
    counters = {
        owner: jnp.asarray(leaf)
        for (owner, name), (_, leaf) in zip(places, leaves, strict=True)
        if name == "num_batches_tracked"
    }
    synchronized, zero = [], jnp.zeros((), jnp.int32)
    for (owner, name), (path, leaf) in zip(places, leaves, strict=True):
        array = jnp.asarray(leaf)
        if jnp.issubdtype(array.dtype, jax.dtypes.extended):
            synchronized.append(leaf)
        elif jnp.issubdtype(array.dtype, jnp.inexact):
            # Without a counter all devices have the same weight.
            tracked = counters.get(owner, zero) if name in ("mean", "var") else zero
            if tracked.shape != array.shape[: tracked.ndim]:
                raise ValueError(
                    f"state{jax.tree_util.keystr(path)}: expected the leading axes of num_batches_tracked, shape "
                    f"{tracked.shape}, got shape {array.shape}; stack several states along their first axes"
                )
            synchronized.append(mean(array, tracked))
        else:
            synchronized.append(largest(array))
    result: _Tree = jax.tree.unflatten(tree, synchronized)
    return result


def _place(path: Sequence[Any]) -> tuple[tuple[Any, ...], Any]:
    """Returns what owns a leaf, and the leaf's name in it; variables of Flax have a `value`."""
    names = [getattr(key, "name", getattr(key, "key", getattr(key, "idx", None))) for key in path]
    if names and names[-1] == "value":
        names.pop()
    return tuple(names[:-1]), names[-1] if names else None


def check_counter(state: BatchNormState | None, stack: tuple[int, ...] = ()) -> None:
    """`stack` are the leading axes along which there are several states."""
    if state is None:
        return
    if state.num_batches_tracked is None:
        raise TypeError("state.num_batches_tracked: expected an integer, got None; it is 0 before any batch")
    _check_one_number("state.num_batches_tracked", state.num_batches_tracked, stack)


Momentum = TypeVar("Momentum", bound=float | jax.Array | None)


def check_momentum(
    momentum: Momentum, meaning: str = "the weight of the new batch", usual: str = "0.1 is usual"
) -> Momentum:
    """Returns `momentum`, or raises; `meaning` and `usual` are what errors say about it."""
    if momentum is None:
        return momentum
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
    return momentum


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
