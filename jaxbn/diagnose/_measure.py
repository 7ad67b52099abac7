"""Runs a Flax model on a batch with every norm layer measured; what leaves does so through slots (`calls.py`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxbn._kernel import inputs
from jaxbn._kernel.moments import Moments
from jaxbn._norms.domains import put_domain
from jaxbn._observe import calls
from jaxbn._observe.run import apply_linen, whole_batches
from jaxbn.diagnose._evidence import Array, Norm
from jaxbn.diagnose._find import make_norms, to_numpy

# Outputs of layers are compared by random projections, since slots hold numbers per channel only: the estimate
# of a root mean square over C channels is off by 1 / sqrt(2 * _PROJECTIONS * C), 6% of 16 (Achlioptas 2003).
_PROJECTIONS = 8

Path = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Seen:
    """What is known of a layer before any number is: its options, how it was called, on what shape."""

    layer: calls.Layer
    training: bool
    examples: int
    virtual_batch_size: int | None


@dataclasses.dataclass(frozen=True)
class Pass:
    """One run: the model's output, and what each layer's slot holds; `seen` is in the order of the calls."""

    output: Any
    slots: dict[Path, dict[str, Any]]
    seen: dict[Path, Seen]


class LinenRunner:
    """Runs `call(apply, batch)`, where `apply` is the model's with its variables given."""

    kind = "linen"

    def __init__(self, model: Any, variables: Any, call: Callable[[Any, Any], Any] | None):
        if "batch_stats" not in variables:
            raise ValueError(
                f"variables: expected a collection 'batch_stats', got {', '.join(map(repr, variables)) or 'none'}; "
                "pass all that model.init returned, with what apply(..., mutable=['batch_stats']) put in its place"
            )
        self._call, self._model, self._variables = call, model, variables
        self._evaluate = jax.jit(self._evaluate_linen)
        self._steps: dict[bool, tuple[Any, dict[Path, Seen]]] = {}

    def run(self, batch: Any, *, by_batch: bool) -> Pass:
        if by_batch not in self._steps:
            self._steps[by_batch] = self._compile(by_batch)
        step, seen = self._steps[by_batch]
        output, slots = step(self._variables, batch)
        # A copy: the next batch may have another shape, and be traced anew.
        return Pass(output, slots, dict(seen))

    def _compile(self, by_batch: bool) -> tuple[Any, dict[Path, Seen]]:
        seen: dict[Path, Seen] = {}

        @jax.jit
        def step(variables: Any, batch: Any) -> Any:
            seen.clear()
            slot = calls.new_slot()
            stats = calls.add_slots(variables["batch_stats"], slot, _nothing)

            def apply(*args: Any, **kwargs: Any) -> Any:
                nonlocal stats
                y, stats = apply_linen(self._model, variables, stats, *args, **kwargs)
                return y

            observed = calls.observe_linen(_handler(slot, seen, by_batch))
            with observed, whole_batches(batch, self._call, "apply"):
                output = apply(batch) if self._call is None else self._call(apply, batch)
            return output, calls.take_slots(stats, slot)

        return step, seen

    def evaluate(self, batch: Any) -> Any:
        """The model's output, and nothing measured."""
        return self._evaluate(self._variables, batch)

    def _evaluate_linen(self, variables: Any, batch: Any) -> Any:
        def apply(*args: Any, **kwargs: Any) -> Any:
            return apply_linen(self._model, variables, variables["batch_stats"], *args, **kwargs)[0]

        return apply(batch) if self._call is None else self._call(apply, batch)

    def norms(self, path: Path, seen: Seen, steps: int | None) -> list[Norm]:
        arrays = _at(self._variables["batch_stats"], path)
        params = _at(self._variables.get("params", {}), path)
        return _norms(arrays | {k: v for k, v in params.items() if k in ("scale", "bias")}, seen, steps, self.kind)


class NnxRunner:
    """Runs `call(model, batch)` with copies of the model, which stays as it is."""

    kind = "nnx"

    def __init__(self, model: Any, call: Callable[[Any, Any], Any] | None):
        self._call = call
        self._graphdef, self._state = nnx.split(model)
        self._layers = calls.nnx_layers(model)
        self._evaluate = jax.jit(self._evaluate_nnx)
        self._steps: dict[bool, tuple[Any, dict[Path, Seen]]] = {}

    def run(self, batch: Any, *, by_batch: bool) -> Pass:
        if by_batch not in self._steps:
            self._steps[by_batch] = self._compile(by_batch)
        step, seen = self._steps[by_batch]
        output, slots = step(self._state, batch)
        return Pass(output, dict(zip(self._layers, slots, strict=True)), dict(seen))

    def _compile(self, by_batch: bool) -> tuple[Any, dict[Path, Seen]]:
        seen: dict[Path, Seen] = {}

        @jax.jit
        def step(state: Any, batch: Any) -> Any:
            seen.clear()
            model = calls.copy_nnx(self._graphdef, state)
            slot = calls.new_slot()
            observed = calls.observe_nnx(model, _handler(slot, seen, by_batch), slot, _nothing)
            with observed, whole_batches(batch, self._call, "model"):
                output = model(batch) if self._call is None else self._call(model, batch)
                layers = calls.nnx_layers(model).values()
                return output, [calls.read_variables(layer, slot) for layer in layers]

        return step, seen

    def evaluate(self, batch: Any) -> Any:
        """The model's output, and nothing measured."""
        return self._evaluate(self._state, batch)

    def _evaluate_nnx(self, state: Any, batch: Any) -> Any:
        model = calls.copy_nnx(self._graphdef, state)
        return model(batch) if self._call is None else self._call(model, batch)

    def norms(self, path: Path, seen: Seen, steps: int | None) -> list[Norm]:
        layer = self._layers[path]
        names = ("mean", "var", "scale", "bias", "num_batches_tracked")
        found = {name: getattr(layer, name, None) for name in names}
        return _norms({name: v[...] for name, v in found.items() if v is not None}, seen, steps, self.kind)


