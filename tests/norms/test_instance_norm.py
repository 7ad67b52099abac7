"""Tracked statistics of instance norm: what enters, from whom, and what evaluation makes of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from near import assert_near
from parallel import AXIS, P, mesh

import jaxbn

SHAPE = (8, 5, 4, 3)
PARAMS, STATE = jaxbn.batch_norm_init(SHAPE[-1])
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(1, 2, SHAPE) + RNG.normal(0, 3, (8, 1, 1, 3)), jnp.float32)


def expected_state(mask=None, momentum=0.1, correction=1):
    """The mean over examples of their means, and of their variances."""
    masks = [None] * 8 if mask is None else mask[..., None]
    each = [oracle.moments(x, m) for x, m in zip(np.asarray(X), masks, strict=True)]
    mean, var, count = (np.stack(v) for v in zip(*each, strict=True))
    some = count[:, 0] > 0
    var = var * count / np.maximum(count - correction, 1)
    means, variances = mean[some].mean(0), var[some].mean(0)
    return momentum * means, 1 - momentum + momentum * variances


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_the_mean_over_examples_enters(momentum, correction):
    _, state = jax.jit(functools.partial(jaxbn.instance_norm_train, correction=correction, momentum=momentum))(
        X, PARAMS, STATE
    )
    assert_near(state[:2], expected_state(momentum=1.0 if momentum is None else momentum, correction=correction))
    assert state.num_batches_tracked == 1


def test_it_is_batch_norm_of_virtual_batches_of_one():
    y, state = jaxbn.instance_norm_train(X, PARAMS, STATE)
    expected = jaxbn.batch_norm_train(X, PARAMS, STATE, virtual_batch_size=1)
    assert_near((y, state), expected)


def test_examples_in_which_nothing_counts_do_not_enter():
    mask = np.asarray(RNG.random(SHAPE[:3]) < 0.5)
    mask[2] = False
    mask[3] = False
    _, state = jaxbn.instance_norm_train(X.at[2].set(jnp.nan), PARAMS, STATE, mask=jnp.asarray(mask))
    assert_near(state[:2], expected_state(mask))
    _, same = jaxbn.instance_norm_train(X, PARAMS, STATE, mask=jnp.zeros(SHAPE[:3], bool))
    jax.tree.map(np.testing.assert_array_equal, same, STATE)


@pytest.mark.slow
@pytest.mark.parametrize(("axis", "batch_axis"), [(1, 0), (0, 1), (-1, 2), (1, -1), (0, -1)])
def test_any_axis_of_channels_and_examples(axis, batch_axis):
    moved = jnp.moveaxis(X, (-1, 0), (axis, batch_axis))
    y, state = jaxbn.instance_norm_train(moved, PARAMS, STATE, axis=axis, batch_axis=batch_axis)
    expected, expected_state = jaxbn.instance_norm_train(X, PARAMS, STATE)
    assert_near((jnp.moveaxis(y, (axis, batch_axis), (-1, 0)), state), (expected, expected_state))


def test_several_axes_of_channels_and_examples():
    params, state = jaxbn.batch_norm_init((4, 3))
    y, new = jaxbn.instance_norm_train(X, params, state, axis=(3, 2), batch_axis=())
    expected, expected_state = jaxbn.batch_norm_train(X, params, state, axis=(2, 3))
    assert_near((y, new), (expected, expected_state))
    frames, new = jaxbn.instance_norm_train(X.reshape(4, 2, *SHAPE[1:]), PARAMS, STATE, batch_axis=(0, 1))
    assert_near((frames.reshape(SHAPE), new), jaxbn.instance_norm_train(X, PARAMS, STATE))


def test_evaluation_uses_the_state_if_there_is_one():
    state = STATE._replace(mean=jnp.array([1.0, 2.0, 3.0]), var=jnp.array([4.0, 1.0, 0.5]))
    for x in (X, X[:1, :1, :1]):
        y, same = jaxbn.instance_norm_eval(x, PARAMS, state)
        assert same is state
        np.testing.assert_array_equal(y, jaxbn.batch_norm_eval(x, PARAMS, state)[0])
    y, none = jaxbn.instance_norm_eval(X, PARAMS, None)
    assert none is None
    np.testing.assert_array_equal(y, jaxbn.instance_norm_train(X, PARAMS, None)[0])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["shard_map", "pmap", "vmap"])
def test_devices_with_examples_of_their_own_agree_on_the_state(mode):
    expected = jaxbn.instance_norm_train(X, PARAMS, STATE)
    train = functools.partial(jaxbn.instance_norm_train, axis_name=AXIS)

    def on_each(x):
        return train(x, PARAMS, STATE)

    if mode == "shard_map":
        y, state = jax.jit(jax.shard_map(on_each, mesh=mesh(4), in_specs=P(AXIS), out_specs=(P(AXIS), P())))(X)
    else:
        transform = jax.pmap if mode == "pmap" else jax.vmap
        y, states = transform(on_each, axis_name=AXIS)(X.reshape(4, 2, *SHAPE[1:]))
        y, state = y.reshape(SHAPE), jax.tree.map(lambda v: v[1], states)
    assert_near((y, state), expected)


def test_gradients_do_not_enter_the_state():
    def loss(x):
        _, new = jaxbn.instance_norm_train(x, PARAMS, STATE)
        return jnp.sum(new.mean) + jnp.sum(new.var)

    assert not jax.grad(loss)(X).any()


def test_an_empty_batch_is_no_batch():
    state = STATE._replace(mean=STATE.mean + 1)
    y, new = jaxbn.instance_norm_train(X[:0], PARAMS, state)
    assert y.shape == X[:0].shape
    jax.tree.map(np.testing.assert_array_equal, new, state)
