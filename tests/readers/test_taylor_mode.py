"""`jax.experimental.jet` runs evaluation, which consists of JAX's operations alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import jet

import jaxbn

C = 4
AFFINE, STATE = jaxbn.batch_norm_init(C)
X, V = (jax.random.normal(jax.random.key(k), (3, C)) for k in (0, 1))


@pytest.mark.parametrize("mask", [None, jnp.array([True, False, True])], ids=["all", "masked"])
def test_evaluation(mask):
    def call(x):
        return jnp.sin(jaxbn.batch_norm_eval(jnp.sin(x), AFFINE, STATE, mask=mask)[0])

    def jvp(f):
        return lambda x: jax.jvp(f, (x,), (V,))[1]

    y, (first, second) = jet.jet(jax.jit(call), (X,), ((V, jnp.zeros_like(V)),))
    np.testing.assert_allclose(y, call(X), rtol=1e-5)
    np.testing.assert_allclose(first, jvp(call)(X), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(second, jvp(jvp(call))(X), rtol=1e-4, atol=1e-5)


def test_the_limit_is_that_of_custom_derivatives():
    """jax#30352. If JAX lifts it, docs/design.md has one limit less."""
    for function in (jax.nn.relu, lambda x: jaxbn.layer_norm(x, AFFINE)):
        with pytest.raises(Exception, match=r"unexpected tracer|has no attribute 'process_primitive'"):
            jet.jet(function, (X,), ((V, jnp.zeros_like(V)),))
