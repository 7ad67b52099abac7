"""What the Linen and NNX layers share: from Flax's options to those of the functions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxbn import _axes
from jaxbn._batch_norm import BatchNormParams, BatchNormState, batch_norm_eval, batch_norm_train


def check(layer: Any, x: object) -> tuple[jax.Array, tuple[int, ...]]:
    """Returns `x` as an array and the sizes of its feature axes."""
    for name in ("axis_name", "axis_index_groups"):
        if getattr(layer, name) is not None:
            raise ValueError(
                f"{name}: expected None, got {getattr(layer, name)!r}; statistics are not yet synchronised by name "
                "(under jax.jit with a sharded batch they are global without it)"
            )
    array = _axes.as_float_array(x)
    return array, _axes.feature_shape(array, _axes.reduced_axes(array.ndim, layer.axis))


def batch_norm(
    layer: Any,
    x: jax.Array,
    params: BatchNormParams,
    state: BatchNormState,
    *,
    evaluate: bool,
    mask: jax.Array | None,
    dtype: Any,
) -> tuple[jax.Array, BatchNormState]:
    """Calls the function that a layer with Flax's options stands for."""
    if mask is not None:
        # Flax's masks broadcast from the right, whatever their rank, and need not be boolean.
        mask = jnp.asarray(mask, bool)
        mask = mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape)
    options: dict[str, Any] = {"axis": layer.axis, "eps": layer.epsilon, "mask": mask, "dtype": dtype}
    if evaluate:
        y, new_state = batch_norm_eval(x, params, state, **options)
    else:
        weight = None if layer.momentum is None else 1 - layer.momentum
        y, new_state = batch_norm_train(x, params, state, momentum=weight, correction=layer.correction, **options)
    assert new_state is not None
    return y, new_state