Runner = LinenRunner | NnxRunner


def pieces(slot: Mapping[str, Any], parts: int) -> list[dict[str, Array]]:
    """A slot as float64 NumPy [C], one for each of `parts` domains."""
    arrays = {name: to_numpy(value) for name, value in slot.items()}
    if parts == 1:
        return [{name: v.ravel() for name, v in arrays.items()}]
    return [{name: v[d] for name, v in arrays.items()} for d in range(parts)]


def _norms(arrays: Mapping[str, Any], seen: Seen, steps: int | None, kind: str) -> list[Norm]:
    layer = seen.layer
    named = {name: arrays.get(name) for name in ("mean", "var", "scale", "bias")}
    count = arrays.get("num_batches_tracked")
    return make_norms(
        layer.name,
        named,
        model=kind,
        count=count,
        domains=layer.num_domains is not None,
        eps=layer.eps,
        decay=layer.decay,
        cumulative=layer.decay is None,
        steps=steps,
    )


def _at(tree: Any, path: Path) -> dict[str, Any]:
    flat = calls.flatten_dict(tree)
    return {key[-1]: value for key, value in flat.items() if key[:-1] == tuple(path)}


def _nothing(mean: jax.Array) -> dict[str, Any]:
    zero = jnp.zeros(jnp.shape(mean), jnp.float32)
    names = ("mean", "var", "count", "calls", "not_finite", "square")
    # A leading axis would be taken for one of the layers where a network is scanned over.
    return dict.fromkeys((*names, *_sketches()), zero)


def _sketches() -> list[str]:
    return [f"sketch{k}" for k in range(_PROJECTIONS)]


def distance(a: Mapping[str, Array], b: Mapping[str, Array]) -> float:
    """Estimates the sum of squares of the difference of two outputs."""
    return float(sum(np.sum((a[name] - b[name]) ** 2) for name in _sketches())) / _PROJECTIONS


def _handler(slot: str, seen: dict[Path, Seen], by_batch: bool) -> calls.Handler:
    """Measures input and output of each layer; with `by_batch` each normalizes by its batch, whatever its mode."""

    def handler(layer: calls.Layer, x: jax.Array, mask: Any, call: calls.Call) -> jax.Array:
        before = call.read_slot(slot)
        given = call.arguments.get("use_running_average")
        training = not (layer.module.use_running_average if given is None else given)
        features = inputs.resolve_axes(x.ndim, layer.axis)
        rows = inputs.other_axes(x.ndim, features)
        virtual = getattr(layer.module, "virtual_batch_size", None)
        seen.setdefault(layer.path, Seen(layer, training, x.shape[rows[0]] if rows else 1, virtual))

        own = layer.moments(x, mask) if by_batch else None
        y = call() if own is None else call.by_moments(call.placed(own))
        now = _of_output(x, y, rows, jnp.max(before["calls"]).astype(jnp.int32))
        if own is not None:
            now |= {"mean": own.mean, "var": own.var, "count": own.count}
        now = {name: jnp.asarray(v, jnp.float32) for name, v in now.items()}
        if layer.num_domains is not None:
            none = {name: jnp.zeros_like(before[name]) for name in now}
            now = put_domain(none, call.domain, now)
        after = before | {name: before[name] + now[name] for name in now}
        if own is not None:
            merged = _moments_of(before).merge(_moments_of(now))
            after |= {"mean": merged.mean, "var": merged.var, "count": merged.count}
        call.write(slot, after)
        return y

    return handler


def _moments_of(slot: Mapping[str, Any]) -> Moments:
    return Moments(slot["mean"], slot["var"], slot["count"], jnp.zeros_like(slot["mean"]))


def _of_output(x: jax.Array, y: jax.Array, rows: tuple[int, ...], number: jax.Array) -> dict[str, jax.Array]:
    wide = y.astype(jnp.float32)
    # A bit of one random byte each is a sign; another byte for each call of the same layer.
    signs = jax.random.bits(jax.random.fold_in(jax.random.key(0), number), y.shape, jnp.uint8)
    bits = [(signs >> jnp.uint8(k)) & jnp.uint8(1) for k in range(_PROJECTIONS)]
    projected = [jnp.sum(jnp.where(bit > 0, wide, -wide), rows) for bit in bits]
    square = jnp.sum(wide * wide, rows)
    return {
        "not_finite": jnp.sum(~jnp.isfinite(x), rows),
        "square": square,
        "calls": jnp.ones(square.shape),
        **dict(zip(_sketches(), projected, strict=True)),
    }
