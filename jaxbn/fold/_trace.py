"""Traces a model and records what feeds each layer and norm, for Linen and NNX."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from jaxbn._observe.watch import Args, Function, Kwargs

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
_sets: Callable[[], dict[Any, set[Any]]] = functools.partial(collections.defaultdict, set)


class Variable(NamedTuple):
    """A variable of a layer or norm.

    `read` is the type of the array that a call reads. That of the model has `shape`, longer if it is stacked, and is
    the argument of the traced function in that `place`; None if it is none.
    """

    read: jax.ShapeDtypeStruct
    shape: tuple[int, ...]
    place: int | None


@dataclasses.dataclass(frozen=True)
class TracedModule:
    """What the first call of a layer or norm shows of it; `order` counts the modules, `y` is the type of the output."""

    path: str
    instance: Any
    cls: type
    is_norm: bool
    order: int
    y: jax.ShapeDtypeStruct
    evaluates: bool
    variables: dict[str, Variable]


@dataclasses.dataclass
class Trace:
    """The layers and norms that a model calls, and what is between them.

    Attributes:
      layers, norms: the classes that are recorded.
      modules: those that were called, by their paths.
      shared: for each layer that shares a variable, the other modules that hold it.
      sources, users: for each node, those whose output it takes, and those that take its output.
      reads: for each variable `(path, name)`, where the arrays come from that calls read for it.
      holders, readers: for each argument, the layers and norms that have it for a variable, and all that compute with
        it.
    """

    layers: tuple[type, ...]
    norms: tuple[type, ...]
    shared: Mapping[str, str] = dataclasses.field(default_factory=dict)
    modules: dict[str, TracedModule] = dataclasses.field(default_factory=dict)
    sources: dict[Node, set[Node]] = dataclasses.field(default_factory=_sets)
    users: dict[Node, set[Node]] = dataclasses.field(default_factory=_sets)
    reads: dict[tuple[str, str], set[Origin]] = dataclasses.field(default_factory=_sets)
    holders: dict[int | None, set[Node]] = dataclasses.field(default_factory=_sets)
    readers: dict[int | None, set[Node]] = dataclasses.field(default_factory=_sets)
    _places: dict[int, int] = dataclasses.field(default_factory=dict)

    def record(
        self,
        path: str,
        module: object,
        cls: type,
        function: Function,
        args: Args,
        kwargs: Kwargs,
        read: Mapping[str, jax.Array],
        stored: Mapping[str, jax.Array],
    ) -> jax.Array:
        """Calls a layer or norm, and marks in the traced program, by its path, its variables, input and output.

        `read` has the arrays that the call reads for the module's variables, `stored` those that the model has there.
        """
        variables = {}
        for name, array in read.items():
            checkpoint_name(array, f"{_TAG} {name} {path}")
            held = stored.get(name)
            place, shape = self._places.get(id(held)), () if held is None else jnp.shape(held)
            self.holders[place].add(path)
            variables[name] = Variable(jax.typeof(array), shape, place)
        if args:
            args = (checkpoint_name(args[0], f"{_TAG} in {path}"), *args[1:])
        y: jax.Array = checkpoint_name(function(*args, **kwargs), f"{_TAG} out {path}")
        is_norm = isinstance(module, self.norms)
        mode = kwargs.get("use_running_average", args[1] if is_norm and len(args) > 1 else None)
        evaluates = bool(getattr(module, "use_running_average", None) if mode is None else mode)
        evaluates = evaluates or getattr(module, "fixed_statistics", False)
        order = len(self.modules)
        self.modules.setdefault(
            path, TracedModule(path, module, cls, is_norm, order, jax.typeof(y), evaluates, variables)
        )
        return y

    def run(self, function: Callable[..., object], *arguments: object) -> None:
        """Traces a function in which the model's layers and norms run through `record`."""

        def traced(*arguments: object) -> object:
            for place, v in enumerate(jax.tree.leaves(arguments)):
                self._places[id(v)] = place
            return function(*arguments)

        self._program, self._arguments = jax.jit(traced).trace(*arguments), arguments
        jaxpr = self._program.jaxpr.jaxpr
        origins: dict[Var, Origin] = dict(zip(jaxpr.invars, range(len(jaxpr.invars)), strict=True))
        self._follow(jaxpr, origins, None)
        self._read(jaxpr.outvars, origins, OUTPUT)

    def outputs(self) -> object:
        """What the traced function returns."""
        return self._program.lower().compile()(*self._arguments)

    def _follow(self, jaxpr: Jaxpr, origins: dict[Var, Origin], inside: str | None) -> None:
        """Records a program and those inside it, such as loops and branches.

        `origins` has the inputs of which it is known where they come from, and receives the variables that are still
        the same arrays. `inside` is the module whose call the program is part of.
        """
        makers: dict[Var, Node] = {}
        for equation in jaxpr.eqns:
            name, operands = _name_of(equation), equation.invars
            _, way, path = name.split(" ", 2) if name.startswith(f"{_TAG} ") else ("", "", "")
            if way not in ("", "in", "out"):
                for v in operands:
                    if not isinstance(v, Literal):
                        self.reads[path, way].add(origins.get(v, makers.get(v, INPUT)))
                inside = path
                continue
            self._link(operands, makers, path if way == "in" else Operation(name))
            makers.update(dict.fromkeys(equation.outvars, path if way == "out" else Operation(name)))
            inside = None if way == "out" else inside
            if equation.primitive.name in _KEEPS:
                for old, new in zip(operands, equation.outvars, strict=False):
                    if not isinstance(old, Literal) and old in origins:
                        origins[new] = origins[old]
            elif programs := _programs_in(equation):
                for program in programs:
                    self._follow(program, _origins_within(equation, program, makers | origins), inside)
            else:
                self._read(operands, origins, inside or Operation(name))
        self._link(jaxpr.outvars, makers, OUTPUT)

    def _link(self, operands: Iterable[Var | Literal], makers: Mapping[Var, Node], user: Node) -> None:
        for v in operands:
            if not isinstance(v, Literal):
                source = makers.get(v, INPUT)
                self.users[source].add(user)
                self.sources[user].add(source)

    def _read(self, operands: Iterable[Var | Literal], origins: Mapping[Var, Origin], reader: Node) -> None:
        for v in operands:
            origin = None if isinstance(v, Literal) else origins.get(v)
            if isinstance(origin, int):
                self.readers[origin].add(reader)

    def paths(self, norms: bool) -> list[str]:
        """The paths of all norms that were called, or of all layers."""
        return [path for path, module in self.modules.items() if module.is_norm == norms]

    def is_before(self, norm: str, layer: str) -> bool:
        return self.modules[norm].order < self.modules[layer].order


