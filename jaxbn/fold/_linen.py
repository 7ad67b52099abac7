"""Folding the batch norms of a Linen model."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.meta import AxisMetadata, unbox
from flax.linen.dtypes import canonicalize_dtype

from jaxbn._observe.calls import CallLinen, Variables, flatten_dict, unflatten_dict
from jaxbn._observe.run import evaluate_linen
from jaxbn._observe.watch import Args, Function, Kwargs
from jaxbn._paths import path_of
from jaxbn.fold._fold import fold_checked, fold_pair
from jaxbn.fold._pairs import Pairs, choose, propose
from jaxbn.fold._trace import Trace

_LAYERS = (nn.Dense, nn.Conv, nn.ConvTranspose)
# The variables that folding reads, and the collections that they are in.
_COLLECTIONS = {"kernel": "params", "bias": "params", "scale": "params", "mean": "batch_stats", "var": "batch_stats"}


def propose_linen(model: nn.Module, variables: Variables, batch: object, *, call: CallLinen | None = None) -> Pairs:
    """Finds the batch norms of a model that can be folded, and the layers that they fold into.

    The model is traced, not run. A norm is paired with the `Dense`, `Conv` or `ConvTranspose` whose output is
    its input and has no other user. If there is none, it is paired with the one that is the only user of its
    output, unless that layer pads with zeros. If a layer or norm is called several times, its partner must be
    the same in all calls. A layer must be of Flax's own class. A norm may be of a derived class whose
    `__call__` is that of Flax or jaxbn. Both must compute with their own variables (not with those that a
    wrapper such as `nn.WeightNorm` makes of them), and nothing else may use these.

    Args:
      model: the module.
      variables: its variables.
      batch: one batch, as `call` takes it.
      call: `call(apply, batch)` evaluates the model by `apply(...)`, which is `model.apply` with the variables
        given: `lambda apply, x: apply(x, train=False)`. By default `apply(batch)`. It is traced by JAX.

    Returns:
      `{norm: layer}`, both as paths of modules: `"Block_0/BatchNorm_1"`. Its attribute `unfolded` gives for
      each other norm the reason why it stays: `{norm: reason}`.

    Raises:
      TypeError: the batch is a tuple, list or dictionary with which the model fails,
        and there is no `call`.

    Source: torch.ao.quantization.fuse_modules, where the caller names the modules.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn
      >>> from jaxbn.fold import propose_linen
      >>> model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True), nn.relu])
      >>> x = jnp.ones((1, 2))
      >>> propose_linen(model, model.init(jax.random.key(0), x), x)
      {'layers_1': 'layers_0'}
    """
    return propose(_trace(model, variables, batch, call))


def fold_linen(
    model: nn.Module,
    variables: Variables,
    batch: object,
    *,
    call: CallLinen | None = None,
    pairs: Mapping[str, str] | None = None,
    tolerance: float | None = None,
) -> tuple[dict[str, Any], Pairs]:
    """Folds the batch norms of a Linen model into the layers beside them.

    The returned variables are those of the same model without these norms, and with a bias in each layer that
    they were folded into. `apply_folded` runs the model with them. A model that is written without these norms
    takes them as they are. The outputs for `batch` are compared before and after, so it should be real data.

    Args:
      model: any module; its code stays as it is.
      variables: its variables, trained; not changed. They may be stacked, as by `nn.scan` along axis 0,
        and boxed; a bias that was not there is not boxed.
      batch: one batch, as `call` takes it.
      call: `call(apply, batch)` evaluates the model by `apply(...)`, which is `model.apply` with the variables
        given: `lambda apply, x: apply(x, train=False)`. By default `apply(batch)`. It is compiled by jax.jit.
      pairs: `{norm: layer}`, which norms to fold into which layers, whether the norm is before or after its
        layer. By default what `propose_linen` finds.
      tolerance: the largest difference allowed, relative to the largest output; by default the square
        root of the precision of the folded layers' outputs: 3.5e-4 for float32, 0.09 for bfloat16.

    Returns:
      New variables, without statistics and parameters of the folded norms, and the pairs, which have
      `unfolded` like those of `propose_linen`.

    Raises:
      ValueError: no norm can be folded; a path in `pairs` is not that of a batch norm, or of a layer, or the
        class of one has a `__call__` of its own; a norm is not in evaluation, has several domains, or has its
        channels on another axis than the last; the outputs differ; or as `fold_batch_norm`.
      TypeError: as `propose_linen` or `fold_batch_norm`.

    Source: Jacob et al. (2018), arXiv:1712.05877, section 3.2.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn
      >>> from jaxbn.fold import apply_folded, fold_linen
      >>> model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True), nn.relu])
      >>> x = jnp.ones((1, 2))
      >>> variables, pairs = fold_linen(model, model.init(jax.random.key(0), x), x)
      >>> jax.tree.map(jnp.shape, variables)
      {'params': {'layers_0': {'bias': (3,), 'kernel': (2, 3)}}}
      >>> apply_folded(model, pairs, variables, x).shape
      (1, 3)
    """
    trace = _trace(model, variables, batch, call)
    chosen = choose(trace, pairs)

    def run(folded: Variables, pairs: Mapping[str, str]) -> object:
        with _without_norms(pairs):
            return jax.jit(functools.partial(evaluate_linen, model, call=call))(folded, batch)

    return fold_checked(trace, chosen, tolerance, functools.partial(_fold, trace, variables), run), chosen


def apply_folded(
    model: nn.Module, pairs: Mapping[str, str], variables: Variables, *inputs: object, **kwargs: Any
) -> Any:
    """`model.apply(variables, *inputs, **kwargs)` with variables and pairs that `fold_linen` returned.

    The norms in `pairs` return their input, cast to the dtype of their result. The layers add the bias that
    they have in `variables`, also with `use_bias=False`. Under `jax.jit`:
    `jax.jit(functools.partial(apply_folded, model, pairs))`.

    Args:
      model: as it was given to `fold_linen`; its code need not be changed.
      pairs: as `fold_linen` returned them: a dict of strings, which can be stored as JSON beside the variables.
      variables, *inputs, **kwargs: as for `model.apply`, in evaluation.

    Returns:
      What `model.apply` returns.

    Raises:
      ValueError: the variables are not folded: they have statistics of a norm in `pairs`, or no bias for
        its layer.

    Source: flax.linen.intercept_methods.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn
      >>> from jaxbn.fold import apply_folded
      >>> model = nn.Sequential([nn.Dense(1, use_bias=False), nn.BatchNorm(use_running_average=True)])
      >>> variables = {"params": {"layers_0": {"kernel": jnp.ones((2, 1)), "bias": jnp.ones(1)}}}
      >>> apply_folded(model, {"layers_1": "layers_0"}, variables, jnp.ones((1, 2))).tolist()
      [[3.0]]
    """
    flat = flatten_dict(variables)
    wrong = [f"statistics of {norm}" for norm in pairs if "mean" in _variables_of(norm, flat)]
    wrong += [f"no bias of {layer}" for layer in pairs.values() if "bias" not in _variables_of(layer, flat)]
    if wrong:
        raise ValueError(f"variables: expected those that fold_linen returns, got {', '.join(wrong)}")
    with _without_norms(pairs):
        return model.apply(variables, *inputs, **kwargs)


def _without_norms(pairs: Mapping[str, str]) -> contextlib.AbstractContextManager[None]:
    """While it lasts, the norms in `pairs` return their input and their layers add the bias in the variables."""
    layers = set(pairs.values())

    def intercept(function: Function, args: Args, kwargs: Kwargs, context: nn.module.InterceptorContext) -> object:
        module, path = context.module, path_of(context.module.path)
        if context.method_name != "__call__":
            return function(*args, **kwargs)
        if path in pairs and isinstance(module, nn.BatchNorm):
            x = args[0] if args else kwargs["x"]
            affine = [jnp.zeros((), module.param_dtype)] * (module.use_scale or module.use_bias)
            return x.astype(canonicalize_dtype(x, *affine, dtype=module.dtype))
        y = function(*args, **kwargs)
        if path in layers and isinstance(module, _LAYERS) and not module.use_bias:
            bias = unbox(module.get_variable("params", "bias"))
            y = y + jnp.expand_dims(bias.astype(y.dtype), tuple(range(y.ndim - 1)))
        return y

    return nn.intercept_methods(intercept)


def _trace(model: nn.Module, variables: Variables, batch: object, call: CallLinen | None) -> Trace:
    trace = Trace(_LAYERS, (nn.BatchNorm,))

    def run(variables: Variables, batch: object) -> object:
        flat = flatten_dict(variables)

        def intercept(function: Function, args: Args, kwargs: Kwargs, context: nn.module.InterceptorContext) -> object:
            module, path = context.module, path_of(context.module.path)
            if context.method_name != "__call__" or not isinstance(module, (*_LAYERS, nn.BatchNorm)):
                return function(*args, **kwargs)
            read: dict[str, jax.Array] = {}
            for name, collection in _COLLECTIONS.items():
                if module.has_variable(collection, name):
                    read[name] = unbox(module.get_variable(collection, name))
            stored = unbox(_variables_of(path, flat))
            return trace.record(path, module, type(module), function, args, kwargs, read, stored)

        with nn.intercept_methods(intercept):
            return evaluate_linen(model, variables, batch, call)

    trace.run(run, variables, batch)
    return trace


def _fold(trace: Trace, variables: Variables, pairs: Mapping[str, str]) -> dict[str, Any]:
    flat = flatten_dict(variables, keep_empty_nodes=True)
    for norm, layer in pairs.items():
        boxed = _variables_of(layer, flat)
        for name, value in fold_pair(trace, norm, layer, unbox(_variables_of(norm, flat)), unbox(boxed)).items():
            old = boxed.get(name)
            flat["params", *_keys(layer), name] = old.replace_boxed(value) if isinstance(old, AxisMetadata) else value
        removed = [(collection, *_keys(norm)) for collection in ("params", "batch_stats")]
        flat = {keys: v for keys, v in flat.items() if keys[: len(removed[0])] not in removed}
    return unflatten_dict(flat)


def _variables_of(path: str, flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """What a module has of the variables that folding reads."""
    places = {name: (collection, *_keys(path), name) for name, collection in _COLLECTIONS.items()}
    return {name: flat[keys] for name, keys in places.items() if keys in flat}


def _keys(path: str) -> tuple[str, ...]:
    return tuple(path.split("/")) if path else ()
