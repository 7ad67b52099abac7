"""Over which axes of a `jax.shard_map` arrays vary, as their types say."""

from __future__ import annotations

import jax

from jaxbn._versions import as_varying, varying_axes


def as_equally_varying(*arrays: jax.Array) -> list[jax.Array]:
    """Returns arrays typed as varying over all the axes that any of them varies over, as JAX's operations do."""
    kinds = [varying_axes(v) for v in arrays]
    union = frozenset[str]().union(*kinds)
    return [v if kind == union else as_varying(v, tuple(union - kind)) for v, kind in zip(arrays, kinds, strict=True)]