def _name_of(equation: JaxprEqn) -> str:
    """The name of the function that is called, if the program has one, or of the operation."""
    inner = equation.params.get("call_jaxpr")  # of a function with a derivative rule of its own, such as relu
    if inner is not None and inner.eqns:
        return _name_of(inner.eqns[-1])
    return str(equation.params.get("name") or equation.primitive.name)


def _programs_in(equation: JaxprEqn) -> list[Jaxpr]:
    """The programs that an operation runs, such as those of loops and branches."""
    found = []
    for value in equation.params.values():
        for inner in value if isinstance(value, tuple | list) else (value,):
            if isinstance(inner, ClosedJaxpr | Jaxpr):
                found.append(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)
    return found


def _origins_within(equation: JaxprEqn, program: Jaxpr, origins: Mapping[Var, Origin]) -> dict[Var, Origin]:
    """Where the inputs of a program in an operation come from, as far as that is known."""
    # Operands in front of those of the program choose a branch, or are those of a loop's condition.
    operands = equation.invars[len(equation.invars) - len(program.invars) :]
    if equation.primitive.name == "scan":
        # By shapes, since parameters differ between versions of JAX: what is stacked has one more axis outside.
        count = sum(_shape(a) == _shape(b) for a, b in zip(program.outvars, equation.outvars, strict=True))
        stacked = sum(_shape(a) != _shape(b) for a, b in zip(program.invars, operands, strict=True))
        first = len(program.invars) - count - stacked
    elif equation.primitive.name == "while":
        first, count = len(program.invars) - len(equation.outvars), len(equation.outvars)
    else:
        first, count = 0, 0
    # What a loop carries is known only if each iteration hands it on.
    carried = dict(zip(program.invars[first : first + count], program.outvars, strict=False))
    pairs = zip(program.invars, operands, strict=False)
    return {v: origins[o] for v, o in pairs if not isinstance(o, Literal) and o in origins and carried.get(v, v) is v}


def _shape(v: Var | Literal) -> object:
    """The shape of an array or a reference; None of what has none."""
    return getattr(v.aval, "shape", None)
