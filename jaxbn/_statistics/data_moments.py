"""Statistics of a whole data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._kernel.inputs import other_axes
from jaxbn._kernel.jit import jit
from jaxbn._kernel.moments import Moments
from jaxbn._kernel.reduction import count_by_rows
from jaxbn._norms.arguments import Axis, expand_mask, resolve_axes
from jaxbn._norms.moments import moments
from jaxbn._statistics.batch_stream import Batch, MomentsAccumulator, as_arrays, check_batches, with_progress

_SELECT = "name the array by select, such as select=lambda batch: batch[0]"


def data_moments(
    batches: Iterable[Batch],
    *,
    axis: Axis = -1,
    select: Callable[[Batch], object] | None = None,
    mask: Callable[[Batch], object] | None = None,
    scale: float | None = None,
    transform: Callable[[jax.Array], jax.Array] | None = None,
    progress: bool = False,
) -> Moments:
    """Measures the mean and variance of each channel of a data set, in one pass over its batches.

    These are the numbers that inputs are normalized by: `mean` and `sqrt(var)`.

    Formula: `mean = sum(x) / n`, `var = sum((x - mean)**2) / n` over all values of all batches. A batch
    is measured on the device, by `jaxbn.moments` in one compiled step per shape; batches are merged in
    float64, since float32 cannot count beyond 2**24 values.

    Args:
      batches: any iterable of batches: arrays of JAX (sharded ones too), NumPy or PyTorch, of any sizes
        but with the same channels; or a data loader's tuples or dictionaries, of which `select` gives the
        array. float64 is measured as float32 unless JAX's 64-bit mode is on.
      axis: the axis or axes of the channels in a batch: -1 channels last, 1 for [N, C, H, W].
      select: gives the array of one batch, for example `lambda batch: batch["image"]`.
      mask: gives the mask of one batch; boolean, True counts, broadcastable as in `jaxbn.moments`.
      scale: factor for all values, which integers need: 1 / 255 maps 8-bit images to [0, 1].
      transform: applied to each batch first, within the compiled step; must return floating point.
      progress: show a progress bar (tqdm), if there is a terminal.

    Returns:
      `Moments` of float64 NumPy arrays, shape [C]; `count` is exact.

    Raises:
      ValueError: there are no batches or no value in them counts; channels differ between batches;
        both `scale` and `transform` are given.
      TypeError: `batches` is an array or cannot be iterated, a batch is not an array, or it has
        integers and there is neither `scale` nor `transform`.
      ImportError: `progress` without tqdm.

    Source: Chan, Golub & LeVeque (1979), Updating formulae and a pairwise algorithm for computing
    sample variances.

    Example:
      >>> import numpy as np, jaxbn
      >>> images = np.array([[[0, 255], [51, 0]], [[102, 255], [51, 0]], [[0, 0], [0, 255]]], np.uint8)
      >>> m = jaxbn.data_moments([images[:2], images[2:]], scale=1 / 255)
      >>> m.mean.round(4).tolist(), np.sqrt(m.var).round(4).tolist(), m.count.tolist()
      ([0.1333, 0.5], [0.1491, 0.5], [6.0, 6.0])
    """
    check_batches(batches)
    if scale is not None and transform is not None:
        raise ValueError("scale, transform: expected one of them, got both; let transform do what scale does")
    axis = tuple(axis) if not isinstance(axis, int) and isinstance(axis, Iterable) else axis
    accumulator = MomentsAccumulator()
    waiting: _BatchMoments | None = None
    for number, batch in enumerate(with_progress(batches, progress, "measuring")):
        x = as_arrays(batch if select is None else select(batch), _SELECT)
        if not hasattr(x, "shape"):
            raise TypeError(f"batches: expected an array in batch {number}, got {type(x).__name__}; {_SELECT}")
        keep = None if mask is None else as_arrays(mask(batch), "mask gives the mask of one batch")
        measured = _measure(x, keep, axis=axis, convert=scale is not None, transform=transform)
        # The batch before is fetched only now, so that the device measures one batch while the host prepares the next.
        if waiting is not None:
            accumulator.add(waiting.exact())
        waiting = measured
    if waiting is None:
        raise ValueError("batches: expected at least 1 batch, got none; an iterator can be gone through only once")
    accumulator.add(waiting.exact())
    total = accumulator.moments
    if not np.any(np.asarray(total.count) > 0):
        raise ValueError("batches: expected values that count, got none; batches are empty or masks hide everything")
    if scale is None:
        return total
    return dataclasses.replace(total, mean=total.mean * scale, var=total.var * scale**2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _BatchMoments:
    """Moments of one batch, whose count may be rounded to float32, and the exact counts of `count_by_rows`."""

    moments: Moments
    entries: jax.Array
    values: int = dataclasses.field(metadata={"static": True})
    reduced: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def exact(self) -> Moments:
        count = np.asarray(self.entries, np.float64).sum(self.reduced) * self.values
        exact: Any = np.broadcast_to(count, self.moments.mean.shape)
        return dataclasses.replace(self.moments, count=exact)


@jit("axis", "convert", "transform")
def _measure(
    x: jax.Array,
    mask: jax.Array | None,
    *,
    axis: Axis,
    convert: bool,
    transform: Callable[[jax.Array], jax.Array] | None,
) -> _BatchMoments:
    x = jnp.asarray(x)
    if transform is not None:
        x = transform(x)
    elif convert and not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(jnp.float32)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        where = "in each batch" if transform is None else "from transform"
        raise TypeError(
            f"batches: expected floating-point values {where}, got {x.dtype}; say what integers mean: scale=1 / 255 "
            "for 8-bit images in [0, 1], scale=1 to take them as they are, or a transform that returns floating point"
        )
    measured = moments(x, axis=axis, mask=mask)
    reduced = other_axes(x.ndim, resolve_axes(x.ndim, axis))
    keep = jnp.ones((1,) * x.ndim, bool) if mask is None else expand_mask(mask, x, reduced)
    return _BatchMoments(measured, *count_by_rows(x, keep, reduced), reduced)
