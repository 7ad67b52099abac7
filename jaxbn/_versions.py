"""What differs between the supported versions of JAX and Flax, and nothing else; docs/getting_started.md lists it."""

from __future__ import annotations

from typing import Any

import jax


def varying_axes(v: jax.Array) -> frozenset[str]:
    """Returns the axes of a `jax.shard_map` over which `v` varies, by its type."""
    kind: Any = jax.typeof(v)
    # JAX 0.10 replaced the attribute `vma`.
    axes: frozenset[str] = kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma
    return axes


def as_varying(v: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """Returns `v`, which varies over none of the axes `names`, typed as varying over them."""
    # JAX 0.8 replaced `pvary`.
    varying: jax.Array = jax.lax.pcast(v, names, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary(v, names)
    return varying


def reshard(v: jax.Array, sharding: Any) -> jax.Array:
    """Returns `v` with the type's sharding `sharding`."""
    move = jax.reshard if hasattr(jax, "reshard") else jax.sharding.reshard
    resharded: jax.Array = move(v, sharding)
    return resharded
