"""Runs a Flax network on batches, and measures the inputs and outputs of its norm layers meanwhile."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import linen as nn
from flax import nnx

from jaxbn._kernel.explicit_mesh import shard_as
from jaxbn._kernel.inputs import other_axes, sizes
from jaxbn._kernel.moments import Moments
from jaxbn._norms.arguments import resolve_axes
from jaxbn._observe.calls import Layer, LayerCall, Observer, copy_nnx, flatten_dict, nnx_layers
from jaxbn._observe.run import cached, run_linen, run_nnx
from jaxbn._paths import name_of

# Slots hold numbers per channel, so outputs of layers are compared by random projections of each channel. Estimated
# so, a root mean square over C channels is off by 1 / sqrt(2 * PROJECTIONS * C), 6% of 16 (Achlioptas 2003).
PROJECTIONS = 8

# The user's function: `call(apply, batch)` in Linen, `call(model, batch)` in NNX.
Call = Callable[[Any, Any], object]


class Sums(NamedTuple):
    """What the slot of a layer holds: sums over its calls, and the moments of its inputs if it normalized by them.

    `projections` are random ones of the outputs, `square` is the sum of their squares, and `not_finite` counts values
    of the inputs. Each is an array of its own: slots must have the shape of the statistics, since `nn.scan` cuts their
    leading axes.
    """

    calls: jax.Array
    projections: tuple[jax.Array, ...]
    square: jax.Array
    not_finite: jax.Array
    counts: jax.Array
    mean: jax.Array
    var: jax.Array


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class FirstCall:
    """What tracing shows of a layer: its options, and how it is called for the first time.

    `features` is the shape that its statistics have in a call: domains, loops and mapped models stack them.

    Static in JAX's trees, so that a compiled step returns those of its trace.
    """

    layer: Layer
    trains: bool
    examples: int
    features: tuple[int, ...]


class Run(NamedTuple):
    """What a run on one batch gives: sums by the names of the layers, and the layers in the order of calls."""

    output: object
    sums: dict[str, Sums]
    first_calls: tuple[FirstCall, ...]


@dataclasses.dataclass(frozen=True)
class Network:
    """A network of Linen or NNX.

    `evaluate(batch)` runs it as its user does, `normalize_by_batch(batch)` with every norm layer normalizing by the
    batch; both are compiled. `stored` has the arrays of each layer by their names.
    """

    interface: Literal["linen", "nnx"]
    stored: Mapping[str, Mapping[str, npt.ArrayLike]]
    evaluate: Callable[[object], Run]
    normalize_by_batch: Callable[[object], Run]


def linen_network(model: nn.Module, variables: Mapping[str, Any], call: Call | None) -> Network:
    if "batch_stats" not in variables:
        raise ValueError(
            f"variables: expected a collection 'batch_stats', got {', '.join(map(repr, variables)) or 'none'}; "
            "pass all that model.init returned, with what apply(..., mutable=['batch_stats']) put in its place"
        )
    stored: dict[str, dict[str, npt.ArrayLike]] = collections.defaultdict(dict)
    for collection in ("params", "batch_stats"):
        for path, value in flatten_dict(variables.get(collection, {})).items():
            stored[name_of(path[:-1])][path[-1]] = value
    steps = [cached(_step, "linen", model, call, by_batch) for by_batch in (False, True)]
    return Network("linen", stored, *[functools.partial(step, variables) for step in steps])


def nnx_network(model: nnx.Module, call: Call | None) -> Network:
    graphdef, state = nnx.split(model)
    stored = {
        name: {key: v[...] for key, v in vars(layer).items() if isinstance(v, nnx.Variable)}
        for name, layer in nnx_layers(model).items()
    }
    steps = [cached(_step, "nnx", graphdef, call, by_batch) for by_batch in (False, True)]
    return Network("nnx", stored, *[functools.partial(step, state) for step in steps])


@functools.lru_cache(maxsize=16)
def _step(interface: str, model: Any, call: Call | None, by_batch: bool) -> Callable[[object, object], Run]:
    """`model` is Linen's module or NNX's graph definition."""

    @jax.jit
    def step(values: Any, batch: object) -> Run:
        first_calls: dict[str, FirstCall] = {}
        observer = Observer(_nothing, functools.partial(_measure, first_calls, by_batch))
        if interface == "linen":
            output, sums = run_linen(model, values, batch, call, observer)
        else:
            output, sums = run_nnx(copy_nnx(model, values), batch, call, observer)
        return Run(output, sums, tuple(first_calls.values()))

    return step


def _nothing(mean: jax.Array) -> Sums:
    """What a slot holds before the first call."""
    zero, wide = jnp.zeros(jnp.shape(mean), jnp.float32), jnp.zeros(jnp.shape(mean))
    return Sums(zero, (zero,) * PROJECTIONS, zero, zero, wide, wide, wide)


def _measure(first_calls: dict[str, FirstCall], by_batch: bool, observed: LayerCall) -> jax.Array:
    """Runs a layer, and adds what it gets and gives to its slot."""
    layer, x, before = observed.layer, observed.x, observed.read_slot()
    feature = resolve_axes(x.ndim, layer.axis)
    reduced = other_axes(x.ndim, feature)
    examples = x.shape[reduced[0]] if reduced else 1
    first_calls.setdefault(layer.name, FirstCall(layer, observed.trains, examples, sizes(x, feature)))

    moments = before[4:]
    if by_batch:
        own = observed.moments()
        moments, y = _merge(moments, own), observed.evaluate_by(own)
    else:
        y = observed()
    wide = y.astype(jnp.float32)
    signed = _with_signs(wide, jnp.max(before.calls).astype(jnp.uint32))
    not_finite = (~jnp.isfinite(x)).astype(jnp.float32)
    *projections, square, bad = _sum_all([*signed, wide * wide, not_finite], reduced)
    new = observed.place((jnp.ones_like(square), tuple(projections), square, bad), jnp.float32)
    observed.write_slot(Sums(*jax.tree.map(jnp.add, before[:4], new), *moments))
    return y


def _merge(before: Sequence[jax.Array], new: Moments) -> tuple[jax.Array, ...]:
    """Merges moments without the low parts of means, which nothing here reads; `Moments.merge` compiles longer."""
    count, mean, var = before
    total = count + new.count
    share = new.count / jnp.maximum(total, 1)
    shift, change = jnp.where(new.count > 0, new.mean - mean, 0), jnp.where(new.count > 0, new.var - var, 0)
    return total, mean + share * shift, var + share * change + share * (1 - share) * shift * shift


def _with_signs(y: jax.Array, call_index: jax.Array) -> list[jax.Array]:
    """y with random signs, for each projection; another call of the layer has other signs.

    The signs are bits of a hash of each value's position (Wellons' lowbias32), since jax.random's generator takes
    seconds to compile.
    """
    position = jnp.zeros(y.shape, jnp.uint32)
    for axis in range(y.ndim):
        stride = math.prod(y.shape[axis + 1 :]) % 2**32
        position += jax.lax.broadcasted_iota(jnp.uint32, y.shape, axis) * np.uint32(stride)
    bits = position ^ (call_index * np.uint32(0x9E3779B9))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(factor)
    bits = shard_as(bits ^ (bits >> np.uint32(16)), y)
    return [jnp.where((bits >> np.uint32(k)) & np.uint32(1) > 0, y, -y) for k in range(PROJECTIONS)]


def _sum_all(values: list[jax.Array], axes: tuple[int, ...]) -> list[jax.Array]:
    """The sum of each array, by one reduction: it compiles to one loop, and stores none of the arrays."""

    def add(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        return tuple(map(jnp.add, a, b))

    return list(jax.lax.reduce(tuple(values), (np.float32(0),) * len(values), add, axes))
