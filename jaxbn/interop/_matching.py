"""Finds the names that each leaf of the target may have in another library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxbn.interop._formats import COUNTER, TORCH, WeightFormat
from jaxbn.interop._layers import PROJECTIONS, Layers, kind_errors

# From the path of a module in the target to its name in the source. None: the module stays as it is.
Names = Mapping[str, str | None] | Callable[[str], str | None]


class Candidate(NamedTuple):
    """A name that a leaf may have, in which * stands for the number of each stacked layer.

    Attributes:
      third: 0, 1 or 2 if the leaf is that third of the rows: query, key or value.
    """

    name: str
    third: int | None = None


class Plan(NamedTuple):
    """Where the value of one leaf comes from.

    Attributes:
      path: the path of the leaf in the target.
      leaf: the array in the target, or its shape and dtype.
      candidates: the names that the value may have in the source; the first is the one that is written.
      keep: whether the leaf stays as it is. The candidates are then the names that it would have.
    """

    path: str
    leaf: Any
    candidates: tuple[Candidate, ...]
    keep: bool


def make_plans(layers: Layers, names: Names | None) -> tuple[list[Plan], list[str]]:
    """Returns a plan for each leaf that can be planned, and the errors about `names` and `kinds`."""
    names = names or {}
    errors = [
        f"names: expected the path of a module or leaf of the target, got {key!r}"
        for key in (() if callable(names) else names)
        if not any(contains(key, path) for path in layers.target.leaves)
    ]
    errors += kind_errors(layers)
    plans = []
    for path in layers.target.leaves:
        try:
            plans.append(make_plan(layers, path, names))
        except TypeError as error:
            errors.append(str(error))
    return plans, list(dict.fromkeys(errors))


def make_plan(layers: Layers, path: str, names: Names) -> Plan:
    """Raises TypeError if `names` has no name for the leaf, nor None."""
    leaf, module = layers.target.leaves[path], path.rpartition("/")[0]
    if callable(names):
        keep = names(module) is None
        return Plan(path, leaf, () if keep else _candidates(layers, path, names), keep)
    keep = names.get(_key(names, path), "") is None
    return Plan(path, leaf, _candidates(layers, path, {k: v for k, v in names.items() if v is not None}), keep)


def contains(key: str, path: str) -> bool:
    """Whether `key` is the path of a leaf or of a module that contains it."""
    return key in ("", path) or path.startswith(f"{key}/")


def _key(names: Mapping[str, Any], path: str) -> str:
    return max((key for key in names if contains(key, path)), key=len, default="")


def _module_name(names: Names, module: str, weight_format: WeightFormat) -> str:
    key = module if callable(names) else _key(names, module)
    name = names(module) if callable(names) else names.get(key, "")
    if not isinstance(name, str):
        raise TypeError(f"names: expected a name or None for {key!r}, got {name!r}")
    return weight_format.join(name, module.removeprefix(key).strip("/").replace("/", weight_format.separator))


def _candidates(layers: Layers, path: str, names: Names) -> tuple[Candidate, ...]:
    weight_format, role = layers.weight_format, layers.role(path)
    module, _, leaf_name = path.rpartition("/")
    third = PROJECTIONS.index(role) if role in PROJECTIONS else None
    if not callable(names) and path in names:
        name = names[path]
        if not isinstance(name, str):
            raise TypeError(f"names: expected a name or None for {path!r}, got {name!r}")
        in_thirds = name.rpartition(".")[2] == f"in_proj_{'weight' if leaf_name == 'kernel' else leaf_name}"
        return (Candidate(name, third if in_thirds else None),)
    name = _module_name(names, module, weight_format)
    ends = weight_format.names.get(leaf_name, (leaf_name,))
    own = tuple(Candidate(weight_format.join(name, end)) for end in ends)
    parent = _name_of_attention(module.rpartition("/")[0], names, weight_format) if role else None
    if parent is None:
        return own
    if weight_format is not TORCH:
        return own + tuple(Candidate(weight_format.join(parent, "attention_output", e)) for e in ends if role == "out")
    form = layers.attention[module.rpartition("/")[0]]
    theirs = _of_torch(form, role, third, leaf_name, ends)
    theirs = tuple(Candidate(weight_format.join(parent, name), part) for name, part in theirs)
    return tuple(dict.fromkeys(theirs + own if form else own + theirs))


def _name_of_attention(attention: str, names: Names, weight_format: WeightFormat) -> str | None:
    """The name of a module of attention; None if `names` gives its projections names of their own."""
    modules = [f"{attention}/{role}".lstrip("/") for role in (*PROJECTIONS, "out")]
    if not callable(names) and any(module in names for module in modules[:-1]):
        return None
    found = [names(m) if callable(names) else _module_name(names, m, weight_format) for m in modules]
    if not isinstance(found[0], str) or not found[0].endswith("query"):
        return None
    parent = found[0].removesuffix("query").removesuffix(weight_format.separator)
    theirs = [weight_format.join(parent, end) for end in (*PROJECTIONS, "out", "out_proj")]
    return parent if {*found} <= {None, *theirs} else None


def _of_torch(
    weight: str, role: str, third: int | None, leaf_name: str, ends: tuple[str, ...]
) -> tuple[Candidate, ...]:
    """The names in torch.nn.MultiheadAttention, first the one that it has for weights of these shapes."""
    if third is None:
        return tuple(Candidate(f"out_proj.{end}") for end in ends)
    if leaf_name != "kernel":
        return (Candidate(f"in_proj_{leaf_name}", third),)
    both = Candidate("in_proj_weight", third), Candidate(f"{role[0]}_proj_weight")
    return both[::-1] if weight == "q_proj_weight" else both


def counter_of(name: str) -> str | None:
    """The name of the counter that belongs to a running mean of PyTorch with this name."""
    return name.removesuffix("running_mean") + COUNTER if name.endswith("running_mean") else None


def duplicates(leaves: Mapping[Candidate, list[str]]) -> list[str]:
    """The errors about names that several leaves have; `leaves` has the paths of all leaves of a name."""
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
