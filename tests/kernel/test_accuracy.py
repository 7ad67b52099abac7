"""The error of float32 input is that of the input itself: a few units of eps * max|y|, whatever the data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from versions import EXACT_SUMS

import jaxbn

pytestmark = pytest.mark.optimized

EPS = float(np.finfo(np.float32).eps)
SHAPE = (8192, 4)


def noise(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def drifting(mean):
    return mean + np.linspace(-3, 3, SHAPE[0])[:, None] + 0.1 * noise()


def with_outlier(mean, value, position):
    x = mean + noise()
    x[position] = value
    return x


DATA = {
    **{
        f"mean {mean:g} std {std:g}": mean + std * noise()
        for mean in (0, 1, 50, 1e2, 1e3, 1e4, 1e5, 1e6)
        for std in (1e-2, 0.1, 1, 1e3)
        if mean / std <= 1e6
    },
    **{f"scale {scale:g}": scale * (10 + noise()) for scale in (1e-30, 1e-10, 1e10, 1e15)},
    **{
        f"mean {mean:g} outlier {value:g} at {position}": with_outlier(mean, value, position)
        for mean in (0, 50, 1e4, 1e6)
        for value in (-1e3, 1e6, 1e8)
        for position in (0, 4000, -1)
    },
    **{f"mean {mean:g} drift": drifting(mean) for mean in (0, 50, 1e4, 1e6)},
    **{f"constant {value:g}": np.full(SHAPE, value) for value in (0, 1e-20, 1.1, -3.3e4, 1e6 + 0.3, 1e15)},
    "one of many differs": 1.1 + 0.1 * (np.arange(SHAPE[0]) == 5)[:, None] + np.zeros(SHAPE),
    "zeros then ones": (np.arange(SHAPE[0]) > 8000)[:, None] + np.zeros(SHAPE),
    "every 16th differs": 100.0 + (np.arange(SHAPE[0]) % 16 == 0)[:, None] + np.zeros(SHAPE),
}


def marked(name):
    """One value decides the size of all differences from the pivot."""
    return pytest.param(name, marks=EXACT_SUMS) if "outlier 1e+08" in name or name == "one of many differs" else name


def worst(actual, expected):
    """Largest error of any channel, in units of eps times the channel's largest value."""
    error = np.abs(np.asarray(actual).astype(np.float64) - expected).max(0)
    size = np.abs(expected).max(0)
    return np.max(np.where(error == 0, 0, error / (EPS * np.where(size == 0, EPS, size))))


train = jax.jit(functools.partial(jaxbn.batch_norm_train, momentum=1.0))


@jax.jit
def gradients(x, scale, dy):
    def loss(x, params):
        return jnp.sum(jaxbn.batch_norm_train(x, params, None)[0] * dy)

    return jax.grad(loss, (0, 1))(x, jaxbn.BatchNormParams(scale, jnp.zeros_like(scale)))


@pytest.mark.parametrize("name", [marked(n) for n in DATA])
def test_output_and_stored_moments(name):
    x = DATA[name].astype(np.float32)
    state = jaxbn.batch_norm_init(SHAPE[1])[1]
    y, new = train(x, None, state)
    mean, var, n = oracle.moments(x)
    assert worst(y, oracle.normalize(x, mean, var)) <= 4
    assert (np.abs(new.mean - mean) <= EPS * (np.abs(mean) + np.sqrt(var))).all()
    assert (np.abs(new.var - var * n / (n - 1)) <= 8 * EPS * var + np.finfo(np.float32).tiny).all()


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
    train = jax.jit(functools.partial(jaxbn.batch_norm_train, axis=axis))
    for mean in (0, 1e3, 1e6):
        x = (mean + noise(shape)).astype(np.float32)
        y, _ = train(np.moveaxis(x, -1, axis), None, None)
        rows = (-1, shape[-1])
        assert worst(np.moveaxis(y, axis, -1).reshape(rows), oracle.train(x).reshape(rows)) <= 4


@pytest.mark.parametrize("fraction", [0.01, 0.5])
def test_masked(fraction):
    mask = np.random.default_rng(2).random(SHAPE[0]) < fraction
    for mean in (0, 1e4, 1e6):
        x = (mean + noise()).astype(np.float32)
        y, _ = train(x, None, None, mask=mask)
        assert worst(np.asarray(y)[mask], oracle.train(x[mask])) <= 4


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("mean", [0, 10, 1e3])
def test_half_precision_input_has_statistics_as_exact_as_float32(dtype, mean):
    x = jnp.asarray(mean + noise(), dtype)
    y, state = train(x, None, jaxbn.batch_norm_init(SHAPE[1])[1])
    m, var, n = oracle.moments(x)
    assert (np.abs(state.mean - m) <= EPS * (np.abs(m) + np.sqrt(var))).all()
    assert (np.abs(state.var - var * n / (n - 1)) <= 4 * EPS * var).all()
    expected = oracle.normalize(x, m, var)
    rounding = float(jnp.finfo(dtype).eps) / 2 * np.abs(expected)
    assert (np.abs(np.asarray(y).astype(np.float64) - expected) <= rounding + 4 * EPS * np.abs(expected).max()).all()


def test_the_pair_is_the_mean_even_when_moments_are_computed_alone():
    # Compilers fuse differently where the moments are all that is asked for, and a product that is
    # rounded in one loop and not in another puts the two halves of the mean out of step.
    for n in (17, 33, 100, 1000, 8191):
        x = (1000 + noise((n, 4))).astype(np.float32)
        m = jaxbn.moments(x)
        mean, var, _ = oracle.moments(x)
        pair = np.asarray(m.mean, np.float64) + np.asarray(m.mean_lo, np.float64)
        assert (np.abs(pair - mean) <= 2 * EPS * np.sqrt(var)).all()
