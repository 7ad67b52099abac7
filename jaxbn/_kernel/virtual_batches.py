"""Virtual batches: how many examples share a statistic, whatever the devices they are on."""

from __future__ import annotations

import dataclasses
from numbers import Integral
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbn._kernel.devices import Across


@dataclasses.dataclass(frozen=True)
class Split:
    """How one device's batch is cut into parts of `size` examples along `axis`; the last may be smaller.

    A part is one more axis, right before that of its examples.
    """

    axis: int
    size: int

    def count(self, examples: int) -> int:
        return -(-examples // self.size)

    def apply(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """Returns `x` and its mask with the axis of the parts; what fills up the last one is masked."""
        examples = x.shape[self.axis]
        missing = -examples % self.size
        if missing:
            if mask is None:
                mask = jnp.ones((1,) * x.ndim, bool)
            mask = jnp.broadcast_to(mask, (*mask.shape[: self.axis], examples, *mask.shape[self.axis + 1 :]))
            x, mask = (jnp.pad(v, [(0, missing if a == self.axis else 0) for a in range(v.ndim)]) for v in (x, mask))
        return self._cut(x), None if mask is None else self._cut(mask)

    def undo(self, y: jax.Array, examples: int) -> jax.Array:
        parts, size = y.shape[self.axis : self.axis + 2]
        joined = y.reshape(*y.shape[: self.axis], parts * size, *y.shape[self.axis + 2 :])
        return jax.lax.slice_in_dim(joined, 0, examples, axis=self.axis)

    def _cut(self, v: jax.Array) -> jax.Array:
        if v.shape[self.axis] == 1:
            return jnp.expand_dims(v, self.axis)
        parts = v.shape[self.axis] // self.size
        return v.reshape(*v.shape[: self.axis], parts, self.size, *v.shape[self.axis + 1 :])


class Plan(NamedTuple):
    """Who shares a statistic.

    Attributes:
      split: how this device's batch is cut; None if it is one part.
      share: the devices whose parts are one virtual batch; None if each has its own.
      average: the devices over whose virtual batches the running statistics take the mean.
    """

    split: Split | None
    share: Across | None
    average: Across | None


def make_plan(x: jax.Array, reduced: tuple[int, ...], virtual_batch_size: int | None, across: Across | None) -> Plan:
    """Returns who shares a statistic.

    Args:
      x: this device's batch; examples are on the first of the `reduced` axes.
      reduced: the axes that are not feature axes.
      virtual_batch_size: how many examples share a statistic; None if all do.
      across: the devices.

    Raises:
      ValueError: the devices cannot form virtual batches of that size.
    """
    size = virtual_batch_size
    if size is None:
        return Plan(None, across, None)
    if not isinstance(size, Integral) or size < 1:
        raise ValueError(f"virtual_batch_size: expected a number of examples, at least 1, got {size}")
    size = int(size)
    if not reduced:
        return Plan(None, across, None)
    axis = reduced[0]
    examples = x.shape[axis]
    if across is None:
        return Plan(Split(axis, size) if size < examples else None, None, None)
    if len(across.groups) > 1:
        raise ValueError(
            "virtual_batch_size: expected None with axis_index_groups, which says who shares a statistic already, "
            f"got {size}"
        )
    numbers = across.groups[0]
    if size >= examples * len(numbers):
        return Plan(None, across, None)
    if examples % size and size % examples:
        raise ValueError(
            f"virtual_batch_size: expected a divisor or a multiple of the {examples} examples on each of "
            f"{len(numbers)} devices, got {size}, of which some would be on part of a device; "
            "change it or the batch size"
        )
    each = max(size // examples, 1)
    groups = tuple(numbers[k : k + each] for k in range(0, len(numbers), each))
    average = Across(across.names, groups)
    if each == 1:
        return Plan(Split(axis, size) if size < examples else None, None, average)
    return Plan(None, average, average)
