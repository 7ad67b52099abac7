"""Parameters and state of the norms: their types and initialization."""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Generic, Literal, NamedTuple, TypeVar, overload

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxbn._kernel.inputs import statistics_dtype
from jaxbn._serialized import serializable

if TYPE_CHECKING:
    from typing_extensions import TypeVar as TypeVarWithDefault

    _Scale = TypeVarWithDefault("_Scale", bound=jax.Array | None, default=jax.Array | None, covariant=True)
    _Bias = TypeVarWithDefault("_Bias", bound=jax.Array | None, default=jax.Array | None, covariant=True)
else:
    _Scale, _Bias = TypeVar("_Scale"), TypeVar("_Bias")


@serializable
class AffineParams(NamedTuple, Generic[_Scale, _Bias]):
    """The learned parameters of any norm. Each may be None: then there is no factor, or no shift.

    Attributes:
      scale: factor per channel (PyTorch: `weight`, the paper: gamma); floating point, shape [C].
      bias: shift per channel (the paper: beta); floating point, shape [C].

    Example:
      >>> import jax.numpy as jnp, jaxbn
      >>> jaxbn.AffineParams(scale=None, bias=jnp.zeros(3)).bias.shape
      (3,)
    """

    scale: _Scale = None  # type: ignore[assignment]
    bias: _Bias = None  # type: ignore[assignment]


# The first name of the class.
BatchNormParams = AffineParams


@serializable
class BatchNormState(NamedTuple):
    """The running statistics of the batches seen in training. They have no gradient.

    Attributes:
      mean: running mean; float32, shape [C].
      var: running variance, unbiased unless `correction` says otherwise; float32, shape [C].
      num_batches_tracked: the number of batches seen; int32, shape [].

    Example:
      >>> import jaxbn
      >>> _, state = jaxbn.batch_norm_init(2)
      >>> state.mean.tolist(), state.var.tolist(), int(state.num_batches_tracked)
      ([0.0, 0.0], [1.0, 1.0], 0)
    """

    mean: jax.Array
    var: jax.Array
    num_batches_tracked: jax.Array


# What a norm returns for a state: a state, or None for None.
State = TypeVar("State", bound=BatchNormState | None)
_Features = int | tuple[int, ...]
_True = Literal[True]
_BothParams = AffineParams[jax.Array, jax.Array]


@overload
def batch_norm_init(
    num_features: _Features, *, affine: _True = ..., track_running_stats: _True = ..., param_dtype: DTypeLike = ...
) -> tuple[_BothParams, BatchNormState]: ...


@overload
def batch_norm_init(
    num_features: _Features, *, affine: _True = ..., track_running_stats: Literal[False], param_dtype: DTypeLike = ...
) -> tuple[_BothParams, None]: ...


@overload
def batch_norm_init(
    num_features: _Features, *, affine: Literal[False], track_running_stats: _True = ..., param_dtype: DTypeLike = ...
) -> tuple[None, BatchNormState]: ...


@overload
def batch_norm_init(
    num_features: _Features, *, affine: bool = ..., track_running_stats: bool = ..., param_dtype: DTypeLike = ...
) -> tuple[_BothParams | None, BatchNormState | None]: ...


def batch_norm_init(
    num_features: int | tuple[int, ...],
    *,
    affine: bool = True,
    track_running_stats: bool = True,
    param_dtype: DTypeLike = jnp.float32,
) -> tuple[_BothParams | None, BatchNormState | None]:
    """Returns initial parameters (scale 1, bias 0) and state (mean 0, variance 1, no batch seen).

    Args:
      num_features: the number of channels C; with several feature axes their sizes, in ascending
        order of axis. For a stack of layers or models use `jax.vmap`, which also stacks their counters.
      affine: False gives None for the parameters: normalize only.
      track_running_stats: False gives None for the state: evaluate with the batch's own moments.
      param_dtype: floating-point dtype of scale and bias. The state is float32 (float64 if
        `param_dtype` is), since small updates of running statistics are lost in half precision.

    Raises:
      ValueError: a number of features is below 1.
      TypeError: `num_features` is not an integer or a tuple of them, or `param_dtype` is not
        floating point.

    Source: torch.nn.BatchNorm2d (`affine`, `track_running_stats`).

    Example:
      >>> import jaxbn
      >>> params, state = jaxbn.batch_norm_init(3)
      >>> params.scale.shape, state.var.shape
      ((3,), (3,))
      >>> jaxbn.batch_norm_init(3, affine=False, track_running_stats=False)
      (None, None)
    """
    shape = _check_features(num_features, param_dtype)
    params = affine_init(shape, param_dtype=param_dtype) if affine else None
    state = None
    if track_running_stats:
        dtype = statistics_dtype(jnp.dtype(param_dtype))
        state = BatchNormState(jnp.zeros(shape, dtype), jnp.ones(shape, dtype), jnp.zeros((), jnp.int32))
    return params, state


@overload
def affine_init(
    num_features: _Features, *, scale: _True = ..., bias: _True = ..., param_dtype: DTypeLike = ...
) -> _BothParams: ...


@overload
def affine_init(
    num_features: _Features, *, scale: _True = ..., bias: bool, param_dtype: DTypeLike = ...
) -> AffineParams[jax.Array]: ...


@overload
def affine_init(
    num_features: _Features, *, scale: bool, bias: bool = ..., param_dtype: DTypeLike = ...
) -> AffineParams: ...


def affine_init(
    num_features: int | tuple[int, ...], *, scale: bool = True, bias: bool = True, param_dtype: DTypeLike = jnp.float32
) -> AffineParams:
    """Returns initial parameters for any norm: scale 1 and bias 0.

    Args:
      num_features: the number of channels C; for `layer_norm` over several axes their sizes, in
        ascending order of axis.
      scale, bias: False gives None; `rms_norm` usually has no bias.
      param_dtype: floating-point dtype of both.

    Raises:
      ValueError, TypeError: as `batch_norm_init`.

    Source: torch.nn.LayerNorm, torch.nn.RMSNorm, torch.nn.GroupNorm (`reset_parameters`).

    Example:
      >>> import jaxbn
      >>> jaxbn.affine_init(2, bias=False).scale.tolist()
      [1.0, 1.0]
    """
    shape = _check_features(num_features, param_dtype)
    return AffineParams(
        jnp.ones(shape, param_dtype) if scale else None, jnp.zeros(shape, param_dtype) if bias else None
    )


def _check_features(num_features: _Features, param_dtype: DTypeLike) -> tuple[int, ...]:
    shape = tuple(num_features) if isinstance(num_features, tuple | list) else (num_features,)
    if not all(isinstance(n, numbers.Integral) for n in shape):
        got = type(num_features).__name__ if hasattr(num_features, "shape") else repr(num_features)
        raise TypeError(f"num_features: expected an integer or a tuple of integers, got {got}")
    if not all(n >= 1 for n in shape):
        raise ValueError(f"num_features: expected at least 1 channel, got {num_features}")
    if not jnp.issubdtype(param_dtype, jnp.floating):
        raise TypeError(f"param_dtype: expected a floating-point dtype, got {jnp.dtype(param_dtype)}; use float32")
    return shape
