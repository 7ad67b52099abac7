"""Explicit mesh axes: what types cannot say is left to the compiler, and values are those of one device."""

import functools

import jax
import jax.numpy as jnp
import pytest
from costs import collectives
from parallel import AXIS, P, assert_near, draw, sharded_jit
from versions import needs
from virtual_batches import assert_is, by_hand

import jaxbn

pytestmark = pytest.mark.slow


def explicit(sizes=(8,), names=(AXIS,)):
    return jax.make_mesh(sizes, names, axis_types=(jax.sharding.AxisType.Explicit,) * len(sizes))


# Two examples on each device: a divisor and a multiple of that, and numbers that leave parts on half a device.
@pytest.mark.parametrize("size", [2, 4, 3, 5])
def test_virtual_batches(size):
    batched, replicated = draw((16, 3, 3), spread=2, fraction=0.8 if size == 4 else None)
    with jax.set_mesh(explicit()):
        y, dx, dparams, new = sharded_jit((AXIS,), explicit(), batched, replicated, virtual_batch_size=size)
    assert y.sharding.spec == dx.sharding.spec == P(AXIS, None, None)
    assert all(v.sharding.is_fully_replicated for v in (*dparams, *new[:2]))
    assert_is(jax.device_get((y, dx, dparams, new)), by_hand(batched, replicated[0], size))


@pytest.mark.parametrize("spec", [("a", None, "b"), ("a", "b"), (("a", "b"),)], ids=str)
def test_virtual_batches_on_several_axes(spec):
    batched, replicated = draw((16, 2, 4), spread=2)
    the_mesh = explicit((4, 2), ("a", "b"))
    with jax.set_mesh(the_mesh):
        result = sharded_jit(spec, the_mesh, batched, replicated, virtual_batch_size=5)
    assert result[0].sharding.spec == P(*spec, *(None,) * (3 - len(spec)))
    assert_is(jax.device_get(result), by_hand(batched, replicated[0], 5))


@needs("results on fewer devices than x, outside of jax.jit", jax="0.10.2")
def test_virtual_batches_of_batch_renormalization():
    (x, _, _), (params, state) = draw((16, 3))

    def norm(x):
        return jaxbn.batch_renorm_train(x, params, state, r_max=3.0, d_max=jnp.float32(5), virtual_batch_size=4)

    with jax.set_mesh(explicit()):
        result = norm(jax.device_put(x, P(AXIS)))
    assert_near(jax.device_get(result), norm(x))


@pytest.mark.parametrize("size", [2, 4])
def test_virtual_batches_on_whole_devices_exchange_moments_alone(size):
    x = jax.device_put(draw((16, 5, 3))[0][0], jax.NamedSharding(explicit(), P(AXIS)))
    _, state = jaxbn.batch_norm_init(3)
    _, largest = collectives(lambda x: jaxbn.batch_norm_train(x, None, state, virtual_batch_size=size), x)
    assert largest <= 16 // size * 3


# Of 24 channels, on four devices: groups within a device, and over two devices, over all, and over parts of some.
@pytest.mark.parametrize("num_groups", [8, 2, 1, 3])
def test_group_norm_with_sharded_channels(num_groups):
    # Without positions groups are cut differently.
    shape = (4, 24) if num_groups == 2 else (4, 5, 24)
    (x, mask, weight), (params, _) = draw(shape, mean=3, fraction=0.8)
    the_mesh = explicit((2, 4), ("a", "b"))

    def step(x, params, mask, weight):
        def loss(x, params):
            y = jaxbn.group_norm(x, params, num_groups, mask=mask)
            return jnp.sum(weight * jnp.sin(y)), y

        return jax.grad(loss, (0, 1), has_aux=True)(x, params)

    def place(tree, *spec):
        return jax.tree.map(lambda v: jax.device_put(v, jax.NamedSharding(the_mesh, P(*spec))), tree)

    spec = ("a", *(None,) * (len(shape) - 2), "b")
    with jax.set_mesh(the_mesh):
        gradients, y = jax.jit(step)(place(x, *spec), place(params, "b"), place(mask, "a"), place(weight, *spec))
    assert y.sharding.spec == gradients[0].sharding.spec == P(*spec)
    assert gradients[1].scale.sharding.spec == P("b")
    assert_near(jax.device_get((gradients, y)), step(x, params, mask, weight), 64)


def test_groups_within_a_device_need_no_collective():
    x = draw((4, 5, 24))[0][0]
    x = jax.device_put(x, jax.NamedSharding(explicit((2, 4), ("a", "b")), P("a", None, "b")))
    norm = functools.partial(jaxbn.group_norm, params=None)
    assert collectives(lambda x: norm(x, num_groups=8), x)[1] <= 1


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("sharded", ["scale", "state", "both", "x"])
def test_channels_that_are_sharded_in_some_arguments_only(sharded, jitted):
    """What is not sharded is not on the mesh, or replicated there; the state stays as it is on the mesh."""
    (x, _, _), (params, state) = draw((16, 8), mean=3)
    train = jax.jit(jaxbn.batch_norm_train) if jitted else jaxbn.batch_norm_train
    expected = train(x, params, state)

    def place(tree, spec):
        return jax.tree.map(lambda v: jax.device_put(v, jax.NamedSharding(explicit(), spec if v.ndim else P())), tree)

    for others in (lambda tree: tree, lambda tree: place(tree, P())):
        arguments = others((x, params, state))
        if sharded == "x":
            arguments = (place(x, P(None, AXIS)), *arguments[1:])
        if sharded in ("scale", "both"):
            arguments = (arguments[0], place(params, P(AXIS)), arguments[2])
        if sharded in ("state", "both"):
            arguments = (*arguments[:2], place(state, P(AXIS)))
        result = train(*arguments)
        assert_near(jax.device_get(result), expected)
        y, _ = jaxbn.batch_norm_eval(*arguments[:2], result[1])
        assert_near(jax.device_get(y), jaxbn.batch_norm_eval(x, params, expected[1])[0])
        before, after = jax.typeof(arguments[2].mean).sharding, jax.typeof(result[1].mean).sharding
        assert before.mesh.empty or after == before
