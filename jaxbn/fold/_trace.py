"""Traces a model and records what feeds each layer and norm, for Linen and NNX."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

_TAG = "jaxbn.fold"
# These move values without changing them. Only the caller knows whether the channels are still on the last axis.
_MOVES = frozenset({"reshape", "squeeze", "transpose", "convert_element_type", "slice", "copy"})


class Operation(NamedTuple):
    """A node of the traced program that is neither layer nor norm: an operation, an input or an output."""

    name: str

    def __str__(self) -> str:
        cure = " (pairs may name the layer across it if channels stay last)"
        return self.name + cure * (self.name in _MOVES)


# A layer or norm, by its path in the model, or an operation.
Node = str | Operation
_INPUT, _OUTPUT = Operation("an input"), Operation("an output")


@dataclasses.dataclass(frozen=True)
class FirstCall:
    """What is recorded of the first call of a layer or norm; `order` counts the modules, `ndim` is that of the output.

    `cls` is the module's class, which in NNX is hidden by a derived one while the model is traced.
    """

    module: Any
    cls: type
    order: int
    ndim: int
    evaluates: bool
    dtype: Any


@dataclasses.dataclass
class Trace:
    """The layers and norms that a model calls, and the edges `(source, user)` between them and other operations.

    Attributes:
      layers, norms: the classes that are recorded.
      shared: for each layer that shares a variable, the other modules that hold it.
    """

    layers: tuple[type, ...]
    norms: tuple[type, ...]
    shared: Mapping[str, str] = dataclasses.field(default_factory=dict)
    calls: dict[str, FirstCall] = dataclasses.field(default_factory=dict)
    edges: set[tuple[Node, Node]] = dataclasses.field(default_factory=set)

    def call(
        self, path: str, module: Any, cls: type, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """Calls a layer or norm by `function`, and marks its input and output in the traced program by its path."""
        if args:
            args = (checkpoint_name(args[0], f"{_TAG} in {path}"), *args[1:])
        y = function(*args, **kwargs)
        positional = args[1] if len(args) > 1 and isinstance(module, self.norms) else None
        given = kwargs.get("use_running_average", positional)
        evaluates = given if given is not None else getattr(module, "use_running_average", None)
        self.calls.setdefault(path, FirstCall(module, cls, len(self.calls), y.ndim, bool(evaluates), y.dtype))
        return checkpoint_name(y, f"{_TAG} out {path}")

    def run(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Traces a function in which the model's layers and norms run through `call`."""
        for jaxpr in _all_jaxprs(jax.make_jaxpr(function)(*arguments).jaxpr):
            makers: dict[Any, Node] = {}
            for equation in jaxpr.eqns:
                name = _name_of(equation)
                _, way, path = name.split(" ", 2) if name.startswith(f"{_TAG} ") else ("", "", "")
                for v in equation.invars:
                    if not isinstance(v, Literal):
                        self.edges.add((makers.get(v, _INPUT), path if way == "in" else Operation(name)))
                makers.update((v, path if way == "out" else Operation(name)) for v in equation.outvars)
            self.edges.update((makers.get(v, _INPUT), _OUTPUT) for v in jaxpr.outvars if not isinstance(v, Literal))

    def sources(self, node: Node) -> set[Node]:
        return {source for source, user in self.edges if user == node}

    def users(self, node: Node) -> set[Node]:
        return {user for source, user in self.edges if source == node}

    def is_norm(self, path: str) -> bool:
        return isinstance(self.calls[path].module, self.norms)

    def paths(self, norms: bool) -> list[str]:
        """The paths of all norms that were called, or of all layers."""
        return [path for path in self.calls if self.is_norm(path) == norms]

    def is_before(self, norm: str, layer: str) -> bool:
        return self.calls[norm].order < self.calls[layer].order


def _name_of(equation: Any) -> str:
    """The name of the function that is called, if the program has one, or of the operation."""
    inner = equation.params.get("call_jaxpr")  # of a function with a derivative rule of its own, such as relu
    if inner is not None and inner.eqns:
        return _name_of(inner.eqns[-1])
    return str(equation.params.get("name") or equation.primitive.name)


def _all_jaxprs(jaxpr: Jaxpr) -> Iterator[Jaxpr]:
    """A program and the programs inside it, such as those of loops and branches."""
    yield jaxpr
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, ClosedJaxpr | Jaxpr):
                    yield from _all_jaxprs(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)
