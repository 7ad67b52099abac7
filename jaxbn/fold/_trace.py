"""Traces a model and records what feeds each layer and norm, for Linen and NNX."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from jaxbn._versions import scan_counts

_TAG = "jaxbn.fold"
# These move values without changing them. Only the caller knows whether the channels are still on the last axis.
_MOVES = frozenset({"reshape", "squeeze", "transpose", "convert_element_type", "slice", "copy"})
# What these return of a variable is still that variable: cast, placed on devices, or one of several that are stacked.
_KEEPS = frozenset({"convert_element_type", "copy", "copy_p", "dynamic_slice", "get", "name", "optimization_barrier"})
_KEEPS |= {"pcast", "pvary", "reshard", "sharding_constraint", "slice", "squeeze", "stop_gradient"}


class Operation(NamedTuple):
    """A node of the traced program that is neither layer nor norm: an operation, an input or an output."""

    name: str

    def __str__(self) -> str:
        cure = " (pairs may name the layer across it if channels stay last)"
        return self.name + cure * (self.name in _MOVES)


# A layer or norm, by its path in the model, or an operation.
Node = str | Operation
INPUT, OUTPUT = Operation("an input"), Operation("an output")
# Where an array comes from: one of the arguments of the traced function, by its place among them, or a node.
Origin = int | Node


@dataclasses.dataclass(frozen=True)
class FirstCall:
    """What is recorded of the first call of a layer or norm; `order` counts the modules, `ndim` is that of the output.

    `variables` has for each variable the type of the array that the call reads, and the shape of the one in the model,
    which is longer if it is stacked.
    """

    module: Any
    cls: type
    order: int
    ndim: int
    evaluates: bool
    dtype: Any
    variables: dict[str, tuple[Any, tuple[int, ...]]]


class Variable(NamedTuple):
    """A variable of a layer or norm: the array that a call of it reads, and the one that the model has there."""

    read: Any
    stored: Any


@dataclasses.dataclass
class Trace:
    """The layers and norms that a model calls, and the edges `(source, user)` between them and other operations.

    Attributes:
      layers, norms: the classes that are recorded.
      shared: for each layer that shares a variable, the other modules that hold it.
      stored: for each variable `(path, name)` of a layer or norm, which argument it is; None if it is none.
      reads: where the arrays come from that calls read for it.
      readers: the layers, norms and other operations that compute with each argument.
    """

    layers: tuple[type, ...]
    norms: tuple[type, ...]
    shared: Mapping[str, str] = dataclasses.field(default_factory=dict)
    calls: dict[str, FirstCall] = dataclasses.field(default_factory=dict)
    edges: set[tuple[Node, Node]] = dataclasses.field(default_factory=set)
    reads: dict[tuple[str, str], set[Origin]] = dataclasses.field(default_factory=dict)
    readers: dict[int, set[Node]] = dataclasses.field(default_factory=dict)
    stored: dict[tuple[str, str], Any] = dataclasses.field(default_factory=dict)

    def call(
        self,
        path: str,
        module: Any,
        cls: type,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Any,
        variables: Mapping[str, Variable],
    ) -> Any:
        """Calls a layer or norm, and marks in the traced program, by its path, its variables, input and output."""
        for name, variable in variables.items():
            checkpoint_name(variable.read, f"{_TAG} {name} {path}")
            self.stored[path, name] = variable.stored
        if args:
            args = (checkpoint_name(args[0], f"{_TAG} in {path}"), *args[1:])
        y = function(*args, **kwargs)
        positional = args[1] if len(args) > 1 and isinstance(module, self.norms) else None
        given = kwargs.get("use_running_average", positional)
        evaluates = given if given is not None else getattr(module, "use_running_average", None)
        types = {name: (jax.typeof(v.read), jnp.shape(v.stored)) for name, v in variables.items()}
        self.calls.setdefault(path, FirstCall(module, cls, len(self.calls), y.ndim, bool(evaluates), y.dtype, types))
        return checkpoint_name(y, f"{_TAG} out {path}")

    def run(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Traces a function in which the model's layers and norms run through `call`."""
        places: dict[int, int] = {}

        def traced(*arguments: Any) -> Any:
            places.update((id(v), place) for place, v in enumerate(jax.tree.leaves(arguments)))
            result = function(*arguments)
            self.stored = {key: places.get(id(v)) for key, v in self.stored.items()}
            return result

        jaxpr = jax.make_jaxpr(traced)(*arguments).jaxpr
        origins: dict[Any, Origin] = dict(zip(jaxpr.invars, range(len(jaxpr.invars)), strict=True))
        self._follow(jaxpr, origins, None)
        self._read([v for v in jaxpr.outvars if not isinstance(v, Literal)], origins, OUTPUT)

    def _follow(self, jaxpr: Jaxpr, origins: dict[Any, Origin], inside: str | None) -> None:
        """Records a program and those inside it, such as loops and branches.

        `origins` has the inputs of which it is known where they come from, and receives the variables that are still
        the same arrays. `inside` is the module whose call the program is part of.
        """
        makers: dict[Any, Node] = {}
        for equation in jaxpr.eqns:
            name = _name_of(equation)
            _, way, path = name.split(" ", 2) if name.startswith(f"{_TAG} ") else ("", "", "")
            operands = [v for v in equation.invars if not isinstance(v, Literal)]
            if way not in ("", "in", "out"):
                self.reads.setdefault((path, way), set()).update(origins.get(v, makers.get(v, INPUT)) for v in operands)
                inside = path
                continue
            for v in operands:
                self.edges.add((makers.get(v, INPUT), path if way == "in" else Operation(name)))
            makers.update((v, path if way == "out" else Operation(name)) for v in equation.outvars)
            inside = None if way == "out" else inside
            if equation.primitive.name in _KEEPS:
                pairs = zip(equation.invars, equation.outvars, strict=False)
                origins.update((new, origins[v]) for v, new in pairs if not isinstance(v, Literal) and v in origins)
            elif programs := list(_programs_in(equation)):
                for program in programs:
                    self._follow(program, _origins_within(equation, program, makers | origins), inside)
            else:
                self._read(operands, origins, inside or Operation(name))
        returned = (v for v in jaxpr.outvars if not isinstance(v, Literal))
        self.edges.update((makers.get(v, INPUT), OUTPUT) for v in returned)

    def _read(self, operands: list[Any], origins: dict[Any, Origin], reader: Node) -> None:
        for origin in (origins.get(v) for v in operands):
            if isinstance(origin, int):
                self.readers.setdefault(origin, set()).add(reader)

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


def _programs_in(equation: Any) -> Iterator[Jaxpr]:
    """The programs that an operation runs, such as those of loops and branches."""
    for value in equation.params.values():
        for inner in value if isinstance(value, tuple | list) else (value,):
            if isinstance(inner, ClosedJaxpr | Jaxpr):
                yield inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner


def _origins_within(equation: Any, program: Jaxpr, origins: Mapping[Any, Origin]) -> dict[Any, Origin]:
    """Where the inputs of a program in an operation come from, as far as that is known."""
    # Operands in front of those of the program choose a branch, or are those of a loop's condition.
    operands = equation.invars[len(equation.invars) - len(program.invars) :]
    if equation.primitive.name == "scan":
        first, number = scan_counts(equation.params)
    elif equation.primitive.name == "while":
        first, number = len(program.invars) - len(equation.outvars), len(equation.outvars)
    else:
        first, number = 0, 0
    # What a loop carries is known only if each iteration hands it on.
    carried = dict(zip(program.invars[first : first + number], program.outvars, strict=False))
    pairs = zip(program.invars, operands, strict=False)
    return {v: origins[o] for v, o in pairs if not isinstance(o, Literal) and o in origins and carried.get(v, v) is v}
