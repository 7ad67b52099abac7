"""Rounding that changes what compilers do. docs/design.md and docs/platforms.md have the reasons."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._kernel.platforms import by_platform
from jaxbn._versions import HAS_SUMS_IN_TREES


def prevent_fma(v: jax.Array) -> jax.Array:
    """Rounds off the last bit of `v`, so that no compiler fuses the product behind it into a later sum.

    Differences from a pivot are exact only if all are taken from the same number. A fused multiply-add subtracts
    the unrounded product, and compilers may use one in one loop and none in another.
    """
    info = np.finfo(v.dtype)
    return jax.lax.reduce_precision(v, exponent_bits=info.nexp, mantissa_bits=info.nmant - 1)


def prevent_fma_by_arithmetic(v: jax.Array) -> jax.Array:
    """Rounds off the last bits of `v` by operations that XLA's CPU compiler takes into one kernel with sums.

    This is Veltkamp's splitting. The maximum keeps its product out of a fused multiply-add.
    """
    scaled = jax.lax.max(3 * v, jnp.full_like(v, np.finfo(v.dtype).min))
    return scaled - (scaled - v)


def rounded_copy(v: jax.Array) -> jax.Array:
    """Returns `v`, rounded to the precision that it has: to XLA's CPU compiler another value.

    The compiler materializes what two reductions share, even an array that was broadcast to the size of x, and fuses
    a separate copy into each.
    """
    info = np.finfo(v.dtype)
    return jax.lax.reduce_precision(v, exponent_bits=info.nexp, mantissa_bits=info.nmant)


def separate_copy(v: jax.Array) -> jax.Array:
    """Returns `rounded_copy(v)` on CPU, and `v` on other platforms."""
    return _separate_copy(v, axes=())[0]


def _same(v: jax.Array, *, axes: tuple[int, ...], options: None) -> tuple[jax.Array]:
    return (v,)


def _rounded(v: jax.Array, *, axes: tuple[int, ...], options: None) -> tuple[jax.Array]:
    return (rounded_copy(v),)


_separate_copy = by_platform({"default": _same, "cpu": _rounded})


def materialize(*arrays: jax.Array) -> list[jax.Array]:
    """Returns arrays of the size of the moments; on CPU they are computed before the loops over x, not in them.

    XLA's CPU compiler fuses cheap arithmetic on small arrays into each loop that uses it, but no division. This one
    is by 1, which the compiler cannot know: the last array is a variance, which may be NaN but not -1.
    """
    return list(_materialize(*arrays, axes=()))


def _as_they_are(*arrays: jax.Array, axes: tuple[int, ...], options: None) -> tuple[jax.Array, ...]:
    return arrays


def _divided(*arrays: jax.Array, axes: tuple[int, ...], options: None) -> tuple[jax.Array, ...]:
    one = jnp.where(arrays[-1] == -1, 2, 1).astype(arrays[-1].dtype)
    return tuple(v / one for v in arrays)


_materialize = by_platform({"default": _as_they_are, "cpu": _divided})


def sum_over(v: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns `jax.lax.reduce_sum(v, axes)`, which older versions of JAX add up less exactly on CPU."""
    if HAS_SUMS_IN_TREES or len(axes) < 2:
        return jax.lax.reduce_sum(v, axes)
    return _sum_over(v, axes=axes)[0]


def _at_once(v: jax.Array, *, axes: tuple[int, ...], options: None) -> tuple[jax.Array]:
    return (jax.lax.reduce_sum(v, axes),)


def sum_by_axes(v: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns a sum as one of sums along single axes."""
    for axis in sorted(axes, reverse=True):
        # Rounded, since the compiler would join one sum and the next.
        v = rounded_copy(jax.lax.reduce_sum(v, (axis,)))
    return v


def _by_axes(v: jax.Array, *, axes: tuple[int, ...], options: None) -> tuple[jax.Array]:
    return (sum_by_axes(v, axes),)


_sum_over = by_platform({"default": _at_once, "cpu": _by_axes})
