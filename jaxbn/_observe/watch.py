"""Hands the calls of an NNX model's modules to a handler; NNX has nothing like Linen's interceptors."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Function = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]
Handler = Callable[[str, Any, type, Function, Args, Kwargs], object]

# The classes whose `__call__` is replaced now: what it was, and how many watches need it.
_replaced: dict[type, tuple[Function, int]] = {}
_lock = threading.Lock()


@dataclasses.dataclass(eq=False)
class _Watch:
    """What a watched module, and with it every copy of it, carries in an attribute.

    NNX's transformations cache what they trace by the attributes of modules. Two watches are never equal, so none gets
    what was traced for another.
    """

    name: str
    handler: Handler | None
    within: tuple[type, ...]


@contextlib.contextmanager
def watch_nnx(modules: Mapping[str, Any], handler: Handler, within: tuple[type, ...] = ()) -> Iterator[None]:
    """A call of one of the modules returns `handler(name, module, cls, run, args, kwargs)`.

    `cls` is the module's class, and `run(*args, **kwargs)` does what the call does without a watch.

    While the context lasts, `__call__` of the modules' classes looks for the watch that a module carries. Modules
    without one, of other models and in other threads, do what they always do.

    Args:
      modules: by the names that the handler is given. They get an attribute, as do the copies that NNX's
        transformations make of them, so they must belong to a copy of the user's model.
      handler: is dropped when the context ends; after that, calls do what they did before.
      within: base classes. If the `__call__` of a class derived from one of these calls that of the base class, this
        inner call is handed over too, with the base class for `cls`.
    """
    watches = []
    classes = set()
    for name, module in modules.items():
        watch = _Watch(name, handler, within)
        watches.append(watch)
        module._jaxbn_watch = watch
        cls = type(module)
        _inherit_again(cls)
        for base in (cls, *within):
            if issubclass(cls, base):
                classes.add(class_with_call(base))
    try:
        with _replaced_calls(classes):
            yield
    finally:
        for watch in watches:
            # NNX's caches keep the watch, and must not keep what the handler refers to.
            watch.handler = None


def class_with_call(cls: type) -> type:
    """The class whose `__call__` a call of an instance of `cls` runs, and of which others inherit it."""
    call = inspect.getattr_static(cls, "__call__")
    holder = cls
    for base in cls.__mro__:
        if vars(base).get("__call__") is call:
            holder = base
    return holder


def _inherit_again(cls: type) -> None:
    """Removes a `__call__` that `cls` would inherit anyway; `flax.nnx.tabulate` leaves such in classes."""
    for derived in cls.__mro__:
        if "__call__" in vars(derived) and class_with_call(derived) is not derived:
            del derived.__call__


@contextlib.contextmanager
def _replaced_calls(classes: set[type]) -> Iterator[None]:
    """Until the last context that needs it ends, `__call__` of the classes looks for a watch."""
    with _lock:
        for cls in classes:
            original, users = _replaced.get(cls, (vars(cls)["__call__"], 0))
            _replaced[cls] = original, users + 1
            if not users:
                cls.__call__ = _looking_for_watch(cls, original)  # type: ignore[method-assign]
    try:
        yield
    finally:
        with _lock:
            for cls in classes:
                original, users = _replaced.pop(cls)
                if users > 1:
                    _replaced[cls] = original, users - 1
                else:
                    cls.__call__ = original  # type: ignore[method-assign]


def _looking_for_watch(cls: type, original: Function) -> Function:
    @functools.wraps(original)
    def call(module: object, *args: object, **kwargs: object) -> object:
        watch = getattr(module, "_jaxbn_watch", None)
        if watch is not None and watch.handler is not None:
            run = functools.partial(original, module)
            if cls in watch.within:
                return watch.handler(watch.name, module, cls, run, args, kwargs)
            # Other base classes, which `super()` leads to, are part of the call that was handed over.
            if cls is class_with_call(type(module)):
                return watch.handler(watch.name, module, type(module), run, args, kwargs)
        return original(module, *args, **kwargs)

    return call
