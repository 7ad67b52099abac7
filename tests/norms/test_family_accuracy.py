"""Every norm is as exact as its input, in programs compiled as users' are."""

import jax
import numpy as np
import pytest
from family import draw, float64, norms_that
from near import EPS32

pytestmark = pytest.mark.optimized


# Far from the running mean the difference is clipped, and y is that of batch norm.
@pytest.mark.slow
@norms_that(lambda name, norm: not norm.renorm)
def test_exact_at_any_mean(norm):
    shape = tuple(n * (8 if a in norm.reduced else 2) for a, n in enumerate(norm.shape))
    call = jax.jit(norm)
    for mean in (0, 1e2, 1e4, 1e6):
        x = draw(norm, mean=mean, shape=shape)[0]
        y, expected = call(x, None), norm.formula(*float64(x))
        assert np.abs(float64(y)[0] - expected).max() <= 4 * EPS32 * np.abs(expected).max(), mean
