"""What the constructors of the layers take, where `inspect.signature`, `help` and notebooks look for it."""

from __future__ import annotations

import inspect

from flax import nnx


class InitSignature:
    """The attribute `__signature__` of a class and of those derived from it: what `__init__` takes.

    Without it the metaclass of NNX modules shows `(*args: Any, **kwargs: Any) -> Any`.
    """

    def __get__(self, layer: nnx.Module | None, cls: type[nnx.Module]) -> inspect.Signature | None:
        if layer is not None:
            return None  # of a layer itself, Python shows what a call takes
        signature = inspect.signature(cls.__init__)
        return signature.replace(parameters=list(signature.parameters.values())[1:])
