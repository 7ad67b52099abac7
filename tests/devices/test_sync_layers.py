"""The layers' statistics across devices are the functions', and need no device outside training."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from marks import grid
from parallel import AXIS, P, assert_near, mesh

import jaxbn
import jaxbn.linen
import jaxbn.nnx

C = 3
X = jnp.asarray(np.random.default_rng(0).normal(5, 2, (16, 5, C)), jnp.float32)
MASK = jnp.asarray(np.random.default_rng(1).random((16, 5)) < 0.6)
PARAMS, STATE = jaxbn.batch_norm_init(C)
OPTIONS = [{}, {"virtual_batch_size": 2}, {"virtual_batch_size": 8}, {"virtual_batch_size": 100}]


def expected(**options):
    y, new = jaxbn.batch_norm_train(X, PARAMS, STATE, momentum=0.01, correction=0, mask=MASK, **options)
    return y, {"mean": new.mean, "var": new.var}


def on_devices(mode, function):
    """`function(x, mask)` on each of 8 devices: y of the whole batch and the statistics of one."""
    if mode == "shard_map":
        return jax.jit(jax.shard_map(function, mesh=mesh(8), in_specs=P(AXIS), out_specs=(P(AXIS), P())))(X, MASK)
    transform = jax.pmap if mode == "pmap" else jax.vmap
    y, stats = transform(function, axis_name=AXIS)(X.reshape(8, 2, 5, C), MASK.reshape(8, 2, 5))
    return y.reshape(X.shape), jax.tree.map(lambda v: v[3], stats)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@grid("mode", ["shard_map", "pmap", "vmap"], quick=lambda mode: mode == "shard_map")
def test_linen(mode, options):
    layer = jaxbn.linen.BatchNorm(axis_name=AXIS, **options)
    # Neither initialization nor evaluation is inside a mapped function.
    variables = layer.init(jax.random.key(0), X[:2], use_running_average=False)
    layer.apply(variables, X, use_running_average=True)

    def train(x, mask):
        y, new = layer.apply(variables, x, use_running_average=False, mask=mask[..., None], mutable=["batch_stats"])
        return y, new["batch_stats"]

    assert_near(on_devices(mode, train), expected(**options))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@grid("mode", ["shard_map", "pmap", "vmap"], quick=lambda mode: mode == "vmap")
def test_nnx(mode, options):
    layer = jaxbn.nnx.BatchNorm(C, axis_name=AXIS, rngs=nnx.Rngs(0), **options)
    layer(X, use_running_average=True)

    def train(x, mask):
        own = nnx.clone(layer)
        y = own(x, mask=mask[..., None])
        return y, {"mean": own.mean[...], "var": own.var[...]}

    assert_near(on_devices(mode, train), expected(**options))


@pytest.mark.slow
def test_nnx_transformations():
    layer = jaxbn.nnx.BatchNorm(C, axis_name=AXIS, rngs=nnx.Rngs(0))
    state_axes = nnx.StateSharding({...: P()})
    train = nnx.shard_map(
        lambda layer, x, mask: layer(x, mask=mask[..., None]),
        mesh=mesh(8),
        in_specs=(state_axes, P(AXIS), P(AXIS)),
        out_specs=P(AXIS),
    )
    y = train(layer, X, MASK)
    assert_near((y, {"mean": layer.mean[...], "var": layer.var[...]}), expected())

    layer = jaxbn.nnx.BatchNorm(C, axis_name=AXIS, rngs=nnx.Rngs(0))
    train = nnx.pmap(lambda layer, x, mask: layer(x, mask=mask[..., None]), axis_name=AXIS, in_axes=(None, 0, 0))
    y = train(layer, X.reshape(8, 2, 5, C), MASK.reshape(8, 2, 5))
    assert_near((y.reshape(X.shape), {"mean": layer.mean[...], "var": layer.var[...]}), expected())


@pytest.mark.slow
def test_masked_where_flax_averages_averages():
    # One value on the first device, three on the second: Flax gives both devices half the weight.
    x = jnp.array([[[1.0], [0.0], [0.0]], [[2.0], [3.0], [4.0]]])
    mask = jnp.array([[True, False, False], [True, True, True]])

    def stats(norm):
        layer = norm(use_running_average=False, axis_name=AXIS, momentum=0.0)
        variables = layer.init(jax.random.key(0), x[1])

        def apply(x, mask):
            return layer.apply(variables, x, mask=mask[:, None], mutable=["batch_stats"])[1]["batch_stats"]

        return jax.vmap(apply, axis_name=AXIS, out_axes=None)(x, mask)

    np.testing.assert_allclose(stats(jaxbn.linen.BatchNorm)["mean"], 2.5)
    np.testing.assert_allclose(stats(jaxbn.linen.BatchNorm)["var"], 1.25)
    np.testing.assert_allclose(stats(nn.BatchNorm)["mean"], 2.0)
