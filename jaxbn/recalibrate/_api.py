"""The three functions that measure running statistics anew: for functions, Linen and NNX."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp

from jaxbn._extras import needs_flax
from jaxbn._kernel.moments import Moments
from jaxbn._norms.running_statistics import check_correction
from jaxbn._norms.state import BatchNormState
from jaxbn._paths import name_of
from jaxbn._versions import get_value, set_value
from jaxbn.recalibrate._sweeps import Measured, States, sweep_until_done

if TYPE_CHECKING:
    import flax.linen as nn
    from flax import nnx

    from jaxbn._observe.calls import CallLinen, Variables

_States = TypeVar("_States")
_Model = TypeVar("_Model", bound="nnx.Module")


def recalibrate(
    measure: Callable[[_States, Any], object],
    states: _States,
    batches: Iterable[object],
    *,
    method: str = "layerwise",
    correction: float = 1,
    progress: bool = False,
) -> _States:
    """Measures running statistics anew, for a network made of functions.

    Formula: for each state `mean = sum(x) / n`, `var = sum((x - mean)**2) / (n - correction)` over the n values
    per channel that enter its norm in all batches; the module explains the methods.

    Args:
      measure: `measure(states, batch)` returns a tree like `states` with the `jaxbn.Moments` of what enters
        each norm. For "layerwise" it must normalize by the states that it is given (`batch_norm_eval`), for
        "batchwise" by the batch's own moments (`batch_norm_train`, or `batch_norm_eval` without a state).
        It is compiled by jax.jit; if the same function is passed again it is not compiled again. Inside of it
        `jax.shard_map` may measure over devices (`jaxbn.moments(..., axis_name=...)`).
      states: a `BatchNormState`, or a tree of them.
      batches: an iterable of trees of arrays (JAX, NumPy, PyTorch) and of JAX's random keys; for "layerwise"
        one that can be iterated several times.
      method: "layerwise", which takes as many passes as there are norms, or fewer, or "batchwise", which takes one. A
        state that is stacked for `jax.lax.scan` belongs to as many norms as the loop has layers.
      correction: subtracted from the count for the stored variance: 1 unbiased, 0 biased.
      progress: show a progress bar (tqdm), if there is a terminal.

    Returns:
      New states, in the dtypes of the old ones. `num_batches_tracked` is the number of batches with a value
      that counts. A channel without such a value keeps its mean and variance, one with a single value keeps its
      variance.

    Raises:
      ValueError: there are no batches, or another number of them in a later sweep; moments have other shapes than
        the states; a result is not finite; `method` or `correction` is out of range.
      TypeError: `batches` cannot be iterated, or only once where several times are needed; `states` or what
        `measure` returns has another type.
      ImportError: `progress` without tqdm.

    Source: Izmailov et al. (2018), arXiv:1803.05407; Wu & Johnson (2021), arXiv:2105.07576, section 3, and
    fvcore.nn.precise_bn.

    Example:
      >>> import jax.numpy as jnp, jaxbn
      >>> from jaxbn.recalibrate import recalibrate
      >>> _, state = jaxbn.batch_norm_init(1)
      >>> batches = [jnp.array([[0.0], [2.0], [4.0]]), jnp.array([[10.0]])]
      >>> state = recalibrate(lambda state, x: jaxbn.moments(2 * x), state, batches)
      >>> state.mean.tolist(), state.var.round(3).tolist(), int(state.num_batches_tracked)
      ([8.0], [74.66699981689453], 2)
    """
    correction = check_correction(correction)
    structure: Any
    leaves, structure = jax.tree.flatten_with_path(states, is_leaf=lambda v: isinstance(v, BatchNormState))
    wrong = {type(v).__name__ for _, v in leaves if not isinstance(v, BatchNormState)}
    if wrong or not leaves:
        got = ", ".join(sorted(wrong)) or "an empty tree"
        # What a checkpoint makes of a NamedTuple if it is restored without a target.
        is_dict = any(getattr(path[-1], "key", None) in BatchNormState._fields for path, _ in leaves if path)
        cure = "make it of each restored dictionary: BatchNormState(**state)" if is_dict else "see batch_norm_init"
        raise TypeError(f"states: expected a jaxbn.BatchNormState or a tree of them, got {got}; {cure}")
    named: States = {f"states{jax.tree_util.keystr(path)}": state for path, state in leaves}
    compiled = jax.jit(measure)

    def step(states: States, batch: object) -> dict[str, Measured]:
        result = compiled(jax.tree.unflatten(structure, list(states.values())), batch)
        found, other = jax.tree.flatten(result, is_leaf=lambda v: isinstance(v, Moments))
        if other != structure or not all(isinstance(m, Moments) for m in found):
            raise TypeError(
                f"measure: expected a tree like states with jaxbn.Moments in place of each, {structure}, got {other}"
            )
        misfits = [
            f"{name} {jnp.shape(m.mean)} for {state.mean.shape}"
            for (name, state), m in zip(states.items(), found, strict=True)
            if jnp.shape(m.mean) != state.mean.shape
        ]
        if misfits:
            raise ValueError(
                f"measure: expected moments of the shapes of the states, got {', '.join(misfits)}; measure along the "
                "norm's feature axes"
            )
        return {name: Measured(m, 1, correction) for name, m in zip(states, found, strict=True)}

    new = sweep_until_done(step, named, batches, method=method, progress=progress)
    result: _States = jax.tree.unflatten(structure, list(new.values()))
    return result


def recalibrate_linen(
    model: nn.Module,
    variables: Variables,
    batches: Iterable[object],
    *,
    method: str = "layerwise",
    call: CallLinen | None = None,
    progress: bool = False,
) -> Any:
    """Measures the running statistics of a Linen model anew.

    The layers are all `BatchNorm` of Flax and jaxbn, with `BatchRenorm` and other subclasses, also under `nn.scan`,
    `nn.vmap`, `nn.remat` and `nn.jit`. They never train here, whatever the model tells them; what else differs in
    train mode, such as dropout, is up to `call`. Under `nn.scan` with batch_stats in `variable_broadcast` nothing can
    leave the loop: say `variable_carry="batch_stats"` instead, which takes the same variables.

    Formula: that of `recalibrate`; `correction` is that of the layer, 0 for Flax's.

    Args:
      model: the module.
      variables: its variables; not changed.
      batches: as in `recalibrate`.
      method: "layerwise", which takes as many passes over the data as there are norms, or fewer, or "batchwise", which
        takes one and is the better choice for deep networks and batches as large as in training; see the module.
      call: `call(apply, batch)` evaluates the model on a batch, where `apply` is `model.apply` with the variables
        given; by default `apply(batch)`. For a model that takes `train`: `call=lambda apply, x: apply(x, train=False)`.
        It is compiled by jax.jit; if the same function is passed again it is not compiled again.
      progress: show a progress bar (tqdm), if there is a terminal.

    Returns:
      New variables. All arrays are those that were passed, except `mean`, `var` and, where there is one,
      `num_batches_tracked` of the layers that were called.

    Raises:
      ValueError: as `recalibrate`; or there are no running statistics, or no layer is called, or the statistics of
        one that is called several times do not converge, or `nn.scan` broadcasts batch_stats.
      TypeError: as `recalibrate`; or a subclass does not call its base class; or there is no `call`, and the model
        fails on batches that are tuples, lists or dictionaries.
      ImportError: as `recalibrate`; or Flax is not installed.

    Source: as `recalibrate`.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from jaxbn.recalibrate import recalibrate_linen
      >>> model = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True)])
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> variables = model.init(jax.random.key(1), x)
      >>> variables = recalibrate_linen(model, variables, [x[:6], x[6:]])
      >>> y = model.apply(variables, x)
      >>> bool(abs(y.mean(0)).max() < 1e-6), bool(abs(y.var(0) - 1).max() < 1e-3)
      (True, True)
    """
    with needs_flax("jaxbn.recalibrate.recalibrate_linen"):
        from flax.core import FrozenDict, freeze

        from jaxbn._observe import calls, run
        from jaxbn.recalibrate import _flax_step

    flat = calls.flatten_dict(variables.get("batch_stats", {}))
    layers = [path[:-1] for path in flat if path[-1] == "mean" and (*path[:-1], "var") in flat]
    paths = {name_of(path): path for path in layers}
    _check_some(paths, "variables: expected a collection batch_stats with mean and var of a BatchNorm")
    old = {name: _state(flat.get((*path, entry)) for entry in _ENTRIES) for name, path in paths.items()}
    compiled = run.cached(_flax_step.linen_step, model, call, method)

    def with_states(states: States) -> dict[str, Any]:
        entries = {(*paths[name], entry): v for name, s in states.items() for entry, v in s._asdict().items()}
        stats = calls.unflatten_dict({path: entries.get(path, v) for path, v in flat.items()})
        return {**variables, "batch_stats": stats}

    def step(states: States, batch: object) -> dict[str, Measured]:
        return compiled(with_states(states), batch)

    result = with_states(sweep_until_done(step, old, batches, method=method, progress=progress))
    return freeze(result) if isinstance(variables, FrozenDict) else result


def recalibrate_nnx(
    model: _Model,
    batches: Iterable[object],
    *,
    method: str = "layerwise",
    call: Callable[[_Model, Any], object] | None = None,
    progress: bool = False,
) -> _Model:
    """Measures the running statistics of an NNX model anew, sets them in the model, and returns the model.

    The layers are as in `recalibrate_linen`, also under NNX's transformations; and under JAX's, where variables hold
    references (`nnx.var_defaults(ref=True)`). Flax's `scan` and `remat` carry no change of a reference out, here and
    in training, unless they are given `graph_updates=False`.

    Formula: that of `recalibrate`; `correction` is that of the layer, 0 for Flax's.

    Args:
      model: the module. Batches run through copies of it. Its layers get the new statistics at the end; after an
        exception it is as it was.
      batches: as in `recalibrate`.
      method: "layerwise", which takes as many passes over the data as there are norms, or fewer, or "batchwise", which
        takes one and is the better choice for deep networks and batches as large as in training; see the module.
      call: `call(model, batch)` evaluates the model on a batch, where `model` is a copy; by default `model(batch)`.
        For dropout to be off, call `model.eval()` before this or in it. It is compiled by jax.jit; if the same function
        is passed again it is not compiled again.
      progress: show a progress bar (tqdm), if there is a terminal.

    Returns:
      The model: the same object.

    Raises:
      ValueError: as `recalibrate`; or the model has no batch norm layer, or none is called, or the statistics of one
        that is called several times do not converge.
      TypeError, ImportError: as `recalibrate_linen`.

    Source: as `recalibrate`.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from jaxbn.recalibrate import recalibrate_nnx
      >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> model = recalibrate_nnx(model, [x[:6], x[6:]])
      >>> model.eval()
      >>> y = model(x)
      >>> bool(abs(y.mean(0)).max() < 1e-6), bool(abs(y.var(0) - 1).max() < 1e-3)
      (True, True)
    """
    with needs_flax("jaxbn.recalibrate.recalibrate_nnx"):
        from flax import nnx

        from jaxbn._observe import calls, run
        from jaxbn.recalibrate import _flax_step

    layers = calls.nnx_layers(model)
    _check_some(layers, "model: expected an NNX module with a BatchNorm of Flax or jaxbn")
    variables = {name: [getattr(layer, entry, None) for entry in _ENTRIES] for name, layer in layers.items()}
    old = {name: _state(None if v is None else get_value(v) for v in found) for name, found in variables.items()}
    graphdef, state = nnx.split(model)
    compiled = run.cached(_flax_step.nnx_step, graphdef, call, method)

    def step(states: States, batch: object) -> dict[str, Measured]:
        return compiled(state, states, batch)

    new = sweep_until_done(step, old, batches, method=method, progress=progress)
    for name, values in new.items():
        for variable, value in zip(variables[name], values, strict=True):
            if variable is not None:
                set_value(variable, value)
    return model


_ENTRIES = BatchNormState._fields


def _state(arrays: Iterable[Any]) -> BatchNormState:
    """A state of `mean`, `var` and `num_batches_tracked`, which may be None."""
    mean, var, tracked = arrays
    return BatchNormState(mean, var, jnp.zeros((), jnp.int32) if tracked is None else tracked)


def _check_some(names: Collection[str], expected: str) -> None:
    if not names:
        raise ValueError(f"{expected}, got none; pass all of the network, statistics included")
