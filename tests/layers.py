"""What the tests of the Linen and the NNX layer share."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

# Options that change numbers; scale and bias are random, so that leaving one out shows.
OPTIONS = [
    dict(options, scale_init=jax.nn.initializers.normal(1.0), bias_init=jax.nn.initializers.normal(1.0))
    for options in ({}, {"use_bias": False}, {"use_scale": False}, {"axis": 1}, {"momentum": 0.5, "epsilon": 0.1})
]

# Feature axis and shape of a mask for x with shape (6, 5, 3). Flax broadcasts masks as NumPy does: from
# the right, whatever their rank. None of them hides a channel: that is NaN in Flax.
MASKS = [(-1, (6, 5, 3)), (-1, (6, 5, 1)), (-1, (6, 1, 1)), (-1, (5, 3)), (-1, (5, 1)), (1, (6, 5, 3)), (1, (6, 1, 3))]

# Dtypes of x, of the result, and of the parameters.
DTYPES = list(
    itertools.product(
        (jnp.float32, jnp.bfloat16, jnp.float16),
        (None, jnp.float32, jnp.bfloat16, jnp.float16),
        (jnp.float32, jnp.bfloat16),
    )
)


def batches(steps=4, shape=(6, 5, 3)):
    """`steps` different batches, each channel with its own mean and spread."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((steps, *shape)) * rng.uniform(0.5, 3, shape[-2:]) + rng.uniform(-3, 3, shape[-2:])
    return jnp.asarray(x, jnp.float32)


def mask_of(shape, dtype=bool):
    return jnp.asarray(np.random.default_rng(1).random(shape) < 0.7, dtype)


def assert_close(actual, expected, ulps=4):
    """Same tree, shapes, dtypes, and values: up to `ulps` times the precision of the largest, in half precision 1."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, value), other in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path)
        assert (value.shape, value.dtype) == (other.shape, other.dtype), name
        eps = float(jnp.finfo(value.dtype).eps) if jnp.issubdtype(value.dtype, jnp.floating) else 0
        factor = ulps if value.dtype == jnp.float32 else min(ulps, 1)
        value, other = (np.asarray(v).astype(np.float64) for v in (value, other))
        atol = factor * eps * np.max(np.abs(other), initial=0)
        np.testing.assert_allclose(value, other, rtol=0, atol=atol, err_msg=name)
