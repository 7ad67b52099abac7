"""What `jaxbn.recalibrate` compiles: a Flax model run on one batch, with the input of every batch norm measured."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from jaxbn._kernel.moments import Moments
from jaxbn._observe.calls import CallLinen, CallNNX, LayerCall, Observer, Variables, copy_nnx, nnx_layers
from jaxbn._observe.run import run_linen, run_nnx
from jaxbn._versions import set_value
from jaxbn.recalibrate._sweeps import Measured, States


@functools.lru_cache(maxsize=8)
def linen_step(
    model: nn.Module, call: CallLinen | None, method: str
) -> Callable[[Variables, object], dict[str, Measured]]:
    return jax.jit(lambda variables, batch: run_linen(model, variables, batch, call, _observer(method))[1])


@functools.lru_cache(maxsize=8)
def nnx_step(
    graphdef: nnx.GraphDef[nnx.Module], call: CallNNX | None, method: str
) -> Callable[[object, States, object], dict[str, Measured]]:
    @jax.jit
    def step(state: object, states: States, batch: object) -> dict[str, Measured]:
        model = copy_nnx(graphdef, state)
        for name, layer in nnx_layers(model).items():
            set_value(layer.mean, states[name].mean)
            set_value(layer.var, states[name].var)
        return run_nnx(model, batch, call, _observer(method))[1]

    return step


def _observer(method: str) -> Observer:
    """Adds the moments of a layer's input to its slot, and evaluates by its statistics or by those moments."""

    def initial(mean: jax.Array) -> Measured:
        zero = jnp.zeros(jnp.shape(mean))
        return Measured(Moments(zero, zero, zero, zero), zero, zero)

    def handler(call: LayerCall) -> jax.Array:
        before, m = call.read_slot(), call.moments()
        correction = jnp.full_like(m.mean, call.layer.correction)
        call.write_slot(Measured(before.moments.merge(m), before.calls + 1, correction))
        return call.evaluate() if method == "layerwise" else call.evaluate_by(m)

    return Observer(initial, handler)
