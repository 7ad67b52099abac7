"""Batch renormalization beyond what every norm owes: its limits, its state, its layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parallel import AXIS, MODES, P, assert_near, mesh

import jaxbn
import jaxbn.linen
import jaxbn.nnx

C = 3
PARAMS = jaxbn.BatchNormParams(jnp.array([2.0, 0.5, -1.0]), jnp.array([0.1, -3.0, 1.0]))
STATE = jaxbn.BatchNormState(jnp.array([0.5, -1.0, 2.0]), jnp.array([1.0, 2.0, 0.5]), jnp.int32(4))


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(0.5, 1.5, shape), jnp.float32)


X = draw(8, 5, C)
wide = functools.partial(jaxbn.batch_renorm_train, r_max=1e6, d_max=1e6)


def test_without_limits_training_computes_what_evaluation_does():
    assert_near(wide(X, PARAMS, STATE)[0], jaxbn.batch_norm_eval(X, PARAMS, STATE)[0])


@pytest.mark.slow
def test_at_the_narrowest_limits_it_is_batch_norm():
    def results(function):
        def loss(x, params):
            y, state = function(x, params, STATE)
            return jnp.sum(jnp.sin(y)), (y, state)

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(X, PARAMS)

    renorm = functools.partial(jaxbn.batch_renorm_train, r_max=1.0, d_max=0.0)
    assert_near(results(renorm), results(jaxbn.batch_norm_train))


@pytest.mark.slow
def test_the_state_is_that_of_batch_norm():
    for options in ({}, {"momentum": None}, {"correction": 0}, {"virtual_batch_size": 3}):
        state, expected = wide(X, PARAMS, STATE, **options)[1], jaxbn.batch_norm_train(X, None, STATE, **options)[1]
        jax.tree.map(np.testing.assert_array_equal, state, expected)


@pytest.mark.slow
def test_gradients_pass_through_the_batch_and_not_through_the_correction():
    mean, std = X.mean((0, 1)), jnp.sqrt(X.var((0, 1)) + 1e-5)
    running_std = jnp.sqrt(STATE.var + 1e-5)
    r, d = std / running_std, (mean - STATE.mean) / running_std

    def expected(x):
        y = jaxbn.batch_norm_train(x, None, None)[0] * r[None, None] + d[None, None]
        return jnp.sum(jnp.sin(y * PARAMS.scale[None, None] + PARAMS.bias[None, None]))

    def actual(x, state):
        return jnp.sum(jnp.sin(wide(x, PARAMS, state)[0]))

    dx, dstate = jax.jit(jax.grad(actual, (0, 1), allow_int=True))(X, STATE)
    assert_near(dx, jax.jit(jax.grad(expected))(X))
    np.testing.assert_array_equal(dstate.mean, 0)
    np.testing.assert_array_equal(dstate.var, 0)


def test_limits_and_momentum_may_be_traced():
    traces = []

    @jax.jit
    def step(x, state, r_max, d_max):
        traces.append(None)
        return jaxbn.batch_renorm_train(x, PARAMS, state, r_max=r_max, d_max=d_max)[0]

    for r_max, d_max in ((1.0, 0.0), (1.1, 0.2), (3.0, 5.0)):
        expected, _ = jaxbn.batch_renorm_train(X, PARAMS, STATE, r_max=r_max, d_max=d_max)
        assert_near(step(X, STATE, r_max, d_max), expected)
    assert len(traces) == 1


def test_virtual_batches_are_each_corrected_by_their_own():
    y, _ = jaxbn.batch_renorm_train(X, PARAMS, STATE, r_max=1.2, d_max=0.3, virtual_batch_size=3)
    each = [jaxbn.batch_renorm_train(x, PARAMS, STATE, r_max=1.2, d_max=0.3)[0] for x in (X[:3], X[3:6], X[6:])]
    assert_near(y, jnp.concatenate(each))


@pytest.mark.slow
@pytest.mark.parametrize("mode", [mode for mode in MODES if "un" not in mode])
def test_devices_correct_by_the_whole_batch(mode):
    options = {"r_max": 1.2, "d_max": 0.3}
    weight = draw(*X.shape, seed=1)

    def gradients(x, weight, **more):
        def loss(x):
            y, state = jaxbn.batch_renorm_train(x, PARAMS, STATE, **options, **more)
            return jnp.sum(weight * jnp.sin(y)), (y, state)

        return jax.grad(loss, has_aux=True)(x)

    expected = jax.jit(gradients)(X, weight)
    on_each = functools.partial(gradients, axis_name=AXIS)
    if mode == "shard_map":
        spec = P(AXIS)
        mapped = jax.shard_map(on_each, mesh=mesh(4), in_specs=(spec, spec), out_specs=(spec, (spec, P())))
        assert_near(jax.jit(mapped)(X, weight), expected)
        return
    transform = jax.pmap if mode == "pmap" else jax.vmap
    dx, (y, states) = jax.jit(transform(on_each, axis_name=AXIS))(X.reshape(4, 2, 5, C), weight.reshape(4, 2, 5, C))
    assert_near((dx.reshape(X.shape), (y.reshape(X.shape), jax.tree.map(lambda v: v[3], states))), expected)


def test_the_papers_limits():
    steps = [0, 5_000, 15_000, 22_500, 25_000, 40_000, 10**6]
    r_max, d_max = jax.vmap(jaxbn.batch_renorm_limits)(jnp.array(steps))
    np.testing.assert_allclose(r_max, [1, 1, 11 / 7, 2, 15 / 7, 3, 3], rtol=1e-6)
    np.testing.assert_allclose(d_max, [0, 0, 2.5, 4.375, 5, 5, 5], rtol=1e-6)
    assert [float(v) for v in jaxbn.batch_renorm_limits(9, start=0, r_end=0, d_end=10)] == [3.0, 4.5]


LIMITS = [(1.2, 0.3), functools.partial(jaxbn.batch_renorm_limits, start=1, r_end=5, d_end=4)]


@pytest.mark.slow
@pytest.mark.parametrize("limits", LIMITS, ids=["numbers", "schedule"])
@pytest.mark.parametrize("momentum", [0.9, None])
def test_layers_are_the_function_bit_for_bit(limits, momentum):
    linen = jaxbn.linen.BatchRenorm(use_running_average=False, momentum=momentum, limits=limits)
    variables = linen.init(jax.random.key(0), X)
    layer = jaxbn.nnx.BatchRenorm(C, momentum=momentum, limits=limits, rngs=nnx.Rngs(0))
    params, state = jaxbn.batch_norm_init(C)
    for seed in range(5):
        x = draw(8, 5, C, seed=seed)
        r_max, d_max = limits(state.num_batches_tracked) if callable(limits) else limits
        expected, state = jaxbn.batch_renorm_train(
            x, params, state, r_max=r_max, d_max=d_max, momentum=momentum and 1 - momentum, correction=0
        )
        y, updates = linen.apply(variables, x, mutable=["batch_stats"])
        variables |= updates
        for result in (y, layer(x)):
            np.testing.assert_array_equal(result, expected)
        for field in state._fields:
            np.testing.assert_array_equal(variables["batch_stats"][field], getattr(state, field))
            np.testing.assert_array_equal(getattr(layer, field)[...], getattr(state, field))
    expected, _ = jaxbn.batch_norm_eval(X, params, state)
    np.testing.assert_array_equal(linen.clone(use_running_average=True).apply(variables, X), expected)
    np.testing.assert_array_equal(layer(X, use_running_average=True), expected)


def test_layers_take_no_default_for_what_matters():
    with pytest.raises(TypeError, match="limits"):
        jaxbn.linen.BatchRenorm()
    with pytest.raises(TypeError, match="limits"):
        jaxbn.nnx.BatchRenorm(C, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_small_batches_are_evaluated_as_they_were_trained():
    """What it is for: after training on batches of 2, evaluation differs from training far less than in batch norm."""

    def difference(train):
        state = STATE
        for seed in range(300):
            _, state = train(draw(2, 3, C, seed=seed), PARAMS, state, momentum=0.02)
        x = draw(2, 3, C, seed=1000)
        return jnp.abs(train(x, PARAMS, state)[0] - jaxbn.batch_norm_eval(x, PARAMS, state)[0]).max()

    renorm = jax.jit(functools.partial(jaxbn.batch_renorm_train, r_max=3.0, d_max=5.0))
    assert difference(renorm) < 1e-5
    assert difference(jax.jit(jaxbn.batch_norm_train)) > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r_max": 0.5}, "r_max: expected a limit of at least 1, got 0.5; that is batch norm's"),
        ({"d_max": np.float32(-1)}, "d_max: expected a limit of at least 0, got -1.0; that is batch norm's"),
    ],
)
def test_a_schedule_ends_with_limits(options, message):
    with pytest.raises(ValueError, match="expected a limit") as caught:
        jaxbn.batch_renorm_limits(1, **options)
    assert str(caught.value) == message


def test_limits_are_numbers():
    params, state = jaxbn.batch_norm_init(1)
    with pytest.raises(TypeError, match="d_max") as caught:
        jaxbn.batch_renorm_train(jnp.ones((2, 1)), params, state, r_max=3.0, d_max=None)
    assert str(caught.value) == "d_max: expected a number, got NoneType; jaxbn.batch_renorm_limits returns both limits"
