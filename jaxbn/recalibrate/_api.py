"""The three functions that measure running statistics anew: of functions, Linen and NNX."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._kernel.moments import Moments
from jaxbn._norms.running_statistics import check_correction
from jaxbn._norms.state import BatchNormState
from jaxbn.recalibrate._sweeps import Measured, States, sweep_until_done


def recalibrate(
    measure: Callable[[Any, Any], Any],
    states: Any,
    batches: Iterable[Any],
    *,
    method: str = "layerwise",
    correction: float = 1,
    progress: bool = False,
) -> Any:
    """Measures running statistics anew, for a network made of functions.

    Formula: of each state `mean = sum(x) / n`, `var = sum((x - mean)**2) / (n - correction)` over the n values
    per channel that enter its norm in all batches, weights fixed; see the module for what `method` decides.

    Args:
      measure: `measure(states, batch)` returns a tree like `states` with the `jaxbn.Moments` of what enters
        each norm. For "layerwise" it must normalize by the states that it is given (`batch_norm_eval`), for
        "batchwise" by the batch's own moments (`batch_norm_train`, or `batch_norm_eval` without a state).
        It is compiled; inside of it `jax.shard_map` may measure over devices
        (`jaxbn.moments(..., axis_name=...)`). Pass the same function again and it is not compiled again.
      states: a `BatchNormState`, or a tree of them.
      batches: iterable of trees of arrays (JAX, NumPy, PyTorch) and of JAX's random keys; for "layerwise" one
        that can be gone through again.
      method: "layerwise" or "batchwise".
      correction: subtracted from the count for the stored variance: 1 unbiased, 0 biased.
      progress: show a progress bar (tqdm), if there is a terminal.

    Returns:
      New states, in the dtypes of the old; `num_batches_tracked` is the number of batches with a value
      that counts. A channel in which nothing counts keeps its mean and variance, one with a single value its
      variance.

    Raises:
      ValueError: no batches; another number of them in a later sweep; moments do not fit the states; a result
        is not finite; `method` or `correction` is out of range.
      TypeError: `batches` cannot be iterated, or only once; `states` or what `measure` returns is of
        another type.
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
        raise TypeError(f"states: expected a jaxbn.BatchNormState or a tree of them, got {got}; see batch_norm_init")
    named: States = {f"states{jax.tree_util.keystr(path)}": state for path, state in leaves}
    compiled = jax.jit(measure)

    def step(states: States, batch: Any) -> dict[str, Measured]:
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

    new, _ = sweep_until_done(step, named, batches, method=method, progress=progress)
    return jax.tree.unflatten(structure, list(new.values()))


