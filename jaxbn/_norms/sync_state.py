"""Running statistics of several devices made one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxbn._kernel.devices import AxisName, all_devices

_Tree = TypeVar("_Tree")


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
