"""Statistics of many rows, which XLA's CPU compiler measures in other loops than those of a few, and of columns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from versions import enable_x64

import jaxbn

pytestmark = pytest.mark.optimized

EPS = np.finfo(np.float32).eps
# Above the number from which the compiler takes its fast loops, and not a power of two.
ROWS, VALUES = 8192, 61


def draw(mean=0.0):
    rng = np.random.default_rng(0)
    return (rng.standard_normal((ROWS, VALUES), dtype=np.float32) + np.float32(mean)).astype(np.float32)


@pytest.mark.parametrize("mean", [0, 3, 1e3, 1e6])
def test_output_is_exact_wherever_the_mean_is(mean):
    x = draw(mean)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-5)
    y = jax.jit(lambda x: jaxbn.layer_norm(x, None))(x)
    columns, _ = jax.jit(lambda x: jaxbn.instance_norm_train(x, None, None))(x.T[None])
    for result in y, columns[0].T:
        np.testing.assert_allclose(result, expected, rtol=0, atol=4 * EPS * np.abs(expected).max())


@pytest.mark.parametrize("value", [1.2345678, -3e6, 1.1e19])
def test_constant_rows_give_the_bias(value):
    x = (value * np.linspace(1, 1.5, ROWS, dtype=np.float32))[:, None] * np.ones((1, VALUES), np.float32)
    params = jaxbn.affine_init(VALUES)
    dx, _ = jax.jit(jax.grad(lambda x, params: jaxbn.layer_norm(x, params).sum(), argnums=(0, 1)))(x, params)
    assert (np.asarray(jax.jit(jaxbn.layer_norm)(x, params)) == 0).all()
    assert np.isfinite(np.asarray(dx)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row_and_shows_there(bad):
    x = draw()
    x[5, 7] = bad
    y = np.asarray(jax.jit(lambda x: jaxbn.layer_norm(x, None))(x))
    assert np.isnan(y[5]).all()
    assert np.isfinite(np.delete(y, 5, 0)).all()
    dx = np.asarray(jax.jit(jax.grad(lambda x: (jaxbn.layer_norm(x, None) ** 3).sum()))(x))
    assert np.isnan(dx[5]).all()
    assert np.isfinite(np.delete(dx, 5, 0)).all()


def test_channels_first_remember_what_is_not_finite():
    x = draw()
    x[5, 7], x[6, 3] = np.nan, np.inf
    params, state = jaxbn.batch_norm_init(ROWS)
    _, state = jax.jit(lambda x: jaxbn.batch_norm_train(x, params, state, axis=0))(x)
    assert np.isnan(state.mean[5])
    assert not np.isfinite(state.mean[6])
    m = jax.jit(lambda x: jaxbn.moments(x, axis=0))(x)
    assert np.isnan(m.mean[5])
    assert not np.isfinite(m.mean[6])
    assert np.isfinite(np.delete(np.asarray(m.mean), [5, 6])).all()


def test_moments_are_those_of_float64():
    x = draw(1e4)
    wide = x.astype(np.float64)
    m = jax.jit(lambda x: jaxbn.moments(x, axis=0))(x)
    np.testing.assert_array_equal(m.mean, wide.mean(1).astype(np.float32))
    np.testing.assert_allclose(
        np.asarray(m.mean, np.float64) + np.asarray(m.mean_lo), wide.mean(1), rtol=1e-12, atol=3e-7
    )
    np.testing.assert_allclose(m.var, wide.var(1), rtol=4 * EPS)


@pytest.mark.slow
def test_gradients_are_those_of_float64():
    x, dy = draw(100), draw()[::-1]
    params = jaxbn.affine_init(VALUES)

    def pull(x, dy, params):
        return jax.vjp(jaxbn.layer_norm, x, params)[1](dy)

    dx, dparams = jax.jit(pull)(x, dy, params)
    with enable_x64(True):
        wide = jax.jit(pull)(*jax.tree.map(lambda v: jnp.asarray(np.asarray(v), jnp.float64), (x, dy, params)))
    np.testing.assert_allclose(dx, wide[0], rtol=0, atol=8 * EPS * np.abs(wide[0]).max())
    for got, expected in zip(dparams, wide[1], strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=16 * EPS * np.abs(expected).max())
