"""Folding the batch norms of an NNX model."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx

from jaxbn._norms.state import BatchNormParams, BatchNormState
from jaxbn._observe.run import run_nnx, suggest_call
from jaxbn._observe.watch import watch_nnx
from jaxbn._versions import get_raw_value, get_value, iter_modules, set_value
from jaxbn.fold._arrays import fold_pair
from jaxbn.fold._outputs import check_same_outputs
from jaxbn.fold._pairs import Pairs, choose, propose
from jaxbn.fold._trace import Trace, Variable

_LAYERS = (nnx.Linear, nnx.Conv, nnx.ConvTranspose)

# call(model, batch)
_CallNnx = Callable[[Any, Any], Any]
_Model = TypeVar("_Model", bound=nnx.Module)


class Identity(nnx.Module):
    """Takes the place of a batch norm that `fold_nnx` has folded: accepts its arguments and returns its input.

    Formula: `y = x`, cast to `dtype`.

    Args:
      dtype: of the result, which is the norm's; None for that of x.

    Source: torch.nn.Identity.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxbn.fold import Identity
      >>> Identity()(jnp.ones(2), use_running_average=True).tolist()
      [1.0, 1.0]
    """

    def __init__(self, dtype: Any = None):
        self.dtype = dtype

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """Returns `x`."""
        return x if self.dtype is None else x.astype(self.dtype)


def propose_nnx(model: nnx.Module, batch: Any, *, call: _CallNnx | None = None) -> Pairs:
    """Finds the batch norms of a model that can be folded, and the layers that they fold into.

    As `propose_linen`, with `flax.nnx.Linear`, `Conv` and `ConvTranspose`. A layer that shares a variable
    with another module is left alone. Only what `call` runs is seen: if another method of the model calls a
    norm or its layer too, pass `pairs` without them.

    Args:
      model: the module. It is not changed: a copy of it is traced, after `copy.eval()`.
      batch: one batch, as `call` takes it.
      call: `call(model, batch)` evaluates the model: `lambda model, batch: model(batch["image"])`. By default
        `model(batch)`. It is traced by JAX.

    Returns:
      `{norm: layer}`, both as paths in the model: `"blocks/0/norm"`, with `unfolded` as in `propose_linen`.

    Raises:
      TypeError: as `propose_linen`.

    Source: torch.ao.quantization.fuse_modules, where the caller names the modules.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxbn.fold import propose_nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs), nnx.relu)
      >>> propose_nnx(model, jnp.ones((1, 2)))
      {'layers/1': 'layers/0'}
    """
    return propose(_trace(_evaluating(model), batch, call))


def fold_nnx(
    model: _Model,
    batch: Any,
    *,
    call: _CallNnx | None = None,
    pairs: Mapping[str, str] | None = None,
    tolerance: float | None = None,
) -> _Model:
    """Returns a copy of an NNX model with its batch norms folded into the layers beside them.

    In the copy each folded norm is an `Identity`, and each layer that a norm was folded into has a bias. The
    outputs for `batch` are compared with those of the model, so it should be real data.

    Args:
      model: any module, trained; not changed. Its variables may be stacked, as by `nnx.vmap` along axis 0.
      batch: one batch, as `call` takes it.
      call: `call(model, batch)` evaluates the model: `lambda model, batch: model(batch["image"])`. By default
        `model(batch)`. It is compiled by nnx.jit, and gets copies of the model in evaluation mode.
      pairs: `{norm: layer}`, which norms to fold into which layers, whether the norm is before or after its
        layer. By default what `propose_nnx` finds.
      tolerance: the largest difference allowed, relative to the largest output; by default the square
        root of the precision of the folded layers' outputs: 3.5e-4 for float32, 0.09 for bfloat16.

    Returns:
      A new model, in evaluation mode. Kernels and biases keep dtype and metadata; a bias that was not
      there is a plain `nnx.Param` in the kernel's dtype. `propose_nnx(...).unfolded` says why norms stay.

    Raises:
      TypeError, ValueError: as `fold_linen`; also if another module shares a variable with the layer of a pair.

    Source: torch.nn.utils.fusion.fuse_conv_bn_eval.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxbn.fold import fold_nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs), nnx.relu)
      >>> folded = fold_nnx(model, jnp.ones((1, 2)))
      >>> type(folded.layers[1]).__name__, folded(jnp.ones((1, 2))).shape
      ('Identity', (1, 3))
    """
    original = _evaluating(model)
    trace = _trace(nnx.clone(original), batch, call)
    chosen = choose(trace, pairs)

    def run(model: nnx.Module) -> Any:
        return nnx.jit(lambda model, batch: _evaluate(model, batch, call))(model, batch)

    expected = run(nnx.clone(original))
    check_same_outputs(trace, chosen, tolerance, expected, lambda pairs: run(_folded_copy(trace, original, pairs)))
    return _folded_copy(trace, original, chosen)


def _evaluating(model: _Model) -> _Model:
    copy: Any = nnx.clone(model)
    copy.eval()
    return cast(_Model, copy)


def _modules(model: nnx.Module) -> dict[str, Any]:
    return {"/".join(map(str, path)): module for path, module in iter_modules(model)}


def _evaluate(model: Any, batch: Any, call: _CallNnx | None) -> Any:
    with suggest_call(batch, call, "model", "batch"):
        return run_nnx(model, batch, call, None)[0]


def _trace(model: nnx.Module, batch: Any, call: _CallNnx | None) -> Trace:
    """Traces a model, whose layers and norms are changed so that they report their calls."""
    trace = Trace(_LAYERS, (nnx.BatchNorm,), _shared(model))
    modules = {path: m for path, m in _modules(model).items() if isinstance(m, (*_LAYERS, nnx.BatchNorm))}
    stored: dict[str, dict[str, Any]] = {}

    def handle(path: str, module: Any, cls: type, run: Any, args: Any, kwargs: Any) -> Any:
        read = {name: Variable(get_value(v), stored[path].get(name)) for name, v in _variables(module).items()}
        return trace.call(path, module, cls, run, args, kwargs, read)

    def run(variables: Any, batch: Any) -> Any:
        copy = nnx.merge(graphdef, variables)
        for path, module in _modules(copy).items():
            stored[path] = {name: get_raw_value(v) for name, v in _variables(module).items()}
        return _evaluate(copy, batch, call)

    with watch_nnx(modules, handle):
        graphdef, variables = nnx.split(model)
        trace.run(run, variables, batch)
    return trace


def _variables(module: Any) -> dict[str, Any]:
    return {name: v for name, v in vars(module).items() if isinstance(v, nnx.Variable)}


def _shared(model: nnx.Module) -> dict[str, str]:
    """For each layer that shares a variable, the other modules that hold it."""
    holders: dict[int, dict[str, Any]] = collections.defaultdict(dict)
    nodes = {"/".join(map(str, path)): node for path, node in nnx.iter_graph(model)}
    for path, node in nodes.items():
        for child in _children(node):
            if isinstance(child, nnx.Variable):
                holders[id(child)][path] = node
    return {
        path: " and ".join(other or "the model itself" for other in held if other != path)
        for held in holders.values()
        if len(held) > 1
        for path, node in held.items()
        if isinstance(node, _LAYERS)
    }


def _children(node: Any) -> Iterable[Any]:
    if isinstance(node, Mapping):
        return node.values()
    return node if isinstance(node, list | tuple) else getattr(node, "__dict__", {}).values()


def _folded_copy(trace: Trace, model: _Model, pairs: dict[str, str]) -> _Model:
    folded = nnx.clone(model)
    modules = _modules(folded)
    for pair in pairs.items():
        norm, layer = (modules[path] for path in pair)
        bias, scale, norm_bias = (None if v is None else v[...] for v in (layer.bias, norm.scale, norm.bias))
        state = BatchNormState(norm.mean[...], norm.var[...], jnp.zeros((), jnp.int32))
        kernel, new_bias = fold_pair(trace, pair, layer.kernel[...], bias, BatchNormParams(scale, norm_bias), state)
        set_value(layer.kernel, kernel)
        if layer.bias is None:
            layer.bias, layer.use_bias = nnx.Param(new_bias), True
        else:
            set_value(layer.bias, new_bias)
    for path in pairs:
        _become_identity(modules[path], trace.calls[path].dtype)
    return folded


def _become_identity(norm: Any, dtype: Any) -> None:
    """Turns a norm into an `Identity` in place, so that all modules that refer to it have the `Identity`."""
    for name in [name for name in vars(norm) if not name.startswith("_pytree")]:
        delattr(norm, name)
    object.__setattr__(norm, "__class__", Identity)
    norm.dtype = dtype
