"""Folding the batch norms of a Linen model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import unfreeze
from flax.core.meta import AxisMetadata, unbox
from flax.linen.dtypes import canonicalize_dtype

from jaxbn._norms.state import BatchNormParams, BatchNormState
from jaxbn.fold._trace import Pairs, Trace, check_same

_LAYERS = (nn.Dense, nn.Conv, nn.ConvTranspose)


def propose_linen(model: nn.Module, variables: Any, *inputs: Any, **kwargs: Any) -> Pairs:
    """Finds the batch norms of a model that can be folded, and the layers that they fold into.

    The model is traced, not run: a norm is paired with the `Dense`, `Conv` or `ConvTranspose` whose output
    is its input and goes nowhere else, and failing that with the one that takes its output alone, unless
    that layer pads with zeros. A layer or norm that is called several times must have the same partner
    in all calls. A layer must be of Flax's own class; a norm may be of a derived one, as long as its
    `__call__` is that of Flax or jaxbn.

    Args:
      model, variables, *inputs, **kwargs: as in `model.apply(variables, *inputs, **kwargs)`, in evaluation.

    Returns:
      `{norm: layer}`, both as paths of modules: `"Block_0/BatchNorm_1"`. Its attribute `unfolded` says of
      each other norm why it stays: `{norm: reason}`.

    Source: torch.ao.quantization.fuse_modules, which leaves finding them to its caller.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn
      >>> from jaxbn.fold import propose_linen
      >>> model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True), nn.relu])
      >>> x = jnp.ones((1, 2))
      >>> propose_linen(model, model.init(jax.random.key(0), x), x)
      {'layers_1': 'layers_0'}
    """
    return _trace(model, variables, inputs, kwargs).propose()


def fold_linen(
    model: nn.Module,
    variables: Any,
    *inputs: Any,
    pairs: Mapping[str, str] | None = None,
    tolerance: float | None = None,
    **kwargs: Any,
) -> tuple[dict[str, Any], Pairs]:
    """Folds the batch norms of a Linen model into the layers beside them.

    The returned variables are those of the same model without these norms and with a bias in each layer
    that they were folded into: `apply_folded` runs the model so, and a model that is written so takes
    them as they are. The outputs for `inputs` are compared with those of the unfolded model, and so these
    should be real examples.

    Args:
      model: any module; its code stays as it is.
      variables: its variables, trained; not changed. They may be stacked, as by `nn.scan` along axis 0,
        and boxed; a bias that was not there is not boxed.
      *inputs, **kwargs: as in `model.apply(variables, *inputs, **kwargs)`, in evaluation.
      pairs: `{norm: layer}`, which norms to fold into which layers; whether a norm is before or after its
        layer is seen. By default what `propose_linen` finds.
      tolerance: the largest difference allowed, relative to the largest output; by default the square
        root of the precision of the folded layers' outputs: 3.5e-4 for float32, 0.09 for bfloat16.

    Returns:
      The variables without statistics and parameters of the folded norms, and the pairs, which have
      `unfolded` as those of `propose_linen`.

    Raises:
      ValueError: no norm can be folded; a path in `pairs` is not that of a batch norm, or of a layer, or
        one whose class has a `__call__` of its own; a norm does not evaluate, has several domains, or
        other than the last axis; the outputs differ; or as `fold_batch_norm`.
      TypeError: as `fold_batch_norm`.

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
    trace = _trace(model, variables, inputs, kwargs)
    chosen = trace.checked(pairs)

    def run_folded(pairs: dict[str, str]) -> Any:
        return jax.jit(lambda v: apply_folded(model, pairs, v, *inputs, **kwargs))(_fold(trace, variables, pairs))

    expected = jax.jit(lambda v: model.apply(v, *inputs, **kwargs))(variables)
    check_same(trace, chosen, tolerance, expected, run_folded)
    return _fold(trace, variables, chosen), chosen


def apply_folded(model: nn.Module, pairs: Mapping[str, str], variables: Any, *inputs: Any, **kwargs: Any) -> Any:
    """`model.apply(variables, *inputs, **kwargs)` with variables and pairs that `fold_linen` returned.

    The norms in `pairs` return what they are given, in the dtype of their result, and the layers add the
    bias that they have in `variables`, with `use_bias=False` too. For `jax.jit`:
    `jax.jit(functools.partial(apply_folded, model, pairs))`.

    Args:
      model: as it was given to `fold_linen`; its code need not be changed.
      pairs: as `fold_linen` returned them; a dict of strings, which JSON can keep beside the variables.
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
    wrong = [f"statistics of {norm}" for norm in pairs if _find(variables, "batch_stats", norm)]
    wrong += [f"no bias of {path}" for path in pairs.values() if "bias" not in _find(variables, "params", path)]
    if wrong:
        raise ValueError(f"variables: expected those that fold_linen returns, got {', '.join(wrong)}")
    layers = set(pairs.values())

    def intercept(function: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module, path = context.module, "/".join(context.module.path)
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

    with nn.intercept_methods(intercept):
        return model.apply(variables, *inputs, **kwargs)


def _trace(model: nn.Module, variables: Any, inputs: tuple[Any, ...], kwargs: Any) -> Trace:
    trace = Trace(_LAYERS, (nn.BatchNorm,))

    def intercept(function: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, (*_LAYERS, nn.BatchNorm)):
            return function(*args, **kwargs)
        return trace.call("/".join(module.path), module, type(module), function, args, kwargs)

    def run(variables: Any) -> Any:
        with nn.intercept_methods(intercept):
            return model.apply(variables, *inputs, **kwargs)

    trace.run(run, variables)
    return trace


def _fold(trace: Trace, variables: Any, pairs: dict[str, str]) -> dict[str, Any]:
    folded: dict[str, Any] = jax.tree.map(lambda v: v, unfreeze(variables))
    for norm, layer in pairs.items():
        affine, stats = (_find(folded, collection, norm) for collection in ("params", "batch_stats"))
        own = _find(folded, "params", layer)
        kernel, bias = (unbox(own.get(name)) for name in ("kernel", "bias"))
        scale, norm_bias = (unbox(affine.get(name)) for name in ("scale", "bias"))
        mean, var = (unbox(stats[name]) for name in ("mean", "var"))
        state = BatchNormState(mean, var, jnp.zeros((), jnp.int32))
        arrays = trace.fold((norm, layer), kernel, bias, BatchNormParams(scale, norm_bias), state)
        for name, value in zip(("kernel", "bias"), arrays, strict=True):
            old = own.get(name)
            own[name] = old.replace_boxed(value) if isinstance(old, AxisMetadata) else value
        for collection in ("params", "batch_stats"):
            _remove(folded, [collection, *_parts(norm)])
    return folded


def _parts(path: str) -> list[str]:
    return path.split("/") if path else []


def _find(variables: Any, collection: str, path: str) -> Any:
    """What a collection has for a module, if anything."""
    return functools.reduce(lambda tree, part: tree.get(part, {}), [collection, *_parts(path)], variables)


def _remove(tree: dict[str, Any], parts: list[str]) -> None:
    """Removes a subtree, and what is empty without it."""
    if parts[0] in tree:
        if parts[1:]:
            _remove(tree[parts[0]], parts[1:])
        if not parts[1:] or not tree[parts[0]]:
            del tree[parts[0]]
