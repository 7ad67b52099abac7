"""How many examples share a statistic does not depend on how many devices there are."""

import functools

import jax
import jax.numpy as jnp
import pytest
from marks import grid
from parallel import AXIS, MODES, C, assert_near, draw, mesh, run, sharded_jit, train_step
from virtual_batches import assert_is, by_hand

import jaxbn


@pytest.mark.parametrize(
    ("size", "fraction"), [(2, None), (4, 0.7), (5, None), (7, 0.7), (15, 0.7), (16, None), (100, 0.7)]
)
def test_one_device(size, fraction):
    batched, (params, state) = draw((16, 5, C), mean=10, spread=2, fraction=fraction)
    step = jax.jit(functools.partial(train_step, virtual_batch_size=size))
    assert_is(step(*batched, params, state), by_hand(batched, params, size))


# Every pair of a mode, a number of devices and a size.
PAIRS = [(mode, 2**d, (2, 4, 8, 32)[(m + d) % 4]) for m, mode in enumerate(MODES) for d in range(4)]


@grid(("mode", "devices", "size"), PAIRS, quick=lambda case: case == ("shard_map", 4, 8))
def test_any_number_of_devices(mode, devices, size):
    batched, replicated = draw((16, 3, C), mean=10, spread=2, fraction=0.8)
    y, dx, dparams, states = run(mode, devices, batched, replicated, virtual_batch_size=size)
    expected = by_hand(batched, replicated[0], size)
    for k in range(devices):
        assert_is((y, dx, dparams, jax.tree.map(lambda v, k=k: v[k], states)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_the_last_group_of_devices_may_be_smaller(mode):
    batched, replicated = draw((16, 3, C), spread=2)
    y, dx, dparams, states = run(mode, 8, batched, replicated, virtual_batch_size=6)
    expected = by_hand(batched, replicated[0], 6)
    assert_is((y, dx, dparams, jax.tree.map(lambda v: v[-1], states)), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("examples", "devices", "size"), [(16, 2, 2), (16, 8, 4), (16, 2, 5), (24, 8, 7), (16, 8, 8)])
def test_sharded_jit(examples, devices, size):
    batched, replicated = draw((examples, 3, C), spread=2, fraction=0.8 if size == 7 else None)
    result = sharded_jit((AXIS,), mesh(devices), batched, replicated, virtual_batch_size=size)
    assert_is(result, by_hand(batched, replicated[0], size))


@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_examples_are_on_the_first_axis_that_is_not_a_feature_axis(axis):
    batched, (params, state) = draw((6, 5, C))
    x = jnp.moveaxis(batched[0], -1, axis)
    y, new = jaxbn.batch_norm_train(x, params, state, axis=axis, virtual_batch_size=4)
    expected = by_hand(batched, params, 4)
    assert_near((jnp.moveaxis(y, axis, -1), tuple(new[:2])), (expected[0], expected[3]))


def test_a_part_without_a_valid_value_does_not_count():
    (x, _, _), (params, state) = draw((8, 5, C))
    mask = jnp.broadcast_to(jnp.arange(8)[:, None] < 4, (8, 5))
    _, new = jaxbn.batch_norm_train(x, params, state, mask=mask, virtual_batch_size=4)
    assert_near(new, jaxbn.batch_norm_train(x[:4], params, state)[1])


def test_evaluation_knows_no_virtual_batches():
    (x, _, _), (params, state) = draw((8, 5, C))
    with pytest.raises(TypeError, match="virtual_batch_size"):
        jaxbn.batch_norm_eval(x, params, state, virtual_batch_size=2)


def test_errors():
    (x, _, _), (params, state) = draw((8, C))

    def message(devices=None, **options):
        def call(x, **more):
            return jaxbn.batch_norm_train(x, params, state, **options, **more)

        batch = x
        if devices:
            batch = x.reshape(devices, -1, C)
            call = jax.vmap(functools.partial(call, axis_name=AXIS), axis_name=AXIS)
        with pytest.raises(ValueError, match="expected") as caught:
            call(batch)
        return str(caught.value)

    expected = "virtual_batch_size: expected a number of examples, at least 1, got {}"
    assert message(virtual_batch_size=0) == expected.format(0)
    assert message(virtual_batch_size=2.5) == expected.format(2.5)
    assert message(2, virtual_batch_size=3) == (
        "virtual_batch_size: expected a divisor or a multiple of the 4 examples on each of 2 devices, got 3, "
        "of which some would be on part of a device; change it or the batch size"
    )
    assert message(4, virtual_batch_size=2, axis_index_groups=[[0, 1], [2, 3]]) == (
        "virtual_batch_size: expected None with axis_index_groups, which says who shares a statistic already, got 2"
    )
    # One value in a whole virtual batch, in the last one, and in all of them on several devices.
    for size, shape, which, devices in (
        (1, (8, C), "each", None),
        (7, (8, C), "the last", None),
        (1, (1, C), "each", 8),
    ):
        assert message(devices, virtual_batch_size=size) == (
            f"virtual_batch_size: expected virtual batches with more than 1 value per channel, got {size} for x with "
            f"shape {shape}, of which {which} one has 1 value for each of {C} channels, whose normalized value would "
            "always be 0; change it or the batch size"
        )
