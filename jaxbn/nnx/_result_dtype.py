"""The dtype of an NNX layer's result."""

from __future__ import annotations

import functools
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import PromoteDtypeFn
from jax.typing import DTypeLike

from jaxbn._norms.state import AffineParams
from jaxbn._versions import promote_dtype

Layer: TypeAlias = "nnx.BatchNorm | nnx.LayerNorm | nnx.RMSNorm | nnx.GroupNorm | nnx.InstanceNorm"
_Kinds = tuple[jax.ShapeDtypeStruct | None, ...]


def result_dtype(layer: Layer, x: jax.Array, statistics: tuple[jax.Array, ...], params: AffineParams) -> DTypeLike:
    """Returns the dtype of y in Flax's layer, whose `promote_dtype` takes all these arrays in one call."""
    if layer.dtype is not None:
        return layer.dtype
    affine = params if hasattr(layer, "bias") else params[:1]
    kinds = tuple(
        None if v is None else jax.ShapeDtypeStruct(v.shape, v.dtype, weak_type=jax.typeof(v).weak_type)
        for v in (x, *statistics, *affine)
    )
    promoted = _promoted(promote_dtype(layer), kinds)
    without_statistics = (promoted[0], *promoted[1 + len(statistics) :])
    return jnp.result_type(*(v.dtype for v in without_statistics if v is not None))


@functools.lru_cache(maxsize=1024)
def _promoted(promote_dtype: PromoteDtypeFn, kinds: _Kinds) -> _Kinds:
    # Cached, since tracing takes longer than a small layer outside of jit.
    return jax.eval_shape(functools.partial(promote_dtype, dtype=None), kinds)
