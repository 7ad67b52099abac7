"""Writes whole models as PyTorch state dicts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from jaxbn.interop._formats import COUNTER, TORCH
from jaxbn.interop._matching import Names, counter_of, duplicates, make_plans, raise_all
from jaxbn.interop._targets import open_target


def to_torch(
    target: Any,
    names: Names | None = None,
    *,
    kinds: Mapping[str, str] | None = None,
    counters: Mapping[str, int] | None = None,
) -> dict[str, NDArray[Any]]:
    """Returns Linen variables or an NNX model as a PyTorch state dict: what `load_torch` takes.

    Formula: that of `load_torch`, in reverse. Every norm with running statistics also has
    `num_batches_tracked`, int64 [], which `load_state_dict(strict=True)` asks for.

    Args:
      target, names, kinds: as in `load_torch`. Leaves for which `names` gives None are left out.
      counters: `num_batches_tracked` of norms that have no place for it, by PyTorch's name:
        `report.counters`. By default it is 0.

    Returns:
      NumPy arrays in the dtypes of the leaves, as contiguous copies, which `torch.from_numpy` needs.

    Raises:
      ValueError: a name is unknown or given twice, or a leaf has no value. One error lists all problems.
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
    plans, errors = make_plans(opened, names, kinds, TORCH)
    state_dict: dict[str, NDArray[Any]] = {}
    leaves = defaultdict(list)
    unused = dict(counters or {})
    for path, leaf, candidates, kind in plans:
        if not candidates:
            continue
        name = candidates[0]
        leaves[name].append(path)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            errors.append(f"{path}: expected an array, got only shape and dtype")
            continue
        array = TORCH.layouts[kind].save(np.asarray(leaf))
        module, slash, leaf_name = path.rpartition("/")
        state_dict[name] = np.array(array.astype(np.int64) if leaf_name == COUNTER else array, order="C")
        counter = counter_of(name)
        if leaf_name == "mean" and f"{module}{slash}{COUNTER}" not in opened.leaves and counter is not None:
            state_dict[counter] = np.array(unused.pop(counter, 0), np.int64)
    errors += duplicates(leaves)
    errors += [f"counters: expected {COUNTER} of a norm that has no place for it, got {name!r}" for name in unused]
    raise_all("to_torch", "returned", errors)
    return state_dict
