"""Writes whole models as PyTorch state dicts."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping

import jax
import numpy as np

from jaxbn._paths import join, split
from jaxbn.interop._formats import COUNTER, TORCH, Layout
from jaxbn.interop._layers import PROJECTIONS, Layers
from jaxbn.interop._matching import Names, Plan, counter_of, duplicates, make_plans, raise_all
from jaxbn.interop._targets import Tree, open_target


def to_torch(
    target: Tree,
    names: Names | None = None,
    *,
    kinds: Mapping[str, str] | None = None,
    counters: Mapping[str, int] | None = None,
) -> dict[str, np.ndarray]:
    """Returns Linen variables or an NNX model as a PyTorch state dict: what `load_torch` takes.

    Formula: that of `load_torch`, in reverse. Every norm with running statistics also has
    `num_batches_tracked`, int64 [], which `load_state_dict(strict=True)` asks for. Attention becomes
    torch.nn.MultiheadAttention if that has weights of these shapes, unless `names` has a name for each projection.

    Args:
      target, names, kinds: as in `load_torch`; names of stacked layers need their *. Leaves for which `names` gives
        None are left out. `report.used` of `load_torch` is a mapping of names, with which the names come back
        that were loaded.
      counters: `num_batches_tracked` of norms that have no place for it, by PyTorch's name:
        `report.counters`. By default it is 0.

    Returns:
      NumPy arrays in the dtypes of the leaves, as contiguous copies, which `torch.from_numpy` needs.

    Raises:
      ValueError: a name is unknown or given twice, a leaf has no value, or its axes do not show which
        are those of stacked layers. One error lists all problems.
      TypeError: `target` is neither Linen variables nor an NNX model.

    Source: torch.nn.Module.state_dict.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax.linen as nn
      >>> from jaxbn.interop import to_torch
      >>> variables = nn.Dense(2).init(jax.random.key(0), jnp.ones((1, 3)))
      >>> {name: v.shape for name, v in to_torch(variables, {"": "fc"}).items()}
      {'fc.bias': (2,), 'fc.weight': (2, 3)}
    """
    opened = open_target(target)
    plans, errors = make_plans(Layers(opened, kinds, TORCH), names)
    state_dict: dict[str, np.ndarray] = {}
    thirds: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
    leaves: dict[tuple[str, int | None], list[str]] = defaultdict(list)
    unused = dict(counters or {})
    for plan in plans:
        if plan.keep:
            continue
        pattern, leaf = plan.candidates[0], plan.leaf
        third = plan.third(pattern)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            errors.append(f"{plan.path}: expected an array, got only shape and dtype")
            leaves[pattern, third].append(plan.path)
            continue
        try:
            layout = _layout(plan)
        except ValueError as error:
            errors.append(f"{plan.path}: {error}")
            continue
        module, leaf_name = split(plan.path)
        for index in np.ndindex(*leaf.shape[: pattern.count("*")]):
            name = functools.reduce(lambda name, i: name.replace("*", str(i), 1), index, pattern)
            leaves[name, third].append(plan.path)
            array = layout.save(np.asarray(leaf)[index])
            if third is not None:
                thirds[name][third] = array
                continue
            state_dict[name] = np.array(array.astype(np.int64) if leaf_name == COUNTER else array, order="C")
            counter = counter_of(name)
            if leaf_name == "mean" and join(module, COUNTER) not in opened.leaves and counter is not None:
                state_dict[counter] = np.array(unused.pop(counter, 0), np.int64)
    for name, parts in thirds.items():
        if len({array.shape[1:] for array in parts.values()}) > 1 or len(parts) < len(PROJECTIONS):
            got = ", ".join(PROJECTIONS[i] for i in sorted(parts))
            errors.append(f"{name}: expected query, key and value with as many inputs, to be one array, got {got}")
        else:
            state_dict[name] = np.concatenate([parts[i] for i in range(len(PROJECTIONS))])
    errors += duplicates(leaves)
    errors += [f"counters: expected {COUNTER} of a norm that has no place for it, got {name!r}" for name in unused]
    raise_all("to_torch", "returned", errors)
    return state_dict


def _layout(plan: Plan) -> Layout:
    """The layout of a leaf; ValueError if its name has no * for an axis that is seen to be of stacked layers."""
    path, leaf, layers, name = plan.path, plan.leaf, plan.layers, plan.candidates[0]
    depth = name.count("*")
    if depth > leaf.ndim:
        raise ValueError(f"expected at most {leaf.ndim} * in its name, one for each of its axes, got {name!r}")
    if split(path)[1] == "kernel":
        depths = layers.depths(path)
        if depths and depth not in depths:
            raise ValueError(
                f"expected a name with {depths[0]} *, in place of the numbers of the layers that are stacked along the "
                f"first axes of {leaf.shape}, got {name!r}; pass such names, or names=report.used of load_torch"
            )
        if depth == 0 and len(depths) > 1 and layers.given_layout(path) is None:
            raise ValueError(
                f"expected kinds or names to show whether {leaf.shape} are the axes of one layer or of stacked layers, "
                "got neither; pass kinds 'to_heads' for [in, heads, head_dim], or names with * for numbers of layers"
            )
    return layers.layout(path, depth)
