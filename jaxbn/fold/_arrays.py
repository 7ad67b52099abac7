"""Folds the arrays of one norm and one layer of a Flax model, which may be stacked."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._norms.state import BatchNormParams, BatchNormState
from jaxbn._statistics.fold_batch_norm import fold_arrays
from jaxbn.fold._trace import Trace


def fold_pair(
    trace: Trace, pair: tuple[str, str], kernel: Any, bias: Any, params: BatchNormParams, state: BatchNormState
) -> tuple[jax.Array, jax.Array]:
    """`fold_arrays` with the options of both modules, one by one along leading axes if the arrays are stacked."""
    lead = state.mean.shape[:-1]
    if not lead:
        return _fold_one(trace, pair, kernel, bias, params, state)
    arrays: list[Any] = [kernel, bias, *params, *state[:2]]
    wrong = [v.shape for v in arrays if v is not None and v.shape[: len(lead)] != lead]
    if wrong:
        raise ValueError(
            f"{pair[0]} into {pair[1]}: expected the leading axes {lead} of the stacked statistics in all arrays, "
            f"got shapes {wrong}"
        )
    flat: list[Any] = [None if v is None else v.reshape(-1, *v.shape[len(lead) :]) for v in arrays]

    def fold_row(i: int) -> tuple[jax.Array, jax.Array]:
        row: list[Any] = [None if v is None else v[i] for v in flat]
        kernel, bias, scale, norm_bias, mean, var = row
        row_state = state._replace(mean=mean, var=var)
        return _fold_one(trace, pair, kernel, bias, BatchNormParams(scale, norm_bias), row_state)

    rows = [fold_row(i) for i in range(math.prod(lead))]
    kernels, biases = (jnp.stack(v) for v in zip(*rows, strict=True))
    return kernels.reshape(kernel.shape), biases.reshape(*lead, -1)


def _fold_one(
    trace: Trace, pair: tuple[str, str], kernel: Any, bias: Any, params: BatchNormParams, state: BatchNormState
) -> tuple[jax.Array, jax.Array]:
    norm, layer = (trace.calls[path].module for path in pair)
    try:
        return fold_arrays(
            kernel,
            bias,
            params,
            state,
            eps=norm.epsilon,
            before=trace.is_before(*pair),
            zero_padding=sees_zeros(layer),
            transpose_kernel=getattr(layer, "transpose_kernel", False),
            feature_group_count=getattr(layer, "feature_group_count", 1),
            padding_cure="leave this norm out of pairs",
        )
    except (TypeError, ValueError) as error:
        raise type(error)(f"{pair[0]} into {pair[1]}: {error}") from None


def sees_zeros(layer: Any) -> bool:
    """Whether a layer mixes its input with zeros; see `zero_padding` of `fold_batch_norm`."""
    if not hasattr(layer, "kernel_size"):
        return False
    if not hasattr(layer, "feature_group_count"):  # A transposed convolution puts zeros between its inputs.
        return True
    if any(d != 1 for d in jax.tree.leaves(layer.input_dilation)):
        return True
    if isinstance(layer.padding, str):
        return layer.padding in ("SAME", "CAUSAL") and any(k != 1 for k in jax.tree.leaves(layer.kernel_size))
    return any(p != 0 for p in jax.tree.leaves(layer.padding))
