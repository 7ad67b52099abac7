"""Finds the name and layout that each leaf of the target has in another library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxbn._messages import few
from jaxbn.interop._formats import COUNTER, WeightFormat
from jaxbn.interop._targets import Target

# From the path of a module in the target to its name in the source. None: the module stays as it is.
Names = Mapping[str, str | None] | Callable[[str], str | None]


class Plan(NamedTuple):
    """Where the value of one leaf comes from.

    Attributes:
      path: the path of the leaf in the target.
      leaf: the array in the target, or its shape and dtype.
      candidates: names that the value may have in the source. If there are none, the leaf keeps its value.
      kind: the name of the value's layout.
    """

    path: str
    leaf: Any
    candidates: tuple[str, ...]
    kind: str


def make_plans(
    target: Target, names: Names | None, kinds: Mapping[str, str] | None, weight_format: WeightFormat
) -> tuple[list[Plan], list[str]]:
    """Returns a plan for each leaf that can be planned, and the errors about `names` and `kinds`."""
    names, kinds = names or {}, kinds or {}
    errors = [
        f"names: expected the path of a module or leaf of the target, got {key!r}"
        for key in (() if callable(names) else names)
        if not any(_contains(key, path) for path in target.leaves)
    ]
    errors += _kind_errors(target, kinds, weight_format)
    plans = []
    for path, leaf in target.leaves.items():
        module, _, leaf_name = path.rpartition("/")
        default = weight_format.default_kind(leaf_name, leaf.ndim)
        if leaf_name == "kernel" and module in target.conv_transpose:
            default = "conv_transpose"
        kind = kinds.get(path, kinds.get(module, default) if leaf_name == "kernel" else default)
        if not _is_kind(kind, leaf, weight_format):
            kind = default
        try:
            plans.append(Plan(path, leaf, _candidates(path, names, weight_format), kind))
        except TypeError as error:
            errors.append(str(error))
    return plans, list(dict.fromkeys(errors))


def _kind_errors(target: Target, kinds: Mapping[str, str], weight_format: WeightFormat) -> list[str]:
    errors = []
    for key, kind in kinds.items():
        leaf = target.leaves.get(key, target.leaves.get(f"{key}/kernel" if key else "kernel"))
        if leaf is None:
            errors.append(f"kinds: expected the path of a leaf or of a module that has a kernel, got {key!r}")
        elif not _is_kind(kind, leaf, weight_format):
            fitting = " or ".join(weight_format.layouts) if leaf.ndim > 1 else "as_is"
            errors.append(f"kinds: expected {fitting} for {key!r} with {leaf.ndim} axes, got {kind!r}")
    return errors


def _is_kind(kind: str, leaf: Any, weight_format: WeightFormat) -> bool:
    """Whether there is such a layout, and the leaf has enough axes for it."""
    return kind in weight_format.layouts and (leaf.ndim > 1 or kind == "as_is")


def _contains(key: str, path: str) -> bool:
    """Whether `key` is the path of a leaf or of a module that contains it."""
    return key in ("", path) or path.startswith(f"{key}/")


def _candidates(path: str, names: Names, weight_format: WeightFormat) -> tuple[str, ...]:
    """The names that a leaf may have in the source; none if it keeps its value."""
    module, _, leaf_name = path.rpartition("/")
    rest, key = "", module
    if callable(names):
        name = names(module)
    else:
        key = max((key for key in names if _contains(key, path)), key=len, default="")
        name = names.get(key, "")
        rest = module.removeprefix(key).removeprefix("/").replace("/", weight_format.separator)
    if name is None:
        return ()
    if not isinstance(name, str):
        raise TypeError(f"names: expected a name or None for {key!r}, got {name!r}")
    if key == path:
        return (name,)
    if rest:
        name = weight_format.join(name, rest)
    return tuple(weight_format.join(name, theirs) for theirs in weight_format.names.get(leaf_name, (leaf_name,)))


def no_match(target: Target, missing: Mapping[str, str], source: Mapping[str, Any], weight_format: WeightFormat) -> str:
    """The error if the source has none of the names looked for; it suggests `names` by the most similar two."""
    best, example = 0, ""
    for path, leaf in target.leaves.items():
        *modules, leaf_name = path.split("/")
        for parts in ([*modules, theirs] for theirs in weight_format.names.get(leaf_name, (leaf_name,))):
            for name, value in source.items():
                count, rest = _common_end(parts, name, weight_format.separator)
                if count > best and getattr(value, "ndim", None) == leaf.ndim:
                    best = count
                    example = f", such as names={{{'/'.join(parts[:-count])!r}: {rest!r}}}"
    return (
        f"names: expected some of {len(missing)} names ({few(missing.values(), 3)}), got {len(source)} others "
        f"({few(source, 3)}); pass names{example}"
    )


def _common_end(parts: list[str], name: str, separator: str) -> tuple[int, str]:
    """With how many of the last parts a name ends, and what the name has before them."""
    for count in range(len(parts), 0, -1):
        rest = (separator + name).removesuffix(separator + separator.join(parts[-count:]))
        if len(rest) <= len(name):
            return count, rest.removeprefix(separator)
    return 0, name


def counter_of(name: str) -> str | None:
    """The name of the counter that belongs to a running mean of PyTorch with this name."""
    return name.removesuffix("running_mean") + COUNTER if name.endswith("running_mean") else None


def duplicates(leaves: Mapping[str, list[str]]) -> list[str]:
    """The errors about names that several leaves have; `leaves` has the paths of all leaves of a name."""
    return [
        f"{', '.join(paths)}: expected a name for each, got {name!r} for all"
        for name, paths in leaves.items()
        if len(paths) > 1
    ]


def raise_all(function: str, done: str, errors: list[str]) -> None:
    """Raises one ValueError that lists all errors, if there are any."""
    if errors:
        count = "1 problem" if len(errors) == 1 else f"{len(errors)} problems"
        raise ValueError("\n  ".join([f"{function}: {count}, nothing was {done}", *errors]))
