"""What `jaxbn.recalibrate` runs of a Flax model: one batch, compiled, with every batch norm layer measured."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._kernel.moments import Moments
from jaxbn._observe import calls
from jaxbn._observe.run import apply_linen, whole_batches
from jaxbn.recalibrate._sweeps import Measured, States


def cached(make: Any, *static: Any) -> Any:
    """The compiled step of a model, the same as last time where the model can be recognized."""
    try:
        return make(*static)
    except TypeError:  # not hashable
        return make.__wrapped__(*static)


@functools.lru_cache(maxsize=8)
def linen_step(model: Any, call: Any, method: str) -> Any:
    @jax.jit
    def step(variables: Any, batch_stats: Any, batch: Any) -> Any:
        slot = calls.new_slot()
        stats = calls.add_slots(batch_stats, slot, _nothing)

        def apply(*args: Any, **kwargs: Any) -> Any:
            nonlocal stats
            y, stats = apply_linen(model, variables, stats, *args, **kwargs)
            return y

        with calls.observe_linen(_handler(slot, method)), whole_batches(batch, call, "apply"):
            apply(batch) if call is None else call(apply, batch)
        return calls.take_slots(stats, slot)

    return step


@functools.lru_cache(maxsize=8)
def nnx_step(graphdef: Any, call: Any, method: str) -> Any:
    @jax.jit
    def step(state: Any, states: States, batch: Any) -> dict[str, Measured]:
        model = calls.copy_nnx(graphdef, state)
        layers = {calls.name_of(path): layer for path, layer in calls.nnx_layers(model).items()}
        for name, layer in layers.items():
            layer.mean.set_value(states[name].mean)
            layer.var.set_value(states[name].var)
        slot = calls.new_slot()
        observed = calls.observe_nnx(model, _handler(slot, method), slot, _nothing)
        with observed, whole_batches(batch, call, "model"):
            model(batch) if call is None else call(model, batch)
            return {name: calls.read_variables(layer, slot) for name, layer in layers.items()}

    return step


def _nothing(mean: jax.Array) -> Measured:
    zero = jnp.zeros(jnp.shape(mean))
    return Measured(Moments(zero, zero, zero, zero), zero, zero)


def _handler(slot: str, method: str) -> calls.Handler:
    """Adds the moments of a layer's input to its slot, and evaluates by its statistics or by those moments."""

    def handler(layer: calls.Layer, x: jax.Array, mask: Any, call: calls.Call) -> jax.Array:
        before = call.read_slot(slot)
        own = call.placed(layer.moments(x, mask))
        correction = jnp.full_like(own.mean, layer.correction)
        call.write(slot, Measured(before.moments.merge(own), before.calls + 1, correction))
        return call(use_running_average=True) if method == "layerwise" else call.by_moments(own)

    return handler
