"""NNX layers whose variables are references (`nnx.var_defaults(ref=True)`): the same numbers, in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from versions import needs

import jaxbn.nnx

pytestmark = [pytest.mark.slow, needs("nnx.var_defaults", flax="0.12.3")]

X = jnp.asarray(np.random.default_rng(0).normal(1, 2, (6, 5, 4)), jnp.float32)
LAYERS = {
    "BatchNorm": ("BatchNorm", {}),
    "BatchNorm, cumulative": ("BatchNorm", {"momentum": None}),
    "BatchNorm, domains": ("BatchNorm", {"num_domains": 3, "domain_affine": True, "momentum": None}),
    "BatchRenorm": ("BatchRenorm", {"limits": (3.0, 5.0), "num_domains": 3}),
    "LayerNorm": ("LayerNorm", {}),
    "RMSNorm": ("RMSNorm", {}),
    "GroupNorm": ("GroupNorm", {"num_groups": 2}),
    "InstanceNorm": ("InstanceNorm", {}),
}


def make(name):
    norm, options = LAYERS[name]
    return getattr(jaxbn.nnx, norm)(4, rngs=nnx.Rngs(0), **options), {"domain": 1} if "num_domains" in options else {}


def is_variable(v):
    return isinstance(v, nnx.Variable)


def arrays(tree):
    return jax.tree.map(lambda v: v[...], nnx.to_pure_dict(nnx.state(tree)))


@pytest.mark.parametrize("name", LAYERS)
def test_references_change_nothing(name):
    layer, call = make(name)
    with nnx.var_defaults(ref=True):
        other, _ = make(name)
    assert all(v.ref for v in jax.tree.leaves(nnx.state(other), is_leaf=is_variable))

    def loss(y):
        return jnp.sum(jnp.sin(y))

    expected = nnx.jit(nnx.grad(lambda layer: loss(layer(X, **call))))(layer)
    # JAX has no gradients with respect to references, and needs none for what is not differentiated.
    graph, params, rest = nnx.split(other, nnx.Param, ...)
    step = jax.jit(jax.grad(lambda params, rest: loss(nnx.merge(graph, params, rest)(X, **call))))
    values = jax.tree.map(lambda v: v.copy(v[...], ref=False), params, is_leaf=is_variable)
    gradients = step(values, rest)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(gradients), nnx.to_pure_dict(expected))
    for model in (layer, other):
        nnx.jit(lambda model: model(X, **call))(model)
    jax.tree.map(np.testing.assert_array_equal, arrays(other), arrays(layer))
    layer.eval()
    other.eval()
    np.testing.assert_array_equal(other(X, **call), layer(X, **call))


def test_a_counter_that_comes_later_is_a_reference_too():
    with nnx.var_defaults(ref=True):
        model = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    jaxbn.nnx.replace_batch_norms(model, momentum=None)
    step = jax.jit(lambda model: model(X))
    step(model)
    step(model)
    assert model.num_batches_tracked[...] == 2
    np.testing.assert_allclose(model.mean[...], X.mean((0, 1)), rtol=1e-5)
