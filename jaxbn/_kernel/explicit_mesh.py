"""Explicit mesh axes: types say how arrays are sharded, except for shardings that no type can express."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax

from jaxbn._versions import reshard

_Function = TypeVar("_Function", bound=Callable[..., object])
# The shape of a result, and for each of its axes the axis of x that it comes from.
ResultAxes = tuple[tuple[int, ...], tuple[int, ...]]


def with_auto_axes(function: _Function, x: jax.Array, axis: int, *results: ResultAxes) -> _Function:
    """Returns `function`, in which the mesh axes that shard `axis` of `x` are automatic.

    An array's type names whole mesh axes. It can say that a batch is sharded over 8 devices, but not that each part
    of a cut batch is sharded over 2 of them. With automatic axes the compiler shards arrays within `function`.
    Results are sharded as `x` is, where their sizes allow it.

    Args:
      function: takes `x` and other arrays.
      x: an array.
      axis: of `x`, which `function` cuts.
      results: the shapes and axes of the results of `function`.
    """
    sharding = jax.typeof(x).sharding
    if sharding.spec[axis] is None:
        return function

    def mesh_axes(axis: int) -> tuple[str, ...]:
        entry = sharding.spec[axis]
        return entry if isinstance(entry, tuple) else () if entry is None else (entry,)

    def shard(shape: tuple[int, ...], axes: tuple[int, ...]) -> jax.NamedSharding:
        devices = [math.prod(sharding.mesh.shape[name] for name in mesh_axes(a)) for a in axes]
        spec = (mesh_axes(a) if n % d == 0 else () for n, a, d in zip(shape, axes, devices, strict=True))
        sharded: jax.NamedSharding = sharding.update(spec=jax.P(*spec))
        return sharded

    out = tuple(shard(*result) for result in results)
    return cast(_Function, jax.sharding.auto_axes(function, axes=mesh_axes(axis), out_sharding=out))


def shard_as(v: jax.Array, like: jax.Array) -> jax.Array:
    """Returns `v` sharded as `like`, if both have the same shape and are on the same mesh.

    Elementwise operations need operands whose types have the same sharding.
    """
    sharding, wanted = jax.typeof(v).sharding, jax.typeof(like).sharding
    if v.shape != like.shape or sharding.mesh != wanted.mesh or sharding.spec == wanted.spec:
        return v
    return reshard(v, wanted)


def broadcast_as(v: jax.Array, like: Any) -> jax.Array:
    """Returns `v`, whose axes have the sizes of `like` or size 1, with the shape and sharding of this array or type."""
    sharding, axes = like.sharding, tuple(range(v.ndim))
    return jax.lax.broadcast_in_dim(v, like.shape, axes, out_sharding=sharding if any(sharding.spec) else None)
