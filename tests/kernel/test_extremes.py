"""Values, shapes and options at the ends of their ranges."""

import family
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jaxbn
from jaxbn._kernel.reduction import Reduction

C = 3
STATE = jaxbn.batch_norm_init(C)[1]
BASE = np.random.default_rng(0).normal(1, 2, (64, C)).astype(np.float32)
FIRSTS = ("batch", "layer", "rms", "group", "instance")


@pytest.mark.parametrize("exponent", [15, 18, 20, 25, 27, 30, 33])
def test_a_variance_that_float32_cannot_hold_is_infinite(exponent):
    x = BASE * np.float32(10.0**exponent)
    with np.errstate(over="ignore"):
        var = x.astype(np.float64).var(0).astype(np.float32)
        unbiased = x.astype(np.float64).var(0, ddof=1).astype(np.float32)
    y, new = jax.jit(jaxbn.batch_norm_train)(x, None, STATE)
    m = jaxbn.moments(x)
    np.testing.assert_allclose(m.var, var, rtol=1e-6)
    np.testing.assert_allclose(m.mean, x.astype(np.float64).mean(0), rtol=1e-5)
    # The running variance is infinite or the average, and never pulled to 0.
    np.testing.assert_allclose(new.var, np.float32(0.9) + np.float32(0.1) * unbiased, rtol=1e-6)
    np.testing.assert_allclose(y, np.where(np.isfinite(var), oracle.train(x), 0), atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_and_groups_whose_variance_overflows_give_the_bias(dtype):
    x = jnp.asarray(BASE[:8].T * 1e25, dtype)
    bias = jnp.full(8, 0.5)
    params = jaxbn.BatchNormParams(jnp.ones(8), bias)
    for y in (jaxbn.layer_norm(x, params), jaxbn.group_norm(x[:, None], params, 2)):
        assert (np.asarray(y, np.float32) == 0.5).all()


@pytest.mark.parametrize("name", FIRSTS)
@pytest.mark.parametrize("eps", [0.0, 1e-46, 1e-45, 1e-40, 1.1e-38])
def test_constants_give_the_bias_at_any_eps(name, eps):
    norm = family.NORMS[name]
    x = jnp.full(norm.shape, 0.0 if norm.about_zero else 3.0)
    y, dx = jax.value_and_grad(lambda x: jnp.sum(norm(x, None, eps=eps)))(x)
    assert y == 0
    assert np.isfinite(np.asarray(norm(x, None, eps=eps))).all()
    if eps == 0:
        assert np.isfinite(np.asarray(dx)).all()


def test_evaluation_at_any_eps():
    state = STATE._replace(mean=jnp.full(C, 3.0), var=jnp.zeros(C))
    for eps in (0.0, 1e-46, 1e-40, 1e-38):
        y, _ = jaxbn.batch_norm_eval(jnp.full((4, C), 3.0), None, state, eps=eps)
        np.testing.assert_array_equal(y, 0)


def test_gradients_of_scalars():
    state = jaxbn.BatchNormState(jnp.float32(1), jnp.float32(4), jnp.int32(0))

    def evaluate(x):
        return jaxbn.batch_norm_eval(x, None, state, axis=())[0]

    expected = 1 / np.sqrt(4 + 1e-5)
    np.testing.assert_allclose(jax.grad(evaluate)(jnp.float32(3)), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(evaluate))(jnp.arange(3.0)), np.full(3, expected), rtol=1e-6)
    assert jax.grad(lambda x: jaxbn.layer_norm(x, None, axis=()))(jnp.float32(3)) == 0
    dx = jax.grad(lambda x: jaxbn.rms_norm(x, None, axis=(), eps=1.0))(jnp.float32(3))
    np.testing.assert_allclose(dx, 1 / (9 + 1) ** 1.5, rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_counts_beyond_32_bits(masked):
    """Nothing of this size is made: counts follow from shapes, and from a mask whose sums are traced alone."""
    x = jax.ShapeDtypeStruct((2**17, 2**16, C), jnp.float32)
    values = 2**33
    if not masked:
        assert Reduction((0, 1)).count(x) == values
        assert jax.eval_shape(jaxbn.moments, x).count.shape == (C,)
        return
    # One entry of the mask stands for 2**16 values.
    jaxpr = jax.make_jaxpr(lambda x, mask: jaxbn.moments(x, mask=mask).count)(
        x, jax.ShapeDtypeStruct((2**17, 1, 1), jnp.bool_)
    )
    assert "65536.0" in str(jaxpr)


def test_entries_of_a_mask_are_counted_beyond_what_float32_and_int32_count():
    """Sums along all axes but one are of int32, and those of float32."""
    text = str(
        jax.make_jaxpr(lambda x, mask: jaxbn.moments(x, mask=mask).count)(
            jax.ShapeDtypeStruct((2**17, 2**16, C), jnp.float32), jax.ShapeDtypeStruct((2**17, 2**16, 1), jnp.bool_)
        )
    )
    assert "i32[131072] = reduce_sum[axes=(1, 2)" in text or "i32[131072,1] = reduce_sum[axes=(1,)" in text
    mask = np.arange(4097)[:, None] % 2 == 0
    count = jaxbn.moments(jnp.ones((4097, 5, C)), mask=mask[:, :, None]).count
    np.testing.assert_array_equal(count, 2049 * 5)


# Counts as weights, of any kind of number.
@pytest.mark.parametrize("counts", [(0.25, 0.5), (np.int64(2**40), np.int64(3 * 2**40)), (1e-30, 3e-30), (0.0, 0.125)])
def test_counts_may_be_weights_and_large(counts):
    means, variances = np.array([[1.0, 2], [5, 4]], np.float32), np.array([[1.0, 0], [2, 3]], np.float32)
    a, b = (jaxbn.Moments(jnp.asarray(m), jnp.asarray(v), n) for m, v, n in zip(means, variances, counts, strict=True))
    merged = a.merge(b)
    w = np.array(counts, np.float64)[:, None] / np.sum(np.array(counts, np.float64))
    mean = (w * means).sum(0)
    np.testing.assert_allclose(merged.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(merged.var, (w * (variances + (means - mean) ** 2)).sum(0), rtol=1e-6)
    np.testing.assert_allclose(merged.count, np.full(2, np.sum(np.array(counts, np.float64))), rtol=1e-6)
    new = jaxbn.batch_norm_update(jaxbn.batch_norm_init(2)[1], merged, momentum=1.0, correction=0)
    np.testing.assert_allclose(new.mean, merged.mean, rtol=1e-6)
    np.testing.assert_allclose(new.var, merged.var, rtol=1e-6)


def test_counts_of_stacked_moments_belong_to_sets_and_not_to_channels():
    """As many sets as channels: numbers that jax.vmap stacked to [sets] are one for each set."""
    x = BASE.reshape(-1, 4, C)[:C]
    weights = jnp.array([1.0, 2, 5])
    stacked = jax.vmap(lambda x, n: jaxbn.Moments(x.mean(0), x.var(0), n))(x, weights)
    merged = stacked.merge_axis(0)
    repeated = np.repeat(x, np.asarray(weights, int), 0).reshape(-1, C)
    np.testing.assert_allclose(merged.mean, repeated.mean(0), rtol=1e-5)
    np.testing.assert_allclose(merged.var, repeated.var(0), rtol=1e-5)
    with pytest.raises(ValueError, match=r"moments: expected count of shape \(3, 3\), that of mean, or of its leading"):
        jaxbn.Moments(stacked.mean, stacked.var, jnp.ones((2, 3))).merge_axis(0)


@pytest.mark.parametrize("r_max", [0.5, jnp.nan, -3.0])
def test_a_traced_limit_below_batch_norms_is_batch_norms(r_max):
    x = jnp.asarray(BASE)
    state = STATE._replace(mean=jnp.full(C, 0.5))
    y, _ = jax.jit(lambda r, d: jaxbn.batch_renorm_train(x, None, state, r_max=r, d_max=d))(r_max, -1.0)
    np.testing.assert_allclose(y, jaxbn.batch_norm_train(x, None, None)[0], atol=1e-6)


@pytest.mark.parametrize("name", ["r_max", "d_max"])
def test_limits_are_single_numbers(name):
    limits = {"r_max": 3.0, "d_max": 5.0} | {name: jnp.full(C, 2.0)}
    with pytest.raises(ValueError, match=rf"{name}: expected one number for all channels, got shape \(3,\)"):
        jaxbn.batch_renorm_train(jnp.asarray(BASE), None, STATE, **limits)
    with pytest.raises(ValueError, match=r"step: expected one number, got shape \(2,\); use jax.vmap for several"):
        jaxbn.batch_renorm_limits(jnp.arange(2))
