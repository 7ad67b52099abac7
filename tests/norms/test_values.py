"""Outputs and states against the float64 oracle: ranks, axes, dtypes, options."""

import functools

import jax
import jax.numpy as jnp
import near
import numpy as np
import oracle
import pytest
from marks import grid
from near import EPS32

import jaxbn

# Relative to what is expected, however small it is.
assert_near = functools.partial(near.assert_near, least=0)
C = 5


def draw(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(0.5, 2.0, shape), dtype)


def fresh(seed=1, dtype=np.float32):
    rng = np.random.default_rng(seed)
    params = jaxbn.BatchNormParams(jnp.asarray(rng.normal(1, 1, C), dtype), jnp.asarray(rng.normal(0, 1, C), dtype))
    state = jaxbn.BatchNormState(
        jnp.asarray(rng.normal(0, 1, C), dtype), jnp.asarray(rng.uniform(1, 2, C), dtype), jnp.int32(7)
    )
    return params, state


SHAPES = [(6, C), (4, 7, C), (3, 5, 4, C), (2, 3, 4, 2, C), (2, 2, 3, 1, 2, 2, C)]


@grid("shape", SHAPES, quick=lambda shape: len(shape) == 3, ids=str)
def test_any_rank_and_any_feature_axis(shape):
    params, state = fresh()
    x = np.asarray(draw(*shape))
    expected = oracle.train(x, *params)
    mean, var = oracle.update(state.mean, state.var, [x])
    expected_eval = oracle.normalize(x, state.mean, state.var, *params)
    for position in {0, 1, len(shape) // 2, len(shape) - 1}:
        axis = position - len(shape) if position % 2 else position
        moved = np.moveaxis(x, -1, position)
        y, new = jax.jit(functools.partial(jaxbn.batch_norm_train, axis=axis))(moved, params, state)
        assert y.shape == moved.shape
        assert y.dtype == x.dtype
        assert_near(np.moveaxis(y, position, -1), expected)
        assert_near(new.mean, mean)
        assert_near(new.var, var)
        assert new.num_batches_tracked == 8
        y, same = jaxbn.batch_norm_eval(moved, params, state, axis=axis)
        assert same is state
        assert_near(np.moveaxis(y, position, -1), expected_eval)


@pytest.mark.parametrize("axis", [(1, -1), (-1, 1), [1, 3], np.array([3, 1]).tolist()], ids=str)
def test_several_feature_axes_are_taken_in_ascending_order(axis):
    x = draw(4, 2, 6, 3)
    params, state = jaxbn.batch_norm_init((2, 3))
    params = params._replace(bias=jnp.arange(6.0).reshape(2, 3))
    y, state = jaxbn.batch_norm_train(x, params, state, axis=axis)
    flat = jnp.moveaxis(x, 2, 1).reshape(4, 6, 6)
    expected = oracle.train(flat, bias=np.arange(6.0)).reshape(4, 6, 2, 3)
    assert_near(jnp.moveaxis(y, 2, 1), expected)
    assert state.mean.shape == (2, 3)


@pytest.mark.parametrize("with_scale", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
def test_params_and_state_may_be_absent(with_scale, with_bias, tracked):
    params, state = fresh()
    x = draw(8, C)
    given = jaxbn.BatchNormParams(params.scale if with_scale else None, params.bias if with_bias else None)
    scale, bias = (params.scale if with_scale else 1.0), (params.bias if with_bias else 0.0)
    for form in [given, None] if not (with_scale or with_bias) else [given]:
        y, new = jaxbn.batch_norm_train(x, form, state if tracked else None)
        assert_near(y, oracle.train(x, scale, bias))
        assert (new is not None) == tracked
        y, new = jaxbn.batch_norm_eval(x, form, state if tracked else None)
        assert_near(
            y, oracle.normalize(x, state.mean, state.var, scale, bias) if tracked else oracle.train(x, scale, bias)
        )
        assert new is (state if tracked else None)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.5, 1.0, None])
@pytest.mark.parametrize("correction", [0, 1])
def test_running_statistics_over_several_steps(momentum, correction):
    params, state = jaxbn.batch_norm_init(C)
    step = functools.partial(jaxbn.batch_norm_train, correction=correction)
    batches = [draw(n, C, seed=n) for n in (9, 4, 30)]
    for x in batches:
        _, state = step(x, params, state, momentum=momentum)
    mean, var = oracle.update(np.zeros(C), np.ones(C), batches, momentum, correction)
    assert_near(state.mean, mean)
    assert_near(state.var, var)
    assert state.num_batches_tracked == 3


def test_momentum_may_be_traced():
    params, state = fresh()
    x = draw(9, C)
    traced = jax.jit(jaxbn.batch_norm_train)(x, params, state, momentum=0.3)
    jax.tree.map(assert_near, traced, jaxbn.batch_norm_train(x, params, state, momentum=0.3))


