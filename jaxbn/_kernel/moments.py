"""Moments (mean, variance and count), and how those of several sets merge."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._kernel.xla import prevent_fma
from jaxbn._serialized import serializable

# The mean, its rounding error (mean_lo), and the variance.
MeanAndVariance = tuple[jax.Array, jax.Array, jax.Array]


@serializable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and variance of a set of values, and the number of values.

    The moments of any two sets merge into those of their union (Chan, Golub & LeVeque 1979). So the same class
    describes part of a batch, the batch of a device, a virtual batch and a whole data set.

    Attributes:
      mean: the mean, rounded; float32 or float64, shape [C].
      var: the biased variance, `sum((x - mean)**2) / count`; shape [C].
      count: the number of values per channel, or the sum of their weights; floating point, shape [C]. One number for
        all channels may have the shape []; for moments of several sets, [sets, C], counts may be [sets].
      mean_lo: the rounding error of `mean`: the unevaluated sum `mean + mean_lo` has about twice the
        precision, which data with a mean far from zero need; shape [C].

    Example:
      >>> import jax.numpy as jnp, jaxbn
      >>> x = jnp.arange(12.0).reshape(6, 2)
      >>> whole = jaxbn.moments(x)
      >>> parts = jaxbn.moments(x[:1]).merge(jaxbn.moments(x[1:]))
      >>> whole.mean.tolist(), parts.mean.tolist(), parts.count.tolist()
      ([5.0, 6.0], [5.0, 6.0], [6.0, 6.0])
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array
    mean_lo: jax.Array | float = 0.0

    def merge(self, *others: Moments) -> Moments:
        """Returns the moments of the union of disjoint sets: these values and those of `others`.

        Formula: with weights `w_i = count_i / sum(count)`, `mean = sum(w_i * mean_i)` and
        `var = sum(w_i * (var_i + (mean_i - mean)**2))`. A set of no values changes nothing.

        Raises:
          ValueError: the shapes differ.
          TypeError: one of `others` is not a `Moments`.

        Source: Chan, Golub & LeVeque (1979), Updating formulae and a pairwise algorithm for
        computing sample variances.

        Example:
          >>> import jax.numpy as jnp, jaxbn
          >>> a, b = jaxbn.moments(jnp.zeros((1, 1))), jaxbn.moments(jnp.ones((3, 1)))
          >>> a.merge(b).mean.tolist(), a.merge(b).var.tolist()
          ([0.75], [0.1875])
        """
        for other in others:
            if not isinstance(other, Moments):
                raise TypeError(f"merge: expected jaxbn.Moments, got {type(other).__name__}")
            if jnp.shape(other.mean) != jnp.shape(self.mean):
                raise ValueError(
                    f"merge: expected moments of shape {jnp.shape(self.mean)}, got {jnp.shape(other.mean)}; "
                    "only sets with the same channels have a union"
                )
        parts = [broadcast_fields(m) for m in (self, *others)]
        stacked: Moments = jax.tree.map(lambda *fields: jnp.stack(fields), *parts)
        return stacked.merge_axis(0)

    def merge_axis(self, axis: int = 0) -> Moments:
        """Returns the moments of the union of the sets stacked along `axis`; see `merge`.

        For moments that `jax.vmap`, `jax.lax.scan` or an all-gather stacked.

        Example:
          >>> import jax, jax.numpy as jnp, jaxbn
          >>> x = jnp.arange(12.0).reshape(3, 2, 2)
          >>> jax.vmap(jaxbn.moments)(x).merge_axis(0).mean.tolist()
          [5.0, 6.0]
        """
        parts = broadcast_fields(self)
        total = jnp.sum(parts.count, axis, keepdims=True)
        # Counts may be weights, whose sum is less than 1.
        weight = parts.count / jnp.where(total > 0, total, 1)

        def average(v: jax.Array) -> jax.Array:
            return jnp.sum(weight * jnp.where(parts.count > 0, v, 0), axis, keepdims=True)

        pivot = prevent_fma(average(parts.mean))
        shift = (parts.mean - pivot) + parts.mean_lo
        mean, mean_lo, var = from_differences(pivot, average(shift), average(parts.var + shift * shift))
        return Moments(mean, var, total, mean_lo).squeeze(axis)

    def squeeze(self, axis: int | tuple[int, ...]) -> Moments:
        """Returns the moments without `axis`, or several axes, of size 1."""
        return broadcast_fields(self).map(lambda v: jnp.squeeze(v, axis))

    def map(self, function: Callable[[jax.Array], jax.Array]) -> Moments:
        """Returns moments with `function` applied to each field."""
        return cast(Moments, jax.tree.map(function, self))


def broadcast_fields(m: Moments) -> Moments:
    """Returns moments whose fields all have the shape and dtype of the mean, or raises."""
    mean = jnp.asarray(m.mean)

    def expand(name: str, value: jax.Array | float) -> jax.Array:
        # Converted by NumPy, since JAX has no integers beyond 32 bits.
        array = jnp.asarray(value if isinstance(value, jax.Array) else np.asarray(value, mean.dtype)).astype(mean.dtype)
        shape = array.shape
        # One number for each of several sets, which is what jax.vmap and jax.lax.scan make of one number.
        if shape == mean.shape[: len(shape)]:
            array = array.reshape(*shape, *(1,) * (mean.ndim - len(shape)))
        if array.ndim != mean.ndim or any(n not in (1, m) for n, m in zip(array.shape, mean.shape, strict=True)):
            raise ValueError(
                f"moments: expected {name} of shape {mean.shape}, that of mean, or of its leading axes, "
                f"got shape {shape}"
            )
        return jnp.broadcast_to(array, mean.shape)

    return Moments(**{f.name: expand(f.name, getattr(m, f.name)) for f in dataclasses.fields(m)})


def from_differences(pivot: jax.Array, first: jax.Array, square: jax.Array) -> MeanAndVariance:
    """Returns mean and variance of x, given the means of `x - pivot` and of its square."""
    rest = prevent_fma(first)
    rounded, lo = two_sum(pivot, rest)
    # Where the variance is no more than the rounding error of the pivot, the channel is constant, and its value is the
    # mean.
    var = variance(first, square)
    constant = is_rounding_error(var, first, 64)
    # Makes the variance NaN where x is not finite: infinity minus itself is NaN.
    var = var + (first - first)
    zero = jnp.zeros_like(lo)
    return rounded, jax.lax.select(constant, zero, lo), jax.lax.select(constant, zero, var)


def variance(first: jax.Array, square: jax.Array) -> jax.Array:
    """Returns `square - first**2`, which rounding can make negative; infinity where squares overflow."""
    return square - jax.lax.min(first * first, jnp.full_like(first, float(np.finfo(square.dtype).max)))


def reciprocal_root(v: jax.Array, eps: float) -> jax.Array:
    """Returns `1 / sqrt(v)`, where v is a variance plus `eps`; 0 where both are 0."""
    # Compilers may flush a smaller sum to 0.
    if eps >= np.finfo(v.dtype).tiny:
        return jax.lax.rsqrt(v)
    return jnp.where(v == 0, 0, jax.lax.rsqrt(jnp.where(v == 0, 1, v)))


def is_rounding_error(var: jax.Array, first: jax.Array, tolerance: float) -> jax.Array:
    """Whether `var` is below `tolerance * eps * first**2`, which a negative variance always is."""
    return var < tolerance * float(np.finfo(var.dtype).eps) * (first * first)


def two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the rounded sum and its rounding error (Knuth 1969)."""
    rounded = a + b
    part = rounded - a
    return rounded, (a - (rounded - part)) + (b - part)
