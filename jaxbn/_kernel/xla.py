"""Rounding that no compiler undoes. docs/design.md has the reasons."""

from __future__ import annotations

import jax
import numpy as np


def prevent_fma(v: jax.Array) -> jax.Array:
    """Rounds off the last bit of `v`, so that no compiler fuses the product behind it into a later sum.

    Differences from a pivot are exact only if all are taken from the same number. A fused multiply-add subtracts
    the unrounded product, and compilers may use one in one loop and none in another.
    """
    info = np.finfo(v.dtype)
    return jax.lax.reduce_precision(v, exponent_bits=info.nexp, mantissa_bits=info.nmant - 1)
