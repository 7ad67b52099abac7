"""Statistics of a Linen model that training neither changes nor leaves unused."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core.scope import CollectionFilter, in_filter, subtract_filters, union_filters

from jaxbn._layers.calls import by_name, in_evaluation
from jaxbn._layers.chosen import Chosen, Only
from jaxbn._messages import few
from jaxbn._paths import name_of
from jaxbn.linen._calls import is_batch_norm_call

_ids = itertools.count()


def apply_fixed(
    model: nn.Module,
    variables: Mapping[str, Any],
    *inputs: object,
    only: Only = None,
    stop_affine_gradients: bool = False,
    mutable: CollectionFilter = False,
    **kwargs: Any,
) -> Any:
    """`model.apply(variables, *inputs, **kwargs)` with fixed running statistics: they are used, and not changed.

    Formula: `y = (x - mean) / sqrt(var + epsilon) * scale + bias` in each batch norm, with its running mean and var,
    whatever its `use_running_average` and the model's `train` say: the bits of evaluation. Dropout and all other
    layers do what the call says. Under `jax.jit`: `jax.jit(functools.partial(apply_fixed, model))`, which also is an
    `apply_fn` for `flax.training.train_state.TrainState`.

    Args:
      model: any module; its code need not be changed, and its batch norms may be of Flax's class. Those of NNX,
        inside of `nnx.bridge.to_linen`, are not seen.
      variables, *inputs, **kwargs: as for `model.apply`.
      only: which batch norms: a path, `"backbone/norm"` for that layer or `"backbone"` for all in that module;
        several paths; a class; or `only(path, layer)`, where the path is a tuple. By default all.
      stop_affine_gradients: whether the gradients of scale and bias are zero, too. Weight decay, and momentum of
        earlier steps, still change a parameter with a gradient of zero: see `optax.partition`.
      mutable: as for `model.apply`. Batch norms that are not fixed need batch_stats in it, as in training; in what
        is returned the statistics of those that are fixed are the old ones.

    Returns:
      What `model.apply` returns.

    Raises:
      TypeError: `only` is of another type.
      ValueError: no batch norm is called; a path is that of none, or none is chosen; one that is chosen has
        no statistics in `variables`, or a `__call__` of its own that does not call that of its base class.

    Source: keras.layers.BatchNormalization with `trainable = False`; flax.linen.intercept_methods.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxbn.linen import BatchNorm, apply_fixed
      >>> model = BatchNorm(use_running_average=False, epsilon=0.0)
      >>> x = jnp.array([[5.0], [7.0]])
      >>> variables = model.init(jax.random.key(0), x)
      >>> apply_fixed(model, variables, x).tolist()
      [[5.0], [7.0]]
    """
    chosen = Chosen(only)
    reached: dict[str, bool] = {}

    def intercept(
        run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: nn.module.InterceptorContext
    ) -> Any:
        module = context.module
        if not isinstance(module, nn.BatchNorm) or context.method_name != "__call__" or not chosen(module.path, module):
            return run(*args, **kwargs)
        name = name_of(module.path)
        if not is_batch_norm_call(context):
            reached.setdefault(name, False)
            return run(*args, **kwargs)
        reached[name] = True
        if not module.has_variable("batch_stats", "mean"):
            raise ValueError(f"variables: expected statistics of {name} in batch_stats, got none; restore them first")
        with in_evaluation(module), _constant_params(module) if stop_affine_gradients else contextlib.nullcontext():
            return run(**{**by_name(args, kwargs), "use_running_average": True})

    # `nn.jit` keeps what it has traced for each value of `mutable`. With a new one all is traced here.
    marker = f"fixed_statistics_{next(_ids)}"
    add = subtract_filters if in_filter(mutable, marker) else union_filters
    with nn.intercept_methods(intercept):
        returned = model.apply(variables, *inputs, mutable=add(mutable, marker), **kwargs)
    chosen.check(model)
    missed = [name for name, was_reached in reached.items() if not was_reached]
    if missed:
        raise ValueError(
            f"only: expected batch norms whose __call__ is that of their base class, or calls it, got {few(missed)} "
            "with a __call__ of its own; what it normalizes by cannot be fixed here: give it an option for that"
        )
    return returned[0] if mutable is False and not kwargs.get("capture_intermediates") else returned


@contextlib.contextmanager
def _constant_params(module: nn.BatchNorm) -> Iterator[None]:
    """Until the context ends, the module's parameters have no gradient."""
    param = module.param
    object.__setattr__(module, "param", lambda *args, **kwargs: jax.lax.stop_gradient(param(*args, **kwargs)))
    try:
        yield
    finally:
        # What it was is a method of the class, which the instance does not hold.
        vars(module).pop("param")
