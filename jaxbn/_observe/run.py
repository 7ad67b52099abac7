"""Runs of a Flax model on a batch, in Linen and in NNX: as it is, or with the calls of its norm layers observed."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import jaxbn.nnx
from jaxbn._observe import calls
from jaxbn._observe.calls import CallLinen, CallNNX, Observer, Slots, Variables
from jaxbn._observe.watch import Args, Function, Kwargs, watch_nnx
from jaxbn._paths import name_of
from jaxbn._versions import get_value, variable_kind
from jaxbn.linen._calls import is_batch_norm_call

_Step = TypeVar("_Step")
_MISSING = re.compile(r"missing \d+ required \S+ arguments?: (.*)")


def evaluate(
    model: Callable[..., object], batch: object, call: CallNNX | None, name: str = "model", argument: str = "batch"
) -> object:
    """The output of `call(model, batch)`, by default `model(batch)`.

    If the model fails because it wants more arguments or another batch, the error suggests a `call`, or another one.
    There `name` stands for the model, and `argument` is the parameter with the batch.
    """
    try:
        return model(batch) if call is None else call(model, batch)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        missing = _MISSING.search(reason) if isinstance(error, TypeError) else None
        has_parts, got, given = False, "one batch alone", ["batch"]
        if isinstance(batch, tuple | list | Mapping):
            has_parts, got = True, f"a {type(batch).__name__} of {len(batch)}"
            given = [f"batch[{_input_of(batch)!r}]"]
            if call is not None:
                # A note alone: `call` may have taken out what the model takes, which then failed for another reason.
                error.add_note(
                    f"{argument}: got {got}; if `call` gives the model all of it, the labels too, take out what the "
                    f"model takes: {name}({given[0]}, ...)"
                )
        if call is not None or not (missing or has_parts):
            raise
        for option in re.findall(r"'(\w+)'", missing[1]) if missing else ():
            given.append(f"{option}={'False' if 'train' in option else '...'}")
        raise TypeError(
            f"{argument}: expected what the model takes, got {got}, for which it raised {type(error).__name__}: "
            f"{reason}; say what to give it: call=lambda {name}, batch: {name}({', '.join(given)})"
        ) from error


def _input_of(batch: tuple[object, ...] | list[object] | Mapping[Any, object]) -> object:
    """The key of what is probably the input: it is floating point, mostly, and labels are not."""
    # jax.jit sorts dictionaries, so being first says nothing.
    parts = dict(batch if isinstance(batch, Mapping) else enumerate(batch))
    floating = (key for key, v in parts.items() if hasattr(v, "dtype") and jnp.issubdtype(v.dtype, jnp.floating))
    return next(floating, next(iter(parts), 0))


def evaluate_linen(model: nn.Module, variables: Variables, batch: object, call: CallLinen | None) -> object:
    """The output of `call(apply, batch)`, by default `apply(batch)`; `apply` is the model's, its variables given."""
    return evaluate(_Apply(model, variables, variables.get("batch_stats", {})), batch, call, "apply")


def run_linen(
    model: nn.Module, variables: Variables, batch: object, call: CallLinen | None, observer: Observer
) -> tuple[object, Slots]:
    """As `evaluate_linen`, with an observer of the calls of all BatchNorm layers in this thread.

    Returns the output, and what each layer's slot holds in the end, by the layer's name.
    """
    observation = calls.Observation(observer)
    slot, stats = observation.slot, calls.flatten_dict(variables.get("batch_stats", {}))
    slots = {(*path[:-1], slot): observer.initial(mean) for path, mean in stats.items() if path[-1] == "mean"}
    apply = _Apply(model, variables, calls.unflatten_dict(stats | slots))

    def intercept(run: Function, args: Args, kwargs: Kwargs, context: Any) -> object:
        module = context.module
        if isinstance(module, nnx.bridge.ToLinen) and module.variables.get("batch_stats"):
            raise calls.bridged(module.path, module.nnx_class.__name__, "nnx.bridge.to_linen", "linen")
        if not isinstance(module, nn.BatchNorm) or context.method_name != "__call__" or module.is_initializing():
            return run(*args, **kwargs)
        name = name_of(module.path)
        if is_batch_norm_call(context):
            return observation.of_layer(calls.LinenCall(name, module, run, args, kwargs, slot))
        return observation.of_subclass(name, type(module), functools.partial(run, *args, **kwargs))

    with nn.intercept_methods(intercept):
        output = evaluate(apply, batch, call, "apply", "batches")
    values = calls.flatten_dict(apply.stats, is_leaf=lambda path, _: path[-1:] == (slot,))
    return output, {name_of(path[:-1]): value for path, value in values.items() if path[-1] == slot}


def run_nnx(model: nnx.Module, batch: object, call: CallNNX | None, observer: Observer) -> tuple[object, Slots]:
    """As `run_linen`, for `call(model, batch)`. The model must be a copy: observing changes it (see `watch_nnx`)."""
    layers, observation = calls.nnx_layers(model), calls.Observation(observer)
    slot = observation.slot
    for layer in layers.values():
        # Variables of the kind that `mean` is.
        variable = functools.partial(nnx.BatchStat, **variable_kind(layer.mean))
        setattr(layer, slot, nnx.data(jax.tree.map(variable, observer.initial(get_value(layer.mean)))))

    def handle(name: str, module: nnx.BatchNorm, cls: type, run: Function, args: Args, kwargs: Kwargs) -> object:
        if cls in _NNX_CLASSES:
            return observation.of_layer(calls.NNXCall(name, module, run, args, kwargs, slot))
        return observation.of_subclass(name, cls, functools.partial(run, *args, **kwargs))

    with watch_nnx(layers, handle, within=_NNX_CLASSES):
        output = evaluate(model, batch, call, "model", "batches")
        return output, {name: calls.read_nnx(layer, slot) for name, layer in layers.items()}


_NNX_CLASSES = (nnx.BatchNorm, jaxbn.nnx.BatchNorm)


class _Apply:
    """`model.apply` with the variables given; `stats` is what the calls have made of its batch_stats."""

    def __init__(self, model: nn.Module, variables: Variables, stats: Variables):
        self._model, self._variables, self.stats = model, variables, stats

    def __call__(self, *args: object, mutable: str | Iterable[str] = (), **kwargs: Any) -> object:
        """What `model.apply` returns to the user, who need not ask for new batch_stats."""
        others = [mutable] if isinstance(mutable, str) else list(mutable or ())
        variables = {**self._variables, "batch_stats": self.stats}
        try:
            y, updates = self._model.apply(variables, *args, mutable=["batch_stats", *others], **kwargs)
        except ValueError as error:
            # Flax has no class for it.
            if "broadcasted variable has a data dependency" not in str(error):
                raise
            raise ValueError(
                "model: expected batch_stats that can change in nn.scan, got a variable_broadcast with 'batch_stats' "
                "in it; pass this function the same network with variable_carry='batch_stats' in its place, which "
                "takes the same variables"
            ) from error
        self.stats = updates["batch_stats"]
        return (y, updates) if others else y


def cached(make: Callable[..., _Step], *static: object) -> _Step:
    """`make(*static)`, with an `lru_cache`: the compiled step of last time if the arguments are equal and hashable."""
    try:
        return make(*static)
    except TypeError:  # not hashable
        return make.__wrapped__(*static)  # type: ignore[attr-defined, no-any-return]
