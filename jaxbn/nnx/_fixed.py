"""Statistics of an NNX model that training neither changes nor leaves unused."""

from __future__ import annotations

from typing import Any, TypeVar

from flax import nnx

from jaxbn._layers.chosen import Chosen, Only
from jaxbn._messages import few
from jaxbn._paths import name_of
from jaxbn._versions import iter_modules
from jaxbn.nnx._batch_norm import BatchNorm

_Model = TypeVar("_Model", bound=nnx.Module)


def fix_statistics(model: _Model, *, only: Only = None, stop_affine_gradients: bool = False) -> _Model:
    """Fixes the running statistics of a model's batch norms, in place: they are used in training too, and not changed.

    Formula: `y = (x - mean) / sqrt(var + epsilon) * scale + bias` with the running mean and var, whatever the mode:
    the bits of evaluation. `model.train()`, `model.eval()`, `nnx.view` and `use_running_average` in a call change
    nothing about it, and copies (`nnx.clone`, `nnx.split` and `nnx.merge`) keep it. Dropout and all other layers stay
    in the mode that they are in. `release_statistics` undoes it.

    Args:
      model: any `nnx.Module`; may be a batch norm itself, or have stacked ones. Those of Linen, inside of
        `nnx.bridge.ToNNX`, are not seen.
      only: which `jaxbn.nnx.BatchNorm` and `BatchRenorm` layers: a path, `"backbone/norm"` for that layer or
        `"backbone"` for all in that module; several paths; a class; or `only(path, layer)`, where the path is a tuple,
        as are the filters of `nnx.view`. By default all. Layers of earlier calls stay fixed.
      stop_affine_gradients: whether the gradients of scale and bias are zero, too. Weight decay, and momentum of
        earlier steps, still change a parameter with a gradient of zero: leave it out of the optimizer.

    Returns:
      The model: the same object. `nnx.jit` compiles programs for it again.

    Raises (before anything is changed):
      TypeError: `model` is not an `nnx.Module`, or `only` is of another type.
      ValueError: a path is that of no batch norm; no layer is chosen; or one that is chosen is of Flax's class,
        which `replace_batch_norms` turns into jaxbn's.

    Source: keras.layers.BatchNormalization with `trainable = False`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxbn.nnx import BatchNorm, fix_statistics
      >>> model = fix_statistics(nnx.Sequential(BatchNorm(1, epsilon=0.0, rngs=nnx.Rngs(0))))
      >>> model.train()
      >>> model(jnp.array([[5.0], [7.0]])).tolist(), model.layers[0].mean[...].tolist()
      ([[5.0], [7.0]], [0.0])
    """
    norms = _choose(model, only)
    of_flax = [name_of(path) for path, norm in norms.items() if not isinstance(norm, BatchNorm)]
    if of_flax:
        raise ValueError(
            f"model: expected jaxbn.nnx.BatchNorm, got flax.nnx.BatchNorm at {few(of_flax)}, whose statistics "
            "model.train() would release; turn these layers into jaxbn's first: jaxbn.nnx.replace_batch_norms(model)"
        )
    for norm in norms.values():
        norm.set_attributes(fixed_statistics=True, stop_affine_gradients=stop_affine_gradients)
    return model


def release_statistics(model: _Model, *, only: Only = None) -> _Model:
    """Undoes `fix_statistics`, in place: the layers do again what their mode says, with gradients of scale and bias.

    Args:
      model: any `nnx.Module`. Layers whose statistics are not fixed do not change.
      only: as in `fix_statistics`.

    Returns:
      The model: the same object.

    Raises (before anything is changed):
      TypeError, ValueError: as `fix_statistics`, but layers of Flax's class, which are never fixed, are no error.

    Source: keras.layers.BatchNormalization with `trainable = True`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxbn.nnx import BatchNorm, fix_statistics, release_statistics
      >>> layer = release_statistics(fix_statistics(BatchNorm(1, momentum=0.0, rngs=nnx.Rngs(0))))
      >>> y = layer(jnp.array([[5.0], [7.0]]))
      >>> y.round(3).tolist(), layer.mean[...].tolist()
      ([[-1.0], [1.0]], [6.0])
    """
    for norm in _choose(model, only).values():
        if isinstance(norm, BatchNorm):
            norm.set_attributes(fixed_statistics=False, stop_affine_gradients=False)
    return model


def _choose(model: nnx.Module, only: Only) -> dict[tuple[Any, ...], nnx.BatchNorm]:
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model: expected a flax.nnx.Module, got {type(model).__name__}; for Linen use jaxbn.linen.apply_fixed"
        )
    chosen = Chosen(only)
    norms = {path: m for path, m in iter_modules(model) if isinstance(m, nnx.BatchNorm) and chosen(path, m)}
    chosen.check(model)
    return norms
