"""Runs a Flax network on batches, and measures the inputs and outputs of its norm layers meanwhile."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxbn._arrays import to_float64
from jaxbn._kernel import inputs
from jaxbn._kernel.explicit_mesh import shard_as
from jaxbn._kernel.moments import Moments
from jaxbn._observe.calls import Layer, LayerCall, Observer, copy_nnx, flatten_dict, nnx_layers
from jaxbn._observe.run import cached, run_linen, run_nnx
from jaxbn._paths import name_of
from jaxbn.diagnose._evidence import Norm
from jaxbn.diagnose._find import make_norms

# Slots hold numbers per channel, so outputs of layers are compared by random projections of each channel. Estimated
# so, a root mean square over C channels is off by 1 / sqrt(2 * _PROJECTIONS * C), 6% of 16 (Achlioptas 2003).
_PROJECTIONS = 8


class Sums(NamedTuple):
    """What the slot of a layer holds: sums over its calls, and the moments of its inputs if it normalized by them.

    `projections` are random ones of the outputs, `square` is the sum of their squares, and `not_finite` counts values
    of the inputs. Each is an array of its own: slots must have the shape of the statistics, since `nn.scan` cuts their
    leading axes.
    """

    calls: Any
    projections: tuple[Any, ...]
    square: Any
    not_finite: Any
    moments: tuple[Any, Any, Any]  # count, mean, variance


@dataclasses.dataclass(frozen=True)
class FirstCall:
    """What tracing shows of a layer: its options, and how it is called for the first time."""

    layer: Layer
    trains: bool
    examples: int


@jax.tree_util.register_static
class _FirstCalls(dict[str, FirstCall]):
    """By the names of the layers, in the order of calls. Static, so that a compiled step returns those of its trace."""

    __hash__ = object.__hash__  # type: ignore[assignment]


@dataclasses.dataclass(frozen=True)
class MeasuredRun:
    """One run on one batch; sums and first calls are by the names of the layers, the latter in the order of calls."""

    output: Any
    sums: dict[str, Sums]
    first_calls: dict[str, FirstCall]


class Runner:
    """A network of one `kind`, "linen" or "nnx".

    `make_step(by_batch)` is compiled and takes the network's arrays, `values`, and a batch; `arrays_of(layer)` has the
    arrays of a layer by their names.
    """

    def __init__(
        self, kind: str, values: Any, make_step: Callable[[bool], Any], arrays_of: Callable[[Layer], Mapping[str, Any]]
    ):
        self.kind = kind
        self._values, self._arrays_of = values, arrays_of
        self._steps = {by_batch: make_step(by_batch) for by_batch in (False, True)}

    def measure(self, batch: Any, *, by_batch: bool) -> MeasuredRun:
        """Runs the network as its user does, or with every norm layer normalizing by the batch."""
        return MeasuredRun(*self._steps[by_batch](self._values, batch))

    def norms(self, layer: Layer, steps: int | None) -> list[Norm]:
        """What is stored of a layer, for each of its domains."""
        arrays = self._arrays_of(layer)
        return make_norms(
            layer.name,
            {name: arrays.get(name) for name in ("mean", "var", "scale", "bias")},
            model=self.kind,
            count=arrays.get("num_batches_tracked"),
            domains=layer.num_domains is not None,
            eps=layer.eps,
            decay=layer.decay,
            cumulative=layer.decay is None,
            steps=steps,
        )


def linen_runner(model: Any, variables: Any, call: Callable[[Any, Any], Any] | None) -> Runner:
    if "batch_stats" not in variables:
        raise ValueError(
            f"variables: expected a collection 'batch_stats', got {', '.join(map(repr, variables)) or 'none'}; "
            "pass all that model.init returned, with what apply(..., mutable=['batch_stats']) put in its place"
        )

    def arrays_of(layer: Layer) -> dict[str, Any]:
        collections = [flatten_dict(variables.get(name, {})) for name in ("params", "batch_stats")]
        return {path[-1]: v for flat in collections for path, v in flat.items() if name_of(path[:-1]) == layer.name}

    return Runner("linen", variables, functools.partial(cached, _linen_step, model, call), arrays_of)


def nnx_runner(model: Any, call: Callable[[Any, Any], Any] | None) -> Runner:
    graphdef, state = nnx.split(model)
    layers = nnx_layers(model)

    def arrays_of(layer: Layer) -> dict[str, Any]:
        return {name: v[...] for name, v in vars(layers[layer.name]).items() if isinstance(v, nnx.Variable)}

    return Runner("nnx", state, functools.partial(cached, _nnx_step, graphdef, call), arrays_of)


@functools.lru_cache(maxsize=8)
def _linen_step(model: Any, call: Any, by_batch: bool) -> Any:
    return _step(lambda variables, batch, observer: run_linen(model, variables, batch, call, observer), by_batch)


@functools.lru_cache(maxsize=8)
def _nnx_step(graphdef: Any, call: Any, by_batch: bool) -> Any:
    return _step(lambda state, batch, observer: run_nnx(copy_nnx(graphdef, state), batch, call, observer), by_batch)


def _step(run: Callable[[Any, Any, Observer], Any], by_batch: bool) -> Any:
    @jax.jit
    def step(values: Any, batch: Any) -> Any:
        first_calls = _FirstCalls()
        return *run(values, batch, _observer(first_calls, by_batch)), first_calls

    return step


def _observer(first_calls: dict[str, FirstCall], by_batch: bool) -> Observer:
    def initial(mean: jax.Array) -> Sums:
        zero, wide = jnp.zeros(jnp.shape(mean), jnp.float32), jnp.zeros(jnp.shape(mean))
        return Sums(zero, (zero,) * _PROJECTIONS, zero, zero, (wide, wide, wide))

    def handler(call: LayerCall) -> jax.Array:
        layer, x, before = call.layer, call.x, call.read_slot()
        reduced = inputs.other_axes(x.ndim, inputs.resolve_axes(x.ndim, layer.axis))
        examples = x.shape[reduced[0]] if reduced else 1
        first_calls.setdefault(layer.name, FirstCall(layer, call.trains, examples))

        moments = before.moments
        if by_batch:
            own = call.moments()
            moments, y = _merge(moments, own), call.evaluate_by(own)
        else:
            y = call()
        wide = y.astype(jnp.float32)
        signed = _with_signs(wide, jnp.max(before.calls).astype(jnp.uint32))
        bad = (~jnp.isfinite(x)).astype(jnp.float32)
        *projections, square, not_finite = _sum_all([*signed, wide * wide, bad], reduced)
        new = (jnp.ones_like(square), tuple(projections), square, not_finite)
        calls, sums, squares, bad = jax.tree.map(jnp.add, tuple(before[:4]), call.place(new, jnp.float32))
        call.write_slot(Sums(calls, sums, squares, bad, moments))
        return y

    return Observer(initial, handler)


def _merge(before: tuple[Any, Any, Any], new: Moments) -> tuple[Any, Any, Any]:
    """As `Moments.merge`, which takes long to compile, but without the low parts of means, which are not looked at."""
    count, mean, var = before
    total = count + new.count
    share = new.count / jnp.maximum(total, 1)
    shift, change = (jnp.where(new.count > 0, v, 0) for v in (new.mean - mean, new.var - var))
    return total, mean + share * shift, var + share * change + share * (1 - share) * shift * shift


def _with_signs(y: jax.Array, number: jax.Array) -> list[jax.Array]:
    """y with random signs, for each projection; `number` is that of the call, and another call has other signs.

    The signs are bits of a hash of each value's position (Wellons' lowbias32), since jax.random's generator takes
    seconds to compile.
    """
    position = jnp.zeros(y.shape, jnp.uint32)
    for axis in range(y.ndim):
        stride = math.prod(y.shape[axis + 1 :]) % 2**32
        position += jax.lax.broadcasted_iota(jnp.uint32, y.shape, axis) * np.uint32(stride)
    bits = position ^ (number * np.uint32(0x9E3779B9))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(factor)
    bits = shard_as(bits ^ (bits >> np.uint32(16)), y)
    return [jnp.where((bits >> np.uint32(k)) & np.uint32(1) > 0, y, -y) for k in range(_PROJECTIONS)]


def _sum_all(values: list[jax.Array], axes: tuple[int, ...]) -> list[jax.Array]:
    """The sum of each array, by one reduction: it compiles to one loop, and stores none of the arrays."""

    def add(a: Any, b: Any) -> Any:
        return tuple(map(jnp.add, a, b))

    return list(jax.lax.reduce(tuple(values), (np.float32(0),) * len(values), add, axes))


def of_domains(sums: Sums, number: int) -> list[Sums]:
    """Sums as float64 NumPy [C], for each of `number` domains."""
    arrays = jax.tree.map(to_float64, sums)
    if number == 1:
        return [jax.tree.map(np.ravel, arrays)]
    return [jax.tree.map(lambda v, d=d: v[d], arrays) for d in range(number)]


def squared_distance(a: Sums, b: Sums) -> float:
    """Estimates the sum of squares of the difference of two outputs."""
    pairs = zip(a.projections, b.projections, strict=True)
    return float(sum(np.sum((p - q) ** 2) for p, q in pairs)) / _PROJECTIONS
