"""A trained network, which tests of several modules spoil."""

import jax
import pytest
from diagnosis import LinenNet, X


@pytest.fixture(scope="module")
def variables():
    variables = LinenNet().init(jax.random.key(0), X)
    step = jax.jit(lambda v: LinenNet().apply(v, X, train=True, mutable=["batch_stats"])[1])
    for _ in range(12):
        variables = {**variables, **step(variables)}
    return variables
