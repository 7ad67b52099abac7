"""What a layer of PyTorch takes first, Linen's takes for something else; the errors say so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn.linen
import jaxbn.nnx

X = jnp.arange(8.0).reshape(2, 4)
MODE = (
    "use_running_average: expected True to evaluate or False to train, fixed when the function is traced (by "
    "functools.partial or static_argnames), got {}; a Linen layer takes the number of features from x, and a mask is "
    "passed as mask=..."
)


def message_of(kind, call, *arguments):
    with pytest.raises(kind) as error:
        call(*arguments)
    return str(error.value)


def init(layer, *arguments):
    return layer.init(jax.random.key(0), X, *arguments)


def test_number_of_features_for_the_mode():
    assert message_of(TypeError, init, jaxbn.linen.BatchNorm(4)) == MODE.format("int")


def test_mask_for_the_mode():
    mask = jnp.ones(2, bool)
    assert message_of(TypeError, init, jaxbn.linen.BatchNorm(), mask) == MODE.format("ArrayImpl")
    layer = jaxbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    assert message_of(TypeError, layer, X, mask) == MODE.format("ArrayImpl")


def test_traced_mode():
    layer = jaxbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    call = jax.jit(lambda mode: layer(X, mode))
    assert message_of(TypeError, call, True) == MODE.format("DynamicJaxprTracer")


@pytest.mark.parametrize("mode", [True, np.bool_(True), jnp.bool_(True), 1])
def test_modes(mode):
    layer = jaxbn.nnx.BatchNorm(4, epsilon=0.0, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer(X, mode), X)


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "InstanceNorm"])
def test_number_of_features_for_epsilon(name):
    assert message_of(ValueError, init, getattr(jaxbn.linen, name)(4)) == (
        "epsilon: expected a small number, such as 1e-5, got 4; a Linen layer takes the number of features from x"
    )
