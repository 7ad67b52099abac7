"""Derivatives of every kind and order, and what reverse mode keeps in memory for them."""

import functools

import jax
import jax.numpy as jnp
import near
import numpy as np
import oracle
import pytest
from costs import saved

import jaxbn

assert_near = functools.partial(near.assert_near, units=160)


def draw(*shape, seed=0, mean=0.5):
    return jnp.asarray(np.random.default_rng(seed).normal(mean, 2, shape), jnp.float32)


def train(x, scale, bias, mask=None):
    return jaxbn.batch_norm_train(x, jaxbn.BatchNormParams(scale, bias), None, mask=mask)[0]


def plain(x, scale, bias, mask=None):
    """The formula in differentiable operations, which JAX differentiates by itself."""
    mask = jnp.ones(x.shape, bool) if mask is None else jnp.broadcast_to(mask[:, None], x.shape)
    count = jnp.sum(mask, 0, keepdims=True).astype(x.dtype)
    mean = jnp.sum(jnp.where(mask, x, 0), 0, keepdims=True) / count
    var = jnp.sum(jnp.where(mask, jnp.square(x - mean), 0), 0, keepdims=True) / count
    return (x - mean) / jnp.sqrt(var + 1e-5) * scale[None] + bias[None]


ARGUMENTS = (draw(5, 3), draw(3, seed=1), draw(3, seed=2))
WEIGHT = draw(5, 3, seed=3)
MASKS = [None, jnp.array([True, True, False, True, False])]


@pytest.mark.parametrize("mask", MASKS, ids=["all", "masked"])
def test_gradients_against_the_oracle(mask):
    x, scale, bias = ARGUMENTS
    actual = jax.grad(lambda *a: jnp.sum(WEIGHT * train(*a, mask)), (0, 1, 2))(x, scale, bias)
    assert_near(actual, oracle.gradients(x, WEIGHT, scale, mask=None if mask is None else mask[:, None]))


FORWARD_REVERSE = [jax.jacfwd, jax.jacrev]


def jacobian(norm, mask, transformation=jax.jacrev):
    return jax.jit(transformation(lambda *a: norm(*a, mask), (0, 1, 2)))(*ARGUMENTS)


def hessian(norm, mask, outer=jax.jacfwd, inner=jax.jacrev):
    def loss(*a):
        return jnp.sum(WEIGHT * jnp.sin(norm(*a, mask)))

    return jax.jit(outer(inner(loss, (0, 1, 2)), (0, 1, 2)))(*ARGUMENTS)


@functools.cache
def of_the_formula(derivative, masked):
    """One order serves all: the formula has no derivative of its own."""
    return derivative(plain, MASKS[masked])


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("transformation", FORWARD_REVERSE, ids=lambda t: t.__name__)
def test_jacobians(transformation, masked):
    assert_near(jacobian(train, MASKS[masked], transformation), of_the_formula(jacobian, masked))


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("outer", FORWARD_REVERSE, ids=lambda t: t.__name__)
@pytest.mark.parametrize("inner", FORWARD_REVERSE, ids=lambda t: t.__name__)
def test_hessians_in_every_order(outer, inner, masked):
    assert_near(hessian(train, MASKS[masked], outer, inner), of_the_formula(hessian, masked), units=800)


@pytest.mark.slow
def test_third_order():
    def third(norm):
        def loss(x):
            return jnp.sum(WEIGHT * jnp.sin(norm(x, *ARGUMENTS[1:])))

        return jax.jit(jax.jacfwd(jax.jacrev(jax.grad(loss))))(ARGUMENTS[0])

    assert_near(third(train), third(plain), units=8000)


def test_jvp_linearize_and_vjp_agree():
    tangents = tuple(draw(*a.shape, seed=7) for a in ARGUMENTS)
    y, dy = jax.jvp(train, ARGUMENTS, tangents)
    y_expected, dy_expected = jax.jvp(plain, ARGUMENTS, tangents)
    assert_near((y, dy), (y_expected, dy_expected))
    y, linear = jax.linearize(train, *ARGUMENTS)
    assert_near((y, linear(*tangents)), (y_expected, dy_expected))
    y, pullback = jax.vjp(train, *ARGUMENTS)
    inner = sum(jnp.vdot(g, t) for g, t in zip(pullback(WEIGHT), tangents, strict=True))
    np.testing.assert_allclose(inner, jnp.vdot(WEIGHT, dy_expected), rtol=1e-4)


