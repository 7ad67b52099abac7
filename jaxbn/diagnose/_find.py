"""Finds norm layers in trees of arrays, by the names that Flax, jaxbn, PyTorch and Keras give their statistics."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy.typing as npt

from jaxbn._norms.state import BatchNormState
from jaxbn._paths import name_of, path_of
from jaxbn.diagnose._evidence import COUNT, Interface

# (mean, variance, scale, bias): Flax's and jaxbn's names, PyTorch's, and Keras'.
NAMES = (
    ("mean", "var", "scale", "bias"),
    ("running_mean", "running_var", "weight", "bias"),
    ("moving_mean", "moving_variance", "gamma", "beta"),
)
# Parts of a path that name a collection or a wrapper of variables, and not a module.
_WRAPPERS = frozenset({"batch_stats", "params", "value", "raw_value"})


def find_layers(tree: object) -> list[tuple[str, Interface | None, dict[str, npt.ArrayLike]]]:
    """All layers with a running mean and variance in `tree`, in its order: path, interface, and arrays by Flax's names.

    The interface is None where names do not tell it.
    """
    groups: dict[tuple[str, ...], dict[str, npt.ArrayLike]] = {}
    interfaces: dict[tuple[str, ...], Interface] = {}
    # What numpy.load returns is a mapping, and no tree to JAX.
    for keys, leaf in jax.tree_util.tree_leaves_with_path(dict(tree) if isinstance(tree, Mapping) else tree):
        names = [name for key in keys for name in _names(key)]
        *layer, name = [name for name in names if name not in _WRAPPERS] or [""]
        if name and (hasattr(leaf, "shape") or isinstance(leaf, int | float)):
            path = tuple(layer)
            groups.setdefault(path, {})[name] = leaf
            if "batch_stats" in names:
                interfaces[path] = "linen"
            elif "value" in names or "raw_value" in names:
                interfaces[path] = "nnx"
            elif isinstance(keys[-1], jax.tree_util.GetAttrKey) and name in BatchNormState._fields:
                interfaces[path] = "functions"

    found = []
    for path, arrays in groups.items():
        for own in NAMES:
            if own[0] in arrays and own[1] in arrays:
                pairs = zip((*NAMES[0], COUNT), (*own, COUNT), strict=True)
                named = {flax: arrays[name] for flax, name in pairs if name in arrays}
                found.append((name_of(path), interfaces.get(path), named))
    if not found:
        some = ", ".join(path_of((*path, name)) for path, arrays in groups.items() for name in arrays)
        raise ValueError(
            "tree: expected running statistics, arrays named mean and var (Flax, jaxbn), running_mean and "
            f"running_var (PyTorch) or moving_mean and moving_variance (Keras), got {some[:200] or 'no arrays'}; "
            "give the tree that has batch_stats"
        )
    return found


def _names(key: object) -> list[str]:
    """The names in one key of a tree. The keys of a flat state_dict are whole paths."""
    text = jax.tree_util.keystr((key,), simple=True).removesuffix(":0")  # Keras 2
    return text.split("/") if "/" in text else text.split(".")
