"""Over which axes of a `jax.shard_map` arrays vary, as their types say."""

from __future__ import annotations

import jax


def varying_axes(v: jax.Array) -> frozenset[str]:
    """Returns the axes of a `jax.shard_map` over which `v` varies, by its type."""
    axes: frozenset[str] = jax.typeof(v).manual_axis_type.varying
    return axes


def as_equally_varying(*arrays: jax.Array) -> list[jax.Array]:
    """Returns arrays typed as varying over all the axes that any of them varies over, as JAX's operations do."""
    kinds = [varying_axes(v) for v in arrays]
    union = frozenset[str]().union(*kinds)
    return [
        v if kind == union else jax.lax.pcast(v, tuple(union - kind), to="varying")
        for v, kind in zip(arrays, kinds, strict=True)
    ]
