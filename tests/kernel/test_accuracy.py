"""The error of float32 input is that of the input itself: a few units of eps * max|y|, whatever the data."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from accuracy import (
    DATA,
    EPS,
    SHAPE,
    check_half_precision,
    check_layout,
    check_masked,
    check_output_and_stored_moments,
    noise,
    train,
    worst,
)
from versions import EXACT_SUMS

import jaxbn

pytestmark = pytest.mark.optimized


def marked(name):
    """One value decides the size of all differences from the pivot."""
    return pytest.param(name, marks=EXACT_SUMS) if "outlier 1e+08" in name or name == "one of many differs" else name


@jax.jit
def gradients(x, scale, dy):
    def loss(x, params):
        return jnp.sum(jaxbn.batch_norm_train(x, params, None)[0] * dy)

    return jax.grad(loss, (0, 1))(x, jaxbn.BatchNormParams(scale, jnp.zeros_like(scale)))


@pytest.mark.parametrize("name", [marked(n) for n in DATA])
def test_output_and_stored_moments(name):
    check_output_and_stored_moments(name)


@pytest.mark.parametrize("name", [marked(n) for n in DATA if "constant" not in n])
def test_gradients(name):
    x = DATA[name].astype(np.float32)
    rng = np.random.default_rng(1)
    scale, dy = rng.normal(1, 0.5, SHAPE[1]), rng.standard_normal(SHAPE)
    scale, dy = scale.astype(np.float32), dy.astype(np.float32)
    dx, dparams = gradients(x, scale, dy)
    expected = oracle.gradients(x, dy, scale)
    assert worst(dx, expected[0]) <= 16
    # Each sum is as exact as a sum of thousands of float32 numbers of either sign is.
    assert (np.abs(dparams.scale - expected[1]) <= 4 * EPS * np.abs(dy * oracle.train(x)).sum(0)).all()
    assert (np.abs(dparams.bias - expected[2]) <= 4 * EPS * np.abs(dy).sum(0)).all()


def test_values_that_occur_often():
    """Behind a ReLU, one after the other in an array of four axes: what sums that are not in trees add up worst."""
    x, dy = (np.maximum(noise((8, 32, 32, 4), seed), 0).astype(np.float32) for seed in (0, 1))
    y, _ = train(x, None, None)
    assert worst(y.reshape(-1, 4), oracle.train(x).reshape(-1, 4)) <= 4
    ones = np.ones(4, np.float32)
    dy = 0.1 * np.sign(dy)
    dx, dparams = gradients(x, ones, dy)
    expected = oracle.gradients(x, dy, ones)
    assert worst(dx.reshape(-1, 4), expected[0].reshape(-1, 4)) <= 16
    assert (np.abs(dparams.scale - expected[1]) <= 4 * EPS * np.abs(dy * oracle.train(x)).sum((0, 1, 2))).all()
    assert (np.abs(dparams.bias - expected[2]) <= 4 * EPS * np.abs(dy).sum((0, 1, 2))).all()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(33, 3), (8, 7, 7, 3), (2, 5, 64, 3), (1, 100003, 3)], ids=str)
@pytest.mark.parametrize("axis", [-1, 1])
def test_every_shape_and_layout_is_as_exact(shape, axis):
    check_layout(shape, axis)


@pytest.mark.parametrize("fraction", [0.01, 0.5])
def test_masked(fraction):
    check_masked(fraction)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("mean", [0, 10, 1e3])
def test_half_precision_input_has_statistics_as_exact_as_float32(dtype, mean):
    check_half_precision(dtype, mean)


def test_the_pair_is_the_mean_even_when_moments_are_computed_alone():
    # Compilers fuse differently where the moments are all that is asked for, and a product that is
    # rounded in one loop and not in another puts the two halves of the mean out of step.
    for n in (17, 33, 100, 1000, 8191):
        x = (1000 + noise((n, 4))).astype(np.float32)
        m = jaxbn.moments(x)
        mean, var, _ = oracle.moments(x)
        pair = np.asarray(m.mean, np.float64) + np.asarray(m.mean_lo, np.float64)
        assert (np.abs(pair - mean) <= 2 * EPS * np.sqrt(var)).all()
