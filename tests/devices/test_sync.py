"""The same global batch gives the same result on one device and on eight, whichever way they run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import grid
from parallel import (
    AXIS,
    EPS,
    MODES,
    SPECS,
    C,
    P,
    assert_is_one_batch,
    assert_near,
    check_empty_shards,
    check_sharded_jit,
    draw,
    mesh,
    run,
    sharded_jit,
    train_step,
)

import jaxbn


@grid("mode", MODES, quick=lambda mode: mode == "shard_map")
@pytest.mark.parametrize(("mean", "spread"), [(0, 10.0), (1e4, 0)])
def test_unmasked(mode, mean, spread):
    drawn = draw((16, 5, C), mean=mean, spread=spread)
    assert_is_one_batch(run(mode, 8, *drawn), *drawn)


@grid("mode", MODES, quick=lambda mode: mode == "shard_map")
@pytest.mark.parametrize("hidden", [[], [0, 3, 7], list(range(8))], ids=str)
def test_unequal_masks_and_empty_shards(mode, hidden):
    check_empty_shards(mode, hidden)


@pytest.mark.slow
@settings(max_examples=8)
@given(
    seed=st.integers(0, 2**32 - 1),
    mode=st.sampled_from([*MODES, "jit"]),
    devices=st.sampled_from([1, 2, 4, 8]),
    local=st.integers(1, 3),
    spatial=st.sampled_from([(), (2,), (3, 2)]),
    channels=st.integers(1, 3),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    fraction=st.sampled_from([None, 0.2, 0.7]),
    mean=st.sampled_from([0.0, 100.0]),
)
def test_any_shape_mask_and_mode_is_one_batch(seed, mode, devices, local, spatial, channels, dtype, fraction, mean):
    shape = (devices * (local + 1), *spatial, channels)
    batched, replicated = draw(shape, mean=mean, dtype=dtype, seed=seed, fraction=fraction)
    if mode == "jit":
        *result, state = sharded_jit((AXIS,), mesh(devices), batched, replicated)
        result = (*result, jax.tree.map(lambda v: v[None], state))
    else:
        result = run(mode, devices, batched, replicated)
    if dtype == jnp.bfloat16:
        # The loss takes a y that is rounded; what is compared is the state, and y to its rounding.
        x, mask, _ = batched
        full = None if mask is None else np.asarray(mask)[..., None]
        valid = np.broadcast_to(True if full is None else full, x.shape)
        expected = oracle.train(x, *replicated[0], mask=full)
        y = np.asarray(result[0]).astype(np.float64)
        assert (np.abs(y - expected) <= 2.0**-8 * np.abs(expected) + 1e-5)[valid].all()
        assert_near(jax.tree.map(lambda v: v[0], result[3]), train_step(*batched, *replicated)[3])
    else:
        assert_is_one_batch(result, batched, replicated, units=256 if fraction else 64)


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@grid("number", range(len(SPECS)), quick=lambda number: number == 0)
def test_sharded_jit(number, explicit):
    check_sharded_jit(number, explicit)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
def test_two_axes_at_once(mode):
    (x, _, weight), replicated = draw((16, 5, C), mean=50)

    def step(x, weight, params, state):
        y, dx, dparams, new = train_step(x, None, weight, params, state, axis_name=("a", "b"))
        return (y, dx, dparams, new) if mode == "shard_map" else (y, dx, jax.lax.psum(dparams, ("a", "b")), new)

    if mode == "shard_map":
        batch = P(("a", "b"))
        function = jax.shard_map(
            step,
            mesh=mesh(8, ("a", "b"), (4, 2)),
            in_specs=(batch, batch, P(), P()),
            out_specs=(batch, batch, P(), P()),
        )
        y, dx, dparams, new = jax.jit(function)(x, weight, *replicated)
        new = jax.tree.map(lambda v: v[None], new)
    else:
        inner = jax.vmap(step, axis_name="b", in_axes=(0, 0, None, None))
        function = jax.jit(jax.vmap(inner, axis_name="a", in_axes=(0, 0, None, None)))
        y, dx, dparams, new = function(*(v.reshape(4, 2, 2, 5, C) for v in (x, weight)), *replicated)
        y, dx = (v.reshape(x.shape) for v in (y, dx))
        dparams = jax.tree.map(lambda v: v[0, 0], dparams)
        new = jax.tree.map(lambda v: v.reshape(8, *v.shape[2:]), new)
    assert_is_one_batch((y, dx, dparams, new), (x, None, weight), replicated)


# Derivatives and types.


def test_the_new_state_is_typed_as_replicated():
    batched, (params, state) = draw((16, C))
    function = functools.partial(jaxbn.batch_norm_train, axis_name=AXIS)
    y, new = jax.shard_map(function, mesh=mesh(8), in_specs=(P(AXIS), P(), P()), out_specs=(P(AXIS), P()))(
        batched[0], params, state
    )
    assert_near((y, new), jaxbn.batch_norm_train(batched[0], params, state))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["shard_map", "vmap"])
def test_forward_mode_and_hessian_vector_products(mode):
    (x, _, weight), (params, _) = draw((16, C))
    dx = jnp.roll(x, 1)

    def loss(x, weight, **options):
        return jnp.sum(weight * jnp.sin(jaxbn.batch_norm_train(x, params, None, **options)[0]))

    def derivatives(x, weight, dx, **options):
        def gradient(x):
            return jax.grad(lambda x: loss(x, weight, **options))(x)

        y_dot = jax.jvp(lambda x: jaxbn.batch_norm_train(x, params, None, **options)[0], (x,), (dx,))[1]
        return y_dot, jax.jvp(gradient, (x,), (dx,))[1]

    expected = derivatives(x, weight, dx)
    local = functools.partial(derivatives, axis_name=AXIS)
    if mode == "shard_map":
        actual = jax.jit(jax.shard_map(local, mesh=mesh(8), in_specs=P(AXIS), out_specs=P(AXIS)))(x, weight, dx)
    else:
        actual = jax.vmap(local, axis_name=AXIS)(*(v.reshape(8, 2, C) for v in (x, weight, dx)))
        actual = jax.tree.map(lambda v: v.reshape(16, C), actual)
    assert_near(actual, expected, 64)


@pytest.mark.parametrize("mode", ["shard_map", "vmap"])
def test_moments_across_devices(mode):
    x = jnp.asarray(np.random.default_rng(0).normal(1e4, 1, (16, C)), jnp.float32)
    across = functools.partial(jaxbn.moments, axis_name=AXIS)
    if mode == "shard_map":
        m = jax.shard_map(across, mesh=mesh(8), in_specs=P(AXIS), out_specs=P())(x)
    else:
        m = jax.vmap(across, axis_name=AXIS, out_axes=None)(x.reshape(8, 2, C))
    mean, var, count = oracle.moments(x)
    np.testing.assert_allclose(np.float64(m.mean) + np.float64(m.mean_lo), mean, rtol=0, atol=4 * EPS)
    np.testing.assert_allclose(m.var, var, rtol=8 * EPS)
    np.testing.assert_array_equal(m.count, count)


# Groups.

GROUPS = [((0, 1), (2, 3), (4, 5), (6, 7)), ((0, 2, 4, 6), (7, 5, 3, 1)), ((0,), (1, 2, 3), (4, 5, 6, 7))]


jitted_step = jax.jit(train_step)


@grid("mode", MODES, quick=lambda mode: mode == "shard_map")
@pytest.mark.parametrize(("groups", "fraction"), [(GROUPS[0], None), (GROUPS[1], 0.6), (GROUPS[2], 0.6)], ids=str)
def test_groups_are_batches_of_their_own(mode, groups, fraction):
    batched, replicated = draw((16, 5, C), fraction=fraction, spread=3)
    y, dx, dparams, states = run(mode, 8, batched, replicated, axis_index_groups=groups)
    total = jax.tree.map(jnp.zeros_like, dparams)
    for group in groups:
        rows = np.concatenate([np.arange(2 * k, 2 * k + 2) for k in group])
        part = jax.tree.map(lambda v, rows=rows: v[rows], batched)
        expected = jitted_step(*part, *replicated)
        assert_near((y[rows], dx[rows]), expected[:2], 64)
        for k in group:
            assert_near(jax.tree.map(lambda v, k=k: v[k], states), expected[3])
        total = jax.tree.map(jnp.add, total, expected[2])
    assert_near(dparams, total, 64)


# States that were kept per device.


@pytest.mark.slow
def test_sync_state_is_the_mean_of_the_states():
    (x, _, _), _ = draw((16, 5, C), spread=5)
    _, state = jaxbn.batch_norm_init(C)

    def per_device(x):
        own = state
        for k in range(3):
            _, own = jaxbn.batch_norm_train(x + k, None, own)
        return jaxbn.sync_state(own, AXIS)

    synced = jax.shard_map(per_device, mesh=mesh(8), in_specs=P(AXIS), out_specs=P())(x)
    one = state
    for k in range(3):
        _, one = jaxbn.batch_norm_train(x + k, None, one, virtual_batch_size=2)
    assert_near(synced, one)


@pytest.mark.slow
def test_sync_state_leaves_out_who_has_seen_nothing():
    (x, _, _), _ = draw((16, 5, C))
    _, state = jaxbn.batch_norm_init(C)

    def per_device(x, mask):
        return jaxbn.sync_state(jaxbn.batch_norm_train(x, None, state, mask=mask)[1], AXIS)

    for devices in (8, 5, 0):
        mask = jnp.broadcast_to(jnp.arange(16)[:, None] < 2 * devices, (16, 5))
        synced = jax.shard_map(per_device, mesh=mesh(8), in_specs=P(AXIS), out_specs=P())(x, mask)
        expected = state
        if devices:
            _, expected = jaxbn.batch_norm_train(x[: 2 * devices], None, state, virtual_batch_size=2)
        assert_near(synced, expected)


def test_sync_state_of_a_whole_model():
    tree = {"norm": {"mean": jnp.arange(8.0), "var": jnp.arange(8.0) ** 2}, "steps": jnp.arange(8)}
    tree["state"] = jaxbn.BatchNormState(jnp.arange(8.0), jnp.arange(8.0), jnp.ones(8, jnp.int32))
    synced = jax.vmap(lambda t: jaxbn.sync_state(t, AXIS), axis_name=AXIS, out_axes=None)(tree)
    assert synced["norm"]["mean"] == 3.5
    assert synced["norm"]["var"] == 17.5
    assert synced["steps"] == 7
    assert synced["state"].mean == 3.5


def test_sync_state_leaves_keys_as_they_are():
    def stream(key, count):
        return nnx.State({"key": nnx.RngKey(key, tag="dropout"), "count": nnx.RngCount(count, tag="dropout")})

    keys, counts = jax.random.split(jax.random.key(0), 8), jnp.arange(8, dtype=jnp.uint32)
    synced = jax.vmap(lambda *s: jaxbn.sync_state(stream(*s), AXIS), axis_name=AXIS)(keys, counts)
    assert (synced["key"][...] == keys).all()
    # None draws again what another device has drawn of the same key.
    assert (synced["count"][...] == 7).all()
    # What was the same on all devices still is, for the types too.
    tree = {"key": keys[0], "mean": jnp.ones(2)}
    synced = jax.shard_map(lambda t: jaxbn.sync_state(t, AXIS), mesh=mesh(8), in_specs=P(), out_specs=P())(tree)
    assert synced["key"] == keys[0]


# Errors.


def test_an_axis_that_is_not_bound_is_named_with_those_that_are():
    (x, _, _), (params, state) = draw((16, C))
    tail = (
        "call this inside jax.shard_map, jax.pmap or jax.vmap with that axis_name, or leave it out: "
        "under jax.jit alone statistics of a sharded batch are global without it"
    )
    with pytest.raises(ValueError, match="axis_name") as caught:
        jaxbn.batch_norm_train(x, params, state, axis_name="batch")
    assert (
        str(caught.value) == f"axis_name: expected an axis that is bound here, got 'batch' where none is bound; {tail}"
    )
    with pytest.raises(ValueError, match="axis_name") as caught:
        jax.vmap(functools.partial(jaxbn.moments, axis_name=("i", "batch")), axis_name="i")(x[None])
    assert (
        str(caught.value) == f"axis_name: expected an axis that is bound here, got 'batch' where 'i' is bound; {tail}"
    )


def test_groups_that_do_not_cover_the_devices():
    (x, _, _), _ = draw((16, C))

    def call(groups):
        function = functools.partial(jaxbn.batch_norm_train, axis_name=AXIS, axis_index_groups=groups)
        jax.vmap(lambda x: function(x, None, None), axis_name=AXIS)(x.reshape(8, 2, C))

    for groups in ([[0, 1]], [[0, 1, 2, 3, 4, 5, 6, 7, 7]]):
        with pytest.raises(ValueError, match="axis_index_groups") as caught:
            call(groups)
        assert str(caught.value) == (
            f"axis_index_groups: expected each of the 8 devices along 'devices' in one group, got {groups}"
        )
    for groups in ([[0.5, *range(1, 8)]], [0, 1, 2, 3, 4, 5, 6, 7]):
        with pytest.raises(TypeError, match="axis_index_groups") as caught:
            call(groups)
        assert str(caught.value) == (
            f"axis_index_groups: expected sets of device numbers, which are integers, got {groups}; an example is "
            "[[0, 1], [2, 3]]"
        )
    with pytest.raises(ValueError, match="axis_index_groups") as caught:
        jaxbn.moments(x, axis_index_groups=[[0]])
    assert str(caught.value) == (
        "axis_index_groups: expected None without axis_name, got [[0]]; name the axis whose devices are grouped"
    )


def test_no_axis_and_groups_without_a_device():
    (x, _, _), (params, state) = draw((16, C))
    actual = jaxbn.batch_norm_train(x, params, state, axis_name=())
    jax.tree.map(np.testing.assert_array_equal, actual, jaxbn.batch_norm_train(x, params, state))
    with pytest.raises(ValueError, match="axis_index_groups") as caught:
        jax.vmap(
            lambda x: jaxbn.batch_norm_train(x, None, None, axis_name=AXIS, axis_index_groups=[[0, 1], []]),
            axis_name=AXIS,
        )(x.reshape(2, 8, C))
    assert str(caught.value) == (
        "axis_index_groups: expected at least 1 device in each group, got [[0, 1], []]; leave empty groups out"
    )


def test_one_value_per_device_is_enough_if_there_are_several_devices():
    x = jnp.arange(8.0)[:, None]
    norm = functools.partial(jaxbn.batch_norm_train, axis_name=AXIS)
    y, _ = jax.vmap(lambda x: norm(x, None, None), axis_name=AXIS)(x[:, None])
    assert_near(y[:, 0], oracle.train(x))
    with pytest.raises(ValueError, match="expected more than 1 value per channel"):
        jax.vmap(lambda x: norm(x, None, None), axis_name=AXIS)(x[:1, None])
