"""Sees every call of a batch norm layer while a Flax model runs: its options, its input, its mask.

What a handler computes cannot leave through Python variables where a layer is called inside jit, scan, vmap
or remat: there it holds tracers. It leaves as the layer's own statistics do, through a *slot*: one more entry
beside `mean` and `var`, any tree of arrays of their shape. Slots have names that never come again, so that
what Flax or JAX compiled for one observation is not taken for another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

import jaxbn.linen
import jaxbn.nnx
from jaxbn._kernel.moments import Moments, moments
from jaxbn._layers import flax_options
from jaxbn._norms.domains import put_domain

Path = tuple[Any, ...]
flatten_dict: Any = traverse_util.flatten_dict
unflatten_dict: Any = traverse_util.unflatten_dict
_numbers = itertools.count()
# Who observes is each thread's own; the patched methods of NNX's classes, and how many need them, are shared.
_active = threading.local()
_patched: dict[Any, tuple[Any, int]] = {}
_lock = threading.Lock()


def new_slot() -> str:
    """A name for a slot that was not used before."""
    return f"observed_{next(_numbers)}"


@dataclasses.dataclass(frozen=True)
class Layer:
    """A batch norm layer of Linen or NNX. `axis_name` is None where its axes are not bound now."""

    path: Path
    axis: Any
    eps: float
    decay: float | None
    correction: float
    axis_name: Any
    axis_index_groups: Any
    num_domains: int | None
    use_scale: bool
    use_bias: bool
    module: Any = dataclasses.field(repr=False)

    @property
    def name(self) -> str:
        return name_of(self.path)

    def moments(self, x: jax.Array, mask: jax.Array | None) -> Moments:
        """Of one input, as the layer would measure it."""
        mask = flax_options.full_rank_mask(mask, x)
        groups = None if self.axis_name is None else self.axis_index_groups
        return moments(x, axis=self.axis, mask=mask, axis_name=self.axis_name, axis_index_groups=groups)


def name_of(path: Path) -> str:
    return "/".join(map(str, path)) or "(the model itself)"


@dataclasses.dataclass
class Call:
    """One call of a layer: `call()` runs it, once, with the caller's arguments or `overrides` of them."""

    layer: Layer
    arguments: dict[str, Any]
    _run: Callable[..., jax.Array]
    _read: Callable[[str], Any]
    _write: Callable[[str, Any], None]

    @property
    def domain(self) -> Any:
        return self.arguments.get("domain")

    def __call__(self, **overrides: Any) -> jax.Array:
        """`use_running_average` may be overridden though the layer's constructor says otherwise."""
        arguments = self.arguments | overrides
        field = self.layer.module.use_running_average
        if "use_running_average" in overrides:
            # Linen allows it in one of the two places.
            object.__setattr__(self.layer.module, "use_running_average", None)
        try:
            return self._run(arguments.pop("x"), **arguments)
        finally:
            object.__setattr__(self.layer.module, "use_running_average", field)

    def placed(self, own: Moments) -> Moments:
        """`own` in the shape of the layer's statistics: nothing counts in the other domains."""
        zero = jnp.zeros(jnp.shape(self.read("mean")), float)
        own = own.map(lambda v: v.astype(zero.dtype))
        none = Moments(zero, zero, zero, zero)
        return own if self.layer.num_domains is None else put_domain(none, self.domain, own)

    def by_moments(self, own: Moments) -> jax.Array:
        """Runs the layer in evaluation with `own` for statistics; with the stored ones where nothing counts."""
        stored = {name: self.read(name) for name in ("mean", "var")}
        for name, old in stored.items():
            self.write(name, jnp.where(own.count > 0, getattr(own, name).astype(old.dtype), old))
        y = self(use_running_average=True)
        for name, old in stored.items():
            self.write(name, old)
        return y

    def read(self, name: str) -> Any:
        """The layer's `mean`, `var`, `num_batches_tracked`, or a slot; None if there is no such entry."""
        return self._read(name)

    def read_slot(self, slot: str) -> Any:
        value = self._read(slot)
        if value is None:
            raise ValueError(
                f"variables: expected statistics of the layer {self.layer.name} in batch_stats, got none; pass all "
                "that model.init returned"
            )
        return value

    def write(self, name: str, value: Any) -> None:
        """Sets an existing entry; with Linen `batch_stats` must be mutable. Dtypes stay what they were."""
        old = self._read(name)
        if old is None:
            raise ValueError(
                f"{self.layer.name}: expected an entry {name!r} beside its statistics, got none; this layer's "
                "statistics are not among the variables that the model was given"
            )
        self._write(name, jax.tree.map(lambda new, o: jnp.asarray(new).astype(jnp.asarray(o).dtype), value, old))


