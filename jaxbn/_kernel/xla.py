"""Identity functions that change what compilers do and not what is computed. docs/design.md has the reasons."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np


def prevent_fma(v: jax.Array) -> jax.Array:
    """Rounds off the last bit of `v`, so that no compiler fuses the product behind it into a later sum.

    Differences from a pivot are exact only if all are taken from the same number. A fused multiply-add subtracts
    the unrounded product, and compilers may use one in one loop and none in another.
    """
    info = np.finfo(v.dtype)
    return jax.lax.reduce_precision(v, exponent_bits=info.nexp, mantissa_bits=info.nmant - 1)


def separate_copy(v: jax.Array, number: int) -> jax.Array:
    """Returns `v`; on CPU, as a value that the compiler does not identify with `v` or with copies of other numbers.

    XLA's CPU compiler materializes a value that was broadcast to the size of x if two reductions share it. A
    separate copy for each is fused into it. Rounding to the precision that `v` has makes a copy.
    """
    info = np.finfo(v.dtype)

    def rounded(v: jax.Array) -> jax.Array:
        for _ in range(number):
            v = jax.lax.reduce_precision(v, exponent_bits=info.nexp, mantissa_bits=info.nmant)
        return v

    return _on_cpu(rounded, v)


def materialize(v: jax.Array, var: jax.Array) -> jax.Array:
    """Returns `v`, an array of the size of the moments; on CPU it is computed once, before the loop over x.

    XLA's CPU compiler fuses cheap arithmetic of small arrays into the loop over x that uses them, which repeats it
    for each value. It does not do so with a division. This one is by 1, which the compiler cannot know: a variance
    may be NaN but not -1.
    """
    return _on_cpu(lambda v, var: v / jnp.where(var == -1, 2, 1).astype(v.dtype), v, var)


def _on_cpu(function: Callable[..., jax.Array], v: jax.Array, *others: jax.Array) -> jax.Array:
    """Returns `function(v, *others)` on CPU, and `v` on other platforms."""
    return cast(jax.Array, jax.lax.platform_dependent(v, *others, cpu=function, default=lambda v, *_: v))
