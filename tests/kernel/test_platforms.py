"""What is compiled for GPUs and TPUs, run on CPU: other sums than CPU's own, as exact as the input allows."""

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
    worst,
)
from costs import collectives
from lowering import each_platform  # noqa: F401
from parallel import mesh, train_step
from versions import EXACT_SUMS

import jaxbn

pytestmark = pytest.mark.optimized

SAMPLED = 64


@EXACT_SUMS
def test_output_and_stored_moments():
    for name in DATA:
        check_output_and_stored_moments(name)


def test_gradients():
    rng = np.random.default_rng(1)
    scale, dy = (rng.standard_normal(shape).astype(np.float32) for shape in (4, SHAPE))

    @jax.jit
    def pull(x):
        return jax.vjp(lambda x: jaxbn.batch_norm_train(x, jaxbn.BatchNormParams(scale, scale), None)[0], x)[1](dy)[0]

    for name, data in DATA.items():
        if "constant" not in name:
            x = data.astype(np.float32)
            assert worst(pull(x), oracle.gradients(x, dy, scale)[0]) <= 16, name


@pytest.mark.slow
def test_masks():
    for fraction in (0.01, 0.5):
        check_masked(fraction)


@pytest.mark.slow
def test_layouts():
    for shape in ((33, 3), (8, 7, 7, 3), (2, 5, 64, 3)):
        for axis in (-1, 1):
            check_layout(shape, axis)


def test_float16_is_as_exact_as_float32():
    for mean in (0, 10, 1e3):
        check_half_precision(jnp.float16, mean)


@pytest.mark.slow
def test_rows(platform):
    """With and without the moments kept for the way back: on GPUs these are two forms."""
    # CPU's compiler merges one value after the other, TPU's 128 at a time: 64 values here are 8192 there.
    every = 128 if platform == "tpu" else 1

    @jax.jit
    def alone(x):
        return jaxbn.layer_norm(x, None)

    @jax.jit
    def both(x):
        return jax.vjp(lambda x: jaxbn.layer_norm(x, None), x)

    for name, data in DATA.items():
        x = data[::every].astype(np.float32)
        for y in (alone(x.T), both(x.T)[0]):
            assert worst(np.asarray(y).T, oracle.train(x)) <= 4, name
        m = jaxbn.moments(x.T, axis=0)
        mean, var, _ = oracle.moments(x)
        assert (np.abs(m.mean - mean) <= EPS * (np.abs(mean) + np.sqrt(var))).all(), name
        assert (np.abs(m.var - var) <= 8 * EPS * var + np.finfo(np.float32).tiny).all(), name


@pytest.mark.slow
def test_layer_norm_of_rows_on_several_devices():
    x = jnp.asarray(np.random.default_rng(0).normal(1e3, 1, (8, 64)), jnp.float32)
    spec = jax.P(None, "devices")
    y = jax.jit(
        jax.shard_map(
            lambda x: jaxbn.layer_norm(x, None, axis_name="devices"), mesh=mesh(4), in_specs=spec, out_specs=spec
        )
    )(x)
    expected = oracle.train(np.asarray(x).T).T
    assert np.abs(y - expected).max() <= 4 * EPS * np.abs(expected).max()


def test_virtual_batches_are_batches_of_their_own():
    x = np.random.default_rng(0).normal(1e3, 1, (8, 5, 5, 3)).astype(np.float32)
    y, _ = jax.jit(lambda x: jaxbn.batch_norm_train(x, None, None, virtual_batch_size=4))(x)
    expected = np.concatenate([oracle.train(part) for part in (x[:4], x[4:])])
    assert np.abs(y - expected).max() <= 4 * EPS * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_constants_give_the_bias(dtype):
    bias = np.float32([0.3, -2.0])
    params, initial = jaxbn.BatchNormParams(np.ones(2, np.float32), bias), jaxbn.batch_norm_init(2)[1]
    train = jax.jit(lambda x: jaxbn.batch_norm_train(x, params, initial, momentum=1.0))
    for n in (2, 3, 1000, 50000):
        for value in (0, 1.1, -3.3e4, 1e-3):
            x = np.full((n, 2), value, dtype)
            y, state = train(x)
            np.testing.assert_array_equal(y, np.broadcast_to(bias.astype(dtype), x.shape))
            np.testing.assert_array_equal(state.mean, x[0].astype(np.float32))
            np.testing.assert_array_equal(state.var, 0)


