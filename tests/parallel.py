"""One training step on several devices, in each of JAX's ways of running in parallel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxbn

AXIS = "devices"
MODES = ["shard_map", "shard_map unchecked", "pmap", "vmap"]
P = jax.P


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
