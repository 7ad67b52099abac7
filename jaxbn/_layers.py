"""What the Linen and NNX layers share: from Flax's options to those of the functions."""

from __future__ import annotations

import numbers
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn import _axes
from jaxbn._batch_norm import batch_norm_eval, batch_norm_train
from jaxbn._state import BatchNormParams, BatchNormState


def check(layer: Any, x: object) -> tuple[jax.Array, tuple[int, ...]]:
    """Returns `x` as an array and the sizes of its feature axes; what is wrong is named as Flax names it."""
    _axes.check_eps(layer.epsilon, "epsilon")
    if isinstance(layer.momentum, numbers.Real) and not 0 <= float(layer.momentum) <= 1:
        raise ValueError(
            f"momentum: expected the decay of the running statistics, between 0 and 1, got {layer.momentum}; "
            "0.9 is PyTorch's 0.1, and None averages over all batches"
        )
    array = _axes.as_float_array(x)
    return array, _axes.sizes(array, _axes.resolve_axes(array.ndim, layer.axis))


def batch_norm(
    layer: Any,
    x: jax.Array,
    params: BatchNormParams,
    state: BatchNormState,
    *,
    evaluate: bool,
    synchronize: bool = True,
    mask: jax.Array | None,
    dtype: Any,
) -> tuple[jax.Array, BatchNormState]:
    """Calls the function that a layer with Flax's options stands for; axes need not be bound unless `synchronize`."""
    options = {"axis": layer.axis, "eps": layer.epsilon, "mask": _full_rank(mask, x), "dtype": dtype}
    if evaluate:
        return batch_norm_eval(x, params, state, **options)[0], state
    if synchronize:
        options |= {"axis_name": layer.axis_name, "axis_index_groups": layer.axis_index_groups}
    y, new_state = batch_norm_train(
        x,
        params,
        state,
        momentum=None if layer.momentum is None else 1 - layer.momentum,
        correction=layer.correction,
        virtual_batch_size=layer.virtual_batch_size,
        **options,
    )
    assert new_state is not None
    return y, new_state


def _full_rank(mask: jax.Array | None, x: jax.Array) -> jax.Array | None:
    """Flax's masks broadcast from the right, whatever their rank, and need not be boolean."""
    if mask is None:
        return None
    mask = jnp.asarray(mask, bool)
    aligned = (1,) * (x.ndim - mask.ndim) + mask.shape
    if len(aligned) != x.ndim or any(m not in (1, n) for m, n in zip(aligned, x.shape, strict=True)):
        raise ValueError(
            f"mask: expected a shape that broadcasts, from the right as in NumPy, to x with shape {x.shape}, "
            f"got shape {mask.shape}; write mask[..., None] for one that has no feature axis"
        )
    return mask.reshape(aligned)
