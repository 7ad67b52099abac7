"""Observes every call of a batch norm layer while a Flax model runs.

An observer's handler runs in place of each call, and may read the layer's options, its input and its mask. What it
computes inside jit, scan, vmap or remat are tracers, which cannot be kept in Python variables. They leave the model
as the layer's own statistics do, through a *slot*: one more entry beside `mean` and `var` in the layer's variables,
which holds any tree of arrays of their shape. No name of a slot is used twice, so that Flax and JAX do not reuse in
one observation what they traced in another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

import jaxbn.linen
import jaxbn.nnx
from jaxbn._kernel.moments import Moments
from jaxbn._layers import flax_options
from jaxbn._norms.domains import put_domain
from jaxbn._norms.moments import moments
from jaxbn._observe.watch import watch_nnx
from jaxbn._versions import bridged_linen_module, get_value, iter_modules, set_value, variable_kind

flatten_dict: Any = traverse_util.flatten_dict
unflatten_dict: Any = traverse_util.unflatten_dict
_slot_numbers = itertools.count()


class Observer(NamedTuple):
    """What a tool does in each call of a layer.

    `initial(mean)` is what the slot of a layer with that running mean holds before the first call; `handler(call)`
    returns the output of the call.
    """

    initial: Callable[[jax.Array], Any]
    handler: Callable[[LayerCall], jax.Array]


@dataclasses.dataclass(frozen=True)
class Layer:
    """The options of a batch norm layer of Linen or NNX, without arrays.

    `axis_name` is None if its axes are not bound in this call.
    """

    name: str
    axis: Any
    eps: float
    decay: float | None
    correction: float
    axis_name: Any
    axis_index_groups: Any
    num_domains: int | None
    virtual_batch_size: int | None


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """One call of a layer, with the caller's arguments by name."""

    layer: Layer
    arguments: dict[str, Any]
    _module: Any
    _slot: str
    _run: Callable[..., jax.Array]
    _read: Callable[[str], Any]
    _write: Callable[[str, Any], None]

    @property
    def x(self) -> jax.Array:
        x: jax.Array = self.arguments["x"]
        return x

    @property
    def trains(self) -> bool:
        """Whether the caller has the layer normalize by the batch."""
        given = self.arguments.get("use_running_average")
        return not (self._module.use_running_average if given is None else given)

    def __call__(self) -> jax.Array:
        """Runs the layer with the caller's arguments."""
        return self._run_with()

    def evaluate(self) -> jax.Array:
        """Runs the layer in evaluation mode, whatever its caller says."""
        module = self._module
        mode = module.use_running_average
        # Linen accepts the mode from the call only if the constructor was given none.
        object.__setattr__(module, "use_running_average", None)
        try:
            return self._run_with(use_running_average=True)
        finally:
            object.__setattr__(module, "use_running_average", mode)

    def evaluate_by(self, m: Moments) -> jax.Array:
        """The same with `m` for running statistics, except in channels of at most one value, which have no variance."""
        stored = {name: self._read(name) for name in ("mean", "var")}
        for name, old in stored.items():
            self._write(name, jnp.where(m.count > 1, getattr(m, name).astype(old.dtype), old))
        y = self.evaluate()
        for name, old in stored.items():
            self._write(name, old)
        return y

    def _run_with(self, **changes: Any) -> jax.Array:
        arguments = self.arguments | changes
        return self._run(arguments.pop("x"), **arguments)

    def moments(self) -> Moments:
        """The moments of the input, as the layer would measure them, in the shape of its statistics."""
        layer = self.layer
        mask = flax_options.full_rank_mask(self.arguments.get("mask"), self.x)
        groups = None if layer.axis_name is None else layer.axis_index_groups
        measured = moments(self.x, axis=layer.axis, mask=mask, axis_name=layer.axis_name, axis_index_groups=groups)
        return cast(Moments, self.place(measured, float))

    def place(self, tree: Any, dtype: Any) -> Any:
        """A tree of arrays [C] in the shape of the layer's statistics: if these have domains, 0 in the others."""
        if self.layer.num_domains is None:
            return jax.tree.map(lambda v: jnp.asarray(v, dtype), tree)
        zero, domain = jnp.zeros(jnp.shape(self._read("mean")), dtype), self.arguments.get("domain")
        return put_domain(jax.tree.map(lambda _: zero, tree), domain, tree)  # type: ignore[arg-type]  # None: an error

    def read_slot(self) -> Any:
        value = self._read(self._slot)
        if value is None:
            raise ValueError(
                f"variables: expected statistics of the layer {self.layer.name} in batch_stats, got none; pass all "
                "that model.init returned"
            )
        return value

    def write_slot(self, value: Any) -> None:
        """Dtypes stay what they were."""
        old = self._read(self._slot)
        self._write(self._slot, jax.tree.map(lambda new, o: jnp.asarray(new, jnp.asarray(o).dtype), value, old))


