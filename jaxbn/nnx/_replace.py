"""Replaces the batch norms of an NNX model by jaxbn's."""

from __future__ import annotations

from typing import TypedDict, TypeVar, Unpack

from flax import nnx
from jax.typing import DTypeLike

from jaxbn._kernel.devices import AxisName, Groups
from jaxbn._norms.arguments import Axis
from jaxbn._versions import iter_modules
from jaxbn.nnx._batch_norm import BatchNorm

# The options that jaxbn's layer adds, with the values that a layer of Flax's gets.
_ADDED_OPTIONS = {
    "correction": 0,
    "virtual_batch_size": None,
    "num_domains": None,
    "domain_affine": False,
    "update_stats": True,
    "fixed_statistics": False,
    "stop_affine_gradients": False,
}


class _Options(TypedDict, total=False):
    axis: Axis
    axis_index_groups: Groups | None
    axis_name: AxisName | None
    correction: float
    dtype: DTypeLike | None
    epsilon: float
    momentum: float | None
    update_stats: bool
    use_running_average: bool | None
    virtual_batch_size: int | None


_Model = TypeVar("_Model", bound=nnx.Module)


def replace_batch_norms(model: _Model, **options: Unpack[_Options]) -> _Model:
    """Turns every `flax.nnx.BatchNorm` in a model into `jaxbn.nnx.BatchNorm`, in place.

    The layers remain the same objects and change their class, so references to them (in lists, dicts,
    tuples, other attributes, an optimizer) stay valid. Their variables remain the same objects too, with
    values, leading axes of `nnx.vmap` and sharding metadata, and their options, including training or
    evaluation mode, do not change.

    Args:
      model: any `nnx.Module`; may be a batch norm itself.
      **options: set on every batch norm, including those that were jaxbn's before: `axis`,
        `axis_index_groups`, `axis_name`, `correction`, `dtype`, `epsilon`, `momentum`,
        `update_stats`, `use_running_average`, `virtual_batch_size`, with the meanings and checks of
        `jaxbn.nnx.BatchNorm`. Options that are not passed do not change; in a layer that was Flax's, those
        that jaxbn adds have their defaults. `momentum=None` adds the variable `num_batches_tracked`, at 0.

    Returns:
      The model: the same object. `nnx.jit` compiles programs for it again.

    Raises (before anything is changed):
      TypeError: `model` is not an `nnx.Module`, or an option has another name.
      ValueError: there is no batch norm in it, or one of a class derived from `flax.nnx.BatchNorm`,
        whose code may rely on Flax's. (Layers of classes derived from `jaxbn.nnx.BatchNorm` keep their
        class and get the options.) Or `momentum=None` for layers stacked along another axis than the first.

    Source: torch.nn.SyncBatchNorm.convert_sync_batchnorm.

    Example:
      >>> from flax import nnx
      >>> from jaxbn.nnx import BatchNorm, replace_batch_norms
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.BatchNorm(3, momentum=0.9, rngs=rngs))
      >>> model = replace_batch_norms(model, virtual_batch_size=32)
      >>> type(model.layers[1]) is BatchNorm, model.layers[1].momentum, model.layers[1].virtual_batch_size
      (True, 0.9, 32)
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model: expected a flax.nnx.Module, got {type(model).__name__}; for Linen pass norm classes")
    unknown = sorted(set(options) - set(_Options.__annotations__))
    if unknown:
        raise TypeError(f"options: expected some of {', '.join(_Options.__annotations__)}, got {', '.join(unknown)}")
    norms = {path: m for path, m in iter_modules(model) if isinstance(m, nnx.BatchNorm)}
    if not norms:
        raise ValueError(f"model: expected a flax.nnx.BatchNorm in it, got none in {type(model).__name__}")
    derived = [
        f"{'/'.join(map(str, path)) or 'the model'} ({type(norm).__name__})"
        for path, norm in norms.items()
        if type(norm) is not nnx.BatchNorm and not isinstance(norm, BatchNorm)
    ]
    if derived:
        raise ValueError(
            f"model: expected flax.nnx.BatchNorm itself, got classes derived from it: {', '.join(derived)}; "
            "derive them from jaxbn.nnx.BatchNorm instead"
        )
    if "momentum" in options and options["momentum"] is None:
        stacked = [
            f"{'/'.join(map(str, path)) or 'the model'} {norm.mean.shape}"
            for path, norm in norms.items()
            if norm.mean.shape[-1] != norm.num_features
        ]
        if stacked:
            raise ValueError(
                "momentum: expected a number for layers that are stacked along another axis than the first, since "
                f"num_batches_tracked has no other, got None for {', '.join(stacked)}; stack them along axis 0"
            )
    for norm in norms.values():
        added = {} if isinstance(norm, BatchNorm) else _ADDED_OPTIONS
        if added:
            # NNX would take `norm.__class__ = BatchNorm` for an attribute of the module.
            object.__setattr__(norm, "__class__", BatchNorm)
        for name, value in {**added, **options}.items():
            setattr(norm, name, value)
        if norm.momentum is None:
            norm._add_batch_counter()
    return model