def test_bfloat16_is_as_exact_as_its_storage():
    """A fifth of what storing x changed, in the mean over channels; y is what these statistics give."""
    rng = np.random.default_rng(0)
    state = jaxbn.batch_norm_init(64)[1]
    train = jax.jit(lambda x: jaxbn.batch_norm_train(x, None, state, momentum=1.0, correction=0, eps=0.0))
    for ratio in (0, 1, 10, 30, 100, 200):
        exact = ratio + rng.standard_normal((16384, 64))
        x = jnp.asarray(exact, jnp.bfloat16)
        y, new = train(x)
        mean, var, _ = oracle.moments(x)
        changed = np.abs(var - exact.var(0)).mean()
        assert np.abs(new.var - var).mean() <= max(1e-6, changed / 5), ratio
        assert (np.abs(new.mean - mean) <= 2 * EPS * (np.abs(mean) + np.sqrt(var))).all()
        expected = oracle.normalize(x, new.mean, new.var, eps=0)
        error = np.abs(np.asarray(y).astype(np.float64) - expected)
        assert (error <= float(jnp.finfo(jnp.bfloat16).eps) / 2 * np.abs(expected) + 4 * EPS * max(ratio, 4)).all()


def test_bfloat16_far_from_zero_loses_what_the_sums_do():
    """The bound in the docstring of `moments`: 8 * eps * mean**2, for any data."""
    rng = np.random.default_rng(0)
    for x in (1000 + rng.standard_normal((4096, 8)), 1.1 + 0.1 * (np.arange(4096) == 5)[:, None] * np.ones(8)):
        x = jnp.asarray(x, jnp.bfloat16)
        mean, var, _ = oracle.moments(x)
        assert (np.abs(jaxbn.moments(x).var - var) <= 8 * EPS * mean**2).all()


@EXACT_SUMS
def test_data_made_to_hurt_a_sample(platform):
    """The bound in the docstring of `moments`: the variance of float32 within 64 * eps, whatever the data."""
    x = np.zeros((32, 32, 32, 4))
    x[:, 4::8, 4::8] = 1
    for data in (x, 1e3 + 0.1 * np.random.default_rng(0).standard_normal(x.shape) + 100 * x):
        data = data.astype(np.float32)
        mean, var, _ = oracle.moments(data)
        m = jaxbn.moments(data)
        assert (np.abs(m.var - var) <= SAMPLED * EPS * var).all()
        assert (np.abs(m.mean - mean) <= EPS * (np.abs(mean) + 8 * np.sqrt(var))).all()


@pytest.mark.slow
def test_a_jitted_step_on_a_sharded_batch():
    """One sum over devices for the pivot, where there is one to be summed; one forward and one backward."""
    affine = jaxbn.batch_norm_init(4)
    for dtype, pivot in ((jnp.float32, 1), (jnp.bfloat16, 0)):
        x = jax.device_put(jnp.ones((16, 5, 4), dtype), jax.NamedSharding(mesh(8), jax.P("devices")))
        forward, _ = collectives(jaxbn.batch_norm_train, x, *affine)
        both, _ = collectives(train_step, x, None, x, *affine)
        assert (forward, both) == ({"all-reduce": pivot + 1}, {"all-reduce": pivot + 2}), dtype


@pytest.mark.slow
def test_instance_norm_remembers_the_rounded_mean():
    x = np.random.default_rng(0).normal(1e4, 1, (1, 3, 61, 67)).astype(np.float32)
    state = jaxbn.batch_norm_init(3)[1]
    _, new = jaxbn.instance_norm_train(x, None, state, axis=1, momentum=1.0, correction=0)
    mean, var, _ = oracle.moments(np.moveaxis(x, 1, -1))
    assert (np.abs(new.mean - mean) <= EPS * (np.abs(mean) + np.sqrt(var))).all()
    np.testing.assert_allclose(new.var, var, rtol=8 * EPS)
