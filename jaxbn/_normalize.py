"""The kernel that every normalization of the library is: measure, centre, scale, shift."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._across import Across
from jaxbn._moments import Moments, centre, keep_only_moments, measure, prepare


@functools.partial(jax.jit, static_argnames=("reduced", "across", "eps", "dtype"), inline=True)
def normalize(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mask: jax.Array | None,
    *,
    reduced: tuple[int, ...],
    across: Across | None,
    eps: float,
    dtype: np.dtype,
) -> tuple[jax.Array, Moments]:
    """Returns `(x - mean) / sqrt(var + eps) * scale + bias` and the moments that it used.

    All arrays have the rank of `x`. Reverse mode keeps `x` in its own dtype and arrays of the size
    of the moments; everything else is computed again.
    """

    @keep_only_moments
    def kernel(x: jax.Array, scale: jax.Array | None, bias: jax.Array | None) -> tuple[jax.Array, Moments]:
        prepared = prepare(x, mask)
        m = measure(prepared, mask, reduced, across)
        return _scale_and_shift(prepared, m, scale, bias, eps, across).astype(dtype), m

    return kernel(x, scale, bias)


@functools.partial(jax.jit, static_argnames=("eps", "dtype"), inline=True)
def normalize_with(
    x: jax.Array,
    moments: Moments,
    scale: jax.Array | None,
    bias: jax.Array | None,
    mask: jax.Array | None,
    *,
    eps: float,
    dtype: np.dtype,
) -> jax.Array:
    """`normalize` with moments that are given, which carry no gradient."""

    @keep_only_moments
    def kernel(x: jax.Array, scale: jax.Array | None, bias: jax.Array | None) -> jax.Array:
        return _scale_and_shift(prepare(x, mask), moments, scale, bias, eps, None).astype(dtype)

    moments = jax.lax.stop_gradient(moments)
    return kernel(x, scale, bias)


def _scale_and_shift(
    x: jax.Array, m: Moments, scale: jax.Array | None, bias: jax.Array | None, eps: float, across: Across | None
) -> jax.Array:
    v = m.var + eps
    # With eps=0 a constant channel has v = 0; there x - mean is 0 too, and any finite factor will do.
    # 1 / sqrt(v) and not rsqrt(v), whose derivative's v**-1.5 underflows long before v**-1 does.
    factor = jnp.where(v == 0, 0, 1 / jnp.sqrt(jnp.where(v == 0, 1, v)))
    if scale is not None:
        factor = factor * scale.astype(x.dtype)
    # The derivative with respect to the mean goes through the shift and not through x - mean. The
    # value is the same, and so is every derivative, but transposed it needs the sums of dy and of
    # dy * (x - mean) alone, which the gradients of scale and bias need anyway.
    fixed = jax.lax.stop_gradient(m)
    shift = -factor * (m.mean - fixed.mean)
    if bias is not None:
        shift = shift + bias.astype(x.dtype)
    if across is not None:
        factor, shift = across.spread(factor, shift)
    return centre(x, fixed) * factor + shift
