"""Values that are the same to us, and not to a compiler. docs/design.md says what for."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np


def settle(v: jax.Array) -> jax.Array:
    """Rounds off the last bit, which keeps compilers from fusing the product behind `v` into a later sum.

    Differences from a pivot are exact only if every one of them is taken from the same number; a
    fused multiply-add, or one in one loop and none in another, would take some from an unrounded one.
    """
    info = np.finfo(v.dtype)
    return jax.lax.reduce_precision(v, exponent_bits=info.nexp, mantissa_bits=info.nmant - 1)


def unshared(v: jax.Array, number: int) -> jax.Array:
    """`v`, as a value that compilers take for another one than `v` and those with other numbers.

    XLA's CPU compiler writes what it has broadcast to the size of x to memory if more than one sum uses it,
    and reads it back for each. Rounding to the precision that `v` has changes nothing but that.
    """
    info = np.finfo(v.dtype)

    def rounded(v: jax.Array) -> jax.Array:
        for _ in range(number):
            v = jax.lax.reduce_precision(v, exponent_bits=info.nexp, mantissa_bits=info.nmant)
        return v

    return _on_cpu(rounded, v)


def once(v: jax.Array, var: jax.Array) -> jax.Array:
    """`v`, an array of the size of the moments, as one that is computed once, and not again for each value of x.

    XLA's CPU compiler moves cheap arithmetic of small arrays into the loop over x that uses them, but not a
    division. This one is by 1, which it cannot know: no variance is -1, and NaN is not either.
    """
    return _on_cpu(lambda v, var: v / jnp.where(var == -1, 2, 1).astype(v.dtype), v, var)


def _on_cpu(function: Callable[..., jax.Array], v: jax.Array, *others: jax.Array) -> jax.Array:
    """`function(v, *others)` there, and `v` elsewhere."""
    return cast(jax.Array, jax.lax.platform_dependent(v, *others, cpu=function, default=lambda v, *_: v))
