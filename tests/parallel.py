"""One training step on several devices, in each of JAX's ways of running in parallel, and what it must give."""

import functools

import jax
import jax.numpy as jnp
import near
import numpy as np
import oracle

import jaxbn

AXIS = "devices"
MODES = ["shard_map", "shard_map unchecked", "pmap", "vmap"]
P = jax.P
C = 3
EPS = near.EPS32


def mesh(devices, names=(AXIS,), shape=None):
    return jax.sharding.Mesh(np.array(jax.devices()[:devices]).reshape(shape or (devices,)), names)


def train_step(x, mask, weight, params, state, **options):
    """y, dx, dparams and the new state for the loss sum(weight * sin(y)); weight is 0 where the mask hides."""

    def loss(x, params):
        y, new = jaxbn.batch_norm_train(x, params, state, mask=mask, **options)
        return jnp.sum(weight * jnp.sin(y)), (y, new)

    (dx, dparams), (y, new) = jax.grad(loss, (0, 1), has_aux=True)(x, params)
    return y, dx, dparams, new


def run(mode, devices, batched, replicated, **options):
    """`train_step` with the leading axis of `batched` cut over devices; y, dx, dparams and each device's state."""

    def local_gradients(batched, replicated):
        y, dx, dparams, new = train_step(*batched, *replicated, axis_name=AXIS, **options)
        # Where JAX does not track what varies, each device has the gradient of its own loss.
        return y, dx, jax.lax.psum(dparams, AXIS), new

    def global_gradients(batched, replicated):
        y, dx, dparams, new = train_step(*batched, *replicated, axis_name=AXIS, **options)
        return y, dx, dparams, jax.tree.map(lambda v: v[None], new)

    if mode.startswith("shard_map"):
        checked = "un" not in mode
        function = jax.shard_map(
            global_gradients if checked else lambda *a: jax.tree.map(lambda v: v, unstacked(local_gradients(*a))),
            mesh=mesh(devices),
            in_specs=(P(AXIS), P()),
            out_specs=(P(AXIS), P(AXIS), P(), P(AXIS)),
            check_vma=checked,
        )
        return jax.jit(function)(batched, replicated)
    cut = jax.tree.map(lambda v: v.reshape(devices, -1, *v.shape[1:]), batched)
    if mode == "pmap":
        function = jax.pmap(local_gradients, axis_name=AXIS, in_axes=(0, None), devices=jax.devices()[:devices])
    else:
        function = jax.jit(jax.vmap(local_gradients, axis_name=AXIS, in_axes=(0, None)))
    y, dx, dparams, new = function(cut, replicated)
    joined = (v.reshape(-1, *v.shape[2:]) for v in (y, dx))
    return *joined, jax.tree.map(lambda v: v[0], dparams), new


def unstacked(result):
    *rest, new = result
    return *rest, jax.tree.map(lambda v: v[None], new)


def sharded_jit(spec, the_mesh, batched, replicated, **options):
    """`train_step` under jax.jit, with arrays that are sharded as `spec` says."""
    batched = jax.tree.map(lambda v: jax.device_put(v, jax.NamedSharding(the_mesh, P(*spec[: v.ndim]))), batched)
    return jax.jit(functools.partial(train_step, **options))(*batched, *replicated)


def draw(shape, *, mean=0.0, dtype=np.float32, seed=0, fraction=None, spread=0.0):
    """x, mask and weight (zero where the mask hides), and params and state."""
    rng = np.random.default_rng(seed)
    offsets = spread * rng.standard_normal((shape[0], *(1,) * (len(shape) - 2), shape[-1]))
    x = jnp.asarray(rng.normal(mean, 1, shape) + offsets, dtype)
    mask = None if fraction is None else jnp.asarray(rng.random(shape[:-1]) < fraction)
    weight = rng.standard_normal(shape) * (1 if mask is None else np.asarray(mask)[..., None])
    params = jaxbn.BatchNormParams(*(jnp.asarray(rng.normal(1, 0.5, shape[-1]), jnp.float32) for _ in range(2)))
    state = jaxbn.batch_norm_init(shape[-1])[1]
    return (x, mask, jnp.asarray(weight, dtype)), (params, state)


