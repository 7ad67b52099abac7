"""Hands the calls of an NNX model's modules to a handler; NNX has nothing like Linen's interceptors."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

Handler = Callable[[str, Any, type, Callable[..., Any], Any, Any], Any]


class _Watch:
    """What a watched module, and with it every copy of it, carries in an attribute.

    NNX's transformations cache what they trace by the attributes of modules. Two watches are never equal, so none gets
    what was traced for another.
    """

    def __init__(self, name: str, handler: Handler):
        self.name = name
        self.handler: Handler | None = handler


@contextlib.contextmanager
def watch_nnx(modules: Mapping[str, Any], handler: Handler, within: tuple[type, ...] = ()) -> Iterator[None]:
    """A call of one of the modules returns `handler(name, module, kind, run, args, kwargs)`.

    `kind` is the module's class, and `run(*args, **kwargs)` does what the call does without a watch.

    For this the modules get classes derived from theirs, which they keep, as do the copies that NNX's transformations
    make. So they must belong to a copy of the user's model. Within the model `isinstance` tells the same as before, but
    `type(module) is ...` does not, and only `super()` leads to a class in `within`.

    Args:
      modules: by the names that the handler is given.
      handler: is dropped when the context ends; after that, calls do what they did before.
      within: where a class of the user's is derived from one of these, and its `__call__` calls that of the base class
        by `super()`, this inner call is handed over too, with the base class for `kind`.
    """
    watches = []
    for name, module in modules.items():
        watch = _Watch(name, handler)
        watches.append(watch)
        module._jaxbn_watch = watch
        object.__setattr__(module, "__class__", _watched(cast(Any, type(module)), within))
    try:
        yield
    finally:
        for watch in watches:
            # NNX's caches keep the watch, and must not keep what the handler refers to.
            watch.handler = None


@functools.cache
def _watched(kind: Any, within: tuple[type, ...]) -> Any:
    """The derived class. It is made once: NNX and JAX register every class for good."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        watch, run = self._jaxbn_watch, super(derived, self).__call__
        if watch.handler is None:
            return run(*args, **kwargs)
        return watch.handler(watch.name, self, kind, run, args, kwargs)

    # The second base comes right before the class in `within` that `kind` is derived from: `super()` finds it first.
    inner = next((c for c in kind.__mro__ if c in within), kind)
    bases = (kind,) if inner is kind else (kind, _watched(inner, within))
    # A class defined with pytree=False does not pass that on to derived classes.
    options = {} if kind._pytree__is_pytree else {"pytree": False}
    derived: Any = type(kind)(kind.__name__, bases, {"__call__": call}, **options)
    return derived
