"""Folding the batch norms of an NNX model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.typing import DTypeLike

from jaxbn._observe.calls import CallNNX
from jaxbn._observe.run import evaluate
from jaxbn._observe.watch import Args, Function, Kwargs, watch_nnx
from jaxbn._paths import path_of
from jaxbn._versions import get_raw_value, get_value, iter_modules, set_value
from jaxbn.fold._fold import fold_checked, fold_pair
from jaxbn.fold._pairs import Pairs, choose, propose
from jaxbn.fold._trace import Trace

_LAYERS = (nnx.Linear, nnx.Conv, nnx.ConvTranspose)
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

    def __init__(self, dtype: DTypeLike | None = None):
        self.dtype = dtype

    def __call__(self, x: jax.Array, *args: object, **kwargs: object) -> jax.Array:
        """Returns `x`."""
        return x if self.dtype is None else x.astype(self.dtype)


def propose_nnx(model: nnx.Module, batch: object, *, call: CallNNX | None = None) -> Pairs:
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
    return propose(_trace(model, batch, call))


def fold_nnx(
    model: _Model,
    batch: object,
    *,
    call: CallNNX | None = None,
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
        `model(batch)`. It is compiled by jax.jit, and gets copies of the model in evaluation mode.
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
    trace = _trace(model, batch, call)
    chosen = choose(trace, pairs)

    def run(folded: _Model, _: Mapping[str, str]) -> object:
        graphdef, state = nnx.split(folded)

        def run(state: object, batch: object) -> object:
            # A copy: references in `state` are those of the model that is returned.
            return evaluate(nnx.merge(graphdef, state, copy=True), batch, call)

        return jax.jit(run)(state, batch)

    return fold_checked(trace, chosen, tolerance, functools.partial(_fold, trace, model), run)


def _evaluating(model: _Model) -> _Model:
    copy = nnx.clone(model)
    copy.eval()  # type: ignore[no-untyped-call]
    return copy


def _modules(model: nnx.Module) -> dict[str, Any]:
    """The layers and norms of a model, by the first path that leads to each."""
    classes = (*_LAYERS, nnx.BatchNorm)
    return {path_of(path): m for path, m in iter_modules(model) if isinstance(m, classes)}


def _values(module: nnx.Module, read: Callable[[nnx.Variable[Any]], jax.Array] = get_value) -> dict[str, jax.Array]:
    """What is read of a module's variables, by their names."""
    return {name: read(v) for name, v in vars(module).items() if isinstance(v, nnx.Variable)}


def _trace(model: nnx.Module, batch: object, call: CallNNX | None) -> Trace:
    """Traces a copy of a model, whose layers and norms are changed so that they report their calls."""
    model = _evaluating(model)
    trace = Trace(_LAYERS, (nnx.BatchNorm,), _shared(model))
    stored: dict[str, dict[str, jax.Array]] = {}

    def handle(path: str, module: nnx.Module, cls: type, run: Function, args: Args, kwargs: Kwargs) -> object:
        return trace.record(path, module, cls, run, args, kwargs, _values(module), stored[path])

    def run(variables: object, batch: object) -> object:
        copy = nnx.merge(graphdef, variables)
        for path, module in _modules(copy).items():
            stored[path] = _values(module, get_raw_value)
        return evaluate(copy, batch, call)

    with watch_nnx(_modules(model), handle):
        graphdef, variables = nnx.split(model)
        trace.run(run, variables, batch)
    return trace


def _shared(model: nnx.Module) -> dict[str, str]:
    """For each module that shares a variable, the other modules that hold it."""
    shared = {}
    for paths in nnx.find_duplicates(model, only=nnx.Variable):
        holders = {path_of(path[:-1]): None for path in paths}
        for holder in holders:
            if others := [other or "the model itself" for other in holders if other != holder]:
                shared[holder] = " and ".join(others)
    return shared


def _fold(trace: Trace, model: _Model, pairs: Mapping[str, str]) -> _Model:
    folded = _evaluating(model)
    modules = _modules(folded)
    for norm, layer in pairs.items():
        module = modules[layer]
        new = fold_pair(trace, norm, layer, _values(modules[norm]), _values(module))
        set_value(module.kernel, new["kernel"])
        if module.bias is None:
            module.bias, module.use_bias = nnx.Param(new["bias"]), True
        else:
            set_value(module.bias, new["bias"])
    for norm in pairs:
        # In place, so that all modules that refer to the norm have the `Identity`.
        module = modules[norm]
        for name in list(vars(module)):
            if not name.startswith("_pytree"):
                delattr(module, name)
        object.__setattr__(module, "__class__", Identity)
        module.dtype = trace.modules[norm].y.dtype
    return folded
