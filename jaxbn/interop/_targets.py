"""Reads the leaves of Linen variables or an NNX model by slash-separated paths, and fills them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey, keystr

from jaxbn._messages import few
from jaxbn._paths import path_of
from jaxbn._versions import get_value, iter_modules

if TYPE_CHECKING:
    from flax import nnx

_COLLECTIONS = ("params", "batch_stats")

Leaf = jax.Array | jax.ShapeDtypeStruct
# Linen variables or an NNX model.
Tree = Any


class Kernel(NamedTuple):
    """What the class of an NNX module shows of its kernel, which arrays do not show."""

    axes: int  # where the module is not stacked
    layout: str  # "linear", "conv" or "conv_transpose", the last only with transpose_kernel=False
    inputs: int = 1  # how many of the axes are inputs, if it is linear


class Target(NamedTuple):
    """The leaves of Linen variables or of an NNX model, and a function that fills them."""

    leaves: dict[str, Leaf]  # by path: module and name, without Linen's collection
    # From new leaves in the same order to a new Linen tree, or to the NNX model, changed in place.
    fill: Callable[[Sequence[Leaf]], Tree]
    kernels: Mapping[str, Kernel] = MappingProxyType({})  # by the path of the module
    errors: Sequence[str] = ()  # about all other entries that have only shape and dtype, and would keep that


def open_target(target: Tree, rngs: nnx.Rngs | None = None) -> Target:
    """Opens Linen variables or an NNX model, whose random streams without keys are filled from `rngs`."""
    # It is already imported if the caller has an NNX model or nnx.Rngs.
    nnx = sys.modules.get("flax.nnx")
    if rngs is not None and (nnx is None or not isinstance(rngs, nnx.Rngs)):
        raise TypeError(f"rngs: expected flax.nnx.Rngs or None, got {type(rngs).__name__}; pass nnx.Rngs(0)")
    if isinstance(target, Mapping) and any(name in target for name in _COLLECTIONS):
        if rngs is not None:
            raise TypeError("rngs: expected None with Linen variables, which have no random streams, got Rngs")
        return _open_linen(target)
    if nnx is not None and isinstance(target, nnx.Module):
        return _open_nnx(target, rngs)
    got = f"a mapping with {', '.join(map(repr, target))}" if isinstance(target, Mapping) else type(target).__name__
    raise TypeError(
        f"target: expected Linen variables with 'params', 'batch_stats' or both, or an nnx.Module, got {got}; "
        "pass all of what model.init returns, or the model"
    )


def _open_linen(variables: Tree) -> Target:
    with_paths, tree = jax.tree_util.tree_flatten_with_path(variables)
    places: dict[str, list[int]] = {}
    errors = []
    for place, (keys, leaf) in enumerate(with_paths):
        # An attribute in a path is that of a box around a leaf (flax.linen.Partitioned).
        names = [keystr((key,), simple=True) for key in keys if not isinstance(key, GetAttrKey)]
        if names[0] in _COLLECTIONS:
            places.setdefault(path_of(names[1:]), []).append(place)
        elif isinstance(leaf, jax.ShapeDtypeStruct):
            errors.append(
                f"{path_of(names)}: expected an array, since nothing is loaded into it, got "
                "only shape and dtype; leave its collection out of target"
            )
    duplicates = [repr(path) for path, found in places.items() if len(found) > 1]
    if duplicates:
        raise ValueError(
            f"target: expected paths that differ without their collection, got {', '.join(duplicates)} in "
            "both 'params' and 'batch_stats'; load the collections one by one"
        )
    leaves = [leaf for _, leaf in with_paths]

    def fill(values: Sequence[Leaf]) -> Tree:
        new = dict(zip((place for (place,) in places.values()), values, strict=True))
        return jax.tree.unflatten(tree, [new.get(place, leaf) for place, leaf in enumerate(leaves)])

    return Target({path: leaves[place] for path, (place,) in places.items()}, fill, errors=errors)


def _open_nnx(model: Tree, rngs: nnx.Rngs | None) -> Target:
    from flax import nnx

    loaded, rest = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat), ...)
    flat, empty = list(nnx.to_flat_state(loaded)), []
    errors, streams = [], {}
    for path, leaf in nnx.to_flat_state(rest):
        value = get_value(leaf) if isinstance(leaf, nnx.Variable) else leaf
        if not isinstance(value, jax.ShapeDtypeStruct):
            continue
        if isinstance(leaf, nnx.RngState):
            streams[path_of(path[:-1])] = leaf.tag
            empty.append((path, leaf, value))
        else:
            errors.append(
                f"{path_of(path)}: expected a value, since nothing is loaded into it, got only shape and dtype; "
                "give it one before, or load into a model that was built without nnx.eval_shape"
            )
    if streams and rngs is None:
        errors.append(
            f"rngs: expected nnx.Rngs to fill {few(streams, 3)}, which {'has' if len(streams) == 1 else 'have'} only "
            "shape and dtype, got None; pass rngs=nnx.Rngs(0)"
        )
    elif rngs is not None and "default" not in rngs and any(tag not in rngs for tag in streams.values()):
        wanted = ", ".join(dict.fromkeys(streams.values()))
        errors.append(f"rngs: expected {wanted}, got {', '.join(rngs)}; nnx.Rngs(0) has a default for all")

    def new_value(variable: nnx.RngState, value: jax.ShapeDtypeStruct) -> jax.Array:
        if not isinstance(variable, nnx.RngKey):
            return jnp.zeros(value.shape, value.dtype)
        assert rngs is not None  # Or there is an error about it.
        key = rngs[variable.tag]()
        return jax.random.split(key, value.shape) if value.shape else key

    def fill(values: Sequence[Leaf]) -> Tree:
        changed = [(path, variable.replace(value)) for (path, variable), value in zip(flat, values, strict=True)]
        changed += [(path, variable.replace(new_value(variable, value))) for path, variable, value in empty]
        nnx.update(model, nnx.from_flat_state(changed))
        return model

    known = ((path_of(path), _kernel(module)) for path, module in iter_modules(model))
    kernels = {path: kernel for path, kernel in known if kernel is not None}
    return Target({path_of(path): get_value(variable) for path, variable in flat}, fill, kernels, errors)


def _kernel(module: nnx.Module) -> Kernel | None:
    from flax import nnx

    if isinstance(module, nnx.Linear):
        return Kernel(2, "linear")
    if isinstance(module, nnx.LinearGeneral) and not module.batch_axis:
        inputs = len(module.in_features)
        return Kernel(inputs + len(module.out_features), "linear", inputs)
    if isinstance(module, nnx.Conv | nnx.ConvTranspose):
        window = 1 if isinstance(module.kernel_size, int) else len(module.kernel_size)
        reversed_ = isinstance(module, nnx.ConvTranspose) and not module.transpose_kernel
        return Kernel(window + 2, "conv_transpose" if reversed_ else "conv")
    return None
