"""Runs a Flax network on batches, and measures the inputs and outputs of its norm layers meanwhile."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxbn._kernel import inputs
from jaxbn._kernel.moments import Moments
from jaxbn._observe.calls import Layer, LayerCall, Observer, copy_nnx, flatten_dict, name_of, nnx_layers
from jaxbn._observe.run import run_linen, run_nnx
from jaxbn.diagnose._evidence import Norm
from jaxbn.diagnose._find import make_norms, to_numpy

# Slots hold numbers per channel, so outputs of layers are compared by random projections of each channel. Estimated
# so, a root mean square over C channels is off by 1 / sqrt(2 * _PROJECTIONS * C), 6% of 16 (Achlioptas 2003).
_PROJECTIONS = 8


class Sums(NamedTuple):
    """What the slot of a layer holds: the moments of its inputs, if it normalized by them, and sums over its calls.

    `not_finite` counts input values, `square` is that of the outputs, and `projections` are random ones of the outputs.
    These are one array each: slots must have the shape of the statistics, since `nn.scan` cuts their leading axes.
    """

    moments: Moments
    calls: Any
    not_finite: Any
    square: Any
    projections: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class FirstCall:
    """What tracing shows of a layer: its options, and how it is called for the first time."""

    layer: Layer
    trains: bool
    examples: int


@dataclasses.dataclass(frozen=True)
class MeasuredRun:
    """One run on one batch; sums and first calls are by the names of the layers, the latter in the order of calls."""

    output: Any
    sums: dict[str, Sums]
    first_calls: dict[str, FirstCall]


class Runner:
    """A network of one `kind`, "linen" or "nnx", compiled for runs that measure and for runs that do not.

    `run(values, batch, observer)` is one of `jaxbn._observe.run`, where `values` are the network's arrays;
    `arrays_of(layer)` has those of a layer by their names.
    """

    def __init__(
        self, kind: str, values: Any, run: Callable[..., Any], arrays_of: Callable[[Layer], Mapping[str, Any]]
    ):
        self.kind = kind
        self._values, self._run, self._arrays_of = values, run, arrays_of
        self._measuring = {by_batch: self._compile(by_batch) for by_batch in (False, True)}
        self._plain = jax.jit(lambda values, batch: run(values, batch, None)[0])

    def _compile(self, by_batch: bool) -> tuple[Any, dict[str, FirstCall]]:
        first_calls: dict[str, FirstCall] = {}

        @jax.jit
        def measure(values: Any, batch: Any) -> Any:
            first_calls.clear()
            return self._run(values, batch, _observer(first_calls, by_batch))

        return measure, first_calls

    def measure(self, batch: Any, *, by_batch: bool) -> MeasuredRun:
        """Runs the network as its user does, or with every norm layer normalizing by the batch."""
        compiled, first_calls = self._measuring[by_batch]
        output, sums = compiled(self._values, batch)
        # A batch of another shape is traced anew, which changes the dictionary.
        return MeasuredRun(output, sums, dict(first_calls))

    def evaluate(self, batch: Any) -> Any:
        """The network's output."""
        return self._plain(self._values, batch)

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

    def run(variables: Any, batch: Any, observer: Observer | None) -> Any:
        return run_linen(model, variables, batch, call, observer)

    def arrays_of(layer: Layer) -> dict[str, Any]:
        collections = [flatten_dict(variables.get(name, {})) for name in ("params", "batch_stats")]
        return {path[-1]: v for flat in collections for path, v in flat.items() if name_of(path[:-1]) == layer.name}

    return Runner("linen", variables, run, arrays_of)


def nnx_runner(model: Any, call: Callable[[Any, Any], Any] | None) -> Runner:
    graphdef, state = nnx.split(model)
    layers = nnx_layers(model)

    def run(state: Any, batch: Any, observer: Observer | None) -> Any:
        return run_nnx(copy_nnx(graphdef, state), batch, call, observer)

    def arrays_of(layer: Layer) -> dict[str, Any]:
        return {name: v[...] for name, v in vars(layers[layer.name]).items() if isinstance(v, nnx.Variable)}

    return Runner("nnx", state, run, arrays_of)


def _observer(first_calls: dict[str, FirstCall], by_batch: bool) -> Observer:
    def initial(mean: jax.Array) -> Sums:
        zero, zero32 = jnp.zeros(jnp.shape(mean)), jnp.zeros(jnp.shape(mean), jnp.float32)
        return Sums(Moments(zero, zero, zero, zero), zero32, zero32, zero32, (zero32,) * _PROJECTIONS)

    def handler(call: LayerCall) -> jax.Array:
        layer, x, before = call.layer, call.x, call.read_slot()
        reduced = inputs.other_axes(x.ndim, inputs.resolve_axes(x.ndim, layer.axis))
        examples = x.shape[reduced[0]] if reduced else 1
        first_calls.setdefault(layer.name, FirstCall(layer, call.trains, examples))

        moments = before.moments
        if by_batch:
            own = call.moments()
            moments, y = moments.merge(own), call.evaluate_by(own)
        else:
            y = call()
        number = jnp.max(before.calls).astype(jnp.int32)
        added = call.place(_sums_of_call(x, y, reduced, number), jnp.float32)
        call.write_slot(Sums(moments, *jax.tree.map(jnp.add, tuple(before[1:]), added)))
        return y

    return Observer(initial, handler)


def _sums_of_call(x: jax.Array, y: jax.Array, reduced: tuple[int, ...], number: jax.Array) -> tuple[Any, ...]:
    """The fields of `Sums` behind the moments; `number` is that of the call."""
    wide = y.astype(jnp.float32)
    # Each value has one random byte, and each projection takes its signs from one bit of it. Another call of the same
    # layer has other bytes.
    signs = jax.random.bits(jax.random.fold_in(jax.random.key(0), number), y.shape, jnp.uint8)
    bits = [(signs >> jnp.uint8(k)) & jnp.uint8(1) for k in range(_PROJECTIONS)]
    projections = tuple(jnp.sum(jnp.where(bit > 0, wide, -wide), reduced) for bit in bits)
    square = jnp.sum(wide * wide, reduced)
    return jnp.ones_like(square), jnp.sum(~jnp.isfinite(x), reduced), square, projections


def of_domains(sums: Sums, number: int) -> list[Sums]:
    """Sums as float64 NumPy [C], for each of `number` domains."""
    arrays = jax.tree.map(to_numpy, sums)
    if number == 1:
        return [jax.tree.map(np.ravel, arrays)]
    return [jax.tree.map(lambda v, d=d: v[d], arrays) for d in range(number)]


def squared_distance(a: Sums, b: Sums) -> float:
    """Estimates the sum of squares of the difference of two outputs."""
    pairs = zip(a.projections, b.projections, strict=True)
    return float(sum(np.sum((p - q) ** 2) for p, q in pairs)) / _PROJECTIONS
