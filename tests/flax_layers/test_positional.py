"""Arguments by position, as transformations of a layer need them: NNX's take no others, and `nn.vmap` ignores these."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from layers import assert_close

import jaxbn.linen
import jaxbn.nnx

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((2, 4, 5, 4)), jnp.float32)
MASK = jnp.asarray(RNG.random(X.shape) < 0.7)
LAYERS = {
    "BatchNorm": {"momentum": 0.5},
    "BatchRenorm": {"momentum": 0.5, "limits": (3.0, 5.0)},
    "LayerNorm": {},
    "RMSNorm": {},
    "GroupNorm": {"num_groups": 2},
    "InstanceNorm": {},
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def arguments(name, x, mask):
    return (x, None, mask) if "Batch" in name else (x, mask)


def make_nnx(name):
    return getattr(jaxbn.nnx, name)(4, **LAYERS[name], rngs=nnx.Rngs(0))


def state_of(layer):
    return nnx.to_pure_dict(nnx.state(layer))


def expected_nnx(name, x, mask):
    layer = make_nnx(name)
    return layer(x, mask=mask), state_of(layer)


@every_layer
@pytest.mark.parametrize("transform", [lambda f: f, nnx.remat, nnx.jit], ids=["none", "remat", "jit"])
def test_nnx(name, transform):
    layer = make_nnx(name)
    y = transform(type(layer).__call__)(layer, *arguments(name, X[0], MASK[0]))
    assert_close((y, state_of(layer)), expected_nnx(name, X[0], MASK[0]))


@every_layer
def test_nnx_vmap(name):
    layers = nnx.vmap(lambda _: make_nnx(name))(jnp.arange(2))
    y = nnx.vmap(type(layers).__call__)(layers, *arguments(name, X, MASK))
    expected = [expected_nnx(name, x, mask) for x, mask in zip(X, MASK, strict=True)]
    assert_close((y, state_of(layers)), jax.tree.map(lambda *v: jnp.stack(v), *expected))


def test_nnx_remat_of_an_instance_by_keyword():
    layer = make_nnx("LayerNorm")
    assert_close(nnx.remat(layer)(X, mask=MASK), layer(X, mask=MASK))
    assert_close(nnx.vmap(layer)(X), layer(X))


def make_linen(name, transform):
    options = LAYERS[name] | ({"use_running_average": False} if "Batch" in name else {})
    return transform(getattr(jaxbn.linen, name))(**options)


def run_linen(name, transform, *inputs, **kwargs):
    layer = make_linen(name, transform)
    variables = layer.init(jax.random.key(0), *inputs, **kwargs)
    return layer.apply(variables, *inputs, **kwargs, mutable=["batch_stats"])


@every_layer
@pytest.mark.parametrize("transform", [lambda cls: cls, nn.remat], ids=["none", "remat"])
def test_linen(name, transform):
    expected = run_linen(name, lambda cls: cls, X[0], mask=MASK[0])
    assert_close(run_linen(name, transform, *arguments(name, X[0], MASK[0])), expected)


@every_layer
def test_linen_vmap(name):
    def transform(cls):
        return nn.vmap(cls, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})

    expected = [run_linen(name, lambda cls: cls, x, mask=mask) for x, mask in zip(X, MASK, strict=True)]
    actual = run_linen(name, transform, *arguments(name, X, MASK))
    assert_close(actual, jax.tree.map(lambda *v: jnp.stack(v), *expected))