def test_after_training_on_one_distribution_eval_is_like_train():
    params, state = jaxbn.batch_norm_init(C)
    train = jax.jit(functools.partial(jaxbn.batch_norm_train, momentum=None))
    for k in range(20):
        y_train, state = train(draw(4096, C, seed=k), params, state)
    y_eval, _ = jaxbn.batch_norm_eval(draw(4096, C, seed=19), params, state)
    assert jnp.abs(y_train - y_eval).max() < 0.05


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_input_loses_one_rounding_and_no_more(dtype):
    params, state = fresh()
    x = draw(64, 6, C, dtype=dtype)
    y, new = jaxbn.batch_norm_train(x, params, state)
    mean, var = oracle.update(state.mean, state.var, [x])
    expected = oracle.train(x, *params)
    assert y.dtype == dtype
    half_unit = float(jnp.finfo(dtype).eps) / 2
    assert (np.abs(np.asarray(y).astype(np.float64) - expected) <= 1.01 * half_unit * np.abs(expected) + 1e-6).all()
    assert new.mean.dtype == new.var.dtype == jnp.float32
    assert_near(new.mean, mean)
    assert_near(new.var, var)
    y, _ = jaxbn.batch_norm_eval(x, params, state)
    expected = oracle.normalize(x, state.mean, state.var, *params)
    assert (np.abs(np.asarray(y).astype(np.float64) - expected) <= 1.01 * half_unit * np.abs(expected) + 1e-6).all()


def test_float16_with_a_running_variance_beyond_its_range():
    params, state = jaxbn.batch_norm_init(1)
    state = state._replace(var=jnp.array([1e5]))
    y, _ = jaxbn.batch_norm_eval(jnp.array([[1000.0]], jnp.float16), params, state)
    np.testing.assert_allclose(np.asarray(y, np.float64), 1000 / np.sqrt(1e5), rtol=1e-3)


@pytest.mark.usefixtures("x64")
def test_float64_is_computed_in_float64():
    params, state = fresh(dtype=np.float64)
    x = draw(50, C, dtype=np.float64)
    y, new = jaxbn.batch_norm_train(x, params, state)
    assert y.dtype == new.mean.dtype == new.var.dtype == jnp.float64
    mean, var = oracle.update(state.mean, state.var, [x])
    for actual, expected in ((y, oracle.train(x, *params)), (new.mean, mean), (new.var, var)):
        assert_near(actual, expected, eps=2.0**-52)
    assert jaxbn.batch_norm_init(C, param_dtype=jnp.float64)[1].var.dtype == jnp.float64


@pytest.mark.usefixtures("x64")
def test_float64_input_leaves_the_state_its_dtype():
    params, state = fresh()
    y, new = jaxbn.batch_norm_train(draw(50, C, dtype=np.float64), params, state)
    assert y.dtype == jnp.float64
    assert [v.dtype for v in new] == [v.dtype for v in state]


@pytest.mark.parametrize("function", [jaxbn.batch_norm_train, jaxbn.batch_norm_eval])
def test_dtype_of_the_output_and_of_the_params_are_free(function):
    params, state = fresh()
    x = draw(16, C, dtype=jnp.bfloat16)
    assert function(x, params, state)[0].dtype == jnp.bfloat16
    assert function(x, params, state, dtype=jnp.float32)[0].dtype == jnp.float32
    half = jax.tree.map(lambda v: v.astype(jnp.bfloat16), params)
    assert function(x.astype(jnp.float32), half, state)[0].dtype == jnp.float32


@pytest.mark.parametrize("shape", [(8, 6), (8, 1), (1, 6), (8, 6, C), (8, 6, 1), (1, 1, C)], ids=str)
def test_masked_values_enter_nothing_and_are_normalized_like_the_rest(shape):
    params, state = fresh()
    x = draw(8, 6, C)
    mask = np.random.default_rng(3).random(shape) < 0.6
    full = mask if mask.ndim == 3 else mask[..., None]
    y, new = jaxbn.batch_norm_train(x, params, state, mask=jnp.asarray(mask))
    mean, var, count = oracle.moments(x, full)
    # Where nothing counts, y is the bias.
    expected = np.where(count > 0, oracle.train(x, *params, mask=full), params.bias)
    assert_near(y, expected, units=8)
    assert_near(new.mean, np.where(count > 0, 0.9 * np.asarray(state.mean) + 0.1 * mean, state.mean))
    unbiased = var * count / np.maximum(count - 1, 1)
    assert_near(new.var, np.where(count > 1, 0.9 * np.asarray(state.var) + 0.1 * unbiased, state.var))
    y, _ = jaxbn.batch_norm_eval(x, params, None, mask=jnp.asarray(mask))
    assert_near(y, expected, units=8)
    y, _ = jaxbn.batch_norm_eval(x, params, state, mask=jnp.asarray(mask))
    assert_near(y, oracle.normalize(x, state.mean, state.var, *params))


