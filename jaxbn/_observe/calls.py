"""Calls of batch norm layers, as an observer sees them while a Flax model runs.

An observer's handler runs in place of each call, and may read the layer's options, its input and its mask. What it
computes inside jit, scan, vmap or remat are tracers, which cannot be kept in Python variables. They leave the model
as the layer's own statistics do, through a *slot*: one more entry beside `mean` and `var` in the layer's variables,
which holds any tree of arrays of their shape. No name of a slot is used twice, so that Flax and JAX do not reuse in
one observation what they traced in another.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax.typing import DTypeLike

from jaxbn._kernel.devices import AxisName, Groups
from jaxbn._kernel.moments import Moments
from jaxbn._layers import flax_options
from jaxbn._layers.calls import by_name, in_evaluation, options
from jaxbn._norms.arguments import Axis
from jaxbn._norms.domains import put_domain
from jaxbn._norms.moments import moments
from jaxbn._observe.watch import Args, Kwargs
from jaxbn._paths import name_of
from jaxbn._versions import bridged_linen_module, get_value, iter_modules, set_value

# A Linen model's variables, or the entries of one of its collections or modules.
Variables = Mapping[str, Any]
# What the slots hold in the end, by the layers' names.
Slots = dict[str, Any]
# `call(apply, batch)` and `call(model, batch)`, by which the user says how to run a Linen and an NNX model.
CallLinen = Callable[[Callable[..., Any], Any], object]
CallNNX = Callable[[Any, Any], object]

_Tree = TypeVar("_Tree")
_slot_ids = itertools.count()
flatten_dict: Callable[..., dict[tuple[str, ...], Any]] = traverse_util.flatten_dict
unflatten_dict: Callable[..., dict[str, Any]] = traverse_util.unflatten_dict


class Observer(NamedTuple):
    """What a tool does in each call of a layer.

    `initial(mean)` is what the slot of a layer with that running mean holds before the first call; `handler(call)`
    returns the output of the call.
    """

    initial: Callable[[jax.Array], object]
    handler: Callable[[LayerCall], jax.Array]


@dataclasses.dataclass(frozen=True)
class Layer:
    """The options of a batch norm layer of Linen or NNX, without arrays.

    `axis_name` is None if its axes are not bound in this call.
    """

    name: str
    axis: Axis
    eps: float
    decay: float | None
    correction: float
    axis_name: AxisName | None
    axis_index_groups: Groups | None
    num_domains: int | None
    virtual_batch_size: int | None


class LayerCall(abc.ABC):
    """One call of a layer, with the caller's arguments by name."""

    def __init__(
        self,
        name: str,
        module: nn.BatchNorm | nnx.BatchNorm,
        run: Callable[..., jax.Array],
        args: Args,
        kwargs: Kwargs,
        slot: str,
    ):
        self.layer = Layer(
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
        self.arguments: Kwargs = by_name(args, kwargs)
        self.x: jax.Array = self.arguments["x"]
        self._module, self._run, self._slot = module, run, slot

    @abc.abstractmethod
    def read(self, name: str) -> Any:
        """The array or tree of arrays that the layer's variable holds; None if there is no such variable."""

    @abc.abstractmethod
    def write(self, name: str, value: object) -> None:
        """Gives the layer's variable another array, or another tree of arrays."""

    @property
    def trains(self) -> bool:
        """Whether the caller has the layer normalize by the batch."""
        if getattr(self._module, "fixed_statistics", False):
            return False
        given = self.arguments.get("use_running_average")
        return not (self._module.use_running_average if given is None else given)

    def __call__(self) -> jax.Array:
        """Runs the layer with the caller's arguments; one that trains where none of its axes is bound, without them."""
        axis_name = self._module.axis_name
        if not self.trains or axis_name is None or any(map(_is_bound, _names(axis_name))):
            return self._run(**self.arguments)
        with options(self._module, axis_name=None, axis_index_groups=None):
            return self._run(**self.arguments)

    def evaluate(self) -> jax.Array:
        """Runs the layer in evaluation mode, whatever its caller says."""
        with in_evaluation(self._module):
            return self._run(**{**self.arguments, "use_running_average": True})

    def evaluate_by(self, m: Moments) -> jax.Array:
        """Evaluates with `m` for running statistics, except in channels of at most one value: they have no variance."""
        stored = {name: self.read(name) for name in ("mean", "var")}
        for name, old in stored.items():
            self.write(name, jnp.where(m.count > 1, getattr(m, name).astype(old.dtype), old))
        y = self.evaluate()
        for name, old in stored.items():
            self.write(name, old)
        return y

    def moments(self) -> Moments:
        """The moments of the input, as the layer would measure them, in the shape of its statistics."""
        layer = self.layer
        mask = flax_options.full_rank_mask(self.arguments.get("mask"), self.x)
        groups = None if layer.axis_name is None else layer.axis_index_groups
        measured = moments(self.x, axis=layer.axis, mask=mask, axis_name=layer.axis_name, axis_index_groups=groups)
        return self.place(measured, float)

    def place(self, tree: _Tree, dtype: DTypeLike) -> _Tree:
        """A tree of arrays [C] in the shape of the layer's statistics: if these have domains, 0 in the others."""
        if self.layer.num_domains is None:
            placed: _Tree = jax.tree.map(lambda v: jnp.asarray(v, dtype), tree)
            return placed
        zero = jnp.zeros(jnp.shape(self.read("mean")), dtype)
        zeros: _Tree = jax.tree.map(lambda _: zero, tree)
        return put_domain(zeros, self.arguments.get("domain"), tree)  # type: ignore[arg-type]  # None: an error

    def read_slot(self) -> Any:
        value = self.read(self._slot)
        if value is None:
            raise ValueError(
                f"variables: expected statistics of the layer {self.layer.name} in batch_stats, got none; pass all "
                "that model.init returned"
            )
        return value

    def write_slot(self, value: object) -> None:
        """Dtypes stay what they were."""
        old = self.read(self._slot)
        self.write(self._slot, jax.tree.map(lambda new, o: jnp.asarray(new, jnp.asarray(o).dtype), value, old))


class LinenCall(LayerCall):
    _module: nn.BatchNorm

    def read(self, name: str) -> Any:
        return self._module.get_variable("batch_stats", name)

    def write(self, name: str, value: object) -> None:
        self._module.put_variable("batch_stats", name, value)


class NNXCall(LayerCall):
    """A call of an NNX layer. A slot is a tree of variables, since the reference of one variable holds no tree."""

    _module: nnx.BatchNorm

    def read(self, name: str) -> Any:
        return read_nnx(self._module, name)

    def write(self, name: str, value: object) -> None:
        jax.tree.map(set_value, getattr(self._module, name), value, is_leaf=_is_variable)


def read_nnx(module: nnx.Module, name: str) -> Any:
    """What a variable of a module holds, or a tree of variables; None if there is none."""
    return jax.tree.map(get_value, getattr(module, name, None), is_leaf=_is_variable)


def _is_variable(value: object) -> bool:
    return isinstance(value, nnx.Variable)


class Observation:
    """Hands the calls of the library's layers to an observer, and those of subclasses on to the library."""

    def __init__(self, observer: Observer):
        self.slot = f"observed_{next(_slot_ids)}"
        self._handler = observer.handler
        self._reached = False

    def of_layer(self, call: LayerCall) -> jax.Array:
        self._reached = True
        return self._handler(call)

    def of_subclass(self, name: str, cls: type, run: Callable[[], jax.Array]) -> jax.Array:
        """Runs a `__call__` of the user's, which may change the input before it calls that of the library."""
        self._reached = False
        y = run()
        if not self._reached:
            raise TypeError(
                f"{name}: expected {cls.__name__}.__call__ to call that of its base class, it does not; what a batch "
                "norm of its own normalizes cannot be seen: measure it yourself (jaxbn.moments)"
            )
        return y


def _names(axis_name: object) -> tuple[object, ...]:
    return tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)


