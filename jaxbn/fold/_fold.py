"""Folds the arrays of a pair, and compares a model's outputs before and after folding."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._arrays import floats, to_float64
from jaxbn._norms.state import AffineParams, BatchNormState
from jaxbn._statistics.fold_batch_norm import fold_arrays
from jaxbn.fold._pairs import Pairs, propose, sees_zeros
from jaxbn.fold._trace import Trace

_Folded = TypeVar("_Folded")


def fold_checked(
    trace: Trace,
    pairs: Pairs,
    tolerance: float | None,
    fold: Callable[[Mapping[str, str]], _Folded],
    run: Callable[[_Folded, Mapping[str, str]], object],
) -> _Folded:
    """Returns the model `fold(pairs)`, with which `run(folded, pairs)` has to return what the traced program does.

    Raises:
      ValueError: it does not; the error names the pairs that make a difference alone.
    """
    expected = floats(trace.outputs())
    if not expected:
        raise ValueError("model: expected floating-point outputs to compare before and after folding, got none")
    limit = _default_tolerance(trace, pairs, expected) if tolerance is None else tolerance
    folded = fold(pairs)
    difference = _difference(expected, run(folded, pairs))
    if difference <= limit:
        return folded
    lines = []
    for norm, layer in pairs.items():
        alone = {norm: layer}
        d = _difference(expected, run(fold(alone), alone))
        if not d <= limit:
            lines.append(f"{norm} into {layer}: {d:.2g}{_reason(trace, norm, layer)}")
    error = (
        f"pairs: expected the folded model's outputs to differ by at most {limit:.2g} of the largest, got "
        f"{difference:.2g}; leave out of pairs what has another user or another source than its pair, or pass a larger "
        f"tolerance; {'these pairs differ alone too:' if lines else 'each pair alone is within that'}"
    )
    raise ValueError("\n  ".join([error, *lines]))


def _reason(trace: Trace, norm: str, layer: str) -> str:
    """Why this pair is not among those that are proposed; empty if it is."""
    proposed = propose(trace)
    if norm in proposed.unfolded:
        return f"; {proposed.unfolded[norm]}"
    return "" if proposed[norm] == layer else f"; it folds into {proposed[norm]}"


def _default_tolerance(trace: Trace, pairs: Pairs, outputs: list[jax.Array]) -> float:
    """The square root of the coarsest precision among the outputs of the model, and what the folded modules use."""
    arrays = list[jax.Array | jax.ShapeDtypeStruct](outputs)
    for path in itertools.chain(*pairs.items()):
        module = trace.modules[path]
        arrays += [module.y, *(v.read for v in module.variables.values())]
    return math.sqrt(max(jnp.finfo(v.dtype).eps for v in arrays))  # type: ignore[no-untyped-call]


def _difference(expected: list[jax.Array], outputs: object) -> float:
    """The largest difference relative to the largest value, of the worst array; NaN if any is."""
    ratios = [0.0]
    for a, b in zip(expected, floats(outputs), strict=True):
        before, after = to_float64(a), to_float64(b)
        ratios.append(np.abs(before - after).max(initial=0) / (np.abs(before).max(initial=0) or 1))
    return float(np.max(ratios))


def fold_pair(
    trace: Trace, norm: str, layer: str, of_norm: Mapping[str, jax.Array], of_layer: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """The layer's new kernel and bias, from the variables of both modules by name.

    They are those of `fold_batch_norm`; stacked variables are folded one by one along their leading axes.
    """
    norm_module, layer_module = trace.modules[norm].instance, trace.modules[layer].instance
    fold = functools.partial(
        fold_arrays,
        eps=norm_module.epsilon,
        before=trace.is_before(norm, layer),
        zero_padding=sees_zeros(layer_module),
        transpose_kernel=getattr(layer_module, "transpose_kernel", False),
        feature_group_count=getattr(layer_module, "feature_group_count", 1),
        padding_cure="leave this norm out of pairs",
    )
    lead = of_norm["mean"].shape[:-1]
    state = BatchNormState(of_norm["mean"], of_norm["var"], jnp.zeros(lead, jnp.int32))
    params = AffineParams(of_norm.get("scale"), of_norm.get("bias"))
    arrays = (of_layer["kernel"], of_layer.get("bias"), params, state)
    try:
        if not lead:
            kernel, bias = fold(*arrays)
            return {"kernel": kernel, "bias": bias}
        wrong = [v.shape for v in jax.tree.leaves(arrays) if v.shape[: len(lead)] != lead]
        if wrong:
            raise ValueError(
                f"expected the leading axes {lead} of the stacked statistics in all arrays, got shapes {wrong}"
            )
        flat = jax.tree.map(lambda v: v.reshape(-1, *v.shape[len(lead) :]), arrays)
        rows = [fold(*jax.tree.map(lambda v, i=i: v[i], flat)) for i in range(math.prod(lead))]
    except (TypeError, ValueError) as error:
        raise type(error)(f"{norm} into {layer}: {error}") from None
    kernels, biases = (jnp.stack(v) for v in zip(*rows, strict=True))
    return {"kernel": kernels.reshape(arrays[0].shape), "bias": biases.reshape(*lead, -1)}
