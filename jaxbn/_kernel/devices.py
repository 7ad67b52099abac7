"""Groups of devices that share statistics. The collectives of norms are here and in group_sums.py."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._kernel.group_sums import sum_in_groups
from jaxbn._versions import as_varying, varying_axes

AxisName = str | Sequence[str]
Groups = Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class DeviceGroups:
    """Which devices, or members of a `jax.vmap` with an axis name, share statistics.

    Attributes:
      names: bound axis names; devices are numbered as by `jax.lax.axis_index(names)`.
      groups: sets of these numbers. The devices of a set share statistics, and every number is in one set.
    """

    names: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]

    @property
    def smallest(self) -> int:
        """The number of devices in the smallest group."""
        return min(map(len, self.groups))

    @property
    def largest(self) -> int:
        """The number of devices in the largest group."""
        return max(map(len, self.groups))

    def sum(self, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        """Returns for each array the sum over this device's group, the same on all devices of the group.

        XLA adds arrays that are ready at the same time in one collective. Stacked here, they would be copied.
        """
        if len(self.groups) == 1:
            return [_squeezed(lambda v: _psum(v, self.names), v) for v in arrays]
        if self._manual:
            return [_squeezed(lambda v: sum_in_groups(self._cast(v), self.names, self.groups), v) for v in arrays]
        numbers = np.arange(sum(map(len, self.groups)))
        members = np.array([np.isin(numbers, group) for group in self.groups])

        def add(v: jax.Array) -> jax.Array:
            chosen = jnp.where(members.reshape(*members.shape, *(1,) * v.ndim), self._gather_all(v), 0)
            return self._row_of_group(jnp.sum(chosen, 1))

        return [add(v) for v in arrays]

    def times_members(self, number: int) -> jax.Array | int:
        """Returns `number` times the number of devices in this device's group."""
        sizes = {len(group) for group in self.groups}
        if len(sizes) == 1:
            return number * sizes.pop()
        return self._row_of_group(np.array([len(group) for group in self.groups])) * number

    def sum_over_groups(self, v: jax.Array) -> jax.Array:
        """Returns the sum over groups of an array that is the same on all devices of a group."""
        share = self._row_of_group(np.array([1 / len(group) for group in self.groups]))
        return _psum(v * share.astype(v.dtype), self.names)

    def as_varying(self, v: jax.Array) -> jax.Array:
        """Returns `v`, whose type says that it is the same on all devices, with a type that says that it varies.

        The values stay the same. The transpose, where JAX tracks varying types, is a sum over devices of the
        cotangent, rather than a sum for each use of the array.
        """
        return _squeezed(self._cast, v)

    def _cast(self, v: jax.Array) -> jax.Array:
        varying = varying_axes(v)
        invarying = tuple(name for name in self.names if _tracks_varying(name) and name not in varying)
        return as_varying(v, invarying) if invarying else v

    def _gather_all(self, v: jax.Array) -> jax.Array:
        shape = v.shape
        for name in reversed(self.names):
            v = jax.lax.all_gather(v, name)
        return v.reshape(-1, *shape)

    def _row_of_group(self, table: np.ndarray | jax.Array) -> jax.Array:
        """Returns the row of this device's group in `table`, which has a row for each group."""
        group_of = np.zeros(sum(map(len, self.groups)), np.int32)
        for k, group in enumerate(self.groups):
            group_of[list(group)] = k
        return jnp.asarray(table)[jnp.asarray(group_of)[jax.lax.axis_index(self.names)]]

    @property
    def _manual(self) -> bool:
        """Whether the names are of a shard_map or pmap, and not of a vmap."""
        return set(self.names) <= set(jax.sharding.get_abstract_mesh().manual_axes)


def all_devices(axis_name: AxisName) -> DeviceGroups:
    """Returns one group of all devices along `axis_name`, or raises and lists the axes that are bound."""
    try:
        names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    except TypeError:
        raise TypeError(
            f"axis_name: expected the name of a mapped axis, or several, got {type(axis_name).__name__}; axes of x, "
            "which have numbers, are named by axis=..."
        ) from None
    return DeviceGroups(names, (tuple(range(math.prod(_axis_size(name) for name in names))),))


def resolve_devices(axis_name: AxisName | None, axis_index_groups: Groups | None) -> DeviceGroups | None:
    """Returns the groups that the caller's arguments describe, or raises."""
    devices = None if axis_name is None else all_devices(axis_name)
    if devices is None or not devices.names:
        if axis_index_groups is not None:
            raise ValueError(
                f"axis_index_groups: expected None without axis_name, got {axis_index_groups}; "
                "name the axis whose devices are grouped"
            )
        return None
    if axis_index_groups is None:
        return devices
    try:
        groups = tuple(tuple(operator.index(i) for i in group) for group in axis_index_groups)
    except TypeError:
        raise TypeError(
            f"axis_index_groups: expected sets of device numbers, which are integers, got {axis_index_groups}; "
            "an example is [[0, 1], [2, 3]]"
        ) from None
    if not all(groups):
        raise ValueError(
            f"axis_index_groups: expected at least 1 device in each group, got {axis_index_groups}; "
            "leave empty groups out"
        )
    numbers = devices.groups[0]
    if sorted(i for group in groups for i in group) != list(numbers):
        raise ValueError(
            f"axis_index_groups: expected each of the {len(numbers)} devices along {axis_name!r} in one group, "
            f"got {axis_index_groups}"
        )
    return DeviceGroups(devices.names, groups)


def _axis_size(name: str) -> int:
    try:
        return int(jax.lax.axis_size(name))
    except NameError:
        raise ValueError(
            f"axis_name: expected an axis that is bound here, got {name!r} where {_bound()} bound; call this inside "
            "jax.shard_map, jax.pmap or jax.vmap with that axis_name, or leave it out: under jax.jit alone statistics "
            "of a sharded batch are global without it"
        ) from None


def _bound() -> str:
    from jax._src.core import get_axis_env  # JAX has no public way to list the names.

    names = get_axis_env().axis_names()
    return f"{', '.join(map(repr, names))} {'is' if len(names) == 1 else 'are'}" if names else "none is"


def _tracks_varying(name: str) -> bool:
    """Whether `name` belongs to a `jax.shard_map` whose types say which arrays vary over it."""
    return name in varying_axes(jax.lax.axis_index(name))


def _psum(v: jax.Array, names: tuple[str, ...]) -> jax.Array:
    total: jax.Array = jax.lax.psum(v, names)
    return total


def _squeezed(function: Callable[[jax.Array], jax.Array], v: jax.Array) -> jax.Array:
    """Returns `function(v)`, computed without the axes of size 1, with which the layout on TPUs costs more."""
    ones = tuple(a for a, n in enumerate(v.shape) if isinstance(n, int) and n == 1)
    return jnp.expand_dims(function(jnp.squeeze(v, ones)), ones)
