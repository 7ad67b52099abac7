"""States on devices: stacked ones, those that saw nothing, and how they are typed."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parallel import P
from versions import needs

import jaxbn
import jaxbn.linen
import jaxbn.nnx

AXIS = "d"


def states(shape, tracked, seed=0):
    """A state for each of the devices, which are along the first axis."""
    rng = np.random.default_rng(seed)
    mean, var = (jnp.asarray(rng.uniform(1, 9, shape), jnp.float32) for _ in range(2))
    return jaxbn.BatchNormState(mean, var, jnp.asarray(tracked, jnp.int32))


def expected(leaf, tracked):
    """The mean over devices that saw a batch, for each of the stacked states."""
    tracked = np.asarray(tracked)
    seen = tracked > 0
    weight = np.where(seen.any(0), seen, True).reshape(*seen.shape, *(1,) * (leaf.ndim - seen.ndim))
    return np.where(weight, np.asarray(leaf, np.float64), 0).sum(0) / weight.sum(0)


def sync(tree):
    return jax.vmap(functools.partial(jaxbn.sync_state, axis_name=AXIS), axis_name=AXIS)(tree)


# Two devices; as many states as channels, more, and states of states.
@pytest.mark.parametrize(
    ("stack", "tracked"),
    [
        ((), [3, 0]),
        ((2,), [[3, 0], [0, 2]]),
        ((4,), [[3, 0, 0, 1], [0, 2, 0, 1]]),
        ((1,), [[0], [2]]),
        ((2, 2), [[[1, 0], [0, 0]], [[1, 1], [0, 2]]]),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["state", "batch_stats"])
def test_each_state_has_its_own_weights(stack, tracked, kind):
    state = states((2, *stack, 2), tracked)
    seen = (np.asarray(tracked) > 0)[..., None]
    # What a device holds that saw nothing is nobody's.
    state = state._replace(mean=jnp.where(seen | ~seen.any(0), state.mean, jnp.nan))
    tree = state if kind == "state" else {"layer": {"BatchNorm_0": dict(state._asdict())}}
    found = sync(tree)
    if kind != "state":
        found = jaxbn.BatchNormState(**found["layer"]["BatchNorm_0"])
    for device in range(2):
        np.testing.assert_allclose(found.mean[device], expected(state.mean, tracked), rtol=1e-6)
        np.testing.assert_allclose(found.var[device], expected(state.var, tracked), rtol=1e-6)
        np.testing.assert_array_equal(found.num_batches_tracked[device], np.max(tracked, 0))


def test_layers_of_nnx_that_count_are_weighted_too():
    model = jaxbn.nnx.BatchNorm(3, momentum=None, rngs=nnx.Rngs(0))
    stats = nnx.state(model, nnx.BatchStat)
    both = jax.tree.map(lambda v: jnp.stack([v, v + 2]), stats)
    both["num_batches_tracked"][...] = jnp.array([0, 4], jnp.int32)
    found = sync(both)
    for name in ("mean", "var"):
        np.testing.assert_array_equal(found[name][...], jnp.stack([both[name][...][1]] * 2))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_stacked_states_are_updated_each_by_its_own_moments(momentum):
    """As many states as channels; one of them sees nothing, and each has its own number of batches."""
    rng = np.random.default_rng(0)
    mean, var = (jnp.asarray(rng.uniform(1, 9, (3, 3)), jnp.float32) for _ in range(2))
    state = jaxbn.BatchNormState(mean, var, jnp.array([0, 4, 2], jnp.int32))
    moments = jaxbn.Moments(var, mean, jnp.array([5.0, 0, 8]))
    found = jaxbn.batch_norm_update(state, moments, momentum=momentum)
    for k in range(3):
        one, its = jax.tree.map(lambda v, k=k: v[k], state), jaxbn.Moments(var[k], mean[k], moments.count[k])
        right = jaxbn.batch_norm_update(one, its, momentum=momentum)
        for a, b in zip(found, right, strict=True):
            np.testing.assert_allclose(a[k], b, rtol=1e-6)


def test_a_counter_of_another_shape_is_an_error():
    with pytest.raises(
        ValueError, match=r"state\.mean: expected the leading axes of num_batches_tracked, shape \(3,\)"
    ):
        sync(states((2, 2, 2), np.ones((2, 3))))


def two_axes():
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


# Channels sharded over another axis of the mesh: the counter is the same on all devices. (Under a mask, virtual batches
# count for each channel.)
@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize(("masked", "size"), [(False, None), (True, None), (False, 8)])
def test_channels_on_another_axis_of_the_mesh(masked, scanned, size):
    x = jax.random.normal(jax.random.key(0), (16, 4))
    mask = jnp.arange(16)[:, None] % 3 > 0
    state = jaxbn.batch_norm_init(4)[1]

    def norm(x, mask, state):
        mask = mask if masked else None
        return jaxbn.batch_norm_train(x, None, state, axis_name="data", mask=mask, virtual_batch_size=size)

    def train(x, mask, mean, var, n):
        state = jaxbn.BatchNormState(mean, var, n)
        if not scanned:
            y, new = norm(x, mask, state)
            return y, *new
        state, y = jax.lax.scan(lambda s, x: norm(x, mask, s)[::-1], state, x[None])
        return y[0], *state

    model = P("model")
    specs = (P("data", "model"), P("data"), model, model, P())
    y, *new = jax.shard_map(train, mesh=two_axes(), in_specs=specs, out_specs=(specs[0], model, model, P()))(
        x, mask, *state
    )
    right_y, right = jaxbn.batch_norm_train(x, None, state, mask=mask if masked else None, virtual_batch_size=size)
    for a, b in zip((y, *new), (right_y, *right), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("differentiated", [False, True])
@needs("jax.vmap of a checked jax.shard_map", jax="0.10.2")
def test_vmap_of_shard_map(masked, differentiated):
    """Each member of the vmap is on other devices of a second axis."""
    x = jax.random.normal(jax.random.key(0), (2, 16, 4))
    mask = jnp.arange(16)[:, None] % 3 > 0 if masked else None
    layer = jaxbn.linen.BatchNorm(use_running_average=False, axis_name="data")
    variables = nn.BatchNorm(use_running_average=False).init(jax.random.key(0), x[0])

    def y_of(x, mask, variables):
        return layer.apply(variables, x, mask=mask, mutable="batch_stats")[0]

    def one(x, mask, variables):
        if differentiated:
            return jax.grad(lambda x: jnp.sum(jnp.sin(y_of(x, mask, variables))))(x)
        return y_of(x, mask, variables)

    specs = P("data"), P("data"), P()
    mapped = jax.shard_map(one, mesh=two_axes(), in_specs=specs, out_specs=P("data"))
    found = jax.jit(jax.vmap(mapped, (0, None, None), spmd_axis_name="model"))(x, mask, variables)

    def alone(x):
        return jaxbn.batch_norm_train(x, jaxbn.batch_norm_init(4)[0], None, mask=mask)[0]

    for k in range(2):
        right = jax.grad(lambda x: jnp.sum(jnp.sin(alone(x))))(x[k]) if differentiated else alone(x[k])
        np.testing.assert_allclose(found[k], right, atol=2e-5)
