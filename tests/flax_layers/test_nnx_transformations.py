"""The NNX layer under NNX's and JAX's transformations."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from layers import assert_close, batches
from nnx_layers import make, state_of

from jaxbn.nnx import BatchNorm


def by_jit(layer, x):
    return nnx.jit(lambda layer, x: layer(x))(layer, x)


def by_split_and_merge(layer, x):
    graph, state = nnx.split(layer)

    @jax.jit
    def step(state, x):
        layer = nnx.merge(graph, state)
        return layer(x), nnx.state(layer)

    y, state = step(state, x)
    nnx.update(layer, state)
    return y


def by_grad(layer, x, call=lambda layer, x: layer(x)):
    def loss(layer, x):
        y = call(layer, x)
        return jnp.sum(jnp.sin(y)), y

    (_, y), _ = nnx.jit(nnx.value_and_grad(loss, has_aux=True))(layer, x)
    return y


def by_grad_of_remat(layer, x):
    return by_grad(layer, x, nnx.remat(lambda layer, x: layer(x)))


@pytest.mark.parametrize("call", [by_jit, by_split_and_merge, by_grad, by_grad_of_remat])
def test_transformed_call_is_the_call(call):
    x = batches()[0]
    layer, plain = (make(BatchNorm, momentum=None) for _ in range(2))
    result = call(layer, x), state_of(layer)
    assert layer.num_batches_tracked[...] == 1
    assert_close(result, (plain(x), state_of(plain)))


@pytest.mark.parametrize("momentum", [0.99, None])
def test_eval_shape_of_the_constructor_is_the_constructor(momentum):
    def build():
        return make(BatchNorm, momentum=momentum)

    def picture(layer):
        return jax.tree.map(lambda v: (v.shape, v.dtype), nnx.to_pure_dict(nnx.state(layer)))

    assert picture(nnx.eval_shape(build)) == picture(build())


def stack_of_layers(number):
    @nnx.split_rngs(splits=number)
    @nnx.vmap
    def create(rngs):
        return BatchNorm(3, scale_init=nnx.initializers.normal(1.0), rngs=rngs)

    return create(nnx.Rngs(0))


def unstack(layers, index):
    graph, state = nnx.split(layers)
    return nnx.merge(graph, jax.tree.map(lambda v: v[index], state))


def test_vmap_keeps_statistics_of_each_model():
    xs = batches()
    layers = stack_of_layers(len(xs))
    alone = [unstack(layers, k) for k in range(len(xs))]
    y = nnx.vmap(lambda layer, x: layer(x))(layers, xs)
    expected = [(layer(x), state_of(layer)) for layer, x in zip(alone, xs, strict=True)]
    assert_close((y, state_of(layers)), jax.tree.map(lambda *v: jnp.stack(v), *expected))


@pytest.mark.slow
def test_scan_over_layers_keeps_statistics_of_each():
    x = batches()[0]
    layers = stack_of_layers(3)
    alone = [unstack(layers, k) for k in range(3)]
    y = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, layers)
    for layer in alone:
        x = layer(x)
    assert_close(y, x)
    assert_close(state_of(layers), jax.tree.map(lambda *v: jnp.stack(v), *map(state_of, alone)))