def recalibrate_linen(
    model: Any,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    method: str = "layerwise",
    call: Callable[[Callable[..., Any], Any], Any] | None = None,
    progress: bool = False,
) -> Any:
    """Measures the running statistics of a Linen model anew.

    Of each `BatchNorm` of Flax or of jaxbn, `BatchRenorm` and subclasses included, also under `nn.scan`,
    `nn.vmap`, `nn.remat` and `nn.jit`. Where `nn.scan` has batch_stats in `variable_broadcast` nothing can leave
    the loop: say `variable_carry="batch_stats"` instead, which takes the same variables. Layers never train here,
    whatever the model tells them; what else train mode changes, such as dropout, is up to `call`.

    Formula: that of `recalibrate`; `correction` is that of the layer, 0 for Flax's.

    Args:
      model: the module.
      variables: its variables.
      batches: as in `recalibrate`.
      method: "layerwise" or "batchwise"; see the module.
      call: `call(apply, batch)` runs the model on a batch; `apply` is `model.apply` without the variables:
        `lambda apply, batch: apply(batch["image"], train=False)`. By default `apply(batch)`. Pass the same
        function again and nothing is compiled again.
      progress: show a progress bar (tqdm), if there is a terminal.

    Returns:
      New variables. All but `mean`, `var` and, where there is one, `num_batches_tracked` of the layers that
      were called are the very arrays that were passed.

    Raises:
      ValueError: as `recalibrate`; or there are no running statistics, or no layer is called, or `nn.scan`
        broadcasts batch_stats.
      TypeError: as `recalibrate`; or a subclass does not call its base class, or batches are tuples, lists or
        dictionaries with which the model fails, and there is no `call`.

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
    from flax.core import FrozenDict, freeze

    from jaxbn._observe import calls
    from jaxbn.recalibrate import _flax_step

    flat = calls.flatten_dict(variables.get("batch_stats", {}))
    paths = [path[:-1] for path in flat if path[-1] == "mean" and (*path[:-1], "var") in flat]
    names = {calls.name_of(path): path for path in paths}
    _check_some(names, "variables: expected a collection batch_stats with mean and var of a BatchNorm")
    states = {name: _state(*(flat.get((*path, entry)) for entry in _ENTRIES)) for name, path in names.items()}
    rest = {collection: v for collection, v in variables.items() if collection != "batch_stats"}
    compiled = _flax_step.cached(_flax_step.linen_step, model, call, method)

    def step(states: States, batch: Any) -> dict[str, Measured]:
        stats = {(*names[name], k): v for name, s in states.items() for k, v in s._asdict().items()}
        own = {path: stats.get(path, v) for path, v in flat.items()}
        slots = compiled(rest, calls.unflatten_dict(own), batch)
        return {name: slots[path] for name, path in names.items()}

    new, called = sweep_until_done(step, states, batches, method=method, progress=progress)
    _check_called(called)
    for name, path in names.items():
        if called[name]:
            entries = {(*path, entry): v for entry, v in new[name]._asdict().items()}
            flat |= {path: v for path, v in entries.items() if path in flat}
    result = {**variables, "batch_stats": calls.unflatten_dict(flat)}
    return freeze(result) if isinstance(variables, FrozenDict) else result


def recalibrate_nnx(
    model: Any,
    batches: Iterable[Any],
    *,
    method: str = "layerwise",
    call: Callable[[Any, Any], Any] | None = None,
    progress: bool = False,
) -> None:
    """Measures the running statistics of an NNX model anew, and sets them in the model at the end.

    Of each `BatchNorm` as in `recalibrate_linen`, also under NNX's transformations, and where variables hold
    references (`nnx.var_defaults(ref=True)`) under JAX's; Flax's `scan` and `remat` carry no change of a
    reference out, here and in training, unless they are given `graph_updates=False`. Batches run through copies of
    the model: until the end, and after an exception, it is as it was.

    Formula: that of `recalibrate`; `correction` is that of the layer, 0 for Flax's.

    Args:
      model: the module.
      batches: as in `recalibrate`.
      method: "layerwise" or "batchwise"; see the module.
      call: `call(model, batch)` runs a copy of the model on a batch: `lambda model, batch: model(batch["x"])`.
        By default `model(batch)`. For dropout to be off call `model.eval()` before this or in it. Pass the same
        function again and nothing is compiled again.
      progress: show a progress bar (tqdm), if there is a terminal.

    Raises:
      ValueError: as `recalibrate`; or the model has no batch norm layer, or none is called.
      TypeError: as `recalibrate_linen`.

    Source: as `recalibrate`.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from jaxbn.recalibrate import recalibrate_nnx
      >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> recalibrate_nnx(model, [x[:6], x[6:]])
      >>> model.eval()
      >>> y = model(x)
      >>> bool(abs(y.mean(0)).max() < 1e-6), bool(abs(y.var(0) - 1).max() < 1e-3)
      (True, True)
    """
    from flax import nnx

    from jaxbn._observe import calls
    from jaxbn.recalibrate import _flax_step

    names = {calls.name_of(path): layer for path, layer in calls.nnx_layers(model).items()}
    _check_some(names, "model: expected an NNX module with a BatchNorm of Flax or jaxbn")
    values = {
        name: [None if v is None else v.get_value() for v in (getattr(layer, entry, None) for entry in _ENTRIES)]
        for name, layer in names.items()
    }
    states = {name: _state(*v) for name, v in values.items()}
    graphdef, state = nnx.split(model)
    compiled = _flax_step.cached(_flax_step.nnx_step, graphdef, call, method)
    new, called = sweep_until_done(
        lambda states, batch: compiled(state, states, batch), states, batches, method=method, progress=progress
    )
    _check_called(called)
    for name, layer in names.items():
        for entry, value in new[name]._asdict().items() if called[name] else ():
            if hasattr(layer, entry):
                getattr(layer, entry).set_value(value)


_ENTRIES = BatchNormState._fields


def _state(mean: Any, var: Any, tracked: Any) -> BatchNormState:
    return BatchNormState(mean, var, jnp.zeros((), jnp.int32) if tracked is None else tracked)


def _check_some(names: Mapping[str, Any], expected: str) -> None:
    if not names:
        raise ValueError(f"{expected}, got none; there is nothing to recalibrate")


def _check_called(called: dict[str, bool]) -> None:
    if not any(called.values()):
        raise ValueError(
            f"call: expected a call of one of the layers {', '.join(called)}, got none; run the model on the batch"
        )
