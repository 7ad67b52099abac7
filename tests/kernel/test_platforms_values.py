"""What is compiled for GPUs and TPUs: values, derivatives, masks and devices, without the compiler's optimization."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family import NORMS, check_derivatives, check_empty_batch, check_masks, check_values
from lowering import each_platform  # noqa: F401
from parallel import assert_is_one_batch, check_empty_shards, check_sharded_jit, draw, run
from versions import enable_x64

import jaxbn

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["batch", "layer", "rms", "group", "instance"])
def test_values_masks_and_derivatives(name):
    check_values(name)
    check_masks(name, "without features")
    with enable_x64(True):
        check_derivatives(name, True)


@pytest.mark.parametrize("mode", ["shard_map", "vmap"])
def test_devices(mode):
    drawn = draw((16, 5, 3), mean=1e4, spread=10.0)
    assert_is_one_batch(run(mode, 8, *drawn), *drawn)
    check_empty_shards(mode, [0, 3, 7])


def test_nothing():
    params, state = jaxbn.batch_norm_init(2)
    _, new = jaxbn.batch_norm_train(jnp.zeros((3, 0, 2)), params, state)
    jax.tree.map(np.testing.assert_array_equal, new, state)
    for norm in ("batch", "layer", "instance"):
        check_empty_batch(NORMS[norm])


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_sharded_batches(explicit):
    for number in (0, 3, 4):
        check_sharded_jit(number, explicit)