Handler = Callable[[Layer, jax.Array, Any, Call], jax.Array]


@contextlib.contextmanager
def observe_linen(handler: Handler) -> Iterator[None]:
    """For every call of a Linen BatchNorm in this thread, the layer returns `handler(layer, x, mask, call)`."""

    def intercept(run: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        module = context.module
        if not isinstance(module, nn.BatchNorm) or context.method_name != "__call__" or module.is_initializing():
            return run(*args, **kwargs)

        def read(name: str) -> Any:
            return module.get_variable("batch_stats", name)

        def write(name: str, value: Any) -> None:
            module.put_variable("batch_stats", name, value)

        if _identity(context.orig_method.func) not in _LIBRARY:
            return _run_subclass(module, module.path, lambda: run(*args, **kwargs))
        return _observed(handler, module, module.path, run, read, write, args, kwargs)

    with nn.intercept_methods(intercept):
        yield


def add_slots(batch_stats: Any, slot: str, initial: Callable[[jax.Array], Any]) -> dict[str, Any]:
    """Linen's collection with a slot `initial(mean)` beside each mean."""
    flat = flatten_dict(batch_stats)
    slots = {(*path[:-1], slot): initial(mean) for path, mean in flat.items() if path[-1] == "mean"}
    return dict(unflatten_dict(flat | slots))


def take_slots(batch_stats: Any, slot: str) -> dict[Path, Any]:
    """What the slots hold, by the path of the layer."""
    values = flatten_dict(batch_stats, is_leaf=lambda path, _: path[-1:] == (slot,))
    return {path[:-1]: value for path, value in values.items() if path[-1] == slot}


@contextlib.contextmanager
def observe_nnx(model: Any, handler: Handler, slot: str, initial: Callable[[jax.Array], Any]) -> Iterator[None]:
    """The same for the layers of an NNX model; `read_variables(layer, slot)` is what a slot holds.

    While it lasts each layer has the slot, beginning as `initial(mean)`, and a number in an attribute, by
    which it is known again inside NNX's transformations, which make copies. Other threads may run other
    models meanwhile.
    """
    layers = nnx_layers(model)
    mark, paths = f"{slot}_number", list(layers)
    for number, module in enumerate(layers.values()):
        setattr(module, mark, number)
        # A variable for each array, as a reference holds no more, and of the kind that the layer's are.
        new = functools.partial(nnx.BatchStat, ref=module.mean.ref, hijax=module.mean.hijax)
        setattr(module, slot, nnx.data(jax.tree.map(new, initial(module.mean.get_value()))))
    stack = _active.__dict__.setdefault("stack", [])
    stack.append((mark, paths, handler))
    classes = {c for m in layers.values() for c in type(m).__mro__ if issubclass(c, nnx.BatchNorm)}
    with _patch(c for c in classes if "__call__" in vars(c)):
        try:
            yield
        finally:
            stack.pop()
            for module in layers.values():
                delattr(module, mark)
                delattr(module, slot)


def read_variables(module: Any, name: str) -> Any:
    """The value of a module's variable, or tree of variables; None if there is none."""
    return jax.tree.map(lambda v: v.get_value(), getattr(module, name, None), is_leaf=_is_variable)


def _write_variables(module: Any, name: str, value: Any) -> None:
    jax.tree.map(lambda v, new: v.set_value(new), getattr(module, name), value, is_leaf=_is_variable)


def _is_variable(value: Any) -> bool:
    return isinstance(value, nnx.Variable)


def copy_nnx(graphdef: Any, state: Any) -> Any:
    """A model of its own: writing to it does not reach references that `state` has for values."""
    return nnx.merge(graphdef, state, copy=True)


def nnx_layers(model: Any) -> dict[Path, Any]:
    """The batch norm layers of an NNX model, each once, by the first path that leads to it."""
    return {path: m for path, m in nnx.iter_modules(model) if isinstance(m, nnx.BatchNorm)}


@contextlib.contextmanager
def _patch(classes: Iterable[Any]) -> Iterator[None]:
    """Lets `__call__` of the classes look for a handler, until the last of those who asked for it has left."""
    classes = list(classes)
    with _lock:
        for cls in classes:
            original, users = _patched.get(cls, (vars(cls)["__call__"], 0))
            _patched[cls] = original, users + 1
            cls.__call__ = _looking_for_handler(original)
    try:
        yield
    finally:
        with _lock:
            for cls in classes:
                original, users = _patched.pop(cls)
                if users > 1:
                    _patched[cls] = original, users - 1
                else:
                    cls.__call__ = original


def _looking_for_handler(original: Any) -> Any:
    @functools.wraps(original)
    def call(module: Any, *args: Any, **kwargs: Any) -> Any:
        run = functools.partial(original, module)
        for mark, paths, handler in reversed(_active.__dict__.get("stack", [])):
            number = getattr(module, mark, None)
            if number is None:
                continue
            if _identity(original) not in _LIBRARY:
                return _run_subclass(module, paths[number], lambda: run(*args, **kwargs))

            read = functools.partial(read_variables, module)
            write = functools.partial(_write_variables, module)
            return _observed(handler, module, paths[number], run, read, write, args, kwargs)
        return run(*args, **kwargs)

    return call


def _identity(function: Any) -> tuple[str, str]:
    function = inspect.unwrap(function)
    return function.__module__, function.__qualname__


# Whose input is what is normalized. A subclass may do something to it before.
_LIBRARY = {_identity(c.__call__) for c in (nn.BatchNorm, jaxbn.linen.BatchNorm, nnx.BatchNorm, jaxbn.nnx.BatchNorm)}


def _observed(
    handler: Handler, module: Any, path: Path, run: Any, read: Any, write: Any, args: Any, kwargs: Any
) -> jax.Array:
    _active.reached = True
    arguments = dict(zip(("x", "use_running_average"), args, strict=False)) | kwargs
    layer = Layer(
        path=path,
        axis=module.axis,
        eps=module.epsilon,
        decay=module.momentum,
        correction=getattr(module, "correction", 0),
        axis_name=module.axis_name if _is_bound(module.axis_name) else None,
        axis_index_groups=module.axis_index_groups,
        num_domains=getattr(module, "num_domains", None),
        use_scale=module.use_scale,
        use_bias=module.use_bias,
        module=module,
    )
    return handler(layer, arguments["x"], arguments.get("mask"), Call(layer, arguments, run, read, write))


def _run_subclass(module: Any, path: Path, run: Callable[[], Any]) -> Any:
    """Runs the `__call__` of a subclass, which must come to that of the library."""
    _active.reached = False
    y = run()
    if not _active.reached:
        raise TypeError(
            f"{name_of(path)}: expected {type(module).__name__}.__call__ to call that of its base class, it does "
            "not; what a batch norm of its own normalizes cannot be seen: measure it yourself (jaxbn.moments)"
        )
    return y


def _is_bound(axis_name: Any) -> bool:
    names = axis_name if isinstance(axis_name, tuple | list) else (axis_name,)
    try:
        return all(name is not None and jax.lax.axis_size(name) > 0 for name in names)
    except NameError:
        return False
