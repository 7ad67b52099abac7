"""Which names each leaf of the target may have in another library, and which of them the source has."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from jaxbn._paths import join, split
from jaxbn.interop._formats import COUNTER, KERAS, Layout, Shape, WeightFormat
from jaxbn.interop._layers import PROJECTIONS, Layers
from jaxbn.interop._source import Entries
from jaxbn.interop._targets import Leaf

# From the path of a module in the target to its name in the source. None: the module stays as it is.
Names = Mapping[str, str | None] | Callable[[str], str | None]


class Plan(NamedTuple):
    """Where the value of one leaf comes from."""

    path: str  # in the target
    leaf: Leaf
    layers: Layers  # of the target
    # The names that it may have, in which * stands for the number of each stacked layer. The first is written.
    candidates: Sequence[str]
    keep: bool  # whether the leaf stays as it is; the candidates are then those that it would have

    def third(self, name: str) -> int | None:
        """0, 1 or 2 if the leaf is that third of the rows of the array of this name: query, key or value."""
        leaf_name, role = split(self.path)[1], self.layers.role(self.path)
        in_thirds = name.rpartition(".")[2] == f"in_proj_{'weight' if leaf_name == 'kernel' else leaf_name}"
        return PROJECTIONS.index(role) if in_thirds and role in PROJECTIONS else None


def make_plans(layers: Layers, names: Names | None) -> tuple[list[Plan], list[str]]:
    """Returns a plan for each leaf that can be planned, and the errors about `names` and `kinds`."""
    names = names or {}
    errors = [
        f"names: expected the path of a module or leaf of the target, got {key!r}"
        for key in (() if callable(names) else names)
        if not any(contains(key, path) for path in layers.leaves)
    ]
    errors += layers.errors()
    plans = []
    for path in layers.leaves:
        try:
            plans.append(make_plan(layers, path, names))
        except TypeError as error:
            errors.append(str(error))
    return plans, list(dict.fromkeys(errors))


def make_plan(layers: Layers, path: str, names: Names) -> Plan:
    """Raises TypeError if `names` has no name for the leaf, nor None."""
    if callable(names):
        keep = names(split(path)[0]) is None
        candidates = [] if keep else _candidates(layers, path, names)
    else:
        keep = names.get(_key(names, path), "") is None
        candidates = _candidates(layers, path, {k: v for k, v in names.items() if v is not None})
    return Plan(path, layers.leaves[path], layers, candidates, keep)


def contains(key: str, path: str) -> bool:
    """Whether `key` is the path of a leaf or of a module that contains it."""
    return key in ("", path) or path.startswith(f"{key}/")


def _key(names: Mapping[str, str | None], path: str) -> str:
    return max((key for key in names if contains(key, path)), key=len, default="")


def _name(names: Names, path: str, weight_format: WeightFormat) -> str:
    key = path if callable(names) else _key(names, path)
    name = names(path) if callable(names) else names.get(key, "")
    if not isinstance(name, str):
        raise TypeError(f"names: expected a name or None for {key!r}, got {name!r}")
    return weight_format.join(name, path.removeprefix(key).strip("/").replace("/", weight_format.separator))


def _candidates(layers: Layers, path: str, names: Names) -> Sequence[str]:
    weight_format, role = layers.weight_format, layers.role(path)
    module, leaf_name = split(path)
    if not callable(names) and path in names:
        return [_name(names, path, weight_format)]
    name = _name(names, module, weight_format)
    ends = weight_format.names.get(leaf_name, (leaf_name,))
    own = [weight_format.join(name, end) for end in ends]
    attention, _ = split(module)
    parent = _name_of_attention(attention, names, weight_format) if role else None
    if parent is None:
        return own
    if weight_format is KERAS:
        return own + [weight_format.join(parent, "attention_output", end) for end in ends if role == "out"]
    query_name = layers.attention(attention)
    if role == "out":
        theirs = [f"out_proj.{end}" for end in ends]
    elif leaf_name != "kernel":
        theirs = [f"in_proj_{leaf_name}"]
    else:
        theirs = ["in_proj_weight", f"{role[0]}_proj_weight"]
        theirs = theirs[::-1] if query_name == "q_proj_weight" else theirs
    theirs = [weight_format.join(parent, name) for name in theirs]
    # First the names that have weights of these shapes in torch.nn.MultiheadAttention.
    return list(dict.fromkeys(theirs + own if query_name else own + theirs))


def _name_of_attention(attention: str, names: Names, weight_format: WeightFormat) -> str | None:
    """The name of a module of attention; None if `names` gives its projections names of their own."""
    modules = [join(attention, role) for role in (*PROJECTIONS, "out")]
    if not callable(names) and any(module in names for module in modules[:-1]):
        return None
    found = [names(m) if callable(names) else _name(names, m, weight_format) for m in modules]
    if not isinstance(found[0], str) or not found[0].endswith("query"):
        return None
    parent = found[0].removesuffix("query").removesuffix(weight_format.separator)
    theirs = [weight_format.join(parent, end) for end in (*PROJECTIONS, "out", "out_proj")]
    return parent if {*found} <= {None, *theirs} else None


class Found(NamedTuple):
    """The entries of a leaf: one, or one for each of its stacked layers."""

    plan: Plan
    name: str  # with * for the numbers of the layers
    entries: Entries
    names: dict[Shape, str]  # those of the entries, by the numbers of the layers and in their order

    @property
    def depth(self) -> int:
        """How many axes the stacked layers have."""
        return self.name.count("*")

    @property
    def leaf_shape(self) -> Shape:
        """The shape that each entry fills."""
        return self.plan.leaf.shape[self.depth :]

    @property
    def layout(self) -> Layout:
        """ValueError if `kinds` has one for another number of axes."""
        layers = self.plan.layers
        if layers.weight_format is KERAS and self.name.endswith("depthwise_kernel"):
            return layers.weight_format.layouts["depthwise"]
        return layers.layout(self.plan.path, self.depth)

    def is_numbered(self) -> bool:
        """Whether there is an entry for each of the stacked layers, numbered from 0."""
        lead = self.plan.leaf.shape[: self.depth]
        inside = (all(map(operator.lt, numbers, lead)) for numbers in self.names)
        return len(self.names) == math.prod(lead) and all(inside)

    def has_axes(self) -> bool:
        """Whether the first entry has as many axes as expected."""
        shape = self.entries.shape(next(iter(self.names.values())))
        try:
            return shape is not None and len(shape) == len(self.layout.shape(self.leaf_shape))
        except ValueError:
            return False

    def fits(self) -> bool:
        try:
            return all(self.expected(self.entries.shape(name)) is None for name in self.names.values())
        except ValueError:
            return False

    def expected(self, shape: Shape | None) -> Shape | None:
        """The shape that an entry should have; None if it is this one."""
        layout, leaf_name = self.layout, split(self.plan.path)[1]
        expected = layout.shape(self.leaf_shape)
        if self.plan.third(self.name) is not None:
            expected = (3 * expected[0], *expected[1:])
        elif shape is not None and layout.fits(shape, self.leaf_shape):
            return None
        # One value has no axis in one library and one in the other; Keras' slopes have one for each axis of x.
        one = shape in ((), (1,)) or (leaf_name == "negative_slope" and set(shape or ()) == {1})
        return (
            None if shape == expected or (one and self.leaf_shape in ((), (1,)) and leaf_name != COUNTER) else expected
        )


def find(plan: Plan, entries: Entries) -> Found | None:
    """Returns the entries of a leaf, or None; raises ValueError if it is not clear which are those of its layers."""
    named = _found(plan, entries, plan.candidates)
    for found in named:
        if not found.is_numbered():
            raise ValueError(
                f"expected {found.name!r} with a number from 0 for each entry along the first {found.depth} of the "
                f"axes {plan.leaf.shape}, got {len(found.names)} such names"
            )
    if named:
        return next((found for found in named if found.fits()), named[0])
    stacked = [f for f in _stacked(plan, entries) if f.is_numbered() and (f.has_axes() or f.fits())]
    if len(stacked) > 1:
        ways = ", ".join(repr(found.name) for found in stacked)
        raise ValueError(f"expected one way to number its stacked layers, got {ways}; pass one of them in names")
    return stacked[0] if stacked else None


def nearly(plan: Plan, entries: Entries) -> str:
    """What a leaf without entries has instead: numbered names, but not one for each entry of its first axis."""
    for found in _stacked(plan, entries):
        if found.depth == 1 and found.has_axes():
            return (
                f"; as a stack of layers along its first axis it needs {found.name!r} with the numbers 0 to "
                f"{plan.leaf.shape[0] - 1}, got {', '.join(str(number) for (number,) in found.names)}"
            )
    return ""


def _stacked(plan: Plan, entries: Entries) -> list[Found]:
    """What a leaf has if its layers are stacked; numbers may be missing."""
    names = [pattern for name in plan.candidates for pattern in sorted(entries.patterns.get(name, ()))]
    return [found for found in _found(plan, entries, names) if found.depth <= plan.leaf.ndim]


def _found(plan: Plan, entries: Entries, names: Sequence[str]) -> list[Found]:
    return [Found(plan, name, entries, found) for name in names if (found := entries.numbered(name))]


def counter_of(name: str) -> str | None:
    """The name of the counter that belongs to a running mean of PyTorch with this name."""
    return name.removesuffix("running_mean") + COUNTER if name.endswith("running_mean") else None


def duplicates(leaves: Mapping[tuple[str, int | None], list[str]]) -> list[str]:
    """The errors about names that several leaves have; `leaves` has the paths of all leaves of a name and third."""
    return [
        f"{', '.join(paths)}: expected a name for each, got {name!r} for all"
        for (name, _), paths in leaves.items()
        if len(paths) > 1
    ]


def raise_all(function: str, done: str, errors: list[str]) -> None:
    """Raises one ValueError that lists all errors, if there are any."""
    if errors:
        count = "1 problem" if len(errors) == 1 else f"{len(errors)} problems"
        raise ValueError("\n  ".join([f"{function}: {count}, nothing was {done}", *errors]))
