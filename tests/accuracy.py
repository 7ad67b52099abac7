"""What tests of exactness share: data that lose digits, errors in units of eps, and checks for every platform."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle

import jaxbn

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


def worst(actual, expected):
    """Largest error of any channel, in units of eps times the channel's largest value."""
    error = np.abs(np.asarray(actual).astype(np.float64) - expected).max(0)
    size = np.abs(expected).max(0)
    return np.max(np.where(error == 0, 0, error / (EPS * np.where(size == 0, EPS, size))))


train = jax.jit(functools.partial(jaxbn.batch_norm_train, momentum=1.0))


def check_output_and_stored_moments(name):
    x = DATA[name].astype(np.float32)
    state = jaxbn.batch_norm_init(SHAPE[1])[1]
    y, new = train(x, None, state)
    mean, var, n = oracle.moments(x)
    assert worst(y, oracle.normalize(x, mean, var)) <= 4
    assert (np.abs(new.mean - mean) <= EPS * (np.abs(mean) + np.sqrt(var))).all()
    assert (np.abs(new.var - var * n / (n - 1)) <= 8 * EPS * var + np.finfo(np.float32).tiny).all()


def check_layout(shape, axis):
    train = jax.jit(functools.partial(jaxbn.batch_norm_train, axis=axis))
    for mean in (0, 1e3, 1e6):
        x = (mean + noise(shape)).astype(np.float32)
        y, _ = train(np.moveaxis(x, -1, axis), None, None)
        rows = (-1, shape[-1])
        assert worst(np.moveaxis(y, axis, -1).reshape(rows), oracle.train(x).reshape(rows)) <= 4


def check_masked(fraction):
    mask = np.random.default_rng(2).random(SHAPE[0]) < fraction
    for mean in (0, 1e4, 1e6):
        x = (mean + noise()).astype(np.float32)
        y, _ = train(x, None, None, mask=mask)
        assert worst(np.asarray(y)[mask], oracle.train(x[mask])) <= 4


def check_half_precision(dtype, mean):
    x = jnp.asarray(mean + noise(), dtype)
    y, state = train(x, None, jaxbn.batch_norm_init(SHAPE[1])[1])
    m, var, n = oracle.moments(x)
    assert (np.abs(state.mean - m) <= EPS * (np.abs(m) + np.sqrt(var))).all()
    assert (np.abs(state.var - var * n / (n - 1)) <= 4 * EPS * var).all()
    expected = oracle.normalize(x, m, var)
    rounding = float(jnp.finfo(dtype).eps) / 2 * np.abs(expected)
    assert (np.abs(np.asarray(y).astype(np.float64) - expected) <= rounding + 4 * EPS * np.abs(expected).max()).all()
