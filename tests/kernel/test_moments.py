"""Moments: any split of the data, merged in any order, gives the moments of the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxbn

pytestmark = pytest.mark.optimized

EPS32 = float(np.finfo(np.float32).eps)


def assert_moments(actual, x, units=16, mask=None):
    mean, var, count = oracle.moments(x, mask)
    std = np.sqrt(var)
    pair = np.asarray(actual.mean, np.float64) + np.asarray(actual.mean_lo, np.float64)
    # What float32 values near `mean` can say at all about their mean is some units of eps * std.
    assert (np.abs(pair - mean) <= units * EPS32 * (std + EPS32 * np.abs(mean))).all()
    np.testing.assert_allclose(actual.var, var, rtol=units * EPS32, atol=(4 * EPS32**1.5 * np.abs(mean).max()) ** 2)
    np.testing.assert_array_equal(actual.count, count)


moments = jax.jit(jaxbn.moments)
merge = jax.jit(jaxbn.Moments.merge)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.sampled_from([0, 1, 2, 17, 40]), min_size=1, max_size=6).filter(lambda s: sum(s) > 0),
    mean=st.sampled_from([0.0, 1.0, -1e3, 1e6]),
    shift=st.sampled_from([0.0, 10.0, 1e4]),
    by_tree=st.booleans(),
)
def test_any_split_merges_to_the_whole(seed, sizes, mean, shift, by_tree):
    rng = np.random.default_rng(seed)
    parts = [(rng.normal(mean + k * shift, 1, (n, 2))).astype(np.float32) for k, n in enumerate(sizes)]
    measured = [moments(p) for p in parts]
    if by_tree:
        while len(measured) > 1:
            measured = [merge(*pair) for pair in (measured[i : i + 2] for i in range(0, len(measured), 2))]
        merged = measured[0]
    else:
        merged = merge(*measured)
    assert_moments(merged, np.concatenate(parts))


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), fraction=st.sampled_from([0.0, 0.1, 0.5, 1.0]), mean=st.sampled_from([0.0, 1e4]))
def test_masked_moments(seed, fraction, mean):
    rng = np.random.default_rng(seed)
    x = rng.normal(mean, 1, (16, 3, 4)).astype(np.float32)
    mask = rng.random((16, 3, 4)) < fraction
    assert_moments(moments(x, mask=mask), x, mask=mask)


@pytest.mark.slow
def test_stacked_moments_merge_along_their_axis():
    x = np.random.default_rng(0).normal(1e4, 1, (5, 7, 3)).astype(np.float32)
    for axis in (0, 1):
        assert_moments(jax.jit(lambda x: jax.vmap(jaxbn.moments, out_axes=axis)(x).merge_axis(axis))(x), x)  # noqa: B023

    def accumulate(total, batch):
        return total.merge(jaxbn.moments(batch)), None

    @jax.jit
    def scanned(x):
        return jax.lax.scan(accumulate, jaxbn.moments(jnp.zeros((0, 3))), x)[0]

    assert_moments(scanned(x), x)


def test_merging_equal_constants_is_exact():
    x = np.full((7, 2), 1e6 + 0.3, np.float32)
    merged = merge(moments(x[:3]), moments(x[3:4]), moments(x[4:]))
    np.testing.assert_array_equal(merged.mean, x[0])
    np.testing.assert_array_equal(merged.mean_lo, 0)
    np.testing.assert_array_equal(merged.var, 0)


def test_moments_of_a_users_own_making():
    ours = jaxbn.Moments(jnp.array([1.0]), jnp.array([2.0]), jnp.array([4.0]))
    merged = ours.merge(jaxbn.Moments(jnp.array([4.0]), jnp.array([0.0]), 2.0))
    np.testing.assert_allclose(merged.mean, 2.0)
    np.testing.assert_allclose(merged.var, (4 * (2 + 1) + 2 * 4) / 6, rtol=1e-6)
    np.testing.assert_array_equal(merged.count, 6.0)
    # A number for all channels, and no mean_lo.
    own = jaxbn.Moments(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0]]), 5.0).squeeze(0)
    assert (own.count.tolist(), own.mean_lo.tolist()) == ([5, 5], [0, 0])
    new = jaxbn.batch_norm_update(jaxbn.batch_norm_init(2)[1], jaxbn.Moments(own.mean, own.var, 5.0), momentum=1.0)
    np.testing.assert_allclose(new.var, np.array([3, 4]) * 5 / 4)


@pytest.mark.slow
def test_moments_are_differentiable():
    x = jnp.asarray(np.random.default_rng(0).normal(3, 2, (6, 2)), jnp.float32)

    def ours(x):
        m = jaxbn.moments(x)
        return jnp.sum(jnp.sin(m.mean) + m.var**2)

    def plain(x):
        return jnp.sum(jnp.sin(x.mean(0)) + x.var(0) ** 2)

    def derivatives(function):
        return jax.jit(lambda x: (jax.grad(function)(x), jax.hessian(function)(x)))(x)

    (gradient, hessian), expected = derivatives(ours), derivatives(plain)
    np.testing.assert_allclose(gradient, expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(hessian, expected[1], rtol=1e-4, atol=1e-5)
