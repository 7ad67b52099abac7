"""Virtual batches: a given number of examples share statistics, on one device or on several."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from numbers import Integral
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbn._kernel.devices import DeviceGroups
from jaxbn._kernel.explicit_mesh import with_auto_axes
from jaxbn._kernel.inputs import other_axes, sizes
from jaxbn._kernel.moments import Moments
from jaxbn._kernel.normalize import Adjust, normalize
from jaxbn._kernel.reduction import Count, Reduction
from jaxbn._norms.arguments import Arguments
from jaxbn._versions import HAS_EXACT_UNEVEN_PARTS, take_joined, take_parts

# Returns how the kernel adjusts scale and bias, given the axes of its x that are no feature axes.
AdjustFor = Callable[[tuple[int, ...]], Adjust]


@dataclasses.dataclass(frozen=True)
class Split:
    """Cuts one device's batch into parts of `size` examples along `axis`; the last may be smaller.

    The parts lie along a new axis, right before that of their examples.
    """

    axis: int
    size: int

    def count(self, examples: int) -> int:
        return -(-examples // self.size)

    def apply(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """Returns `x` and its mask with the axis of the parts. The last part is padded, and the padding masked."""
        examples = x.shape[self.axis]
        missing = -examples % self.size
        if missing:
            if mask is None:
                mask = jnp.ones((1,) * x.ndim, bool)
            mask = jnp.broadcast_to(mask, (*mask.shape[: self.axis], examples, *mask.shape[self.axis + 1 :]))
            if not HAS_EXACT_UNEVEN_PARTS:
                return take_parts(x, self.axis, self.size), take_parts(mask, self.axis, self.size)
            x, mask = (jnp.pad(v, [(0, missing if a == self.axis else 0) for a in range(v.ndim)]) for v in (x, mask))
        return self._cut(x), None if mask is None else self._cut(mask)

    def undo(self, y: jax.Array, examples: int) -> jax.Array:
        parts, size = y.shape[self.axis : self.axis + 2]
        if examples % size and not HAS_EXACT_UNEVEN_PARTS:
            return take_joined(y, self.axis, examples)
        joined = y.reshape(*y.shape[: self.axis], parts * size, *y.shape[self.axis + 2 :])
        return jax.lax.slice_in_dim(joined, 0, examples, axis=self.axis)

    def _cut(self, v: jax.Array) -> jax.Array:
        if v.shape[self.axis] == 1:
            return jnp.expand_dims(v, self.axis)
        parts = v.shape[self.axis] // self.size
        return v.reshape(*v.shape[: self.axis], parts, self.size, *v.shape[self.axis + 1 :])


class VirtualBatches(NamedTuple):
    """Which examples share statistics.

    Attributes:
      split: how this device's batch is cut; None if it is not.
      devices: the devices that form one virtual batch; None if each has virtual batches of its own.
      average: the devices over whose virtual batches the running statistics take the mean.
    """

    split: Split | None
    devices: DeviceGroups | None
    average: DeviceGroups | None


def form_virtual_batches(a: Arguments, size: int, devices: DeviceGroups | None) -> VirtualBatches:
    """Returns how examples, along the first of the reduced axes, form virtual batches.

    Args:
      a: with this device's batch.
      size: how many examples share statistics.
      devices: the devices that have parts of the batch; None if this one has all of it.

    Raises:
      ValueError: the devices cannot form virtual batches of that size, a symbolic number of examples may not, or one
        has a single value per channel.
    """
    batches = _form(a, size, devices)
    split, values, which = batches.split, math.prod(sizes(a.x, a.reduced)), "each one"
    if split:
        examples = a.x.shape[split.axis]
        rest = examples % split.size
        values = values // examples * (rest or split.size)
        which = "the last one" if rest else which
    if batches.devices:
        values *= batches.devices.smallest
    if values == 1 and (split or batches.average):
        raise ValueError(
            f"virtual_batch_size: expected virtual batches with more than 1 value per channel, got {size} for x with "
            f"shape {a.x.shape}, of which {which} has 1 value for each of {math.prod(sizes(a.x, a.feature))} channels, "
            "whose normalized value would always be 0; change it or the batch size"
        )
    return batches


def _form(a: Arguments, size: int, devices: DeviceGroups | None) -> VirtualBatches:
    if not isinstance(size, Integral) or size < 1:
        raise ValueError(f"virtual_batch_size: expected a number of examples, at least 1, got {size}")
    size = int(size)
    if not a.reduced:
        return VirtualBatches(None, devices, None)
    axis = a.reduced[0]
    examples = a.x.shape[axis]
    is_symbolic = not isinstance(examples, int)
    if is_symbolic and examples % size != 0:
        raise ValueError(
            f"virtual_batch_size: expected a divisor of the number of examples, which is symbolic, got {size} for "
            f"{examples} examples, which may end within a virtual batch; export with a fixed number of examples, or "
            f"with a multiple, as by jax.export.symbolic_shape('{size}*n')"
        )
    # Of the virtual batches of a symbolic number of examples there may be one.
    split = Split(axis, size) if is_symbolic or size < examples else None
    if devices is None:
        return VirtualBatches(split, None, None)
    if len(devices.groups) > 1:
        raise ValueError(
            "virtual_batch_size: expected None with axis_index_groups, which says who shares a statistic already, "
            f"got {size}"
        )
    numbers = devices.groups[0]
    if not is_symbolic and size >= examples * len(numbers):
        return VirtualBatches(None, devices, None)
    if not is_symbolic and examples % size and size % examples:
        raise ValueError(
            f"virtual_batch_size: expected a divisor or a multiple of the {examples} examples on each of "
            f"{len(numbers)} devices, got {size}, of which some would be on part of a device; "
            "change it or the batch size"
        )
    per_batch = 1 if is_symbolic else max(size // examples, 1)
    groups = tuple(numbers[k : k + per_batch] for k in range(0, len(numbers), per_batch))
    average = DeviceGroups(devices.names, groups)
    if per_batch == 1:
        return VirtualBatches(split, None, average)
    return VirtualBatches(None, average, average)


def normalize_parts(
    a: Arguments, split: Split, adjust_for: AdjustFor | None
) -> tuple[jax.Array, Moments, Count | None]:
    """Normalizes each part of a batch by its own moments.

    Returns y, the moments, [parts, C], and the number of values of each part if that is the same for all.
    """
    axis, examples = split.axis, a.x.shape[split.axis]
    # The new axis of the parts is before all reduced axes.
    reduced = tuple(k + 1 for k in a.reduced)
    feature = tuple(k + (k >= axis) for k in a.feature)
    adjust = None if adjust_for is None else adjust_for(other_axes(a.x.ndim + 1, feature))

    def in_parts(
        x: jax.Array, scale: jax.Array | None, bias: jax.Array | None, mask: jax.Array | None, adjust: Adjust | None
    ) -> tuple[jax.Array, Moments]:
        x, mask = split.apply(x, mask)
        reduction = Reduction(reduced)
        y, m = normalize(x, scale, bias, mask, adjust, reduction=reduction, feature=feature, eps=a.eps, dtype=a.dtype)
        return split.undo(y, examples), m.squeeze(reduced).map(lambda v: jnp.moveaxis(v, axis, 0))

    # The shapes of y and of the moments, and the axes of x that theirs come from.
    results = (a.x.shape, tuple(range(a.x.ndim))), ((split.count(examples), *sizes(a.x, a.feature)), (axis, *a.feature))
    sharded = with_auto_axes(in_parts, a.x, axis, *results)
    y, m = sharded(a.x, a.scale, a.bias, a.mask, adjust)
    is_known = a.mask is None and examples % split.size == 0
    return y, m, Reduction(a.reduced).count(a.x) // examples * split.size if is_known else None