class _Observation:
    """Hands the calls of the library's layers to an observer, and those of subclasses on to the library."""

    def __init__(self, observer: Observer, slot: str):
        self._observer, self._slot = observer, slot
        self._reached = False

    def of_layer(self, name: str, module: Any, run: Any, args: Any, kwargs: Any, read: Any, write: Any) -> jax.Array:
        self._reached = True
        layer = Layer(
            name=name,
            axis=module.axis,
            eps=module.epsilon,
            decay=module.momentum,
            correction=getattr(module, "correction", 0),
            axis_name=module.axis_name if _is_bound(module.axis_name) else None,
            axis_index_groups=module.axis_index_groups,
            num_domains=getattr(module, "num_domains", None),
            virtual_batch_size=getattr(module, "virtual_batch_size", None),
        )
        arguments = dict(zip(("x", "use_running_average"), args, strict=False)) | kwargs
        return self._observer.handler(LayerCall(layer, arguments, module, self._slot, run, read, write))

    def of_subclass(self, name: str, cls: type, run: Callable[[], Any]) -> Any:
        """Runs a `__call__` of the user's, which may change the input before it calls that of the library."""
        self._reached = False
        y = run()
        if not self._reached:
            raise TypeError(
                f"{name}: expected {cls.__name__}.__call__ to call that of its base class, it does not; what a batch "
                "norm of its own normalizes cannot be seen: measure it yourself (jaxbn.moments)"
            )
        return y


def _is_bound(axis_name: Any) -> bool:
    names = axis_name if isinstance(axis_name, tuple | list) else (axis_name,)
    try:
        return all(name is not None and jax.lax.axis_size(name) > 0 for name in names)
    except NameError:
        return False


def _bridged(path: tuple[Any, ...], cls: Any, bridge: str, interface: str) -> ValueError:
    return ValueError(
        f"{name_of(path)}: expected batch norms of flax.{interface}, got statistics of {cls.__name__} in {bridge}, "
        f"where calls cannot be seen; use jaxbn.{interface}.BatchNorm, or pass the module inside of the bridge by "
        "itself"
    )


def new_slot() -> str:
    """A name that no slot had before."""
    return f"observed_{next(_slot_numbers)}"


def name_of(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path)) or "(the model itself)"


# Linen


