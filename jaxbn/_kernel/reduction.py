"""What a statistic is taken over, and how sums become means."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._kernel import inputs
from jaxbn._kernel.devices import DeviceGroups

# How many values a statistic is taken over. Where shapes alone decide, it is a number, or the size of a symbolic shape.
Count = jax.Array | int


@dataclasses.dataclass(frozen=True)
class Reduction:
    """What a statistic is taken over.

    Attributes:
      axes: the reduced axes of x, in ascending order.
      devices: the devices that share statistics; None if each has its own.
      channel_groups: the channels that share statistics; None if each has its own.
      about_zero: the mean is defined as zero, so that the variance is the mean square.
    """

    axes: tuple[int, ...]
    devices: DeviceGroups | None = None
    channel_groups: ChannelGroups | None = None
    about_zero: bool = False

    @property
    def is_local(self) -> bool:
        """Whether statistics are shared neither by channels nor by devices."""
        return self.channel_groups is None and self.devices is None

    def means(
        self,
        x: jax.Array,
        mask: jax.Array | None,
        *sums: jax.Array,
        squares: jax.Array | None = None,
        count: Count | None = None,
    ) -> tuple[list[jax.Array], Count]:
        """Returns means over values of `x`, 0 where nothing counts, and the number of values in each mean.

        Args:
          x: the array whose values were summed; only its shape and its dtype are used.
          mask: of the rank of `x`, or None.
          sums: sums of this device's values over the reduced axes.
          squares: the sum of squares; its mean is the last that is returned.
          count: how many values count with the mask, if that is known already.
        """
        share = self._share(x)
        if squares is not None:
            sums = (*sums, squares * share if share < 1 else squares)
        number: Count
        if mask is None:
            totals, number = self._pool(*sums), self.count(x)
        elif count is not None:
            totals, number = self._pool(*sums), count
        else:
            *totals, number = self._pool(*sums, count_values(x, mask, self.axes))
        found = means_of(totals, number)
        if squares is not None and share < 1:
            found[-1] = found[-1] / share
        return found, number

    def _pool(self, *sums: jax.Array) -> list[jax.Array]:
        """Returns sums added up over the channels and devices that share statistics."""
        devices, groups = self.devices, self.channel_groups
        if groups is None:
            return list(sums) if devices is None else devices.sum(sums)
        # Typed as varying before channels get the sums of their groups: the derivative sends one for each group, too.
        return groups.pool(sums, lambda v: v if devices is None else devices.as_varying(*devices.sum([v])))

    def _share(self, x: jax.Array) -> float:
        """Returns the power of two by which sums of squares are scaled before devices add them.

        So sums over devices overflow about where sums of one device do. They are divided by at most the number of
        values on a device, so that they do not underflow where the mean of these values does not.
        """
        number = self._count_here(x)
        if self.devices is None or not isinstance(number, int) or not number:
            return 1.0
        return 0.5 ** (min(number, self.devices.largest).bit_length() - 1)

    def count(self, x: jax.Array) -> Count:
        """Returns the number of values of `x` in a statistic without mask; an array if it differs between devices."""
        number = self._count_here(x)
        return number if self.devices is None else self.devices.times_members(number)

    def _count_here(self, x: jax.Array) -> int:
        number: int = math.prod(inputs.sizes(x, self.axes))
        if self.channel_groups is not None:
            number *= x.shape[self.channel_groups.axis] // self.channel_groups.number
        return number


@dataclasses.dataclass(frozen=True)
class ChannelGroups:
    """Neighbouring channels that share statistics: `number` groups along `axis` of x."""

    axis: int
    number: int

    def pool(self, sums: Sequence[jax.Array], complete: Callable[[jax.Array], jax.Array]) -> list[jax.Array]:
        """Returns the sum over its group for each channel, in arrays of the rank of x.

        `complete` is given the sums of the groups, and returns them added up over devices.
        """
        stacked = jnp.stack(jnp.broadcast_arrays(*sums))
        cut = self.cut(stacked, self.axis + 1)
        total = complete(jnp.sum(cut, self.axis + 2, keepdims=True))
        return list(jnp.broadcast_to(total, cut.shape).reshape(stacked.shape))

    def cut(self, v: jax.Array, axis: int) -> jax.Array:
        """Returns `v`, cut so that groups are along `axis`, and the channels of each group along the next axis."""
        return v.reshape(self.cut_shape(v.shape, axis))

    def cut_shape(self, shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
        number = self.number if shape[axis] != 1 else 1
        return *shape[:axis], number, shape[axis] // number, *shape[axis + 1 :]


def count_by_rows(x: jax.Array, mask: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, int]:
    """Returns the number of True entries of the mask at each place of the first axis, and of values for an entry."""
    values = math.prod(inputs.sizes(x, tuple(a for a in axes if mask.shape[a] == 1)))
    return jnp.sum(mask, axes[1:], dtype=jnp.int32, keepdims=True), values


def count_values(x: jax.Array, mask: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns how many values of `x` count, in the dtype of its statistics."""
    dtype = inputs.statistics_dtype(x.dtype)
    # Rows are counted in int32, which ends at 2**31, and added in the dtype: a sum of ones in float32 ends at 2**24.
    entries, values = count_by_rows(x, mask, axes)
    return jnp.sum(entries.astype(dtype), axes[:1], keepdims=True) * as_float(values, dtype)


def as_float(number: Count, dtype: np.dtype) -> jax.Array | float:
    """Returns a count as a divisor of arrays; sizes may be symbolic."""
    if isinstance(number, int):
        return float(number)
    return jnp.asarray(number).astype(dtype)


def means_of(totals: list[jax.Array], count: Count) -> list[jax.Array]:
    """Returns sums divided by the count; 0 where nothing counts."""
    divisor = as_float(count, totals[0].dtype)
    divisor = max(divisor, 1.0) if isinstance(divisor, float) else jnp.maximum(divisor, 1)
    return [total / divisor for total in totals]
