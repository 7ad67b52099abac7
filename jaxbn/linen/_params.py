"""The parameters of a Linen layer, and the dtype of its result."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype

from jaxbn._norms.state import AffineParams


def affine_params(layer: Any, shape: tuple[int, ...], domains: tuple[int, ...] = ()) -> AffineParams:
    """Returns the layer's scale and bias; those of all domains are initialized to the same values."""

    def parameter(name: str, used: bool, init: Any) -> jax.Array | None:
        def stacked(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> Any:
            # A partitioned parameter is in a box, to which the axis of the domains is added, unsharded.
            one = nn.meta.add_axis(init(key, shape, dtype), 0, {nn.meta.PARTITION_NAME: None})
            return jax.tree.map(lambda v: jnp.broadcast_to(v, (*domains, *shape)), one)

        return layer.param(name, stacked if domains else init, shape, layer.param_dtype) if used else None

    # RMSNorm has no bias, and no field for it.
    use_bias = getattr(layer, "use_bias", False)
    return AffineParams(
        parameter("scale", layer.use_scale, layer.scale_init),
        parameter("bias", use_bias, layer.bias_init if use_bias else None),
    )


def result_dtype(layer: Any, x: jax.Array, params: AffineParams) -> Any:
    return canonicalize_dtype(x, *(p for p in params if p is not None), dtype=layer.dtype)
