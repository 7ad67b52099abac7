"""What is compiled for GPUs and TPUs: values, derivatives, masks and devices, without the compiler's optimization."""

import family
import pytest
import test_degenerate
import test_family
import test_sync
from lowering import each_platform  # noqa: F401
from versions import enable_x64

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["batch", "layer", "rms", "group", "instance"])
def test_values_masks_and_derivatives(name):
    test_family.test_values(name)
    test_family.test_masks(name, "without features")
    with enable_x64(True):
        test_family.test_derivatives(name, True, None)


@pytest.mark.parametrize("mode", ["shard_map", "vmap"])
def test_devices(mode):
    test_sync.test_unmasked(mode, 1e4, 10.0)
    test_sync.test_unequal_masks_and_empty_shards(mode, [0, 3, 7])


def test_nothing():
    test_degenerate.test_an_empty_spatial_axis_is_an_empty_batch()
    for norm in ("batch", "layer", "instance"):
        test_family.test_an_empty_batch(family.NORMS[norm])


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_sharded_batches(explicit):
    for number in (0, 3, 4):
        test_sync.test_sharded_jit(number, explicit)
