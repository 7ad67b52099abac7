"""The parameters of a Linen layer, and the dtype of its result."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from flax.typing import Initializer
from jax.typing import DTypeLike

from jaxbn._norms.state import AffineParams

Layer = nn.BatchNorm | nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | nn.InstanceNorm


def affine_params(layer: Layer, shape: tuple[int, ...], domains: tuple[int, ...] = ()) -> AffineParams:
    """Returns the layer's scale and bias; those of all domains are initialized to the same values."""

    def parameter(name: str, init: Initializer) -> jax.Array:
        def stacked(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
            # A partitioned parameter is in a box, to which the axis of the domains is added, unsharded.
            one = nn.meta.add_axis(init(key, shape, dtype), 0, {nn.meta.PARTITION_NAME: None})
            return jax.tree.map(lambda v: jnp.broadcast_to(v, (*domains, *shape)), one)

        return layer.param(name, stacked if domains else init, shape, layer.param_dtype)

    scale = parameter("scale", layer.scale_init) if layer.use_scale else None
    # RMSNorm has no bias, and no field for it.
    bias = parameter("bias", layer.bias_init) if hasattr(layer, "use_bias") and layer.use_bias else None
    return AffineParams(scale, bias)


def result_dtype(layer: Layer, x: jax.Array, params: AffineParams) -> DTypeLike:
    return canonicalize_dtype(x, *(p for p in params if p is not None), dtype=layer.dtype)