def assert_near(actual, expected, units=32):
    near.assert_near(actual, expected, units)


def assert_is_one_batch(result, batched, replicated, units=32):
    """y, gradients and state are the float64 oracle's for the whole batch, and all devices hold the same state."""
    x, mask, weight = batched
    params, _ = replicated
    full = None if mask is None else np.asarray(mask)[..., None]
    mean, var, count = oracle.moments(x, full)
    y, dx, dparams, states = result
    expected = oracle.train(x, *params, mask=full)
    valid = np.broadcast_to(True if full is None else full, x.shape)
    assert_near(np.where(valid, y, 0), np.where(valid, expected, 0), units)
    dy = np.asarray(weight).astype(np.float64) * np.cos(expected)
    assert_near((dx, *dparams), oracle.gradients(x, np.where(valid, dy, 0), params.scale, mask=full), 8 * units)
    unbiased = var * count / np.maximum(count - 1, 1)
    for k in range(len(states.mean)):
        own = jax.tree.map(lambda v, k=k: v[k], states)
        jax.tree.map(np.testing.assert_array_equal, own, jax.tree.map(lambda v: v[0], states))
    # eps * mean, which is what float32 can hold of it.
    np.testing.assert_allclose(own.mean, np.where(count > 0, 0.1 * mean, 0), rtol=4 * EPS, atol=4 * EPS)
    np.testing.assert_allclose(own.var, np.where(count > 1, 0.9 + 0.1 * unbiased, 1), rtol=16 * EPS)
    assert own.num_batches_tracked == int(count.any())


def check_empty_shards(mode, hidden):
    """With a mask of which the shards `hidden` get nothing."""
    (x, mask, weight), replicated = draw((16, 5, C), mean=10, fraction=0.5)
    # The shards named hold NaN alone, all of it masked: shards of size zero.
    empty = np.isin(np.arange(16) // 2, hidden)[:, None]
    mask = jnp.asarray(np.asarray(mask) & ~empty)
    x = jnp.where(empty[..., None], jnp.nan, x)
    weight = jnp.where(mask[..., None], weight, 0)
    result = run(mode, 8, (x, mask, weight), replicated)
    assert all(jnp.isfinite(v).all() for v in jax.tree.leaves(result))
    assert_is_one_batch(result, (jnp.where(empty[..., None], 0, x), mask, weight), replicated)


SPECS = [
    (("a",), ("a",), (8,)),
    ((None, None, None, "a"), ("a",), (8,)),
    (("a", None, None, "b"), ("a", "b"), (4, 2)),
    ((("a", "b"),), ("a", "b"), (4, 2)),
    (("a", "b"), ("a", "b"), (4, 2)),
]


def check_sharded_jit(number, explicit):
    """Sharded by the spec of that number, on a mesh of explicit axes or of others."""
    spec, names, sizes = SPECS[number]
    # Every pair with a way of sharding, and of the two others.
    fraction = None if (number + explicit) % 2 else 0.5
    batched, (params, state) = draw((16, 4, 3, 8), mean=100, fraction=fraction)
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    the_mesh = jax.make_mesh(sizes, names, axis_types=(kind,) * len(names))
    if explicit and len(spec) == 4:
        place = jax.NamedSharding(the_mesh, P(spec[3]))
        params, state = (jax.tree.map(lambda v: jax.device_put(v, place) if v.ndim else v, t) for t in (params, state))
    with jax.set_mesh(the_mesh):
        *result, new = sharded_jit(spec, the_mesh, batched, (params, state))
    result, new = jax.device_get((result, new))
    assert_is_one_batch((*result, jax.tree.map(lambda v: v[None], new)), batched, (params, state))
