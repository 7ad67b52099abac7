"""The program of each Linen layer, with gradients and in evaluation, stays small beside Flax's on every platform."""

import flax.linen as nn
import pytest
from versions import is_older

import jaxbn.linen
from benchmarks.implementations import NORMS
from benchmarks.program_size import BOTH, BRANCHES, EVAL, OPERATIONS, checkpoints, sizes, trace_layer


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", [BOTH, EVAL])
def test_layers(norm, kind):
    ours, flax = (trace_layer(module, norm, kind) for module in (jaxbn.linen, nn))
    # Flax's programs do not depend on the platform.
    operations = OPERATIONS[kind][norm] * sizes(flax)["cpu"].operations
    # There each sum over several axes is several operations.
    limits = {"cpu": 1.3 * operations if is_older("jax", "0.10.2") else operations}
    too_large = {
        p: s for p, s in sizes(ours).items() if s.operations > limits.get(p, operations) or s.branches > BRANCHES[kind]
    }
    assert not too_large, f"more than {operations:.0f} operations or {BRANCHES[kind]} branches"
    if (norm, kind) == ("batch", EVAL):
        assert checkpoints(ours) == 0
