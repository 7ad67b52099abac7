"""Several NNX layers, stacked by `nnx.vmap`: each does what it does alone, and the errors say how to call them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from layers import assert_close

import jaxbn
import jaxbn.nnx
from jaxbn.nnx import replace_batch_norms

X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5, 4, 2)), jnp.float32)
KEYS = jax.random.split(jax.random.key(0), 3)
LAYERS = {
    "BatchNorm": {"momentum": None, "virtual_batch_size": 2},
    "BatchRenorm": {"limits": (3.0, 5.0), "momentum": 0.5},
    "LayerNorm": {},
    "RMSNorm": {},
    "GroupNorm": {"num_groups": 1},
    "InstanceNorm": {},
}


def stacked(cls, axis=0, **options):
    options["scale_init"] = nnx.initializers.normal(1.0)
    axes = nnx.StateAxes({...: axis})
    return nnx.vmap(lambda key: cls(2, rngs=nnx.Rngs(key), **options), out_axes=axes)(KEYS)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_each_as_alone(name):
    layers = stacked(getattr(jaxbn.nnx, name), **LAYERS[name])
    graphdef, state = nnx.split(layers)
    alone = [nnx.merge(graphdef, jax.tree.map(lambda v, k=k: v[k], state)) for k in range(3)]
    expected = [(layer(x), nnx.to_pure_dict(nnx.state(layer))) for layer, x in zip(alone, X, strict=True)]
    y = nnx.vmap(lambda layer, x: layer(x))(layers, X)
    assert_close((y, nnx.to_pure_dict(nnx.state(layers))), jax.tree.map(lambda *v: jnp.stack(v), *expected))


@pytest.mark.slow
def test_domains():
    layers = stacked(jaxbn.nnx.BatchNorm, num_domains=4, momentum=0.0)
    nnx.vmap(lambda layer, x: layer(x, domain=1))(layers, X)
    assert layers.mean.shape == (3, 4, 2)
    np.testing.assert_allclose(layers.mean[:, 1], np.asarray(X, np.float64).mean((1, 2)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"num_domains": 4}])
def test_counters(options):
    twice = nnx.vmap(lambda _: stacked(jaxbn.nnx.BatchNorm, **options))(jnp.arange(2))
    shape = replace_batch_norms(twice, momentum=None).num_batches_tracked.shape
    assert shape == (2, 3, *options.values())


def test_counters_along_the_last_axis():
    model = nnx.Sequential(stacked(nnx.BatchNorm, -1))
    with pytest.raises(ValueError, match="expected a number") as error:
        replace_batch_norms(model, momentum=None)
    assert str(error.value) == (
        "momentum: expected a number for layers that are stacked along another axis than the first, since "
        "num_batches_tracked has no other, got None for layers/0 (2, 3); stack them along axis 0"
    )
    assert type(model.layers[0]) is nnx.BatchNorm
    replaced = replace_batch_norms(model, momentum=0.5).layers[0]
    axes = nnx.StateAxes({...: -1})
    assert nnx.vmap(lambda layer, x: layer(x), in_axes=(axes, 0))(replaced, X).shape == X.shape


@pytest.mark.parametrize("name", [name for name in LAYERS if "Batch" not in name])
def test_called_without_vmap(name):
    layers = stacked(getattr(jaxbn.nnx, name), **LAYERS[name])
    with pytest.raises(ValueError, match="stacked") as error:
        layers(X[0])
    bias = "" if name == "RMSNorm" else " and bias has shape (3, 2)"
    assert str(error.value) == (
        f"layer: expected scale and bias of shape (2,), got a layer whose scale has shape (3, 2){bias}; layers that "
        "are stacked go through nnx.vmap or nnx.scan"
    )


def test_arrays_without_vmap():
    expected = (
        "{}: expected shape (2,), the size of x with shape (5, 4, 2) along its feature axes (2,), got shape (3, 2); "
        "those of several norms, stacked along first axes, go through jax.vmap (nnx.vmap for layers)"
    )
    with pytest.raises(ValueError, match="stacked") as error:
        stacked(jaxbn.nnx.BatchNorm)(X[0])
    assert str(error.value) == expected.format("params.scale")
    params, state = jaxbn.batch_norm_init(2)
    states = jax.tree.map(lambda v: jnp.stack([v] * 3), state)
    with pytest.raises(ValueError, match="stacked") as error:
        jaxbn.batch_norm_eval(X[0], params, states)
    assert str(error.value) == expected.format("state.mean")
