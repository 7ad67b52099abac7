"""Scale and bias that say how they are sharded: boxes in Linen, metadata in NNX."""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from versions import needs

import jaxbn.linen
import jaxbn.nnx

pytestmark = pytest.mark.slow

P = jax.P
C, D = 8, 3
X = jnp.asarray(np.random.default_rng(0).normal(1, 2, (6, 5, C)), jnp.float32)
KEY = jax.random.key(0)
RANDOM = jax.nn.initializers.normal(1.0)
MESH = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
LINEN = {
    "BatchNorm": {"use_running_average": False},
    "LayerNorm": {},
    "RMSNorm": {},
    "GroupNorm": {"num_groups": 4},
    "InstanceNorm": {},
}


@pytest.mark.parametrize("name", LINEN)
@pytest.mark.parametrize("wrap", [nn.with_partitioning, nn.with_logical_partitioning])
def test_linen_boxes_are_those_of_flax(name, wrap):
    options = LINEN[name] | {"scale_init": wrap(RANDOM, ("model",))}
    if name != "RMSNorm":
        options["bias_init"] = wrap(RANDOM, ("model",))
    layer, theirs = getattr(jaxbn.linen, name)(**options), getattr(nn, name)(**options)
    variables, expected = layer.init(KEY, X), theirs.init(KEY, X)
    assert jax.tree.structure(variables) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
    assert nn.get_partition_spec(variables) == nn.get_partition_spec(expected)
    assert nn.get_partition_spec(variables)["params"]["scale"] == P("model")
    y, y_unboxed = (layer.apply(v, X, mutable=["batch_stats"])[0] for v in (variables, nn.unbox(variables)))
    np.testing.assert_array_equal(y, y_unboxed)


@pytest.mark.parametrize("wrap", [nn.with_partitioning, nn.with_logical_partitioning])
@pytest.mark.parametrize("norm", [jaxbn.linen.BatchNorm, jaxbn.linen.BatchRenorm])
def test_linen_domains_are_an_axis_that_is_not_sharded(norm, wrap):
    options = {"limits": (3.0, 5.0)} if norm is jaxbn.linen.BatchRenorm else {}
    layer = norm(
        use_running_average=False,
        num_domains=D,
        domain_affine=True,
        scale_init=wrap(RANDOM, ("model",)),
        **options,
    )

    def init():
        return layer.init(KEY, X, domain=0)

    specs = nn.get_partition_spec(jax.eval_shape(init))
    assert specs["params"] == {"scale": P(None, "model"), "bias": P()}
    variables = jax.jit(init, out_shardings=jax.tree.map(lambda s: jax.NamedSharding(MESH, s), specs))()
    scale = nn.unbox(variables)["params"]["scale"]
    assert (scale.shape, scale.sharding.spec) == ((D, C), P(None, "model"))
    np.testing.assert_array_equal(scale, jnp.broadcast_to(scale[0], (D, C)))
    y, _ = layer.apply(variables, X, domain=1, mutable=["batch_stats"])
    expected, _ = layer.apply(jax.device_get(nn.unbox(variables)), X, domain=1, mutable=["batch_stats"])
    np.testing.assert_allclose(y, expected, atol=1e-6)


METADATA = {
    "initializer": {"scale_init": nnx.with_partitioning(RANDOM, ("model",), mesh=MESH)},
    "names": {"scale_metadata": {"out_sharding": ("model",), "mesh": MESH}},
    "spec": {"scale_metadata": {"out_sharding": P("model"), "mesh": MESH}},
    "sharding": {"scale_metadata": {"out_sharding": jax.NamedSharding(MESH, P("model"))}},
}


@needs("out_sharding in metadata", flax="0.12.4")
@pytest.mark.parametrize("kind", METADATA)
def test_nnx_domains_are_an_axis_that_is_not_sharded(kind):
    options = {"scale_init": RANDOM} | METADATA[kind]
    alone = jaxbn.nnx.BatchNorm(C, rngs=nnx.Rngs(0), **options)
    layer = jaxbn.nnx.BatchNorm(C, num_domains=D, domain_affine=True, rngs=nnx.Rngs(0), **options)
    named = jax.NamedSharding(MESH, P(None, "model"))
    assert layer.scale.out_sharding == (named if kind == "sharding" else (None, "model"))
    assert layer.scale[...].sharding == named
    assert "out_sharding" not in layer.bias.get_metadata()
    if kind != "sharding":  # which Flax does not read here
        assert nnx.get_named_sharding(nnx.state(layer), MESH)["scale"].get_value() == named
    np.testing.assert_array_equal(layer.scale[...], jnp.broadcast_to(alone.scale[...], (D, C)))
    np.testing.assert_allclose(layer(X, domain=1), alone(X), atol=1e-6)
    assert layer.scale.get_metadata().keys() == alone.scale.get_metadata().keys()


def test_nnx_domains_without_eager_sharding():
    # Before Flax 0.12.1 no other kind existed.
    with nnx.use_eager_sharding(False) if hasattr(nnx, "use_eager_sharding") else contextlib.nullcontext():
        options = {"scale_init": nnx.with_partitioning(RANDOM, ("model",))}
        layer = jaxbn.nnx.BatchNorm(C, num_domains=D, domain_affine=True, rngs=nnx.Rngs(0), **options)
    state = nnx.state(layer)
    placed = jax.device_put(state, nnx.get_named_sharding(state, MESH))
    assert placed["scale"][...].sharding.spec == P(None, "model")
