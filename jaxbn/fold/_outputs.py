"""Compares a model's outputs before and after folding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxbn._arrays import floats, to_float64
from jaxbn.fold._pairs import Pairs, propose
from jaxbn.fold._trace import Trace


def check_same_outputs(
    trace: Trace, pairs: Pairs, tolerance: float | None, expected: Any, run_folded: Callable[[dict[str, str]], Any]
) -> None:
    """Raises if the outputs differ from `expected` with all `pairs` folded, and names the pairs that do it alone."""
    if not floats(expected):
        raise ValueError("model: expected floating-point outputs to compare before and after folding, got none")
    limit = _default_tolerance(trace, pairs, expected) if tolerance is None else tolerance
    difference = _difference(expected, run_folded(pairs))
    if difference <= limit:
        return
    alone = {pair: _difference(expected, run_folded(dict([pair]))) for pair in pairs.items()}
    wrong = {pair: d for pair, d in alone.items() if not d <= limit}
    lines = [f"{norm} into {layer}: {d:.2g}{_reason(trace, norm, layer)}" for (norm, layer), d in wrong.items()]
    error = (
        f"pairs: expected the folded model's outputs to differ by at most {limit:.2g} of the largest, got "
        f"{difference:.2g}; leave out of pairs what has another user or another source than its pair, or pass a larger "
        f"tolerance; {'these pairs differ alone too:' if wrong else 'each pair alone is within that'}"
    )
    raise ValueError("\n  ".join([error, *lines]))


def _reason(trace: Trace, norm: str, layer: str) -> str:
    """Why this pair is not among those that are proposed; empty if it is."""
    proposed = propose(trace)
    if norm in proposed.unfolded:
        return f"; {proposed.unfolded[norm]}"
    return "" if proposed[norm] == layer else f"; it folds into {proposed[norm]}"


def _default_tolerance(trace: Trace, pairs: Pairs, outputs: Any) -> float:
    """The square root of the coarsest precision among the outputs of the model, and what the folded modules use."""
    calls = [trace.calls[path] for pair in pairs.items() for path in pair]
    dtypes = [v.dtype for v in floats(outputs)] + [call.dtype for call in calls]
    dtypes += [read.dtype for call in calls for read, _ in call.variables.values()]
    finfo: Any = jnp.finfo
    return math.sqrt(max(float(finfo(dtype).eps) for dtype in dtypes))


def _difference(expected: Any, actual: Any) -> float:
    """The largest difference relative to the largest value, of the worst array; NaN if any is."""
    ratios = [0.0]
    for a, b in zip(floats(expected), floats(actual), strict=True):
        before, after = to_float64(a), to_float64(b)
        ratios.append(np.abs(before - after).max(initial=0) / (np.abs(before).max(initial=0) or 1))
    return float(np.max(ratios))