def _is_bound(axis_name: object) -> bool:
    if axis_name is None:
        return False
    try:
        return jax.lax.axis_size(_names(axis_name)) > 0
    except NameError:
        return False


def copy_nnx(graphdef: nnx.GraphDef[nnx.Module], state: object) -> nnx.Module:
    """A model of its own: writing to it does not reach references that `state` has for values."""
    return nnx.merge(graphdef, state, copy=True)


def nnx_layers(model: nnx.Module) -> dict[str, nnx.BatchNorm]:
    """The batch norm layers of an NNX model, each once, by the first path that leads to it."""
    modules = list(iter_modules(model))
    for path, m in modules:
        if isinstance(m, nnx.bridge.ToNNX) and nnx.state(m, nnx.BatchStat):
            raise bridged(path, type(bridged_linen_module(m)).__name__, "nnx.bridge.ToNNX", "nnx")
    return {name_of(path): m for path, m in modules if isinstance(m, nnx.BatchNorm)}


def bridged(path: tuple[object, ...], inner: str, bridge: str, interface: str) -> ValueError:
    """The error about a batch norm of the other interface inside of a bridge."""
    return ValueError(
        f"{name_of(path)}: expected batch norms of flax.{interface}, got statistics of {inner} in {bridge}, "
        f"where calls cannot be seen; use jaxbn.{interface}.BatchNorm, or pass the module inside of the bridge by "
        "itself"
    )
