"""jax2onnx converts all layers in evaluation, and onnxruntime computes what they compute, far from zero too."""

import logging
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxbn.linen
import jaxbn.nnx

jax2onnx = pytest.importorskip("jax2onnx")
onnxruntime = pytest.importorskip("onnxruntime")

# Exact far from zero: as users' programs are.
pytestmark = [pytest.mark.slow, pytest.mark.optimized]

C = 6
OPTIONS = {
    "BatchNorm": {"use_running_average": True},
    "LayerNorm": {},
    "RMSNorm": {},
    "GroupNorm": {"num_groups": 3},
    "InstanceNorm": {},
}
MEAN = 1e4


def draw(*shape, mean=0.0):
    return mean + np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def assert_converts(model, shape, x):
    """The converted model takes any size where `shape` has a name."""
    with warnings.catch_warnings(), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        warnings.simplefilter("ignore")
        converted = jax2onnx.to_onnx(model, [shape])
        # Under the same options: jitted functions have what was traced under them.
        expected = model(jnp.asarray(x))
    session = onnxruntime.InferenceSession(converted.SerializeToString())
    (y,) = session.run(None, {session.get_inputs()[0].name: x})
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True)
def quiet():
    onnxruntime.set_default_logger_severity(4)
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("mean", [0.0, MEAN])
@pytest.mark.parametrize("name", OPTIONS)
def test_linen(name, mean):
    """Linen models are converted as functions of x."""
    layer = getattr(jaxbn.linen, name)(**OPTIONS[name])
    variables = layer.init(jax.random.key(0), jnp.ones((1, 3, 3, C)))
    variables = jax.tree.map(lambda v: v + 0.1 * draw(*v.shape), variables)
    if name == "BatchNorm":
        variables["batch_stats"]["mean"] = draw(C, mean=mean)
    assert_converts(lambda x: layer.apply(variables, x), ("B", 3, 5, C), draw(2, 3, 5, C, mean=mean))


@pytest.mark.parametrize("name", OPTIONS)
def test_nnx(name):
    """Of known sizes that no other test has: what was traced to convert is what `jax.jit` has for them afterwards."""
    layer = getattr(jaxbn.nnx, name)(C, **OPTIONS[name], rngs=nnx.Rngs(0))
    if name == "BatchNorm":
        layer.mean[...] = draw(C, mean=MEAN)
    assert_converts(layer, (2, 4, 5, C), draw(2, 4, 5, C, mean=MEAN))


class Net(linen.Module):
    @linen.compact
    def __call__(self, x):
        for name, options in OPTIONS.items():
            x = linen.Conv(C, (3, 3), use_bias=False)(x)
            x = linen.relu(getattr(jaxbn.linen, name)(**options)(x))
        return linen.Dense(3)(x.mean((1, 2)))


def test_network():
    net = Net()
    variables = net.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)))
    assert_converts(lambda x: net.apply(variables, x), ("B", 8, 8, 3), draw(2, 8, 8, 3, mean=MEAN))
