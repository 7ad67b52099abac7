"""Finds norm layers in trees of arrays, by the names that Flax, jaxbn, PyTorch and Keras give their statistics."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxbn._arrays import to_float64
from jaxbn._norms.drift import Array
from jaxbn._norms.state import BatchNormState
from jaxbn._paths import name_of, path_of
from jaxbn.diagnose._evidence import Norm

# (mean, variance, scale, bias): Flax's and jaxbn's names, PyTorch's, and Keras'.
NAMES = (
    ("mean", "var", "scale", "bias"),
    ("running_mean", "running_var", "weight", "bias"),
    ("moving_mean", "moving_variance", "gamma", "beta"),
)
# Parts of a path that name a collection or a wrapper of variables, and not a module.
_WRAPPERS = frozenset({"batch_stats", "params", "value", "raw_value"})
_COUNT = "num_batches_tracked"

# The names of the modules that lead to a layer.
LayerPath = tuple[str, ...]


def find_norms(
    tree: Any,
    *,
    eps: float = 1e-5,
    decay: float | None = None,
    cumulative: bool = False,
    steps: int | None = None,
    replica_axis: int | None = None,
) -> list[Norm]:
    """All layers with a running mean and variance in `tree`, in its order; the options are `diagnose_statistics`'."""
    # What numpy.load returns is a mapping, and no tree to JAX.
    groups, models = _groups(dict(tree) if isinstance(tree, Mapping) else tree)
    norms = []
    for path, arrays in groups.items():
        for mean, var, scale, bias in NAMES:
            if mean in arrays and var in arrays:
                named = {"mean": arrays[mean], "var": arrays[var], "scale": arrays.get(scale), "bias": arrays.get(bias)}
                norms += make_norms(
                    name_of(path),
                    named,
                    model=models.get(path),
                    count=arrays.get(_COUNT),
                    eps=eps,
                    decay=decay,
                    cumulative=cumulative,
                    steps=steps,
                    replica_axis=replica_axis,
                )
    if not norms:
        some = ", ".join(path_of((*path, name)) for path, arrays in groups.items() for name in arrays)
        raise ValueError(
            "tree: expected running statistics, arrays named mean and var (Flax, jaxbn), running_mean and "
            f"running_var (PyTorch) or moving_mean and moving_variance (Keras), got {some[:200] or 'no arrays'}; "
            "give the tree that has batch_stats"
        )
    return norms


def make_norms(
    path: str,
    arrays: Mapping[str, Any],
    *,
    model: str | None = None,
    count: Any = None,
    domains: bool = False,
    eps: float,
    decay: float | None = None,
    cumulative: bool = False,
    steps: int | None = None,
    replica_axis: int | None = None,
) -> list[Norm]:
    """One layer from its arrays, or one for each domain: if there are `domains`, or if `count` has an axis."""
    named = {name: to_float64(value) for name, value in arrays.items() if value is not None}
    mean, var = named["mean"], named["var"]
    if mean.shape != var.shape:
        raise ValueError(
            f"{path}: expected mean and var of the same shape, got {mean.shape} and {var.shape}; the file is damaged, "
            "or these are not running statistics"
        )
    tracked = None if count is None else to_float64(count)
    disagreement = None
    if replica_axis is not None:
        named, disagreement = _merge_replicas(path, named, replica_axis, eps)
        # Counts have the same leading axis; the largest one is taken, as in sync_state.
        tracked = tracked if tracked is None or tracked.ndim == 0 else tracked.max(replica_axis)

    def make(name: str, values: Mapping[str, Array], *counts: int | None) -> Norm:
        flat: dict[str, Any] = {key: value.reshape(-1) for key, value in values.items()}
        norm = Norm(
            path=name, model=model, eps=eps, decay=decay, cumulative=cumulative, disagreement=disagreement, **flat
        )
        # Converters write 0 for an unknown count: it is believed only beside the initial statistics.
        known = (count for count in counts if count or (count == 0 and norm.untouched))
        return dataclasses.replace(norm, seen=next(known, None))

    if domains or (tracked is not None and tracked.ndim == 1 and named["mean"].ndim > 1):
        shape = named["mean"].shape
        # `steps` counts batches of all domains, and not those of each.
        counts = [None] * shape[0] if tracked is None else [int(n) for n in tracked]
        return [
            make(f"{path}[{d}]", {k: v[d] if v.shape == shape else v for k, v in named.items()}, count)
            for d, count in enumerate(counts)
        ]
    return [make(path, named, None if tracked is None else int(tracked.max()), steps)]


def _groups(tree: Any) -> tuple[dict[LayerPath, dict[str, Any]], dict[LayerPath, str]]:
    """Arrays by the path of their layer and their own name; and the kind of model of the layer, where names tell it."""
    groups: dict[LayerPath, dict[str, Any]] = {}
    models: dict[LayerPath, str] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = [name for key in keys for name in _split(key)]
        path = tuple(name for name in names if name not in _WRAPPERS)
        if path and (hasattr(leaf, "shape") or isinstance(leaf, int | float)):
            layer, name = path[:-1], path[-1]
            groups.setdefault(layer, {})[name] = leaf
            if "batch_stats" in names:
                models[layer] = "linen"
            elif "value" in names or "raw_value" in names:
                models[layer] = "nnx"
            elif isinstance(keys[-1], jax.tree_util.GetAttrKey) and name in BatchNormState._fields:
                models[layer] = "functions"
    return groups, models


def _split(key: Any) -> list[str]:
    """The names in one key of a tree. The keys of a flat state_dict are whole paths."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            text = str(getattr(key, attribute)).removesuffix(":0")  # Keras 2
            return text.split("/") if "/" in text else text.split(".")
    raise TypeError(f"tree: expected keys that are names or numbers, got {json.dumps(str(key))}")


def _merge_replicas(path: str, named: dict[str, Array], axis: int, eps: float) -> tuple[dict[str, Array], float]:
    """The mean of each array over replicas, and how far replicas are from it, in standard deviations."""
    for name, value in named.items():
        if not -value.ndim <= axis < value.ndim or value.ndim < 2:
            raise ValueError(
                f"replica_axis: expected {path}/{name} with an axis {axis} of replicas before its channels, "
                f"got shape {value.shape}; leave replica_axis out if it was saved from one device"
            )
    merged = {name: value.mean(axis) for name, value in named.items()}
    with np.errstate(invalid="ignore"):
        var = merged["var"] + eps
        apart = [np.abs(named["mean"] - merged["mean"]) / np.sqrt(var), np.abs(np.sqrt((named["var"] + eps) / var) - 1)]
    apart += [np.abs(named[name] - merged[name]) for name in ("scale", "bias") if name in named]
    return merged, max(float(v.max(initial=0)) for v in apart)
