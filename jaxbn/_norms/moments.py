"""The moments of an array, as a public function."""

from __future__ import annotations

import jax
from jax.typing import ArrayLike

from jaxbn._kernel.devices import AxisName, Groups, resolve_devices
from jaxbn._kernel.inputs import other_axes
from jaxbn._kernel.jit import jit
from jaxbn._kernel.measure import measure
from jaxbn._kernel.moments import Moments
from jaxbn._kernel.reduction import Reduction
from jaxbn._norms.arguments import Axis, as_float_array, expand_mask, resolve_axes


def moments(
    x: ArrayLike,
    *,
    axis: Axis = -1,
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Groups | None = None,
) -> Moments:
    """Measures mean, biased variance and count per channel, over all axes but `axis`.

    Formula: `mean = sum(x) / n`, `var = sum((x - mean)**2) / n`, n the number of values that count.
    For float32 the result is exact to a few units in the last place of the *standard deviation*,
    however large the mean: the sums are of differences from a pivot close to the mean. The pivot is
    the mean of one in 64 values; if these differ from all others, the variance has a relative error of
    up to `64 * eps`. On GPUs and TPUs the pivot of bfloat16 is zero: the variance is exact to `8 * eps * mean**2`,
    which is less than rounding the data to bfloat16 changed it by.

    Args:
      x: floating-point array of any rank.
      axis: the feature axis or axes; statistics are taken over all others.
      mask: boolean, True counts; broadcastable, rank for rank, to `x` without its feature axes or
        to all of `x`. What it hides may be anything, NaN included.
      axis_name, axis_index_groups: as in `batch_norm_train`: moments of the union over devices.

    Returns:
      `Moments` with fields of shape [C] (the sizes of the feature axes, in ascending order of
      axis); float64 for float64 input, float32 for all other. Where no value counts all are 0.

    Raises:
      TypeError: `x` is not floating point, or `mask` not boolean.
      ValueError: `axis` is out of range or named twice, or `mask` does not broadcast.

    Source: Chan, Golub & LeVeque (1983), Algorithms for computing the sample variance (shifted data).

    Example:
      >>> import jax.numpy as jnp, jaxbn
      >>> x = jnp.array([[1.0, 10.0], [3.0, 10.0]]) + 1e6
      >>> jaxbn.moments(x).var.tolist()
      [1.0, 0.0]
    """
    x = as_float_array(x)
    reduced = other_axes(x.ndim, resolve_axes(x.ndim, axis))
    expanded = None if mask is None else expand_mask(mask, x, reduced)
    reduction = Reduction(reduced, resolve_devices(axis_name, axis_index_groups))
    return _moments(x, expanded, reduction=reduction)


@jit("reduction")
def _moments(x: jax.Array, mask: jax.Array | None, *, reduction: Reduction) -> Moments:
    return measure(x, mask, reduction).squeeze(reduction.axes)
