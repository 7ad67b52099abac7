"""Which array of another library belongs to which leaf, and how it comes to lie there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._messages import few
from jaxbn.interop._conventions import KERAS, Array, Convention, as_array, fits_jax, is_floating
from jaxbn.interop._targets import Target

# From a module's path in the target to its name elsewhere. None: leave that one as it is.
Names = Mapping[str, str | None] | Callable[[str], str | None]

COUNTER = "num_batches_tracked"
_MAX_COUNT = int(np.iinfo(np.int32).max)


class Plan(NamedTuple):
    """Where the value of a leaf comes from: no candidates, it stays; otherwise the first that is there."""

    path: str
    leaf: Any
    candidates: tuple[str, ...]
    kind: str


def make_plans(
    goal: Target,
    names: Names | None,
    kinds: Mapping[str, str] | None,
    convention: Convention,
    problems: list[str],
) -> Iterator[Plan]:
    """Yields a plan for each leaf; what cannot be planned is added to `problems`."""
    names, kinds = names or {}, kinds or {}
    problems += [
        f"names: expected the path of a module or leaf of the target, got {key!r}"
        for key in (() if callable(names) else names)
        if not any(_holds(key, path) for path in goal.leaves)
    ]
    for key, kind in kinds.items():
        leaf = goal.leaves.get(key, goal.leaves.get(f"{key}/kernel" if key else "kernel"))
        if leaf is None:
            problems.append(f"kinds: expected the path of a leaf or of a module that has a kernel, got {key!r}")
        elif kind not in convention.layouts or (leaf.ndim < 2 and kind != "as_is"):
            fitting = " or ".join(convention.layouts) if leaf.ndim > 1 else "as_is"
            problems.append(f"kinds: expected {fitting} for {key!r} with {leaf.ndim} axes, got {kind!r}")
    for path, leaf in goal.leaves.items():
        module, _, own = path.rpartition("/")
        default = "conv_transpose" if own == "kernel" and module in goal.turned else convention.layout(own, leaf.ndim)
        kind = kinds.get(path, kinds.get(module, default) if own == "kernel" else default)
        try:
            candidates = _candidates(path, names, convention)
        except TypeError as error:
            if str(error) not in problems:
                problems.append(str(error))
            continue
        possible = leaf.ndim > 1 or kind == "as_is"
        yield Plan(path, leaf, candidates, kind if kind in convention.layouts and possible else default)


def _holds(key: str, path: str) -> bool:
    return key in ("", path) or path.startswith(f"{key}/")


def _candidates(path: str, names: Names, convention: Convention) -> tuple[str, ...]:
    """What a leaf may be called in the source; nothing, if it shall stay as it is."""
    module, _, own = path.rpartition("/")
    rest, key = "", module
    if callable(names):
        name = names(module)
    else:
        key = max((key for key in names if _holds(key, path)), key=len, default="")
        name = names.get(key, "")
        rest = module.removeprefix(key).removeprefix("/").replace("/", convention.separator)
    if name is None:
        return ()
    if not isinstance(name, str):
        raise TypeError(f"names: expected a name or None for {key!r}, got {name!r}")
    if key == path:
        return (name,)
    if rest:
        name = convention.join(name, rest)
    return tuple(convention.join(name, theirs) for theirs in convention.names.get(own, (own,)))


def no_name_fits(goal: Target, missing: Mapping[str, str], source: Mapping[str, Any], convention: Convention) -> str:
    """What to say if the source has none of the names looked for, with the two that come closest."""
    best, example = 0, ""
    for path, leaf in goal.leaves.items():
        *modules, own = path.split("/")
        for parts in ([*modules, theirs] for theirs in convention.names.get(own, (own,))):
            for name, value in source.items():
                alike, rest = _ending(parts, name, convention.separator)
                if alike > best and getattr(value, "ndim", None) == leaf.ndim:
                    best = alike
                    example = f", such as names={{{'/'.join(parts[:-alike])!r}: {rest!r}}}"
    return (
        f"names: expected some of {len(missing)} names ({few(missing.values(), 3)}), got {len(source)} others "
        f"({few(source, 3)}); pass names{example}"
    )


def _ending(parts: list[str], name: str, separator: str) -> tuple[int, str]:
    """How many of the last parts a name ends with, and what comes before them."""
    for count in range(len(parts), 0, -1):
        rest = (separator + name).removesuffix(separator + separator.join(parts[-count:]))
        if len(rest) <= len(name):
            return count, rest.removeprefix(separator)
    return 0, name


def convert(raw: Any, name: str, plan: Plan, convention: Convention, cast: bool) -> jax.Array:
    """Returns the array as the leaf wants it.

    Raises:
      ValueError, TypeError: what is wrong with it.
    """
    leaf, array = plan.leaf, as_array(raw)
    by_name = convention is KERAS and name.endswith("depthwise_kernel")
    layout = convention.layouts["depthwise" if by_name else plan.kind]
    loaded = layout.load(array) if array.ndim == leaf.ndim else array
    if loaded.shape != leaf.shape:
        expected = layout.save(np.broadcast_to(np.empty((), leaf.dtype), leaf.shape)).shape
        raise ValueError(
            f"expected {name!r} with shape {expected}, got {array.shape}{_other_kind(array, plan, convention)}"
        )
    if plan.path.split("/")[-1] == COUNTER:
        return jnp.asarray(read_counter(array), leaf.dtype)
    if array.dtype != leaf.dtype:
        floating = is_floating(array.dtype) and is_floating(leaf.dtype)
        if not floating or not cast:
            cure = "; pass cast=True to convert" if floating else ""
            raise ValueError(f"expected {name!r} of dtype {leaf.dtype}, got {array.dtype}{cure}")
    if not fits_jax(leaf.dtype):
        raise ValueError(f"expected a leaf of a dtype that JAX has, got {leaf.dtype}; enable x64")
    # astype copies: the source may go on changing.
    return jnp.asarray(loaded.astype(leaf.dtype))


def _other_kind(array: Array, plan: Plan, convention: Convention) -> str:
    """What to do about a kernel whose shape is right if it lies in another way."""
    module, _, own = plan.path.rpartition("/")
    if own == "kernel" and array.ndim == plan.leaf.ndim > 1:
        for kind, layout in convention.layouts.items():
            if layout.load(array).shape == plan.leaf.shape:
                return f"; pass kinds={{{module!r}: {kind!r}}} if that is how it lies"
    return ""


def read_counter(value: Any) -> int:
    """Returns a number of batches.

    Raises:
      ValueError, TypeError: it is none, or none that int32 holds.
    """
    array = as_array(value)
    if array.shape != () or not jnp.issubdtype(array.dtype, np.integer) or not 0 <= int(array) <= _MAX_COUNT:
        raise ValueError(f"expected an integer from 0 to {_MAX_COUNT}, got {array.dtype} {array}")
    return int(array)


def copy(value: Any) -> Array:
    """A contiguous copy, which `torch.from_numpy` takes."""
    return np.array(value, order="C")


def raise_all(function: str, done: str, problems: list[str]) -> None:
    """Raises one ValueError if there are problems."""
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ValueError("\n  ".join([f"{function}: {count}, nothing was {done}", *problems]))


def twice(takers: Mapping[str, list[str]]) -> list[str]:
    """What to say of names that several leaves take."""
    return [
        f"{', '.join(paths)}: expected a name for each, got {name!r} for all"
        for name, paths in takers.items()
        if len(paths) > 1
    ]
