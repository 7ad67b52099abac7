"""Statistics across devices: the one home of collectives."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

AxisName = str | Sequence[str]
Groups = Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Across:
    """Which devices (or members of a `jax.vmap` with a name) share a statistic.

    Attributes:
      names: bound axis names; devices are numbered as `jax.lax.axis_index(names)` numbers them.
      groups: sets of those numbers that share; each number is in one.
    """

    names: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """How many share a statistic; in the smallest group."""
        return min(map(len, self.groups))

    def gather(self, v: jax.Array) -> tuple[jax.Array, np.ndarray | jax.Array]:
        """Returns the arrays of this device's group, stacked along a new leading axis, and which of them count."""
        if len(self.groups) == 1:
            gathered = self._gather_all(v)
            return gathered, np.ones(len(gathered), bool)
        if self._manual and self._equal:
            gathered = jax.lax.all_gather(v, self.names, axis_index_groups=self.groups)
            return gathered, np.ones(len(gathered), bool)
        places = max(map(len, self.groups))
        numbers = np.array([[*group, *group[:1] * (places - len(group))] for group in self.groups])
        taken = np.array([[place < len(group) for place in range(places)] for group in self.groups])
        return self._gather_all(v)[self._own(numbers)], self._own(taken)

    def sum(self, v: jax.Array) -> jax.Array:
        """Returns the sum of the arrays of this device's group."""
        if len(self.groups) == 1:
            return _psum(v, self.names)
        # A psum over groups is what shard_map lacks.
        gathered, counts = self.gather(v)
        return jnp.sum(jnp.where(counts.reshape(-1, *(1,) * v.ndim), gathered, 0), 0)

    def sum_groups(self, v: jax.Array) -> jax.Array:
        """Returns the sum over all groups of an array that is the same on all devices of a group."""
        share = self._own(np.array([1 / len(group) for group in self.groups]))
        return _psum(v * share.astype(v.dtype), self.names)

    def spread(self, *arrays: jax.Array) -> list[jax.Array]:
        """Returns arrays that are the same everywhere as ones that each device has for itself.

        In values nothing happens. In the transpose, where JAX tracks what varies, this is the sum
        over devices: of all arrays at once, rather than one by one wherever each is used.
        """
        stacked = jnp.stack(jnp.broadcast_arrays(*arrays))
        varying = jax.typeof(stacked).manual_axis_type.varying
        same = tuple(name for name in self.names if _tracked(name) and name not in varying)
        return list(jax.lax.pcast(stacked, same, to="varying")) if same else list(arrays)

    def _gather_all(self, v: jax.Array) -> jax.Array:
        if self._manual:
            # "invarying": the type says that the result is the same everywhere, as out_specs=P() asks.
            result: jax.Array = jax.lax.all_gather(
                v, self.names, to="invarying" if _tracked(self.names[0]) else "varying"
            )
            return result
        shape = v.shape
        for name in reversed(self.names):
            v = jax.lax.all_gather(v, name)
        return v.reshape(-1, *shape)

    def _own(self, table: np.ndarray) -> jax.Array:
        """Returns this device's group's row of `table`."""
        group_of = np.zeros(sum(map(len, self.groups)), np.int32)
        for k, group in enumerate(self.groups):
            group_of[list(group)] = k
        return jnp.asarray(table)[jnp.asarray(group_of)[jax.lax.axis_index(self.names)]]

    @property
    def _equal(self) -> bool:
        return len(set(map(len, self.groups))) == 1

    @property
    def _manual(self) -> bool:
        """Whether the devices are those of a shard_map or pmap, and not members of a vmap."""
        return set(self.names) <= set(jax.sharding.get_abstract_mesh().manual_axes)


def all_devices(axis_name: AxisName) -> Across:
    """Returns all devices along `axis_name`, or raises naming what is bound."""
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    return Across(names, (tuple(range(math.prod(_axis_size(name) for name in names))),))


def find_across(axis_name: AxisName | None, axis_index_groups: Groups | None) -> Across | None:
    """Returns what the caller's arguments mean, or raises if they mean nothing."""
    across = None if axis_name is None else all_devices(axis_name)
    if across is None or not across.names:
        if axis_index_groups is not None:
            raise ValueError(
                f"axis_index_groups: expected None without axis_name, got {axis_index_groups}; "
                "name the axis whose devices are grouped"
            )
        return None
    if axis_index_groups is None:
        return across
    groups = tuple(tuple(int(i) for i in group) for group in axis_index_groups)
    if not all(groups):
        raise ValueError(
            f"axis_index_groups: expected at least 1 device in each group, got {axis_index_groups}; "
            "leave empty groups out"
        )
    numbers = across.groups[0]
    if sorted(i for group in groups for i in group) != list(numbers):
        raise ValueError(
            f"axis_index_groups: expected each of the {len(numbers)} devices along {axis_name!r} in one group, "
            f"got {axis_index_groups}"
        )
    return Across(across.names, groups)


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


def _tracked(name: str) -> bool:
    """Whether `name` belongs to a `jax.shard_map` that tracks, in the types, what varies along it."""
    return name in jax.typeof(jax.lax.axis_index(name)).manual_axis_type.varying


def _psum(v: jax.Array, names: tuple[str, ...]) -> jax.Array:
    total: jax.Array = jax.lax.psum(v, names)
    return total
