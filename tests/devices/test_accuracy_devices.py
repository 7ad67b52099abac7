"""Statistics over devices are as exact as those of one, on any number of them, and the same numbers on all.

Members of a `jax.vmap` with an axis name stand for devices.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from accuracy import EPS, noise, worst
from parallel import AXIS, P, mesh
from versions import EXACT_SUMS

import jaxbn
from jaxbn._kernel import group_sums
from jaxbn._kernel.devices import DeviceGroups

pytestmark = pytest.mark.optimized

C = 4
ROWS = 8192
TINY = float(np.finfo(np.float32).tiny)
UNEQUAL = ((0,), (1, 2, 3), (4, 5, 6, 7))
POWERS = ((0,), (1,), (2, 3), (4, 5, 6, 7))
GROUPS = [
    ((0, 1), (2, 3), (4, 5), (6, 7)),
    ((0, 2, 4, 6), (7, 5, 3, 1)),
    UNEQUAL,
    POWERS,
    ((0, 6, 1, 2, 5, 3, 4), (7,)),
]


@functools.partial(jax.jit, static_argnames=("members", "eps"))
def train(x, mask=None, *, members, eps=1e-5):
    """y of the batch, and the state of each member."""
    cut = jax.tree.map(lambda v: v.reshape(members, -1, *v.shape[1:]), (x, mask))
    _, state = jaxbn.batch_norm_init(x.shape[-1])

    def norm(x, mask):
        return jaxbn.batch_norm_train(x, None, state, momentum=1.0, eps=eps, mask=mask, axis_name=AXIS)

    y, states = jax.vmap(norm, axis_name=AXIS)(*cut)
    return y.reshape(x.shape), states


def check(x, members, mask=None, eps=1e-5):
    x = x.astype(np.float32)
    valid = np.ones(len(x), bool) if mask is None else mask
    y, states = train(x, mask, members=members, eps=eps)
    assert worst(np.asarray(y)[valid], oracle.train(x[valid], eps=eps)) <= 4
    for name in ("mean", "var"):
        own = np.asarray(getattr(states, name))
        np.testing.assert_array_equal(own, np.broadcast_to(own[0], own.shape))
    mean, var, n = oracle.moments(x[valid])
    assert (np.abs(states.mean[0] - mean) <= EPS * (np.abs(mean) + np.sqrt(var))).all()
    assert (np.abs(states.var[0] - var * n / (n - 1)) <= 8 * EPS * var + TINY).all()


@pytest.mark.parametrize("members", [1, 2, 16, 256])
def test_offsets(members):
    x = noise((ROWS, C))
    for mean in (0, 1, 50, 1e2, 1e3, 1e4, 1e5, 1e6):
        check(mean + x, members)
        # Each member has a mean of its own.
        check(mean + x + np.repeat(10 * noise((members, C), 1), ROWS // members, 0), members)


@pytest.mark.parametrize("members", [2, 16, 256])
@EXACT_SUMS
def test_one_member_is_far_from_the_others(members):
    own = np.zeros((members, 1))
    own[members // 2] = 1
    own = np.repeat(own, ROWS // members, 0)
    for mean in (0, 1e3, 1e6):
        for distance in (-1e3, 1e6, 1e8):
            check(mean + noise((ROWS, C)) + distance * own, members)


@pytest.mark.parametrize("members", [2, 16, 256])
@pytest.mark.parametrize("values", [0, 1])
def test_a_member_with_one_value_or_none(members, values):
    size = ROWS // members
    mask = np.random.default_rng(1).random(ROWS) < 0.5
    mask[:size] = np.arange(size) < values
    for mean in (0, 1e4, 1e6):
        x = mean + noise((ROWS, C))
        x[:size] += 100 * values
        # What is masked has no effect, whatever it is.
        x[:size][~mask[:size]] = np.nan
        check(x, members, mask)


@pytest.mark.parametrize("members", [16, 256])
def test_constants(members):
    for value in (0, 1.1, 1e6 + 0.3, 1e15):
        check(np.full((ROWS, C), value), members)


@pytest.mark.parametrize("members", [1, 16, 256])
def test_squares_overflow_by_their_size_and_not_by_their_number(members):
    # One device can add the squares of its values; those of all are beyond float32's range.
    greatest = float(np.finfo(np.float32).max)
    size = np.sqrt(greatest / max(ROWS // members, members)) / 2
    x = size * np.random.default_rng(0).uniform(-1, 1, (ROWS, C))
    assert members == 1 or (np.square(x).sum(0) > greatest).all()
    check(x, members)


@pytest.mark.parametrize("members", [16, 256])
def test_squares_underflow_no_earlier_than_on_one_device(members):
    # The square of each is within float32's range, if only just. With JAX 0.12 it has to be after scaling, too, since
    # XLA scales squares before it adds them up.
    value = 2e-19 if jax.__version_info__ < (0, 12) else 2e-18
    check(np.tile([[value], [-value]], (ROWS // 2, C)), members, eps=0.0)


@pytest.mark.parametrize("mean", [0, 1e3, 1e6])
@pytest.mark.parametrize("members", [2, 16])
def test_layer_and_group_norm_with_channels_on_several_devices(members, mean):
    x = (mean + noise((3, 5, 64))).astype(np.float32)
    cut = jnp.stack(jnp.split(jnp.asarray(x), members, -1))

    def rows(v):
        return np.moveaxis(np.asarray(v), -1, 0)

    norm = functools.partial(jaxbn.layer_norm, params=None, axis_name=AXIS)
    y = np.concatenate(jax.jit(jax.vmap(norm, axis_name=AXIS))(cut), -1)
    assert worst(rows(y).reshape(64, -1), oracle.train(rows(x).reshape(64, -1))) <= 4

    # Each group has two channels of each device.
    number = 32 // members
    norm = functools.partial(jaxbn.group_norm, params=None, num_groups=number, axis_name=AXIS)
    y = np.asarray(jax.jit(jax.vmap(norm, axis_name=AXIS))(cut))

    def by_group(v):
        parts = np.asarray(v).reshape(members, 3, 5, number, -1)
        return parts.transpose(0, 2, 4, 1, 3).reshape(-1, 3 * number)

    assert worst(by_group(y), oracle.train(by_group(cut))) <= 4


# Groups on devices.


def group_sum(v, groups):
    return DeviceGroups((AXIS,), groups).sum([v])[0]


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("form", ["default", "tpu"])
def test_sums_of_groups_are_the_same_numbers_on_all_of_their_devices(form, check_vma):
    """In each platform's form, with values whose sum depends on the order."""
    x = 10.0 ** np.random.default_rng(0).uniform(-4, 4, (8, 5))
    # NaN stays in its group.
    x[7, 4] = np.nan

    def sums(v):
        if form == "tpu":
            return [group_sums._sum_in_pairs(v, (AXIS,), groups)[0] for groups in GROUPS]
        return [group_sum(v, groups) for groups in GROUPS]

    mapped = jax.shard_map(sums, mesh=mesh(8), in_specs=P(AXIS), out_specs=P(AXIS), check_vma=check_vma)
    for groups, total in zip(GROUPS, jax.device_get(jax.jit(mapped)(x.astype(np.float32))), strict=True):
        for group in map(list, groups):
            np.testing.assert_array_equal(total[group], np.broadcast_to(total[group[0]], (len(group), 5)))
            np.testing.assert_allclose(total[group[0]], x[group].sum(0), rtol=8 * EPS)


def test_the_sum_of_a_group_is_its_own_transpose():
    x = jnp.asarray(noise((8, C)), jnp.float32)
    ct = jnp.roll(x, 3)
    batch = P(AXIS)

    def pull(x, ct):
        _, back = jax.vjp(lambda v: group_sum(v, UNEQUAL), x)
        return back(ct)[0], jax.jvp(lambda v: group_sum(v, UNEQUAL), (x,), (ct,))[1], group_sum(ct, UNEQUAL)

    back, forward, expected = jax.jit(jax.shard_map(pull, mesh=mesh(8), in_specs=(batch, batch), out_specs=batch))(
        x, ct
    )
    np.testing.assert_array_equal(back, expected)
    np.testing.assert_array_equal(forward, expected)
    mapped = jax.shard_map(jax.vmap(lambda v: group_sum(v, UNEQUAL)), mesh=mesh(8), in_specs=batch, out_specs=batch)
    np.testing.assert_array_equal(mapped(ct), expected)