@contextlib.contextmanager
def observe_linen(observer: Observer, slot: str) -> Iterator[None]:
    """Observes the calls of all Linen BatchNorm layers in this thread; `add_slots` has to come before."""
    observation = _Observation(observer, slot)

    def intercept(run: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if isinstance(module, nnx.bridge.ToLinen) and module.variables.get("batch_stats"):
            raise _bridged(module.path, module.nnx_class, "nnx.bridge.to_linen", "linen")
        if not isinstance(module, nn.BatchNorm) or context.method_name != "__call__" or module.is_initializing():
            return run(*args, **kwargs)
        name = name_of(module.path)
        if _qualified_name(context.orig_method.func) not in _LINEN_CALLS:
            return observation.of_subclass(name, type(module), functools.partial(run, *args, **kwargs))
        read, write = (functools.partial(f, "batch_stats") for f in (module.get_variable, module.put_variable))
        return observation.of_layer(name, module, run, args, kwargs, read, write)

    with nn.intercept_methods(intercept):
        yield


def _qualified_name(function: Any) -> tuple[str, str]:
    # Linen wraps methods anew for each class, so the functions themselves cannot be compared.
    function = inspect.unwrap(function)
    return function.__module__, function.__qualname__


_LINEN_CALLS = {_qualified_name(c.__call__) for c in (nn.BatchNorm, jaxbn.linen.BatchNorm)}


def add_slots(batch_stats: Any, slot: str, initial: Callable[[jax.Array], Any]) -> dict[str, Any]:
    """Linen's collection with a slot `initial(mean)` beside each mean."""
    flat = flatten_dict(batch_stats)
    slots = {(*path[:-1], slot): initial(mean) for path, mean in flat.items() if path[-1] == "mean"}
    return dict(unflatten_dict(flat | slots))


def take_slots(batch_stats: Any, slot: str) -> dict[str, Any]:
    """What the slots hold, by the name of the layer."""
    values = flatten_dict(batch_stats, is_leaf=lambda path, _: path[-1:] == (slot,))
    return {name_of(path[:-1]): value for path, value in values.items() if path[-1] == slot}


# NNX

_NNX_CLASSES = (nnx.BatchNorm, jaxbn.nnx.BatchNorm)


@contextlib.contextmanager
def observe_nnx(model: Any, observer: Observer) -> Iterator[Callable[[], dict[str, Any]]]:
    """Observes the calls of the BatchNorm layers of an NNX model, which must be a copy: see `watch_nnx`.

    Gives a function that returns what the slots hold, by the name of the layer.
    """
    slot, layers = new_slot(), nnx_layers(model)
    observation = _Observation(observer, slot)
    for layer in layers.values():
        # Each array gets a variable of its own, since a reference holds no tree, of the kind that `mean` is.
        variable = functools.partial(nnx.BatchStat, **variable_kind(layer.mean))
        setattr(layer, slot, nnx.data(jax.tree.map(variable, observer.initial(get_value(layer.mean)))))

    def handle(name: str, module: Any, cls: type, run: Any, args: Any, kwargs: Any) -> Any:
        if cls not in _NNX_CLASSES:
            return observation.of_subclass(name, cls, functools.partial(run, *args, **kwargs))
        read, write = (functools.partial(f, module) for f in (_read_variables, _write_variables))
        return observation.of_layer(name, module, run, args, kwargs, read, write)

    with watch_nnx(layers, handle, within=_NNX_CLASSES):
        yield lambda: {name: _read_variables(layer, slot) for name, layer in layers.items()}


def copy_nnx(graphdef: Any, state: Any) -> Any:
    """A model of its own: writing to it does not reach references that `state` has for values."""
    return nnx.merge(graphdef, state, copy=True)


def nnx_layers(model: Any) -> dict[str, Any]:
    """The batch norm layers of an NNX model, each once, by the first path that leads to it."""
    modules = list(iter_modules(model))
    for path, m in modules:
        if isinstance(m, nnx.bridge.ToNNX) and nnx.state(m, nnx.BatchStat):
            raise _bridged(path, type(bridged_linen_module(m)), "nnx.bridge.ToNNX", "nnx")
    return {name_of(path): m for path, m in modules if isinstance(m, nnx.BatchNorm)}


def _read_variables(module: Any, name: str) -> Any:
    """The value of a module's variable, or of a tree of variables; None if there is none."""
    return jax.tree.map(get_value, getattr(module, name, None), is_leaf=_is_variable)


def _write_variables(module: Any, name: str, value: Any) -> None:
    jax.tree.map(set_value, getattr(module, name), value, is_leaf=_is_variable)


def _is_variable(value: Any) -> bool:
    return isinstance(value, nnx.Variable)