def test_a_mask_is_the_same_as_leaving_the_values_out():
    params, state = fresh()
    x = draw(16, 3, C)
    y, new = jaxbn.batch_norm_train(x, params, state, mask=jnp.arange(16)[:, None] < 10)
    y_part, new_part = jaxbn.batch_norm_train(x[:10], params, state)
    assert_near(y[:10], y_part)
    jax.tree.map(assert_near, new, new_part)


def test_update_with_merged_moments_is_training_on_the_union():
    _, state = fresh()
    x = draw(12, C)
    merged = jaxbn.moments(x[:5]).merge(jaxbn.moments(x[5:]))
    for momentum in (0.3, None):
        expected = jaxbn.batch_norm_train(x, None, state, momentum=momentum)[1]
        jax.tree.map(assert_near, jaxbn.batch_norm_update(state, merged, momentum=momentum), expected)


def test_numbers_of_numpy_and_jax_as_options():
    params, state = fresh()
    x = draw(8, C)
    expected = jaxbn.batch_norm_train(x, params, state, axis=1, eps=0.5, momentum=0.25)
    actual = jaxbn.batch_norm_train(x, params, state, axis=np.int64(1), eps=jnp.float32(0.5), momentum=np.float32(0.25))
    jax.tree.map(assert_near, actual, expected)
    expected = jaxbn.batch_norm_train(x, params, state, virtual_batch_size=4, correction=2)
    for kind in (np.float32, np.int64):
        actual = jaxbn.batch_norm_train(x, params, state, virtual_batch_size=np.int32(4), correction=kind(2))
        jax.tree.map(np.testing.assert_array_equal, actual, expected)
    limits = jaxbn.batch_renorm_limits(np.int64(30), start=np.int64(10), r_end=np.int32(40), r_max=np.float64(2))
    assert limits == jaxbn.batch_renorm_limits(30, start=10, r_end=40, r_max=2.0)


def test_the_average_over_millions_of_batches_does_not_drift():
    """Only what float32 rounds at each step is left, which goes to and fro."""

    @jax.jit
    def averaged(state, key):
        def step(_, carry):
            state, total, key = carry
            key, now = jax.random.split(key)
            x = 1 + jax.random.normal(now, (2, C))
            m = jaxbn.Moments(x[0], x[1], jnp.full(C, 2.0))
            return jaxbn.batch_norm_update(state, m, momentum=None, correction=0), total + x, key

        zero = jnp.zeros((2, C))
        state, total, _ = jax.lax.fori_loop(0, steps, step, (state, zero, key))
        return state, total

    before, steps = 4_000_000, 100_000
    state = jaxbn.BatchNormState(jnp.ones(C), jnp.ones(C), jnp.int32(before))
    new, total = averaged(state, jax.random.key(0))
    assert new.num_batches_tracked == before + steps
    expected = (before + np.asarray(total, np.float64)) / (before + steps)
    np.testing.assert_allclose(new[:2], expected, rtol=0, atol=2e-5)


def test_weights_of_0_and_1_are_exact_and_what_is_not_finite_stays():
    old = np.array([1e10, 1e-10, -3.0, np.inf, 1.0, np.nan], np.float32)
    new = np.array([0.1, 1e10, 7.0, 1.0, np.inf, 1.0], np.float32)
    moments = jaxbn.Moments(jnp.asarray(new), jnp.ones(6), jnp.full(6, 2.0))

    def mean(momentum):
        state = jaxbn.BatchNormState(jnp.asarray(old), jnp.ones(6), jnp.int32(0))
        return np.asarray(jaxbn.batch_norm_update(state, moments, momentum=momentum).mean)

    for one in (1.0, None, jnp.int32(1)):
        np.testing.assert_array_equal(mean(one)[:3], new[:3])
    np.testing.assert_array_equal(mean(0.0)[:3], old[:3])
    for momentum in (0.1, 0.9):
        expected = (1 - momentum) * old.astype(np.float64) + momentum * new
        np.testing.assert_allclose(mean(momentum), expected, rtol=4 * EPS32)


def test_members_of_a_vmap_have_momenta_of_their_own():
    _, state = fresh()
    x = draw(8, C)
    many = jax.vmap(lambda momentum: jaxbn.batch_norm_train(x, None, state, momentum=momentum)[1].mean)(
        jnp.array([0.1, 1.0])
    )
    for own, momentum in zip(many, (0.1, 1.0), strict=True):
        assert_near(own, jaxbn.batch_norm_train(x, None, state, momentum=momentum)[1].mean)
