"""Folding the batch norms of an NNX model."""

from __future__ import annotations

import collections
import contextvars
import functools
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx

from jaxbn._norms.state import BatchNormParams, BatchNormState
from jaxbn.fold._trace import Pairs, Trace, check_same

_TRACE: contextvars.ContextVar[Trace] = contextvars.ContextVar("trace")
_NUMBERS = itertools.count()
_LAYERS = (nnx.Linear, nnx.Conv, nnx.ConvTranspose)

_Model = TypeVar("_Model", bound=nnx.Module)


class Identity(nnx.Module):
    """What `fold_nnx` leaves where a batch norm was: returns its input and takes a batch norm's arguments.

    Formula: `y = x`, cast to `dtype`.

    Args:
      dtype: that of the norm's result; None for that of x.

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


def propose_nnx(model: nnx.Module, *inputs: Any, **kwargs: Any) -> Pairs:
    """Finds the batch norms of a model that can be folded, and the layers that they fold into.

    As `propose_linen`, with `flax.nnx.Linear`, `Conv` and `ConvTranspose`. A layer that shares a variable
    with another module is left alone. Only what `__call__` does is seen: if another method calls a norm or
    its layer too, pass `pairs` without them.

    Args:
      model, *inputs, **kwargs: as in `model(*inputs, **kwargs)`. The model is not changed, and is traced
        as after `model.eval()`.

    Returns:
      `{norm: layer}`, both as paths in the model: `"blocks/0/norm"`, with `unfolded` as in `propose_linen`.

    Source: torch.ao.quantization.fuse_modules, which leaves finding them to its caller.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxbn.fold import propose_nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs), nnx.relu)
      >>> propose_nnx(model, jnp.ones((1, 2)))
      {'layers/1': 'layers/0'}
    """
    return _trace(_evaluating(model), inputs, kwargs).propose()


def fold_nnx(
    model: _Model,
    *inputs: Any,
    pairs: Mapping[str, str] | None = None,
    tolerance: float | None = None,
    **kwargs: Any,
) -> _Model:
    """Returns a copy of an NNX model with its batch norms folded into the layers beside them.

    In the copy each folded norm is an `Identity`, and each layer that has taken one up has a bias. The
    outputs for `inputs` are compared with those of the model, and so these should be real examples.

    Args:
      model: any module, trained; not changed. Its variables may be stacked, as by `nnx.vmap` along axis 0.
      *inputs, **kwargs: as in `model(*inputs, **kwargs)`.
      pairs: `{norm: layer}`, which norms to fold into which layers; whether a norm is before or after its
        layer is seen. By default what `propose_nnx` finds.
      tolerance: the largest difference allowed, relative to the largest output; by default the square
        root of the precision of the folded layers' outputs: 3.5e-4 for float32, 0.09 for bfloat16.

    Returns:
      The folded model, in evaluation mode. Kernels and biases keep dtype and metadata; a bias that was not
      there is a plain `nnx.Param` in the kernel's dtype.

    Raises:
      TypeError, ValueError: as `fold_linen`; also if another module has a variable of the layer in a pair.

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
    trace = _trace(nnx.clone(original), inputs, kwargs)
    chosen = trace.checked(pairs)

    def run(model: nnx.Module) -> Any:
        return nnx.jit(lambda model: model(*inputs, **kwargs))(model)

    check_same(trace, chosen, tolerance, run(original), lambda pairs: run(_fold(trace, original, pairs)))
    return _fold(trace, original, chosen)


def _evaluating(model: _Model) -> _Model:
    copy: Any = nnx.clone(model)
    copy.eval()
    return cast(_Model, copy)


def _modules(model: nnx.Module) -> dict[str, Any]:
    return {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}


def _trace(model: nnx.Module, inputs: tuple[Any, ...], kwargs: Any) -> Trace:
    """Traces a model, whose layers and norms it changes so that they report."""
    trace = Trace(_LAYERS, (nnx.BatchNorm,), _shared(model))
    # Otherwise what nnx.jit has cached within the model would not be traced again.
    number = next(_NUMBERS)
    for path, module in _modules(model).items():
        kind: Any = type(module)
        if issubclass(kind, (*_LAYERS, nnx.BatchNorm)):
            module._fold_path = (number, path)
            object.__setattr__(module, "__class__", _reporting(kind))
    graphdef, variables = nnx.split(model)
    token = _TRACE.set(trace)
    try:
        trace.run(lambda variables: nnx.merge(graphdef, variables)(*inputs, **kwargs), variables)
    finally:
        _TRACE.reset(token)
    return trace


def _shared(model: nnx.Module) -> dict[str, str]:
    """The layers that share a variable, and with whom."""
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


@functools.cache
def _reporting(kind: type) -> type:
    """A class whose calls a trace sees; NNX has no interceptors."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        function = functools.partial(kind.__call__, self)
        return _TRACE.get().call(self._fold_path[1], self, kind, function, args, kwargs)

    return type(kind)(kind.__name__, (kind,), {"__call__": call})


def _fold(trace: Trace, model: _Model, pairs: dict[str, str]) -> _Model:
    folded = nnx.clone(model)
    modules = _modules(folded)
    for pair in pairs.items():
        norm, layer = (modules[path] for path in pair)
        bias, scale, norm_bias = (None if v is None else v[...] for v in (layer.bias, norm.scale, norm.bias))
        state = BatchNormState(norm.mean[...], norm.var[...], jnp.zeros((), jnp.int32))
        kernel, new_bias = trace.fold(pair, layer.kernel[...], bias, BatchNormParams(scale, norm_bias), state)
        layer.kernel.set_value(kernel)
        if layer.bias is None:
            layer.bias, layer.use_bias = nnx.Param(new_bias), True
        else:
            layer.bias.set_value(new_bias)
    for path in pairs:
        _become_identity(modules[path], trace.calls[path].dtype)
    return folded


def _become_identity(norm: Any, dtype: Any) -> None:
    """The same object, so that all who refer to it have it."""
    for name in [name for name in vars(norm) if not name.startswith("_pytree")]:
        delattr(norm, name)
    object.__setattr__(norm, "__class__", Identity)
    norm.dtype = dtype
