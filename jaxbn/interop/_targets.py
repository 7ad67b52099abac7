"""Reads the leaves of Linen variables or an NNX model by slash-separated paths, and fills them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey, keystr

from jaxbn._messages import few
from jaxbn._versions import get_value, iter_modules

_COLLECTIONS = ("params", "batch_stats")


class Kernel(NamedTuple):
    """What an NNX module shows of its kernel, which arrays do not show.

    Attributes:
      axes: how many it has where the module is not stacked.
      kind: "linear", "conv" or "conv_transpose", the last only with `transpose_kernel=False`.
      inputs: how many of the axes are inputs, if it is linear.
    """

    axes: int
    kind: str
    inputs: int = 1


class Target(NamedTuple):
    """The leaves of Linen variables or of an NNX model, and a function that fills them.

    Attributes:
      leaves: arrays, or their shapes and dtypes, by path: module and name, without Linen's collection.
      fill: takes new leaves in the same order; returns a new Linen tree, or the NNX model, changed in place.
      kernels: of NNX modules whose class is known, by the path of the module.
      errors: about all other entries that have only shape and dtype, and would keep that after loading.
    """

    leaves: dict[str, Any]
    fill: Callable[[Sequence[Any]], Any]
    kernels: Mapping[str, Kernel] = MappingProxyType({})
    errors: Sequence[str] = ()


def open_target(target: Any, rngs: Any = None) -> Target:
    """Opens Linen variables or an NNX model, whose random streams without keys are filled from `rngs`."""
    # flax.nnx is already imported if the caller has an NNX model or nnx.Rngs.
    nnx: Any = sys.modules.get("flax.nnx")
    if rngs is not None and (nnx is None or not isinstance(rngs, nnx.Rngs)):
        raise TypeError(f"rngs: expected flax.nnx.Rngs or None, got {type(rngs).__name__}; pass nnx.Rngs(0)")
    if isinstance(target, Mapping) and any(name in target for name in _COLLECTIONS):
        if rngs is not None:
            raise TypeError("rngs: expected None with Linen variables, which have no random streams, got Rngs")
        return _open_linen(target)
    if nnx is not None and isinstance(target, nnx.Module):
        return _open_nnx(nnx, target, rngs)
    got = f"a mapping with {', '.join(map(repr, target))}" if isinstance(target, Mapping) else type(target).__name__
    raise TypeError(
        f"target: expected Linen variables with 'params', 'batch_stats' or both, or an nnx.Module, got {got}; "
        "pass all of what model.init returns, or the model"
    )


def _open_linen(variables: Mapping[str, Any]) -> Target:
    with_paths, tree = jax.tree_util.tree_flatten_with_path(variables)
    # An attribute in a path is that of a box around a leaf (flax.linen.Partitioned).
    paths = [tuple(key for key in path if not isinstance(key, GetAttrKey)) for path, _ in with_paths]
    names = [keystr(path[1:], simple=True, separator="/") for path in paths]
    chosen = [i for i, path in enumerate(paths) if keystr(path[:1], simple=True) in _COLLECTIONS]
    found = {names[i]: with_paths[i][1] for i in chosen}
    if len(found) < len(chosen):
        duplicates = [name for name in found if sum(names[i] == name for i in chosen) > 1]
        raise ValueError(
            f"target: expected paths that differ without their collection, got {', '.join(map(repr, duplicates))} in "
            "both 'params' and 'batch_stats'; load the collections one by one"
        )

    def fill(values: Sequence[Any]) -> Any:
        leaves = [leaf for _, leaf in with_paths]
        for i, value in zip(chosen, values, strict=True):
            leaves[i] = value
        return jax.tree.unflatten(tree, leaves)

    errors = [
        f"{keystr(path, simple=True, separator='/')}: expected an array, since nothing is loaded into it, got only "
        "shape and dtype; leave its collection out of target"
        for path, leaf in with_paths
        if keystr(path[:1], simple=True) not in _COLLECTIONS and isinstance(leaf, jax.ShapeDtypeStruct)
    ]
    return Target(found, fill, errors=errors)


def _open_nnx(nnx: Any, model: Any, rngs: Any) -> Target:
    loaded, rest = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat), ...)
    flat, empty = list(nnx.to_flat_state(loaded)), []
    errors, streams = [], {}
    for path, leaf in nnx.to_flat_state(rest):
        value = get_value(leaf) if isinstance(leaf, nnx.Variable) else leaf
        if not isinstance(value, jax.ShapeDtypeStruct):
            continue
        if isinstance(leaf, nnx.RngState):
            streams[_name(path[:-1])] = leaf.tag
            empty.append((path, leaf, value))
        else:
            errors.append(
                f"{_name(path)}: expected a value, since nothing is loaded into it, got only shape and dtype; "
                "give it one before, or load into a model that was built without nnx.eval_shape"
            )
    if streams and rngs is None:
        errors.append(
            f"rngs: expected nnx.Rngs to fill {few(streams, 3)}, which {'has' if len(streams) == 1 else 'have'} only "
            "shape and dtype, got None; pass rngs=nnx.Rngs(0)"
        )
    elif streams and "default" not in rngs:
        wanted = dict.fromkeys(streams.values())
        if any(tag not in rngs for tag in wanted):
            errors.append(
                f"rngs: expected {', '.join(wanted)}, got {', '.join(rngs)}; nnx.Rngs(0) has a default for all"
            )

    def new_value(variable: Any, value: jax.ShapeDtypeStruct) -> jax.Array:
        if not isinstance(variable, nnx.RngKey):
            return jnp.zeros(value.shape, value.dtype)
        key = rngs[variable.tag]()
        return jax.random.split(key, value.shape) if value.shape else key

    def fill(values: Sequence[Any]) -> Any:
        changed = [(path, variable.replace(value)) for (path, variable), value in zip(flat, values, strict=True)]
        changed += [(path, variable.replace(new_value(variable, value))) for path, variable, value in empty]
        nnx.update(model, nnx.from_flat_state(changed))
        return model

    kernels = {_name(path): _kernel(nnx, module) for path, module in iter_modules(model)}
    known = {path: kernel for path, kernel in kernels.items() if kernel is not None}
    return Target({_name(path): get_value(variable) for path, variable in flat}, fill, known, errors)


def _kernel(nnx: Any, module: Any) -> Kernel | None:
    if isinstance(module, nnx.Linear):
        return Kernel(2, "linear")
    if isinstance(module, nnx.LinearGeneral) and not module.batch_axis:
        inputs = len(module.in_features)
        return Kernel(inputs + len(module.out_features), "linear", inputs)
    if isinstance(module, nnx.Conv | nnx.ConvTranspose):
        window = module.kernel_size
        reversed_ = isinstance(module, nnx.ConvTranspose) and not module.transpose_kernel
        axes = (1 if isinstance(window, int) else len(window)) + 2
        return Kernel(axes, "conv_transpose" if reversed_ else "conv")
    return None


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))
