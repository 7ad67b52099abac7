"""The size of one Linen layer's program as JAX hands it to the compiler, and the goals for it.

An operation is a mention of `stablehlo.NAME` in the program's text: the sum within a reduction and the `return` of a
branch are counted too, and what is in a function is counted once, however often the function is called. Running
statistics are arguments, as constants would count.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax

from benchmarks.implementations import BOTH, EVAL, Case, forward_and_backward, linen_layer

PLATFORMS = ("cpu", "cuda", "tpu")
SHAPE = (8, 16, 16, 64)
# At most how many times Flax's operations, and how many branches, on each platform.
OPERATIONS = {
    BOTH: {"batch": 2.2, "layer": 2.2, "rms": 1.6, "group": 2.2, "instance": 2.2},
    EVAL: {"batch": 1.2, "layer": 1.3, "rms": 1.1, "group": 1.6, "instance": 1.6},
}
BRANCHES = {BOTH: 2, EVAL: 0}


class Size(NamedTuple):
    operations: int
    branches: int


def size(text: str) -> Size:
    """Operations and branches in the text of StableHLO."""
    names = re.findall(r"\bstablehlo\.(\w+)", text)
    return Size(len(names), sum(name in ("case", "if") for name in names))


def trace_layer(module: Any, norm: str, kind: str) -> Any:
    """The layer of `module`, traced by jax.jit: with its gradients and new statistics, or in evaluation."""
    layer = linen_layer(module, Case(norm, SHAPE, "float32"))
    mode = {"use_running_average": kind == EVAL} if norm == "batch" else {}
    x = jax.ShapeDtypeStruct(SHAPE, "float32")
    variables = dict(jax.eval_shape(lambda x: layer.init(jax.random.key(0), x, **mode), x))
    params = variables.pop("params")

    def train(x, params, stats):
        return layer.apply({"params": params, **stats}, x, mutable=["batch_stats"], **mode)

    def both(x, dy, params, stats):
        return forward_and_backward(lambda x, params: train(x, params, stats))(x, dy, params)

    def evaluate(x, params, stats):
        return layer.apply({"params": params, **stats}, x, **mode)

    return (
        jax.jit(evaluate).trace(x, params, variables) if kind == EVAL else jax.jit(both).trace(x, x, params, variables)
    )


def sizes(traced: Any) -> dict[str, Size]:
    """The size on each platform of what jax.jit traced."""
    return {p: size(traced.lower(lowering_platforms=(p,)).as_text()) for p in PLATFORMS}


def checkpoints(traced: Any) -> int:
    """How many calls of `jax.checkpoint` are in what jax.jit traced."""
    return len(re.findall(r"\b(?:checkpoint|remat\d?)\[", str(traced.jaxpr)))
