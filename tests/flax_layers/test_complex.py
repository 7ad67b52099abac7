"""Complex x in the layers: the mean is complex, the variance the mean of |x - mean|**2, as in Flax."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx

C, EPS = 4, 1e-3
RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.normal(size=shape) + 1j * RNG.normal(size=shape)


# Each channel with a mean of its own, and parts of different spread.
X = jnp.asarray(draw(6, 5, C).real * [1, 2, 0, 0.1] + 1j * draw(6, 5, C).imag + draw(C), jnp.complex64)
MASK = RNG.random(X.shape) < 0.7
# Something counts in each example and at each position.
MASK[..., 0] = MASK[:, 0] = True
SCALE, BIAS = (jnp.asarray(v, jnp.complex64) for v in draw(2, C))
# Axes that a statistic is taken over, and shape in which they are the last ones.
LAYERS = {
    "BatchNorm": ({}, (0, 1), X.shape),
    "LayerNorm": ({}, (2,), X.shape),
    "RMSNorm": ({}, (2,), X.shape),
    "GroupNorm": ({"num_groups": 2}, (1, 3), (6, 5, 2, 2)),
    "InstanceNorm": ({}, (1,), X.shape),
}


def moments(name, mask):
    _, axes, shape = LAYERS[name]
    x, mask = np.asarray(X, np.complex128).reshape(shape), np.broadcast_to(mask, X.shape).reshape(shape)
    mean = 0 if name == "RMSNorm" else x.mean(axes, where=mask, keepdims=True)
    return x, mean, np.mean(np.abs(x - mean) ** 2, axes, where=mask, keepdims=True)


def expected(name, mask):
    x, mean, var = moments(name, mask)
    y = ((x - mean) / np.sqrt(var + EPS)).reshape(X.shape) * np.asarray(SCALE)
    return y if name == "RMSNorm" else y + np.asarray(BIAS)


def linen(name, kind=jaxbn.linen, stats=None, **options):
    layer = getattr(kind, name)(epsilon=EPS, param_dtype=jnp.complex64, **options)
    params = {"scale": SCALE} if name == "RMSNorm" else {"scale": SCALE, "bias": BIAS}
    stats = stats or {"mean": jnp.zeros(C), "var": jnp.ones(C)}
    return lambda x, **more: layer.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"], **more)


def of_nnx(name, **options):
    options |= {"epsilon": EPS, "dtype": jnp.complex64, "param_dtype": jnp.complex64}
    layer = getattr(jaxbn.nnx, name)(C, **options, rngs=nnx.Rngs(0))
    layer.scale[...] = SCALE
    if name != "RMSNorm":
        layer.bias[...] = BIAS
    return lambda x, **more: (layer(x, **more), {"batch_stats": nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))})


def assert_near(actual, expected, atol=3e-6):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("make", "mask"), [(linen, MASK), (of_nnx, True)], ids=["linen, masked", "nnx"])
def test_every_layer_is_the_formula(make, name, mask):
    options = LAYERS[name][0] | ({"use_running_average": False, "momentum": 0.9} if name == "BatchNorm" else {})
    y, updates = make(name, **options)(X, mask=None if mask is True else mask)
    assert y.dtype == jnp.complex64
    assert_near(y, expected(name, mask))
    if name == "BatchNorm":
        _, mean, var = moments(name, mask)
        assert updates["batch_stats"]["mean"].dtype == jnp.complex64
        assert_near(updates["batch_stats"]["mean"], 0.1 * mean[0, 0])
        assert_near(updates["batch_stats"]["var"], 0.9 + 0.1 * var[0, 0])


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_flax(name):
    options = LAYERS[name][0] | ({"use_running_average": False} if name == "BatchNorm" else {})
    weight = jnp.asarray(draw(*X.shape), jnp.complex64)

    def gradient(kind):
        norm = linen(name, kind, **options)
        return jax.jit(jax.grad(lambda x: jnp.sum(weight * norm(x)[0]).real))(X)

    with jax.numpy_dtype_promotion("standard"):
        assert_near(gradient(jaxbn.linen), gradient(nn), atol=2e-5)


def test_batch_norm_goes_on_and_evaluates():
    norm = of_nnx("BatchNorm", momentum=None, correction=1)
    norm(X, use_running_average=False)
    _, updates = norm(X + 2j, use_running_average=False)
    _, mean, var = moments("BatchNorm", True)
    mean, var = mean + 1j, var * 30 / 29
    assert_near(updates["batch_stats"]["mean"], mean[0, 0])
    assert_near(updates["batch_stats"]["var"], var[0, 0])
    for layer in (norm, linen("BatchNorm", stats={k: updates["batch_stats"][k] for k in ("mean", "var")})):
        y, _ = layer(X, use_running_average=True)
        assert_near(y, (np.asarray(X) - mean) / np.sqrt(var + EPS) * np.asarray(SCALE) + np.asarray(BIAS))


def test_domains_keep_complex_means():
    norm = of_nnx("BatchNorm", num_domains=2, momentum=0.0, use_running_average=False)
    _, updates = norm(X, domain=1)
    _, mean, _ = moments("BatchNorm", True)
    assert_near(updates["batch_stats"]["mean"], np.stack([np.zeros(C), mean[0, 0]]))


@pytest.mark.slow
def test_a_part_that_does_not_vary():
    layer = jaxbn.linen.BatchNorm(use_running_average=False, epsilon=0.0, dtype=jnp.complex64)
    variables = layer.init(jax.random.key(0), X)

    def y(x):
        return layer.apply(variables, x, mutable=["batch_stats"])[0]

    x = jax.lax.complex(X.real, jnp.zeros(X.shape))
    assert_near(y(x), jaxbn.batch_norm_train(X.real, None, None, eps=0.0)[0])
    assert_near(y(jnp.full_like(x, 3 + 1j)), 0)
    assert np.isfinite(jax.grad(lambda x: jnp.sum(jnp.abs(y(x)) ** 2))(x)).all()


def test_devices_share_complex_statistics():
    norm = linen("BatchNorm", use_running_average=False, axis_name="devices", momentum=0.9)
    y, updates = jax.vmap(norm, axis_name="devices")(X.reshape(2, 3, 5, C))
    assert_near(y.reshape(X.shape), expected("BatchNorm", True))
    synced = jax.vmap(lambda v: jaxbn.sync_state(v, "devices"), axis_name="devices")(updates["batch_stats"])
    assert_near(synced["mean"], updates["batch_stats"]["mean"])


def test_errors():
    with pytest.raises(TypeError) as caught:
        linen("BatchNorm", use_running_average=False, dtype=jnp.float32)(X)
    assert str(caught.value) == "dtype: expected a complex dtype for complex x, got float32; leave it out"
    refusal = (
        "x: expected a floating-point array, got complex64; normalize x.real and x.imag, or take a layer of Flax's "
        "names from jaxbn.linen or jaxbn.nnx, which all take complex x"
    )
    for call in (
        lambda: jaxbn.layer_norm(X, None),
        lambda: jaxbn.moments(X),
        lambda: jaxbn.nnx.BatchRenorm(C, limits=(1, 0), rngs=nnx.Rngs(0))(X),
    ):
        with pytest.raises(TypeError) as caught:
            call()
        assert str(caught.value) == refusal