def test_only_some_arguments_differentiated():
    x, scale, bias = ARGUMENTS
    full = jax.grad(lambda *a: jnp.sum(WEIGHT * train(*a)), (0, 1, 2))(x, scale, bias)
    assert_near(jax.grad(lambda s: jnp.sum(WEIGHT * train(x, s, bias)))(scale), full[1])
    assert_near(jax.grad(lambda b: jnp.sum(WEIGHT * train(x, scale, b)))(bias), full[2])
    no_affine = jax.grad(lambda x: jnp.sum(WEIGHT * train(x, None, None)))(x)
    assert_near(no_affine, oracle.gradients(x, WEIGHT)[0])


def test_gradients_in_eval_leave_the_state_alone():
    x, scale, bias = ARGUMENTS
    state = jaxbn.BatchNormState(draw(3, seed=4), jnp.square(draw(3, seed=5)) + 1, jnp.int32(1))

    def loss(x, params, mean, var):
        y, _ = jaxbn.batch_norm_eval(x, params, jaxbn.BatchNormState(mean, var, state.num_batches_tracked))
        return jnp.sum(WEIGHT * y)

    dx, dparams, dmean, dvar = jax.grad(loss, (0, 1, 2, 3))(
        x, jaxbn.BatchNormParams(scale, bias), state.mean, state.var
    )
    rstd = 1 / np.sqrt(np.asarray(state.var) + 1e-5)
    assert_near(dx, WEIGHT * (np.asarray(scale) * rstd)[None])
    assert_near(dparams.scale, (np.asarray(WEIGHT) * (np.asarray(x) - np.asarray(state.mean)) * rstd).sum(0))
    assert_near(dparams.bias, np.asarray(WEIGHT).sum(0))
    assert not dmean.any()
    assert not dvar.any()


def test_the_new_state_carries_no_gradient():
    _, state = jaxbn.batch_norm_init(3)

    def loss(x, params, mean):
        _, new = jaxbn.batch_norm_train(x, params, state._replace(mean=mean))
        return jnp.sum(new.mean) + jnp.sum(new.var)

    dx, dparams = jax.grad(loss, (0, 1))(ARGUMENTS[0], jaxbn.BatchNormParams(*ARGUMENTS[1:]), state.mean)
    assert not dx.any()
    assert not any(v.any() for v in dparams)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf, 1e18])
def test_what_the_mask_hides_harms_no_gradient(bad):
    x, scale, bias = ARGUMENTS
    mask = MASKS[1]
    poisoned = jnp.where(mask[:, None], x, bad)

    def loss(x, scale, bias):
        return jnp.sum(jnp.where(mask[:, None], WEIGHT * jnp.square(train(x, scale, bias, mask)), 0))

    clean, dirty = (jax.value_and_grad(loss, (0, 1, 2))(v, scale, bias) for v in (x, poisoned))
    assert_near(dirty, clean)
    assert jnp.isfinite(dirty[1][0]).all()


def test_bfloat16_gradients_are_rounded_once():
    x = draw(64, 3).astype(jnp.bfloat16)
    dy = draw(64, 3, seed=1).astype(jnp.bfloat16)
    scale = draw(3, seed=2)
    dx = jax.grad(lambda x: jnp.sum((train(x, scale, None) * dy).astype(jnp.float32)))(x)
    assert dx.dtype == jnp.bfloat16
    expected = oracle.gradients(x, dy, scale)[0]
    tolerance = 2.0**-8 * np.abs(expected) + 1e-6 * np.abs(expected).max()
    assert (np.abs(np.asarray(dx).astype(np.float64) - expected) <= tolerance).all()


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("mode", ["train", "train masked", "eval", "moments"])
def test_reverse_mode_keeps_x_in_its_own_dtype_and_arrays_of_channel_size(dtype, mode):
    x = draw(16, 8, 8, 3).astype({"f32": jnp.float32, "bf16": jnp.bfloat16, "f16": jnp.float16}[dtype])
    params, state = jaxbn.batch_norm_init(3)
    mask = jnp.ones((16, 8, 8), bool)
    functions = {
        "train": lambda x, p: jaxbn.batch_norm_train(x, p, state),
        "train masked": lambda x, p: jaxbn.batch_norm_train(x, p, state, mask=mask),
        "eval": lambda x, p: jaxbn.batch_norm_eval(x, p, state),
        "moments": lambda x, p: jaxbn.moments(x).var,
    }
    kept = saved(lambda x, p: jax.tree.leaves(functions[mode](x, p))[0], x, params)
    large = [(d, s) for d, s in kept if np.prod(s) > 3]
    expected = [(dtype, x.shape)] + ([("bool", (16, 8, 8, 1))] if "masked" in mode else [])
    assert sorted(large) == sorted(expected)
    assert len(kept) - len(large) <= 6
